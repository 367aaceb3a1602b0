"""What an evaluation's figures mean, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nas.units import counted, listed, shown

if TYPE_CHECKING:
    from nas.evaluate.pairs import Pair
    from nas.evaluate.result import EvaluateResult, ModelResult

FEW = 3
"""Networks of which each two are told of; of more, each is compared with the best."""
ECE = (
    "ECE, the expected calibration error: answers are put into 15 bins of equal width by their confidence; the mean "
    "over images of the distance between a bin's confidence and its accuracy."
)
SPEED = "Latency by the protocol of vitnas bench: one interleaved run, weights and images in memory, nothing decoded"


def best_of(result: EvaluateResult) -> ModelResult:
    """The most accurate; of equal ones the first."""
    return max(result.results, key=lambda each: each.top1)


def best_ways(result: EvaluateResult) -> list[ModelResult]:
    """Each network on each runtime in each precision; of one whose images were prepared in several ways, the most
    accurate."""
    found: dict[tuple[str, str, str], ModelResult] = {}
    for each in result.results:
        way = each.model, each.runtime, each.precision
        if way not in found or each.top1 > found[way].top1:
            found[way] = each
    return list(found.values())


def told_pairs(result: EvaluateResult) -> Sequence[Pair]:
    """Those that are worth telling: of many networks, each other one against the best."""
    if len(result.results) <= FEW:
        return result.pairs
    best = best_of(result).label
    return [each if each.first == best else each.turned() for each in result.pairs if best in (each.first, each.second)]


def difference_words(pair: Pair) -> str:
    """Which of two networks is better, if one is."""
    if pair.tie:
        return f"{shown(pair.second)} and {shown(pair.first)} are a tie: {pair.difference:+.1f} points"
    more = "more" if pair.difference >= 0 else "less"
    return f"{shown(pair.second)} is {abs(pair.difference):.1f} points {more} accurate than {shown(pair.first)}"


def pair_words(pair: Pair) -> str:
    """A comparison in a sentence."""
    low, high = pair.difference_ci
    equal = "= " if pair.p_adjusted >= 0.001 else ""
    return (
        f"{difference_words(pair)} (95%: {low:+.1f} to {high:+.1f}; {pair.only_second:,} right in it alone, "
        f"{pair.only_first:,} in the other; p {equal}{p_words(pair.p_adjusted)})"
    )


def p_words(p: float) -> str:
    """0.031, <0.001."""
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def headline(result: EvaluateResult) -> str:
    """The answer in a line."""
    best = best_of(result)
    low, high = best.top1_ci
    if len(result.results) == 2:
        return f"{difference_words(result.pairs[0])}, on {counted(result.images, 'image')}"
    which = f"Best of {len(result.results)}: " if len(result.results) > 2 else ""
    ties = tied_with(result, best.label)
    tied = f", a tie with {listed(map(shown, ties), 2)}" if ties else ""
    return (
        f"{which}{shown(best.label)} gets {best.top1:.1f}% of {counted(result.images, 'image')} right "
        f"(95%: {low:.1f} to {high:.1f}){tied}"
    )


def tied_with(result: EvaluateResult, label: str) -> list[str]:
    """The networks that these images do not tell from this one."""
    ties = [each for each in result.pairs if each.tie]
    return [each.second if each.first == label else each.first for each in ties if label in (each.first, each.second)]


def speed_words(result: EvaluateResult) -> str:
    """What latencies are; "" where there are none."""
    timed = [each.speed for each in result.results if each.speed]
    if not timed:
        return ""
    batches = " or ".join(map(str, sorted({each.batch_size for each in timed})))
    return f"{SPEED}; {counted(timed[0].threads, 'thread')}, batch {batches}; {result.cpu}."


def comparison_words(result: EvaluateResult) -> str:
    """By what networks are compared."""
    holm = f", with Holm's correction for {len(result.pairs)} pairs" if len(result.pairs) > 1 else ""
    return f"Differences: McNemar's exact test on the same images{holm}; a tie is not told apart at 5%."


def images_words(result: EvaluateResult) -> str:
    """What was judged on, in a line."""
    part = f" ({result.part})" if result.part else ""
    many = len(result.classes)
    return f"{shown(result.data)}{part}: {counted(result.images, 'image')} of {many:,} class{'es' * (many != 1)}"
