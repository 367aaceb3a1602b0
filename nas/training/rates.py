"""Which learning rate short trials speak for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nas.training.course import Held, Trial

ENOUGH = 250
"""Held-out images by which a trial can show that tuning pays: a standard error is 3.2 points at most."""


def standard_error(held: Held) -> float:
    """Of an accuracy, in points."""
    share = held.top1 / 100
    return 100 * math.sqrt(share * (1 - share) / held.images)


def speaks_for_tuning(trial: Trial, probe: Held) -> bool:
    """Whether a short trial says that tuning by its rate pays: it is not below the probe by more than the probe's
    standard error, on enough images. It is of one epoch, and gains more in several."""
    return probe.images >= ENOUGH and trial.top1 >= probe.top1 - standard_error(probe)


def choose_trial(trials: Sequence[Trial], epochs: int, errors: float = 1) -> Trial:
    """The trial with the highest rate among those within so many standard errors of the best; of a training of one
    epoch, which is no longer than a trial, the best.

    A trial's single epoch favours low rates: with networks of 2 to 6 M parameters on 2,000 images, the rate that was
    best after 3 to 10 epochs was up to 2.5 points behind after one. A rate that is too high falls by 10 or more.

    Raises:
        ValueError: no trial.
    """
    best = max(trials, key=lambda trial: trial.top1)
    if epochs == 1 or best.top1 == 0:  # of trials that have all diverged, the lowest rate
        return min((trial for trial in trials if trial.top1 == best.top1), key=lambda trial: trial.lr)
    least = best.top1 - errors * standard_error(best)
    return max((trial for trial in trials if trial.top1 >= least), key=lambda trial: trial.lr)
