"""`vitnas prune --model timm/NAME`: a network outside the five families, through torch-pruning's own graph.

It has no Arch: what is written is model.onnx, model.safetensors (`pruning.outside.resize_outside` loads it into timm's
network) and the widths of its layers in prune.json. What state/ keeps is as in `nas.prune.rounds`, without Archs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from nas.data.about import announce
from nas.data.inputs import identity
from nas.ending import Ending
from nas.errors import UserError
from nas.export.agreement import agreement
from nas.export.card import Card, pixels_of
from nas.export.folder import save_weights
from nas.export.onnx import label_onnx, to_file, to_onnx
from nas.files import replace_file, scratch
from nas.job import Progress, Say
from nas.lock import in_turn
from nas.measure.runtime import LOWER, RUNTIMES
from nas.measure.samples import Measurement
from nas.networks.timm_network import TIMM, TimmNetwork
from nas.prune import steps
from nas.prune.images import PruneJob, compute_device
from nas.prune.records import Kept, LayerRow, NetworkRow, Parts, PruneResult, Round
from nas.prune.request import PruneRequest, show
from nas.prune.results import write_results
from nas.text import first_line
from nas.units import counted

if TYPE_CHECKING:
    from torch import nn

    from nas.data.images import Images


def prune_outside(request: PruneRequest, command: str, say: Say, progress: Progress) -> PruneResult:
    """Prune a timm network to a budget of MACs; write the folder's files.

    Raises:
        UserError: anything that the user can put right, and what torch-pruning cannot do.
    """
    from pruning.outside import CRITERIA
    from pruning.outside_graph import OutsideError

    _check(request, CRITERIA)
    job = PruneJob(request.folder, request.identity(), say, progress, compute_device(request.settings))
    request = steps.as_begun(job, request)
    try:
        return _prune(request, command, job)
    except OutsideError as error:
        raise UserError(str(error)) from None


def _check(request: PruneRequest, criteria: Collection[str]) -> None:
    """Refuse what only networks of the families can do."""
    if request.unlabelled:
        raise UserError("--unlabelled: networks outside the five families take --data")
    if request.budget.metric != "macs":
        raise UserError(f"--{request.budget.option}: networks outside the five families take --macs")
    if request.budget.relative and request.budget.amount == 1:
        raise UserError("--macs 1x: networks outside the five families cannot be reallocated, only cut")
    if request.criterion not in criteria:
        raise UserError(f"--criterion {request.criterion}: outside the five families, {', '.join(criteria)}")
    onnx = [name for name, runtime in RUNTIMES.items() if runtime.artifact == "onnx"]
    if request.settings.runtime not in onnx:
        raise UserError(
            f"--runtime {request.settings.runtime}: networks outside the five families need {' or '.join(onnx)}"
        )
    if request.settings.precision in LOWER:
        raise UserError(
            f"--precision {request.settings.precision}: networks outside the five families are measured in fp32"
        )
    if "@" in request.model:
        name, _, size = request.model.rpartition("@")
        raise UserError(f"{name} is pruned at its own resolution, not at {size}: leave out @{size}")
    if request.weights not in (None, "timm"):
        raise UserError(f"--weights {request.weights}: networks outside the five families take timm's own, or none")


def _prune(request: PruneRequest, command: str, job: PruneJob) -> PruneResult:
    from pruning.outside import load_outside

    _, resolution = load_outside(request.model.removeprefix(TIMM), None)
    pretrained = request.data is not None or request.weights is not None
    weights = "timm" if pretrained else None
    pixels = pixels_of(TimmNetwork(request.model.removeprefix(TIMM)), weights)
    job.open_data(request.data, resolution, request.num_classes, request.seed, pixels=pixels)
    job.agree(identity(job.data, model=(request.model, weights)))
    if job.finished:
        return steps.told_again(job, request)
    target = _target(request, _built(request, job), resolution)
    job.make_folder()
    announce(job.data, job.say, job.note)
    if not job.state.network:
        _keep(job, "dense", _dense(request, job, pretrained))
    dense = _kept(request, job, "dense")
    job.accuracy(dense, "before")
    if job.state.network == "dense":
        _cut(request, job, target, resolution)
    if job.state.network == "pruned":
        model = _kept(request, job, "pruned")
        job.accuracy(model, "pruned")
        steps.tune(job, request, model, dense)
        _keep(job, "tuned", model)
    model = _kept(request, job, "tuned")
    kept = steps.judge_tuned(job, model)
    if kept == "pruned":
        model = _kept(request, job, "pruned")
    save_weights(model, request.folder / "model.safetensors")
    both = {"before": dense.cpu().eval(), "after": model.cpu().eval()}
    return _finish(request, command, job, both, kept, resolution)


def _finish(
    request: PruneRequest, command: str, job: PruneJob, both: Mapping[str, nn.Module], kept: Kept, resolution: int
) -> PruneResult:
    """The control, the closing run and the results. both: the networks "before" and "after"."""
    end = Ending(job.say)
    results: dict[str, Measurement] = {}
    with end.step("control"):
        steps.tune_control(job, request, lambda: _kept(request, job, "dense"))
    if end.interrupted:
        raise KeyboardInterrupt
    with end.step("closing run"), job.phase("closing run") as progress:
        results = _closing_run(request, both, resolution, steps.card_of(job, kept), progress, job.evaluated)
    if end.interrupted:
        raise KeyboardInterrupt
    found = job.state.found["cut"]
    before, after = (
        NetworkRow.of(found[f"params_{name}"], found[f"macs_{name}"], results.get(name), request.settings)
        for name in ("before", "after")
    )
    layers = TypeAdapter(tuple[LayerRow, ...]).validate_python(found["layers"])
    parts = Parts(request.model, resolution, layers=layers)
    return write_results(job, request, command, kept, before, after, results, parts, end)


def _keep(job: PruneJob, name: str, model: nn.Module) -> None:
    """Save a network under a name, then make it the one that stands."""
    save_weights(model, job.kept / f"{name}.safetensors")
    job.state.network = name
    job.save()


def _kept(request: PruneRequest, job: PruneJob, name: str) -> nn.Module:
    from safetensors.torch import load_file

    from pruning.outside import resize_outside

    return resize_outside(_built(request, job), load_file(job.kept / f"{name}.safetensors")).to(job.device)


def _built(request: PruneRequest, job: PruneJob) -> nn.Module:
    """The network with a classifier for the data and random weights, in eval mode."""
    import torch

    from pruning.outside import load_outside

    torch.manual_seed(request.seed)
    return load_outside(request.model.removeprefix(TIMM), len(job.data.classes))[0]


def _dense(request: PruneRequest, job: PruneJob, pretrained: bool) -> nn.Module:
    """The network to prune: with timm's weights where it has them, trained briefly where it has none.

    Raises:
        UserError: they cannot be read, or do not fit.
    """
    import torch

    from nas.networks.weights import load

    network = TimmNetwork(request.model.removeprefix(TIMM)).replace(num_classes=len(job.data.classes))
    found = steps.find_published(job, request, network) if pretrained else None
    first: steps.First = "training"
    if found is None:
        if not pretrained:
            job.note(f"no weights given and no --data; {steps.brief_line(job)}")
        model = _built(request, job)
    else:
        torch.manual_seed(request.seed)
        model = load(network, found.path)
        job.state.found["weights"] = "timm"
        first = steps.first_of(job, model, "timm's weights") if model.untrained else "nothing"
    steps.make_ready(job, request, model, first)
    return model.eval()


def _target(request: PruneRequest, model: nn.Module, resolution: int) -> int:
    """MACs, below the network's own."""
    import torch

    from pruning.macs import count_macs

    own = count_macs(model, torch.zeros(1, 3, resolution, resolution))[""]
    target = int(request.budget.target(own))
    if target >= own:
        raise UserError(f"--macs {request.budget.text} leaves nothing to cut from {show('macs', own)}")
    return target


