"""The end of a pruning: its budget judged, its result put together and written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nas.ending import Ending
from nas.job import now
from nas.measure.budget import Verdict
from nas.measure.samples import Measurement, quanta
from nas.prune.images import PruneJob
from nas.prune.records import (
    ACCURACIES,
    Accuracies,
    BudgetRow,
    Kept,
    NetworkRow,
    Parts,
    PriceRow,
    PruneResult,
    Round,
    SeenRow,
)
from nas.prune.report import write_report
from nas.prune.request import PruneRequest, show
from nas.prune.steps import MOST_ROUNDS, is_taught, latency_verdict, waiting_line


def judge_budget(
    request: PruneRequest, before: NetworkRow, after: NetworkRow, results: Mapping[str, Measurement]
) -> BudgetRow:
    """Whether the budget is met. results: latencies of the closing run, "before" and "after".

    A latency budget is not judged by waiting times.
    """
    budget = request.budget
    own, reached = before.cost(budget.metric), after.cost(budget.metric)
    target: float | None = budget.amount
    if budget.relative:
        target = None if own is None else budget.amount * own
    verdict, interval = latency_verdict(budget, results)
    waiting = budget.metric == "latency" and any(map(quanta, results.values()))
    if verdict is None and not waiting and reached is not None and target is not None:
        verdict = Verdict.FITS if reached <= target else Verdict.OVER
    return BudgetRow(budget.metric, budget.text, target, reached, interval, verdict)


def write_results(
    job: PruneJob,
    request: PruneRequest,
    command: str,
    kept: Kept,
    before: NetworkRow,
    after: NetworkRow,
    results: Mapping[str, Measurement],
    parts: Parts,
    end: Ending,
    price: PriceRow | None = None,
) -> PruneResult:
    """Write prune.json and report.html; returns what they tell.

    The run is finished where no step of its end has failed; else the same command goes on. Waiting times that a latency
    budget would be judged by are a closing run that has failed.

    Args:
        results: latencies of the closing run, "before" and "after"; empty where it was not made.
    """
    budget = judge_budget(request, before, after, results)
    waiting = waiting_line(results, request.settings)
    if waiting and budget.metric == "latency":
        end.fail("closing run", waiting)
    if budget.verdict == Verdict.UNSURE and budget.interval and budget.target is not None:
        low, high = budget.interval
        job.note(
            f"the latency may be within {show('latency', budget.target)} or over it, also after {MOST_ROUNDS} rounds: "
            f"95% {low:.3g} to {high:.3g} ms"
        )
    result = _result(job, request, command, kept, budget, before, after, parts, end, waiting, price)
    with end.step("report"):
        write_report(request.folder, result)
    if not end.failures and not end.interrupted:
        job.finish()
    return replace(result, failures=tuple(end.failures))


def _result(
    job: PruneJob,
    request: PruneRequest,
    command: str,
    kept: Kept,
    budget: BudgetRow,
    before: NetworkRow,
    after: NetworkRow,
    parts: Parts,
    end: Ending,
    waiting: str | None,
    price: PriceRow | None,
) -> PruneResult:
    from nas.data.lineage import record
    from nas.measure.hardware import describe

    found = job.state.found
    weights = found.get("weights")
    probed, trained, tuned = (found.get(f"{what}_images", 0) for what in ("probe", "trained", "tuned"))
    learnt = job.data.train if probed or trained or tuned else job.data.train.pick([])
    seen = record(request.folder, learnt, weights)
    judged = {which: job.judged(which) for which in ACCURACIES if which in found}
    return PruneResult(
        model=request.model,
        command=command,
        started=job.state.started,
        finished=now(),
        options=replace(request, distill=is_taught(job, request)),
        settings=request.settings,
        hardware=describe(request.settings),
        data=job.describe_data(),
        weights=weights,
        probe_images=probed,
        trained_images=trained,
        tuned_images=tuned,
        budget=budget,
        before=before,
        after=after,
        accuracy=Accuracies(**judged),
        kept=kept,
        rounds=tuple(Round(**row) for row in job.state.rounds),
        notes=tuple(job.state.notes),
        phases=dict(job.state.phases),
        parts=parts,
        failures=tuple(end.failures),
        waiting=waiting,
        tuning=judged["recovered"].minus(judged["pruned"]) if "recovered" in judged else None,
        control=judged[kept].minus(judged["control"]) if "control" in judged else None,
        seen=SeenRow(**seen) if seen else None,
        price=price,
    )
