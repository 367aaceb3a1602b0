"""The scale that predictions of top-1 are made on: log odds, so that no prediction and no interval leaves 0 to 100."""

from __future__ import annotations

import math

from nas.intervals import LEVEL, Interval, joined

LEAST = 0.05
"""Percent. Nothing is nearer to 0 or 100: on a few thousand images it could not be told apart from what is."""


def odds_of(percent: float) -> float:
    """Log odds of an accuracy in percent."""
    share = _possible(percent) / 100
    return math.log(share / (1 - share))


def percent_of(odds: float) -> float:
    """The accuracy in percent of log odds: within 0 to 100, to nine decimals."""
    other = math.exp(-abs(odds))
    return _possible(round(100 * (1 if odds > 0 else other) / (1 + other), 9))


def points_per_odds(percent: float) -> float:
    """How many points a unit of log odds is at an accuracy in percent: at most 25."""
    share = _possible(percent) / 100
    return 100 * share * (1 - share)


def _possible(percent: float) -> float:
    return min(max(percent, LEAST), 100 - LEAST)


def interval_of(odds: float, error: float) -> Interval:
    """The 95% interval in percent of normal log odds. error: their standard deviation."""
    from scipy.special import ndtri

    half = float(ndtri((1 + LEVEL) / 2)) * error
    return Interval(percent_of(odds - half), percent_of(odds + half))


def lowered(percent: float, error: float) -> float:
    """An accuracy one standard error (in points) lower, on this scale."""
    return percent_of(odds_of(percent) - error / points_per_odds(percent))


def with_noise(percent: float, error: float, noise: Interval) -> Interval:
    """The 95% interval in percent of an accuracy that is known to one standard error (in points), and for another
    reason only to within `noise`: on this scale, distances to the ends add in squares."""
    odds = odds_of(percent)
    known = interval_of(odds, error / points_per_odds(percent))
    found = joined(odds, *(Interval(odds_of(each.low), odds_of(each.high)) for each in (known, noise)))
    return Interval(percent_of(found.low), percent_of(found.high))
