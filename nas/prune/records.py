"""What prune.json holds, and what a report and the terminal tell: records that are read back as they were written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AliasChoices, Field, JsonValue, TypeAdapter

from nas.export.options import FileOptions
from nas.intervals import Interval, agreement, of_difference, of_share
from nas.measure.budget import Verdict
from nas.measure.runtime import Settings
from nas.measure.samples import Measurement, quanta
from nas.prune.request import Metric, PruneRequest
from nas.prune.savings import Saving
from nas.prune.widths import Block, Importance

if TYPE_CHECKING:
    from nas.evaluate.precision import Price
    from nas.training import evaluation

Kept = Literal["pruned", "recovered"]
"""Which weights are kept: those right after pruning, or those after fine-tuning."""
ACCURACIES: dict[Literal["before", "pruned", "recovered", "control"], str] = {
    "before": "before pruning",
    "pruned": "right after pruning",
    "recovered": "pruned, fine-tuned",
    "control": "unpruned, fine-tuned alike",
}


@dataclass(frozen=True)
class Accuracy:
    """How a network did on the images that judge it."""

    top1: float
    """Percent."""
    top1_ci: Annotated[tuple[float, float], Field(validation_alias=AliasChoices("top1_ci", "ci"))]
    """95% interval of top1, percent; earlier versions called it ci in state/."""
    loss: float
    """Mean cross-entropy, nats."""
    images: int
    hits: str = field(default="", repr=False)
    """"1" for each image that is classified right, "0" for the others; empty where an earlier version judged it, and
    in prune.json."""

    @classmethod
    def of(cls, found: evaluation.Accuracy) -> Self:
        """Of a network that has just been judged."""
        return cls(found.top1, found.interval, found.loss, found.total, "".join("01"[hit] for hit in found.hits))

    def to_json(self) -> dict[str, JsonValue]:
        """As prune.json holds it."""
        return {"top1": self.top1, "top1_ci": [*self.top1_ci], "loss": self.loss, "images": self.images}

    def minus(self, other: Accuracy) -> Difference:
        """How this network compares with another one on the same images.

        Where the answers are not known, the interval is that of different images: too wide rather than too narrow.
        """
        answers = ([[digit == "1" for digit in row.hits]] if row.hits else [] for row in (self, other))
        own, others = Interval(*self.top1_ci), Interval(*other.top1_ci)
        found = of_difference(self.top1, own, other.top1, others, agreement(*answers))
        interval = found.clipped(-100.0, 100.0)
        more: Comparison = "more accurate" if self.top1 > other.top1 else "less accurate"
        verdict = "tie" if interval.holds(0) else more
        return Difference(self.top1 - other.top1, (interval.low, interval.high), verdict)


Comparison = Literal["tie", "more accurate", "less accurate"]


@dataclass(frozen=True)
class Difference:
    """How much more accurate one network is than another one."""

    difference: float
    """Points of top-1, negative where it is less accurate."""
    ci: tuple[float, float]
    """95% interval of the difference, image by image."""
    verdict: Comparison


@dataclass(frozen=True)
class Accuracies:
    """Accuracies of the networks of one pruning; None of those that were not made."""

    before: Accuracy
    pruned: Accuracy
    recovered: Accuracy | None = None
    control: Accuracy | None = None

    def of(self, which: str) -> Accuracy | None:
        """That of a key of `ACCURACIES`."""
        found: Accuracy | None = getattr(self, which)
        return found

    def to_json(self) -> dict[str, JsonValue]:
        rows = {which: self.of(which) for which in ACCURACIES}
        return {which: row.to_json() if row else None for which, row in rows.items()}


@dataclass(frozen=True)
class Round:
    """One round of scoring and cutting; targets and what was reached are in the budget's unit."""

    round: int
    """From 1."""
    reached: float
    macs: int
    target: float | None = None
    """None outside the families, as the following ones: there one row tells of all rounds."""
    reallocated: bool | None = None
    params: int | None = None
    refitted: int = 0
    """Layers that were refitted after the cut."""

    def to_json(self) -> dict[str, JsonValue]:
        found: dict[str, JsonValue] = asdict(self)
        return (
            found if self.target is not None else {key: found[key] for key in ("round", "reached", "macs", "refitted")}
        )


