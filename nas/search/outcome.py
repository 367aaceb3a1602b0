"""The end of a search: it judges, measures and trains the best, and writes the files of a run's folder."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.data.lineage import record
from nas.ending import Ending
from nas.export.artifact import CONVERTED, lower_precision
from nas.export.card import LABELS, PREPROCESS, Card, Latency, Preprocess
from nas.export.folder import save_onnx
from nas.export.onnx import label_onnx, write_onnx
from nas.files import drafted, folder_lock, replace_file
from nas.intervals import guessing
from nas.measure.budget import Verdict
from nas.measure.runtime import RUNTIMES
from nas.measure.samples import BUSY_SPREAD
from nas.quality.kept import Kept, path_of, read
from nas.quality.parent import parent_weights
from nas.search.advice import advice, latencies
from nas.search.closing import CLOSING_ROUNDS, MOST_ROUNDS, ClosingInterrupted, closing_run, ties_of
from nas.search.final import FullTraining, result_path, weights_of
from nas.search.log import breakdown
from nas.search.request import storage_of
from nas.search.rows import Row, arch_of, best_of, choose, front_of, label_of, rows_of
from nas.study.storage import storage_errors
from nas.units import counted

if TYPE_CHECKING:
    import numpy as np
    import optuna

    from nas.data.images import Images
    from nas.quality.tier import Tier
    from nas.search.final import Accuracies
    from nas.search.log import SearchLog
    from nas.search.request import SearchRequest
    from search_spaces import Arch

LOCK = ".end.lock"
HELD_OUT = "training images that the search held out and chose by"
"""What the accuracy of a candidate's own training was counted on."""


