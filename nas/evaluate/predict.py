"""The classes of images, as a deployed file answers. PyTorch is not imported."""

from __future__ import annotations

import csv
import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import UnidentifiedImageError

from nas.data.decoding import MAX_ASPECT, RibbonError, decode
from nas.data.listing import NO_IMAGES, LeftOut, files_of, images_below
from nas.errors import UserError
from nas.evaluate.onnx_file import OnnxFile
from nas.evaluate.preprocess import GivenPreprocess
from nas.export.card import Preprocess
from nas.files import tell
from nas.machine import default_threads
from nas.text import first_line
from nas.units import counted, listed, shown

_log = logging.getLogger(__name__)
BATCH = 16
"""Images at once, for a file that takes any number."""


@dataclass(frozen=True)
class Encoded:
    """An image's file in memory. name: how messages call it."""

    content: bytes
    name: str

    def read(self) -> bytes:
        return self.content

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class PredictRequest:
    """What is to be classified, and with what."""

    model: str | Path
    """An ONNX file, a folder that holds one (a run's, or a network's), or hf-hub:REPO."""
    images: Sequence[str | Path | Encoded]
    """Files, folders (with those below them), or content."""
    top_k: int = 5
    """Classes told of each image, the most probable first; 1 or more."""
    runtime: str = "onnxruntime"
    """onnxruntime or openvino."""
    threads: int | None = None
    """CPU threads; None: the physical cores that this process may use."""
    preprocess: Preprocess | GivenPreprocess | None = None
    """How an image becomes the file's input; None: as the file says."""
    labels: Sequence[str] | None = None
    """Names of the classes, in the order of the outputs; None: those that the file says."""

    def check(self) -> None:
        """Raises UserError where it asks for nothing, or for images that are not there."""
        if self.top_k < 1:
            raise UserError(f"--top-k is {self.top_k}: give 1 or more")
        if not self.images:
            raise UserError("no images are named: give files, folders or -")
        missing = [str(each) for each in self.images if not isinstance(each, Encoded) and not Path(each).exists()]
        if missing:
            raise UserError(f"{listed(missing)}: no such file or folder")

    def files(self) -> Iterator[str | Path]:
        """What it reads on this machine: the names that the network's file may have, and the images."""
        yield from (self.model, *(Path(self.model, name) for name in ("model.onnx", "best/model.onnx")))
        for each in self.images:
            if not isinstance(each, Encoded):
                yield from images_below(str(each)) if Path(each).is_dir() else (each,)


@dataclass(frozen=True)
class Guess:
    """A class, as one answer for an image. name: None where the file does not say it."""

    index: int
    """Its place among the outputs, from 0."""
    name: str | None
    probability: float
    """From 0 to 1, of all classes together 1."""
    shared: bool = False
    """Whether other outputs have its name, too."""

    @property
    def label(self) -> str:
        """Its name; its number where the name is missing or empty; both where the name is that of several."""
        if not self.name:
            return str(self.index)
        return f"{self.name} ({self.index})" if self.shared else self.name

    def to_json(self) -> dict[str, Any]:
        return {"class": self.name, "index": self.index, "probability": round(self.probability, 6)}


@dataclass(frozen=True)
class Prediction:
    """What an image shows. image: its path, which may hold line breaks and what is no text. guesses: the most probable
    classes, in this order."""

    image: str
    guesses: tuple[Guess, ...]

    def to_json(self) -> dict[str, Any]:
        return {"image": self.image, "classes": [each.to_json() for each in self.guesses]}


@dataclass(frozen=True)
class SkippedImage:
    """An image that cannot be read, and why."""

    image: str
    reason: str

    def __str__(self) -> str:
        return f"{shown(self.image)} is skipped: {self.reason}"


@dataclass(frozen=True)
class PredictResult:
    """What all images show, in the order in which they were named, those of a folder in the order of their paths."""

    file: OnnxFile
    predictions: tuple[Prediction, ...]
    skipped: tuple[SkippedImage, ...]
    notes: tuple[str, ...]
    """What was taken for granted, or is to be known, a line each."""

    def to_json(self) -> dict[str, Any]:
        """`model`, `runtime`, `preprocess`, `predictions`, `skipped` and `notes`."""
        return {
            "model": str(self.file.path),
            "runtime": self.file.runtime,
            "preprocess": self.file.preprocess.model_dump(mode="json"),
            "predictions": [each.to_json() for each in self.predictions],
            "skipped": [asdict(each) for each in self.skipped],
            "notes": list(self.notes),
        }

    def to_csv(self) -> str:
        """A line for each class that is told of each image: `image`, `rank` (from 1), `class`, `index`,
        `probability`."""
        text = StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("image", "rank", "class", "index", "probability"))
        for each in self.predictions:
            for rank, guess in enumerate(each.guesses, 1):
                table.writerow((each.image, rank, guess.name or "", guess.index, f"{guess.probability:.6f}"))
        return text.getvalue()


