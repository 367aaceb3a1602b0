"""What an evaluation found: the records that JSON, page and table are made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nas.evaluate.metrics import Bin
from nas.evaluate.pairs import Pair

Interval = tuple[float, float]


@dataclass(frozen=True)
class ClassResult:
    """One class of the images. top1: percent of its `images` that were recognised; top1_ci: the 95% interval."""

    name: str
    images: int
    correct: int
    top1: float
    top1_ci: Interval


@dataclass(frozen=True)
class ConfusionCell:
    """So many images of the class `truth` were taken for `predicted`; recognised where both are the same."""

    truth: str
    predicted: str
    images: int


@dataclass(frozen=True)
class Mistake:
    """An image that was taken for another class. confidence, truth_confidence: the probabilities, 0 to 1, of what it
    was taken for and of its own class."""

    image: str
    truth: str
    predicted: str
    confidence: float
    truth_confidence: float
    index: int
    """Of the image, among those judged."""


@dataclass(frozen=True)
class Speed:
    """As `vitnas bench` measures it, all networks in one interleaved run; without reading and preparing images."""

    latency_ms: float
    """Median, of one inference."""
    ci: Interval
    """Its 95% interval, in ms."""
    throughput: float
    """Images per second at `batch_size`."""
    batch_size: int
    threads: int
    waiting: bool
    """Whether these are times that it waited for a CPU."""


@dataclass(frozen=True)
class ModelResult:
    """One network on one runtime."""

    label: str
    """Its name in `pairs`; unlike any other."""
    model: str
    """As the user named it."""
    file: str | None
    """What was judged; None: published weights."""
    runtime: str
    precision: str
    preprocess: str
    """How images were prepared, in words."""
    given: str | None
    """What --preprocess said; None: as the network itself says."""
    resolution: int
    """Of its input, in px."""
    classes: int
    """That it tells apart; top-1 is the first of all of them."""
    matched: str
    """How the images' classes were found among them; "" where by name."""
    top1: float
    """Percent."""
    top1_ci: Interval
    top5: float | None
    """Percent; None of five classes or fewer."""
    top5_ci: Interval | None
    images: int
    ece: float
    """Expected calibration error, in percent: `nas.evaluate.metrics.calibration_error`."""
    calibration: list[Bin]
    per_class: list[ClassResult]
    confusion: list[ConfusionCell]
    """The cells that are not 0, the largest mistakes first."""
    mistakes: list[Mistake]
    """All, the most confident first."""
    speed: Speed | None
    """None: not measured."""

    @property
    def confused(self) -> list[ConfusionCell]:
        """The mistakes of `confusion`."""
        return [cell for cell in self.confusion if cell.truth != cell.predicted]


@dataclass(frozen=True)
class EvaluateResult:
    """What an evaluation found."""

    data: str
    part: str
    """Which of its images were judged, in words; "" where all of them."""
    images: int
    """That were judged."""
    classes: list[str]
    """Of the images."""
    skipped: list[str]
    """Images that could not be decoded, by name."""
    results: list[ModelResult]
    pairs: list[Pair]
    """Each two networks, on the same images."""
    notes: list[str]
    cpu: str | None
    """That latency was measured on; None: it was not."""
    started: str
    """ISO 8601, as `finished`."""
    finished: str
    interrupted: bool = False
    """Whether Ctrl-C ended it while latency was measured."""

    def to_json(self) -> dict[str, Any]:
        """All fields by their names."""
        return asdict(self)
