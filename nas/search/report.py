"""A run's folder for people and other tools: trials.csv, pareto.json, pareto.png, result.json and report.html.

Everything is made of the one record that a search hands over; nothing is measured or ranked here.
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar, cast

from nas.export.card import CLASSIFY
from nas.files import replace_file
from nas.quality.tier import told_score
from nas.report.page import render
from nas.search.folder import RESULT, TRIALS
from nas.search.front import plot_front
from nas.search.outcome import Outcome
from nas.search.rows import Network, Trial, known
from nas.search.words import better_line, later_rounds, quality_words, validation_line
from nas.text import mask_url

COLUMNS = (
    *(
        "trial",
        "family",
        "name",
        "kind",
        "parent",
        "state",
        "quality",
        "quality_estimate",
        "quality_low",
        "quality_high",
        "quality_how",
    ),
    *(
        "latency_ms",
        "latency_p95_ms",
        "latency_ci_low_ms",
        "latency_ci_high_ms",
        "n",
        "rounds",
        "spread",
        "reference_ms",
    ),
    *("throughput", "precision", "memory_mb", "file_mb", "energy_mj"),
    *("params_m", "macs_m", "resolution", "feasible", "verdict", "source"),
    "error",
)
REASONS_SHOWN = 12  # failed trials are grouped by reason; more reasons than these are only counted
T = TypeVar("T")


def write_run(folder: Path, outcome: Outcome) -> None:
    """Write the five files into `folder`, each replaced in one step, so that a reader never sees half of one.

    `trials.csv` has one row a trial; `n` is its number of timed inferences and `spread` how far the 95th
    percentile lies above the median latency, as a share of the median. Passwords in URLs are masked.

    Args:
        folder: the run's folder, which exists.

    Raises:
        OSError: the folder cannot be written; what stood there before is untouched.
    """
    outcome = masked(outcome)
    replace_file(folder / TRIALS, _csv(outcome.trials).encode())
    replace_file(folder / "pareto.json", json.dumps(outcome.front_json(), indent=1).encode())
    plot = plot_front(outcome)
    replace_file(folder / "pareto.png", plot)
    replace_file(folder / "report.html", _html(outcome, plot).encode())
    replace_file(folder / RESULT, json.dumps(outcome.to_json(), indent=1))


def masked(value: T) -> T:
    """The same record, list, mapping or text, without passwords in URLs."""
    return cast(T, _masked(value))


def _masked(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: _masked(item) for name, item in found.items()})
    if isinstance(value, Mapping):
        return {key: _masked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_masked(item) for item in value)
    return mask_url(value) if type(value) is str else value


def _csv(trials: Sequence[Trial]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for trial in trials:
        p50, p95 = trial.latency_ms, trial.latency_p95_ms
        spread = round(p95 / p50 - 1, 4) if p50 and p95 else None
        low, high = trial.quality_ci or (None, None)
        more = {"n": trial.samples, "spread": spread, "quality_low": low, "quality_high": high}
        writer.writerow(trial.to_json() | more)
    return text.getvalue()


# ---------------------------------------------------------------------------------- report.html


def _html(outcome: Outcome, plot: bytes) -> str:
    trials, winner = outcome.trials, outcome.winner
    reasons = Counter(trial.error for trial in trials if trial.state == "failed").most_common()
    wall = datetime.fromisoformat(outcome.finished) - datetime.fromisoformat(outcome.started)
    shown = {
        "plot": base64.b64encode(plot).decode(),
        "said": quality_words(winner) if winner else "",
        "better": better_line(outcome),
        "trust": validation_line(outcome.quality_tier, outcome.validation),
        "best": _measured_winner(outcome) if winner else None,
        "front": outcome.front,
        "families": _families(outcome),
        "raced": any(trial.kind for trial in trials),
        "auto": len(outcome.precisions) > 1,
        "beside": outcome.beside,
        "complete": [trial for trial in trials if trial.complete],
        "feasible": [trial for trial in trials if trial.feasible],
        "reasons": reasons[:REASONS_SHOWN],
        "other_reasons": reasons[REASONS_SHOWN:],
        "later": later_rounds(outcome.final),
        "wall_s": wall.total_seconds(),
        "classify": CLASSIFY,
    }
    record = {each.name: getattr(outcome, each.name) for each in dataclasses.fields(outcome)}
    return render(Path(__file__).with_suffix(".html"), record | shown, told_score=told_score)


def _measured_winner(outcome: Outcome) -> Network:
    """The winner's numbers: of the final side-by-side run where there was one, else of its trial."""
    for row in outcome.final:
        if row.role == "winner" and row.latency_ms is not None:
            return row
    number = known(outcome.winner).trial
    return next(trial for trial in outcome.trials if trial.trial == number)


@dataclass(frozen=True)
class FamilyRow:
    """What was tried of a family, its best trial that fits, and its fastest one."""

    family: str
    best: Trial | None
    fastest: Trial | None
    tried: int
    fitting: int
    failed: int
    ruled_out: bool
    """Whether its smallest shape is over the budget."""

    @property
    def none(self) -> str:
        """What is said where it has no best."""
        if not self.tried:
            return "not tried"
        return "none fits" if self.ruled_out else "none tried fits"


def _families(outcome: Outcome) -> list[FamilyRow]:
    """A row each, the best family first. A winner of the closing run, or of the search, is its family's best."""
    winners = {row.trial for row in outcome.final if "winner" in row.role}
    if outcome.winner:
        winners.add(outcome.winner.trial)
    rows = []
    for family in sorted({*outcome.families, *(trial.family for trial in outcome.trials)}):
        own = [trial for trial in outcome.trials if trial.family == family]
        measured = [trial for trial in own if trial.complete]
        fitting = [trial for trial in own if trial.feasible]
        best = max(
            fitting,
            key=lambda t: (t.trial in winners, not t.guessed, known(t.quality), -known(t.latency_ms)),
            default=None,
        )
        fastest = min(measured, key=lambda t: known(t.latency_ms), default=None)
        failed = sum(trial.state == "failed" for trial in own)
        tried, ruled_out = len(measured) + failed, family in outcome.ruled_out
        rows.append(FamilyRow(family, best, fastest, tried, len(fitting), failed, ruled_out))
    return sorted(rows, key=lambda row: known(row.best.quality) if row.best else float("-inf"), reverse=True)
