"""`vitnas prune --model timm/NAME`: a network outside the five families, through torch-pruning's own graph.

It has no Arch: what is written is model.onnx, model.safetensors (`pruning.outside.resize_outside` loads it into timm's
network) and the widths of its layers in prune.json.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nas.ending import Ending
from nas.errors import UserError, first_line
from nas.export import CONVERTED, agreement, save_weights, to_onnx
from nas.files import replace_file, scratch
from nas.job import Job, Progress, Say, compute_device
from nas.measure import RUNTIMES, Measurement, device_lock, in_turn
from nas.prune import (
    CLOSING_ROUNDS,
    OUTSIDE,
    Options,
    brief_line,
    measured,
    network_row,
    show,
    train_briefly,
    tune,
    write_results,
)

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
    if options.weights not in (None, "timm"):
        raise UserError(f"--weights {options.weights}: networks outside the five families take timm's own, or none")
    job = Job(options.folder, options.fingerprint(), say, progress, compute_device(options.settings))
    try:
        return _prune(options, command, job)
    except OutsideError as error:
        raise UserError(str(error)) from None


def _prune(options: Options, command: str, job: Job) -> dict[str, Any]:
    import copy

    from pruning.outside import prune_outside as cut

    model, resolution, untrained = _load(options, job)
    job.make_folder()
    if untrained:
        train_briefly(job, model)
    job.accuracy(model, "before")
    dense = copy.deepcopy(model)
    batches = [(x.to(job.device), y.to(job.device)) for x, y in job.batches(job.calibration)]
    with job.phase("cutting") as progress:
        found = cut(
            model,
            resolution,
            lambda: in_turn(batches),
            _target(options, model, resolution),
            options.criterion,
            options.multiple_of,
            options.rounds,
            progress=progress,
        )
    if found.inner_only:
        job.note(f"only inner widths could be cut: {found.inner_only}")
    job.note("torch-pruning's graph decides what can be cut here: --axes and reallocation do not apply")
    job.state.rounds.append({"round": options.rounds, "reached": found.macs_after, "macs": found.macs_after})
    job.accuracy(model, "pruned")
    tune(job, options, model, dense)
    if job.state.found.get("tuned_images"):
        job.accuracy(model, "recovered")
    with job.phase("closing run"):
        results = _closing_run(options, {"before": dense.cpu().eval(), "after": model.cpu().eval()}, resolution)
    save_weights(model, options.folder / "model.safetensors")
    networks = {
        "before": network_row(found.params_before, found.macs_before, results["before"], options.settings),
        "after": network_row(found.params_after, found.macs_after, results["after"], options.settings),
    }
    layers = [asdict(layer) for layer in found.layers]
    details = {"family": options.model, "resolution": resolution, "blocks": [], "importance": [], "layers": layers}
    return write_results(job, options, command, networks, details, Ending(job.say))


def _load(options: Options, job: Job) -> tuple[nn.Module, int, bool]:
    """The network, its resolution, and whether it has to be trained first."""
    import torch

    from pruning.outside import OutsideError, load_outside

    name, classes = options.model.removeprefix(OUTSIDE), options.num_classes
    published, resolution = load_outside(name, None, pretrained=False)
    job.open_data(options.data, resolution, classes, options.seed)
    classes = len(job.data.classes)
    torch.manual_seed(options.seed)
    if options.data is None and options.weights is None:
        job.note(f"no weights given and no --data; {brief_line(job)}")
        return load_outside(name, classes, pretrained=False)[0], resolution, True
    try:
        model = load_outside(name, classes, pretrained=True)[0]
    except OutsideError as error:
        if options.weights is not None:
            raise
        job.note(f"no pretrained weights ({error}); {brief_line(job)}")
        return load_outside(name, classes, pretrained=False)[0], resolution, True
    job.state.found["weights"] = "timm"
    other = published.num_classes != classes
    if other:
        job.note(f"timm's weights have another classifier; {brief_line(job)}")
    return model, resolution, other


def _target(options: Options, model: nn.Module, resolution: int) -> int:
    import torch

    from pruning.outside import count_macs

    own = count_macs(model, torch.zeros(1, 3, resolution, resolution, device=next(model.parameters()).device))[""]
    target = int(options.budget.target(own))
    if target >= own:
        raise UserError(f"--macs {options.budget.text} leaves nothing to cut from {show('macs', own)}")
    return target


def _closing_run(options: Options, models: dict[str, nn.Module], resolution: int) -> dict[str, Measurement]:
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
        results = measured(paths, options.settings, CLOSING_ROUNDS)
        replace_file(options.folder / "model.onnx", paths["after"].read_bytes())
    return results
