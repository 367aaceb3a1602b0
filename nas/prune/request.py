"""What a pruning is asked for, checked before anything long begins."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from nas.errors import UserError
from nas.job import default_folder_of
from nas.measure.runtime import Settings
from nas.report.page import significant
from nas.units import parse_budget, parse_count, parse_share

Metric = Literal["macs", "params", "latency"]


@dataclass(frozen=True)
class Budget:
    """What a pruned network may cost: `amount` of the metric (MACs, parameters, ms), or that share of the network's
    own."""

    metric: Metric
    amount: float
    relative: bool
    text: str

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
        return "latency-budget" if self.metric == "latency" else self.metric


@dataclass(frozen=True)
class PruneRequest:
    """A pruning as asked for. kinds, criterion: keys of `pruning.units.KNOB_KINDS` and `pruning.importance.CRITERIA`.
    control: fine-tune the unpruned network alike, to compare with."""

    model: str
    budget: Budget
    settings: Settings
    folder: Path
    reallocate: bool = True
    kinds: tuple[str, ...] = ()
    criterion: str = "taylor"
    multiple_of: int = 8
    rounds: int = 3
    finetune: float = 1.0
    distill: bool = False
    control: bool = True
    data: str | None = None
    weights: str | None = None
    num_classes: int | None = None
    seed: int = 0

    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to go on."""
        found = asdict(self) | {"data": str(self.data) if self.data else None}
        del found["folder"], found["control"]
        return json.loads(json.dumps(found))

    def check(self) -> None:
        """Raises UserError for what no network could satisfy."""
        from pruning.importance import CRITERIA

        if self.criterion not in CRITERIA:
            raise UserError(f"unknown --criterion {self.criterion!r}: choose from {', '.join(CRITERIA)}")
        if self.budget.relative and self.budget.amount == 1 and not self.reallocate:
            raise UserError(f"--{self.budget.option} 1x with --no-reallocate leaves nothing to do: lower the budget")
        for name, value, least in (("rounds", self.rounds, 1), ("multiple-of", self.multiple_of, 1)):
            if value < least:
                raise UserError(f"--{name} is {value}: give {least} or more")
        if not 0 <= self.finetune < 1e4:
            raise UserError(f"--finetune is {self.finetune:g}: give a number of epochs, 0 for none")


def parse_pruning_budget(macs: str | None, params: str | None, latency: str | None) -> Budget:
    """The one budget given; 0.5x of the MACs without any.

    Raises:
        UserError: more than one, or one that cannot be read.
    """
    given: list[tuple[Metric, str]] = [
        (metric, text)
        for metric, text in (("macs", macs), ("params", params), ("latency", latency))
        if text is not None
    ]
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


def kinds_of(axes: str) -> tuple[str, ...]:
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
