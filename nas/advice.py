"""What may help a search that found nothing within its budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nas.measure import RUNTIMES, device_kind

if TYPE_CHECKING:
    from nas.search import Options, Run


def advice(options: Options, run: Run) -> list[str]:
    """What may bring the budget within reach."""
    from search_spaces.registry import FAMILIES

    lines = []
    device, most = device_kind(options.settings.device), run.hardware.get("physical_cores", 1)
    if device == "cpu" and options.settings.threads < most:
        lines.append(f"--threads {most}: this search used {options.settings.threads}")
    others = [name for name, runtime in RUNTIMES.items() if device in runtime.devices]
    others = [name for name in others if name != options.settings.runtime]
    if others:
        lines.append(f"--runtime: {', '.join(others)} may be faster")
    left_out = sorted(set(FAMILIES) - set(options.families))
    if left_out and not (options.lessons and options.lessons.parent):
        lines.append(f"--family: {', '.join(left_out)} were not searched")
    lowest = min(FAMILIES[family].space.options["resolution"][0] for family in options.families)
    smaller = "" if options.resolution else f"lower resolutions (down to {lowest} px) and "
    lines.append(f"more --trials: {smaller}smaller widths are in the space")
    return lines