@dataclass(frozen=True)
class NetworkRow:
    """Counts of a network, and its latency in the closing run; None where it was not measured."""

    params: int
    macs: int
    latency_ms: float | None = None
    """Median."""
    p95_ms: float | None = None
    ci: tuple[float, float] | None = None
    """95% interval of the median, ms."""
    samples: int | None = None
    """Timed runs."""
    throughput: float | None = None
    """Images a second."""
    waiting: bool | None = None
    """Whether the samples are waits for a CPU (see `quanta`)."""
    arch: dict[str, JsonValue] | None = None
    """Its Arch; None outside the families."""

    @classmethod
    def of(
        cls,
        params: int,
        macs: int,
        latency: Measurement | None,
        settings: Settings,
        arch: dict[str, JsonValue] | None = None,
    ) -> NetworkRow:
        if latency is None:
            return cls(params, macs, arch=arch)
        return cls(
            params,
            macs,
            latency.p50_ms,
            latency.p95_ms,
            latency.ci_ms,
            latency.n,
            latency.throughput(settings.batch_size),
            quanta(latency),
            arch,
        )

    def cost(self, metric: Metric) -> float | None:
        """In the metric's unit: MACs, parameters, ms."""
        return {"macs": self.macs, "params": self.params, "latency": self.latency_ms}[metric]

    def to_json(self) -> dict[str, JsonValue]:
        found: dict[str, JsonValue] = asdict(self)
        return {key: value for key, value in found.items() if key != "arch" or value is not None}


@dataclass(frozen=True)
class BudgetRow:
    """Whether the budget is met; figures are in the metric's unit: MACs, parameters, ms."""

    metric: Metric
    text: str
    """As it was asked for."""
    target: float | None
    """None where it is a share of a latency that was not measured."""
    reached: float | None
    interval: tuple[float, float] | None
    """95% interval of the latency that is judged; None of other budgets."""
    verdict: Verdict | None
    """None where nothing was measured, or only waiting times."""

    @property
    def met(self) -> bool:
        return self.verdict == Verdict.FITS

    def to_json(self) -> dict[str, JsonValue]:
        return {**asdict(self), "met": self.met}


@dataclass(frozen=True)
class PriceRow:
    """What the pruned network does in the precision that was measured, beside its fp32 file, on held-out images."""

    precision: str
    top1: float
    """In the precision, percent, as the next two."""
    top1_ci: tuple[float, float]
    """95% interval."""
    float_top1: float
    drop: float
    """Points of top-1 that it costs."""
    drop_ci: tuple[float, float]
    """95% interval of the drop, image by image."""
    max_drop: float
    """Points that it may cost."""
    images: int
    refusal: str = ""
    """Why it is infeasible; "" where it is not."""
    left_in_float: tuple[str, ...] = ()
    """Of int8, as `nas.export.quantize.left_in_float` tells it."""

    @classmethod
    def of(cls, price: Price) -> Self:
        interval = of_share(price.top1, price.images)
        return cls(
            precision=price.precision,
            top1=price.top1,
            top1_ci=(interval.low, interval.high),
            float_top1=price.float_top1,
            drop=price.drop,
            drop_ci=price.drop_ci,
            max_drop=price.max_drop,
            images=price.images,
            refusal="" if price.within else price.refusal,
            left_in_float=price.left_in_float,
        )


