"""How far the size prior can be trusted: python tests/benchmarks/bench_prior.py

Of the published networks that it is fitted to, each is predicted by a fit without it, and by one without its whole
family. Printed per class of MACs: how often the stated 90% and 95% intervals hold the published top-1, the mean error
in points, and the mean half-width of the 90% interval. Then the four spreads that maximise the likelihood of the table,
beside those in `nas.quality.size_fit`, and what each family is worth. Last, the CPU time of a random Arch's counts and
prediction (median of 500), and of the build on the meta device (median of 50) that counts took before. Two minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import mean, median

import numpy as np
from scipy.optimize import minimize
from scipy.special import ndtri

from nas.networks.counts import counts_of
from nas.quality import size_fit
from nas.quality.candidate import Candidate
from nas.quality.prior import PriorTier, Sized, fitted_to
from nas.quality.published import Published
from nas.quality.scale import odds_of, percent_of
from nas.quality.size_fit import COEFFICIENTS, NOISE, NOISE_SLOPE, OFFSETS, SLOPES, Prediction, SizeFit
from search_spaces import Arch, count, table
from search_spaces.registry import FAMILIES
from search_spaces.space import random_params

CLASSES = ((30, 100), (100, 300), (300, 1000), (1000, 6000))
"""MMACs, from and below."""
LEVELS = (0.90, 0.95)


def left_out(points: Sequence[Published], whole_family: bool) -> list[Prediction]:
    """Each network predicted from the others, or from those of other families."""
    fits: dict[str, SizeFit] = {}
    found = []
    for point in points:
        key = point.family if whole_family else point.name
        if key not in fits:
            fits[key] = SizeFit([other for other in points if key != (other.family if whole_family else other.name)])
        found.append(fits[key].predict(point, point.family))
    return found


def holds(point: Published, told: Prediction, level: float) -> bool:
    return abs(odds_of(point.top1) - told.mean) <= float(ndtri((1 + level) / 2)) * told.error


def half_width(told: Prediction, level: float) -> float:
    reach = float(ndtri((1 + level) / 2)) * told.error
    return (percent_of(told.mean + reach) - percent_of(told.mean - reach)) / 2


def rows_of(points: Sequence[Published], told: Sequence[Prediction]) -> list[list[str]]:
    """One row a class of MACs, and one for all."""
    rows = []
    for low, high in (*CLASSES, (CLASSES[0][0], CLASSES[-1][1])):
        here = [(p, t) for p, t in zip(points, told, strict=True) if low <= p.macs / 1e6 < high]
        rows.append(
            [
                f"{low:,} to {high:,}",
                str(len(here)),
                *(f"{100 * mean(holds(p, t, level) for p, t in here):.0f}%" for level in LEVELS),
                f"{mean(abs(p.top1 - percent_of(t.mean)) for p, t in here):.1f}",
                f"{mean(half_width(t, LEVELS[0]) for _, t in here):.1f}",
            ]
        )
    return rows


def likeliest(points: Sequence[Published]) -> np.ndarray:
    """The spreads (offsets, slopes, noise, its slope) under which the table is likeliest."""
    names = sorted({point.family for point in points})
    rows = np.array([size_fit._row(point) for point in points])
    sizes = np.array([size_fit._size(point) for point in points])
    own = np.array([[float(point.family == name) for name in names] for point in points])
    odds = np.array([odds_of(point.top1) for point in points])
    common = (rows * np.square(COEFFICIENTS)) @ rows.T
    alike = own @ own.T

    def cost(values: np.ndarray) -> float:
        offsets, slopes, noise, noise_slope = np.exp(values)
        deviations = np.hypot(noise, noise_slope * sizes)
        covariance = common + alike * (offsets**2 + slopes**2 * np.outer(sizes, sizes)) + np.diag(deviations**2)
        factor = np.linalg.cholesky(covariance)
        return float(np.log(np.diag(factor)).sum() + np.square(np.linalg.solve(factor, odds)).sum() / 2)

    start = np.log([OFFSETS, SLOPES, NOISE, NOISE_SLOPE])
    found = minimize(cost, start, method="Nelder-Mead", options={"maxiter": 300, "xatol": 1e-3, "fatol": 1e-3}).x
    return np.array(np.exp(found))


def worth(points: Sequence[Published]) -> list[list[str]]:
    """Points of top-1 that a family's design and recipe are worth at 500 MMACs, 5 M parameters and 224 px."""
    fit = SizeFit(points)
    rows = []
    for family in FAMILIES:
        distilled = any(point.distilled for point in points if point.family == family and point.source != "timm")
        size = Sized(5_000_000, 500_000_000, 224, distilled)
        usual = fit.predict(replace(size, distilled=False), None)
        gain = percent_of(fit.predict(size, family).mean) - percent_of(usual.mean)
        rows.append([family, f"{gain:+.1f}"])
    return rows


def cpu_ms(work: Callable[[Arch], object], archs: Sequence[Arch]) -> float:
    """Median CPU time of some work on each of some Archs, in milliseconds."""
    spent = []
    for arch in archs:
        begun = time.process_time_ns()
        work(arch)
        spent.append(time.process_time_ns() - begun)
    return median(spent) / 1e6


def costs() -> list[list[str]]:
    """A row a family: counts, prediction, and a build, in milliseconds of CPU."""
    rng, tier = np.random.default_rng(0), PriorTier()
    rows = []
    for name, family in FAMILIES.items():
        archs = [family.space.decode(random_params(rng), 1000) for _ in range(500)]
        tier.estimate(Candidate(archs[0]), counts_of(archs[0]))
        counting = cpu_ms(count, archs)
        told = cpu_ms(lambda arch: tier.estimate(Candidate(arch), counts_of(arch)), archs)
        rows.append([name, f"{counting:.2f}", f"{told - counting:.2f}", f"{cpu_ms(table, archs[:50]):.0f}"])
    return rows


def main() -> None:
    points = fitted_to()
    print(f"{len(points)} networks, {len({point.family for point in points})} families")
    columns = ["MMACs", "networks", "90% holds", "95% holds", "mean error", "half-width of 90%"]
    for title, whole_family in (("without the network itself", False), ("without its family", True)):
        print(f"\n{title}: {', '.join(columns)}")
        for row in rows_of(points, left_out(points, whole_family)):
            print(" | ".join(row))
    print("\noffsets, slopes, noise, its slope: likeliest, and in use")
    print(likeliest(points).round(4), (OFFSETS, SLOPES, NOISE, NOISE_SLOPE))
    print("\nwhat a family is worth, in points:", worth(points))
    print("\nfamily | counts | prediction | build: ms of CPU")
    for row in costs():
        print(" | ".join(row))


if __name__ == "__main__":
    main()
