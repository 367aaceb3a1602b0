"""`vitnas prune --model timm/NAME`: a network outside the five families, through torch-pruning's own graph.

It has no Arch: what is written is model.onnx, model.safetensors (`pruning.outside.resize_outside` loads it into timm's
network) and the widths of its layers in prune.json. What state/ keeps is as in `nas.prune.run`, without Archs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nas.data.about import announce
from nas.data.inputs import identity
from nas.ending import Ending
from nas.errors import UserError
from nas.export.artifact import CONVERTED, agreement, label_onnx, save_weights, to_onnx
from nas.export.card import Card
from nas.files import replace_file, scratch
from nas.job import Progress, Say
from nas.lock import in_turn
from nas.measure.device import device_lock
from nas.measure.protocol import Measurement
from nas.measure.runtime import RUNTIMES
from nas.networks.targets import TIMM
from nas.prune.images import PruneJob, compute_device
from nas.prune.run import (
    PARTS,
    Options,
    brief_line,
    closing_run,
    judge_tuned,
    network_row,
    say_plan,
    show,
    train_briefly,
    tune,
    tune_control,
    write_results,
)
from nas.text import first_line

if TYPE_CHECKING:
    from torch import nn


def prune_outside(options: Options, command: str, say: Say, progress: Progress) -> dict[str, Any]:
    """Prune a timm network to a budget of MACs; writes the folder's files and returns the report's data.

    Raises:
        UserError: anything that the user can put right, and what torch-pruning cannot do.
    """
    from pruning.outside import CRITERIA, OutsideError

    if options.budget.metric != "macs":
        raise UserError(f"--{options.budget.option}: networks outside the five families take --macs")
    if options.budget.relative and options.budget.amount == 1:
        raise UserError("--macs 1x: networks outside the five families cannot be reallocated, only cut")
    if options.criterion not in CRITERIA:
        raise UserError(f"--criterion {options.criterion}: outside the five families, {', '.join(CRITERIA)}")
    onnx = [name for name, runtime in RUNTIMES.items() if runtime.artifact == "onnx"]
    if options.settings.runtime not in onnx:
        raise UserError(
            f"--runtime {options.settings.runtime}: networks outside the five families need {' or '.join(onnx)}"
        )
    if options.settings.precision in CONVERTED:
        raise UserError(
            f"--precision {options.settings.precision}: networks outside the five families are measured in fp32"
        )
    if "@" in options.model:
        name, _, size = options.model.rpartition("@")
        raise UserError(f"{name} is pruned at its own resolution, not at {size}: leave out @{size}")
    if options.weights not in (None, "timm"):
        raise UserError(f"--weights {options.weights}: networks outside the five families take timm's own, or none")
    job = PruneJob(options.folder, options.fingerprint(), say, progress, compute_device(options.settings))
    try:
        return _prune(options, command, job)
    except OutsideError as error:
        raise UserError(str(error)) from None


def _prune(options: Options, command: str, job: PruneJob) -> dict[str, Any]:
    from pruning.outside import load_outside

    published, resolution = load_outside(options.model.removeprefix(TIMM), None, pretrained=False)
    job.open_data(options.data, resolution, options.num_classes, options.seed)
    pretrained = options.data is not None or options.weights is not None
    job.agree(identity(job.data, model=(options.model, "timm" if pretrained else None)))
    if job.finished:
        job.say(f"{options.folder} is finished: these are its results")
        return job.read_result(*PARTS)
    target = _target(options, _built(options, job), resolution)
    job.make_folder()
    announce(job.data, job.say, job.note)
    if not job.state.network:
        _keep(job, "dense", _dense(options, job, pretrained, published.num_classes))
    dense = _kept(options, job, "dense")
    job.accuracy(dense, "before")
    if job.state.network == "dense":
        _cut(options, job, target, resolution)
    if job.state.network == "pruned":
        model = _kept(options, job, "pruned")
        job.accuracy(model, "pruned")
        tune(job, options, model, dense)
        _keep(job, "tuned", model)
    model = _kept(options, job, "tuned")
    kept = judge_tuned(job, model)
    if kept == "pruned":
        model = _kept(options, job, "pruned")
    save_weights(model, options.folder / "model.safetensors")
    end, results = Ending(job.say), {}
    with end.step("control"):
        tune_control(job, options, lambda: _kept(options, job, "dense"))
    if end.interrupted:
        raise KeyboardInterrupt
    with end.step("closing run"), job.phase("closing run") as progress:
        both = {"before": dense.cpu().eval(), "after": model.cpu().eval()}
        judged = job.state.found[kept]
        card = Card.of(job.data, judged["top1"], judged["images"])
        results = _closing_run(options, both, resolution, card, progress)
    if end.interrupted:
        raise KeyboardInterrupt
    found = job.state.found["cut"]
    networks = {
        name: network_row(found[f"params_{name}"], found[f"macs_{name}"], results.get(name), options.settings)
        for name in ("before", "after")
    }
    details = {
        "family": options.model,
        "resolution": resolution,
        "blocks": [],
        "importance": [],
        "layers": found["layers"],
    }
    return write_results(job, options, command, kept, networks, results, details, end)


def _keep(job: PruneJob, name: str, model: nn.Module) -> None:
    """Save a network under a name, then make it the one that stands."""
    save_weights(model, job.kept / f"{name}.safetensors")
    job.state.network = name
    job.save()


def _kept(options: Options, job: PruneJob, name: str) -> nn.Module:
    from safetensors.torch import load_file

    from pruning.outside import resize_outside

    return resize_outside(_built(options, job), load_file(job.kept / f"{name}.safetensors")).to(job.device)


def _built(options: Options, job: PruneJob, pretrained: bool = False) -> nn.Module:
    """The network with a classifier for the data, in eval mode."""
    import torch

    from pruning.outside import load_outside

    torch.manual_seed(options.seed)
    return load_outside(options.model.removeprefix(TIMM), len(job.data.classes), pretrained)[0]


def _dense(options: Options, job: PruneJob, pretrained: bool, classes: int) -> nn.Module:
    """The network to prune: with timm's weights where it has them, trained briefly where its classifier is new.

    classes: of timm's own classifier.
    """
    from pruning.outside import OutsideError

    if not pretrained:
        job.note(f"no weights given and no --data; {brief_line(job)}")
        model, untrained = _built(options, job), True
    else:
        try:
            model, untrained = _built(options, job, pretrained=True), classes != len(job.data.classes)
        except OutsideError as error:
            if options.weights is not None:
                raise
            job.note(f"no pretrained weights ({error}); {brief_line(job)}")
            model, untrained = _built(options, job), True
        else:
            job.state.found["weights"] = "timm"
            if untrained:
                job.note(f"timm's weights have another classifier; {brief_line(job)}")
    say_plan(job, options, untrained)
    if untrained:
        train_briefly(job, model)
    return model


def _target(options: Options, model: nn.Module, resolution: int) -> int:
    """MACs, below the network's own."""
    import torch

    from pruning.outside import count_macs

    own = count_macs(model, torch.zeros(1, 3, resolution, resolution))[""]
    target = int(options.budget.target(own))
    if target >= own:
        raise UserError(f"--macs {options.budget.text} leaves nothing to cut from {show('macs', own)}")
    return target


