"""optuna-dashboard on a study: with its latencies, networks and budget, made from the stored trials when asked for.

Nothing of it is written. optuna-dashboard 0.21 reads a trial's constraints from the list that Optuna 4 stored; Optuna 5
stores one number per name, so the dashboard would take every trial for one that fits. It is therefore given a storage
whose trials carry that list as well, and in which a trial that a tier guesses of, without a training, has no values.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from nas.errors import UserError
from nas.quality.tier import told_score
from nas.search.given import GIVEN
from nas.search.latency import TrialLatency
from nas.study.storage import open_storage
from nas.study.trials import IDENTITY

if TYPE_CHECKING:
    from collections.abc import Container
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, TrialState


@dataclass(frozen=True)
class Searched:
    """What a study searches, as its identity says."""

    budget_ms: float
    quality: str = "prior"
    """Name of the tier that estimates quality."""
    resolution: int | None = None
    """Pixels a side of all networks; None where it is searched."""
    families: tuple[str, ...] = ()
    space: str = ""
    """Digest of the axes that they are searched along."""

    @classmethod
    def of(cls, study_id: int, storage: BaseStorage) -> Self | None:
        """None of a study that is not vitnas's."""
        found = storage.get_study_user_attrs(study_id).get(IDENTITY)
        if found is None:
            return None
        resolution, families = found.get("resolution"), tuple(found.get("families", ()))
        return cls(found["budget_ms"], found.get("quality", "prior"), resolution, families, found.get("space", ""))


STUDY = re.compile(r"/api/studies/(\d+)/?")
HIDDEN = ("arch", "detail", GIVEN)
"""Attributes of trials that their notes tell in words."""


def serve(storage: str | Path, host: str = "127.0.0.1", port: int = 8080) -> None:
    """Print the dashboard's address and serve it until Ctrl-C.

    The dashboard has no login and can delete studies: keep `host` a local one.

    Args:
        storage: a journal file or database URL that exists already.
        port: 0 for any free one.

    Raises:
        UserError: the storage cannot be read, or the address cannot be listened on.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}: give 1 to 65535, or 0 for any free one")
    application = app(storage)
    try:
        server = make_server(host, port, application, _Server, _QuietHandler)
    except OSError as error:
        hint = "; take another --port" if error.errno == errno.EADDRINUSE else ""
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}{hint}") from error
    with server:
        address = f"http://{host}:{server.server_port}/dashboard"
        print(f"dashboard: {address} (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def app(storage: str | Path) -> WSGIApplication:
    """The dashboard of `storage` as a WSGI callable."""
    import optuna_dashboard

    shown = open_storage(storage, read_only=True)
    stored_trials = shown.get_all_trials

    def get_all_trials(
        study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        trials = map(_shown, stored_trials(study_id, deepcopy))
        return [trial for trial in trials if states is None or trial.state in states]

    shown.get_all_trials = get_all_trials  # type: ignore[method-assign]
    return _with_notes(optuna_dashboard.wsgi(shown), shown, lambda study_id: stored_trials(study_id, deepcopy=False))


def _shown(trial: FrozenTrial) -> FrozenTrial:
    """A trial as the dashboard is to show it: rounded, with its list of constraints; no values where it was not
    trained."""
    from optuna.trial import TrialState

    attrs = trial.user_attrs
    if not trial.constraints and "latency_ms" not in attrs:
        return trial
    shown = copy.copy(trial)
    shown.system_attrs = {**trial.system_attrs, "constraints": list(trial.constraints.values())}
    shown.user_attrs = {
        key: round(value, 3) if isinstance(value, float) else value for key, value in attrs.items() if key not in HIDDEN
    }
    if trial.state == TrialState.COMPLETE:
        shown.values = [round(value, 3) for value in (_score(trial), *trial.values[1:])]
        if guessed(trial):
            shown.state, shown.values = TrialState.PRUNED, None
    return shown


def _score(trial: FrozenTrial) -> float:
    """Of a trial that has one, within 0 to 100."""
    return told_score(trial.values[0])


def guessed(trial: FrozenTrial) -> bool:
    """Whether a tier that trains has not trained this network."""
    return bool(trial.user_attrs.get("detail", {}).get("training", {}).get("rungs") == {})


def _with_notes(
    inner: WSGIApplication, storage: BaseStorage, trials_of: Callable[[int], Sequence[FrozenTrial]]
) -> WSGIApplication:
    """The dashboard, whose answer on a study of vitnas holds a note on every trial and plots of their latencies."""

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        found = STUDY.fullmatch(environ.get("PATH_INFO", ""))
        if found is None or environ.get("REQUEST_METHOD") != "GET":
            return inner(environ, start_response)
        answer: list[Any] = []

        def keep(status: str, headers: list[tuple[str, str]], error: Any = None, /) -> Callable[[bytes], object]:
            answer.extend((status, headers))
            return lambda body: None

        body = b"".join(inner(environ, keep))
        status, headers = answer
        if status.startswith("200"):
            study_id = int(found[1])
            searched = Searched.of(study_id, storage)
            if searched is not None:
                body = json.dumps(_explained(json.loads(body), searched, trials_of(study_id))).encode()
                headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
                headers.append(("Content-Length", str(len(body))))
        start_response(status, headers)
        return [body]

    return application


def _explained(detail: dict[str, Any], searched: Searched, trials: Sequence[FrozenTrial]) -> dict[str, Any]:
    """The dashboard's document of a study, with notes where nobody has written one, and with plots."""
    stored = {trial._trial_id: trial for trial in trials}
    for shown in (*detail["trials"], *detail["best_trials"]):
        if shown["note"]["version"] == 0 and shown["trial_id"] in stored:
            shown["note"]["body"] = note(stored[shown["trial_id"]], searched)
    if detail["note"]["version"] == 0:
        best = [stored[shown["trial_id"]] for shown in detail["best_trials"]]
        detail["note"]["body"] = front_note(best, searched)
    detail["objective_names"] = [f"score ({searched.quality})", "throughput, images/s"]
    detail["plotly_graph_objects"] += [
        {"id": name, "graph_object": json.dumps(figure)} for name, figure in _figures(trials, searched).items()
    ]
    return detail