def predict(
    request: PredictRequest,
    say: Callable[[str], None] = tell,
    show: Callable[[Prediction], None] = lambda prediction: None,
) -> PredictResult:
    """Classify images with an ONNX file. An image that cannot be read is skipped.

    Args:
        say: what tells the user of a skipped image, and of what was taken for granted, a line each.
        show: called with what an image shows as soon as it is known.

    Raises:
        UserError: the request is wrong (`PredictRequest.check`), the file cannot be used (`OnnxFile.open`), or its
            answers are no numbers (`OnnxFile.logits`).
    """
    request.check()
    started, running_s = time.perf_counter(), 0.0
    sources, lines = _sources(request.images)
    file = OnnxFile.open(request.model, request.runtime, request.preprocess, request.labels, request.threads)
    notes, predictions, skipped, enlarged = [*file.notes, *lines], [], [], 0
    names = Counter(file.classes)
    if request.preprocess is not None:
        how = file.preprocess
        notes.append(f"--preprocess: {how.size} px cut from the middle of {how.resize} px, {how.pixels}")
    for note in notes:
        say(note)
    ready = time.perf_counter()
    with warnings.catch_warnings(), ThreadPoolExecutor(request.threads or default_threads()) as pool:
        warnings.simplefilter("ignore")  # Pillow's, of odd metadata
        size = max(BATCH, file.batch_size or 1)
        for start in range(0, len(sources), size):
            read = list(pool.map(partial(_read, file), sources[start : start + size]))
            whole = [each for each in read if isinstance(each, _Read)]
            begun = time.perf_counter()
            answers = iter(file.softmax(np.stack([each.pixels for each in whole])) if whole else ())
            running_s += time.perf_counter() - begun
            for each in read:
                if isinstance(each, SkippedImage):
                    say(str(each))
                    skipped.append(each)
                else:
                    enlarged += each.enlarged
                    predictions.append(Prediction(each.image, _best(file, names, next(answers), request.top_k)))
                    show(predictions[-1])
    reading_s = time.perf_counter() - ready - running_s
    _log.debug("opening %.2f s, images %.2f s, network %.2f s", ready - started, reading_s, running_s)
    if enlarged:
        notes.append(f"{counted(enlarged, 'image')} smaller than {file.preprocess.size} px: enlarged")
        say(notes[-1])
    return PredictResult(file, tuple(predictions), tuple(skipped), tuple(notes))


class _Read(NamedTuple):
    """An image as a file takes it. enlarged: whether it was smaller."""

    image: str
    pixels: NDArray[Any]
    enlarged: bool


def _sources(images: Sequence[str | Path | Encoded]) -> tuple[list[Path | Encoded | SkippedImage], list[str]]:
    """All images, those that cannot be read among them, and a line for each folder that holds other files."""
    found: list[Path | Encoded | SkippedImage] = []
    lines = []
    for each in images:
        if isinstance(each, Encoded):
            found.append(each)
        elif Path(each).is_dir():
            left_out = LeftOut()
            found += images_below(str(each), left_out)
            found += [SkippedImage(name, "a link that leads nowhere, or no file") for name in sorted(left_out.special)]
            others = Counter({suffix: many for suffix, many in left_out.suffixes.items() if suffix not in NO_IMAGES})
            lines += [shown(f"{each}: left out {files_of(others)}")] if others else []
        else:
            found.append(Path(each))
    return found, lines


def _read(file: OnnxFile, source: Path | Encoded | SkippedImage) -> _Read | SkippedImage:
    if isinstance(source, SkippedImage):
        return source
    name = str(source)
    try:
        image = decode(source)
    except MemoryError:  # the machine's fault, not the file's
        raise MemoryError(f"{shown(name)} cannot be decoded") from None
    except RibbonError:
        return SkippedImage(name, f"more than {MAX_ASPECT} times as long as wide")
    except UnidentifiedImageError:
        return SkippedImage(name, "no image that Pillow knows, or a damaged one")
    except Exception as error:  # Pillow's decoders raise a dozen kinds, from OSError to struct.error
        return SkippedImage(name, first_line(error))
    return _Read(name, file.pixels(image), min(image.size) < file.preprocess.size)


def _best(file: OnnxFile, names: Counter[str], probabilities: NDArray[np.float32], count: int) -> tuple[Guess, ...]:
    """names: of the file's classes, and how many have each."""
    found = []
    for i in np.argsort(-probabilities, kind="stable")[:count].tolist():
        name = file.classes[i] if file.classes else None
        found.append(Guess(i, name, float(probabilities[i]), name is not None and names[name] > 1))
    return tuple(found)
