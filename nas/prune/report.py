"""A pruning's folder for people and other tools: prune.json and report.html."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from nas.export.card import CLASSIFY
from nas.files import replace_file
from nas.prune import figures
from nas.prune.records import ACCURACIES, NetworkRow, PruneResult
from nas.prune.request import show
from nas.prune.tables import Change, cost_lines, importance_kinds, importance_table, stages_of, summary
from nas.prune.words import control_words, measure_of, next_steps, passes, tuning_words
from nas.report.page import conditions, duration, render, wall_seconds

FILES = {
    "arch.json": "the pruned network's widths; every verb takes it",
    "model.safetensors": "its weights",
    "model.onnx": "the same as ONNX, ready to run",
    "model.int8.onnx": "the same in int8, judged on held-out images",
    "model.fp16.onnx": "the same in fp16, judged on held-out images",
    "preprocess.json": "how an image becomes its input",
    "labels.txt": "its classes",
    "prune.json": "every figure of this page",
    "report.html": "this page",
    "state": "what lets the same command go on, or answer again",
}


def write_report(folder: Path, result: PruneResult) -> None:
    """Write prune.json and report.html into `folder`, each replaced in one step; without latencies, no report.html.

    Args:
        folder: the pruning's folder, which exists.

    Raises:
        OSError: the folder cannot be written; what stood there before is untouched.
    """
    replace_file(folder / "prune.json", json.dumps(result.to_json(), indent=1).encode())
    speed = _speed(result.before, result.after, bool(result.waiting))
    if speed is None:
        (folder / "report.html").unlink(missing_ok=True)
    else:
        replace_file(folder / "report.html", _html(folder, result, speed).encode())


@dataclass(frozen=True)
class Speed:
    """How many times faster the pruned network is."""

    factor: float
    low: float
    """The least that the ends of the latencies' intervals allow."""
    high: float
    tie: bool
    words: str


def _speed(before: NetworkRow, after: NetworkRow, waiting: bool) -> Speed | None:
    """None where there are no latencies. waiting: they are waiting times, from which no speed is drawn."""
    if before.latency_ms is None or after.latency_ms is None or before.ci is None or after.ci is None:
        return None
    factor = before.latency_ms / after.latency_ms
    tie = not waiting and _overlap(before.ci, after.ci)
    words = f"{factor:.2f}x faster" if factor > 1 else f"{1 / factor:.2f}x slower"
    if tie:
        words = "Not measurably faster (a tie)"
    if waiting:
        words = "Waiting times, not speed"
    return Speed(factor, before.ci[0] / after.ci[1], before.ci[1] / after.ci[0], tie, words)


def _html(folder: Path, result: PruneResult, speed: Speed) -> str:
    parts = result.parts
    cut, grown = summary(result)
    importance, kinds = importance_table(parts), importance_kinds(parts)
    shown = {
        "layers": parts.layers or (),
        "conditions": conditions(asdict(result.settings)),
        "speed": speed,
        "macs": Change(result.before.macs, result.after.macs),
        "params": Change(result.before.params, result.after.params),
        "amount": lambda value: show(result.budget.metric, value),
        "factor": _factor,
        "overlap": _overlap,
        "accuracies": ACCURACIES,
        "tuning_words": tuning_words(result),
        "control_words": control_words(result),
        "measure": measure_of(result),
        "trained": passes(result.trained_images, result.data.train),
        "cut": cut,
        "grown": grown,
        "gone": [row.block for row in parts.blocks if row.after is None],
        "stages": stages_of(result),
        "reallocation_plot": _picture(figures.reallocation_plot(result)) if parts.blocks else None,
        "importance_plot": _picture(figures.importance_plot(parts)) if parts.importance else None,
        "importance_table": importance,
        "importance_kinds": kinds,
        "density_power": _power(cell.density for row in importance for cell in row.cells if cell),
        "importance_power": _power(row.importance for row in parts.importance),
        "unit_power": _power(row.mean for row in kinds),
        "cost_unit": "ms" if parts.costs else "MMAC",
        "costs": cost_lines(result),
        **_times(result),
        "files": {name: what for name, what in FILES.items() if name == "report.html" or (folder / name).exists()},
        "next_steps": next_steps(folder, result),
        "classify": CLASSIFY,
    }
    return render(Path(__file__).with_suffix(".html"), {**vars(result), **vars(parts), **shown})


def _times(result: PruneResult) -> dict[str, object]:
    """How long it took, by phase, in all, and from the start to the end."""
    spent = sum(result.phases.values())
    phases = sorted(result.phases.items(), key=lambda item: -item[1])
    return {
        "breakdown": [{"phase": phase, "seconds": seconds, "share": seconds / spent} for phase, seconds in phases],
        "spent": duration(spent),
        "wall": duration(wall_seconds({"started": result.started, "finished": result.finished})),
    }


def _overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


def _factor(change: Change) -> str:
    """2.00x fewer, 1.20x more, as many."""
    if change.before == change.after:
        return "as many"
    if change.after < change.before:
        return f"{change.before / change.after:.2f}x fewer"
    return f"{change.after / change.before:.2f}x more"


def _power(values: Iterable[float | None]) -> int:
    """The power of ten, of thousands, that takes the largest value to 1 or more."""
    largest = max((value for value in values if value), default=1)
    return max(0, -3 * math.floor(math.log10(largest) / 3))


def _picture(png: bytes) -> str:
    return base64.b64encode(png).decode()
