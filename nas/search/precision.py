"""What int8 costs the networks of a search that trains: their files with trained weights, judged on held-out images."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nas.export.card import HELD_OUT
from nas.files import scratch
from nas.measure.runtime import RUNTIMES
from nas.quality.kept import path_of, read
from nas.search.final import weights_of

if TYPE_CHECKING:
    from nas.evaluate.precision import Price
    from nas.quality.candidate import Candidate
    from nas.quality.tier import TrainedTier
    from nas.search.request import SearchRequest


@dataclass(frozen=True)
class Int8File:
    """A network's int8 file, and what it costs."""

    content: bytes
    price: Price


@dataclass(frozen=True)
class Int8Files:
    """Makes each network's int8 file once for each of its trainings."""

    request: SearchRequest
    tier: TrainedTier
    made: dict[Path, Int8File] = field(default_factory=dict)
    """By the file of their weights."""

    def of(self, candidate: Candidate) -> Int8File | None:
        """With the weights of its fullest training; None where there are none.

        A full training is judged on the validation images, the search's own on the training images that it held out.

        Raises:
            UserError: see `nas.evaluate.precision.write_int8`.
            RuntimeError, ValueError: the network cannot be exported.
        """
        from nas.evaluate.precision import write_int8

        request, trainer, data, part = self.request, self.tier.trainer, self.tier.data(candidate), ""
        weights, images = weights_of(request, candidate), data.val
        if weights is None:
            weights, part = path_of(trainer.kept, candidate.key), HELD_OUT
            if read(weights) is None:
                return None
            resolution = candidate.network.resolution
            taught, images = trainer.taught(resolution, data.pixels), trainer.halves(resolution, data.pixels)[1]
            data = replace(data, calibration=trainer.plain(taught, resolution, data.pixels))
        if weights not in self.made:
            with scratch(request.folder) as folder:
                path, settings = folder / "model.onnx", request.settings
                price = write_int8(candidate.network, weights, path, data, images, settings, request.max_drop, part)
                self.made[weights] = Int8File(path.read_bytes(), price)
        return self.made[weights]


def quantises(request: SearchRequest) -> bool:
    """Whether the files that are measured are int8."""
    return request.settings.precision == "int8" and RUNTIMES[request.settings.runtime].artifact == "onnx"
