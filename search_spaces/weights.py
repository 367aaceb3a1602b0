"""State dicts from files or from timm, in timm's naming or in ours, into a built network."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from search_spaces.arch import Arch
from search_spaces.registry import FAMILIES

State = Mapping[str, Tensor]


class WeightsError(ValueError):
    """Weights that cannot be had or do not fit, in one line."""


def load_weights(model: nn.Module, arch: Arch, weights: str | Path) -> list[str]:
    """Load `weights` ("timm" or a path) into `model`, which was built from `arch`.

    Returns:
        Names of tensors left at their initialisation: a classifier for another number of classes (with a warning).

    Raises:
        WeightsError: no such file, not a plain state dict (pickles with code are refused, never run), no
            pretrained weights for this Arch, or tensors that do not fit (the first one is named).
    """
    state = timm_state(arch) if str(weights) == "timm" else read_state(Path(weights))
    return fit(model, translate(state, arch.family, set(model.state_dict())))


def timm_state(arch: Arch) -> State:
    """Pretrained weights of the published variant that `arch` is, fetched by timm."""
    import timm

    family = FAMILIES[arch.family]
    shape = arch.replace(form="linear") if arch.family == "levit" else arch
    for variant in family.variants.values():
        if variant.timm and family.space.arch(variant.values, arch.num_classes) == shape:
            try:
                with offline_if_unreachable():
                    return timm.create_model(variant.timm, pretrained=True).state_dict()
            except Exception as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise WeightsError(f"timm could not fetch {variant.timm}: {reason[:200]}") from None
    raise WeightsError("timm has no pretrained weights for this Arch; give a .safetensors or .pth file")


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Ask the weights' host once: without an answer its client retries for most of a minute before it looks at home."""
    from huggingface_hub import constants, get_session

    before = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def read_state(path: Path) -> State:
    """Read a .safetensors file or a .pth/.pt/.bin state dict (only tensors are unpickled)."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path}: not a readable safetensors file ({error})") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError):
        raise WeightsError(f"{path}: not a plain state dict of tensors (other pickles are refused)") from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"{path}: holds no state dict of tensors")
    return state


def translate(state: State, family: str, ours: set[str]) -> dict[str, Tensor]:
    """Names as ours: unchanged if they are already, else through the family's table for timm's."""
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if ours <= state.keys():
        return state
    renamed = {}
    for name, value in state.items():
        if name.endswith("attention_bias_idxs"):
            continue
        for pattern, replacement in FAMILIES[family].rename:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def fit(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Copy `state` into `model`; linear and 1x1-convolution weights take each other's shape.

    Returns:
        Names of classifier tensors that were left alone because the number of classes differs.

    Raises:
        WeightsError: naming the first tensor that is missing, unknown, or of the wrong shape.
    """
    own = model.state_dict()
    for name in own:
        if name not in state:
            raise WeightsError(f"the weights lack {name} ({_others(own.keys() - state.keys())})")
    for name in state:
        if name not in own:
            raise WeightsError(
                f"the weights have {name}, which this network has not ({_others(state.keys() - own.keys())})"
            )
    skipped = []
    for name, target in own.items():
        value = state[name]
        if value.shape != target.shape and value.numel() == target.numel() and _core(value) == _core(target):
            value = value.reshape(target.shape)
        if value.shape != target.shape:
            if name.startswith("head.") and value.shape[1:] == target.shape[1:]:
                skipped.append(name)
                continue
            raise WeightsError(
                f"{name} is {tuple(value.shape)} in the weights but {tuple(target.shape)} in the network"
            )
        target.copy_(value)
    if skipped:
        warnings.warn(
            f"classifier for another number of classes, left untrained: {', '.join(skipped)}",
            stacklevel=2,
        )
    return skipped


def _core(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.squeeze().shape)


def _others(names: set[str]) -> str:
    return f"{len(names)} such tensors" if len(names) > 1 else "the only such tensor"
