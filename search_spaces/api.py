"""Names and documents to networks."""

from __future__ import annotations

import difflib
import functools
from pathlib import Path

import torch
from torch import Tensor

from search_spaces import efficientvit, evit, levit, sepvit, shvit  # noqa: F401  (each registers its family)
from search_spaces.arch import Arch, ArchError
from search_spaces.counting import Tally, total
from search_spaces.network import Network, fold
from search_spaces.registry import FAMILIES, Variant
from search_spaces.weights import load_weights
from search_spaces.widths import Table, width_table

__all__ = ["count", "create_model", "find_variant", "fold", "get_arch", "list_models", "stage_counts", "table"]

MAX_PARAMS = 500_000_000


def list_models() -> list[str]:
    """Names of all published variants, family by family."""
    return [name for family in FAMILIES.values() for name in family.variants]


def find_variant(name: str) -> tuple[str, Variant]:
    """A published variant and its family's name.

    Raises:
        KeyError: no such name; the message names near ones.
    """
    for family in FAMILIES.values():
        if name in family.variants:
            return family.name, family.variants[name]
    near = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "`vitnas models` lists them"
    raise KeyError(f"unknown model {name!r}: {hint}")


def get_arch(name: str, num_classes: int = 1000) -> Arch:
    """The Arch of a published variant.

    Raises:
        KeyError: no such name. ArchError: a number of classes outside 1..100000.
    """
    family, variant = find_variant(name)
    return FAMILIES[family].space.arch(variant.values, 1000).replace(num_classes=num_classes)


@functools.lru_cache(maxsize=256)
def table(arch: Arch) -> Table:
    """The width table of an Arch, from a build on the meta device (no memory, no weights).

    Raises:
        ArchError: more parameters than fit an ONNX file (2 GB).
    """
    with torch.device("meta"):
        found = width_table(FAMILIES[arch.family].build(arch))
    _check_params(found.params())
    return found


def _check_params(params: int) -> None:
    if params > MAX_PARAMS:
        raise ArchError(f"{params:,} parameters are more than the {MAX_PARAMS:,} this tool builds")


def stage_counts(arch: Arch) -> list[Tally]:
    """Parameters and MACs of each stage (a row of `Arch.summary`): the stem's count to the first, the classifier's to
    the last. A family that does not count from the document has one entry for all.
    """
    count = FAMILIES[arch.family].count
    if count is not None:
        return list(count(arch))
    found = table(arch)
    return [Tally(found.params(), found.macs())]


def count(arch: Arch) -> Tally:
    """Parameters and MACs of an Arch: those of its `table`, without a build.

    Raises:
        ArchError: more parameters than fit an ONNX file (2 GB).
    """
    found = total(stage_counts(arch))
    _check_params(found.params)
    return found


def create_model(
    name_or_arch: str | Arch, num_classes: int | None = None, weights: str | Path | None = None
) -> Network:
    """Build a network: (B, 3, R, R) -> (B, num_classes) logits; images of another size are a ValueError.

    Args:
        name_or_arch: a published name or an Arch.
        num_classes: None keeps the Arch's own (1000 for a name).
        weights: None (random), "timm" (timm's pretrained ones, fetched by timm), or a path to a checkpoint of PyTorch
            or safetensors in our naming, timm's or the official repository's.

    Raises:
        KeyError: unknown name. ArchError: too large. WeightsError: weights that do not fit or cannot be had.
    """
    arch = get_arch(name_or_arch) if isinstance(name_or_arch, str) else name_or_arch
    if num_classes is not None:
        arch = arch.replace(num_classes=num_classes)
    count(arch)  # refuses what is too large
    model = FAMILIES[arch.family].build(arch)
    model.arch = arch
    model.register_forward_pre_hook(_check_size)
    model.loaded = load_weights(model, arch, weights) if weights is not None else None
    model.untrained = model.loaded.untrained if model.loaded else list(model.state_dict())
    return model


def _check_size(model: Network, inputs: tuple[Tensor]) -> None:
    """Refuse images of another size than the network's; graphs that are being recorded stay as they are."""
    if not inputs or torch.jit.is_tracing() or torch.compiler.is_compiling():  # type: ignore[attr-defined, no-untyped-call]
        return
    size, (height, width) = model.arch.resolution, inputs[0].shape[-2:]
    if (height, width) != (size, size):
        got = f"{height} px" if height == width else f"{height}x{width} px"
        raise ValueError(
            f"{model.arch.family} built for {size} px got {got}: build it from arch.replace(resolution={height})"
        )
