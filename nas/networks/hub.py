"""Files of the Hugging Face hub: in its cache on this machine, or downloaded into it. Nothing is unpickled here, and
PyTorch is not imported."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas import connection
from nas.errors import DiskFull, UserError, disk_errors
from nas.files import tell
from nas.identity import LENGTH, file_digest
from nas.networks.timm_form import TimmForm
from nas.text import first_line, first_sentence, mask_url

HUB = "hf-hub:"
"""How a repository is named on the command line: hf-hub:OWNER/NAME, or hf-hub:OWNER/NAME@REVISION."""
ARCH, CONFIG, WEIGHTS, ONNX = "arch.json", "config.json", "model.safetensors", "model.onnx"
"""What a repository holds: the document of `vitnas push`, or timm's; and the weights."""
BESIDE = ("preprocess.json", "labels.txt")
"""What `vitnas push` writes beside, where it is known."""
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"

Bytes = Callable[[int, int], None]
"""Called with the bytes that are here and their total (0: unknown)."""


class Unreached(UserError):
    """No connection: other weights cannot be downloaded either."""


class HubError(Exception):
    """Why something cannot be had from the hub, in words.

    reached: whether the hub has answered. passing: whether the same command may succeed.
    """

    def __init__(self, why: str, *, reached: bool = True, passing: bool = False) -> None:
        super().__init__(mask_url(why))
        self.reached, self.passing = reached, passing


@dataclass(frozen=True)
class HubNetwork:
    """A network's files of one commit, in the hub's cache."""

    document: Path
    """Called `ARCH` or `CONFIG`; `WEIGHTS` lies beside it."""
    line: str
    """What was found, and the hash of its weights."""


@functools.cache
def fetch(name: str) -> HubNetwork:
    """A repository's network; in a process each is looked for, and told, once. Without a connection it is the one in
    the cache.

    Args:
        name: OWNER/NAME or OWNER/NAME@REVISION (a branch, a tag or a commit).

    Raises:
        UserError: no such name or repository, one without a network or safetensors, or a download that fails.
        Unreached: no connection, and nothing in the cache. DiskFull: no room for the download.
    """
    repository, revision = _named(name)
    kept = _kept(repository, revision)
    remark, document, source = "", kept, "from the hub's cache"
    if kept is None or not re.fullmatch("[0-9a-f]{40}", revision or ""):
        try:
            document, fresh = _fetched(repository, revision, name)
            source = "downloaded" if fresh else source
        except HubError as error:
            if kept is None or error.reached:
                raise _refused(name, error) from None
            remark = f"; whether it is the newest is unknown ({error})"
    assert document is not None
    digest = _whole(document.with_name(WEIGHTS), name)
    commit = document.parent.name[:7]
    line = f"weights of {HUB}{name}: commit {commit}, {source} (sha256 {digest[:LENGTH]}){remark}"
    tell(line)
    return HubNetwork(document, line)


def fetch_onnx(name: str) -> Path:
    """A repository's model.onnx, in the hub's cache; without a connection the one that is there.

    Args:
        name: as `fetch` takes it.

    Raises:
        UserError: no such name or repository, one without the file, or a download that fails.
        Unreached: no connection, and nothing in the cache. DiskFull: no room for the download.
    """
    repository, revision = _named(name)
    kept = cached(repository, (ONNX,), revision)
    try:
        if kept is None:
            tell(f"downloading {ONNX} of {HUB}{name}")
        found = download(repository, (ONNX,), revision)
    except Absent:
        raise UserError(f"{HUB}{name} has no {ONNX}: `vitnas export {HUB}{name} --out DIR` writes one") from None
    except HubError as error:
        if kept is None or error.reached:
            raise _refused(name, error) from None
        tell(f"{HUB}{name} is from the hub's cache; whether it is the newest is unknown ({error})")
        found = kept
    _whole(found, name)
    if found != kept:
        tell(f"downloaded {ONNX} of {HUB}{name}, commit {found.parent.name[:7]}")
    return found


def _whole(path: Path, name: str) -> str:
    """The SHA-256 of a file in the cache; a damaged one is removed.

    Raises:
        UserError: it is damaged.
    """
    digest = file_digest(path, 64)
    if digest != stated(path, digest):
        damaged = blob(path)
        damaged.unlink()
        raise UserError(f"{damaged}, of {HUB}{name}, was damaged and is removed: the same command downloads it again")
    return digest


