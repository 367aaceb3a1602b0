"""An ONNX file as it is deployed: open on the runtime that runs it, with its own account of pixels and classes.

PyTorch is not imported, and onnx only for OpenVINO, where a file cannot be opened, or its precision is asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags

from nas.data.decoding import to_rgb
from nas.errors import UserError
from nas.evaluate.preprocess import PRESETS, WAYS, GivenPreprocess, crop, normalise
from nas.evaluate.session import Output, Pixels, in_words, open_session
from nas.export.card import IN_GRAPH, PREFIX, PROBABILITIES, Card, Preprocess
from nas.export.onnx_input import CHANNELS, OnnxInput, written
from nas.identity import file_digest
from nas.machine import default_threads
from nas.measure.runtime import LOWER
from nas.measure.runtimes.pytorch import DTYPES, fixed_images
from nas.networks.hub import HUB, fetch_onnx
from nas.networks.targets import find_target
from nas.networks.timm_network import LARGEST
from nas.units import counted, listed, shown

if TYPE_CHECKING:
    from PIL.Image import Image

    from nas.evaluate.preprocess import Layout
    from nas.export.options import FilePrecision

Runtime = Literal["onnxruntime", "openvino"]
WEIGHTS = (".safetensors", ".pth", ".pt", ".bin")
"""Suffixes of files that no runtime here opens."""
PIXEL_KINDS = ("float32", "float16", "uint8")
MOST_VALUES = 2**30
"""Pixel values that one inference takes, at most: 4 GiB in float32."""
LOGITS = (*DTYPES, "int32")
"""Types of outputs that may be logits; int32 of networks in whole numbers throughout."""
SHAPES = ("shape", "dimension", "broadcast")
"""One of these is in what a runtime says where a file does not bear a batch."""
SUM_TOLERANCE = 1e-3
"""How far the sum of a row of probabilities may be from 1; float16's are 1e-3 off."""


