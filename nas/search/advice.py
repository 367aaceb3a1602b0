"""What may help a search that found nothing within its budget."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nas.measure.device import device_kind
from nas.measure.hardware import CROWDED_CPUS
from nas.measure.runtime import RUNTIMES
from nas.search.rows import Row, arch_of, label_of

if TYPE_CHECKING:
    from nas.search.log import SearchLog
    from nas.search.request import SearchRequest


def latencies(rows: Sequence[Row], final: Sequence[Row]) -> list[Row]:
    """What was measured, fastest first: in the closing run where there was one, else by the trials.

    rows: the trials. final: the closing run's.
    """
    found = [
        row | {"latency_ci_low_ms": row["ci_low_ms"], "latency_ci_high_ms": row["ci_high_ms"]}
        for row in final
        if not row["error"]
    ]
    found = found or [row for row in rows if row["state"] == "complete"]
    return sorted(found, key=lambda row: row["latency_ms"])


def advice(
    options: SearchRequest, run: SearchLog, rows: Sequence[Row], final: Sequence[Row], command: str
) -> list[str]:
    """What may bring the budget within reach, what is known to help first; nothing where nothing was measured.

    rows: the trials; those measured briefly have no 95% interval. final: the closing run's.
    command: the search's own, as typed.
    """
    measured = latencies(rows, final)
    if not measured:
        return []
    fastest, lines = measured[0], []
    sure = fastest["latency_ci_high_ms"] is not None
    budget = rounded_up(fastest["latency_ci_high_ms"] or fastest["latency_p95_ms"])
    if budget > options.budget_ms:
        told = (
            f"{budget:g} ms, which {label_of(fastest)} meets" if sure else f"about {budget:g} ms ({label_of(fastest)})"
        )
        lines.append(f"a budget of {told}: {with_budget(command, budget)}")
    smaller = lower_resolution(fastest, options.budget_ms)
    if smaller:
        lines.append(smaller)
    known = next((row for row in measured if row["name"] and row["latency_ms"] > options.budget_ms), None)
    if known:
        lines.append(f"a smaller network out of a trained one: {pruning(options, known)}")
    device, most = device_kind(options.settings.device), run.hardware.get("physical_cores", 1)
    if device == "cpu" and options.settings.threads < most and idle(run.hardware, most):
        lines.append(f"--threads {most}: this search used {options.settings.threads}, and the other CPUs are idle")
    others = [name for name, runtime in RUNTIMES.items() if device in runtime.devices]
    others = [name for name in others if name != options.settings.runtime]
    if others:
        lines.append(f"--runtime: {', '.join(others)} may be faster")
    return lines + unsearched(options)


def pruning(options: SearchRequest, row: Row) -> str:
    """The command that prunes a published network to the search's budget, measured as the search does."""
    settings = options.settings
    words = ["vitnas", "prune", "--model", f"{row['name']}@{row['resolution']}"]
    words += ["--latency-budget", f"{options.budget_ms:g}ms", "--device", settings.device]
    words += ["--runtime", settings.runtime, "--threads", f"{settings.threads}"]
    words += ["--batch-size", f"{settings.batch_size}", "--precision", settings.precision]
    if options.plan and options.plan.data:
        words += ["--data", options.plan.data]
    return shlex.join(words)


def unsearched(options: SearchRequest) -> list[str]:
    """Families and shapes that the search left out."""
    from search_spaces.registry import FAMILIES

    lines = []
    left_out = sorted(set(FAMILIES) - set(options.families))
    if left_out and not (options.plan and options.plan.parent):
        lines.append(f"--family: {', '.join(left_out)} were not searched")
    lowest = min(FAMILIES[family].space.options["resolution"][0] for family in options.families)
    smaller = "" if options.resolution else f"lower resolutions (down to {lowest} px) and "
    return [*lines, f"more --trials: {smaller}smaller widths are in the space"]


def rounded_up(ms: float) -> float:
    """A latency with two digits, never below it."""
    digits = 1 - math.floor(math.log10(ms))
    return round(math.ceil(round(ms * 10**digits, 6)) / 10**digits, max(digits, 0))


def with_budget(command: str, budget_ms: float) -> str:
    """The command with another budget, and without the name of its study, which belongs to this one."""
    words = shlex.split(command.replace("--latency-budget=", "--latency-budget ").replace("--study=", "--study "))
    if "--study" in words:
        at = words.index("--study")
        del words[at : at + 2]
    if "--latency-budget" in words:
        words[words.index("--latency-budget") + 1] = f"{budget_ms:g}ms"
    return shlex.join(words)


def lower_resolution(fastest: Row, budget_ms: float) -> str | None:
    """The largest lower resolution at which the fastest network would fit by its MACs; None where there is none."""
    from search_spaces import ArchError, table

    arch = arch_of(fastest)
    for px in range(arch.resolution - 32, 31, -32):
        try:
            macs = table(arch.at(px)).macs()
        except ArchError:
            continue
        estimate = fastest["latency_ms"] * macs / table(arch).macs()
        if estimate <= budget_ms:
            return (
                f"--resolution {px}: an estimate of {estimate:.2g} ms for {label_of(fastest)}, by its MACs "
                f"({arch.resolution} px: {fastest['latency_ms']:.2f} ms)"
            )
    return None


def idle(hardware: dict, threads: int) -> bool:
    """Whether other processes leave so many CPUs alone, as far as the machine tells."""
    share, usable = hardware.get("busy_share"), hardware.get("usable_cpus", 0)
    return share is not None and share * usable + threads <= usable + CROWDED_CPUS
