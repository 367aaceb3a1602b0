"""`vitnas show`: what is known of a network: its Arch along the five axes, and what its run has found out."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, FiniteFloat, model_validator

from nas.errors import UserError
from nas.export.card import PREFIX, Card, Latency, Preprocess, described, load_onnx, metadata_of
from nas.export.onnx_input import OnnxInput
from nas.export.quantize import LISTED, left_in_float
from nas.intervals import top1_words
from nas.networks.counts import TIMM_COUNTED, counts_of
from nas.networks.timm_network import TIMM, TimmNetwork
from nas.report.tables import Column, console_of, print_table, prose
from nas.training.result import LINEAR_PROBE
from nas.units import counted, listed

if TYPE_CHECKING:
    from nas.networks.targets import Target
    from search_spaces import Arch

Facts = dict[str, Any]
NAMED = 60
"""Characters of the names of classes that are printed."""


Record = TypeVar("Record", bound=BaseModel)


class Data(BaseModel):
    name: str


class Options(BaseModel):
    model: str
    weights: str | None = None


class Start(BaseModel):
    """source: as `nas.training.course.StartRecord` has it."""

    source: str
    file: str | None = None


class Final(BaseModel):
    of: str


class Trained(BaseModel):
    """Of a metrics.json, what is told of it, as in the records below. start: None of an earlier version."""

    data: Data
    options: Options
    start: Start | None = None
    final: Final | None = None

    @property
    def parent(self) -> str | None:
        """The weights that the training began with, in words; None of random ones."""
        if self.start is None:
            return self.options.weights
        if self.start.source in ("cache", "download"):
            return "its published weights"
        return self.start.file


class Budget(BaseModel):
    text: str
    metric: str


class Agreement(BaseModel):
    """How often a network answers as the unpruned one: percent, its 95% interval, of how many images."""

    top1: FiniteFloat
    top1_ci: tuple[FiniteFloat, FiniteFloat]
    images: int


class Price(BaseModel):
    """Of the pruned network in the precision that it was measured in; top1: percent."""

    precision: str
    top1: FiniteFloat
    top1_ci: tuple[FiniteFloat, FiniteFloat]
    images: int


class Pruned(BaseModel):
    """Of a prune.json. latency: None where none was measured, or only waiting times. agreement: None where images had
    labels, and so an accuracy. price: None in fp32."""

    model: str
    data: Data
    budget: Budget
    latency: Latency | None
    agreement: Agreement | None
    price: Price | None = None

    @model_validator(mode="before")
    @classmethod
    def join(cls, found: Any) -> Any:
        """Put together the latency, which the file holds in three places, and the agreement, there an accuracy."""
        try:
            after, latency, agreement = found["after"], None, None
            if after["latency_ms"] is not None and not after.get("waiting"):
                measured = {"ms": after["latency_ms"], "ci": after["ci"], "cpu": found["hardware"].get("cpu")}
                latency = found["settings"] | measured
            if found.get("options", {}).get("unlabelled"):
                agreement = found["accuracy"][found["kept"]]
            return found | {"latency": latency, "agreement": agreement}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no {error}") from None


class Winner(BaseModel):
    quality: FiniteFloat
    quality_estimate: FiniteFloat
    quality_ci: tuple[FiniteFloat, FiniteFloat]


class Tier(BaseModel):
    label: str


class Searched(BaseModel):
    """Of a result.json."""

    data: Data | None
    winner: Winner | None
    quality_tier: Tier


def facts_of(target: Target) -> Facts:
    """What is known of a network, as --json has it; None where something is not known.

    Raises:
        UserError: files that cannot be read, or a network that cannot be built.
    """
    from nas.networks.build import from_document
    from search_spaces import ArchError

    if target.network is not None:
        return {"model": target.label} | _of_network(target.network) | _of_folder(target, target.network)
    assert target.onnx is not None
    facts = metadata_of(load_onnx(target.onnx))
    if f"{PREFIX}weights" not in facts:
        raise UserError(f"{target.label} says nothing of itself: `vitnas export` writes files that do")
    try:
        network = from_document(facts[f"{PREFIX}arch"]) if f"{PREFIX}arch" in facts else None
    except (ArchError, UserError) as error:
        raise UserError(f"{target.label}: {error}") from None
    found = _of_network(network) if network else dict.fromkeys(("family", "params", "macs", "stages"))
    trained = facts[f"{PREFIX}weights"] == "trained"
    told = _of_card(Card.read(target.onnx), trained) | {"kind": "ONNX file", "left_in_float": _int8_in(target.onnx)}
    if told["top1"] is not None:
        told["top1_precision"] = OnnxInput.read(target.onnx).precision
    return {"model": target.label} | found | told


def _int8_in(*files: Path) -> list[str] | None:
    """What the first int8 file of these computes in float; None where there is none."""
    for file in files:
        with suppress(UserError):
            if OnnxInput.read(file).quantised:
                return [*left_in_float(load_onnx(file))]
    return None


def _of_network(network: Arch | TimmNetwork) -> Facts:
    """ "timm": its name, of a network of timm's only, which has no stages."""
    counts = counts_of(network)
    found = {
        "family": network.family,
        "resolution": network.resolution,
        "num_classes": network.num_classes,
        "params": counts.params,
        "macs": counts.macs,
    }
    if isinstance(network, TimmNetwork):
        return found | {"timm": network.name, "stages": None}
    return found | {"stages": [stage.model_dump() for stage in network.summary()]}


