"""What lower precisions cost in accuracy: files judged on held-out images, beside the float32 file they are made of."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, get_args

import numpy as np

from nas.errors import UserError
from nas.evaluate.classes import match
from nas.evaluate.onnx_file import OnnxFile, Runtime
from nas.evaluate.pairs import compare
from nas.export.agreement import beyond_half, beyond_half_line
from nas.export.artifact import CONVERTED, lower_precision, write_trained
from nas.export.card import Card, Preprocess
from nas.export.graph import finish
from nas.export.onnx import label_onnx
from nas.export.options import PLAIN, FileOptions
from nas.export.pictures import to_bytes
from nas.export.quantize import (
    INSTALL,
    LISTED,
    MAX_DROP,
    Recipe,
    calibration_images,
    check_calibration,
    left_in_float,
    quantize,
)
from nas.files import scratch
from nas.job import Say
from nas.machine import default_threads
from nas.measure.device import is_here
from nas.measure.runtime import RUNTIMES
from nas.text import first_line
from nas.units import counted, listed

if TYPE_CHECKING:
    from PIL.Image import Image

    from nas.data.dataset import ImageData
    from nas.data.decoding import Source
    from nas.data.images import Images
    from nas.measure.runtime import Settings
    from nas.networks.timm_network import TimmNetwork
    from search_spaces import Arch

HELD_OUT = 2000
"""Images that files are judged on, at most."""
MORE = 64
"""Images that the recipes after the first are calibrated on."""
RECIPES = (
    Recipe(),
    Recipe(ranges="percentile", images=MORE),
    Recipe(ranges="entropy", images=MORE),
    Recipe("nncf", images=MORE),
    Recipe("nncf", smooth=True, images=MORE),
    Recipe("nncf", "mse", images=MORE),
    Recipe(ranges="percentile", kept=("first", "last", "attention"), images=MORE),
)
"""In the order in which they are tried: what costs least, in time to make it and to run it, first."""
NOT_TIMED = "the latency that is told is of a file of the default recipe, whose operators are others"
COARSE = 1.0
"""Points of top-1 that are always worth telling apart."""
BATCH = 32
"""Images that are decoded at a time."""


class Answers(Protocol):
    """What answers: `OnnxFile` or `nas.evaluate.networks.TorchClassifier`."""

    def pixels(self, image: Image) -> np.ndarray:
        """One image as it is fed, without the batch."""

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """(N, classes) of N of `pixels`."""


@dataclass(frozen=True)
class HeldOut:
    """Images that a network was not trained on, and that calibrate nothing."""

    images: Images
    """Their sources and labels; files prepare pixels as they say themselves."""
    outputs: Sequence[int] | None = None
    """Which output of the network each label is; None: that of its number."""

    @classmethod
    def of(cls, images: Images, classes: Sequence[str], path: Path, name: str) -> HeldOut:
        """At most `HELD_OUT` of the images, picked at random, for a network whose classes are found by their names.

        Args:
            classes: of the images, by label.
            path: the network's file.
            name: how messages call it.

        Raises:
            UserError: it does not know their classes, or cannot be judged.
        """
        from nas.data.images import sample

        file = OnnxFile.open(path)
        matched = match(classes, file.classes, file.num_classes, name)
        return cls(sample(images, HELD_OUT, 0), matched.outputs)

    def some(self, file: Answers) -> np.ndarray:
        """Pixels (N, ...) of at most `BATCH` of the images, of all classes alike; one of them can be decoded."""
        sources = self.images.sources
        found = (_pixels(file, sources[i]) for i in range(0, len(sources), max(1, len(sources) // BATCH)))
        return np.stack([*itertools.islice((each for each in found if each is not None), BATCH)])

    def right(
        self, path: Path, runtime: str = "onnxruntime", threads: int | None = None, bf16: bool = False
    ) -> np.ndarray:
        """(N,) bool: which images a file gets right on a runtime. Those that cannot be decoded are left out.

        bf16: see `OnnxFile.open`.

        Raises:
            UserError: a file that cannot be judged, or no image that can be decoded.
        """
        return self.answered(OnnxFile.open(path, runtime, threads=threads, bf16=bf16), threads)

    def answered(self, file: Answers, threads: int | None = None) -> np.ndarray:
        """As `right`, of what is open already."""
        sources = self.images.sources
        labels = np.asarray(self.images.labels)
        truth = labels if self.outputs is None else np.asarray(self.outputs)[labels]
        found = []
        with ThreadPoolExecutor(threads or default_threads()) as pool:
            for batch in _batches(len(sources)):
                pixels = list(pool.map(lambda i: _pixels(file, sources[i]), batch))
                usable = [i for i, each in zip(batch, pixels, strict=True) if each is not None]
                if usable:
                    logits = file.logits(np.stack([each for each in pixels if each is not None]))
                    found.append(logits.argmax(1) == truth[usable])
        if not found:
            raise UserError(f"none of {counted(len(sources), 'held-out image')} can be decoded")
        right: np.ndarray = np.concatenate(found)
        return right


@dataclass(frozen=True)
class Price:
    """What a lower precision costs a network."""

    recipe: Recipe | None
    """By which it is int8; None in other precisions."""
    runtime: str
    """That both were judged on, on this machine's CPU."""
    images: int
    """Held out, the same for both."""
    float_top1: float
    """In float32, in percent."""
    top1: float
    """In the lower precision, in percent."""
    drop: float
    """Points of top-1 that it costs; below 0 where it gains."""
    drop_ci: tuple[float, float]
    """95% interval of the drop (Newcombe 1998, method 10, for paired answers)."""
    max_drop: float
    """Points that it may cost."""
    tried: int = 1
    """Recipes, this one included. Of several this one is the best on these images, and may cost a little more on
    others."""
    left_in_float: tuple[str, ...] = ()
    """Of int8: see `nas.export.quantize.left_in_float`."""
    notes: tuple[str, ...] = ()
    """What was not tried, and why."""
    precision: str = "int8"
    """One of LOWER."""
    lost: int = 0
    """Images that float32 alone gets right, of `images`."""
    gained: int = 0
    """Images that the lower precision alone gets right."""
    broken: str = ""
    """Why it cannot be deployed, whatever it costs here; "" where it can."""

    @classmethod
    def of(
        cls, right: np.ndarray, full: np.ndarray, runtime: str, max_drop: float, precision: str, recipe: Recipe | None
    ) -> Price:
        """right, full: (N,) bool, of each held-out image, in the lower precision and in float32."""
        (pair,) = compare({precision: right, "fp32": full})
        return cls(
            recipe=recipe,
            runtime=runtime,
            images=len(full),
            float_top1=100 * float(full.mean()),
            top1=100 * float(right.mean()),
            drop=pair.difference,
            drop_ci=pair.difference_ci,
            max_drop=max_drop,
            precision=precision,
            lost=pair.only_second,
            gained=pair.only_first,
        )

    @property
    def within(self) -> bool:
        """Whether it costs no more than it may, and can be deployed."""
        return self.drop <= self.max_drop and not self.broken

    @property
    def judged_on(self) -> str:
        """The runtime in words. On a CPU it computes files of float16 in float32: what their weights lose is judged,
        and what their sums do is not."""
        halved = self.precision == "fp16" and self.runtime in get_args(Runtime)
        return f"{self.runtime}, computed in float32 here" if halved else self.runtime

    def __str__(self) -> str:
        (low, high), verb = self.drop_ci, "gains" if self.drop <= -0.05 else "costs"
        made = f"; {self.recipe}" if self.recipe else ""
        return (
            f"{self.precision} {verb} {abs(self.drop):.1f} points of top-1 (95% of the drop: {low:.1f} to {high:.1f}): "
            f"{self.top1:.1f}% beside {self.float_top1:.1f}%, {counted(self.images, 'image')}, {self.judged_on}{made}"
            + (f", the best of {self.tried} recipes" if self.tried > 1 else "")
        )

    @property
    def as_timed(self) -> bool:
        """Whether its operators are those of the default recipe, which is what searches and prunings time."""
        return self.recipe is None or (self.recipe.tool == "onnxruntime" and not self.recipe.kept)

    @property
    def refusal(self) -> str:
        """Why it is infeasible."""
        return f"{self}: {self.broken or f'more than --max-drop {self.max_drop:g} allows'}"

    @property
    def lines(self) -> list[str]:
        """All that there is to know of it."""
        told = str(self) if self.within else f"infeasible: {self.refusal}"
        (low, high), lines = self.drop_ci, list[str]()
        if self.recipe:
            lines.append(f"left in float: {listed(self.left_in_float, LISTED) or 'nothing'}")
        if self.lost or self.gained:
            lines.append(f"only fp32 is right on {self.lost:,} of the images, only {self.precision} on {self.gained:,}")
        if self.tried > 1:
            lines.append("the recipe was chosen on these images: on others it may cost a little more")
        if (high - low) / 2 > max(self.max_drop, COARSE):
            lines.append(f"{counted(self.images, 'held-out image')} are too few to tell a drop of {self.max_drop:g}")
        return [told, *lines, *self.notes]


