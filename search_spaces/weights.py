"""State dicts from files or from timm, in our naming, timm's or the official repositories', into a built network."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from search_spaces.arch import Arch, ArchError
from search_spaces.checkpoints import Loaded, State, WeightsError, is_averaged, read_checkpoint
from search_spaces.registry import FAMILIES, Rules
from search_spaces.widths import resized_tensors

__all__ = [
    "Loaded",
    "WeightsError",
    "fit",
    "load_groups",
    "load_weights",
    "namings",
    "published_name",
    "read_checkpoint",
    "resolution_of",
    "translate",
]

COUNTERS = re.compile(r"(^|\.)(attention_bias_idxs|total_ops|total_params|n_averaged)$")
"""Tensors beside the weights that hold none: indices of a bias table, a profiler's and an average's counts."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Match:
    """A group of tensors under a prefix, renamed."""

    place: str
    """Keys that the group lies under in its file."""
    prefix: str
    """Prefix that was stripped from the names."""
    naming: str | None
    """Whose names they had; None: ours."""
    state: State
    """The tensors by our names."""
    found: int
    """Number of them that the network has."""


def load_weights(model: nn.Module, arch: Arch, weights: str | Path) -> Loaded:
    """Load `weights` ("timm" or a path) into `model`, which was built from `arch`; a classifier for another number of
    classes, or none, leaves the network's own as it is (with a warning).

    Raises:
        WeightsError: no such file, not a plain state dict (pickles with code are refused, never run), no
            pretrained weights for this Arch, or tensors that do not fit.
    """
    if str(weights) == "timm":
        return load_groups(model, {"": timm_state(arch)}, namings(arch))
    groups = read_checkpoint(Path(weights))
    try:
        return load_groups(model, groups, namings(arch))
    except WeightsError as error:
        raise WeightsError(f"{weights}: {error}") from None


def resolution_of(arch: Arch, weights: Path, likely: Iterable[int]) -> int | None:
    """The resolution in px that weights of an Arch's network were trained at, by the shapes of what follows it; the
    likely ones are tried first, then multiples of 32. None: it is none of them.

    Raises:
        WeightsError: no such file, or not one of weights.
    """
    groups, state = read_checkpoint(weights), None
    sizes: list[int] = [*likely, *range(32, 513, 32)]
    for px in sizes:
        try:
            with torch.device("meta"):
                model = FAMILIES[arch.family].build(arch.at(px))
        except ArchError:
            continue  # it cannot take these images
        own = model.state_dict()
        state = state or best_match(groups, own.keys(), namings(arch)).state
        if all(own[name].shape == state[name].shape for name in resized_tensors(model) & state.keys()):
            return px
    return None


def namings(arch: Arch) -> dict[str | None, Rules]:
    """Give, for each naming that an Arch's tensors may have, the rules that make it ours."""
    family = FAMILIES[arch.family]
    return {None: (), "timm's": family.rename, "the official repository's": family.official(arch)}


def load_groups(
    model: nn.Module,
    groups: Mapping[str, State],
    rules: Mapping[str | None, Rules],
    head: tuple[str, ...] = ("head.",),
    adapt: Callable[[State], State] = lambda state: state,
) -> Loaded:
    """Load the group that fits `model` best; plain weights go before averaged ones, as official evaluations take them.

    Args:
        head: how the names of the classifier's tensors begin.
        adapt: brings the group to the network's names and shapes.

    Raises:
        WeightsError: none fits.
    """
    own = model.state_dict().keys()
    best = best_match(groups, own, rules)
    state, distilled = without_distillation_token(best.state, own)
    state = adapt(state)
    found = sum(name in state for name in own)
    if 2 * found < len(own):
        names = _without_shared_prefix([name for group in groups.values() for name in group])[:3]
        keys = f" (under {', '.join(place for place in groups if place)})" if any(groups) else ""
        lack = "all" if not found else f"{len(own) - found} of the {len(own)}"
        raise WeightsError(f"the weights lack {lack} tensors of this network: they have {', '.join(names)}, ...{keys}")
    untrained = fit(model, state, head)
    classes = {state[name].shape[0] for name in untrained if name in state}
    return Loaded(untrained, classes.pop() if classes else None, _told(best, groups, distilled))