def _cut(options: Options, job: PruneJob, target: int, resolution: int) -> None:
    """Cut the unpruned network to the target, and keep the result."""
    import torch

    from pruning.outside import prune_outside as cut

    model = _kept(options, job, "dense")
    batches = [(x.to(job.device), y.to(job.device)) for x, y in job.batches(job.calibration)]
    torch.manual_seed(options.seed)  # the criterion "random" draws from it
    with job.phase("cutting") as progress:
        found = cut(
            model,
            resolution,
            lambda: in_turn(batches),
            target,
            options.criterion,
            options.multiple_of,
            options.rounds,
            progress=progress,
        )
    if found.inner_only:
        job.note(f"only inner widths could be cut: {found.inner_only}")
    job.note("torch-pruning's graph decides what can be cut here: --axes and reallocation do not apply")
    job.state.rounds.append({"round": options.rounds, "reached": found.macs_after, "macs": found.macs_after})
    job.state.found["cut"] = asdict(found)
    _keep(job, "pruned", model)


def _closing_run(
    options: Options, models: dict[str, nn.Module], resolution: int, card: Card, progress: Callable[[int, int], None]
) -> dict[str, Measurement]:
    """Export both networks, keep the pruned one's file, and measure them side by side."""
    paths = {}
    with scratch(options.folder) as folder, device_lock(options.settings.device):
        for name, model in models.items():
            paths[name] = folder / f"{name}.onnx"
            try:
                to_onnx(model, paths[name], resolution, options.settings.batch_size)
            except (RuntimeError, ValueError) as error:
                raise UserError(f"{options.model} cannot be exported: {first_line(error)}") from None
        agreement(models["after"], paths["after"], resolution, options.settings.batch_size)
        results = closing_run(paths, options.settings, options.budget, progress)
        label_onnx(paths["after"], None, trained=True, card=card)
        card.write(options.folder)
        replace_file(options.folder / "model.onnx", paths["after"].read_bytes())
    return results