def finish_run(
    options: SearchRequest,
    study: optuna.Study,
    run: SearchLog,
    command: str,
    phase: Callable[[str, int, int], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Judge what was found, measure the best side by side, train them fully, and write best/ and the run's files.

    Workers on one folder end one after the other. A step that fails, or that Ctrl-C ends, is told and recorded, and the
    next goes on; after Ctrl-C those that take long are left out. What is known is written before the final trainings.

    Returns:
        The report's data.

    Raises:
        UserError: another worker is at its end, and after Ctrl-C that is not waited for.
    """
    with folder_lock(options.folder, waiting=not run.interrupted, name=LOCK, say=say):
        return _Finish(options, study, run, command, phase, say).run()


class _Finish:
    """`finish_run`, step by step."""

    def __init__(
        self,
        options: SearchRequest,
        study: optuna.Study,
        run: SearchLog,
        command: str,
        phase: Callable[[str, int, int], None] | None,
        say: Callable[[str], None],
    ) -> None:
        self.options, self.study, self.outset, self.command, self.phase = options, study, run, command, phase
        self.tier, self.trained = run.tier, run.tier.trained
        self.end = Ending(say)
        self.end.interrupted = run.interrupted
        self.notes: list[str] = []
        self.rows = rows_of(study)
        self.validation = study.user_attrs.get("validation")
        self.final: list[Row] = []
        self.beside: list[Row] = []
        self.accuracy: dict[str, Any] | None = None
        self.kept: Kept | None = None

    def run(self) -> dict[str, Any]:
        if self.trained:
            self._judge()
        self._measure()
        if self.trained and self.final and self.winner and not self.end.interrupted:
            if weights_of(self.options, arch_of(self.winner)) is None:
                self._write()
            self._train()
        return self._write()

    @contextmanager
    def _step(self, what: str) -> Iterator[None]:
        with self.end.step(what), storage_errors(storage_of(self.options)):
            yield

    @property
    def feasible(self) -> list[Row]:
        return [row for row in self.rows if row["feasible"]]

    @property
    def winner(self) -> Row | None:
        if self.final:
            return next((entry for entry in self.final if entry["role"] == "winner"), None)
        return choose(self.feasible)

    def _judge(self) -> None:
        """Validate the tier, and train the best to its last rung; estimates by all trainings."""
        from nas.search.final import review, settle
        from nas.search.validate import validate

        if not self.end.interrupted:
            with self._step("validation"):
                self.validation = validate(self.options, self.study, self.tier, self.rows, self.notes.append)
        found = self.validation
        selects = not self.tier.needs_validation if found is None else found["selects"]
        if not selects:
            why = "has not been validated" if found is None else "cannot be told from 0"
            self.notes.append(
                f"the tier {self.tier.name} does not choose: its tau with full trainings {why}; the most parameters "
                "within the budget choose"
            )
        self.rows = review(self.tier, self.rows, selects)
        if not self.end.interrupted:
            with self._step("training of the best to the end"):
                self.rows = settle(self.study, self.tier, self.rows, selects, self.notes.append)

    def _measure(self) -> None:
        watched = partial(self.phase, "closing side-by-side run") if self.phase else None
        if self.feasible and not self.end.interrupted:
            with self._step("closing side-by-side run"):
                if self.phase:
                    self.phase("exporting the best for the closing side-by-side run", 0, 0)
                try:
                    self.final, self.beside = closing_run(
                        self.options, self.rows, self.outset.calibration, watched, self.notes.append
                    )
                except ClosingInterrupted as cut:
                    self.final, self.beside = cut.final, cut.beside
                    raise
        if self.feasible and not self.final:
            left_out = "closing side-by-side run" + (" and no final training" if self.options.plan else "")
            self.notes.append(f"no {left_out} was made; latencies are those of the single trials")
        if self.options.against and self.feasible and not self.beside:
            self.notes.append(
                "no network of --against was measured: there was no closing run, or they are all in its table"
            )

    def _train(self) -> None:
        """Full trainings of the winner and of the published network nearest it, by one recipe, over the same seeds."""
        from nas.search.final import train_fully

        baseline, found = baseline_of(self.final, self.winner), []
        for row in filter(None, (self.winner, baseline)):
            with self._step(f"final training of {label_of(row)}"):
                found.append(train_fully(self.options, self.tier, label_of(row), arch_of(row)))
                row["accuracy"] = found[-1].to_dict()
            if self.end.interrupted:
                return
        self.accuracy = accuracy_of(self.options, self.tier, found, self.winner, baseline)

    def _write(self) -> dict[str, Any]:
        """Write best/ and the run's files; the report's data."""
        from nas.search.report import write_run

        best, trained = self.options.folder / "best", False
        if self.winner is not None:
            trained = self._save(arch_of(self.winner), best)
        elif not (best / "model.safetensors").is_file():
            shutil.rmtree(best, ignore_errors=True)
        data = self._data(trained)
        with self._step("report"):
            write_run(self.options.folder, data)
            self.study.set_user_attr("result", winner_line(data))
        return data | {"failures": self._failures(), "interrupted": self.end.interrupted}

    def _images(self, arch: Arch) -> np.ndarray | None:
        """Some validation images of a search that trains."""
        from nas.data.dataset import some_of

        return some_of(self.tier.trainer.data.at(arch.resolution).val) if self.trained else None

    def _card(self, arch: Arch, trained: bool) -> Card:
        """What best/ says of its network; its accuracy is that of its own weights: the first seed's, or those that the
        search kept."""
        if not self.trained:
            card = Card.untrained(arch.resolution)
        else:
            data = self.tier.trainer.data.at(arch.resolution)
            card = Card(preprocess=Preprocess.of(data.val.transform))
            if self.kept:
                card = Card.of(data, self.kept.top1, self.kept.judged, HELD_OUT)
            elif trained:
                result = result_path(self.options, arch, seed=0)  # Ctrl-C while it is judged leaves weights alone
                found = FullTraining.read(result) if result.is_file() else None
                card = Card.of(data, found.top1, found.images) if found else Card.of(data)
        return card

    def _latency(self) -> Latency | None:
        """The winner's: of the closing run, or of its trial where there was none; None where it has no interval."""
        row, settings = self.winner, asdict(self.options.settings)
        ci = [row.get(f"ci_{end}_ms", row.get(f"latency_ci_{end}_ms")) for end in ("low", "high")]
        if None in ci:
            return None
        names = ("device", "runtime", "precision", "threads", "batch_size")
        cpu = self.outset.hardware.get("cpu")
        return Latency(ms=row["latency_ms"], ci=ci, cpu=cpu, **{name: settings[name] for name in names})

    def _save(self, arch: Arch, folder: Path) -> bool:
        """Write arch.json and the weights, of the final training or else of the search's own, where there are any; then
        model.onnx, whose metadata says whether there are, and beside it the file that was measured, where that has
        another precision: its latency is known, and its accuracy is not. Whether they are trained."""
        options = self.options
        if self.phase:
            self.phase("writing best/", 0, 0)
        weights, images = self._weights(arch) if self.trained else (None, None)
        with self._step("best/"):
            start_best(arch, folder, weights)
            if weights is not None:
                record(folder, images, parent_weights(options.plan.parent))
        converted = options.settings.precision in CONVERTED and RUNTIMES[options.settings.runtime].artifact == "onnx"
        with self._step("best/model.onnx"):
            card = self._card(arch, weights is not None)
            if not converted:
                card = card.model_copy(update={"latency": self._latency()})
            save_best(arch, folder, weights, options.settings.batch_size, card, self._images(arch))
        path = folder / "model.onnx"
        if converted:
            lower = folder / f"model.{options.settings.precision}.onnx"
            lower.unlink(missing_ok=True)
            if path.is_file():
                with self._step(f"best/{lower.name}"), drafted(lower) as draft:
                    shutil.copyfile(path, draft)
                    lower_precision(draft, options.settings, self.outset.calibration)
                    card = self._card(arch, weights is not None)
                    card = card.model_copy(update={"accuracy": None, "latency": self._latency()})
                    label_onnx(draft, arch, weights is not None, card)
        return weights is not None

    def _weights(self, arch: Arch) -> tuple[Path | None, Images]:
        """A network's weights, the fullest training's that there is, and what they were trained on; sets `kept`."""
        trainer, full = self.tier.trainer, weights_of(self.options, arch)
        short = path_of(trainer.kept, arch.digest())
        self.kept = None if full else read(short)
        if self.kept:
            return short, trainer.taught(arch.resolution)
        return full, trainer.data.train

    def _failures(self) -> list[str]:
        return [*self.outset.failures, *self.end.failures]

    def _data(self, trained: bool) -> dict[str, Any]:
        options, run, rows, winner = self.options, self.outset, self.rows, self.winner
        measured = [row for row in rows if row["state"] == "complete"]
        fastest = next(iter(latencies(rows, self.final)), None)
        return {
            "study": options.study,
            "command": self.command,
            "started": run.started,
            "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
            "interrupted": self.end.interrupted,
            "failures": self._failures(),
            "budget_ms": options.budget_ms,
            "settings": asdict(options.settings),
            "throughput_at": options.throughput_at,
            "num_classes": options.num_classes,
            "seed": options.seed,
            "sampler": options.sampler,
            "hardware": run.hardware,
            "data": self._about_data() if self.trained else None,
            "quality_tier": tier_data(run),
            "validation": self.validation,
            "accuracy": self.accuracy,
            "trials": [{k: v for k, v in row.items() if k not in ("arch", "features")} for row in rows],
            "pareto": [{k: row[k] for k in PARETO_KEYS} for row in front_of(rows)],
            "final": [{k: v for k, v in entry.items() if k != "arch"} for entry in self.final],
            "against": self.beside,
            "winner": winner_data(winner),
            "fastest": fastest and {"label": label_of(fastest), **{k: fastest[k] for k in FASTEST_KEYS}},
            "ties": ties_of(self.final),
            "advice": advice(options, run, rows, self.final, self.command) if winner is None else [],
            "notes": [*run.notes, *self.notes, *self._remarks(measured, trained)],
            "skipped": skipped_lines(options, rows),
            "protocol": protocol(options),
            "breakdown": breakdown(run),
            "trials_per_minute": 60 * len(run.trial_s) / run.wall_s if run.trial_s else 0.0,
            "median_trial_s": statistics.median(run.trial_s) if run.trial_s else 0.0,
            "untrained": not trained,
            "short_training": self.kept and {"epochs": self.kept.epochs, "images": self.kept.images},
        }

    def _about_data(self) -> dict[str, Any]:
        from nas.data.about import summary

        return asdict(summary(self.tier.trainer.data))

    def _remarks(self, measured: Sequence[Row], trained: bool) -> Iterator[str]:
        """What a reader of the figures should know. trained: the weights in best/."""
        if self.trained:
            from nas.data.batches import skipped_line

            skipped = skipped_line(self.tier.trainer.loaders)
            if skipped:
                yield skipped
        if self.accuracy:
            told = guessing(self.accuracy["rows"][0]["top1_ci"], self.options.num_classes)
            if told:
                yield f"{self.accuracy['rows'][0]['label']}: {told}"
        first, winner = best_of(self.feasible), self.winner
        if self.kept:
            yield self.kept.words
        elif self.trained and winner and not trained:
            yield "best/ is untrained: the search has kept no training of this network"
        if self.trained and self.final and winner and self.accuracy is None:
            yield "the final trainings are not finished: the same command goes on with them"
        if self.final and winner is None:
            yield "every trial that had met the budget was over it in the closing side-by-side run"
            if (self.options.folder / "best" / "model.safetensors").is_file():
                yield "best/ is left as it was: a trained network that met the budget in an earlier run"
        elif self.final and first and first["trial"] != winner["trial"]:
            yield f"{label_of(first)} ranked first in the search but not among those that fit in the closing run"
        cached = [row for row in measured if row["source"].startswith("cache")]
        if cached:
            yield (
                f"{len(cached)} of {len(measured)} trials took their latency from this machine's cache, measured while "
                "it ran at the same speed (--no-cache measures anew); the closing run is measured now"
            )
        drifts = [row["reference_drift"] for row in measured if row["reference_drift"] is not None]
        drift = statistics.median(drifts) if drifts else 0.0
        if drift > BUSY_SPREAD:
            yield (
                f"this machine was busy: within a trial the reference network's latency moved by {drift:.0%} (median); "
                "run again on a quiet machine for figures to rely on"
            )


def accuracy_of(
    options: SearchRequest, tier: Tier, found: Sequence[Accuracies], winner: Row, baseline: Row | None
) -> dict[str, Any] | None:
    """The winner's full trainings, and how they compare with those of the published network; None without the first."""
    from nas.search.final import compare_means, verdict

    if "accuracy" not in winner:
        return None
    table = {
        "rows": [each.to_dict() for each in found],
        "epochs": options.plan.final_epochs,
        "recipe": tier.recipe(options.plan.final_epochs).name,
        "verdict": "",
    }
    if len(found) < 2:
        why = "the winner is itself a published network" if winner["name"] else "no published network beside it"
        return table | {"verdict": f"the training of {label_of(baseline)} failed" if baseline else why}
    result = compare_means(*found)
    name = label_of(baseline)
    over = {
        Verdict.FITS: "",
        Verdict.UNSURE: f"; {name} may be over the budget",
        Verdict.OVER: f"; {name} is over the budget, as every published network tried",
    }
    return table | result | {"verdict": verdict(result, *found) + over[baseline["verdict"]]}


def baseline_of(final: Sequence[Row], winner: Row) -> Row | None:
    """The published network within budget whose latency is nearest the winner's, or of those that may be within it; the
    fastest one where there are none."""
    if winner["name"]:
        return None
    published = [row for row in final if row["name"] and not row["error"]]
    for wanted in (Verdict.FITS, Verdict.UNSURE):
        within = [row for row in published if row["verdict"] == wanted]
        if within:
            return min(within, key=lambda row: abs(row["latency_ms"] - winner["latency_ms"]))
    return min(published, key=lambda row: row["latency_ms"], default=None)


FASTEST_KEYS = ("family", "latency_ms", "latency_ci_low_ms", "latency_ci_high_ms")
PARETO_KEYS = (
    "arch",
    "family",
    "name",
    "quality",
    "quality_estimate",
    "quality_ci",
    "latency_ms",
    "verdict",
    "throughput",
    "params_m",
    "macs_m",
    "trial",
)


def start_best(arch: Arch, folder: Path, weights: Path | None) -> None:
    """Write arch.json and the weights where they are trained; no file of other weights stays beside them."""
    folder.mkdir(exist_ok=True)
    kept, document = folder / "arch.json", arch.to_json()
    same = weights is not None and kept.is_file() and kept.read_text() == document
    for earlier in (*folder.glob("model.*"), folder / PREPROCESS, folder / LABELS):
        if not (same and earlier.name == "model.safetensors"):
            earlier.unlink(missing_ok=True)
    replace_file(kept, document)
    if weights is not None:
        replace_file(folder / "model.safetensors", weights.read_bytes())


def save_best(
    arch: Arch, folder: Path, weights: Path | None, batch_size: int, card: Card, images: np.ndarray | None = None
) -> None:
    """Write model.onnx and its card; trained, it is checked against PyTorch, on `images` too (see `save_onnx`)."""
    from search_spaces import create_model

    if weights is not None:
        save_onnx(create_model(arch, weights=weights), folder, batch_size, trained=True, card=card, images=images)
        return
    card.write(folder)
    with drafted(folder / "model.onnx") as draft:
        write_onnx(arch, draft, batch_size)
        label_onnx(draft, arch, trained=False, card=card)


def tier_data(run: SearchLog) -> dict[str, Any]:
    """What a report says of the tier; held_out: mean absolute error in points and tau of its surrogate."""
    tier = run.tier
    held_out = tier.held_out() if tier.trained else None
    return {"name": tier.name, "label": tier.label, "note": tier.note, "trained": tier.trained, "held_out": held_out}


def winner_data(winner: Row | None) -> dict[str, Any] | None:
    if winner is None:
        return None
    return {
        "label": label_of(winner),
        "family": winner["family"],
        "trial": winner["trial"],
        **{key: winner[key] for key in ("latency_ms", "verdict", "quality", "quality_estimate", "quality_ci")},
        "ci_low_ms": winner.get("ci_low_ms", winner.get("latency_ci_low_ms")),
        "ci_high_ms": winner.get("ci_high_ms", winner.get("latency_ci_high_ms")),
        **{key: winner.get("accuracy", {}).get(key) for key in ("top1_ci", "images", "seeds")},
        "top1": winner.get("accuracy", {}).get("mean"),
        "accuracy": winner.get("accuracy", {}).get("words", ""),
        "arch": winner["arch"],
        "summary": [stage.model_dump() for stage in arch_of(winner).summary()],
    }


def winner_line(data: Mapping[str, Any]) -> str:
    """The study's result in one line."""
    if data["winner"] is None:
        return f"nothing fits {data['budget_ms']:g} ms"
    accuracy = data["winner"]["accuracy"]
    how = "within" if data["winner"]["verdict"] == Verdict.FITS else "may be within"
    return f"{data['winner']['label']} ({data['winner']['family']}) {how} {data['budget_ms']:g} ms" + (
        accuracy and f", {accuracy}"
    )


def exit_code(data: Mapping[str, Any]) -> int:
    """0 where a network surely fits and every step was made, else 1."""
    winner = data["winner"]
    return 0 if winner and winner["verdict"] == Verdict.FITS and not data["failures"] else 1


def skipped_lines(options: SearchRequest, rows: Sequence[Row]) -> list[str]:
    """Published variants that were not tried, a line a family: farther from the budget, or the search ended first."""
    from search_spaces.registry import FAMILIES

    tried = {row["name"] for row in rows}
    per_family = {family: [n for n in FAMILIES[family].variants if n not in tried] for family in options.families}
    return [f"published, not tried ({family}): {', '.join(names)}" for family, names in per_family.items() if names]


def protocol(options: SearchRequest) -> list[str]:
    from nas.measure.cache import REFERENCE
    from nas.measure.samples import CONFIDENCE, MAX_ROUNDS, MIN_ROUNDS, PRECISION

    return [
        f"Each network runs in a fresh process pinned to {counted(options.settings.threads, 'CPU')}; every other "
        "process of the search is stopped while it is timed.",
        f"{MIN_ROUNDS} to {MAX_ROUNDS} rounds of short slices alternate with {REFERENCE} as the fixed reference, after "
        "untimed runs; a trial ends early once its interval is wholly over the budget, judged after each round from "
        "the 6th on, or far over it from the 3rd on.",
        f"Latency is the median of all samples; its {CONFIDENCE:.0%} interval comes from the rounds' medians by order "
        f"statistics, and rounds stop once its half-width is {PRECISION:.0%} of the median. samples.jsonl keeps every "
        "sample.",
        f"The closing table is one run of {CLOSING_ROUNDS} rounds, all networks interleaved in shuffled order; those "
        f"whose interval holds the budget are then measured longer, up to {MOST_ROUNDS} rounds, if they might win.",
        "Latencies are of random weights; BatchNorm is folded and attention biases are gathered before export.",
    ]