# ---------------------------------------------------------------------------------- notes


def note(trial: FrozenTrial, searched: Searched) -> str:
    """A trial in words, in Markdown: its latency, its score, its parameters' values and its stages."""
    attrs = trial.user_attrs
    if "arch" not in attrs:
        return str(attrs.get("error", ""))
    from nas.networks.build import from_document
    from nas.search.outcome import summary_of
    from search_spaces.arch import ArchError

    whose = f" from {attrs['parent']}" if "parent" in attrs else ""
    kind = f", {attrs['kind']}{whose}" if "kind" in attrs else ""
    lines = [f"**{attrs.get('name') or 'found'}** ({attrs['family']}), {attrs['resolution']} px{kind}", ""]
    latency = TrialLatency.read({**attrs.get("detail", {}), "latency_ms": attrs["latency_ms"]})
    lines += [latency_words(latency, attrs["budget_ms"]), "", score_words(trial), ""]
    try:
        if trial.params:
            lines += [table(("parameter", "value"), values_of(trial.params, attrs["family"], searched)), ""]
        stages = summary_of(from_document(json.dumps(attrs["arch"])))
    except (ArchError, UserError, KeyError) as error:
        return "\n".join([*lines, f"The network cannot be read: another version of vitnas wrote it ({error})."])
    rows = [(i, *(f"{value:.3g}" for value in stage.values())) for i, stage in enumerate(stages, 1)]
    if stages:
        lines += [table(("stage", *(name.replace("_", " ") for name in stages[0])), rows), ""]
    return "\n".join([*lines, "```json", textwrap.fill(json.dumps(attrs["arch"]), 100), "```"])


def latency_words(latency: TrialLatency, budget_ms: float) -> str:
    ci = latency.ci_ms
    if ci is None and latency.rounds is None:  # an earlier version kept no interval
        return f"Latency {latency.latency_ms:.3f} ms, budget {budget_ms:g} ms."
    ends = "measured briefly" if ci is None else f"95%: {ci[0]:.3f} to {ci[1]:.3f}"
    told = f"Latency {latency.latency_ms:.3f} ms ({ends}), budget {budget_ms:g} ms: {latency.verdict(budget_ms)}."
    if not latency.by_precision:
        return told
    each = ", ".join(f"{precision} {ms:.3f} ms" for precision, ms in latency.by_precision.items())
    return f"{told} In {latency.precision}; measured: {each}."


def score_words(trial: FrozenTrial) -> str:
    detail = trial.user_attrs.get("detail", {})
    if guessed(trial):
        return "Not trained, so nothing says how good it is."
    if not trial.values:
        return ""
    ci = detail.get("quality_ci")
    return f"Score {_score(trial):.1f}" + (
        f"; its estimate of top-1 ({detail['quality_how']}) is {told_score(detail['quality_estimate']):.1f}% "
        f"(95%: {told_score(ci[0]):.1f} to {told_score(ci[1]):.1f})."
        if ci
        else "."
    )


