"""What a bench found: the rows that JSON, CSV, plot and table are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nas.measure.runtime import Settings

SETTINGS = ("runtime", "device", "precision", "batch_size", "threads")
"""The fields of a row that are its measuring settings."""


@dataclass(frozen=True)
class Combination:
    """A network under one combination of settings."""

    model: str
    """As the user named it."""
    resolution: int | str | None
    """Of its images, in px; "HxW" where they are not square, None where its input is no image."""
    runtime: str
    device: str
    precision: str
    batch_size: int
    threads: int

    def to_json(self) -> dict[str, Any]:
        """The fields by their names."""
        return asdict(self)


@dataclass(frozen=True)
class BenchRow(Combination):
    """What was measured of it."""

    latency_ms: float
    """Median of all samples."""
    p95_ms: float
    ci: tuple[float, float]
    """95% interval of the median latency, in ms."""
    samples: int
    """Timed inferences."""
    ratio: float | None
    """Latency over that of the first row: the median over rounds. None where either holds waiting times."""
    ratio_ci: tuple[float, float] | None
    """95% interval of the ratio."""
    waiting: bool
    """Whether its samples are times that it waited for a CPU (see `nas.measure.samples.quanta`)."""
    throughput: float | None
    """Images per second at `throughput_batch`; None where that batch could not be measured, or waited for a CPU."""
    throughput_batch: int
    top1: float | None = None
    """Percent of validation images that the file gets right on its runtime, or on ONNX Runtime's CPU where it is for
    another one than that and OpenVINO; of several batch sizes, that of the first. None where they were not judged, as
    are trained networks in int8, fp16 and bf16, and in fp32 beside these."""
    drop: float | None = None
    """Points of top-1 that its precision costs."""
    drop_ci: tuple[float, float] | None = None
    """95% interval of the drop, paired on the same images."""
    within: bool | None = None
    """Whether its precision costs no more than it may; None where that was not judged."""
    memory_mb: float | None = None
    """Peak resident memory of its process above that of the runtime alone, in 10^6 bytes, as the next one; None where
    it cannot be read."""
    file_mb: float | None = None
    """Size of its ONNX file; None of a network that PyTorch builds."""
    energy_mj: float | None = None
    """Of an image, in millijoules, idle power included; None where it cannot be read."""


@dataclass(frozen=True)
class BenchFailure(Combination):
    """Why it could not be measured."""

    error: str


@dataclass(frozen=True)
class BenchResult:
    """What a bench found."""

    rows: list[BenchRow]
    failed: list[BenchFailure]
    errors: list[str]
    """A line for each of `failed`."""
    notes: list[str]
    interrupted: bool = False
    """Whether Ctrl-C ended it before its last round."""

    def to_json(self) -> dict[str, Any]:
        """`results`, `failed` and `notes`."""
        return {
            "results": [row.to_json() for row in self.rows],
            "failed": [failure.to_json() for failure in self.failed],
            "notes": self.notes,
        }


def is_tie(row: BenchRow, first: BenchRow) -> bool:
    """Whether a row cannot be told from the first one."""
    return row is not first and row.ratio_ci is not None and row.ratio_ci[0] <= 1 <= row.ratio_ci[1]


def varying(rows: Sequence[Combination | Settings], names: Iterable[str] = SETTINGS) -> list[str]:
    """Which of these fields are not the same in all rows."""
    return [name for name in names if len({getattr(row, name) for row in rows}) > 1]
