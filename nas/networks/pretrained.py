"""Pretrained weights of a network: in a folder of the user's, in timm's caches, or downloaded as timm would.

What timm downloads: `model.safetensors` of its repository on the Hugging Face hub or, of a few old networks, a file by
its URL through torch.hub. Nothing is unpickled here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nas.errors import DiskFull, UserError, disk_errors
from nas.files import expanded
from nas.identity import LENGTH, file_digest
from nas.networks.hub import Bytes, HubError, Unreached, blob, cached, download, stated
from nas.networks.timm_network import TIMM, TimmNetwork
from nas.text import first_sentence

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

    from search_spaces import Arch

OPTION = "--weights-from"
VARIABLE = "VITNAS_WEIGHTS"
"""In the environment: a folder of weights for every command."""
ENDINGS = (".safetensors", ".pth", ".bin")
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""As timm's repositories on the hub call their weights; the first that there is."""


class NoPretrained(UserError):
    """Nobody published weights for this network: it can only begin with random ones."""


@dataclass(frozen=True)
class Pretrained:
    """A file of pretrained weights."""

    name: str
    """The network whose weights these are, as a command takes it: efficientvit_m1, timm/lcnet_050."""
    path: Path
    source: Literal["folder", "cache", "download"]
    """Where it was found."""
    digest: str
    """The first 16 hexadecimal digits of its SHA-256 (`nas.identity.file_digest`)."""
    timm: str | None
    """timm's name of these weights, with tag. `timm.get_pretrained_cfg` of it states the images that they were trained
    on: mean, std, interpolation, crop_pct, input_size, num_classes. None: timm has none of this network."""
    remark: str = ""
    """Where else it was looked for, and what was wrong there; "" where nothing was."""

    @property
    def line(self) -> str:
        """What was found, where, and its hash."""
        where = {
            "folder": f"from {self.path}",
            "cache": f"{self.timm}, from timm's cache",
            "download": f"{self.timm}, downloaded",
        }[self.source]
        remark = f"; {self.remark}" if self.remark else ""
        return f"pretrained weights of {self.name}: {where} (sha256 {self.digest}){remark}"


@dataclass(frozen=True)
class _Wanted:
    """label: how messages call the network. names: of its file in a folder, without ending, the most exact first.
    config: timm's, of the weights that timm has; None: it has none."""

    label: str
    names: Sequence[str]
    config: PretrainedCfg | None

    @property
    def timm(self) -> str | None:
        return f"{self.config.architecture}.{self.config.tag}" if self.config is not None else None


def find_pretrained(
    network: Arch | TimmNetwork, folder: Path | None = None, progress: Bytes | None = None
) -> Pretrained:
    """Find the pretrained weights of a network: in `folder`, in that of $VITNAS_WEIGHTS, in timm's cache, or download
    them into it; the first of these that has them.

    In a folder they are called NAME.safetensors, NAME.pth or NAME.bin, where NAME is the network's published name, or
    timm's with or without the weights' tag. Whether they fit is for `nas.networks.weights.load` to see.

    Args:
        network: a published network at any resolution and with any number of classes, or one of timm's.
        progress: told of a download.

    Raises:
        NoPretrained: nobody published weights for it, and no folder holds any.
        UserError: a folder that is missing or without weights, a download that fails, or a damaged file in the cache
            that cannot be fetched again.
        Unreached: a download without a connection.
        DiskFull: no room for the download.
    """
    wanted = _wanted(network)
    found, looked = _given(wanted, folder)
    if found is not None:
        return found
    if wanted.config is None:
        if folder is not None:
            named = f": call its file {wanted.names[0]}.safetensors" if wanted.names else ""
            raise NoPretrained(f"{OPTION} {folder} holds no weights of {wanted.label}, and timm has none{named}")
        raise NoPretrained(f"there are no pretrained weights of {wanted.label}")
    fetch = _from_hub if wanted.config.hf_hub_id else _from_url
    try:
        path, source, digest, remark = fetch(wanted, wanted.config, progress)
    except DiskFull:
        raise
    except UserError as error:
        raise type(error)("; ".join((*looked, str(error)))) from None
    told = "; ".join(filter(None, (*looked, remark)))
    return Pretrained(wanted.label, path, source, digest[:LENGTH], wanted.timm, told)


