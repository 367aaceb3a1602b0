"""Networks of a search that trains in lower precisions: their files with trained weights, judged on held-out images."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nas.evaluate.precision import NOT_TIMED
from nas.export.card import HELD_OUT
from nas.files import replace_file, scratch
from nas.identity import file_digest
from nas.measure.budget import Verdict
from nas.measure.samples import MeasureError
from nas.quality.kept import path_of, read
from nas.search.closing import timed_anew
from nas.search.final import result_path, weights_of
from nas.search.rows import candidate_of, known

if TYPE_CHECKING:
    from nas.evaluate.precision import Price
    from nas.export.quantize import Recipe
    from nas.quality.candidate import Candidate
    from nas.quality.tier import TrainedTier
    from nas.search.accuracy import Accuracies
    from nas.search.request import SearchRequest
    from nas.search.rows import ClosingRow


@dataclass(frozen=True)
class LowerFile:
    """A network in a lower precision: its file, and what it costs."""

    content: bytes | None
    """None of a precision without a file of its own."""
    price: Price
    measured: bytes | None = None
    """What is timed in its place, where it was chosen what the file takes and gives."""


@dataclass(frozen=True)
class LowerFiles:
    """Judges each network in its precision, once for each of its trainings."""

    request: SearchRequest
    tier: TrainedTier
    made: dict[tuple[Path, str], LowerFile] = field(default_factory=dict)
    """By the file of their weights, and the precision."""
    timed: dict[str, Recipe | None] = field(default_factory=dict)
    """By the key of a candidate: the recipe of the file whose latency is told, where it is not the default one."""

    def of(self, candidate: Candidate, precision: str) -> LowerFile | None:
        """With the weights of its fullest training; None where there are none.

        A full training is judged on the validation images, the search's own on the training images that it held out.

        Args:
            precision: one of LOWER.

        Raises:
            UserError: see `nas.evaluate.precision.write_lower`.
            RuntimeError, ValueError: the network cannot be exported.
        """
        from nas.evaluate.precision import write_lower, write_measured

        request, trainer, data, part = self.request, self.tier.trainer, self.tier.data(candidate), ""
        weights, images = weights_of(request, candidate), data.val
        if weights is None:
            weights, part = path_of(trainer.kept, candidate.key), HELD_OUT
            if read(weights) is None:
                return None
            resolution = candidate.network.resolution
            taught, images = trainer.taught(resolution, data.pixels), trainer.halves(resolution, data.pixels)[1]
            data = replace(data, calibration=trainer.plain(taught, resolution, data.pixels))
        key = weights, precision
        if key not in self.made:
            with scratch(request.folder) as folder:
                path, settings = folder / "model.onnx", replace(request.settings, precision=precision)
                price = write_lower(
                    candidate.network, weights, path, data, images, settings, request.max_drop, part, request.file
                )
                content, measured = path.read_bytes() if path.exists() else None, None
                if price.within and not price.as_timed and not request.file.plain:
                    write_measured(candidate.network, weights, path, data, settings, price.recipe)
                    measured = path.read_bytes()
                self.made[key] = LowerFile(content, price, measured)
        return self.made[key]

    def shipped(self, candidate: Candidate, precision: str, trained: Accuracies) -> Accuracies:
        """The accuracies of a network's full trainings as they are shipped: each in its precision, on all validation
        images. Of seeds whose weights an earlier version did not keep there is none.

        Raises: as `of`.
        """
        from nas.evaluate.precision import deployed_right

        made = self.of(candidate, precision)
        assert made is not None
        data, settings = self.tier.data(candidate), replace(self.request.settings, precision=precision)
        hits = []
        for seed in range(len(trained.top1)):
            result = result_path(self.request, candidate, seed)
            weights, kept = result.with_suffix(".safetensors"), result.with_suffix(f".{precision}.json")
            if not weights.is_file():
                continue
            of = f"{file_digest(weights, 64)}, {made.price.recipe}"
            found = json.loads(kept.read_text()) if kept.is_file() else {}
            if found.get("of") != of:
                with scratch(self.request.folder) as folder:
                    right = deployed_right(
                        candidate.network, weights, folder / "model.onnx", data, data.val, settings, made.price.recipe
                    )
                found = {"of": of, "hits": "".join("01"[hit] for hit in right.tolist())}
                replace_file(kept, json.dumps(found))
            hits.append([digit == "1" for digit in found["hits"]])
        top1 = [100 * statistics.fmean(each) for each in hits]
        return replace(trained, top1=top1, images=len(hits[0]), hits=hits, precision=precision)


def time_anew(
    files: LowerFiles, final: Sequence[ClosingRow], row: ClosingRow, made: LowerFile, note: Callable[[str], None]
) -> tuple[list[ClosingRow], bool]:
    """Time the file that a network is shipped as, where it is made by another recipe than the one that was timed.

    Returns:
        The closing table, ordered anew, and whether the network is over the budget now, and was not.
    """
    key, recipe = candidate_of(row).key, made.price.recipe
    if files.timed.get(key) == recipe or made.content is None:
        return [*final], False
    files.timed.pop(key, None)
    try:
        found = timed_anew(files.request, final, row, made.measured or made.content)
    except MeasureError as error:
        note(f"{row.label}: {NOT_TIMED}: {error}")
        return [*final], False
    files.timed[key] = recipe
    now = next(each for each in found if each.label == row.label)
    told = f"is made by another recipe than the default, and timed again, alone: {known(now.latency_ms):.3g} ms"
    note(f"{row.label}: its file {told}")
    return found, now.verdict == Verdict.OVER and row.verdict != Verdict.OVER
