"""What int8 costs the networks of a search that trains: their files with trained weights, judged on held-out images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nas.export.card import HELD_OUT
from nas.measure.runtime import RUNTIMES
from nas.quality.kept import path_of, read
from nas.search.final import weights_of

if TYPE_CHECKING:
    from nas.evaluate.precision import Price
    from nas.quality.candidate import Candidate
    from nas.quality.tier import TrainedTier
    from nas.search.request import SearchRequest


def quantises(request: SearchRequest) -> bool:
    """Whether the files that are measured are int8."""
    return request.settings.precision == "int8" and RUNTIMES[request.settings.runtime].artifact == "onnx"


def write_priced(request: SearchRequest, tier: TrainedTier, candidate: Candidate, path: Path) -> Price | None:
    """Write a network's int8 file, with the weights of its fullest training.

    A full training is judged on the validation images, the search's own on the training images that it held out.

    Returns:
        What int8 costs; None where there are no weights, and no file.

    Raises:
        UserError: see `nas.evaluate.precision.write_int8`.
        RuntimeError, ValueError: the network cannot be exported.
    """
    from nas.evaluate.precision import write_int8

    data, trainer, weights, part = tier.data(candidate), tier.trainer, weights_of(request, candidate), ""
    images = data.val
    if weights is None:
        weights, part = path_of(trainer.kept, candidate.key), HELD_OUT
        if read(weights) is None:
            return None
        resolution = candidate.network.resolution
        taught, images = trainer.taught(resolution, data.pixels), trainer.halves(resolution, data.pixels)[1]
        data = replace(data, calibration=trainer.plain(taught, resolution, data.pixels))
    return write_int8(candidate.network, weights, path, data, images, request.settings, request.max_drop, part)