@dataclass(frozen=True)
class OnnxFile:
    """A classifier in an ONNX file, ready to run. `open` makes it."""

    path: Path
    runtime: Runtime
    preprocess: Preprocess
    """How an image becomes its input; of a file that normalises inside, what it does there."""
    classes: tuple[str, ...] | None
    """Names in the order of the logits; None: not known."""
    num_classes: int
    batch_size: int | None
    """Images that one inference takes; None: any number."""
    in_graph: bool
    """Whether it takes uint8 pixels, and normalises inside."""
    channels_last: bool
    """Whether it takes (N, R, R, 3)."""
    probabilities: bool
    """Whether its output is the softmax of its logits."""
    notes: tuple[str, ...]
    """What was taken for granted, a line each."""
    kind: str
    """Of its input: one of PIXEL_KINDS."""
    bf16: bool
    """Whether what is not int8 is computed in bf16."""
    run: Callable[[Pixels], Pixels]
    """One inference of `batch_size` inputs, of any number where that is None."""

    @classmethod
    def open(
        cls,
        path: str | Path,
        runtime: str = "onnxruntime",
        preprocess: Preprocess | GivenPreprocess | None = None,
        classes: Sequence[str] | None = None,
        threads: int | None = None,
        bf16: bool = False,
    ) -> OnnxFile:
        """Open a file, or the model.onnx of a folder, of a run's best/, or of hf-hub:REPO.

        Args:
            runtime: onnxruntime or openvino, both on the CPU.
            preprocess: how an image becomes its input; None: as its metadata say, or the preprocess.json beside the
                model.onnx of a folder.
            classes: names in the order of the logits; None: those of its metadata.
            threads: CPU threads; None: the physical cores that this process may use.
            bf16: compute in bf16 what is not int8, which OpenVINO does on CPUs that have it.

        Raises:
            UserError: no such file, a damaged one, or none that classifies images; a runtime that is not installed, or
                has no bf16 here; nothing says how an image becomes its input; another number of classes than names.
        """
        found = find_onnx(path)
        session = open_session(found, runtime, default_threads() if threads is None else threads, bf16)
        in_graph = _flag(session.metadata, IN_GRAPH, found)
        card = Card.of_metadata(session.metadata, found)
        if card.preprocess is None and Path(path).is_dir():
            card = Card.read(found.parent)
        pixels = _image_input(found, session.inputs)
        how, channels_last = _preprocess(found, pixels, card.preprocess, preprocess, in_graph)
        index, count = _logits_output(found, session.outputs)

        def run(batch: Pixels) -> Pixels:
            try:
                return session.run(batch, index)
            except MemoryError:
                raise
            except Exception as error:  # each runtime has its own kinds
                why, many = in_words(error), len(batch) > 1 and pixels.batch_size is None
                inside = many and any(word in why.lower() for word in SHAPES)
                hint = "; it may be made for batch 1 inside: export it with a batch of 1" * inside
                raise UserError(f"{found} fails on {runtime}: {why}{hint}") from error

        probabilities, notes = _flag(session.metadata, PROBABILITIES, found), list[str]()
        if count is None or f"{PREFIX}preprocess" not in session.metadata:
            answer = _flat(found, run(_noise(how.size, pixels, channels_last)))
            count = answer.shape[1]
            if not probabilities and _are_probabilities(answer):
                probabilities = True
                notes.append(f"{found}: its outputs are from 0 to 1 and add up to 1: taken as probabilities")
        if count == 1:
            raise UserError(f"{found} has one output: a classifier has one for each class, two or more")
        if preprocess is not None and card.preprocess is not None:
            notes.append(f"{found}: pixels as --preprocess says, not as the file's own metadata do")
        lower = [name for each in LOWER if (found.parent / (name := f"model.{each}.onnx")).is_file()]
        if lower and Path(path).is_dir():
            notes.append(f"{found} is used, not {listed(lower)} beside it, made for the device: name that to use it")
        if session.metadata.get(f"{PREFIX}weights") == "untrained":
            notes.append(f"{found}: its weights are random, and so are its answers")
        names = _names(found, count, classes, card.classes)
        if twice := [shown(name) or "''" for name, many in Counter(names).items() if many > 1]:
            notes.append(f"{found}: several outputs are called {listed(twice)}: their index tells them apart")
        return cls(
            path=found,
            runtime=cast(Runtime, runtime),
            preprocess=how,
            classes=names,
            num_classes=count,
            batch_size=pixels.batch_size,
            in_graph=in_graph,
            channels_last=channels_last,
            probabilities=probabilities,
            notes=tuple(notes),
            kind=pixels.kind,
            bf16=bf16,
            run=run,
        )

    @cached_property
    def precision(self) -> FilePrecision | Literal["bf16"]:
        """int8 where it is quantised, else bf16 where that is computed in, fp16 where it has weights of float16."""
        found = OnnxInput.read(self.path).precision
        return "bf16" if self.bf16 and found != "int8" else found

    @cached_property
    def sha256(self) -> str:
        """Of the file, 64 hexadecimal digits; weights that lie in another file are not in it."""
        return file_digest(self.path, 64)

    def pixels(self, image: Image) -> Pixels:
        """One image as the file takes it, without the batch: (3, R, R), or (R, R, 3) where channels are last.

        image: as `nas.data.decoding.decode` gives it, or opened by Pillow, in any mode. Float pixels are float32, to
        the bit as evaluation with torchvision makes them.

        Raises:
            RibbonError: the image is more than 100 times as long as wide.
        """
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        values = crop(to_rgb(image.copy() if turned else image), self.preprocess)
        pixels = values if self.kind == "uint8" else normalise(values, self.preprocess)
        return pixels if self.channels_last else np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def logits(self, pixels: Pixels) -> NDArray[np.float32]:
        """(N, classes) of any N of `pixels`; log-probabilities, which are logits too, where the file gives
        probabilities.

        Raises:
            UserError: the runtime fails on them, or what it answers is NaN or infinite.
        """
        found = self._outputs(pixels)
        if self.probabilities:
            return np.log(np.maximum(found, np.finfo(np.float32).tiny))
        return found

    def softmax(self, pixels: Pixels) -> NDArray[np.float32]:
        """Probabilities (N, classes) of any N of `pixels`.

        Raises:
            UserError: as `logits`.
        """
        found = self._outputs(pixels)
        return found if self.probabilities else softmax(found)

    def _outputs(self, pixels: Pixels) -> NDArray[np.float32]:
        inputs = pixels.astype(self.kind, copy=False)
        size = self.batch_size or max(1, len(inputs))
        answers = [np.empty((0, self.num_classes), np.float32)]
        for start in range(0, len(inputs), size):
            batch = inputs[start : start + size]
            lacking = size - len(batch) if self.batch_size else 0
            whole = np.concatenate([batch, np.repeat(batch[-1:], lacking, 0)]) if lacking else batch
            answer = _flat(self.path, self.run(whole))
            if answer.shape != (len(whole), self.num_classes):
                raise UserError(
                    f"{self.path} answers {written(answer.shape)} for {counted(len(whole), 'image')}, not "
                    f"{len(whole)}x{self.num_classes}: it does not take the batch that it states; export it again"
                )
            answers.append(answer[: len(batch)].astype(np.float32))
        found = np.concatenate(answers)
        if self.probabilities and ((found < -SUM_TOLERANCE) | (found > 1 + SUM_TOLERANCE)).any():
            raise UserError(
                f"{self.path}: its outputs should be probabilities, and are not from 0 to 1: export it again"
            )
        broken = int((~np.isfinite(found)).any(1).sum())
        if broken:
            why = ": float16 ends at 65,504, export it in fp32" if self.kind == "float16" else ": export it again"
            raise UserError(
                f"{self.path}: its outputs are NaN or infinite for {broken} of {counted(len(found), 'image')}{why}"
            )
        return found


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of each row."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    found: NDArray[np.float32] = powers / powers.sum(1, keepdims=True)
    return found


