"""`vitnas models`: the published networks, with the latencies that are known on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nas.report.tables import Column, console_of, print_table, prose
from nas.units import counted

if TYPE_CHECKING:
    from nas.measure.runtime import Settings
    from search_spaces import Arch

Row = dict[str, Any]
COLUMNS = (
    Column("name", label=True, fold=0),
    Column("family", label=True, drop=2),
    Column("params"),
    Column("MMACs"),
    Column("px"),
    Column("top-1"),
    Column("ms"),
    Column("95% of ms", drop=1),
    Column("measured", label=True, drop=3),
    Column("source", label=True, drop=4, fold=24),
)


def archs() -> dict[str, Arch]:
    """Every published network by its name."""
    from search_spaces import get_arch, list_models

    return {name: get_arch(name) for name in list_models()}


def list_rows(networks: dict[str, Arch], settings: Settings) -> list[Row]:
    """A row a network. latency_ms, ci_ms: as last measured here with these settings, on `measured`; None if never.

    Raises:
        UserError: the cache of latencies cannot be read.
    """
    from nas.measure.cache import known
    from search_spaces import count
    from search_spaces.api import find_variant

    rows = []
    for name, arch in networks.items():
        family, variant = find_variant(name)
        counts = count(arch)
        found = known(arch, settings)
        rows.append(
            {
                "name": name,
                "family": family,
                "params": counts.params,
                "macs": counts.macs,
                "resolution": arch.resolution,
                "top1": variant.top1,
                "latency_ms": found and found[1].p50_ms,
                "ci_ms": found and list(found[1].ci_ms),
                "measured": found and found[0],
                "source": variant.source,
            }
        )
    return rows


def show_rows(rows: Sequence[Row], settings: Settings) -> None:
    """The table, and below it what the latencies are of."""
    console = console_of()
    told = [
        (
            row["name"],
            row["family"],
            f"{row['params'] / 1e6:.2f}",
            f"{row['macs'] / 1e6:.0f}",
            str(row["resolution"]),
            f"{row['top1']:.1f}" if row["top1"] else "",
            "" if row["latency_ms"] is None else f"{row['latency_ms']:.2f}",
            "" if row["ci_ms"] is None else "{:.2f}..{:.2f}".format(*row["ci_ms"]),
            "" if row["measured"] is None else row["measured"][:10],
            row["source"],
        )
        for row in rows
    ]
    print_table(console, COLUMNS, told)
    measured = sum(row["latency_ms"] is not None for row in rows)
    where = (
        f"{settings.runtime} {settings.precision}, {settings.device}, "
        f"{counted(settings.threads, 'thread')}, batch {settings.batch_size}"
    )
    prose(console, "params: in millions. top-1: in percent, as published, on ImageNet-1k.")
    if measured:
        prose(console, f"ms: as last measured on this machine ({where}), {measured} of {len(rows)} networks.")
    if measured < len(rows):
        prose(console, f"`vitnas models --measure` measures the others on this machine ({where}).")