def quantize_within(
    path: Path,
    calibration: np.ndarray,
    held_out: HeldOut,
    runtime: str = "onnxruntime",
    max_drop: float = MAX_DROP,
    threads: int | None = None,
    recipes: Sequence[Recipe] | None = None,
    say: Say = lambda _: None,
) -> Price:
    """Turn a trained float32 ONNX file into int8, in place, by the first recipe that costs no more than `max_drop`
    points of top-1 on held-out images, or else by the one that costs least.

    Args:
        path: its metadata say how images become its input.
        calibration: inputs (N, ...) of the file's kind and shape, made of images none of which is held out.
        runtime: onnxruntime or openvino.
        threads: CPU threads; None: the physical cores that this process may use.
        recipes: in the order in which they are tried; None: `RECIPES`.
        say: called with a line before another recipe is tried.

    Raises:
        UserError: too few images to calibrate on, a file or images that cannot be judged, or no recipe that works for
            this network. The file is as it was then.
    """
    check_calibration(len(calibration))
    full = held_out.right(path, runtime, threads)
    found: list[tuple[Price, Path]] = []
    notes: list[str] = []
    with scratch(path.parent) as folder:
        for number, recipe in enumerate(recipes or RECIPES):
            if not recipe.installed:
                notes.append(f"not tried, since nncf is not installed ({INSTALL}): {recipe}")
                continue
            if found:
                say(f"int8 by {found[-1][0].recipe} costs {found[-1][0].drop:.1f} points; trying {recipe}")
            draft = folder / f"{number}.onnx"
            shutil.copyfile(path, draft)
            try:
                quantize(draft, calibration, recipe)
                right = held_out.right(draft, runtime, threads)
            except MemoryError:
                raise
            except Exception as error:  # each tool has its own kinds
                notes.append(f"{recipe} fails on this network: {first_line(error)}")
                continue
            used = replace(recipe, images=min(recipe.images, len(calibration)))
            found.append((_quantised(Price.of(right, full, runtime, max_drop, "int8", used), draft), draft))
            if found[-1][0].within:
                break
        if not found:
            raise UserError(f"this network cannot be quantised: {'; '.join(notes)}")
        best, draft = min(found, key=lambda each: each[0].drop)
        draft.replace(path)
    return replace(best, tried=len(found), notes=tuple(notes))


