"""A lock for the processes that share a study: one at a time may decide what is read, then written."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nas.errors import UserError
from nas.study.database import (
    EXCLUSIVE_SQL,
    EXCLUSIVE_TIMEOUT_S,
    engine_of,
    engine_options,
    is_proxy,
    need_grpc,
    proxy_address,
    sql_url,
)
from nas.study.errors import file_error
from nas.study.journal import Journal, journal_path
from nas.study.samplers import quiet_optuna

if TYPE_CHECKING:
    from collections.abc import Iterator

    import sqlalchemy
    from optuna.storages import BaseStorage

    from nas.study.proxy import Proxy


@contextmanager
def exclusive(storage: str | Path | BaseStorage) -> Iterator[sqlalchemy.Connection | None]:
    """Hold the lock of a storage, which one process at a time has.

    The kernel, or the server, releases it when its holder dies.

    Args:
        storage: where it is, or what `open_storage` opened there.

    Yields:
        The connection that holds the lock, for a database's server; else None.

    Raises:
        UserError: the path or URL cannot be used, or another process holds the lock for EXCLUSIVE_TIMEOUT_S.
        SQLAlchemyError: what a server says of either (see `storage_errors`).
    """
    if is_proxy(storage):
        proxy = open_proxy(str(storage))
        try:
            with proxy.hold():
                yield None
        finally:
            proxy.close()
        return
    if hold := getattr(storage, "hold", None):  # a `Proxy`
        with hold():
            yield None
        return
    guard = _guard(storage)
    if isinstance(guard, Path):
        import filelock

        lock = filelock.FileLock(f"{guard}.guard", timeout=EXCLUSIVE_TIMEOUT_S)
        try:
            os.stat(guard.parent)  # filelock would make the folder
            lock.acquire()
        except filelock.Timeout as error:
            raise UserError(f"another process keeps {guard}.guard locked") from error
        except OSError as error:
            raise file_error(guard, error) from error
        try:
            yield None
        finally:
            lock.release()
    else:
        import sqlalchemy

        with guard.connect() as connection:
            connection.detach()  # closed, not pooled, at the end: that is what frees the lock
            for statement in EXCLUSIVE_SQL[guard.dialect.name]:
                result = connection.execute(sqlalchemy.text(statement))
            if result.scalar() == 0:  # MySQL's way of saying that the time is up
                raise UserError("another process keeps the study's database locked")
            connection.commit()
            yield connection


def _guard(storage: str | Path | BaseStorage) -> Path | sqlalchemy.Engine:
    """What `exclusive` locks: the file beside which a lock file is put, or the server to ask."""
    if isinstance(storage, str | Path):
        if "://" not in str(storage):
            return journal_path(storage)
        import sqlalchemy

        url = sql_url(str(storage))
        engine = sqlalchemy.create_engine(url, **engine_options(url), poolclass=sqlalchemy.NullPool)
    elif isinstance(backend := cast(Any, storage)._backend, Journal):
        return backend.path
    else:
        engine = engine_of(storage)
    return Path(str(engine.url.database)).absolute() if engine.dialect.name == "sqlite" else engine


def open_proxy(url: str) -> Proxy:
    """The client of the server at grpc://HOST:PORT, which is not asked yet.

    Raises:
        UserError: a URL that cannot be read, or gRPC's packages are not installed.
    """
    proxy_address(url)
    need_grpc(url)
    quiet_optuna()
    from nas.study.proxy import Proxy

    return Proxy(url)
