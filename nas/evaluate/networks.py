"""Whatever can be named, as something that answers images: ONNX files on their runtime, weights in PyTorch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from nas.data.lineage import TIMM as TIMM_WEIGHTS
from nas.errors import UserError
from nas.evaluate.onnx_file import WEIGHTS, OnnxFile, find_onnx
from nas.evaluate.preprocess import crop, normalise, parse_preprocess
from nas.evaluate.request import ONNX_RUNTIMES, TORCH, TRY, EvaluateRequest
from nas.export.card import Card, Preprocess, described, pixels_of
from nas.export.onnx_input import OnnxInput
from nas.measure.runtime import no_bf16
from nas.networks.hub import HUB
from nas.networks.pretrained import find_pretrained
from nas.networks.targets import Target, find_target, published
from nas.networks.timm_network import TimmNetwork
from nas.networks.weights import load, load_as_trained

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import nn

    from nas.networks.timm_network import TimmModel
    from search_spaces import Arch
    from search_spaces.network import Network

GUESSES = (
    "imagenet",
    "imagenet,interpolation=bilinear",
    "imagenet,crop=1.0",
    "inception",
    "inception,interpolation=bilinear",
    "clip",
    "none",
    "raw",
)
"""How most published networks prepare images: what --preprocess try compares."""


class Classifier(Protocol):
    """What answers images."""

    @property
    def runtime(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def preprocess(self) -> Preprocess: ...
    @property
    def classes(self) -> Sequence[str] | None:
        """Names in the order of the outputs; None: not known."""

    @property
    def num_classes(self) -> int: ...
    @property
    def notes(self) -> Sequence[str]: ...
    def pixels(self, image: Image) -> np.ndarray:
        """One RGB image as it is fed, without the batch."""

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """(N, classes) float32 of N of `pixels`."""


@dataclass(frozen=True)
class TorchClassifier:
    """A network of ours or of timm's in PyTorch on the CPU."""

    model: nn.Module
    network: Arch | TimmNetwork
    preprocess: Preprocess
    classes: tuple[str, ...] | None
    threads: int
    """Of the CPU."""
    notes: tuple[str, ...] = ()
    runtime: str = TORCH
    precision: str = "fp32"
    """Of the model's weights and arithmetic: fp32, fp16 or bf16."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        network: Arch | TimmNetwork,
        preprocess: Preprocess,
        classes: tuple[str, ...] | None,
        threads: int,
        precision: str,
    ) -> Self:
        """The model is cast to the precision, in place."""
        model = model.eval().to(_dtype(precision))
        return cls(model, network, preprocess, classes, threads, precision=precision)

    @property
    def num_classes(self) -> int:
        return self.network.num_classes

    def pixels(self, image: Image) -> np.ndarray:
        """(3, R, R) float32."""
        return np.ascontiguousarray(normalise(crop(image, self.preprocess), self.preprocess).transpose(2, 0, 1))

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """(N, classes) float32.

        Raises:
            UserError: they are NaN or infinite.
        """
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                images = torch.from_numpy(pixels).to(_dtype(self.precision))
                found: np.ndarray = self.model(images).float().numpy()
        finally:
            torch.set_num_threads(before)
        if not np.isfinite(found).all():
            raise UserError("its outputs are NaN or infinite: train it again")
        return found


def _dtype(precision: str) -> torch.dtype:
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


@dataclass(frozen=True)
class Judged:
    """A network as it was named, opened."""

    name: str
    """As the user wrote it."""
    classifier: Classifier
    weights: str | Path | None
    """Where its weights lie, as `nas.data.lineage` takes them: "timm", a file, or None for random ones."""
    file: Path | None
    """What was opened; None: weights that are published under its name."""
    own_classes: bool
    """Whether it says its classes itself."""
    given: str | None = None
    """What --preprocess said."""

    @property
    def as_run(self) -> tuple[str, str, str]:
        """Its name, runtime and precision: networks for which it is equal differ in how images are prepared."""
        return self.name, self.classifier.runtime, self.classifier.precision

    @property
    def feeds(self) -> tuple[object, ...]:
        """What its pixels depend on: networks for which it is equal are fed the same."""
        found = self.classifier
        if isinstance(found, OnnxFile):
            return found.preprocess, found.kind, found.channels_last
        return found.preprocess, "float32", False


def open_networks(request: EvaluateRequest, threads: int) -> tuple[list[Judged], list[str]]:
    """Open each network of a request, which has been checked, on each runtime and in each precision.

    Returns:
        The networks, and a line on the ways to prepare images that a file does not take.

    Raises:
        UserError: one cannot be opened, or --labels or --preprocess is of no use to any.
    """
    found, notes = list[Judged](), list[str]()
    for name in _distinct(request.models):
        for runtime in dict.fromkeys(request.runtimes) or [_usual_runtime(name)]:
            for precision in dict.fromkeys(request.precisions) or ["fp32"]:
                if runtime == TORCH:
                    found.append(_in_torch(name, request, threads, precision))
                    continue
                opened, refused = _on_a_runtime(name, runtime, request, threads, precision == "bf16")
                known = {(each.as_run, each.given) for each in found}  # of int8 and fp16 in whatever precision
                found += [each for each in opened if (each.as_run, each.given) not in known]
                notes += [refused] if refused and refused not in notes else []
    if request.labels is not None and all(each.own_classes for each in found):
        raise UserError("--labels is for networks that do not say their classes, and all of these do: leave it out")
    if request.preprocess is not None and not any(isinstance(each.classifier, OnnxFile) for each in found):
        raise UserError("--preprocess is for ONNX files, and none is named: leave it out")
    return found, notes


def _distinct(names: Sequence[str]) -> list[str]:
    """The names without those of a file or folder that has been named before, otherwise written."""
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(os.path.abspath(name) if os.path.exists(name) else name, name)
    return list(found.values())


def needs_torch(request: EvaluateRequest) -> bool:
    """Whether a network is judged in PyTorch."""
    return any(TORCH in (request.runtimes or [_usual_runtime(name)]) for name in request.models)


def _usual_runtime(name: str) -> str:
    path = Path(name)
    if path.suffix.lower() == ".onnx":
        return ONNX_RUNTIMES[0]
    holds = any((path / part).is_file() for part in ("model.onnx", "best/model.onnx"))
    return ONNX_RUNTIMES[0] if os.path.isdir(name) and holds else TORCH


def _on_a_runtime(
    name: str, runtime: str, request: EvaluateRequest, threads: int, bf16: bool
) -> tuple[list[Judged], str]:
    """An ONNX file, prepared as it says, as --preprocess does, or in each of the usual ways; and a line on those of
    these that it does not take."""
    path = Path(name)
    if path.suffix.lower() != ".onnx" and not path.is_dir() and not name.startswith(HUB):
        raise UserError(
            f"{name} is no ONNX file: leave --runtime {runtime} out to judge it in PyTorch, or write its file first "
            f"with `vitnas export {name} --out DIR`"
        )
    file = find_onnx(name)
    if bf16:
        about = OnnxInput.read(file)
        bf16 = not (about.quantised or about.half)

    def opened(given: str | None) -> Judged:
        how = parse_preprocess(given) if given is not None else None
        classifier = OnnxFile.open(name, runtime, how, threads=threads, bf16=bf16)
        own = classifier.classes is not None
        if not own and request.labels is not None:
            classifier = OnnxFile.open(name, runtime, how, request.labels, threads, bf16)
        return Judged(name, classifier, file, file, own, given)

    if not request.tries or request.preprocess is None:
        return [opened(request.preprocess)], ""
    more = request.preprocess.removeprefix(TRY)
    found, refused = list[Judged](), dict[str, UserError]()
    for guess in (None, *(each + more for each in GUESSES)):
        try:
            found.append(opened(guess))
        except UserError as error:  # of its own there may be none, and bytes are fed in one way only
            if guess is not None:
                refused[guess] = error
    if not found:
        raise next(reversed(refused.values()))
    why = f"Not tried: {', '.join(refused)}: {next(iter(refused.values()))}" if refused else ""
    return found, why


def _in_torch(name: str, request: EvaluateRequest, threads: int, precision: str) -> Judged:
    """A network of ours or of timm's with its weights."""
    weights_from = Path(request.weights_from) if request.weights_from is not None else None
    model, weights = _loaded(name, weights_from)
    network = model.arch
    if model.untrained:
        raise UserError(f"{name}: its weights have no classifier of {network.num_classes} classes: train one first")
    card = Card.timm(network) if weights is None else _card_of(network, weights)
    known = card.classes or request.labels
    if known is not None and len(known) != network.num_classes:
        raise UserError(f"{name} has {network.num_classes:,} classes, and {len(known):,} names of them are given")
    assert card.preprocess is not None
    if precision == "bf16" and (lacking := no_bf16()):
        raise UserError(lacking)
    classifier = TorchClassifier.of(
        model, network, card.preprocess, tuple(known) if known else None, threads, precision
    )
    return Judged(name, classifier, weights or TIMM_WEIGHTS, weights, card.classes is not None)


