"""The closing run: the finalists of a search once more, side by side in one interleaved run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nas.errors import UserError
from nas.export.artifact import Exporter
from nas.export.side_by_side import Longer, Results, measure_side_by_side
from nas.measure.budget import LatencyBudget, Verdict
from nas.measure.protocol import Interrupted
from nas.measure.runtime import Settings
from nas.measure.samples import MeasureError, Measurement, paired_ratio
from nas.search.log import keep_samples
from nas.search.rows import Row, arch_of, best_of, choose, finalists_of, label_of, rank

if TYPE_CHECKING:
    import numpy as np

    from nas.networks.targets import Target
    from nas.networks.timm_network import TimmNetwork
    from nas.search.request import SearchRequest
    from search_spaces import Arch

CLOSING_ROUNDS = 30
MOST_ROUNDS = 120
"""In all, of a network whose interval holds the budget."""
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


class ClosingInterrupted(KeyboardInterrupt):
    """Ctrl-C while some networks were measured longer. final, beside: as `closing_run` returns them, by then."""

    def __init__(self, final: list[Row], beside: list[Row]) -> None:
        super().__init__()
        self.final, self.beside = final, beside


def closing_run(
    options: SearchRequest,
    rows: Sequence[Row],
    calibration: np.ndarray | None = None,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> tuple[list[Row], list[Row]]:
    """Measure the finalists once more, side by side with `options.against` in one interleaved run.

    Finalists whose interval holds the budget, and that would win if they fitted, are measured longer.

    calibration: images for int8. note: told of those that stay unsure, or cannot be measured longer.

    Returns:
        Rows of the final table, best first: those that surely fit, those that may, the others; rows of the outside
        networks, whose ratios are to the first of those.

    Raises:
        ClosingInterrupted: Ctrl-C, once all networks had been measured side by side.
    """
    budget = LatencyBudget(options.budget_ms)
    finalists = {label_of(row): row for row in finalists_of(rows, options.budget_ms)}
    networks = {label: arch_of(row) for label, row in finalists.items()}
    outside, refused = outside_of(options.against, finalists)
    many = options.throughput_at and replace(options.settings, batch_size=options.throughput_at)
    batches: dict[str, Measurement | MeasureError] = {}

    def timed(label: str, result: Measurement | MeasureError) -> dict[str, Any]:
        """A network's figures; its error where it has none."""
        if isinstance(result, MeasureError):
            return {"error": str(result), "verdict": None}
        low, high = result.ci_ms
        return {
            "latency_ms": result.p50_ms,
            "latency_p95_ms": result.p95_ms,
            "ci_low_ms": low,
            "ci_high_ms": high,
            "samples": result.n,
            "verdict": budget.judge(result.ci_ms),
            "rounds_alone": max(0, len(result.rounds_ms) - CLOSING_ROUNDS),
        }

    def unsure(results: Mapping[str, Measurement | MeasureError]) -> list[str]:
        """Those that may fit and rank before all that surely do, best first."""
        found = {label: row | timed(label, results[label]) for label, row in finalists.items()}
        sure = choose([row for row in found.values() if row["verdict"] == Verdict.FITS])
        open_ones = [label for label, row in found.items() if row["verdict"] == Verdict.UNSURE]
        return [label for label in open_ones if sure is None or rank(found[label]) < rank(sure)]

    def measured(exporter: Exporter, settings: Settings, rounds: int, longer: Longer | None = None) -> Results:
        return measure_side_by_side(
            networks | outside,
            lambda network, stem: exporter.write(network, settings, stem),
            settings,
            rounds,
            options.folder,
            progress,
            longer,
        )

    longer = Longer(unsure, MOST_ROUNDS, lambda label, error: note(f"{label} could not be measured longer: {error}"))
    interrupted = False
    with Exporter(calibration) as exporter:
        try:
            results = measured(exporter, options.settings, CLOSING_ROUNDS, longer)
        except Interrupted as interrupt:
            if interrupt.done < CLOSING_ROUNDS:
                raise
            results, interrupted = interrupt.results, True
        if many and not interrupted:
            batches = measured(exporter, many, THROUGHPUT_ROUNDS)
    for label in unsure(results):
        low, high = results[label].ci_ms
        note(
            f"{label} may be within {options.budget_ms:g} ms or over it, also after {len(results[label].rounds_ms)} "
            f"rounds: 95% {low:.2f} to {high:.2f} ms"
        )

    def kept(label: str) -> dict[str, Any]:
        """A network's figures, whose samples are kept."""
        result, batch = results[label], batches.get(label) if many else results[label]
        if isinstance(result, MeasureError):
            return timed(label, result)
        keep_samples(options.folder, {"closing": label, **result.to_dict()})
        throughput = None
        if isinstance(batch, Measurement):
            throughput = batch.throughput((many or options.settings).batch_size)
            if many:
                keep_samples(options.folder, {"closing": label, "batch_size": many.batch_size, **batch.to_dict()})
        return timed(label, result) | {"throughput": throughput}

    final = []
    for label, row in finalists.items():
        entry = {
            "label": label,
            "role": "published" if row["name"] else "found",
            "published_top1": published_top1(row),
            "error": "",
            "selects": row.get("selects", True),
            **{k: row[k] for k in FINAL_KEYS},
        }
        final.append(entry | kept(label))
    final = ordered(final)
    measured = [entry for entry in final if not entry["error"]]
    beside = []
    for label, error in refused.items():
        results[label] = MeasureError(error)
    for label in outside | refused:
        entry = {"label": label, "resolution": None, "error": "", "ratio": None, "ratio_low": None, "ratio_high": None}
        entry |= kept(label) | ({"resolution": outside[label].resolution} if label in outside else {})
        if measured and not entry["error"]:
            first = results[measured[0]["label"]]
            entry["ratio"], (entry["ratio_low"], entry["ratio_high"]) = paired_ratio(
                together(results[label]), together(first)
            )
        beside.append(entry)
    if interrupted:
        raise ClosingInterrupted(final, beside)
    return final, beside


