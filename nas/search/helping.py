"""A process that only trains: what a search elsewhere has measured, and what that one wants trained besides."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, cast

from nas.errors import UserError
from nas.search.log import SearchLog
from nas.search.loop import interruptible, open_run, open_tier
from nas.search.request import SearchRequest, storage_of
from nas.search.run import read_images, settled
from nas.search.trial_training import Stage, TrainStep
from nas.search.work import open_tasks
from nas.study.jobs import MEASURES, TRAINS, at_work, has_died, workers
from nas.study.leases import LEASE_S, LOOK_S
from nas.text import mask_url
from nas.threads import training_threads
from nas.units import counted

START_S = 600.0
"""In which the search that measures should have begun."""

if TYPE_CHECKING:
    import optuna

    from nas.data.dataset import ImageData
    from nas.quality.tier import TrainedTier


def train_measured(
    request: SearchRequest,
    say: Callable[[str], None] = lambda _: None,
    phase: Callable[[str, int, int], None] = lambda *_: None,
    *,
    images: ImageData | None = None,
) -> int:
    """Train what a search on another process has measured, until that search ends.

    The measured device is not needed here. Networks are trained on the first of `request.train_devices`.

    Args:
        say: called with each line that a person should read.
        phase: called with what goes on, how much of it is done and its total, 0 where it is not counted.
        images: what `nas.search.run.read_images` gave for this request; None reads them.

    Returns:
        How many trainings were made.

    Raises:
        UserError: a request that does not hold, a study that is not there or disagrees with it, images that cannot be
            read, a GPU that is not there.
        KeyboardInterrupt: Ctrl-C. What was trained goes on elsewhere, or with the same command.
    """
    from nas.study.errors import storage_errors

    request = replace(request, only="train", workers=0)
    request.check()
    request = await_search(request, say)
    images = images or read_images(request)
    assert images is not None
    request = settled(request, images)
    with storage_errors(storage_of(request)), interruptible():
        study, _ = open_run(request, images)
        await_work(request, study, say)
        with training_threads(request.train_threads, say), at_work(study, [TRAINS]):
            return _Helper(request, study, images, say, phase).run()


def await_search(request: SearchRequest, say: Callable[[str], None]) -> SearchRequest:
    """Wait for the study, `START_S` at most, where a storage is shared: a cluster starts its workers in any order.

    Returns:
        The request with the precisions of the study, which are those of the measured device.

    Raises:
        UserError: there is no such study.
    """
    from nas.study.trials import identity_of

    storage = storage_of(request)
    where = mask_url(str(storage))
    begins = _beginning(request, say, f"there is no study {request.study!r} in {where} yet")
    while (found := identity_of(request.study, storage)) is None:
        if not begins():
            raise UserError(
                f"--only train: there is no study {request.study!r} in {where}: start the search that measures, and "
                "give the same --study, --out or --storage, which both can reach"
            )
    return replace(request, lower=tuple(found.get("precisions", ())[1:]))


def await_work(request: SearchRequest, study: optuna.Study, say: Callable[[str], None]) -> None:
    """Wait until something is to be trained or somebody measures, as `await_search`.

    Raises:
        UserError: there is nothing to train, and nobody makes something.
    """
    from nas.study.trials import sweep, waiting_for_training

    sweep(study)
    begins = _beginning(request, say, "nothing waits for a training, and nobody measures yet")
    while not waiting_for_training(study) and not workers(study, MEASURES):
        if not begins():
            raise UserError(
                "--only train: nothing waits for a training, and nobody measures: start the search that measures"
            )


def _beginning(request: SearchRequest, say: Callable[[str], None], why: str) -> Callable[[], bool]:
    """A wait for the search that measures, told once; it returns False where there is none or it has been too long."""
    deadline = time.monotonic() + (START_S if request.storage else 0)
    told = False

    def wait() -> bool:
        nonlocal told
        if time.monotonic() >= deadline:
            return False
        if not told:
            told = True
            say(f"waiting for the search that measures, {START_S / 60:g} minutes at most: {why}")
        time.sleep(LOOK_S)
        return True

    return wait


class _Helper:
    """`train_measured`, step by step."""

    def __init__(
        self,
        request: SearchRequest,
        study: optuna.Study,
        images: ImageData,
        say: Callable[[str], None],
        phase: Callable[[str, int, int], None],
    ) -> None:
        self.study, self.say = study, say
        self._has_seen_it, self._until = False, math.inf
        self.log = SearchLog(datetime.now().astimezone().isoformat(timespec="seconds"))
        stage = Stage(phase)
        tier, _ = open_tier(request, study, images, stage, say, lambda *_: None)
        self.step = TrainStep(request, study, tier, stage)
        self.tasks = open_tasks(request, study, cast("TrainedTier", tier), True, say)

    def run(self) -> int:
        from nas.study.trials import sweep

        made = 0
        while True:
            sweep(self.study)
            goes_on = self._goes_on()
            if self.step.claimed(self.log) or (goes_on and self.tasks.help()):
                made += 1
                self._tell()
            elif not goes_on:
                break
            else:
                time.sleep(LOOK_S)
        self.say(f"the search that measures has ended: {counted(made, 'training')} made here")
        return made

    def _goes_on(self) -> bool:
        """Whether somebody measures, or died while this process worked and may be started again."""
        if workers(self.study, MEASURES):
            self._has_seen_it, self._until = True, math.inf
            return True
        if not (self._has_seen_it and has_died(self.study, MEASURES)):
            return False
        if self._until == math.inf:
            self._until = time.monotonic() + LEASE_S
            self.say(f"what measures has died: waiting {LEASE_S / 60:g} minutes at most until it is started again")
        return time.monotonic() < self._until

    def _tell(self) -> None:
        """Say what the log has noted since."""
        for line in self.log.notes:
            self.say(line)
        self.log.notes.clear()
