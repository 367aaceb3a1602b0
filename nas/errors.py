"""The exceptions of a user's mistake, a full disk and a training that fails, and errors in one line."""

from __future__ import annotations

import difflib
import errno
import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nas.text import first_line

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_WORDS = ("No space left on device", "disk is full", "Disk quota exceeded", "File too large", "FreeDiskSpace")


class UserError(Exception):
    """Bad input or environment: one line that says what is wrong and what would be right."""


def unknown(what: str, name: str, choices: Iterable[str]) -> UserError:
    """The error of a name that is none of the choices."""
    known = list(choices)
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.4)
    meant = f"did you mean {' or '.join(near)}? Choose" if near else "choose"
    return UserError(f"unknown {what} {name!r}: {meant} from {', '.join(known)}")


class TrainingError(UserError):
    """A training, or the judging of a network, that fails. epoch: the one it was in, from 1; 0 outside of them."""

    def __init__(self, message: str, epoch: int = 0) -> None:
        super().__init__(message)
        self.epoch = epoch


class DiskFull(UserError):
    """A file that cannot be written for want of space.

    place: the folder it belongs in. needed: bytes that are needed at least, where that is known. told: the message as
    another process has put it.
    """

    def __init__(
        self,
        place: Path | str,
        needed: int | None = None,
        error: BaseException | None = None,
        told: str | None = None,
    ) -> None:
        self.place = Path(place)
        if told is not None:
            super().__init__(told)
            return
        number: int = getattr(error, "errno", None) or 0
        what = {
            errno.EDQUOT: "the quota is used up in",
            errno.EFBIG: "the size allowed for a file (ulimit -f) is too small in",
        }.get(number, "no space left in")
        free = free_space(self.place)
        known = [f"{_size(free)} free"] if free < math.inf else []
        if needed:
            known.append(f"at least {_size(needed)} needed")
        super().__init__(
            f"{what} {place}"
            + f" ({', '.join(known)})" * bool(known)
            + f": {'raise it' if number == errno.EFBIG else 'make room'}, then the same command goes on"
        )


FAULTS = (UserError, OSError, MemoryError, RuntimeError, ValueError)
"""What may go wrong with one network while the others go on: PyTorch, children and devices raise RuntimeError."""


def is_full(error: BaseException | str) -> bool:
    """Whether an error, what it was raised from, or its text says that a disk is full."""
    if isinstance(error, str):
        return any(words in error for words in FULL_WORDS)
    if isinstance(error, DiskFull) or getattr(error, "errno", None) in FULL or is_full(str(error)):
        return True
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return before is not None and is_full(before)


def fullest(*folders: Path) -> Path:
    """That with the least space left: which one was full, where an error does not say."""
    return min(folders, key=free_space)


def free_space(folder: Path) -> float:
    """Bytes; infinity where it is not known."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return math.inf


@contextmanager
def disk_errors(place: Path, needed: int | None = None) -> Iterator[None]:
    """Raise what a full disk raises inside the block as DiskFull; place: where the block writes."""
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if is_full(error):
            raise DiskFull(place, needed, error) from error
        raise


def reason(error: BaseException) -> str:
    """Why something failed, in one line: with the error's class, where its message was not written for users."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    line, kind = first_line(error), type(error).__name__
    return line if line == kind else f"{kind}: {line}"


def _size(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= 1 << 20 else f"{count / 1024:.1f} KiB"
