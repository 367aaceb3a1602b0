"""Errors of a study's file or server, told in one line without the URL's password."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from nas.errors import DiskFull, UserError, is_full
from nas.text import SECRETS, mask_url

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def storage_errors(storage: str | Path) -> Iterator[None]:
    """Turn what a database raises inside the block into a UserError with the password hidden.

    For any code that uses a study: a server may go away at any time.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        raise UserError(f"cannot use the storage {mask_url(str(storage))}: {driver_reason(error, storage)}") from None


def driver_reason(error: Exception, storage: str | Path) -> str:
    """A driver's error in one line without the password of `storage`."""
    cause = error.__cause__ or error
    text = str(getattr(cause, "orig", None) or cause).strip() or type(cause).__name__
    passwords = [found for secret in SECRETS for _, found in secret.findall(str(storage)) if found]
    for form in (*passwords, *map(unquote, passwords)):
        text = text.replace(form, "***")
    return text.splitlines()[0]


def file_error(path: Path, error: OSError) -> UserError:
    """The error of a file of the study, in one line."""
    if is_full(error):
        return DiskFull(path.parent, error=error)
    return UserError(f"cannot use {path}: {error.strerror or error}")
