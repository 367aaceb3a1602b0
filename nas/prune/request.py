"""What a pruning is asked for, checked before anything long begins."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import JsonValue

from nas.errors import UserError
from nas.export.options import PLAIN, FileOptions
from nas.export.quantize import MAX_DROP, check_max_drop
from nas.job import default_folder_of
from nas.measure.device import check_settings
from nas.measure.runtime import LOWER, RUNTIMES, Settings
from nas.report.page import significant
from nas.units import parse_budget, parse_count, parse_share

if TYPE_CHECKING:
    from pruning.units import Kind
else:
    Kind = str  # torch is not imported for it

Metric = Literal["macs", "params", "latency"]


@dataclass(frozen=True)
class Budget:
    """What a pruned network may cost."""

    metric: Metric
    amount: float
    """In MACs, parameters or ms; where it is relative, a share of the network's own, above 0 and at most 1."""
    relative: bool
    text: str
    """As it was asked for."""

    def target(self, own: float) -> float:
        """The budget in the metric's unit, for a network whose own figure is `own`.

        Raises:
            UserError: the network is within the budget already.
        """
        if not self.relative and self.amount > own:
            raise UserError(
                f"--{self.option} {self.text} is above the network's own {show(self.metric, own)}: lower it"
            )
        return self.amount * own if self.relative else self.amount

    @property
    def option(self) -> str:
        """The command line's option, without its dashes."""
        return "latency-budget" if self.metric == "latency" else self.metric