def _card_of(network: Arch | TimmNetwork, weights: Path) -> Card:
    own = weights.name == "model.safetensors" and described(weights.parent)
    card = Card.read(weights.parent) if own else Card()
    return card.model_copy(update={"preprocess": Preprocess.own(network.resolution, pixels_of(network, weights))})


def _loaded(name: str, weights_from: Path | None) -> tuple[Network | TimmModel, Path | None]:
    """The network, and the file of its weights; None: the published ones of its name."""
    path, at, size = name.rpartition("@")
    file, resolution = (Path(path), int(size)) if at and size.isdecimal() else (Path(name), None)
    if file.suffix.lower() in WEIGHTS:
        if not file.is_file():
            raise UserError(f"{file}: no such file")
        return _from_weights(name, file, resolution), file
    target = find_target(name)
    if target.onnx:
        raise UserError(f"{name} is an ONNX file, which PyTorch does not run: leave --runtime torch out")
    if target.folder is not None:
        return load(target), target.weights
    return load(target, find_pretrained(target.require(), weights_from).path, name), None


def _from_weights(name: str, file: Path, resolution: int | None) -> Network | TimmModel:
    """The network that a file of weights is of, as the arch.json beside it or its own name says, with as many classes
    as the weights have."""
    target = _network_of(file)
    target = target.at(resolution) if resolution else target
    network = target.require()

    def loaded(network: Arch | TimmNetwork) -> Network | TimmModel:
        if isinstance(network, TimmNetwork) or resolution or target.folder:
            return load(network, file, name)
        return load_as_trained(network, file, network.resolution, what=name)

    model = loaded(network)
    theirs = model.loaded.classes if model.loaded else None
    return loaded(network.replace(num_classes=theirs)) if theirs else model


def _network_of(file: Path) -> Target:
    beside = file.parent / "arch.json"
    if beside.is_file():
        return find_target(str(beside))
    with suppress(UserError):
        return Target(file.stem, arch=published(file.stem))
    with suppress(UserError):
        return Target(file.stem, timm=TimmNetwork(file.stem))
    raise UserError(
        f"{file} does not say which network it is of: put its arch.json beside it, or call it by its network, as "
        "levit_128s.safetensors"
    )
