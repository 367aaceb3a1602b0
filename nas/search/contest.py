"""The closing table of a race: what the search found against the best ready network, each trained fully."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, Self

from nas.measure.budget import Verdict
from nas.quality.candidate import Kind
from nas.search.accuracy import Comparison, compare_means
from nas.search.latency import Pair
from nas.search.rows import ClosingRow, known, role_of

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

    @classmethod
    def of(cls, row: ClosingRow) -> Self:
        found = row.accuracy
        return cls(
            name=row.label,
            kind=row.kind,
            parent=row.parent,
            resolution=known(row.resolution),
            latency_ms=known(row.latency_ms),
            accuracy=found.mean if found else None,
            interval=found.ci if found else None,
        )

    @property
    def words(self) -> str:
        origin = f"derived from {self.parent}" if self.parent else str(self.kind)
        told = "" if self.accuracy is None else f"{self.accuracy:.1f}%, "
        return f"{self.name} ({origin}, {self.resolution} px, {told}{self.latency_ms:.2f} ms)"


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
    """None where one of the two is missing, or not trained fully."""
    line: str
    """What was found against the best ready network, in one line."""

    def to_json(self) -> dict[str, object]:
        """The fields of result.json beside the winner."""
        others = {"best_ready": self.best_ready, "best_derived": self.best_derived}
        told = {name: found and asdict(found) for name, found in others.items()}
        return told | {"gain_over_ready": self.gain_over_ready and asdict(self.gain_over_ready)}


def contestants(final: Sequence[ClosingRow]) -> list[ClosingRow]:
    """The networks that are trained fully: the winner so far, the best ready network and the best derived one; where
    none of these was found by the search, the best from scratch.

    Args:
        final: the closing run's table, best first, with a winner.
    """
    first = next(row for row in final if row.role == "winner")
    rows = [first]
    for kind in Kind:
        best = best_within(final, kind)
        found = any(row.kind != Kind.READY for row in rows)
        if best and best.label != first.label and not (kind == Kind.SCRATCH and found):
            rows.append(best)
    return rows


def best_within(final: Sequence[ClosingRow], kind: Kind) -> ClosingRow | None:
    """The best of a kind that surely fits; where none does, the best that may. Full trainings come before estimates."""
    for verdict in (Verdict.FITS, Verdict.UNSURE):
        rows = [row for row in final if row.kind == kind and row.verdict == verdict]
        trained = [row for row in rows if row.accuracy]
        if rows:
            return max(trained, key=_mean, default=rows[0])
    return None


def winner_of(final: Sequence[ClosingRow]) -> ClosingRow:
    """The most accurate of the networks that were trained fully, within the budget as surely as the winner so far; of
    equal ones a ready network.

    Args:
        final: the closing run's table with a winner that was trained fully.
    """
    first = next(row for row in final if row.role == "winner")
    trained = [row for row in final if row.accuracy and row.verdict == first.verdict]
    return max(trained, key=lambda row: (_mean(row), row.kind == Kind.READY))


def contest_of(final: Sequence[ClosingRow]) -> Contest:
    """The contest as far as its networks are trained.

    Args:
        final: the closing run's table with a winner.
    """
    winner = next(row for row in final if row.role == "winner")
    found, ready = opponents(final)
    derived = best_within(final, Kind.DERIVED)
    gain = None
    if found and ready and found.accuracy and ready.accuracy:
        gain = Gain.of(compare_means(found.accuracy, ready.accuracy))
    return Contest(
        Standing.of(winner),
        Standing.of(ready) if ready else None,
        Standing.of(derived) if derived else None,
        gain,
        _line(winner, ready, found, gain),
    )


def opponents(final: Sequence[ClosingRow]) -> tuple[ClosingRow | None, ClosingRow | None]:
    """The best network that the search made up, and the best ready one; None where none is within the budget."""
    winner = next(row for row in final if row.role == "winner")
    made = [row for row in final if row.kind != Kind.READY and row.verdict in (Verdict.FITS, Verdict.UNSURE)]
    best = max((row for row in made if row.accuracy), key=_mean, default=next(iter(made), None))
    found = winner if winner.kind != Kind.READY else best
    return found, best_within(final, Kind.READY)


def crowned(final: Sequence[ClosingRow], winner: ClosingRow) -> list[ClosingRow]:
    """The closing run's table with another winner."""

    def role(row: ClosingRow) -> str:
        if row.label == winner.label:
            return "winner"
        if row.role != "winner":
            return row.role
        return "family winner" if row.family != winner.family else role_of(row)

    return [replace(row, role=role(row)) for row in final]


def _mean(row: ClosingRow) -> float:
    return known(row.accuracy).mean


def _line(winner: ClosingRow, ready: ClosingRow | None, found: ClosingRow | None, gain: Gain | None) -> str:
    best = Standing.of(winner).words
    if ready is None:
        return f"No ready network is within the budget to compare with; the best that was found is {best}"
    if found is None:
        return f"The best ready network wins: {best}; nothing that the search made up is within the budget"
    if gain is None:
        return f"Not compared with the best ready network, {Standing.of(ready).words}: not both are trained fully"
    if winner.kind == Kind.READY:
        return (
            f"The best ready network wins: {best}; the best that was found is {Standing.of(found).words}: {gain.words}"
        )
    over = ", which may be over the budget" if ready.verdict == Verdict.UNSURE else ""
    return f"Found against the best ready network: {gain.words}: {best} beside {Standing.of(ready).words}{over}"