def outside_of(
    against: Sequence[Target], finalists: Mapping[str, Row]
) -> tuple[dict[str, Arch | TimmNetwork], dict[str, str]]:
    """Networks to measure beside the finalists: named without @PX, at the resolution of the best of those.

    Returns:
        By their labels, those that are no finalists, and why others cannot run at that resolution.
    """
    best = best_of([row for row in finalists.values() if row["feasible"]] or list(finalists.values()))
    networks = {label: arch_of(row) for label, row in finalists.items()}
    found: dict[str, Arch | TimmNetwork] = {}
    refused: dict[str, str] = {}
    for target in against:
        label = target.label if target.label not in networks else f"{target.label} (as named)"
        try:
            sized = target if target.resolution or best is None else target.at(best["resolution"])
        except UserError as error:
            refused[label] = str(error)
            continue
        if sized.network not in networks.values():
            found[label] = sized.network
    return found, refused


def ordered(final: Sequence[Row]) -> list[Row]:
    """Best first, with the roles of the winner and of the families' winners; see `choose`."""
    sure, unsure = (
        sorted((entry for entry in final if entry["verdict"] == verdict), key=rank)
        for verdict in (Verdict.FITS, Verdict.UNSURE)
    )
    families: set[str] = set()
    for entry in sure or unsure[:1]:
        if entry["family"] not in families:
            entry["role"] = "family winner" if families else "winner"
        families.add(entry["family"])
    others = [entry for entry in final if entry["verdict"] not in (Verdict.FITS, Verdict.UNSURE)]
    return sure + unsure + sorted(others, key=lambda entry: -entry["quality"])


def together(result: Measurement) -> Measurement:
    """The rounds that all networks have made in turn."""
    return replace(result, rounds_ms=result.rounds_ms[:CLOSING_ROUNDS])


def published_top1(row: Row) -> float | None:
    """What was published of a variant, at its own resolution and number of classes."""
    from search_spaces.api import find_variant

    if not row["name"]:
        return None
    _, variant = find_variant(row["name"])
    at_home = row["resolution"] == variant.values["resolution"] and row["arch"]["num_classes"] == 1000
    return variant.top1 if at_home else None


def ties_of(final: Sequence[Row]) -> list[str]:
    """Which networks within the budget the tier cannot tell from the winner, in one line, fastest first."""
    first = next((entry for entry in final if entry["role"] == "winner"), None)
    if first is None:
        return []
    low, high = first["quality_ci"]
    ties = [
        entry
        for entry in final
        if entry is not first
        and entry["verdict"] in (Verdict.FITS, Verdict.UNSURE)
        and low <= entry["quality_ci"][1]
        and entry["quality_ci"][0] <= high
    ]
    if not ties:
        return []
    names = ", ".join(
        f"{entry['label']} ({entry['family']}, {entry['latency_ms']:.2f} ms)"
        for entry in sorted(ties, key=lambda entry: entry["latency_ms"])
    )
    rule = "the best score, then the most parameters, made the choice"
    return [f"A tie with {first['label']}, by the 95% intervals of the estimates: {names}; {rule}"]
