"""One pass over images for several networks: each is decoded once, and prepared once for all that are fed alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nas.data.batches import skipped_line
from nas.data.decoding import decode_or_name
from nas.errors import UserError
from nas.evaluate.classes import Matched
from nas.evaluate.images import JudgedImages
from nas.evaluate.metrics import Answers
from nas.evaluate.networks import Judged
from nas.units import counted

if TYPE_CHECKING:
    from nas.data.decoding import Source

BATCH = 32
"""Images that are decoded at a time."""


@dataclass(frozen=True)
class Pass:
    """What came of one pass over the images."""

    kept: list[int]
    """Indices of those that were judged."""
    answers: dict[str, Answers]
    """By network, to these."""
    small: Mapping[str, int]
    """By network, how many of them were smaller than its crop."""
    skipped: list[str]
    """Names of those that cannot be decoded."""


def judge(
    networks: Mapping[str, Judged],
    matched: Mapping[str, Matched],
    images: JudgedImages,
    threads: int,
    progress: Callable[[int], None],
) -> Pass:
    """One pass over the images, for all networks.

    Raises:
        UserError: no image can be decoded, or a network's outputs are NaN or infinite.
    """
    kept, skipped, small = list[int](), list[str](), Counter[str]()
    feeds = {each.feeds: each for each in networks.values()}
    parts: dict[str, list[Answers]] = {label: [] for label in networks}
    with ThreadPoolExecutor(threads) as pool:
        for batch in _batches(range(len(images.images))):
            read = list(pool.map(lambda index: _prepared(images.images.sources[index], feeds), batch))
            whole = [(index, each) for index, each in zip(batch, read, strict=True) if isinstance(each, _Prepared)]
            skipped += [each for each in read if isinstance(each, str)]
            if whole:
                kept += [index for index, _ in whole]
                truth = np.array([images.images.labels[index] for index, _ in whole])
                fed = {feed: np.stack([each.pixels[feed] for _, each in whole]) for feed in feeds}
                for label, network in networks.items():
                    small[label] += sum(each.side < network.classifier.preprocess.size for _, each in whole)
                    logits = _answered(network, fed[network.feeds])
                    parts[label].append(Answers.of(logits, np.array(matched[label].outputs)[truth]))
            progress(batch.stop)
    answers = {label: Answers.joined(each) for label, each in parts.items() if each}
    found = Pass(kept, answers, small, skipped)
    if not kept:
        raise UserError(f"none of {counted(len(images.images), 'image')} can be used: {skipped_line([found])}")
    return found


@dataclass(frozen=True)
class _Prepared:
    """An image's pixels by what they are made for, and its shorter side in px."""

    pixels: dict[tuple[object, ...], np.ndarray]
    side: int


def _prepared(source: Source, feeds: Mapping[tuple[object, ...], Judged]) -> _Prepared | str:
    """Or its name, where it cannot be decoded."""
    image = decode_or_name(source)
    if isinstance(image, str):
        return image
    return _Prepared({feed: each.classifier.pixels(image) for feed, each in feeds.items()}, min(image.size))


def _answered(network: Judged, pixels: np.ndarray) -> np.ndarray:
    try:
        return network.classifier.logits(pixels)
    except UserError as error:
        named = str(error).startswith((network.name, str(network.file)))
        raise UserError(str(error) if named else f"{network.name}: {error}") from None


def _batches(indices: range) -> Iterator[range]:
    for start in range(0, len(indices), BATCH):
        yield indices[start : start + BATCH]
