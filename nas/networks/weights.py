"""A network with its weights: given ones, those beside its arch.json, or timm's."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast, overload

from nas.errors import DiskFull, UserError
from nas.networks.build import classifier_names, create
from nas.networks.pretrained import find_pretrained
from nas.networks.targets import Target, find_target
from nas.networks.timm_network import TIMM, TimmNetwork
from nas.text import first_line
from nas.units import listed

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nas.networks.timm_network import TimmModel
    from search_spaces import Arch
    from search_spaces.checkpoints import Loaded
    from search_spaces.network import Network


@overload
def load(network: Arch, weights: str | Path | None = None, what: str | None = None) -> Network: ...
@overload
def load(network: TimmNetwork, weights: str | Path | None = None, what: str | None = None) -> TimmModel: ...
@overload
def load(
    network: str | Path | Target, weights: str | Path | None = None, what: str | None = None
) -> Network | TimmModel: ...
def load(
    network: str | Path | Target | Arch | TimmNetwork, weights: str | Path | None = None, what: str | None = None
) -> Network | TimmModel:
    """A network with its weights, in training mode: (B, 3, R, R) -> (B, classes) logits.

    What the weights lacked, and what was left out of them, is in the network's `untrained` and `loaded`; it carries
    what it was built from as `arch`.

    Args:
        network: a published name, an arch.json or a run's folder (see `nas.networks.targets.find_target`), an Arch, or
            a network of timm's.
        weights: "timm" (the published ones: see `nas.networks.pretrained`), or a file of PyTorch or safetensors. None:
            model.safetensors beside the arch.json, or the published ones of a name.
        what: how messages call the network or its weights. None: by the name it is given by.

    Raises:
        UserError: no such network, an ONNX file, no weights, or weights that do not fit.
    """
    from search_spaces import ArchError, create_model
    from search_spaces.checkpoints import WeightsError

    if isinstance(network, str | Path | Target):
        target = network if isinstance(network, Target) else find_target(str(network))
        named = what or target.label
        found, source = _network_of(target, named), weights or _weights_of(target, named)
    elif weights is not None:
        found, source, named = network, weights, what or ""
    else:
        raise UserError(f'{what or network.family}: give its weights, "timm" or a file')
    try:
        path = find_pretrained(found).path if str(source) == "timm" else Path(source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(found, TimmNetwork):
                return _load_timm(found, path)
            return create_model(found, weights=path)
    except DiskFull:
        raise
    except (ArchError, WeightsError, UserError) as error:
        raise UserError(f"{named}: {error}" if named else str(error)) from None


def load_as_trained(arch: Arch, weights: str | Path, *likely: int, what: str) -> Network:
    """As `load`, with a file, at the resolution that its weights were trained at; `likely` ones are tried first."""
    from search_spaces.weights import WeightsError, resolution_of

    with suppress(WeightsError):  # which `load` tells
        arch = arch.at(resolution_of(arch, Path(weights), likely) or arch.resolution)
    return load(arch, weights, what)


def resized(trained: Network, arch: Arch) -> Network:
    """A network of an Arch that differs from a trained one's in resolution alone, with its weights."""
    from pruning.transfer import transfer
    from search_spaces import create_model

    model = create_model(arch)
    model.load_state_dict(transfer(trained.arch, trained.state_dict(), arch))
    model.loaded, model.untrained = trained.loaded, trained.untrained
    return model


def _network_of(target: Target, named: str) -> Arch | TimmNetwork:
    if target.network is None:
        raise UserError(f"{named} is {target.kind}: give a folder with model.safetensors, or a published name")
    return target.network


def _weights_of(target: Target, named: str) -> str | Path:
    if target.weights is not None:
        return target.weights
    if target.folder is not None:
        raise UserError(f"{named} has no model.safetensors: `vitnas train` makes one")
    return "timm"


def _load_timm(network: TimmNetwork, weights: Path) -> TimmModel:
    """A network of timm's with weights in timm's naming, or in another that timm itself reads.

    Raises:
        UserError: it cannot be built. WeightsError: weights that cannot be read, or do not fit.
    """
    from search_spaces.checkpoints import WeightsError, read_checkpoint
    from search_spaces.weights import load_groups

    groups = read_checkpoint(weights)
    model = create(network)
    head = tuple(f"{name}." for name in classifier_names(model))
    adapted = _Adapted(model, head)
    try:
        loaded = load_groups(model, groups, {None: ()}, head or ("head.",), adapted)
    except WeightsError as error:
        raise WeightsError(f"{weights}: {error}") from None
    model.loaded, model.untrained = replace(loaded, note=adapted.told(loaded)), loaded.untrained
    return model


class _Adapted:
    """Brings weights to a network of timm's as timm itself does: other names, positions of another resolution."""

    def __init__(self, model: TimmModel, head: tuple[str, ...]) -> None:
        self._model, self._head = model, head
        self._resized: list[str] = []
        self._renamed = False

    def __call__(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own, state = self._model.state_dict(), dict(state)
        counts = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
        if not self._fits(counts | state):
            before, state = state, self._by_timm(state)
            self._renamed = not before.keys() >= state.keys()
            self._resized = [
                name for name, value in state.items() if name in before and value.numel() != before[name].numel()
            ]
        return counts | state  # files of PyTorch before 1.0 have no counts of batches, which nothing reads

    def _fits(self, state: Mapping[str, Tensor]) -> bool:
        """Whether there are the network's tensors as they are, whatever the classifier."""
        own = {name: value for name, value in self._model.state_dict().items() if not name.startswith(self._head)}
        return own.keys() <= state.keys() and all(value.shape == state[name].shape for name, value in own.items())

    def _by_timm(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the network's module in timm makes of them; raises WeightsError where it can make nothing."""
        import torch
        from timm.models import model_entrypoint

        from search_spaces.checkpoints import WeightsError

        module = sys.modules[model_entrypoint(self._model.arch.name.split(".")[0]).__module__]
        adapt = cast(
            "Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None",
            getattr(module, "checkpoint_filter_fn", None),
        )
        if adapt is None:
            return state
        try:
            with torch.no_grad():
                return adapt(state, self._model)
        except Exception as error:  # timm's functions take what was published, and stumble over anything else
            raise WeightsError(
                f"timm cannot bring these weights to {TIMM}{self._model.arch.name} at "
                f"{self._model.arch.resolution} px: {type(error).__name__}: {first_line(error)}"
            ) from None

    def told(self, loaded: Loaded) -> str | None:
        """The note on what became of the weights."""
        told = [loaded.note] if loaded.note else []
        if self._renamed:
            told.append("renamed as timm does")
        if self._resized:
            told.append(f"of another resolution: resized to {self._model.arch.resolution} px: {listed(self._resized)}")
        return "; ".join(told) or None
