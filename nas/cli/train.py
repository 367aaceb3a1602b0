"""`vitnas train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from nas.cli.options import (
    SEEDS,
    Data,
    DynamicBatch,
    InGraph,
    Json,
    Opset,
    Probabilities,
    Quiet,
    TrainThreads,
    Verbose,
    WeightsFrom,
    command_line,
    file_options,
)
from nas.errors import UserError
from nas.export.options import OPSET

app = typer.Typer()


@app.command(
    short_help="Train a network on your images.",
    epilog="Examples:\n\n  vitnas train efficientvit_m1 --data ./images --minutes 10\n\n"
    "  vitnas train timm/lcnet_050 --data ./images --resolution 128 --probe\n\n"
    "  vitnas train levit_192 --data ./images --weights-from ./checkpoints\n\n"
    "  vitnas train runs/pets/best --data ./images --from-scratch --epochs 100\n\n"
    "  torchrun --nproc-per-node 8 -m nas.cli train levit_192 --data ./imagenet --recipe levit "
    "--teacher timm/regnety_160.deit_in1k --precision bf16",
)
def train(
    model: Annotated[
        str,
        typer.Argument(
            help="A published name, timm/NAME, hf-hub:REPO, an arch.json, or a run's folder; @PX sets its size."
        ),
    ],
    data: Data = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="quick, finetune, or a published one: levit, efficientvit, evit, shvit, sepvit.  [default: finetune, "
            "from weights; quick, from random ones]"
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="Epochs.  [default: in fine-tuning, 3 to 30 by the number of images; else the recipe's]"),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="How long to train, instead of --epochs: as many as fit, one at least.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images an update, of all processes.  [default: the recipe's]")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Highest learning rate.  [default: in fine-tuning, by short trials; else the recipe's; scaled with "
            "the batch size]"
        ),
    ] = None,
    resolution: Annotated[int | None, typer.Option(help="Input resolution in px.  [default: the network's]")] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Weights to start from: a PyTorch or safetensors file, timm, or none.  [default: the run's own; else "
            "the published ones, if there are any]"
        ),
    ] = None,
    weights_from: WeightsFrom = None,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="Start from random weights.")] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="Train a linear classifier on the frozen network alone: a minute.")
    ] = False,
    num_classes: Annotated[int | None, typer.Option(help="Classes the data must have.")] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Distil from timm/NAME, a published name, or a folder with weights, where a short trial shows that it "
            "helps. One of other classes is fine-tuned on the images first."
        ),
    ] = None,
    teacher_weights: Annotated[
        str | None, typer.Option(help="The teacher's weights, a file.  [default: timm's, or the folder's own]")
    ] = None,
    distillation: Annotated[
        str | None,
        typer.Option(
            help="hard (the teacher's choice), soft (its logits) or features (which need no fine-tuned teacher).  "
            "[default: the recipe's]"
        ),
    ] = None,
    unlabelled: Annotated[
        str | None, typer.Option(help="A folder of more images, without labels, for --distillation features.")
    ] = None,
    oracle: Annotated[
        str | None, typer.Option(help="For EViT: a trained DeiT of its depth that lends weights and chooses tokens.")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16 (autocast).")] = "fp32",
    accumulate: Annotated[int, typer.Option(help="Parts that the images of an update are split into.")] = 1,
    compiled: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes that decode images.  [default: 0 on cpu, else up to 8]")
    ] = None,
    train_threads: TrainThreads = None,
    dynamic_batch: DynamicBatch = False,
    preprocess_in_graph: InGraph = False,
    opset: Opset = OPSET,
    probabilities: Probabilities = False,
    seed: Annotated[int, typer.Option(help="Seed of splits, weights and training.", **SEEDS)] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.  [default: cuda where there is one]")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to.  [default: one in runs/]")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Train a network on images, from pretrained weights where there are any.

    First a linear classifier is fitted to the frozen network (a probe), and short trials choose the learning rate, by
    images held out of the training images. If the chosen trial is about as good as the probe, on enough images to
    tell, the whole network is then trained on all of them; else without those held out, which choose the better one.
    The reported accuracy is on the validation images, with the last epoch's weights or, if it is kept, the probe. The
    same command continues an interrupted training.

    Exit codes: 0 done, 1 the training or its ONNX file failed (the last good epoch or the probe is kept) or the disk is
    full, 2 bad input, 130 Ctrl-C.
    """
    from nas.cli.progress import load

    load("nas.training.engine", quiet)
    from nas.cli.display import show_train
    from nas.cli.progress import waiting, watch_images
    from nas.threads import training_threads
    from nas.training.recipes import FINETUNE, Recipe
    from nas.training.request import (
        PROBE,
        RANDOM,
        TrainRequest,
        check_device,
        choose_recipe,
        default_folder,
        default_workers,
    )
    from nas.training.run import train as run_train
    from nas.training.start import with_usual_recipe
    from nas.units import listed

    if epochs is not None and minutes is not None:
        raise UserError("--epochs and --minutes: give one of them")
    if from_scratch and weights not in (None, RANDOM):
        raise UserError(f"--from-scratch and --weights {weights}: give one of them")
    of_recipe = {"recipe": recipe, "epochs": epochs, "batch-size": batch_size, "lr": lr, "distillation": distillation}
    given = [f"--{name}" for name, value in of_recipe.items() if value is not None]
    if probe and given:
        raise UserError(f"--probe trains a linear classifier alone: leave out {listed(given)}")
    device = check_device(device)

    def by(name: str) -> Recipe:
        return choose_recipe(name, epochs, batch_size, lr, distillation)

    request = TrainRequest(
        model=model,
        recipe=by(recipe or FINETUNE.name),
        device=device,
        folder=out or default_folder(model, recipe or (PROBE if probe else FINETUNE.name)),
        data=data,
        resolution=resolution,
        num_classes=num_classes,
        weights=RANDOM if from_scratch else weights,
        weights_from=weights_from,
        probe=probe,
        teacher=teacher,
        teacher_weights=teacher_weights,
        unlabelled=unlabelled,
        oracle=oracle,
        precision=precision,
        accumulate=accumulate,
        compiled=compiled,
        workers=default_workers(device) if workers is None else workers,
        seed=seed,
        minutes=minutes,
        file=file_options(
            dynamic_batch=dynamic_batch, in_graph=preprocess_in_graph, opset=opset, probabilities=probabilities
        ),
    )
    if distillation is not None and teacher is None:
        raise UserError(f"--distillation {distillation} needs --teacher")
    request.check()
    start = None
    if recipe is None and not probe:
        with waiting("looking for weights", quiet) as counted:
            request, start = with_usual_recipe(request, by, out is not None, counted)
    with watch_images(quiet) as (progress, say), training_threads(train_threads, say, device):
        result = run_train(request, progress, say, command=command_line(), start=start)
    if result is None:  # the first of torchrun's processes speaks for all
        return
    show_train(result, request.folder, to_stderr=as_json)
    if as_json:
        print(json.dumps(result.to_json() | {"folder": str(request.folder)}))
    raise typer.Exit(1 if result.error else 0)