def values_of(params: Mapping[str, int], family: str, searched: Searched) -> list[tuple[str, Any]]:
    """What a trial's indices stand for in its family; those that it has no use for are left out."""
    from search_spaces.registry import spaces_of
    from search_spaces.space import LEVELS

    options = spaces_of(searched.families or (family,), searched.space)[family].options
    found = {name: values[params[name] * len(values) // LEVELS] for name, values in options.items() if name in params}
    if searched.resolution is not None:
        found["resolution"] = searched.resolution
    return list(found.items())


def front_note(front: Sequence[FrozenTrial], searched: Searched) -> str:
    """A study in words: what it searches, and its front."""
    lines = [f"Budget {searched.budget_ms:g} ms. The front, fastest first:", ""]
    rows = [
        (
            trial.number,
            t.get("name") or "found",
            t["family"],
            f"{t['latency_ms']:.3f}",
            f"{_score(trial):.1f}",
            t.get("kind", ""),
        )
        for trial in sorted(front, key=lambda trial: trial.user_attrs.get("latency_ms", 0))
        if "latency_ms" in (t := trial.user_attrs) and "family" in t
    ]
    return "\n".join([*lines, table(("trial", "network", "family", "latency, ms", "score", "kind"), rows)])


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells)


# ---------------------------------------------------------------------------------- plots


def _figures(trials: Sequence[FrozenTrial], searched: Searched) -> dict[str, dict[str, Any]]:
    """Plotly figures by their ids: scores against latency with the front, and latencies in the order of the trials."""
    measured = [trial for trial in trials if "latency_ms" in trial.user_attrs and "family" in trial.user_attrs]
    if not measured:
        return {}
    known = [trial for trial in measured if trial.values and not guessed(trial)]
    budget = searched.budget_ms
    against: dict[str, Any] = {
        "data": [*_dots(known, lambda trial: trial.user_attrs["latency_ms"], _score)],
        "layout": _layout("Score against latency", "median latency, ms", f"score ({searched.quality})"),
    }
    scores = [*map(_score, known)] or [0.0, 1.0]
    against["data"].append(_line("budget", [budget, budget], [min(scores), max(scores)], dash="dash"))
    front = _front([trial for trial in known if trial.user_attrs.get("feasible")])
    if front:
        x, y = zip(*((trial.user_attrs["latency_ms"], _score(trial)) for trial in front), strict=True)
        against["data"].append(_line("front", [*x, budget], [*y, y[-1]], shape="hv"))
    untrained = [trial for trial in measured if guessed(trial)]
    if untrained:
        foot = _dots(untrained, lambda trial: trial.user_attrs["latency_ms"], lambda trial: 0, "-open")
        against["data"] += [dots | {"yaxis": "y2", "name": f"{dots['name']}, not trained"} for dots in foot]
        against["layout"]["yaxis"]["domain"] = [0.12, 1]
        against["layout"]["yaxis2"] = {"domain": [0, 0.07], "showticklabels": False, "zeroline": False}
    numbers = [trial.number for trial in measured]
    latencies = {
        "data": [
            *_dots(measured, lambda trial: trial.number, lambda trial: trial.user_attrs["latency_ms"]),
            _line("budget", [min(numbers), max(numbers)], [budget, budget], dash="dash"),
        ],
        "layout": _layout("Latency of every trial", "trial", "median latency, ms"),
    }
    return {"vitnas-front": against, "vitnas-latency": latencies}


def _front(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those that none of these beats in both score and latency, fastest first."""
    front: list[FrozenTrial] = []
    for trial in sorted(trials, key=lambda trial: (trial.user_attrs["latency_ms"], -trial.values[0])):
        if not front or trial.values[0] > front[-1].values[0]:
            front.append(trial)
    return front


def _dots(
    trials: Sequence[FrozenTrial],
    x: Callable[[FrozenTrial], float],
    y: Callable[[FrozenTrial], float],
    look: str = "",
) -> list[dict[str, Any]]:
    """A trace of dots for each family."""
    families: dict[str, list[FrozenTrial]] = {}
    for trial in trials:
        families.setdefault(trial.user_attrs["family"], []).append(trial)
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": family,
            "x": list(map(x, own)),
            "y": list(map(y, own)),
            "text": [
                f"trial {t.number} {t.user_attrs.get('name', '')} {t.user_attrs['latency_ms']:.3f} ms" for t in own
            ],
            "marker": {"size": 8, "symbol": f"circle{look}"},
        }
        for family, own in sorted(families.items())
    ]


def _line(name: str, x: Sequence[float], y: Sequence[float], **look: str) -> dict[str, Any]:
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": {"color": "#6b7580", **look}}


def _layout(title: str, x: str, y: str) -> dict[str, Any]:
    return {"title": {"text": title}, "xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, *args: Any) -> None:
        """One line per request on the terminal helps nobody."""
