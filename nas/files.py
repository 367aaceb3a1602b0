"""Files that are whole or absent, folders used by one command at a time, and scratch space that no kill leaves behind.

Locks are those of flock: the kernel frees them with their process. Only what this machine made is swept, since
whether a process of another machine lives is unknown here.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nas.errors import DiskFull, UserError, free_space, is_full

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

LOCK = ".lock"
FULL_BELOW = 1 << 16  # free bytes: libraries in C++ do not say why a write failed
TRIES = 100
_locks: set[int] = set()
_log = logging.getLogger(__name__)


def machine_tag() -> str:
    """8 digits for this machine and, in a container, its processes' numbering."""
    try:
        numbering = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbering = ""
    return f"{zlib.crc32(f'{socket.gethostname()} {numbering}'.encode()):08x}"


# ---------------------------------------------------------------------- files


def expanded(path: str | Path) -> Path:
    """With the home of a ~ at its beginning; of a user who is not known here, as it is."""
    return Path(os.path.expanduser(path))


def replace_file(path: Path, data: str | bytes) -> None:
    """Write a file in one step: a reader sees the old one or the new one, and a failed write leaves the old one."""
    data = data.encode() if isinstance(data, str) else data
    with drafted(path, needed=len(data)) as draft:
        draft.write_bytes(data)


def read_kept(path: Path, kind: TypeAdapter[T], otherwise: str) -> T | None:
    """A JSON document that an earlier run kept; None where there is none.

    Args:
        otherwise: what happens once a damaged one is removed, after "remove it, ".

    Raises:
        UserError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        return kind.validate_json(path.read_bytes())
    except ValueError:
        raise UserError(f"{path} is damaged: remove it, {otherwise}") from None


@contextmanager
def drafted(path: Path, needed: int | None = None) -> Iterator[Path]:
    """A new file to write in the block, moved to `path` at its end, or removed where the block raises.

    It lies beside `path` under a name of its own with the same suffix. A pipe or device is written as it is.

    Args:
        needed: bytes, for the message of a full disk.

    Raises:
        DiskFull: there was no room.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        yield path
        return
    path = Path(os.path.realpath(path))
    draft = path.with_name(f".{path.stem}.{machine_tag()}-{os.getpid()}-{secrets.token_hex(4)}.draft{path.suffix}")
    try:
        created = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        mode = os.fstat(created).st_mode & 0o777
        os.close(created)
        yield draft
        file = os.open(draft, os.O_RDONLY)  # a library may have put another file in its place
        try:
            os.fchmod(file, mode)
            os.fsync(file)
        finally:
            os.close(file)
        draft.replace(path)
    except (OSError, RuntimeError) as error:
        if is_full(error) or (isinstance(error, RuntimeError) and free_space(path.parent) < FULL_BELOW):
            written = draft.stat().st_size if draft.exists() else 0
            raise DiskFull(path.parent, needed or written, error) from error
        raise
    finally:
        with suppress(OSError):
            draft.unlink()


def unwritable(folder: Path, error: OSError) -> UserError:
    """What to raise where nothing can be written to a folder."""
    if is_full(error):
        return DiskFull(folder, error=error)
    return UserError(f"cannot write to {folder}: {error.strerror}; give another --out")


def sweep_drafts(folder: Path) -> None:
    """Remove what killed processes of this machine left of `drafted` files in a folder and below it."""
    pattern = re.compile(rf"\..+\.{machine_tag()}-(\d+)-[0-9a-f]{{8}}\.draft(\.\w+)?")
    for path in folder.rglob(".*.draft*"):
        found = pattern.fullmatch(path.name)
        if found and not _alive(int(found[1])):
            with suppress(OSError):
                path.unlink()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


# ---------------------------------------------------------------------- locks


def tell(line: str) -> None:
    """Warn the user, on standard error unless --quiet is given."""
    _log.warning("%s", line)


class FolderInUse(UserError):
    """Another command has a folder."""