def find_onnx(path: str | Path) -> Path:
    """A file, or the model.onnx of a folder, of a run's best/, or of hf-hub:REPO, which is downloaded.

    Raises:
        UserError: there is none.
    """
    if not str(path):
        raise UserError("the network has an empty name: give an .onnx file, or the folder of a run or a network")
    found = Path(path)
    if str(path).startswith(HUB) and not found.exists():
        return fetch_onnx(str(path).removeprefix(HUB))
    if not found.is_dir():
        if not found.exists():
            named = f"; {_remedy(path)}" if found.suffix != ".onnx" else ""
            raise UserError(f"{path}: no such file or folder{named}")
        if not found.is_file():
            raise UserError(f"{path} is a pipe or a device, which cannot be read twice: save it as an .onnx file")
        if found.suffix in WEIGHTS:
            raise UserError(f"{path} holds weights, not a network: give an .onnx file, which `vitnas export` writes")
        return found
    for candidate in (found / "model.onnx", found / "best" / "model.onnx"):
        if candidate.is_file():
            return candidate
    raise UserError(f"{path} holds no model.onnx and no best/model.onnx: {_remedy(path)}")


def _remedy(path: str | Path) -> str:
    """What to do where a name is that of no ONNX file."""
    with suppress(UserError):
        find_target(str(path))
        return f"`vitnas export {path} --out DIR` writes that of the network"
    return "give an .onnx file, or the folder of a run or a network"


def _image_input(path: Path, inputs: Sequence[OnnxInput]) -> OnnxInput:
    """The only input of a file.

    Raises:
        UserError: it has several, or other than a batch of square images of three colours.
    """
    if len(inputs) != 1:
        which = f" ({_listed(inputs)})" if inputs else ""
        raise UserError(f"{path} has {counted(len(inputs), 'input')}{which}: only one of images is fed")
    (found,) = inputs
    if found.kind not in PIXEL_KINDS:
        raise UserError(
            f"{path} takes {found.kind} pixels: only {', '.join(PIXEL_KINDS)} are fed, convert or export it so"
        )
    if found.sizes is not None and len(found.sizes) == 3:
        raise UserError(
            f"{path} has no batch dimension, its input {found.name} is {found}: export it with images of 1x{found}"
        )
    if found.places is None:
        raise UserError(f"{path} takes no images: its input {found.name} is {found}")
    if found.sizes is not None and 0 in found.sizes:
        raise UserError(
            f"{path} takes no images: its input {found.name} is {found}: export it with dynamic sizes, not with 0"
        )
    return found


def _preprocess(
    path: Path, pixels: OnnxInput, own: Preprocess | None, given: Preprocess | GivenPreprocess | None, in_graph: bool
) -> tuple[Preprocess, bool]:
    """How an image becomes a file's input, and whether its channels are last.

    Raises:
        UserError: nothing says it, or the file takes other images.
    """
    if given is None and own is None:
        raise UserError(
            f"{path} does not say how an image becomes its input {pixels.name} ({pixels.kind} {pixels}): say it with "
            f"--preprocess: {WAYS}"
        )
    if given is not None and in_graph:
        raise UserError(f"{path} normalises inside, as its metadata say: leave --preprocess out")
    layout = "NHWC" if in_graph else (given and given.layout) or (own and own.layout) or "NCHW"
    side, channels_last = _square(path, pixels, layout)
    if isinstance(given, GivenPreprocess) and given.layout not in (None, "NHWC" if channels_last else "NCHW"):
        raise UserError(f"{path} takes {pixels}, --preprocess says layout={given.layout}: leave the layout out")
    how = given.at(side, str(path)) if isinstance(given, GivenPreprocess) else given or own
    assert how is not None
    if side not in (None, how.size):
        raise UserError(f"{path} takes images of {side} px, but is said to take {how.size} px: the two must agree")
    if pixels.kind == "uint8" and not in_graph and how.pixels.whole() != PRESETS["raw"].whole():
        raise UserError(f"{path} takes uint8 pixels, so what normalises them is inside: say --preprocess raw")
    if (pixels.batch_size or 1) * how.size**2 * 3 > MOST_VALUES:
        raise UserError(
            f"{path} takes {counted(pixels.batch_size or 1, 'image')} of {how.size} px at once, more than "
            f"{4 * MOST_VALUES >> 30} GiB: export it with a smaller batch"
        )
    return how.model_copy(update={"layout": "NHWC" if channels_last else "NCHW"}), channels_last


