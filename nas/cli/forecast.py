"""How long the rest of a search or a training takes, from what has been seen of it so far."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

MEMORY_S = 120.0
"""Seconds after which what was seen counts a third."""
CLOSING_NETWORKS = 8
LEAST_CLOSING_S = 2.0
"""Networks of a closing run, about, and seconds that each takes at least."""
FINALS = "final trainings"
"""Tells how many are to be made, those of parents among them, before the first."""
FINAL = re.compile(r"final training, .+, seed \d+$|tuning the parent .+ on all images, seed \d+$")
TUNING = "tuning the "
TEACHER = re.compile(r"trying the teacher .+, (without|by) it$")
VALIDATION = "validation"


class Pace:
    """Images a second lately, from what a progress callback tells."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._images = self._seconds = 0.0
        self._last: tuple[str, int, float] | None = None

    def see(self, what: str, done: int) -> None:
        """Something is at `done` images; the first of these of it only says where it began."""
        now = self._now()
        if self._last is not None and self._last[0] == what and done >= self._last[1]:
            seconds = now - self._last[2]
            kept = math.exp(-seconds / MEMORY_S)
            self._images = self._images * kept + done - self._last[1]
            self._seconds = self._seconds * kept + seconds
        self._last = what, done, now

    @property
    def images_per_s(self) -> float | None:
        """None before anything is known."""
        return self._images / self._seconds if self._images and self._seconds else None


@dataclass(frozen=True)
class Plan:
    """What a search has before it, as far as it is known at its start.

    final_images, validation_images: trained on in one training at its end, and in one network's validation, over all
    epochs. seeds: of a network at the end. networks: that are trained at the end, parents among them. timeout_s: after
    which no trial begins. taught_images: trained on in all to see whether a teacher helps. tuned_images: in its tuning,
    where it is known to be tuned first.
    """

    trials: int
    final_images: int = 0
    seeds: int = 0
    networks: int = 2
    taught_images: int = 0
    tuned_images: int = 0
    validation_images: int = 0
    validated: int = 0
    timeout_s: float | None = None


class Forecast:
    """The time left of a search: its trials by their recent pace, the closing run, and the trainings at its end by the
    images a second that were trained on lately."""

    def __init__(self, plan: Plan, now: Callable[[], float] = time.monotonic) -> None:
        self._plan, self._now, self._begun = plan, now, now()
        self._pace = Pace(now)
        self._trials_left, self._measuring_s = plan.trials, 0.0
        self._trial_s: float | None = None
        self._trial_began = now()
        self._closing: tuple[float, float] | None = None  # when it began, seconds left as of its own pace
        self._finals = plan.seeds * plan.networks
        self._trained: dict[str, int] = {}  # images of these
        self._taught = 0  # images of a teacher's trial
        self._to_tune = plan.tuned_images  # images of a teacher, those that are left
        self._validated = self._validating = 0.0

    def trial(self, done: int, trial_s: float | None, measuring_s: float) -> None:
        """Trials that are done; seconds that one took lately, and how many of them without a training."""
        self._trials_left = max(0, self._plan.trials - done)
        self._trial_s, self._measuring_s = trial_s, measuring_s
        self._trial_began = self._now()

    def phase(self, what: str, done: int, total: int) -> None:
        """What goes on now."""
        plan = self._plan
        final, teacher = FINAL.match(what), TEACHER.match(what)
        tuning = what.startswith(TUNING) and not final
        if "training, epoch" in what or what == VALIDATION or final or teacher or tuning:
            self._pace.see(what, done)
        if what == VALIDATION:
            if done < self._validating:
                self._validated += plan.validation_images
            self._validating = done
        elif what.startswith("closing") and total:
            self._trials_left = 0
            began = self._now() if self._closing is None or done == 0 else self._closing[0]  # 0: of further rounds too
            spent = self._now() - began
            self._closing = began, spent / done * (total - done) if done else self._closing_s()
        elif teacher:
            self._trials_left, self._closing, self._to_tune = 0, (self._now(), 0.0), 0
            self._taught = plan.taught_images - (total if teacher[1] == "by" else 2 * total) + done
        elif tuning and self._closing is not None:
            self._to_tune = total - done
        elif what == FINALS:
            self._trials_left, self._closing = 0, (self._now(), 0.0)
            self._taught, self._to_tune = plan.taught_images, 0
            self._validated = plan.validated * plan.validation_images
            self._finals, self._trained = total, {}
        elif final:
            self._trained = dict.fromkeys(self._trained, plan.final_images) | {what: done}

    def left_s(self) -> float | None:
        """Seconds; None where nothing can be said yet."""
        plan, now = self._plan, self._now()
        trials = 0.0
        if self._trials_left:
            if self._trial_s is None:
                return None
            current = max(0.0, self._trial_s - (now - self._trial_began))
            trials = (self._trials_left - 1) * self._trial_s + current
            if plan.timeout_s is not None:
                trials = min(trials, max(0.0, self._begun + plan.timeout_s - now) + current)
        images: float = max(0, plan.final_images * self._finals - sum(self._trained.values()))
        images += self._to_tune + max(0, plan.taught_images - self._taught)
        images += max(0.0, plan.validation_images * plan.validated - self._validated - self._validating)
        training = 0.0
        if images > 0:
            if self._pace.images_per_s is None:
                return None
            training = images / self._pace.images_per_s
        return trials + (self._closing_s() if self._closing is None else self._closing[1]) + training

    def _closing_s(self) -> float:
        return CLOSING_NETWORKS * max(LEAST_CLOSING_S, self._measuring_s)


def about(seconds: float) -> str:
    """A time in words, rounded as an estimate deserves."""
    if seconds < 90:
        return f"about {max(5, round(seconds / 5) * 5)} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"about {minutes} min"
    return f"about {minutes // 60} h {minutes % 60:02d} min" if minutes < 600 else f"about {round(minutes / 60)} h"