def lower_within(
    path: Path,
    settings: Settings,
    held_out: HeldOut,
    max_drop: float = MAX_DROP,
    calibration: np.ndarray | None = None,
    say: Say = lambda _: None,
    keep_io: bool = False,
) -> Price:
    """Turn a trained float32 ONNX file into what a runtime loads for a lower precision, in place, and judge it, see
    `quantize_within`. In bf16 the file stays: it is judged as the runtime computes it.

    Args:
        settings: precision (one of LOWER), runtime and threads that the file is for.
        calibration: of int8.
        keep_io: of fp16, whether input and output stay float32.

    Raises:
        UserError: as `quantize_within`; a runtime without bf16 here.
    """
    runtime, threads, precision = judging(settings.runtime), judging_threads(settings), settings.precision
    if precision == "int8":
        assert calibration is not None
        return quantize_within(path, calibration, held_out, runtime, max_drop, threads, say=say)
    full = held_out.right(path, runtime, threads)
    lower_precision(path, settings, keep_io=keep_io)
    right = held_out.right(path, runtime, threads, precision == "bf16")
    price = Price.of(right, full, runtime, max_drop, precision, None)
    if precision == "fp16":
        file = OnnxFile.open(path, threads=threads)
        beyond = beyond_half(path, held_out.some(file).astype(file.kind), file.batch_size)
        price = replace(price, broken=beyond_half_line(beyond))
    return price


def write_lower(
    network: Arch | TimmNetwork,
    weights: Path,
    path: Path,
    data: ImageData,
    images: Images,
    settings: Settings,
    max_drop: float = MAX_DROP,
    part: str = "",
    file: FileOptions = PLAIN,
) -> Price:
    """Judge a trained network in the precision of the settings; where that has an ONNX file of its own, write it, with
    its accuracy on its card.

    Args:
        weights: a file of PyTorch or safetensors.
        data: what it was trained on, at its resolution, with its `Pixels`; `data.calibration` calibrates int8.
        images: of the same classes, held out.
        settings: precision (one of LOWER), runtime, threads and batch size that it is for.
        part: what the card calls `images`; "": those for validation.
        file: what the file takes and gives, in batches of the settings' size unless it is any. The input and output of
            fp16 are float16 where nothing is chosen; it is judged before it is given others, which round nothing more.

    Raises:
        UserError: weights that do not fit, or as `lower_within`.
        RuntimeError, ValueError: the network cannot be exported.
    """
    from nas.data.images import sample

    held_out = HeldOut(sample(images, HELD_OUT, 0))
    if RUNTIMES[settings.runtime].artifact == "module":
        full = in_torch(network, weights, data, held_out.images, settings, "fp32")
        right = in_torch(network, weights, data, held_out.images, settings)
        return Price.of(right, full, settings.runtime, max_drop, settings.precision, None)
    options, calibration = file.of_batch(settings.batch_size), None
    first = options.unfinished
    if settings.precision == "int8":
        calibration, first = calibration_images(data, network.resolution, MORE)[0], options
        if options.in_graph:
            calibration = to_bytes(calibration, data.pixels)
    write_trained(network, weights, path, first, Card.of(data))
    price = lower_within(path, settings, held_out, max_drop, calibration, keep_io=not options.plain)
    if settings.precision in CONVERTED:
        if first != options:
            finish(path, options, data.pixels)
        label_onnx(path, network, True, Card.of(data, price.top1, price.images, part).of_file(options))
    else:
        path.unlink()
    return price


