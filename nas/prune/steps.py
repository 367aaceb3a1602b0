"""Steps that every pruning takes: training, fine-tuning, the control, the closing run, and their verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from nas.errors import DiskFull, UserError
from nas.export.card import Card
from nas.export.folder import save_weights
from nas.export.side_by_side import Longer, Network, Results, measure_side_by_side
from nas.measure.budget import LatencyBudget, Verdict
from nas.measure.runtime import Settings
from nas.measure.samples import MeasureError, Measurement, paired_ratio, quanta, quanta_line
from nas.prune.images import PruneJob
from nas.prune.records import Accuracy, Kept, PruneResult
from nas.prune.words import passes
from nas.units import counted

if TYPE_CHECKING:
    from torch import nn

    from nas.networks.pretrained import Pretrained
    from nas.networks.timm_network import TimmNetwork
    from nas.prune.request import Budget, PruneRequest
    from search_spaces import Arch

First = Literal["nothing", "probe", "training"]
"""What the unpruned network needs before it is pruned: a linear probe where only its classifier is new, and a brief
training where it has no weights, or ends in no linear layer."""

BRIEF_IMAGES = 4_500
"""Images that train a network first."""
BRIEF_LR = 1e-3
FINETUNE_LR = 1e-4
CLOSING_ROUNDS = 30
MOST_ROUNDS = 120
"""Of the closing run in all, while it leaves open whether a latency budget is met."""


def as_begun(job: PruneJob, request: PruneRequest) -> PruneRequest:
    """The request, without what an older vitnas that began the run did not do."""
    if request.compensate and "compensate" not in job.state.options:
        job.say("begun by an older vitnas: layers are not refitted after the cuts")
        return replace(request, compensate=False)
    return request


def told_again(job: PruneJob, request: PruneRequest) -> PruneResult:
    """The result of a finished pruning, and what is asked for now that it was made without.

    Raises:
        UserError: it is damaged.
    """
    found = job.read()
    job.say(f"{request.folder} is finished: these are its results")
    if found.price and found.price.max_drop != request.max_drop:
        job.say(f"they were judged with --max-drop {found.price.max_drop:g}: give another --out for another one")
    if request.control and found.accuracy.recovered and not found.accuracy.control:
        job.say("they hold no control: give another --out for one")
    return found


def measured(
    networks: Mapping[str, Network],
    export: Callable[[Network, Path], Path],
    request: PruneRequest,
    rounds: int,
    progress: Callable[[int, int], None] | None = None,
    longer: Longer | None = None,
) -> dict[str, Measurement]:
    """`measure_side_by_side`, where every network must be measured.

    Raises:
        UserError: one that could not be.
    """
    results = measure_side_by_side(networks, export, request.settings, rounds, request.folder, progress, longer)
    for name, result in results.items():
        if isinstance(result, MeasureError):
            _refuse(name, result)
    return {name: result for name, result in results.items() if isinstance(result, Measurement)}


def _refuse(name: str, error: MeasureError) -> NoReturn:
    raise UserError(f"{name or 'the network'} could not be measured: {error}")


def waiting_line(results: Mapping[str, Measurement], settings: Settings) -> str | None:
    """What is said of latencies that are waiting times (see `quanta`); None where none is one."""
    from nas.measure.hardware import describe

    return quanta_line(describe(settings)) if any(map(quanta, results.values())) else None


def closing_run(
    networks: Mapping[str, Network],
    export: Callable[[Network, Path], Path],
    request: PruneRequest,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Measurement]:
    """Both networks, "before" and "after", in one interleaved run; longer, up to `MOST_ROUNDS` rounds, while it leaves
    open whether the latency budget is met."""

    def which(results: Results) -> list[str]:
        timed = {name: result for name, result in results.items() if isinstance(result, Measurement)}
        unsure = len(timed) == len(results) and latency_verdict(request.budget, timed)[0] == Verdict.UNSURE
        return list(results) if unsure else []

    longer = Longer(which, MOST_ROUNDS, _refuse)
    return measured(networks, export, request, CLOSING_ROUNDS, progress, longer)


def latency_verdict(
    budget: Budget, results: Mapping[str, Measurement]
) -> tuple[Verdict | None, tuple[float, float] | None]:
    """What the closing run says of a latency budget, and the 95% interval in ms that says it; None of other budgets,
    and where its latencies are waiting times.

    For a share of the network's own latency it is that of the paired ratio, in which the machine's drift is left out.
    """
    if budget.metric != "latency" or not results or any(map(quanta, results.values())):
        return None, None
    before, after = results["before"], results["after"]
    low, high = after.ci_ms
    if budget.relative:
        low, high = (end * before.p50_ms for end in paired_ratio(after, before)[1])
    interval = min(low, after.p50_ms), max(high, after.p50_ms)
    return LatencyBudget(budget.amount * (before.p50_ms if budget.relative else 1)).judge(interval), interval


def worse_after_tuning(recovered: Accuracy, pruned: Accuracy) -> bool:
    """Whether fine-tuning was a loss, however small: what is kept is never below what the cut left."""
    return recovered.top1 < pruned.top1


def make_ready(job: PruneJob, request: PruneRequest, model: nn.Module, first: First) -> None:
    """Say the plan, and give the unpruned network what it needs first, in place."""
    found = job.state.found
    found["taught"] = first != "training" if request.distill is None else request.distill
    _say_plan(job, request, first)
    if first == "probe":
        images = job.for_probe(model)
        job.probe(model, images)
        found["probe_images"] = len(images)
    elif first == "training":
        job.fit("training", model, BRIEF_IMAGES, BRIEF_LR, "train")
        found["trained_images"] = BRIEF_IMAGES


def is_taught(job: PruneJob, request: PruneRequest) -> bool:
    """Whether the unpruned network teaches the fine-tuning: decided when the run began, by an older vitnas as asked."""
    return bool(job.state.found.get("taught", request.distill))


def tune(job: PruneJob, request: PruneRequest, model: nn.Module, dense: nn.Module) -> None:
    """Fine-tune a pruned network for the epochs asked for, with the unpruned one as teacher where `is_taught`."""
    images = round(request.finetune * len(job.data.train))
    if images:
        job.fit("fine-tuning", model, images, FINETUNE_LR, "frozen", dense if is_taught(job, request) else None)
        job.state.found["tuned_images"] = images


def tune_control(job: PruneJob, request: PruneRequest, load: Callable[[], nn.Module]) -> None:
    """Give the unpruned network the same fine-tuning as the pruned one, and judge it.

    load: builds the unpruned network again.
    """
    found = job.state.found
    if not found.get("tuned_images") or "control" in found:
        return
    if not request.control:
        job.note("no control (--no-control): what the unpruned network gains by the same fine-tuning is unknown")
        return
    from safetensors.torch import load_file

    path, model = job.kept / "control.safetensors", load()
    if path.is_file():
        model.load_state_dict(load_file(path))
    else:
        teacher = load() if is_taught(job, request) else None
        job.fit("control: fine-tuning the unpruned", model, found["tuned_images"], FINETUNE_LR, "frozen", teacher)
        save_weights(model, path)
    job.accuracy(model, "control")


def judge_tuned(job: PruneJob, model: nn.Module) -> Kept:
    """Judge the fine-tuned network, if it was; returns which weights are kept."""
    if not job.state.found.get("tuned_images"):
        return "pruned"
    job.accuracy(model, "recovered")
    if not worse_after_tuning(job.judged("recovered"), job.judged("pruned")):
        return "recovered"
    what = "agreement" if job.unlabelled else "accuracy"
    job.note(f"fine-tuning lowered the {what}: the weights before it are kept; try more --finetune epochs")
    return "pruned"


def card_of(job: PruneJob, kept: Kept) -> Card:
    """What model.onnx says of itself, with the accuracy of what is kept; agreement is none."""
    if job.unlabelled:
        return Card.of(job.data)
    judged = job.judged(kept)
    return Card.of(job.data, judged.top1, judged.images)


def _say_plan(job: PruneJob, request: PruneRequest, first: First) -> None:
    """What is going to happen, before anything long begins."""
    train = len(job.data.train)
    tuned = round(request.finetune * train)
    told = {"probe": "a linear probe", "training": f"training on {passes(BRIEF_IMAGES, train)}"}
    steps = [told[first]] if first in told else []
    if request.budget.metric == "latency":
        steps.append("measuring what each part costs")
    steps.append(f"{counted(request.rounds, 'round')} of scoring {len(job.calibration):,} images and cutting")
    if tuned:
        teacher = " with the unpruned network as teacher, which runs on each too" * is_taught(job, request)
        steps.append(f"fine-tuning on {passes(tuned, train)}{teacher}")
        steps += ["the same for the unpruned network, as a control"] * request.control
    job.say(f"to do: {'; '.join([*steps, f'a closing run of {CLOSING_ROUNDS} rounds'])}")


def find_published(job: PruneJob, request: PruneRequest, network: Arch | TimmNetwork) -> Pretrained | None:
    """Find a network's published weights, and tell which these are; None, which is told, where they cannot be had.

    Raises:
        UserError: they cannot be had, and were asked for. DiskFull: there is no room for them.
    """
    from nas.networks.pretrained import find_pretrained

    try:
        found = find_pretrained(network)
    except DiskFull:
        raise
    except UserError as error:
        if request.weights is not None:
            raise
        job.note(f"no pretrained weights ({error}); {brief_line(job)}")
        return None
    job.note(found.line)
    return found


def first_of(job: PruneJob, model: nn.Module, weights: str) -> First:
    """What a network needs whose weights have no classifier for the data, noted. weights: in words."""
    what = f"{weights} have another classifier or none"
    if job.takes_probe(model):
        job.note(f"{what}: the network's is a linear probe on {len(job.for_probe(model)):,} images of {job.data.name}")
        return "probe"
    job.note(f"{what}, and the network does not end in a linear layer, which a probe replaces; {brief_line(job)}")
    return "training"


def brief_line(job: PruneJob) -> str:
    """What is said of a network that is trained here first."""
    trained = f"the network is briefly trained on {passes(BRIEF_IMAGES, len(job.data.train))} of {job.data.name}"
    return f"{trained}: its figures say nothing of ImageNet"