def _named(name: str) -> tuple[str, str | None]:
    """A repository, and its revision; None for the newest."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    repository, at, revision = name.partition("@")
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{HUB}{name}: {bad_name(error)}") from None
    if at and not revision:
        raise UserError(f"{HUB}{name}: give a branch, a tag or a commit after the @, as in {HUB}{repository}@main")
    return repository, revision or None


def bad_name(error: Exception) -> str:
    """What the hub's client says of a repository's name, and what would be right."""
    return f"{first_line(error).rstrip('.')}: give OWNER/NAME, such as me/pets"


def _kept(repository: str, revision: str | None) -> Path | None:
    """The document in the cache, where the weights of its commit are there too."""
    document = cached(repository, (ARCH, CONFIG), revision)
    return document if document is not None and document.with_name(WEIGHTS).is_file() else None


def _fetched(repository: str, revision: str | None, name: str) -> tuple[Path, bool]:
    """The document, and whether its weights had to be downloaded. Raises HubError."""
    document = download(repository, (ARCH, CONFIG), revision)
    if document.name == CONFIG:  # before its weights, which may be those of anything
        what = f"{CONFIG} of {HUB}{name}"
        form = TimmForm.read(document, what)
        form.network(what)
        if (mode := form.pretrained_cfg.crop_mode) != "center":
            tell(f"{HUB}{name} was judged on images of crop mode {mode!r}: vitnas cuts out the middle instead")
    commit = document.parent.name
    fresh = not document.with_name(WEIGHTS).is_file()
    if fresh:
        tell(f"downloading {WEIGHTS} of {HUB}{name}")
        download(repository, (WEIGHTS,), commit)
    for beside in BESIDE if document.name == ARCH else ():
        with suppress(Absent):
            download(repository, (beside,), commit)
    return document, fresh


def _refused(name: str, error: HubError) -> UserError:
    kind = UserError if error.reached else Unreached
    again = ": the same command tries again" if error.passing else ""
    return kind(f"could not fetch {HUB}{name} ({error}){again}")


class Absent(HubError):
    """A repository without the files that are asked for."""


def cached(repository: str, names: Sequence[str], revision: str | None) -> Path | None:
    """The first of these files that is in the cache.

    revision: None for the newest.
    """
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repository, name, revision=revision) for name in names)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def blob(path: Path) -> Path:
    """The file that a link in the cache stands for; where it links none, the link's place holds the file."""
    return Path(os.path.normpath(path.parent / path.readlink())) if path.is_symlink() else path


def stated(path: Path, otherwise: str) -> str:
    """The SHA-256 that a file in the cache should have, where its name says so."""
    name = blob(path).name
    return name if re.fullmatch("[0-9a-f]{64}", name) else otherwise


def download(
    repository: str, names: Sequence[str], revision: str | None, progress: Bytes | None = None, again: bool = False
) -> Path:
    """Download the first of these files that there is into the cache, where nothing of a download that fails is left.

    Args:
        revision: None for the newest.
        again: even where it is in the cache.

    Raises:
        HubError: it cannot be had. Absent: there is none of them. DiskFull: there is no room.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    reason = connection.unreachable()
    if reason is not None:
        raise HubError(reason, reached=False)
    bar = _bar(progress)
    for name in names:
        try:
            with disk_errors(Path(constants.HF_HUB_CACHE)), _quiet():
                return Path(hf_hub_download(repository, name, revision=revision, force_download=again, tqdm_class=bar))
        except RemoteEntryNotFoundError:
            continue
        except DiskFull:
            raise
        except Exception as error:  # the hub's client raises what its many layers do
            raise told(error) from None
    raise Absent(f"no {' or '.join(names)} there")


def told(error: Exception) -> HubError:
    """An error of the hub's client, in words."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, LocalTokenNotFoundError):
        return HubError(f"there is no token: {LOG_IN}")
    if isinstance(error, GatedRepoError):
        return HubError(f"its owner grants access: ask for it on the repository's page, and {LOG_IN}")
    if isinstance(error, RepositoryNotFoundError):
        return HubError(f"no such repository, or a private one: {LOG_IN}")
    if isinstance(error, RevisionNotFoundError):
        return HubError("no such branch, tag or commit")
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        what = {401: "the hub does not know this token", 403: "this token may not do that"}
        return HubError(f"{what[error.response.status_code]}: {LOG_IN}")
    cause = error.__cause__ if isinstance(error, (LocalEntryNotFoundError, RuntimeError, ValueError)) else None
    why = first_sentence(cause if isinstance(cause, Exception) else error)
    return HubError(why, reached=isinstance(error, HfHubHTTPError), passing=True)


def _bar(progress: Bytes | None) -> Any:
    """A progress bar that draws nothing, but tells `progress`."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, total: float | None = None, initial: float = 0, **options: Any) -> None:
            super().__init__(*args, total=total, initial=initial, disable=True)
            self.here, self.whole = int(initial), int(total or 0)

        def update(self, n: float | None = 1) -> None:
            self.here += int(n or 0)
            if progress is not None:
                progress(self.here, self.whole)

    return Bar


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the hub client's warnings: what fails is told once, at the end."""
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity

    before = get_verbosity()
    set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        set_verbosity(before)
