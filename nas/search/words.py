"""What a search's result says in words: on the terminal and in its report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from nas.measure.budget import Verdict
from nas.quality.tier import told_score
from nas.search.latency import Pair
from nas.search.outcome import Outcome, TierFacts, Validation, Winner
from nas.search.rows import ACCURACY, ClosingRow, Trial, known, lost_in
from nas.units import counted

if TYPE_CHECKING:
    from nas.search.request import SearchRequest


def interval_words(ci: Pair | None) -> str:
    """The 95% interval of a latency in milliseconds; a few rounds have none."""
    return "measured briefly" if ci is None else f"95% {ci[0]:.2f} to {ci[1]:.2f} ms"


def score_words(row: Trial | ClosingRow | Winner) -> str:
    """A score and the 95% interval of its estimate."""
    low, high = known(row.quality_ci)
    return f"{told_score(known(row.quality)):.1f} (95%: {low:.1f} to {high:.1f})"


def quality_words(winner: Winner) -> str:
    """How good the winner is: its accuracy where it was trained fully, else what the tier says of it."""
    return winner.words or f"score {score_words(winner)}"


def validation_line(tier: TierFacts, validation: Validation | None) -> str:
    """How far a trained tier's estimates can be trusted."""
    return " ".join(filter(None, (_validated(tier, validation), _rungs(tier))))


def _rungs(tier: TierFacts) -> str:
    """How well rungs ranked; "" where that is not known."""
    told = "; ".join(rung.words for rung in tier.rungs)
    return f"How its rungs ranked those that went on to the last: {told}." if told else ""


def _validated(tier: TierFacts, validation: Validation | None) -> str:
    if validation is None:
        text = "The tier has not been validated on this data (--validate N)."
        held = tier.held_out
        return text if held is None else f"{text} Its surrogate misses a network left out by {held[0]:.1f} points."
    taus = ", ".join(
        f"{name} {one.tau:.2f} ({one.ci[0]:.2f} to {one.ci[1]:.2f})"
        for name, one in validation.tau.items()
        if one.tau is not None and one.ci is not None
    )
    if not taus:
        return f"Kendall's tau with {validation.networks} full trainings is not known: all ended with the same top-1."
    return f"Kendall's tau with {validation.networks} full trainings (95% interval): {taus}."


def winner_line(outcome: Outcome) -> str:
    """The study's result in one line."""
    winner = outcome.winner
    if winner is None:
        lost = lost_in(outcome.final)
        kept = f" with its {ACCURACY} known to hold in {lost} (--max-drop)" if lost else ""
        return f"nothing fits {outcome.budget}{kept}"
    how = "within" if winner.verdict == Verdict.FITS else "may be within"
    accuracy = f", {winner.words}" if winner.words else ""
    gain = outcome.contest.gain_over_ready if outcome.contest else None
    accuracy += f"; found against ready: {gain.words}" if gain else ""
    return f"{winner.label} ({winner.family}) {how} {outcome.budget}{accuracy}"


def better_line(outcome: Outcome) -> str:
    """Which published network is better than what the search found; "" where none is."""
    row, winner = outcome.better_published, outcome.winner
    if row is None:
        return ""
    top1 = known(row.published_top1)
    told = f"{row.label}, with a top-1 of {top1:.1f}% on ImageNet and {row.latency_ms:.2f} ms here"
    if winner is None:
        return f"A published network fits {outcome.budget}, as nothing found does: {told}"
    low, high = winner.quality_ci
    own = f"is predicted {winner.quality_estimate:.1f}% (95%: {low:.1f} to {high:.1f})"
    if winner.published_top1 is not None:
        own = f"has {winner.published_top1:.1f}%"
    sure = winner.published_top1 is not None or top1 > high
    better = "better" if sure else "likely as good or better, a tie by the prediction's interval"
    return f"A published network is {better}: {told}; {winner.label} {own}"


def later_rounds(final: Sequence[ClosingRow]) -> str:
    """Which networks of a closing run were measured longer after it, as a sentence; "" where none was."""
    longer = [row.label for row in final if row.rounds_alone]
    return f"Measured longer afterwards, in rounds of their own: {', '.join(longer)}." if longer else ""


def ties_of(final: Sequence[ClosingRow]) -> list[str]:
    """Which networks within the budget the tier cannot tell from the winner, in one line, fastest first."""
    first = next((row for row in final if row.role == "winner"), None)
    if first is None:
        return []
    low, high = first.quality_ci
    ties = [
        row
        for row in final
        if row is not first
        and row.verdict in (Verdict.FITS, Verdict.UNSURE)
        and low <= row.quality_ci[1]
        and row.quality_ci[0] <= high
    ]
    if not ties:
        return []
    names = ", ".join(
        f"{row.label} ({row.family}, {row.latency_ms:.2f} ms)"
        for row in sorted(ties, key=lambda row: known(row.latency_ms))
    )
    rule = f"{'the best score, then ' * first.selects}the most parameters, made the choice"
    return [f"A tie with {first.label}, by the 95% intervals of the estimates: {names}; {rule}"]


def skipped_lines(request: SearchRequest, rows: Sequence[Trial]) -> Iterator[str]:
    """Published variants that were not tried, a line a family: farther from the budget, without weights where these are
    wanted, or the search ended first."""
    from search_spaces.registry import FAMILIES

    tried = {row.name.partition("@")[0] for row in rows}
    for family in request.families:
        names = [name for name in FAMILIES[family].variants if name not in tried]
        if names:
            yield f"published, not tried ({family}): {', '.join(names)}"


def protocol(request: SearchRequest) -> tuple[str, ...]:
    """How latency was measured, a line a fact."""
    from nas.measure.cache import REFERENCE
    from nas.measure.samples import CONFIDENCE, MAX_ROUNDS, MIN_ROUNDS, PRECISION, SEARCH_PRECISION
    from nas.search.closing import CLOSING_ROUNDS, MOST_ROUNDS

    return (
        f"Each network runs in a fresh process pinned to {counted(request.settings.threads, 'CPU')}; every other "
        "process of the search is stopped while it is timed.",
        f"{MIN_ROUNDS} to {MAX_ROUNDS} rounds of short slices alternate with {REFERENCE} as the fixed reference, after "
        "untimed runs; a trial ends early once its interval is wholly over the budget, judged after each round from "
        "the 6th on, or far over it from the 3rd on.",
        f"Latency is the median of all samples; its {CONFIDENCE:.0%} interval comes from the rounds' medians by order "
        f"statistics, and a trial's rounds stop once its half-width is {SEARCH_PRECISION:.0%} of the median. "
        "samples.jsonl keeps every sample.",
        f"The closing table is one run of {CLOSING_ROUNDS} rounds, all networks interleaved in shuffled order. Then "
        f"some are measured longer, up to {MOST_ROUNDS} rounds: those whose interval holds the budget, if they might "
        f"win, and those that may be within it, until the half-width is {PRECISION:.0%} of the median, where so many "
        "rounds may be enough for that.",
        "Latencies are of random weights; BatchNorm is folded and attention biases are gathered before export.",
    )
