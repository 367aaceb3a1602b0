"""A whole search: its trials, then its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from nas.errors import UserError
from nas.search.finish import finish_run
from nas.search.folder import final_epochs_in
from nas.search.loop import Progress, interruptible
from nas.search.loop import search as run_trials
from nas.search.request import storage_of
from nas.search.workers import open_crew
from nas.threads import training_threads

if TYPE_CHECKING:
    from nas.data.dataset import ImageData
    from nas.search.outcome import Outcome
    from nas.search.request import SearchRequest


def read_images(request: SearchRequest) -> ImageData | None:
    """The images of the request's plan, split for training and evaluation; None without a plan.

    Raises:
        UserError: images that cannot be read, or other classes than the plan says.
    """
    if request.plan is None:
        return None
    from nas.data.dataset import open_data
    from nas.quality.parent import parent_pixels, parent_weights

    plan, resolution = request.plan, request.resolution or 224
    data = open_data(plan.data, resolution, plan.num_classes, request.seed or 0, parent_weights(plan.parent))
    return data.at(resolution, pixels=parent_pixels(plan.parent))


def search(
    request: SearchRequest,
    progress: Callable[[Progress], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
    phase: Callable[[str, int, int], None] = lambda *_: None,
    *,
    images: ImageData | None = None,
    command: str = "vitnas.search(...)",
) -> Outcome:
    """Search networks that meet a latency budget, measured on the device of the request.

    The run's folder, `request.folder`, holds the report, and the best network in best/. Calling it again with the same
    request continues the study.

    Args:
        progress: called after each trial.
        say: called with each line that a person should read.
        phase: called with what goes on, how much of it is done and its total, 0 where it is not counted.
        images: what `read_images` gave for this request; None reads them.
        command: how the report names this search.

    Returns:
        What was found. `interrupted` says whether Ctrl-C ended it early.

    Raises:
        UserError: a request that does not hold, a busy or missing device, images, a folder or a storage that cannot be
            used, a study that disagrees with the request.
        KeyboardInterrupt: Ctrl-C before the first trial; or where a run had ended with the same trials, whose results
            stay.
    """
    from nas.study.errors import storage_errors
    from nas.study.trials import sweep

    request.check()
    if request.only == "train":
        raise UserError("a search that measures nothing is vitnas.train_measured")
    images = images or read_images(request)
    if images is not None:
        request = settled(request, images)
    with training_threads(request.train_threads, say), open_crew(request, say, phase) as crew:
        request = replace(request, workers=crew.size)
        study, log = run_trials(request, progress, say, phase, images, crew)
        if log.interrupted:
            crew.close()
        take_over = crew.close if request.train_processes > 1 else None
        with storage_errors(storage_of(request)), interruptible():
            outcome = finish_run(request, study, log, command, phase, say, take_over)
            sweep(study)
    return outcome


def settled(request: SearchRequest, images: ImageData) -> SearchRequest:
    """The request with what these images say."""
    plan = request.plan and request.plan.settled(request.quality, len(images.train), final_epochs_in(request.folder))
    return replace(request, num_classes=len(images.classes), plan=plan)
