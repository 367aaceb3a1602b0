"""Which learning rate short trials speak for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nas.training.course import Held, Trial


def standard_error(held: Held) -> float:
    """Of an accuracy, in points."""
    share = held.top1 / 100
    return 100 * math.sqrt(share * (1 - share) / held.images)


def speak_for_tuning(trials: Sequence[Trial], probe: Held) -> bool:
    """Whether the best of short trials is not below the probe by more than its standard error.

    Raises:
        ValueError: no trial.
    """
    return max(trial.top1 for trial in trials) >= probe.top1 - standard_error(probe)


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