def find_here(network: Arch | TimmNetwork, folder: Path | None = None) -> Pretrained | None:
    """As `find_pretrained`, without downloading; None where they are not on this machine. A damaged file in the cache
    is not there: a download replaces it.

    Raises:
        UserError: a folder that is missing or without weights.
    """
    wanted = _wanted(network)
    found, looked = _given(wanted, folder)
    if found is not None or wanted.config is None:
        return found
    kept = _kept_by_hub(wanted.config) if wanted.config.hf_hub_id else _kept_by_url(wanted.config)
    if kept.path is None or not kept.whole:
        return None
    return Pretrained(wanted.label, kept.path, "cache", kept.digest[:LENGTH], wanted.timm, "; ".join(looked))


def _given(wanted: _Wanted, folder: Path | None) -> tuple[Pretrained | None, list[str]]:
    """The file in `folder` or in that of $VITNAS_WEIGHTS, and which of them hold none."""
    looked: list[str] = []
    for option, place in ((OPTION, folder), (VARIABLE, os.environ.get(VARIABLE))):
        if place:
            path = _in_folder(expanded(place), option, wanted.names)
            if path is not None:
                digest = file_digest(path)
                return Pretrained(wanted.label, path, "folder", digest, wanted.timm, "; ".join(looked)), looked
            looked.append(f"{place} holds no {wanted.label}")
    return None, looked


def check_folder(folder: Path) -> None:
    """See that a folder of the user's holds files of weights, whatever is looked for.

    Raises:
        UserError: it is missing, or holds none.
    """
    _in_folder(expanded(folder), OPTION, ())


def label_of(network: Arch | TimmNetwork) -> str:
    """How messages call a network's weights: by its published name, or timm's."""
    return _wanted(network).label


def _wanted(network: Arch | TimmNetwork) -> _Wanted:
    import timm

    from search_spaces.registry import FAMILIES
    from search_spaces.weights import published_name

    published = {
        name: variant.timm for family in FAMILIES.values() for name, variant in family.variants.items() if variant.timm
    }
    if isinstance(network, TimmNetwork):
        label, asked = TIMM + network.name, network.name
        own = [name for name, theirs in published.items() if theirs == network.name.partition(".")[0]]
        names = [network.name]
    else:
        name = published_name(network)
        if name is None:
            return _Wanted(f"this {network.family} network, which is none of the published", (), None)
        label, asked, own, names = name, published.get(name, ""), [], [name]
    config = timm.get_pretrained_cfg(asked) if asked else None
    if config is not None:
        names += [f"{config.architecture}.{config.tag}", str(config.architecture)]
    return _Wanted(label, list(dict.fromkeys(names + own)), config if config and config.has_weights else None)


def _in_folder(folder: Path, option: str, names: Sequence[str]) -> Path | None:
    """The first of the files that may be a network's.

    Raises:
        UserError: no such folder, or one without weights.
    """
    stated = f"{option}{' ' if option == OPTION else '='}{folder}"
    try:
        files = {file.name for file in folder.iterdir() if file.name.endswith(ENDINGS)}
    except FileNotFoundError:
        raise UserError(f"{stated}: no such folder") from None
    except NotADirectoryError:
        raise UserError(f"{stated} is a file: give the folder that holds it, or --weights {folder}") from None
    except OSError as error:
        raise UserError(f"{stated}: {error.strerror}") from None
    if not files:
        raise UserError(f"{stated} holds no file of weights (NAME.safetensors, NAME.pth or NAME.bin)")
    return next((folder / f"{name}{end}" for name in names for end in ENDINGS if f"{name}{end}" in files), None)


_Found = tuple[Path, Literal["cache", "download"], str, str]
"""The file, where it was, its whole SHA-256, and a remark."""


@dataclass(frozen=True)
class _Kept:
    """A file in a cache: where, None for none; its SHA-256, and whether it is the one that it should have."""

    path: Path | None = None
    digest: str = ""
    whole: bool = False