@dataclass(frozen=True)
class ImagesRow:
    """The images of a pruning (see `nas.data.about.Summary`), and how many of them judge and score networks."""

    name: str
    demo: bool
    classes: int
    train: int
    val: int
    evaluated: int
    calibration: int
    class_names: list[str] = field(default_factory=list)
    train_counts: list[int] = field(default_factory=list)
    val_counts: list[int] = field(default_factory=list)
    validation: str = ""
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LayerRow:
    """A layer of a network outside the families. before, after: its widths (in, out), or one width."""

    name: str
    before: tuple[int, ...] | int
    after: tuple[int, ...] | int
    removed: float = 0.0
    """Share of its weights that was cut, 0 to 1."""


@dataclass(frozen=True)
class SeenRow:
    """The file of digests of the images that trained the weights, and their number (see `nas.data.lineage`)."""

    file: str
    images: int


@dataclass(frozen=True)
class Parts:
    """What became of the network's parts. Of the families: blocks, importance and, with a latency budget, costs;
    outside them: layers."""

    family: str
    resolution: int
    blocks: tuple[Block, ...] = ()
    importance: tuple[Importance, ...] = ()
    costs: tuple[Saving, ...] | None = None
    layers: tuple[LayerRow, ...] | None = None

    def to_json(self) -> dict[str, JsonValue]:
        found: dict[str, JsonValue] = asdict(self)
        if self.costs is not None:
            found["costs"] = [saving.to_json() for saving in self.costs]
        del found["layers" if self.layers is None else "costs"]
        return found


@dataclass(frozen=True)
class PruneResult:
    """A pruning's result: prune.json."""

    model: str
    command: str
    started: str
    """ISO 8601, as finished."""
    finished: str
    options: PruneRequest
    settings: Settings
    hardware: Mapping[str, object]
    data: ImagesRow
    weights: str | None
    """Where the weights came from: "timm" or a path; None where there were none."""
    trained_images: int
    """Images that trained a network without weights before it was pruned."""
    tuned_images: int
    budget: BudgetRow
    before: NetworkRow
    after: NetworkRow
    accuracy: Accuracies
    kept: Kept
    rounds: tuple[Round, ...]
    notes: tuple[str, ...]
    phases: dict[str, float]
    """Seconds by phase."""
    parts: Parts
    probe_images: int = 0
    """Images that a linear probe was fitted to, the unpruned network's classifier; 0: it had its own, or none."""
    failures: tuple[str, ...] = ()
    """Steps at the end that failed, a line each."""
    waiting: str | None = None
    """Why the latencies are waiting times; None where they are not."""
    tuning: Difference | None = None
    """Fine-tuned minus pruned."""
    control: Difference | None = None
    """The pruned network minus the unpruned one that was fine-tuned alike."""
    seen: SeenRow | None = None
    price: PriceRow | None = None
    """None in fp32, and where it is not known."""

    @property
    def met(self) -> bool:
        """Whether the network is within the budget, and loses no more in its precision than it may."""
        return self.budget.met and not (self.price and self.price.refusal)

    def to_json(self) -> dict[str, JsonValue]:
        """As prune.json holds it."""
        found: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "parts"}
        for name in ("settings", "data", "tuning", "control", "seen", "price"):
            found[name] = found[name] and asdict(found[name])
        for name in ("before", "after", "budget", "accuracy"):
            found[name] = found[name].to_json()
        found["options"] = self.options.identity()
        found["rounds"] = [row.to_json() for row in self.rounds]
        return found | self.parts.to_json()

    @classmethod
    def from_json(cls, document: Mapping[str, object], folder: Path) -> PruneResult:
        """The result that `to_json` wrote, or an earlier version's.

        Raises:
            ValueError: it is another document.
        """
        options = document.get("options")
        if not isinstance(options, dict):
            raise ValueError("a result of a pruning holds its options")
        file = FileOptions.of_identity(options.get("onnx"))
        known = {**NEWER, **options, "folder": folder, "file": file}
        return _READER.validate_python({**document, "options": known, "parts": document})


NEWER: Mapping[str, bool] = {"compensate": False}
"""What an earlier version did, by the options that it had not."""
_READER = TypeAdapter(PruneResult)