@contextmanager
def folder_lock(
    folder: Path, *, waiting: bool = False, name: str = LOCK, say: Callable[[str], None] = tell
) -> Iterator[None]:
    """Have a folder for one command; the lock is a file in it that stays there, empty.

    Args:
        waiting: wait for another command's end, told in one line, instead of raising.
        name: of the lock's file; commands that take different names do not exclude each other.

    Raises:
        FolderInUse: another command has it; the line names that command.
    """
    path = folder / name
    try:
        file = open_lock(path, os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise unwritable(folder, error) from None
    try:
        if not _locked(file, folder, say):
            holder = os.pread(file, 1000, 0).decode(errors="replace").strip() or "another vitnas command"
            if not waiting:
                raise FolderInUse(f"{folder} is in use by {holder}: wait for its end, or give another --out")
            say(f"waiting for {holder}, which uses {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        since = datetime.now().astimezone().isoformat(" ", timespec="seconds")
        with suppress(OSError):  # a full disk takes no words, but a lock
            os.ftruncate(file, 0)
            os.pwrite(file, f"{_command()} (process {os.getpid()} on {socket.gethostname()}) since {since}".encode(), 0)
        try:
            yield
        finally:
            with suppress(OSError):
                os.ftruncate(file, 0)
    finally:
        close_lock(file)


@contextmanager
def job_folder(folder: Path) -> Iterator[None]:
    """Have a folder, made where it is not there, for one command; one that was made for nothing goes again.

    Raises:
        UserError: it cannot be written, or another command has it.
    """
    while True:
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(folder, error) from None
        with folder_lock(folder):
            if not (folder / LOCK).exists():  # another command that made it has removed it
                continue
            try:
                yield
            finally:
                if made and os.listdir(folder) == [LOCK]:
                    (folder / LOCK).unlink()
                    with suppress(OSError):  # another command has just come
                        for each in made:
                            each.rmdir()
            return


def _locked(file: int, folder: Path, say: Callable[[str], None]) -> bool:
    """Whether a lock is had at once; True, and told, where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        say(f"{folder} cannot be locked ({error.strerror}): run one vitnas command at a time on it")
    return True


def open_lock(path: Path, flags: int) -> int:
    """A file descriptor to lock; forked processes do not get it, so that none keeps a lock of a killed parent."""
    file = os.open(path, flags, 0o666)
    _locks.add(file)
    return file


def close_lock(file: int) -> None:
    _locks.discard(file)
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)  # a process that is being started may have the file open too
    os.close(file)


def _forget_locks() -> None:
    for file in _locks:
        os.close(file)
    _locks.clear()


os.register_at_fork(after_in_child=_forget_locks)


def _command() -> str:
    """The command without what its options hold, which may be a password."""
    verb = sys.argv[1] if len(sys.argv) > 1 and re.fullmatch(r"[a-z-]+", sys.argv[1]) else ""
    return f"vitnas {verb}".strip()


# ---------------------------------------------------------------------- scratch space


@contextmanager
def scratch(folder: Path | None = None) -> Iterator[Path]:
    """A new folder for a process's temporary files, removed at the end of the block.

    What killed processes left is removed at the start; a live one's folder is known by the lock it has on it.

    Args:
        folder: the run's folder, in whose tmp/ it lies; None: that of the system.
    """
    parent = temporary_folder() if folder is None else folder / "tmp"
    sweep_scratch(parent)
    path, lock = _own_folder(parent)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        close_lock(lock)
        if folder is not None:
            with suppress(OSError):  # not empty: another process's
                parent.rmdir()


def temporary_folder() -> Path:
    """That of the system, as TMPDIR says."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:  # Python's, for full folders too
        place = Path(os.environ.get("TMPDIR") or "/tmp")
        if free_space(place) < FULL_BELOW:
            raise DiskFull(place) from None
        raise UserError(f"temporary files cannot be written to {place}: $TMPDIR names another folder") from None


def sweep_scratch(parent: Path) -> None:
    """Remove the scratch folders of processes that have ended."""
    for path in parent.glob(f"vitnas-{machine_tag()}-*"):
        with suppress(OSError):  # it is locked, it is another user's, or this file system has no locks
            file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(file)


def _own_folder(parent: Path) -> tuple[Path, int]:
    """A new folder that is locked, and the lock's file descriptor; a sweeping process may take one before its lock."""
    for _ in range(TRIES):
        try:
            parent.mkdir(parents=True, exist_ok=True)
            path = Path(tempfile.mkdtemp(prefix=f"vitnas-{machine_tag()}-", dir=parent))
        except FileNotFoundError:  # another process removed the empty parent
            continue
        except OSError as error:
            raise unwritable(parent, error) from None
        with suppress(FileNotFoundError, BlockingIOError):
            file = open_lock(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                close_lock(file)
                raise
            except OSError:  # no locks here: nothing sweeps it either
                pass
            if path.exists():
                return path, file
            close_lock(file)
    raise UserError(f"no folder can be kept in {parent}: other processes remove it; give another --out")


def check_output(option: str, path: Path, suffixes: Sequence[str] = (), inputs: Iterable[str | Path] = ()) -> None:
    """Raises UserError where the file could not be written at the end, or is one of `inputs`, of which some may be no
    files."""
    if suffixes and path.suffix not in suffixes:
        raise UserError(f"{option} {path}: give a name that ends in {', '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder: name a file")
    if path.is_file() and any(os.path.exists(each) and os.path.samefile(path, each) for each in inputs):
        raise UserError(f"{option} {path} would overwrite what is read: name another file")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written: {error.strerror}") from None
