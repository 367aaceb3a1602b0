"""What may help a search that found nothing within its budget."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from nas.errors import UserError
from nas.measure.device import device_kind
from nas.measure.hardware import CROWDED_CPUS, Hardware
from nas.measure.runtime import RUNTIMES
from nas.networks.counts import counts_of
from nas.networks.timm_network import TIMM
from nas.search.rows import ClosingRow, Network, Trial, known, lost_in, network_of

if TYPE_CHECKING:
    from nas.search.log import SearchLog
    from nas.search.request import SearchRequest

PRUNED = 10.0
"""Times that a pruning can make a network faster at most: little is left of it then."""


def latencies(rows: Sequence[Trial], final: Sequence[ClosingRow]) -> list[Network]:
    """What was measured, fastest first: in the closing run where there was one, else by the trials."""
    found: list[Network] = [row for row in final if not row.error] or [row for row in rows if row.complete]
    return sorted(found, key=lambda row: known(row.latency_ms))


def advice(
    request: SearchRequest, log: SearchLog, rows: Sequence[Trial], final: Sequence[ClosingRow], command: str
) -> list[str]:
    """What may bring the budget within reach, what is known to help first; nothing where nothing was measured.

    Args:
        final: the closing run's rows.
        command: the search's own, as typed.
    """
    measured = latencies(rows, final)
    if not measured:
        return []
    fastest, lines = measured[0], list(looser_limits(request, measured))
    ci = fastest.latency_ci
    budget = rounded_up(ci[1] if ci else known(fastest.latency_p95_ms))
    if budget > request.budget_ms:
        told = f"{budget:g} ms, which {fastest.label} meets" if ci else f"about {budget:g} ms ({fastest.label})"
        lines.append(f"a budget of {told}: {with_budget(command, budget)}")
    if lost := lost_in(final):
        lines.append(
            f"a larger --max-drop, --precision fp32, or longer trainings: {lost} costs these networks too much"
        )
    smaller = lower_resolution(fastest, request.budget_ms)
    if smaller:
        lines.append(smaller)
    ours = (row for row in measured if row.name and not row.name.startswith(TIMM))
    near = (row for row in ours if 1 < known(row.latency_ms) / request.budget_ms <= PRUNED)
    published = next(near, None)
    if published:
        lines.append(f"a smaller network out of a trained one: {pruning(request, published)}")
    device, most = device_kind(request.settings.device), log.hardware.get("physical_cores", 1)
    if device == "cpu" and request.settings.threads < most and idle(log.hardware, most):
        lines.append(f"--threads {most}: this search used {request.settings.threads}, and the other CPUs are idle")
    others = [name for name, runtime in RUNTIMES.items() if device in runtime.devices]
    others = [name for name in others if name != request.settings.runtime]
    if others:
        lines.append(f"--runtime: {', '.join(others)} may be faster")
    return lines + unsearched(request, log.exhausted)


def looser_limits(request: SearchRequest, measured: Sequence[Network]) -> Iterator[str]:
    """Limits that some network meets, where none meets those of the search."""
    limits = request.limits
    needs: tuple[tuple[str, float | None, Callable[[Network], float | None]], ...] = (
        ("--memory-budget", limits.memory_mb, lambda row: row.memory_mb),
        ("--size-budget", limits.file_mb, lambda row: row.file_mb),
    )
    for option, limit, need in needs:
        known_ones = [(value, row) for row in measured if (value := need(row)) is not None]
        if limit is not None and known_ones:
            least, row = min(known_ones, key=lambda each: each[0])
            if least > limit:
                yield f"{option} {rounded_up(least):g}MB, which {row.label} meets"


def pruning(request: SearchRequest, row: Network) -> str:
    """The command that prunes a published network to the search's budget, measured as the search does."""
    settings = request.settings
    words = ["vitnas", "prune", "--model", f"{row.name.partition('@')[0]}@{row.resolution}"]
    words += ["--latency-budget", f"{request.budget_ms:g}ms", "--device", settings.device]
    words += ["--runtime", settings.runtime, "--threads", f"{settings.threads}"]
    words += ["--batch-size", f"{settings.batch_size}", "--precision", settings.precision]
    if request.plan and request.plan.data:
        words += ["--data", request.plan.data]
    return shlex.join(words)


def unsearched(request: SearchRequest, exhausted: bool) -> list[str]:
    """Families and shapes that the search left out. exhausted: nothing was left to try."""
    from search_spaces.registry import FAMILIES

    lines = []
    left_out = sorted(set(FAMILIES) - set(request.families))
    if left_out and not (request.plan and request.plan.parent):
        lines.append(f"--family: {', '.join(left_out)} were not searched")
    if exhausted:
        return lines
    lowest = min(FAMILIES[family].space.options["resolution"][0] for family in request.families)
    smaller = "" if request.resolution else f"lower resolutions (down to {lowest} px) and "
    return [*lines, f"more --trials: {smaller}smaller widths are in the space"]


def rounded_up(ms: float) -> float:
    """A latency with two digits, never below it."""
    digits = 1 - math.floor(math.log10(ms))
    scale = 10.0**digits
    return round(math.ceil(round(ms * scale, 6)) / scale, max(digits, 0))


def with_budget(command: str, budget_ms: float) -> str:
    """The command with another budget, and without the name of its study, which belongs to this one."""
    words = shlex.split(command.replace("--latency-budget=", "--latency-budget ").replace("--study=", "--study "))
    if "--study" in words:
        at = words.index("--study")
        del words[at : at + 2]
    if "--latency-budget" in words:
        words[words.index("--latency-budget") + 1] = f"{budget_ms:g}ms"
    return shlex.join(words)


def lower_resolution(fastest: Network, budget_ms: float) -> str | None:
    """The largest lower resolution at which the fastest network would fit by its MACs; None where there is none."""
    from search_spaces import ArchError

    network = network_of(fastest)
    for px in range(network.resolution - 32, 31, -32):
        try:
            macs = counts_of(network.at(px)).macs
        except (ArchError, UserError):
            continue
        estimate = known(fastest.latency_ms) * macs / counts_of(network).macs
        if estimate <= budget_ms:
            return (
                f"--resolution {px}: an estimate of {estimate:.2g} ms for {fastest.label}, by its MACs "
                f"({network.resolution} px: {fastest.latency_ms:.2f} ms)"
            )
    return None


def idle(hardware: Hardware, threads: int) -> bool:
    """Whether other processes leave so many CPUs alone, as far as the machine tells."""
    share, usable = hardware.get("busy_share"), hardware.get("usable_cpus", 0)
    return share is not None and share * usable + threads <= usable + CROWDED_CPUS
