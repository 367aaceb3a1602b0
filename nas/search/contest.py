"""The closing table of a race: what the search found against the best ready network, each trained fully."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, Self

from nas.measure.budget import Verdict
from nas.quality.candidate import Kind
from nas.search.accuracy import Comparison, compare_means
from nas.search.latency import Pair
from nas.search.rows import ClosingRow, known, rank, role_of
from nas.units import counted

RACE = "race"
"""The name of the tier whose closing table this is."""


@dataclass(frozen=True)
class Standing:
    """A network of the closing table."""

    name: str
    kind: Kind
    parent: str
    """Of a derived network: whose weights it is cut from."""
    resolution: int
    """Height and width of the input in pixels."""
    latency_ms: float
    """Median, of the closing run."""
    accuracy: float | None
    """Mean top-1 in percent over the seeds of its full trainings; None where these are not finished, as the next."""
    interval: Pair | None
    """Its 95% interval in percent."""
    verdict: Verdict
    """What the interval of its latency says of the budget."""
    parent_epochs: int | None = None
    """That its parent had been tuned for before its own training; None where it has none, or is not trained."""
    parent_seconds: float | None = None
    """That this took."""
    precision: str | None = None
    """That it is shipped in, which its latency and its accuracy are of; None in studies of earlier versions."""

    @classmethod
    def of(cls, row: ClosingRow) -> Self:
        found = row.accuracy
        return cls(
            name=row.label,
            kind=row.kind or Kind.SCRATCH,
            parent=row.parent,
            resolution=known(row.resolution),
            latency_ms=known(row.latency_ms),
            accuracy=found.mean if found else None,
            interval=found.ci if found else None,
            verdict=known(row.verdict),
            parent_epochs=found.before.epochs if found and found.before else None,
            parent_seconds=found.before.seconds if found and found.before else None,
            precision=row.precision,
        )

    @property
    def words(self) -> str:
        tuned = f" after its {counted(self.parent_epochs, 'epoch')} of tuning" if self.parent_epochs else ""
        origin = f"derived from {self.parent}{tuned}" if self.parent else str(self.kind)
        told = "" if self.accuracy is None else f"{self.accuracy:.1f}%, "
        over = ", which may be over the budget" * (self.verdict == Verdict.UNSURE)
        lower = "" if self.precision in (None, "fp32") else f" in {self.precision}"
        return f"{self.name} ({origin}, {self.resolution} px{lower}, {told}{self.latency_ms:.2f} ms{over})"


@dataclass(frozen=True)
class Gain:
    """The accuracy of the best network that was found, less that of the best ready one."""

    points: float
    low: float
    """Ends of its 95% interval."""
    high: float
    verdict: Literal["gain", "tie", "loss"]
    """A tie where the interval holds 0."""

    @classmethod
    def of(cls, found: Comparison) -> Self:
        low, high = found.ci
        return cls(found.difference, low, high, "tie" if found.tie else "gain" if low > 0 else "loss")

    @property
    def leads(self) -> bool:
        """Whether it is above a quarter of its interval's width: of many seeds, a standard error."""
        return self.points > (self.high - self.low) / 4

    @property
    def words(self) -> str:
        return f"{self.points:+.1f} points (95%: {self.low:+.1f} to {self.high:+.1f}), a {self.verdict}"


@dataclass(frozen=True)
class Contest:
    """What a race came to."""

    winner: Standing
    best_ready: Standing | None
    """None where no ready network is within the budget."""
    best_derived: Standing | None
    gain_over_ready: Gain | None
    """Of the best that the search made up; None where one of the two is missing, or not trained fully."""
    line: str
    """What was found against the best ready network, in one line."""

    def to_json(self) -> dict[str, object]:
        """The fields of result.json beside the winner."""
        others = {"best_ready": self.best_ready, "best_derived": self.best_derived}
        told = {name: found and asdict(found) for name, found in others.items()}
        return told | {"gain_over_ready": self.gain_over_ready and asdict(self.gain_over_ready)}


def contestants(final: Sequence[ClosingRow], budget_ms: float) -> list[ClosingRow]:
    """The networks that are trained fully: the best that the search made up, the best ready one, that at the budget
    where it ranks higher, and the best derived one, all by the search's own ranking; the winner so far first.

    Args:
        final: the closing run's table, best first, with a winner.
    """
    first = next(row for row in final if row.role == "winner")
    made, ready = best_within(final, Kind.DERIVED, Kind.SCRATCH), best_within(final, Kind.READY)
    rows = [first, made, ready, best_at(final, budget_ms), best_within(final, Kind.DERIVED)]
    return list({row.label: row for row in rows if row is not None}.values())


def opponents(final: Sequence[ClosingRow], budget_ms: float) -> tuple[ClosingRow | None, ClosingRow | None]:
    """The pair that decides: the best network that the search made up, and the ready one it is compared with; None
    where none is within the budget. All that is said of the contest is of this pair.

    The ready one is the best that surely fits; that at the budget (`best_at`) only where it is really better than what
    was made up, and better than the one that surely fits, or where no ready one surely fits.
    """
    found, ready = best_within(final, Kind.DERIVED, Kind.SCRATCH), best_within(final, Kind.READY)
    at = best_at(final, budget_ms)
    if at is None or found is None:
        return found, ready
    if ready is None or ready.verdict != Verdict.FITS:
        return found, at
    gain, sure = gain_of(found, at), ready.accuracy
    better = gain is not None and gain.verdict == "loss" and (sure is None or known(at.accuracy).mean > sure.mean)
    return found, at if better else ready


