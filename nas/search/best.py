"""best/: the network that a search has found, with its weights, where there are any, and its ONNX files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nas.data.lineage import record
from nas.export.artifact import CONVERTED, lower_precision
from nas.export.card import HELD_OUT, LABELS, PREPROCESS, Card, Latency, Preprocess
from nas.export.folder import save_onnx
from nas.export.graph import finish
from nas.export.onnx import label_onnx, write_onnx
from nas.export.options import FileOptions
from nas.files import drafted, replace_file
from nas.measure.runtime import LOWER, RUNTIMES
from nas.networks.weights import load
from nas.quality.kept import Kept, path_of, read
from nas.quality.parent import parent_weights
from nas.search.final import FullTraining, result_path, weights_of
from nas.search.lower import LowerFiles
from nas.search.rows import Network, candidate_of, known

if TYPE_CHECKING:
    import numpy as np

    from nas.data.images import Images
    from nas.evaluate.precision import Price
    from nas.measure.runtime import Settings
    from nas.networks.timm_network import TimmNetwork
    from nas.quality.candidate import Candidate
    from nas.quality.tier import TrainedTier
    from nas.search.log import SearchLog
    from nas.search.request import SearchRequest
    from search_spaces import Arch


@dataclass(frozen=True)
class Weights:
    """The fullest training of a network that there is."""

    path: Path
    images: Images
    """What it was trained on."""
    kept: Kept | None
    """Set where it is the search's own training, not a full one."""
    price: Price | None = None
    """What the precision costs that the network is shipped in, where that is a lower one."""
    file: str = "model.onnx"
    """What is shipped."""