def _kept_by_hub(config: PretrainedCfg) -> _Kept:
    """A file in the cache of the Hugging Face hub, which calls it by its SHA-256: one that is another is damaged."""
    repository, revision = _repository(config)
    path = cached(repository, HUB_FILES, revision)
    if path is None:
        return _Kept()
    digest = file_digest(path, 64)
    return _Kept(path, digest, digest == stated(path, digest))


def _kept_by_url(config: PretrainedCfg) -> _Kept:
    """A file in torch.hub's cache; its name holds the beginning of its SHA-256, where it says anything."""
    path, start = _place_of_url(config)
    if not path.is_file():
        return _Kept()
    digest = file_digest(path, 64)
    return _Kept(path, digest, digest.startswith(start))


def _repository(config: PretrainedCfg) -> tuple[str, str | None]:
    """A repository on the hub, and its revision; None for the newest."""
    repository, _, revision = str(config.hf_hub_id).partition("@")
    return repository, revision or None


def _place_of_url(config: PretrainedCfg) -> tuple[Path, str]:
    """Where torch.hub keeps a file, and how its SHA-256 begins; "" where that is not known."""
    from torch.hub import get_dir

    path = Path(get_dir()) / "checkpoints" / str(config.url).rpartition("/")[2]
    stated = re.search(r"-([0-9a-f]{8,})\.", path.name)
    return path, stated[1] if stated else ""


def _from_hub(wanted: _Wanted, config: PretrainedCfg, progress: Bytes | None) -> _Found:
    """A file of a repository on the Hugging Face hub; a damaged one in its cache is fetched again."""
    kept = _kept_by_hub(config)
    if kept.path is not None and kept.whole:
        return kept.path, "cache", kept.digest, ""
    remark = f"{blob(kept.path)} was damaged, and is replaced" if kept.path else ""
    repository, revision = _repository(config)
    try:
        path = download(repository, HUB_FILES, revision, progress, again=bool(remark))
    except HubError as error:
        damaged = f"{blob(kept.path)} is damaged (delete it), and " if kept.path else ""
        kind, do = UserError if error.reached else Unreached, _again if error.passing else _by_hand
        raise kind(f"{damaged}could not fetch {wanted.timm} ({error}): {do(wanted)}") from None
    digest = file_digest(path, 64)
    if digest != stated(path, digest):
        blob(path).unlink()
        raise UserError(f"could not fetch {wanted.timm} (it arrived damaged): {_again(wanted)}")
    return path, "download", digest, remark


def _from_url(wanted: _Wanted, config: PretrainedCfg, progress: Bytes | None) -> _Found:
    """A file that torch.hub downloads; a damaged one in its cache is fetched again."""
    from urllib.error import HTTPError

    from torch.hub import download_url_to_file

    kept, (path, start) = _kept_by_url(config), _place_of_url(config)
    if kept.path is not None and kept.whole:
        return path, "cache", kept.digest, ""
    remark = f"{path} was damaged, and is replaced" if kept.path else ""
    try:
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            download_url_to_file(str(config.url), str(path), start or None, progress=False)
    except DiskFull:
        raise
    except Exception as error:  # as urllib, and a RuntimeError of another hash
        damaged = f"{path} is damaged (delete it), and " if remark else ""
        lost = isinstance(error, OSError) and not isinstance(error, HTTPError)
        kind = Unreached if lost else UserError
        raise kind(f"{damaged}could not fetch {wanted.timm} ({first_sentence(error)}): {_again(wanted)}") from None
    return path, "download", file_digest(path, 64), remark


def _again(wanted: _Wanted) -> str:
    return f"the same command tries again; or {_by_hand(wanted)}"


def _by_hand(wanted: _Wanted) -> str:
    """What to do where there is no internet."""
    assert wanted.config is not None
    hub, url = wanted.config.hf_hub_id, str(wanted.config.url)
    theirs = f"{HUB_FILES[0]} of https://huggingface.co/{hub}" if hub else url
    name = wanted.names[0] + (".safetensors" if hub else ".pth")
    return f"put {theirs} into a folder as {name}, and give that as {OPTION} or {VARIABLE}"