def _of_card(card: Card, trained: bool) -> Facts:
    accuracy, found = card.accuracy, {}
    if card.preprocess:
        found["resolution"] = card.preprocess.size
    if card.classes:
        found["num_classes"] = len(card.classes)
    return found | {
        "weights": "trained" if trained else "random",
        "weights_from": None,
        "data": accuracy and accuracy.data,
        "classes": card.classes,
        "preprocess": card.preprocess and card.preprocess.model_dump(),
        "top1": accuracy and accuracy.top1,
        "top1_ci": accuracy and list(accuracy.ci),
        "top1_precision": None,
        "images": accuracy and accuracy.images,
        "latency": card.latency and card.latency.model_dump(),
        **dict.fromkeys(("left_in_float", "agreement")),
        **dict.fromkeys(("quality", "quality_estimate", "quality_ci", "quality_label")),
    }


def _of_folder(target: Target, network: Arch | TimmNetwork) -> Facts:
    """Of the files beside its document; the prior is asked only of an Arch that nobody has trained or rated."""
    from nas.quality.candidate import Candidate
    from nas.quality.prior import PriorTier

    folder, trained = target.folder, target.as_trained().weights is not None
    card = Card.read(folder) if folder and described(folder) else Card()
    measured = Card()
    if target.own is not None:  # what is known holds at the resolution of the weights
        card = Card(classes=card.classes)
    elif card.latency is None and folder:  # that of the file of another precision, which was measured
        lower = map(Card.read, sorted(folder.glob("model.*.onnx")))
        measured = next((each for each in lower if each.latency), measured)
        accuracy = measured.accuracy or card.accuracy
        card = card.model_copy(update={"accuracy": accuracy, "latency": measured.latency})
    found = _of_card(card, trained) | {"kind": kind_of(folder), "resolution": network.resolution}
    if measured.latency and measured.accuracy:
        found["top1_precision"] = measured.latency.precision
    elif folder and card.accuracy:
        found["top1_precision"] = "fp32"  # of weights, where there is no file
        with suppress(UserError):
            found["top1_precision"] = OnnxInput.read(folder / "model.onnx").precision
    if folder and target.own is None:
        found["left_in_float"] = _int8_in(folder / "model.onnx", folder / "model.int8.onnx")
    metrics = _read(folder and folder / "metrics.json", Trained)
    if metrics:
        found["data"] = metrics.data.name
        tuned = (
            "a linear probe of" if metrics.final is not None and metrics.final.of == LINEAR_PROBE else "fine-tuned from"
        )
        how = f"{tuned} {metrics.parent}" if metrics.parent else "trained from random weights"
        found["weights_from"] = f"{metrics.options.model}, {how}"
    pruned = _read(folder and folder / "prune.json", Pruned)
    if pruned:
        found["data"] = pruned.data.name
        found["weights_from"] = f"{pruned.model}, pruned to {pruned.budget.text} {pruned.budget.metric}"
        if target.own is None and pruned.latency:
            found["latency"] = pruned.latency.model_dump()
            if price := pruned.price:
                found |= {"top1": price.top1, "top1_ci": list(price.top1_ci), "images": price.images}
                found["top1_precision"] = price.precision
        if target.own is None and pruned.agreement:  # an early vitnas wrote it into model.onnx as its accuracy
            without = dict.fromkeys(("top1", "top1_ci", "top1_precision", "images"))
            found |= {"agreement": pruned.agreement.model_dump()} | without
    searched = None
    if folder and found["kind"] == "search" and not trained and target.own is None:
        searched = _read(folder.parent / "result.json", Searched)
    if searched and searched.winner:
        found["data"] = searched.data and searched.data.name
        found |= searched.winner.model_dump() | {"quality_label": searched.quality_tier.label}
    elif not trained and not isinstance(network, TimmNetwork):
        tier = PriorTier()
        told = tier.estimate(Candidate(network), counts_of(network)).to_dict()
        found |= {key: told[key] for key in ("quality_estimate", "quality_ci")} | {"quality_label": tier.label}
    return found


