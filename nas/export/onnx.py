"""Networks as ONNX: BatchNorm folded, as the options of a file say."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from nas.data.pixels import IMAGENET, Pixels
from nas.export.card import PREFIX, Card
from nas.export.graph import IMAGES, LOGITS, finish, to_half
from nas.export.options import OPSET, FileOptions

if TYPE_CHECKING:
    from torch import nn

    from nas.networks.timm_network import TimmNetwork
    from search_spaces import Arch


TRACED = 2
"""Images in the batch that a graph for any number of them is traced with: 1 would be taken for a constant."""


def to_onnx(folded: nn.Module, path: Path, resolution: int, batch_size: int | None = 1, opset: int = OPSET) -> None:
    """Write a folded model as ONNX with the input "images" (batch_size, 3, R, R) and output "logits".

    batch_size: None: any.

    The TorchScript exporter is used: for these models it is 5 to 10 times faster than the dynamo one.

    Raises:
        RuntimeError: the graph cannot be exported.
    """
    import logging

    import torch

    like = next(folded.parameters(), torch.zeros(()))
    images = like.new_zeros(batch_size or TRACED, 3, resolution, resolution)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            folded,
            (images,),
            str(path),
            input_names=[IMAGES],
            output_names=[LOGITS],
            opset_version=opset,
            dynamic_axes=None if batch_size else {IMAGES: {0: "batch"}, LOGITS: {0: "batch"}},
            dynamo=False,
        )


def to_file(
    folded: nn.Module,
    path: Path,
    resolution: int,
    options: FileOptions,
    pixels: Pixels = IMAGENET,
) -> None:
    """Write a folded model as ONNX, as `options` say, in fp32 or fp16; `nas.evaluate.precision` makes int8 of fp32.

    pixels: what the file makes of bytes with `options.in_graph`.

    Raises:
        RuntimeError, ValueError: the graph cannot be exported or changed.
    """
    to_onnx(folded, path, resolution, options.batch_size, options.opset)
    if options.precision == "fp16":
        to_half(path)
    finish(path, options, pixels)


def write_onnx(network: Arch | TimmNetwork, path: Path, options: FileOptions, pixels: Pixels = IMAGENET) -> None:
    """Write a network with random weights (see `nas.networks.build.build`), folded, as ONNX; see `to_file`."""
    from nas.networks.build import build

    to_file(build(network), path, network.resolution, options, pixels)


def label_onnx(path: Path, arch: Arch | TimmNetwork | None, trained: bool, card: Card) -> None:
    """Store a network's card, its document where it has one, and whether its weights are trained in the file's
    metadata.

    Raises:
        ValueError: the labelled file would pass 2 GB, protobuf's limit.
    """
    import onnx

    model = onnx.load(path)
    facts = {} if arch is None else {f"{PREFIX}arch": arch.to_json()}
    facts |= {f"{PREFIX}weights": "trained" if trained else "untrained"} | card.metadata()
    onnx.helper.set_model_props(model, facts)
    model.producer_name, model.producer_version = "vitnas", version("vitnas")
    onnx.save(model, path)