def best_match(groups: Mapping[str, State], own: Collection[str], rules: Mapping[str | None, Rules]) -> Match:
    """Find the group, prefix and naming with most of a network's names; of equals the first."""
    best = Match("", "", None, {}, -1)
    for place, group in groups.items():
        for prefix, state in unwrapped(_without_counters(group), len(own) // 2):
            for naming, pairs in rules.items():
                renamed = rename(state, pairs)
                match = Match(place, prefix, naming, renamed, sum(name in renamed for name in own))
                if match.found > best.found:
                    best = match
                if match.found == len(own) == len(renamed):
                    return match
    return best


def unwrapped(state: State, least: int, prefix: str = "") -> Iterator[tuple[str, State]]:
    """Yield a state dict, then those under each first part of its names (`module.`, `model.`) with more than `least`
    tensors, and so on, each with its prefix."""
    yield prefix, state
    parts: dict[str, State] = {}
    for name, value in state.items():
        first, dot, rest = name.partition(".")
        if dot:
            parts.setdefault(first, {})[rest] = value
    for first, part in sorted(parts.items(), key=lambda item: is_averaged(item[0])):
        if len(part) > least:
            yield from unwrapped(part, least, f"{prefix}{first}.")


def rename(state: State, rules: Rules) -> State:
    """Apply rules to a state dict's names."""
    if not rules:
        return state
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def translate(state: Mapping[str, Tensor], arch: Arch, own: Collection[str]) -> State:
    """Rename a state dict from ours, timm's or the official naming, perhaps under a prefix, to ours."""
    return best_match({"": dict(state)}, own, namings(arch)).state


def without_distillation_token(state: State, own: Collection[str]) -> tuple[State, bool]:
    """Make a distilled DeiT a plain one, without distillation token, its position and head; and say if it was one."""
    if "dist_token" not in state or "dist_token" in own or "pos_embed" not in state:
        return state, False
    plain = {name: value for name, value in state.items() if not name.startswith(("dist_token", "head_dist."))}
    positions = plain["pos_embed"]
    return plain | {"pos_embed": torch.cat((positions[:, :1], positions[:, 2:]), 1)}, True


def _told(match: Match, groups: Mapping[str, State], distilled: bool) -> str | None:
    told = []
    group = groups[match.place]
    if match.place:
        size = len(_without_counters(group))
        others = [name for name in groups if name != match.place and len(_without_counters(groups[name])) == size]
        told.append(f"taken from {match.place}" + (f", not {', '.join(others)}" if others else ""))
    if match.prefix:
        told.append(f"prefix {match.prefix} stripped")
    if match.naming:
        told.append(f"renamed from {match.naming} names")
    left = [name for name in group if not name.startswith(match.prefix) or COUNTERS.search(name)]
    if left:
        told.append(f"left out: {_few(left)}")
    if distilled:
        told.append("the distillation token and its head left out, so less accurate than published")
    return "; ".join(told) or None


def _without_shared_prefix(names: list[str]) -> list[str]:
    while len({name.partition(".")[0] for name in names}) == 1 and all("." in name for name in names):
        names = [name.partition(".")[2] for name in names]
    return names


def _without_counters(group: State) -> State:
    return {name: value for name, value in group.items() if not COUNTERS.search(name)}


def timm_state(arch: Arch) -> State:
    """Let timm fetch the pretrained weights of the published variant that `arch` is."""
    import timm

    name = timm_name(arch)
    try:
        with _offline_if_unreachable():
            return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:
        raise WeightsError(_not_fetched(name, error)) from None


def timm_name(arch: Arch) -> str:
    """Find timm's name for the published variant that `arch` is.

    Raises:
        WeightsError: timm has no weights for it.
    """
    name = published_name(arch)
    variant = name and FAMILIES[arch.family].variants[name].timm
    if not variant:
        raise WeightsError("timm has no pretrained weights for this Arch; give a file of weights")
    return variant


def published_name(arch: Arch) -> str | None:
    """Name the published variant that `arch` is, at whatever resolution and with whatever classes; None: it is none."""
    family = FAMILIES[arch.family]
    shape = family.as_published(arch)
    for name, variant in family.variants.items():
        try:
            if family.space.arch(variant.values, arch.num_classes).at(arch.resolution) == shape:
                return name
        except ArchError:
            continue  # it cannot take these images
    return None


def _not_fetched(name: str, error: Exception) -> str:
    """Say that timm could not fetch the weights of its network `name`, why, and what to do."""
    import timm

    config = timm.get_pretrained_cfg(name)
    hub = config.hf_hub_id if config is not None else None
    file = f"model.safetensors from https://huggingface.co/{hub}" if hub else "a file of weights"
    return f"timm could not fetch {name} ({_first_sentence(error)}): fetch {file} elsewhere and give --weights FILE"


def _first_sentence(error: Exception) -> str:
    """Give the first sentence of an error's message, or its class where it has none."""
    lines = str(error).strip().splitlines()
    return re.split(r"(?<=[a-z)\]])\. ", lines[0])[0].rstrip(".") if lines else type(error).__name__


@contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """Ask the weights' host once: without an answer its client retries for most of a minute before it looks at home."""
    from huggingface_hub import constants, get_session

    before = constants.HF_HUB_OFFLINE
    try:
        if not before:
            get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def fit(model: nn.Module, state: Mapping[str, Tensor], head: tuple[str, ...] = ("head.",)) -> list[str]:
    """Copy `state` into `model`; linear and 1x1-convolution weights take each other's shape, floats each other's type.

    head: how the names of the classifier's tensors begin.

    Returns:
        Names of classifier tensors that were left alone because the number of classes differs or there are none.

    Raises:
        WeightsError: tensors that are missing, unknown, of another shape or type, or not finite; or only zeros. The
            network is as it was.
    """
    own = model.state_dict()
    missing, extra = [name for name in own if name not in state], [name for name in state if name not in own]
    if extra or (missing and missing != [name for name in own if name.startswith(head)]):
        lacks = f"lack {_few(missing)}" if missing else ""
        has = f"have {_few(extra)}, which this network has not" if extra else ""
        hint = ""
        if all(name.startswith("head.dist.") for name in (*missing, *extra)):
            hint = f'; an Arch with "distilled": {"true" if extra else "false"} fits'
        raise WeightsError(f"the weights {' and '.join(part for part in (lacks, has) if part)}{hint}")
    skipped = list(missing)
    values = {}
    for name, target in own.items():
        if name in state:
            value = _value(name, state[name], target)
            if value.shape == target.shape:
                values[name] = value
            elif name.startswith(head) and value.shape[1:] == target.shape[1:]:
                skipped.append(name)
            else:
                hint = ""
                if name in resized_tensors(model):
                    hint = "; `vitnas train` resizes them, given the Arch at their resolution and --resolution"
                raise WeightsError(
                    f"{name} is {tuple(value.shape)} in the weights but {tuple(target.shape)} in the network{hint}"
                )
    if not any(value.any() for value in values.values() if value.ndim > 1):
        raise WeightsError("the weights are all zero")
    for name, value in values.items():
        own[name].copy_(value)
    if skipped:
        warnings.warn(f"no classifier for these classes, left untrained: {', '.join(skipped)}", stacklevel=2)
    return skipped


def _value(name: str, value: Tensor, target: Tensor) -> Tensor:
    """Bring a tensor of the weights to the type and shape of its target in the network.

    Raises:
        WeightsError: it holds no values, is stored in another way, or is not finite.
    """
    if value.is_meta:
        raise WeightsError(f"{name} is a meta tensor, which holds no values")
    if value.layout != torch.strided or value.is_quantized:
        raise WeightsError(f"{name} is sparse or quantized: store it as a plain tensor of floats")
    if target.is_floating_point():
        if value.dtype not in FLOATS:
            kind = str(value.dtype).removeprefix("torch.")
            raise WeightsError(f"{name} is {kind} in the weights: this network takes floats")
        value = value.to(target.dtype)
        if not value.isfinite().all():
            raise WeightsError(f"the weights are not finite: {name} holds NaN or infinity")
    if value.shape != target.shape and value.numel() == target.numel() and _core(value) == _core(target):
        value = value.reshape(target.shape)
    return value


def _core(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.squeeze().shape)


def _few(names: list[str]) -> str:
    """List the first names, and say how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