def kind_of(folder: Path | None) -> str:
    """What a network's folder was written by."""
    if folder is None:
        return "published network"
    if (folder / "metrics.json").is_file():
        return "training"
    if (folder / "prune.json").is_file():
        return "pruning"
    if folder.name == "best" and (folder.parent / "trials.csv").is_file():
        return "search"
    return "network"


def _read(path: Path | None, record: type[Record]) -> Record | None:
    """What a run's file holds; None where there is none.

    Raises:
        UserError: it is not what vitnas wrote.
    """
    if path is None or not path.is_file():
        return None
    try:
        return record.model_validate(json.loads(path.read_text()))
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: it is not what vitnas wrote") from None


STAGES = (
    Column("stage"),
    Column("embed_dim"),
    Column("depth"),
    Column("heads"),
    Column("key_dim"),
    Column("attention", drop=2),
    Column("FFN ratio"),
    Column("keep rate", drop=1),
)


def show(facts: Mapping[str, Any]) -> None:
    """Print them."""
    from nas.quality.tier import told_score

    console = console_of()
    for line in lines_of(facts):
        prose(console, line)
    if facts["stages"]:
        print_table(console, STAGES, [_row(i, stage) for i, stage in enumerate(facts["stages"], 1)])
    if facts["quality_label"]:
        low, high = facts["quality_ci"]
        words = f"{facts['quality_estimate']:.1f}% (95%: {low:.1f} to {high:.1f})"
        if facts["quality"] is not None:
            words = f"{told_score(facts['quality']):.1f}; its estimate is {words}"
        prose(console, f"{facts['quality_label']}: {words}")


def lines_of(facts: Mapping[str, Any]) -> list[str]:
    """All but the stages, a line each."""
    size = f", {facts['params'] / 1e6:.2f} M parameters, {facts['macs'] / 1e6:.1f} MMACs" if facts["params"] else ""
    named = f"{TIMM}{facts['timm']}" if facts.get("timm") else facts["family"]
    family = f"{named}, " if named else ""
    classes = f", {facts['num_classes']} classes" if facts.get("num_classes") else ""
    pixels = f"{facts['resolution']} px" if facts.get("resolution") else "of unknown input"
    lines = [f"{facts['model']} ({facts['kind']}): {family}{pixels}{classes}{size}"]
    if facts.get("timm"):
        lines.append(TIMM_COUNTED)
    told = f": {facts['weights_from']}" if facts["weights_from"] else ""
    lines.append(f"weights: {facts['weights']}{told}")
    if facts["data"]:
        lines.append(f"data: {facts['data']}")
    if facts["classes"]:
        lines.append(f"classes: {few(facts['classes'])}")
    if facts["preprocess"]:
        lines.append(f"images: {Preprocess(**facts['preprocess']).pixels}")
    latency, judged = facts["latency"], facts["top1_precision"]
    if facts["top1"] is not None:
        mixed = latency is not None and latency["precision"] != judged
        told = f", in {judged}" if judged and (judged != "fp32" or mixed) else ""
        lines.append(f"accuracy: {top1_words(facts['top1'], facts['top1_ci'], facts['images'])}{told}")
    elif facts["weights"] == "trained":
        lines.append("accuracy: not known")
    if (left := facts.get("left_in_float")) is not None:
        lines.append(f"int8 leaves in float: {listed(left, LISTED) or 'nothing'}")
    if agreement := facts.get("agreement"):
        share = top1_words(agreement["top1"], agreement["top1_ci"], agreement["images"], what="agreement")
        lines.append(f"with the unpruned network: {share}")
    if latency:
        low, high = latency["ci"]
        threads = counted(latency["threads"], "thread")
        where = f"{latency['device']} ({latency['cpu']})" if latency["cpu"] else latency["device"]
        lines.append(
            f"latency: {latency['ms']:.2f} ms (95%: {low:.2f} to {high:.2f}), {latency['runtime']} "
            f"{latency['precision']}, {where}, {threads}, batch {latency['batch_size']}"
        )
    elif facts["kind"] == "training":
        lines.append(f"latency: not kept with a training; `vitnas bench {shlex.quote(facts['model'])}` measures it")
    else:
        lines.append("latency: not known here; `vitnas bench` measures it")
    return lines


def few(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    fitting = sum(len(", ".join(names[: i + 1])) <= NAMED for i in range(len(names)))
    return listed([name[:NAMED] for name in names], max(fitting, 1))


def _row(number: int, stage: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        str(number),
        str(stage["embed_dim"]),
        str(stage["depth"]),
        f"{stage['heads']:g}",
        f"{stage['key_dim']:g}",
        f"{stage['attention_share']:.0%}",
        f"{stage['ffn_ratio']:.2f}",
        f"{stage['keep_rate']:.2f}",
    )