def _cut(request: PruneRequest, job: PruneJob, target: int, resolution: int) -> None:
    """Cut the unpruned network to the target, and keep the result."""
    import torch

    from pruning.outside import prune_outside as cut

    model = _kept(request, job, "dense")
    batches = [(x.to(job.device), y.to(job.device)) for x, y in job.batches(job.calibration)]
    inputs = job.inputs(resolution) if request.compensate else None
    torch.manual_seed(request.seed)  # the criterion "random" draws from it
    with job.phase("cutting") as progress:
        found = cut(
            model,
            resolution,
            lambda: in_turn(batches),
            target,
            request.criterion,
            request.multiple_of,
            request.rounds,
            progress=progress,
            inputs=inputs,
        )
    if found.inner_only:
        job.note(f"only inner widths could be cut: {found.inner_only}")
    job.note("torch-pruning's graph decides what can be cut here: --axes and reallocation do not apply")
    if request.compensate:
        on = counted(found.refitted_on, "image")
        job.say(f"{counted(found.refitted, 'layer')} refitted to what the unpruned network wrote, on {on}")
    row = Round(request.rounds, found.macs_after, found.macs_after, refitted=found.refitted)
    job.state.rounds.append(row.to_json())
    job.state.found["cut"] = asdict(found)
    _keep(job, "pruned", model)


def _closing_run(
    request: PruneRequest,
    models: Mapping[str, nn.Module],
    resolution: int,
    card: Card,
    progress: Callable[[int, int], None],
    evaluated: Images,
) -> dict[str, Measurement]:
    """Export both networks, measure them side by side, and write the pruned one's file."""
    batch_size = request.settings.batch_size
    from nas.data.dataset import some_of

    options, network = request.file.of_batch(batch_size), models["after"]
    card = card.of_file(options)
    with scratch(request.folder) as room:
        kept = room / "model.onnx"

        def export(model: nn.Module, stem: Path) -> Path:
            path = stem.with_suffix(".onnx")
            try:
                to_onnx(model, path, resolution, batch_size)
                if model is network and options.plain:
                    shutil.copyfile(path, kept)
                elif model is network:
                    to_file(model, kept, resolution, options, card.pixels)
            except (RuntimeError, ValueError) as error:
                raise UserError(f"{request.model} cannot be exported: {first_line(error)}") from None
            if model is network:
                agreement(model, kept, resolution, options, some_of(evaluated), card.pixels)
            return path

        results = steps.closing_run(models, export, request, progress)
        label_onnx(kept, None, trained=True, card=card)
        card.write(request.folder)
        replace_file(request.folder / "model.onnx", kept.read_bytes())
    return results