def _square(path: Path, pixels: OnnxInput, otherwise: Layout) -> tuple[int | None, bool]:
    """The side of the images in px, None where it is dynamic, and whether channels are last. otherwise: the layout of
    a shape that does not show it.

    Raises:
        UserError: they are not square, not of three colours, or too large.
    """
    sizes = pixels.sizes or (None,) * 4
    first, last = (sizes[i] in CHANNELS for i in (1, 3))
    if first == last:
        last = otherwise == "NHWC"
    height, width, channels = (sizes[i] for i in ((1, 2, 3) if last else (2, 3, 1)))
    if channels not in (None, 3):
        raise UserError(f"{path} takes images of {counted(channels, 'channel')} ({pixels}): only colour ones are fed")
    if height is not None and width is not None and height != width:
        raise UserError(f"{path} takes images of {width} x {height} px: only square ones are fed")
    side = height or width
    if side and side > LARGEST:
        raise UserError(f"{path} takes images of {side:,} px: at most {LARGEST:,} are fed")
    return side, last


def _logits_output(path: Path, outputs: Sequence[Output]) -> tuple[int, int | None]:
    """Which output holds one number for each class, and how many they are, where it says so.

    Raises:
        UserError: none does, or several may.
    """
    able = [
        i for i, each in enumerate(outputs) if each.kind in LOGITS and (each.sizes is None or _count(each.sizes) != 0)
    ]
    if len(able) > 1:
        flat = [i for i in able if len(outputs[i].sizes or ()) == 2]
        able = flat or [i for i in able if outputs[i].sizes is not None]
    if len(able) > 1:
        raise UserError(
            f"{path} is no classifier: one of its outputs must be (images, classes), and only one, but "
            f"{_listed([outputs[i] for i in able])} all are: export it with that of the classes alone"
        )
    if not able:
        raise UserError(
            f"{path} is no classifier: one of its outputs must be (images, classes) of {', '.join(LOGITS)}, it has "
            f"{_listed(outputs) or 'none'}"
        )
    return able[0], _count(outputs[able[0]].sizes)


def _count(sizes: Sequence[int | None] | None) -> int | None:
    """Classes of an output (N, classes) or (N, classes, 1, 1); 0 where it is none, None where it does not say."""
    if sizes is None or (len(sizes) > 1 and None in sizes[1:]):
        return None
    wide = [size for size in sizes[1:] if size != 1]
    return 0 if len(sizes) < 2 or len(wide) > 1 else (wide or [1])[0]


def _flat(path: Path, answer: Pixels) -> Pixels:
    """(N, classes) of an answer that may have more dimensions of 1.

    Raises:
        UserError: it has others.
    """
    if _count(answer.shape) in (0, None):
        raise UserError(
            f"{path} is no classifier: it answers {written(answer.shape) or 'one number'}, not (images, classes)"
        )
    return answer.reshape(len(answer), -1)


def _names(path: Path, count: int, given: Sequence[str] | None, own: Sequence[str] | None) -> tuple[str, ...] | None:
    """Of the classes.

    Raises:
        UserError: other than `count`.
    """
    names = own if given is None else given
    if names is not None and len(names) != count:
        whose = "are in its metadata" if given is None else "are given"
        raise UserError(f"{path} has {count} outputs, {len(names)} names of classes {whose}: the two must agree")
    return None if names is None else tuple(names)


def _noise(size: int, pixels: OnnxInput, channels_last: bool) -> Pixels:
    shape = (size, size, 3) if channels_last else (3, size, size)
    return fixed_images((pixels.batch_size or 1, *shape), pixels.kind)


def _are_probabilities(answer: Pixels) -> bool:
    return bool(((answer >= 0).all()) and (abs(answer.astype(np.float64).sum(1) - 1) < SUM_TOLERANCE).all())


def _flag(metadata: Mapping[str, str], key: str, path: Path) -> bool:
    """What a file's metadata say of `key`; False where they say nothing.

    Raises:
        UserError: neither yes nor no.
    """
    found = metadata.get(f"{PREFIX}{key}", "false")
    if found not in ("true", "false"):
        raise UserError(f"{path} is damaged: its metadata say {PREFIX}{key} is {found!r}; export it again")
    return found == "true"


def _listed(ports: Sequence[OnnxInput] | Sequence[Output]) -> str:
    return ", ".join(f"{each.name} ({each})" for each in ports)
