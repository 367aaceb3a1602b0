"""What verbs share: their common options, and the command as typed."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from nas.export.options import OPSETS, FileOptions

log = logging.getLogger("nas")
Device = Annotated[str, typer.Option(help="Device to measure on: cpu, cuda, or ssh://[user@]host[:port][/cuda].")]
RUNTIMES = "onnxruntime, openvino, torch, torch.compile, cudagraphs or tensorrt"
DEFAULT_RUNTIME = "[default: onnxruntime on cpu, torch on cuda]"
RuntimeName = Annotated[str | None, typer.Option(help=f"{RUNTIMES}.  {DEFAULT_RUNTIME}")]
Threads = Annotated[int | None, typer.Option(help="CPU threads.  [default: the physical cores this process may use]")]
TrainThreads = Annotated[
    int | None, typer.Option(help="CPU threads of trainings.  [default: the CPUs that are idle, adjusted every 20 s]")
]
BatchSize = Annotated[int, typer.Option(help="Images per inference.")]
DynamicBatch = Annotated[
    bool, typer.Option("--dynamic-batch", help="Write an ONNX file that takes any number of images at once.")
]
InGraph = Annotated[
    bool,
    typer.Option(
        "--preprocess-in-graph",
        help="Write an ONNX file that takes the bytes of cropped images, uint8 (B, R, R, 3), and normalises itself.",
    ),
]
Opset = Annotated[int, typer.Option(help=f"Version of ONNX's operators, {OPSETS[0]} to {OPSETS[-1]}.")]
Probabilities = Annotated[
    bool, typer.Option("--probabilities", help="Write an ONNX file that ends with softmax: probabilities, not logits.")
]


def file_options(
    *, dynamic_batch: bool, in_graph: bool, opset: int, probabilities: bool, batch_size: int = 1
) -> FileOptions:
    """How an ONNX file is to be written, in fp32."""
    return FileOptions(None if dynamic_batch else batch_size, in_graph, opset, probabilities)


PRECISIONS = "fp32, tf32, bf16, fp16 or int8, as the runtime can"
Precision = Annotated[str, typer.Option(help=f"{PRECISIONS}.")]
MaxDrop = Annotated[
    float, typer.Option(help="Points of top-1 that int8, fp16 or bf16 may cost on held-out images; more is infeasible.")
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Images: a folder (train/<class>/ and val/<class>/, or <class>/), torch/NAME, hfds/NAME or "
        "wds/SHARDS.  [default: digits, a demo]"
    ),
]
WeightsFrom = Annotated[
    Path | None,
    typer.Option(
        help="A folder to look for published weights in, without internet: NAME.safetensors, NAME.pth or NAME.bin. "
        " [default: $VITNAS_WEIGHTS, then timm's cache, then a download]"
    ),
]
SEEDS = {"min": 0, "max": 2**32 - 1}  # as all generators in use take them


def be_verbose(verbose: bool) -> bool:
    """Let the loggers of this package speak."""
    if verbose:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.DEBUG)
    return verbose


Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Show where the time goes, and tracebacks of errors.", callback=be_verbose),
]


def be_quiet(quiet: bool) -> bool:
    """Let the loggers of this package tell errors only; --verbose prevails."""
    if quiet and log.level == logging.NOTSET:
        log.setLevel(logging.ERROR)
    return quiet


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.", callback=be_quiet)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Model = Annotated[str, typer.Argument(help="A published name, an arch.json, a run's folder, timm/NAME or hf-hub:REPO.")]


def command_line() -> str:
    """The command as typed, without passwords."""
    from nas.text import mask_url

    words = [word if "://" not in word else mask_url(word) for word in sys.argv[1:]]
    return shlex.join(["vitnas", *words])
