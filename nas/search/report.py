"""A run's folder for people and other tools: trials.csv, pareto.json, pareto.png, result.json and report.html.

Everything is drawn from the one JSON-able document a search hands over; nothing is measured or ranked here.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.export.card import CLASSIFY
from nas.files import replace_file
from nas.quality.tier import told_score
from nas.report.page import render, wall_seconds
from nas.search.front import plot_front
from nas.search.rows import later_rounds, score_words
from nas.text import mask_url

if TYPE_CHECKING:
    pass


COLUMNS = (
    *("trial", "family", "name", "state", "quality", "quality_estimate", "quality_low", "quality_high", "quality_how"),
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
    *("throughput", "params_m", "macs_m", "resolution", "feasible", "verdict", "source"),
    "error",
)
REASONS_SHOWN = 12  # failed trials are grouped by reason; more reasons than these are only counted


def write_run(folder: Path, data: dict[str, Any]) -> None:
    """Write the five files into `folder`, each replaced in one step, so that a reader never sees half of one.

    `trials.csv` has one row a trial; `n` is its number of timed inferences and `spread` how far the 95th
    percentile lies above the median latency, as a share of the median. Passwords in URLs are masked.

    Args:
        folder: the run's folder, which exists.
        data: the search's result; latencies in ms, throughput in images/s, quality in percent.

    Raises:
        OSError: the folder cannot be written; what stood there before is untouched.
    """
    data = _masked(data)
    replace_file(folder / "trials.csv", _csv(data["trials"]).encode())
    replace_file(folder / "pareto.json", json.dumps(data["pareto"], indent=1).encode())
    plot = plot_front(data)
    replace_file(folder / "pareto.png", plot)
    replace_file(folder / "report.html", _html(data, plot).encode())
    replace_file(folder / "result.json", json.dumps({k: v for k, v in data.items() if k != "trials"}, indent=1))


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _masked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_masked(item) for item in value]
    return mask_url(value) if isinstance(value, str) else value


def _csv(trials: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for trial in trials:
        p50, p95 = trial["latency_ms"], trial["latency_p95_ms"]
        spread = round(p95 / p50 - 1, 4) if p50 and p95 else None
        low, high = trial["quality_ci"] or (None, None)
        more = {"n": trial["samples"], "spread": spread, "quality_low": low, "quality_high": high}
        writer.writerow(trial | more)
    return text.getvalue()


# ---------------------------------------------------------------------------------- report.html


def _html(data: dict[str, Any], plot: bytes) -> str:
    trials = data["trials"]
    winner = data["winner"]
    reasons = Counter(t["error"] for t in trials if t["state"] == "failed").most_common()
    shown = {
        "plot": base64.b64encode(plot).decode(),
        "said": quality_words(data) if winner else "",
        "trust": validation_line(data["quality_tier"], data["validation"]),
        "best": _measured_winner(data) if winner else None,
        "families": _families(data),
        "complete": [t for t in trials if t["state"] == "complete"],
        "feasible": [t for t in trials if t["feasible"]],
        "reasons": reasons[:REASONS_SHOWN],
        "other_reasons": reasons[REASONS_SHOWN:],
        "later": later_rounds(data["final"]),
        "wall_s": wall_seconds(data),
    }
    return render(Path(__file__).with_suffix(".html"), data | shown | {"classify": CLASSIFY}, told_score=told_score)


def _measured_winner(data: dict[str, Any]) -> dict[str, Any]:
    """The winner's numbers: of the final side-by-side run where there was one, else of its trial."""
    for row in data["final"]:
        if row["role"] == "winner" and row["latency_ms"] is not None:
            return row
    trial = next(t for t in data["trials"] if t["trial"] == data["winner"]["trial"])
    ci = {"ci_low_ms": trial["latency_ci_low_ms"], "ci_high_ms": trial["latency_ci_high_ms"]}
    return trial | ci


def _families(data: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a family: what was tried, its best trial that fits, its fastest; the best family first.

    What the closing run, or the search, declared a winner is its family's best.
    """
    trials, rows = data["trials"], []
    winners = {row["trial"] for row in data["final"] if "winner" in row["role"]}
    if data["winner"]:
        winners.add(data["winner"]["trial"])
    for family in sorted({t["family"] for t in trials}):
        own = [t for t in trials if t["family"] == family]
        measured = [t for t in own if t["state"] == "complete"]
        fitting = [t for t in own if t["feasible"]]
        best = max(
            fitting,
            key=lambda t: (t["trial"] in winners, not t["guessed"], t["quality"], -t["latency_ms"]),
            default=None,
        )
        fastest = min(measured, key=lambda t: t["latency_ms"], default=None)
        failed = sum(t["state"] == "failed" for t in own)
        counts = {"tried": len(measured) + failed, "fitting": len(fitting), "failed": failed}
        rows.append({"family": family, "best": best, "fastest": fastest, **counts})
    return sorted(rows, key=lambda row: row["best"]["quality"] if row["best"] else float("-inf"), reverse=True)


def validation_line(tier: dict[str, Any], validation: dict[str, Any] | None) -> str:
    """How far a trained tier's estimates can be trusted."""
    if validation is None:
        held = tier["held_out"]
        text = "The tier has not been validated on this data (--validate N)."
        return text if held is None else f"{text} Its surrogate misses a network left out by {held[0]:.1f} points."
    taus = ", ".join(
        f"{name} {one['tau']:.2f} ({one['ci'][0]:.2f} to {one['ci'][1]:.2f})"
        for name, one in validation["tau"].items()
        if one["tau"] is not None
    )
    return f"Kendall's tau with {validation['networks']} full trainings (95% interval): {taus}."


def quality_words(data: dict[str, Any]) -> str:
    """How good the winner is: its accuracy where it was trained fully, else what the tier says of it."""
    winner = data["winner"]
    return winner["accuracy"] or f"score {score_words(winner)}"
