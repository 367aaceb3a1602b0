"""The closing run: the finalists of a search once more, side by side in one interleaved run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.export import Exporter
from nas.files import scratch
from nas.front import Row, arch_of, finalists_of, label_of, rank
from nas.measure import MeasureError, Measurement, Settings, compare, device_lock
from nas.measure.protocol import paired_ratio
from nas.process import WorkerError
from nas.search import keep_samples

if TYPE_CHECKING:
    import numpy as np

    from nas.search import Options

CLOSING_ROUNDS = 30
THROUGHPUT_ROUNDS = 10
FINAL_KEYS = (
    "trial",
    "family",
    "name",
    "quality",
    "quality_estimate",
    "quality_ci",
    "quality_how",
    "guessed",
    "params_m",
    "macs_m",
    "resolution",
    "arch",
)


def closing_run(
    options: Options,
    rows: Sequence[Row],
    calibration: np.ndarray | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Row], list[Row]]:
    """Measure the finalists once more, side by side with `options.against` in one interleaved run.

    calibration: images for int8.

    Returns:
        Rows of the final table, best first; rows of the outside networks, whose ratios are to the first of those.
    """
    finalists = finalists_of(rows, options.budget_ms)
    networks = {label_of(row): arch_of(row) for row in finalists}
    outside = {
        target.label if target.label not in networks else f"{target.label} (as named)": target.network
        for target in options.against
        if target.network not in networks.values()
    }
    many = options.throughput_at and replace(options.settings, batch_size=options.throughput_at)
    batches: dict[str, Measurement | MeasureError] = {}
    with Exporter(calibration) as exporter:
        results = side_by_side(exporter, networks | outside, options.settings, CLOSING_ROUNDS, progress, options.folder)
        if many:
            batches = side_by_side(exporter, networks | outside, many, THROUGHPUT_ROUNDS, progress, options.folder)

    def timed(label: str) -> dict[str, Any]:
        """A network's figures; its error where it has none."""
        result, batch = results[label], batches.get(label) if many else results[label]
        if isinstance(result, MeasureError):
            return {"error": str(result)}
        keep_samples(options.folder, {"closing": label, **result.to_dict()})
        throughput = None
        if isinstance(batch, Measurement):
            throughput = batch.throughput((many or options.settings).batch_size)
            if many:
                keep_samples(options.folder, {"closing": label, "batch_size": many.batch_size, **batch.to_dict()})
        low, high = result.ci_ms
        return {
            "latency_ms": result.p50_ms,
            "latency_p95_ms": result.p95_ms,
            "ci_low_ms": low,
            "ci_high_ms": high,
            "samples": result.n,
            "throughput": throughput,
            "fits": result.p50_ms <= options.budget_ms,
        }

    final = []
    for row in finalists:
        entry = {
            "label": label_of(row),
            "role": "published" if row["name"] else "found",
            "published_top1": published_top1(row),
            "error": "",
            "fits": False,
            "selects": row.get("selects", True),
            **{k: row[k] for k in FINAL_KEYS},
        }
        final.append(entry | timed(entry["label"]))
    fitting = sorted((e for e in final if e["fits"]), key=rank)
    for place, entry in enumerate(fitting):
        first_of_family = all(e["family"] != entry["family"] for e in fitting[:place])
        if place == 0:
            entry["role"] = "winner"
        elif first_of_family:
            entry["role"] = "family winner"
    final = fitting + sorted((e for e in final if not e["fits"]), key=lambda e: -e["quality"])
    measured = [entry for entry in final if not entry["error"]]
    beside = []
    for label in outside:
        entry = {"label": label, "error": "", "fits": False, "ratio": None, "ratio_low": None, "ratio_high": None}
        entry |= timed(label)
        if measured and not entry["error"]:
            first = results[measured[0]["label"]]
            entry["ratio"], (entry["ratio_low"], entry["ratio_high"]) = paired_ratio(results[label], first)
        beside.append(entry)
    return final, beside


def side_by_side(
    exporter: Exporter,
    networks: Mapping[str, Any],
    settings: Settings,
    rounds: int,
    progress: Callable[[int, int], None] | None,
    folder: Path,
) -> dict[str, Measurement | MeasureError]:
    """One interleaved run of networks by their labels; what cannot be exported is an error of its own.

    folder: the run's, for the files that are measured.
    """
    results: dict[str, Measurement | MeasureError] = {}
    with scratch(folder) as room, device_lock(settings.device):
        paths = {}
        for i, (label, network) in enumerate(networks.items()):
            try:
                paths[label] = exporter.write(network, settings, room / str(i))
            except WorkerError as error:
                results[label] = MeasureError(f"cannot be exported: {error}")
        return results | compare(paths, settings, rounds=rounds, progress=progress)


def published_top1(row: Row) -> float | None:
    """What was published of a variant, at its own resolution and number of classes."""
    from search_spaces.api import find_variant

    if not row["name"]:
        return None
    _, variant = find_variant(row["name"])
    at_home = row["resolution"] == variant.values["resolution"] and row["arch"]["num_classes"] == 1000
    return variant.top1 if at_home else None


def ties_of(final: Sequence[Row]) -> list[str]:
    """Which family winners the tier cannot tell from the winner."""
    winners = [e for e in final if e["role"] in ("winner", "family winner")]
    if not winners:
        return []
    first, *others = winners
    low, high = first["quality_ci"]
    return [
        f"{other['label']} ({other['family']}) ties with {first['label']} ({first['family']}): the 95% intervals of "
        f"their estimates overlap, {other['quality_ci'][0]:.1f} to {other['quality_ci'][1]:.1f} and {low:.1f} to "
        f"{high:.1f}"
        for other in others
        if low <= other["quality_ci"][1] and other["quality_ci"][0] <= high
    ]