def deployed_right(
    network: Arch | TimmNetwork,
    weights: Path,
    path: Path,
    data: ImageData,
    images: Images,
    settings: Settings,
    recipe: Recipe | None,
) -> np.ndarray:
    """(N,) bool: which of all of `images` a trained network gets right as it is deployed, see `write_lower`.

    Args:
        path: where its file may be written.
        recipe: as `write_measured` takes it.
    """
    if RUNTIMES[settings.runtime].artifact == "module":
        return in_torch(network, weights, data, images, settings)
    write_measured(network, weights, path, data, settings, recipe)
    runtime, threads = judging(settings.runtime), judging_threads(settings)
    return HeldOut(images).right(path, runtime, threads, settings.precision == "bf16")


def write_measured(
    network: Arch | TimmNetwork, weights: Path, path: Path, data: ImageData, settings: Settings, recipe: Recipe | None
) -> None:
    """Write a trained network's file in the precision of the settings as latency is measured of it: with a static
    batch, normalised pixels in and logits out.

    recipe: of int8, as `write_lower` has chosen it.
    """
    write_trained(network, weights, path, FileOptions(settings.batch_size), Card.of(data))
    if recipe:
        quantize(path, calibration_images(data, network.resolution, MORE)[0], recipe)
    else:
        lower_precision(path, settings)


def in_torch(
    network: Arch | TimmNetwork,
    weights: Path,
    data: ImageData,
    images: Images,
    settings: Settings,
    precision: str | None = None,
) -> np.ndarray:
    """(N,) bool: which images a trained network gets right in PyTorch, on the CPU, with weights and arithmetic of a
    precision, fp32, fp16 or bf16; None: that of the settings."""
    from nas.evaluate.networks import TorchClassifier
    from nas.networks.build import for_inference
    from nas.networks.weights import load

    model, kind = for_inference(load(network, weights)), precision or settings.precision
    how = Preprocess.of(data.val.transform, data.pixels)
    threads = judging_threads(settings) or default_threads()
    classifier = TorchClassifier.of(model, network, how, None, threads, kind)
    return HeldOut(images).answered(classifier, threads)


def quantize_file(
    path: Path, data: ImageData, name: str, max_drop: float = MAX_DROP, say: Say = lambda _: None
) -> Price:
    """Turn a float32 ONNX file of any input into int8, in place, judged on ONNX Runtime, see `quantize_within`.

    Args:
        path: with trained weights; its metadata say how images become its input.
        data: of classes that it knows; `data.calibration` calibrates, `data.val` is held out.
        name: how messages call the network.

    Raises:
        UserError: it does not know the classes, or as `quantize_within`.
    """
    from nas.data.images import sample

    held_out, file = HeldOut.of(data.val, data.classes, path, name), OnnxFile.open(path)
    pixels = [_pixels(file, source) for source in sample(data.calibration, MORE, 0).sources]
    usable = [each for each in pixels if each is not None]
    if not usable:
        raise UserError(f"none of {counted(len(pixels), 'image')} to calibrate int8 on can be decoded")
    return quantize_within(path, np.stack(usable), held_out, max_drop=max_drop, say=say)


def _quantised(price: Price, path: Path) -> Price:
    import onnx

    return replace(price, left_in_float=left_in_float(onnx.load(path)))


def judging(runtime: str) -> str:
    """The runtime that files for `runtime` are judged on: its own, or ONNX Runtime where that runs on no CPU."""
    return runtime if runtime in get_args(Runtime) else "onnxruntime"


def judging_threads(settings: Settings) -> int | None:
    """CPU threads that files for these settings are judged with here; None: as many as it has, for another machine."""
    return settings.threads if is_here(settings.device) else None


def _pixels(file: Answers, source: Source) -> np.ndarray | None:
    from nas.data.decoding import decode_or_name

    image = decode_or_name(source)
    return None if isinstance(image, str) else file.pixels(image)


def _batches(total: int) -> Iterator[range]:
    for start in range(0, total, BATCH):
        yield range(start, min(start + BATCH, total))
