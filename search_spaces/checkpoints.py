"""Files of weights as people have them, told apart by what they hold: PyTorch's (zip and older) and safetensors."""

from __future__ import annotations

import argparse
import functools
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.serialization import safe_globals

State = dict[str, Tensor]

SAFETENSORS_HEADER = 100_000_000
"""Bytes of the largest header that safetensors reads."""

WEIGHTS = r"(?i)\.(safetensors|bin|pth|pt|ckpt)$"
"""Usual names of files of weights."""

LEVELS = 2
"""How deep a state dict may lie in what a file holds."""


class WeightsError(ValueError):
    """Weights that cannot be had or do not fit, in one line."""


@dataclass(frozen=True)
class Loaded:
    """What became of weights that were loaded into a network."""

    untrained: list[str]
    """Names of tensors left at their initialisation, those of a classifier."""
    classes: int | None
    """Number of classes of the weights' own classifier, where it is another."""
    note: str | None
    """What was taken, renamed and left out, in one line; None if nothing was."""


def read_checkpoint(path: Path) -> dict[str, State]:
    """The groups of named tensors in a file, by the keys they lie under; those of averaged weights come last.

    Only tensors and plain data are unpickled: numbers, containers, `argparse.Namespace`, paths and NumPy's values.

    Raises:
        WeightsError: no such file, none of weights, a damaged one, or one with other Python objects.
    """
    held = _read(path)
    groups = dict(sorted(_groups(held), key=lambda group: is_averaged(group[0])))
    if not groups:
        what = "nothing"
        if isinstance(held, Mapping) and held:
            what = ", ".join(map(str, list(held)[:5]))
        elif not isinstance(held, Mapping):
            what = f"a {type(held).__name__}"
        raise WeightsError(f"{path}: holds no named tensors, but {what}")
    return groups


def is_averaged(place: str) -> bool:
    """Whether a group is by its name a running average of the weights."""
    return re.search(r"(?i)(^|[._])(ema|swa)|averag", place) is not None


def _read(path: Path) -> Any:
    try:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if re.search(WEIGHTS, file.name))
            raise WeightsError(f"{path}: a folder" + (f": give {inside[0]}" if inside else " without weights"))
        if not path.is_file():
            raise WeightsError(f"{path}: no such file")
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror}") from None
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= SAFETENSORS_HEADER:
        return _safetensors(path)
    if start.startswith(b"PK\x03\x04"):
        _check_zip(path)
    elif not start.startswith(b"\x80"):
        raise WeightsError(f"{path}: {_nature(start)}")
    return _unpickled(path)


def _nature(start: bytes) -> str:
    """What a file is that holds no weights."""
    text = start.lstrip().lower()
    if not text:
        return "an empty file"
    if text.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS: `git lfs pull` fetches the weights"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not the weights"
    if text.startswith(b"{"):
        return "a JSON document: give the file that holds the tensors"
    return "neither a PyTorch file nor safetensors"


def _safetensors(path: Path) -> State:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise WeightsError(f"{path}: damaged or cut off, not a readable safetensors file ({error})") from None


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        raise WeightsError(f"{path}: damaged or cut off: the end of the archive is missing") from None
    if any(name.endswith("/constants.pkl") for name in names):
        raise WeightsError(f"{path}: a TorchScript archive: give what torch.save(model.state_dict(), ...) writes")
    if not any(name.endswith("data.pkl") for name in names):
        raise WeightsError(f"{path}: an archive, but not PyTorch's: give a state dict or safetensors")


def _unpickled(path: Path) -> Any:
    try:
        with path.open("rb") as file, safe_globals(list(plain_types())), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on what is then refused
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"Python objects ({named[1]})" if named else "something other than tensors and plain data"
        raise WeightsError(
            f"{path}: holds {what}, refused and not run: give a state dict (torch.save(model.state_dict(), ...))"
        ) from None
    except Exception:  # a damaged pickle makes the unpickler stumble in any way
        raise WeightsError(f"{path}: damaged or cut off, not a readable PyTorch file") from None


@functools.cache
def plain_types() -> tuple[Any, ...]:
    """Types of plain data in training checkpoints, under each name they were ever pickled by; paths become pure ones,
    which any system has. Of NumPy's types those of numbers: the state of others can forge pointers."""
    paths = [
        (pure, f"{module}.{name}")
        for pure, names in (
            (pathlib.PurePosixPath, ("PosixPath", "PurePosixPath")),
            (pathlib.PureWindowsPath, ("WindowsPath", "PureWindowsPath")),
        )
        for name in names
        for module in ("pathlib", "pathlib._local")
    ]
    scalar, rebuild = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    functions = [
        (function, f"numpy.{core}.multiarray.{name}")
        for function, name in ((scalar, "scalar"), (rebuild, "_reconstruct"))
        for core in ("core", "_core")
    ]
    numbers = {type(np.dtype(code)) for code in "?" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]}
    return (argparse.Namespace, *paths, *functions, *numbers, np.dtype, np.ndarray)


def _groups(held: Any, place: str = "", levels: int = LEVELS) -> Iterator[tuple[str, State]]:
    if not isinstance(held, Mapping):
        return
    tensors = {name: _tensor(value) for name, value in held.items() if isinstance(name, str) and _is_tensor(value)}
    if tensors:
        yield place, tensors
    for key, value in held.items() if levels else ():
        yield from _groups(value, f"{place}.{key}" if place else str(key), levels - 1)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "fiub")


def _tensor(value: Tensor | np.ndarray) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.from_numpy(value)