def best_at(final: Sequence[ClosingRow], budget_ms: float) -> ClosingRow | None:
    """The best ready network at the budget (`is_at`), if it ranks before all that surely fit."""
    at = next((row for row in final if row.kind == Kind.READY and is_at(row, budget_ms)), None)
    sure = best_within(final, Kind.READY)
    ranks = at is not None and (sure is None or sure.verdict != Verdict.FITS or rank(at) < rank(sure))
    return at if ranks else None


def is_at(row: ClosingRow, budget_ms: float) -> bool:
    """Whether a network's median latency is within the budget, but its interval holds the budget: as where the latency
    of a ready network was taken for the budget."""
    return row.verdict == Verdict.UNSURE and known(row.latency_ms) <= budget_ms


def best_within(final: Sequence[ClosingRow], *kinds: Kind) -> ClosingRow | None:
    """The best of some kinds that surely fits; where none does, the best that may."""
    rows = [row for row in final if row.kind in kinds]
    sure = (row for verdict in (Verdict.FITS, Verdict.UNSURE) for row in rows if row.verdict == verdict)
    return next(sure, None)


def winner_of(final: Sequence[ClosingRow], budget_ms: float) -> ClosingRow:
    """The winner after the full trainings: the ready network, unless what the search made up leads by a standard error.

    Where only one of the two surely fits, it stays the winner, unless the other is a ready network at the budget and
    really better. The winner so far stays where one of the two is not there, or not trained; where that is the winner
    so far, the other wins.

    Args:
        final: the closing run's table with a winner.
    """
    first = next(row for row in final if row.role == "winner")
    found, ready = opponents(final, budget_ms)
    if found is None or ready is None:
        return first
    gain = gain_of(found, ready)
    if found.verdict != ready.verdict:
        better = is_at(ready, budget_ms) and gain is not None and gain.verdict == "loss"
        return ready if better else first
    if gain is not None:
        return found if gain.leads else ready
    return next((row for row in (first, found, ready) if row.accuracy), first)


def decision(found: ClosingRow, ready: ClosingRow, winner: str) -> str:
    """What `winner_of` went by, in a line. winner: its label."""
    if found.verdict == ready.verdict:
        return (
            "which of the two best networks wins was decided on the validation images that their accuracy is of: the "
            "ready one, unless the other leads by more than a quarter of the interval's width"
        )
    sure, other = (found, ready) if found.verdict == Verdict.FITS else (ready, found)
    if winner == other.label:
        return (
            f"{other.label} wins because its median latency is within the budget and it is really better; whether it "
            f"surely fits could not be told; {sure.label} surely fits"
        )
    return f"{sure.label} wins because it surely fits; {other.label} may be over the budget"


def gain_of(found: ClosingRow | None, ready: ClosingRow | None) -> Gain | None:
    """How the two compare; None where one is not there, or not trained."""
    if found is None or ready is None or found.accuracy is None or ready.accuracy is None:
        return None
    return Gain.of(compare_means(found.accuracy, ready.accuracy))


def contest_of(final: Sequence[ClosingRow], budget_ms: float) -> Contest:
    """The contest as far as its networks are trained.

    Args:
        final: the closing run's table with a winner.
    """
    winner = next(row for row in final if row.role == "winner")
    (found, ready), derived = opponents(final, budget_ms), best_within(final, Kind.DERIVED)
    gain = gain_of(found, ready)
    return Contest(
        Standing.of(winner),
        Standing.of(ready) if ready else None,
        Standing.of(derived) if derived else None,
        gain,
        _line(winner, found, ready, gain),
    )


def with_winner(final: Sequence[ClosingRow], winner: ClosingRow) -> list[ClosingRow]:
    """The closing run's table with another winner."""

    def role(row: ClosingRow) -> str:
        if row.label == winner.label:
            return "winner"
        if row.role != "winner":
            return row.role
        return "family winner" if row.family != winner.family else role_of(row)

    return [replace(row, role=role(row)) for row in final]


def _line(winner: ClosingRow, found: ClosingRow | None, ready: ClosingRow | None, gain: Gain | None) -> str:
    best = Standing.of(winner).words
    if ready is None:
        return f"No ready network is within the budget to compare with; the best that was found is {best}"
    if found is None:
        return f"The best ready network wins: {best}; nothing that the search made up is within the budget"
    if gain is None:
        return f"Not compared with the best ready network, {Standing.of(ready).words}: not both are trained fully"
    made = Standing.of(found).words
    if winner.kind == Kind.READY:
        return f"The best ready network wins: {best}; the best that was found is {made}: {gain.words}"
    return f"Found against the best ready network: {gain.words}: {made} beside {Standing.of(ready).words}"
