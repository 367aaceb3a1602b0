"""The results of a pruning, put together and written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nas.ending import Ending
from nas.job import now
from nas.measure.budget import Verdict
from nas.measure.runtime import Settings
from nas.measure.samples import Measurement, quanta
from nas.prune.images import PruneJob
from nas.prune.request import show
from nas.prune.steps import MOST_ROUNDS, beside, latency_verdict, waiting_line
from nas.prune.words import ACCURACIES

if TYPE_CHECKING:
    from nas.prune.request import PruneRequest


PARTS = ("before", "after", "accuracy", "budget", "data")
"""What a prune.json must hold to be told again."""


def network_row(params: int, macs: int, latency: Measurement | None, settings: Settings) -> dict[str, Any]:
    """Counts and closing latency of one network; without one its fields are None. waiting: as `quanta` has it."""
    row = {"params": params, "macs": macs}
    if latency is None:
        return row | dict.fromkeys(("latency_ms", "p95_ms", "ci", "samples", "throughput", "waiting"))
    return row | {
        "latency_ms": latency.p50_ms,
        "p95_ms": latency.p95_ms,
        "ci": list(latency.ci_ms),
        "samples": latency.n,
        "throughput": latency.throughput(settings.batch_size),
        "waiting": quanta(latency),
    }


def write_results(
    job: PruneJob,
    request: PruneRequest,
    command: str,
    kept: str,
    networks: Mapping[str, dict[str, Any]],
    results: Mapping[str, Measurement],
    details: Mapping[str, Any],
    end: Ending,
) -> dict[str, Any]:
    """Write prune.json and report.html; returns their data.

    kept: as `judge_tuned` has it. results: latencies of the closing run, "before" and "after".

    The run is finished where no step of its end has failed; else the same command goes on. A latency budget is not
    judged by waiting times: that closing run has failed.
    """
    from nas.data.lineage import record
    from nas.measure.hardware import describe
    from nas.prune.report import write_report

    before, after = networks["before"], networks["after"]
    key = "latency_ms" if request.budget.metric == "latency" else request.budget.metric
    target = request.budget.amount
    if request.budget.relative:
        target = None if before[key] is None else target * before[key]
    verdict, interval = latency_verdict(request.budget, results)
    waiting = waiting_line(results, request.settings)
    if waiting and request.budget.metric == "latency":
        end.fail("closing run", waiting)
    elif verdict is None and after[key] is not None:
        verdict = Verdict.FITS if after[key] <= target else Verdict.OVER
    if verdict == Verdict.UNSURE:
        job.note(
            f"the latency may be within {show('latency', target)} or over it, also after {MOST_ROUNDS} rounds: 95% "
            f"{interval[0]:.3g} to {interval[1]:.3g} ms"
        )
    found = job.state.found
    accuracy = {which: row and accuracy_row(row) for which in ACCURACIES for row in [found.get(which)]}
    data = {
        "model": request.model,
        "command": command,
        "started": job.state.started,
        "finished": now(),
        "options": request.identity(),
        "settings": asdict(request.settings),
        "hardware": describe(request.settings),
        "data": job.describe_data(),
        "weights": found.get("weights"),
        "trained_images": found.get("trained_images", 0),
        "tuned_images": found.get("tuned_images", 0),
        "budget": {
            "metric": request.budget.metric,
            "text": request.budget.text,
            "target": target,
            "reached": after[key],
            "interval": interval and list(interval),
            "verdict": verdict,
            "met": verdict == Verdict.FITS,
        },
        "waiting": waiting,
        "before": before,
        "after": after,
        "accuracy": accuracy,
        "kept": kept,
        "tuning": beside(found["recovered"], found["pruned"]) if "recovered" in found else None,
        "control": beside(found[kept], found["control"]) if "control" in found else None,
        "rounds": job.state.rounds,
        "notes": job.state.notes,
        "phases": job.state.phases,
        "failures": end.failures,
        **details,
    }
    trained_on = job.data.train if data["trained_images"] or data["tuned_images"] else job.data.train.pick([])
    data["seen"] = record(request.folder, trained_on, found.get("weights"))
    with end.step("report"):
        write_report(request.folder, data)
    if not end.failures and not end.interrupted:
        job.finish()
    return data | {"failures": end.failures}


def accuracy_row(found: Mapping[str, Any]) -> dict[str, Any]:
    """An accuracy as prune.json has it: top1 and top1_ci (95%) in percent, loss, images."""
    return {"top1": found["top1"], "top1_ci": list(found["ci"]), "loss": found["loss"], "images": found["images"]}
