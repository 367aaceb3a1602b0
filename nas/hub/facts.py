"""What a repository's page says of the run that made a network: read from the run's files, without names of folders."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, FiniteFloat, ValidationError

from nas.errors import UserError
from nas.export.card import Card, Latency
from nas.measure.device import device_kind

Record = TypeVar("Record", bound=BaseModel)
Span = tuple[FiniteFloat, FiniteFloat]


def public_name(data: str) -> str:
    """Images by a name that says nothing of this machine: those of Hugging Face and torchvision as they are, a folder
    by its last part."""
    if re.match(r"(hfds|torch)/\w", data):
        return data
    name, comma, part = data.rpartition(", ")
    if "/" in part or not comma:  # a comma in the name of a folder
        name, comma, part = data, "", ""
    return name.rstrip("/").rpartition("/")[2] + comma + part


def public(card: Card) -> Card:
    """A card without paths, users and hosts of this machine."""
    accuracy, latency = card.accuracy, card.latency
    if accuracy is not None:
        accuracy = accuracy.model_copy(update={"data": public_name(accuracy.data)})
    if latency is not None:
        latency = latency.model_copy(update={"device": device_kind(latency.device)})
    return card.model_copy(update={"accuracy": accuracy, "latency": latency})


@dataclass(frozen=True)
class RunRow:
    """A network of the run's table."""

    name: str
    top1: float | None = None
    """Percent."""
    top1_ci: Span | None = None
    """95% interval."""
    latency_ms: float | None = None
    """Median."""
    latency_ci: Span | None = None
    """95% interval of the median."""
    top1_precision: str = "fp32"
    """That `top1` is of."""
    latency_precision: str = "fp32"
    """That the latency is of."""


@dataclass(frozen=True)
class RunFacts:
    """What a run's files say."""

    data: str = ""
    """The images, in words; "" where it is not known."""
    rows: tuple[RunRow, ...] = ()
    """What the network was compared with, and itself, in one run; none where nothing was."""
    title: str = ""
    """Of the rows."""
    measure: str = "top-1"
    """What the rows' top1 is, in words."""
    latency: Latency | None = None
    """Of the network itself, where its run measured it and its file does not say so."""

    @classmethod
    def of(cls, folder: Path) -> RunFacts:
        """What lies in a network's folder, or in that of its search.

        Raises:
            UserError: a file that is not what vitnas wrote.
        """
        if (pruned := _read(folder / "prune.json", _Pruned)) is not None:
            return pruned.facts()
        if (trained := _read(folder / "metrics.json", _Trained)) is not None:
            return cls(data=trained.data.words)
        if folder.name == "best" and (searched := _read(folder.parent / "result.json", _Searched)) is not None:
            return searched.facts()
        return cls()


class _Data(BaseModel):
    name: str
    train: int | None = None
    val: int | None = None

    @property
    def words(self) -> str:
        counts = [
            f"{count:,} {what}" for count, what in ((self.train, "for training"), (self.val, "for validation")) if count
        ]
        return public_name(self.name) + f" ({', '.join(counts)})" * bool(counts)


class _Trained(BaseModel):
    data: _Data


class _Machine(BaseModel):
    cpu: str | None = None


class _Settings(BaseModel):
    device: str
    runtime: str
    precision: str
    threads: int
    batch_size: int


class _Measured(BaseModel):
    latency_ms: FiniteFloat | None = None
    ci: Span | None = None
    waiting: bool | None = None


class _Accuracy(BaseModel):
    top1: FiniteFloat | None = None
    top1_ci: Span | None = None


class _Options(BaseModel):
    unlabelled: str | None = None


class _Price(BaseModel):
    """Of the pruned network in the precision that was measured."""

    top1: FiniteFloat
    top1_ci: Span


class _Pruned(BaseModel):
    data: _Data
    options: _Options = _Options()
    settings: _Settings
    hardware: _Machine
    before: _Measured
    after: _Measured
    accuracy: dict[str, _Accuracy | None]
    kept: str | None = None
    price: _Price | None = None

    def facts(self) -> RunFacts:
        precision, price = self.settings.precision, self.price
        before = _row("before pruning", self.accuracy.get("before"), self.before, precision)
        own = _row("this network", self.accuracy.get(self.kept or "pruned"), self.after, precision)
        if price is not None:
            own = replace(own, top1=price.top1, top1_ci=price.top1_ci, top1_precision=precision)
        latency = None
        if self.after.latency_ms is not None and self.after.ci is not None and not self.after.waiting:
            latency = Latency(
                ms=self.after.latency_ms, ci=self.after.ci, cpu=self.hardware.cpu, **self.settings.model_dump()
            )
        told = public(Card(latency=latency)).latency
        measure = "agreement with the unpruned network" if self.options.unlabelled else "top-1"
        return RunFacts(self.data.words, (before, own), "Before and after pruning", measure, told)


def _row(name: str, accuracy: _Accuracy | None, measured: _Measured, precision: str) -> RunRow:
    """precision: of the latency."""
    judged, waiting = accuracy or _Accuracy(), bool(measured.waiting)
    ms, ci = (None, None) if waiting else (measured.latency_ms, measured.ci)
    return RunRow(name, judged.top1, judged.top1_ci, ms, ci, latency_precision=precision)


def _none_of_empty(found: Any) -> Any:
    return found or None


class _Trainings(BaseModel):
    mean: FiniteFloat
    top1_ci: Annotated[Span | None, BeforeValidator(_none_of_empty)] = None
    precision: str = "fp32"


class _Closing(BaseModel):
    label: str
    latency_ms: FiniteFloat | None = None
    ci_low_ms: FiniteFloat | None = None
    ci_high_ms: FiniteFloat | None = None
    accuracy: _Trainings | None = None
    precision: str | None = None


class _Named(BaseModel):
    label: str


class _Searched(BaseModel):
    data: _Data | None
    settings: _Settings
    final: list[_Closing] = []
    winner: _Named | None

    def facts(self) -> RunFacts:
        winner = self.winner.label if self.winner else ""
        rows = tuple(
            RunRow(
                f"{row.label} (this network)" if row.label == winner else public_name(row.label),
                row.accuracy.mean if row.accuracy else None,
                row.accuracy.top1_ci if row.accuracy else None,
                row.latency_ms,
                None if row.ci_low_ms is None or row.ci_high_ms is None else (row.ci_low_ms, row.ci_high_ms),
                row.accuracy.precision if row.accuracy else "fp32",
                row.precision or self.settings.precision,
            )
            for row in self.final
        )
        return RunFacts(self.data.words if self.data else "", rows, "The search's closing table")


def _read(path: Path, record: type[Record]) -> Record | None:
    if not path.is_file():
        return None
    try:
        return record.model_validate(json.loads(path.read_text()))
    except (OSError, ValueError, RecursionError, ValidationError):
        raise UserError(f"{path} is damaged: it is not what vitnas wrote") from None