@dataclass(frozen=True)
class PruneRequest:
    """A pruning as asked for."""

    model: str
    """A published name, a file, a run's folder, or timm/NAME."""
    budget: Budget
    settings: Settings
    """What latencies are measured with."""
    folder: Path
    """Where it is written to."""
    reallocate: bool = True
    """Widen what matters with what is saved elsewhere."""
    kinds: tuple[Kind, ...] = ("ffn", "qk", "v", "heads", "embed", "blocks")
    """What may change: keys of `pruning.units.KNOB_KINDS`."""
    criterion: str = ""
    """A key of `pruning.importance.CRITERIA`; "" becomes taylor, or features for images without labels."""
    multiple_of: int = 8
    """Widths stay multiples of this."""
    rounds: int = 3
    """Rounds of scoring and cutting, 1 or more."""
    compensate: bool = True
    """Refit what each cut leaves to what the network wrote before it (see `pruning.compensation`)."""
    finetune: float = 1.0
    """Epochs of fine-tuning afterwards; 0 for none."""
    distill: bool | None = None
    """Fine-tune with the unpruned network as teacher. None: unless it is first trained here."""
    control: bool = True
    """Fine-tune the unpruned network alike, to compare with."""
    data: str | None = None
    """Images to train and judge on (see `nas.data.dataset.open_data`); None for scikit-learn's digits."""
    unlabelled: str | None = None
    """A folder of images without labels, in place of `data`: the unpruned network's answers are their labels."""
    weights: str | None = None
    """"timm" or a file; None for the folder's own, or timm's."""
    num_classes: int | None = None
    """Classes that the data must have; with `unlabelled`, that the weights tell apart."""
    seed: int = 0
    """Of splits, samples and training."""
    max_drop: float = MAX_DROP
    """Points of top-1 that a lower precision may cost the pruned network on held-out images."""
    file: FileOptions = PLAIN
    """How model.onnx is written; unless it takes any batch, it has that of `settings`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        if not self.criterion:
            object.__setattr__(self, "criterion", "features" if self.unlabelled else "taylor")
        if self.unlabelled and self.distill is None:
            object.__setattr__(self, "distill", True)

    def identity(self) -> dict[str, JsonValue]:
        """What must be equal for a run to go on, as JSON holds it."""
        found: dict[str, JsonValue] = asdict(self) | {"kinds": list(self.kinds), "data": self.data or None}
        del found["folder"], found["control"], found["max_drop"], found["file"]
        found["onnx"] = self.file.identity()
        found |= {"distill": bool(self.distill), "no_distill": self.distill is False}  # an older vitnas kept the first
        return found

    def check(self) -> None:
        """Refuse what no network could satisfy.

        Raises:
            UserError: it could not be satisfied, or the settings cannot be measured here.
        """
        from pruning.importance import CRITERIA
        from pruning.units import KNOB_KINDS

        if not self.kinds or not set(self.kinds) <= set(KNOB_KINDS):
            raise UserError(f"--axes {','.join(self.kinds)!r}: choose from {','.join(KNOB_KINDS)}")
        if self.criterion not in CRITERIA:
            raise UserError(f"unknown --criterion {self.criterion!r}: choose from {', '.join(CRITERIA)}")
        if self.unlabelled == "":
            raise UserError("--unlabelled is empty: give a folder of images")
        if self.unlabelled and self.data:
            raise UserError("give --data, or --unlabelled: images with labels, or without")
        if self.unlabelled and not self.distill:
            raise UserError("--unlabelled with --no-distill: only the unpruned network can teach")
        if self.budget.relative and self.budget.amount == 1 and not self.reallocate:
            raise UserError(f"--{self.budget.option} 1x with --no-reallocate leaves nothing to do: lower the budget")
        for name, value, least in (("rounds", self.rounds, 1), ("multiple-of", self.multiple_of, 1)):
            if value < least:
                raise UserError(f"--{name} is {value}: give {least} or more")
        if not 0 <= self.finetune < 1e4:
            raise UserError(f"--finetune is {self.finetune:g}: give a number of epochs, 0 for none")
        check_max_drop(self.max_drop, self.settings.precision in LOWER and not self.unlabelled)
        check_settings(self.settings)
        beside = RUNTIMES[self.settings.runtime].artifact == "onnx" and not self.unlabelled
        self.file.check((self.settings.precision,) if beside else ())


def parse_pruning_budget(macs: str | None = None, params: str | None = None, latency: str | None = None) -> Budget:
    """The one budget given, as text: a share ("0.6x"), or a number ("150M", "2ms"); without any, 0.5x of the MACs.

    Raises:
        UserError: more than one, or one that cannot be read.
    """
    texts: dict[Metric, str | None] = {"macs": macs, "params": params, "latency": latency}
    given = [(metric, text) for metric, text in texts.items() if text is not None]
    if len(given) > 1:
        raise UserError("give one budget: --macs, --params or --latency-budget")
    metric, text = given[0] if given else ("macs", "0.5x")
    share = parse_share(text)
    if share is None and re.fullmatch(r"\s*(0?\.\d+|1(\.0*)?)\s*", text):
        raise UserError(
            f"--{'latency-budget' if metric == 'latency' else metric} {text}: did you mean {text.strip()}x of the "
            f"network's own{f', or {text.strip()}ms' if metric == 'latency' else ''}?"
        )
    if share is not None:
        return Budget(metric, share, True, text)
    return Budget(metric, parse_budget(text) if metric == "latency" else parse_count(text), False, text)


def kinds_of(axes: str) -> tuple[Kind, ...]:
    """Checked `--axes`, in the order of `pruning.units.KNOB_KINDS`."""
    from pruning.units import KNOB_KINDS

    names = [name.strip() for name in axes.split(",") if name.strip()]
    unknown = [name for name in names if name not in KNOB_KINDS]
    if unknown or not names:
        raise UserError(f"--axes {axes!r}: choose from {','.join(KNOB_KINDS)}")
    return tuple(kind for kind in KNOB_KINDS if kind in names)


def default_folder(model: str, budget: Budget) -> Path:
    """runs/prune-<model>-<budget>."""
    return default_folder_of("prune", model, f"{budget.option.split('-')[0]}-{budget.text.strip()}")


def show(metric: str, amount: float) -> str:
    """An amount with its unit."""
    if metric == "latency":
        return f"{significant(amount)} ms"
    unit = {"macs": "MMACs", "params": "M parameters"}[metric]
    return f"{significant(amount / 1e6)} {unit}"
