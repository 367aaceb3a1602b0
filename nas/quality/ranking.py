"""How well estimates rank networks: Kendall's tau with the accuracy of full trainings, with its interval."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from nas.units import counted

if TYPE_CHECKING:
    import numpy as np

    from nas.quality.surrogate import TrainedNetwork

GATE = "estimate, first rung"
"""The estimate that decides whether a tier may choose: most networks of a search end at their first rung."""
LEAST = 3
"""Networks below which a rung's ranking is not told."""
RESAMPLES, BATCH = 2_000, 100
"""Bootstrap resamples: their total, and how many are in memory at once."""


@dataclass(frozen=True)
class Tau:
    """Kendall's tau-b of an estimate with full trainings; None where all values are equal."""

    tau: float | None
    """-1 to 1."""
    ci: tuple[float, float] | None
    """95% interval."""

    def to_json(self) -> dict[str, object]:
        """The record as JSON."""
        return asdict(self)


@dataclass(frozen=True)
class RungRank:
    """How well a rung ranked the networks that went on to the last one, which it has chosen itself."""

    epochs: int
    """0: before any."""
    networks: int
    """Trained from this rung to the last; `LEAST` or more."""
    tau: Tau
    """Of top-1 there with top-1 after the last rung."""
    regret: float
    """What the network that was best there is short of the best one after the last rung, in points."""

    @property
    def words(self) -> str:
        when = f"after {counted(self.epochs, 'epoch')}" if self.epochs else "before any epoch"
        tau = "unknown" if self.tau.tau is None else f"{self.tau.tau:.2f}"
        return f"{when} tau {tau}, regret {self.regret:.1f} points ({self.networks} networks)"


def rung_ranks(trained: Sequence[TrainedNetwork], last: int) -> list[RungRank]:
    """A row for each rung before the last that enough networks went on from. last: epochs of the last rung."""
    full = [each.rungs for each in trained if last in each.rungs]
    found = []
    for epochs in sorted({epochs for rungs in full for epochs in rungs} - {last}):
        both = [(rungs[epochs], rungs[last]) for rungs in full if epochs in rungs]
        if len(both) >= LEAST:
            there, after = zip(*both, strict=True)
            leaders = [top1 for first, top1 in both if first == max(there)]
            found.append(RungRank(epochs, len(both), tau(there, after), max(after) - sum(leaders) / len(leaders)))
    return found


def taus(estimates: Mapping[str, Sequence[float]], truth: Sequence[float]) -> dict[str, Tau]:
    """Tau of every estimate, by name; of estimates with equal values, only the first.

    Args:
        estimates: a value for each network.
        truth: top-1 of the same networks after full trainings, in percent.
    """
    told: dict[str, Sequence[float]] = {}
    for name, values in estimates.items():
        if values not in told.values():
            told[name] = values
    return {name: tau(values, truth) for name, values in told.items()}


def tau(values: Sequence[float], truth: Sequence[float]) -> Tau:
    """Kendall's tau-b and its 95% interval by bootstrap over networks."""
    import numpy as np
    from scipy.stats import DegenerateDataWarning, bootstrap

    x, y = np.asarray(values, float), np.asarray(truth, float)
    if len(set(values)) < 2 or len(set(truth)) < 2:
        return Tau(None, None)
    how = {"paired": True, "vectorized": True, "method": "percentile", "rng": np.random.default_rng(0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # its interval is nan where one resample's tau is
        found = bootstrap((x, y), _tau_b, n_resamples=RESAMPLES, batch=BATCH, **how)
    low, high = np.nanpercentile(found.bootstrap_distribution, [2.5, 97.5])
    return Tau(float(_tau_b(x, y)), (float(low), float(high)))


def selects(found: Tau) -> bool:
    """Whether a tier with this tau may choose: not where its interval includes 0."""
    return found.ci is not None and found.ci[0] > 0


def _tau_b(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    """Kendall's tau-b along the last axis, as `scipy.stats.kendalltau` computes it for one sample.

    It is nan where all values of a sample are equal.
    """
    import numpy as np

    signs = [np.sign(each[..., :, None] - each[..., None, :]) for each in (x, y)]
    agree, *differ = (each.sum((-2, -1)) for each in (signs[0] * signs[1], *map(np.abs, signs)))
    with np.errstate(invalid="ignore"):
        found: np.ndarray = agree / np.sqrt(differ[0] * differ[1])
    return found
