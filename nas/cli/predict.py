"""`vitnas predict`."""

from __future__ import annotations

import json
import os
import shutil
import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nas.cli.options import Json, Quiet, Threads, Verbose
from nas.errors import UserError

if TYPE_CHECKING:
    from nas.evaluate.predict import Encoded, Prediction

app = typer.Typer()
STDIN = "-"
TOP_OF_ONE = 5
"""Classes told where one image is named."""
NAMED = 32
"""Columns before an image's name: of a probability and a class."""
GAP = 2
NARROWEST = 16
"""Columns of an image's name at least."""


@app.command(
    short_help="Classify images with an ONNX file.",
    epilog="Example:  vitnas predict runs/pets photo.jpg\n\n"
    "Example:  vitnas predict model.onnx photos --top-k 3 --csv classes.csv\n\n"
    "Example:  curl -s URL | vitnas predict theirs.onnx - --preprocess imagenet --labels labels.txt",
)
def predict(
    model: Annotated[
        str,
        typer.Argument(help="An .onnx file, or the model.onnx of a run's or a network's folder, or of hf-hub:REPO."),
    ],
    images: Annotated[
        list[str], typer.Argument(help="Images, folders of them, or - for one image from standard input.")
    ],
    top_k: Annotated[
        int | None, typer.Option(help="Classes of each image.  [default: 5 of a single image, else 1]")
    ] = None,
    runtime: Annotated[str, typer.Option(help="onnxruntime or openvino, on the CPU.")] = "onnxruntime",
    threads: Threads = None,
    preprocess: Annotated[
        str | None,
        typer.Option(
            help="How an image becomes the input of a file that does not say it: imagenet, inception, clip, none "
            "(pixels from 0 to 1) or raw (to 255), after which key=value pairs may follow, as imagenet,resize=232; "
            "or a preprocess.json.  [default: as the file says]"
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="A file of the classes' names, one a line.  [default: those that the file says]"),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="CSV file to write the classes to.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Classify images with an ONNX file: classes with their probabilities. PyTorch is not loaded.

    Pixels and classes are as the file's own metadata say. A broken image is named and skipped. --json prints model,
    runtime, preprocess, predictions, skipped and notes; the columns of --csv are image, rank, class, index and
    probability.

    Exit codes: 0 done, 1 no image could be read, 2 bad input, 130 Ctrl-C.
    """
    from nas.evaluate.classes import read_labels
    from nas.evaluate.predict import PredictRequest
    from nas.evaluate.predict import predict as classify
    from nas.evaluate.preprocess import parse_preprocess
    from nas.files import check_output, replace_file

    single = len(images) == 1 and not Path(images[0]).is_dir()
    if images.count(STDIN) > 1:
        raise UserError("- is given twice: standard input holds one image")
    request = PredictRequest(
        model,
        [stdin() if each == STDIN else each for each in images],
        top_k=(TOP_OF_ONE if single else 1) if top_k is None else top_k,
        runtime=runtime,
        threads=threads,
        preprocess=None if preprocess is None else parse_preprocess(preprocess),
        labels=None if labels is None else read_labels(labels),
    )
    if csv:
        check_output("--csv", csv, inputs=chain((labels or "", preprocess or ""), request.files()))
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    found = classify(request, show=lambda each: None if as_json else print(told(each, request.top_k, width)))
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    if csv:
        replace_file(csv, found.to_csv().encode(errors="surrogateescape"))
    if not found.predictions:
        raise typer.Exit(1)


def stdin() -> Encoded:
    """The image on standard input.

    Raises:
        UserError: there is none.
    """
    from nas.evaluate.predict import Encoded

    closed = sys.stdin is None or sys.stdin.isatty()
    content = b"" if closed else sys.stdin.buffer.read()
    if not content:
        raise UserError("- is one image from standard input, which is empty: pipe an image into it")
    first, *_ = content[:4096].splitlines() or [b""]
    if Path(os.fsdecode(first.replace(b"\0", b""))).is_file():
        raise UserError("- is one image, but standard input holds names of images: pipe them through xargs")
    return Encoded(content, STDIN)


def told(prediction: Prediction, top_k: int, width: int) -> str:
    """A line for an image, or one for each of its classes. width: of the terminal, in columns; 0: of none, where
    nothing is cut."""
    from nas.units import shown

    several, name = top_k > 1, shown(prediction.image)
    classes = [f"{guess.probability:6.1%}  {shown(guess.label)}" for guess in prediction.guesses]
    if width:
        classes = [shortened(line, width if several else width - NARROWEST - GAP) for line in classes]
    if several:
        return "\n".join([name, *classes])
    line = classes[0].ljust(NAMED) + " " * GAP
    return line + (shortened(name, width - len(line), end=True) if width else name)


def shortened(text: str, width: int, end: bool = False) -> str:
    """At most `width` columns of its beginning, or of its end."""
    if len(text) <= width:
        return text
    return f"…{text[1 - width :]}" if end else f"{text[: width - 1]}…"