@dataclass(frozen=True)
class BestFolder:
    """Writes best/."""

    request: SearchRequest
    log: SearchLog
    tier: TrainedTier | None
    """The tier of the search, if it trains."""
    step: Callable[[str], AbstractContextManager[None]]
    """Runs a block as a step of the search's end; one that fails is told, and the next goes on."""
    lower: LowerFiles | None = None
    """Of a search that trains, and measures in lower precisions."""

    @property
    def folder(self) -> Path:
        return self.request.folder / "best"

    def clear(self) -> None:
        """Remove it, but for a network that an earlier run of the search has trained."""
        if not (self.folder / "model.safetensors").is_file():
            shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, row: Network) -> Weights | None:
        """Write arch.json and the weights, of the final training or else of the search's own, where there are any; then
        model.onnx, and beside it the file that was measured, where that has another precision.

        Returns:
            The weights; None where model.onnx has random ones.
        """
        request, candidate, settings = self.request, candidate_of(row), self._settings(row)
        weights = self._weights(candidate)
        path = weights.path if weights else None
        with self.step("best/"):
            start_best(candidate.network, self.folder, path)
            if weights and request.plan:
                record(self.folder, weights.images, parent_weights(request.plan.parent))
        converted = settings.precision in CONVERTED and RUNTIMES[settings.runtime].artifact == "onnx"
        with self.step("best/model.onnx"):
            card = self._card(candidate, weights)
            in_fp32 = weights is None or settings.precision not in LOWER  # as its accuracy is
            if not converted and in_fp32:
                card = card.model_copy(update={"latency": self._latency(row)})
            save_best(candidate.network, self.folder, path, self._options(row), card, self._images(candidate))
        if weights and self.lower and settings.precision in LOWER:
            file = f"model.{settings.precision}.onnx" if converted else "model.onnx"
            return replace(weights, price=self._write_lower(row, candidate, self.lower, file), file=file)
        if converted:
            self._write_converted(row, candidate)
        return weights

    def _settings(self, row: Network) -> Settings:
        """That it was measured with."""
        settings = self.request.settings
        return replace(settings, precision=row.precision or settings.precision)

    def _write_lower(self, row: Network, candidate: Candidate, files: LowerFiles, file: str) -> Price | None:
        """Write the file of a lower precision, where it has its own, unless it costs more than it may. It tells a
        latency where that is its own."""
        path, precision = self.folder / file, self._settings(row).precision
        with self.step(f"best/{file}"):
            made = files.of(candidate, precision)
            if made and made.price.within and made.content is not None:
                with drafted(path) as draft:
                    draft.write_bytes(made.content)
                    if made.price.as_timed or files.timed.get(candidate.key) == made.price.recipe:
                        card = Card.read(draft).model_copy(update={"latency": self._latency(row)})
                        label_onnx(draft, candidate.network, True, card.of_file(self._options(row)))
            return made.price if made else None
        return None

    def _options(self, row: Network) -> FileOptions:
        """Of its ONNX files."""
        return self.request.file.of_batch(self._settings(row).batch_size)

    def _write_converted(self, row: Network, candidate: Candidate) -> None:
        """Write the file of an untrained network that was measured: its latency is known where nothing was chosen of
        it."""
        settings, options, path = self._settings(row), self._options(row), self.folder / "model.onnx"
        lower = self.folder / f"model.{settings.precision}.onnx"
        if path.is_file():
            with self.step(f"best/{lower.name}"), drafted(lower) as draft:
                card = self._card(candidate, None).model_copy(update={"latency": self._latency(row)})
                if options.plain:
                    shutil.copyfile(path, draft)
                else:
                    write_onnx(candidate.network, draft, options.unfinished)
                lower_precision(draft, settings, self.log.calibration, keep_io=not options.plain)
                finish(draft, options, card.pixels)
                label_onnx(draft, candidate.network, False, card.of_file(options))

    def _weights(self, candidate: Candidate) -> Weights | None:
        if self.tier is None:
            return None
        full, trainer = weights_of(self.request, candidate), self.tier.trainer
        if full:
            return Weights(full, trainer.data.train, None)
        short = path_of(trainer.kept, candidate.key)
        kept = read(short)
        return Weights(short, trainer.taught(candidate.network.resolution), kept) if kept else None

    def _card(self, candidate: Candidate, weights: Weights | None) -> Card:
        """What best/ says of its network; its accuracy is that of its own weights: the first seed's, or those that the
        search kept."""
        if self.tier is None:
            return Card.untrained(candidate.network.resolution)
        data = self.tier.data(candidate)
        if weights is None:
            return Card(preprocess=Preprocess.of(data.val.transform, data.pixels))
        if weights.kept:
            return Card.of(data, weights.kept.top1, weights.kept.judged, HELD_OUT)
        result = result_path(self.request, candidate, seed=0)  # Ctrl-C while it is judged leaves weights alone
        found = FullTraining.read(result) if result.is_file() else None
        return Card.of(data, found.top1, found.images) if found else Card.of(data)

    def _latency(self, row: Network) -> Latency | None:
        """The network's: of the closing run, or of its trial where there was none; None where it has no interval."""
        if row.latency_ci is None:
            return None
        settings = self._settings(row)
        return Latency(
            ms=known(row.latency_ms),
            ci=row.latency_ci,
            cpu=self.log.hardware.get("cpu"),
            device=settings.device,
            runtime=settings.runtime,
            precision=settings.precision,
            threads=settings.threads,
            batch_size=settings.batch_size,
        )

    def _images(self, candidate: Candidate) -> np.ndarray | None:
        """Some validation images of a search that trains."""
        from nas.data.dataset import some_of

        return some_of(self.tier.data(candidate).val) if self.tier else None


def start_best(network: Arch | TimmNetwork, folder: Path, weights: Path | None) -> None:
    """Write arch.json and the weights where they are trained; no file of other weights stays beside them."""
    folder.mkdir(exist_ok=True)
    kept, document = folder / "arch.json", network.to_json()
    same = weights is not None and kept.is_file() and kept.read_text() == document
    for earlier in (*folder.glob("model.*"), folder / PREPROCESS, folder / LABELS):
        if not (same and earlier.name == "model.safetensors"):
            earlier.unlink(missing_ok=True)
    replace_file(kept, document)
    if weights is not None:
        replace_file(folder / "model.safetensors", weights.read_bytes())


def save_best(
    network: Arch | TimmNetwork,
    folder: Path,
    weights: Path | None,
    options: FileOptions,
    card: Card,
    images: np.ndarray | None = None,
) -> None:
    """Write model.onnx and its card; trained, it is checked against PyTorch, on `images` (see `save_onnx`)."""
    if weights is not None:
        save_onnx(load(network, weights), folder, options, trained=True, card=card, images=images)
        return
    card = card.of_file(options)
    card.write(folder)
    with drafted(folder / "model.onnx") as draft:
        write_onnx(network, draft, options, card.pixels)
        label_onnx(draft, network, trained=False, card=card)
