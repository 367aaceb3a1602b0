"""The scale that predictions of top-1 are made on: log odds, so that no prediction and no interval leaves 0 to 100."""

from __future__ import annotations

import math

from nas.intervals import LEVEL, Interval

LEAST = 0.05
"""Percent. Accuracies nearer to 0 or 100 are taken for this near: a few images cannot tell them apart."""


def odds_of(percent: float) -> float:
    """Log odds of an accuracy in percent."""
    share = min(max(percent, LEAST), 100 - LEAST) / 100
    return math.log(share / (1 - share))


def percent_of(odds: float) -> float:
    """The accuracy in percent of log odds: within 0 to 100."""
    if odds < 0:
        return 100 * math.exp(odds) / (1 + math.exp(odds))
    return 100 / (1 + math.exp(-odds))


def points_per_odds(percent: float) -> float:
    """How many points a unit of log odds is at an accuracy in percent: at most 25."""
    share = min(max(percent, LEAST), 100 - LEAST) / 100
    return 100 * share * (1 - share)


def interval_of(odds: float, error: float) -> Interval:
    """The 95% interval in percent of normal log odds. error: their standard deviation."""
    from scipy.special import ndtri

    half = float(ndtri((1 + LEVEL) / 2)) * error
    return Interval(percent_of(odds - half), percent_of(odds + half))
