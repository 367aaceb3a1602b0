"""The URL of a study's database or of a proxy of one, and how it is connected to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from nas.errors import UserError
from nas.text import mask_url

if TYPE_CHECKING:
    import sqlalchemy
    from optuna.storages import BaseStorage

CONNECT_TIMEOUT_S = 5
EXCLUSIVE_TIMEOUT_S = 600
"""How long a process waits for the lock: hundreds of others may decide before it, each for seconds."""
EXCLUSIVE_SQL = {
    "postgresql": [
        f"SET lock_timeout = '{EXCLUSIVE_TIMEOUT_S}s'",
        "SELECT pg_advisory_lock(86487)",
    ],
    "mysql": [f"SELECT GET_LOCK('vitnas', {EXCLUSIVE_TIMEOUT_S})"],
}
"""Statements that take the lock, by database. The connection holds it, so it ends with its process."""


SCHEME, PORT = "grpc://", 13000
"""Of a proxy's URL, and the port where none is given."""


def engine_of(storage: BaseStorage) -> sqlalchemy.Engine:
    """The engine of a database's storage, which Optuna keeps to itself."""
    return cast("sqlalchemy.Engine", cast(Any, storage)._backend.engine)


def holds_studies(url: sqlalchemy.URL) -> bool:
    """Whether the database has Optuna's tables."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(url, **engine_options(url), poolclass=sqlalchemy.NullPool)
    return sqlalchemy.inspect(engine).has_table("studies")


def sql_url(storage: str) -> sqlalchemy.URL:
    """The URL with the driver to use.

    Raises:
        UserError: a URL that cannot be used; the message repeats no part of a password.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(storage)
    except (ArgumentError, ValueError):
        url = None
    backend = url and url.get_backend_name()
    if not url or (backend != "sqlite" and "@" in f"{url.host}{url.database}"):
        raise UserError(
            f"cannot read the storage URL {mask_url(storage)}: it should look like "
            "postgresql://USER:PASSWORD@HOST:PORT/DATABASE, a @ in the password written %40"
        )
    if backend != "sqlite" and backend not in EXCLUSIVE_SQL:
        raise UserError(
            f"unknown database {backend!r} in {mask_url(storage)}: use postgresql://, mysql:// or sqlite:///"
        )
    if backend == "sqlite" and url.host:
        raise UserError(
            f"{mask_url(storage)} names the host {url.host!r}: for a file write sqlite:///{url.host}/{url.database}"
        )
    if backend == "sqlite" and url.database in (None, "", ":memory:"):
        raise UserError("a SQLite storage needs a file: sqlite:///PATH")
    if url.drivername == "postgresql":  # SQLAlchemy 2.0 would look for psycopg2
        url = url.set(drivername="postgresql+psycopg")
    try:
        url.get_dialect().import_dbapi()
    except (ImportError, ArgumentError) as error:
        hints = {"postgresql+psycopg": "pip install '.[postgresql]'", "mysql": "pip install mysqlclient"}
        hint = f": {hints[url.drivername]}" if url.drivername in hints else ""
        raise UserError(f"no driver for {mask_url(storage)}: {error}{hint}") from None
    return url


def engine_options(url: sqlalchemy.URL) -> dict[str, Any]:
    """Arguments of `sqlalchemy.create_engine`."""
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": 60}}  # Optuna's default loses to "database is locked"
    return {"connect_args": {"connect_timeout": CONNECT_TIMEOUT_S}, "pool_pre_ping": True}


def is_proxy(storage: object) -> bool:
    """Whether it is the URL of a proxy."""
    return str(storage).startswith(SCHEME)


def proxy_address(url: str) -> tuple[str, int]:
    """Host and port of a proxy's URL.

    Raises:
        UserError: it cannot be read; the message repeats no part of a password.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, PORT if parts.port is None else parts.port
    except ValueError:
        host, port = None, 0
    if not host or not port or "@" in parts.netloc or parts.path.strip("/") or parts.query or parts.fragment:
        raise UserError(f"cannot read the storage URL {mask_url(url)}: it should look like {SCHEME}HOST:{PORT}")
    return host, port


def joined(host: str, port: int) -> str:
    """host:port, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def need_grpc(what: str) -> None:
    """Raises: UserError: gRPC's packages are not installed, which `what` needs."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it would tell each lost connection in a paragraph
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # no process that is forked off talks to the server
    try:
        import google.protobuf  # noqa: F401
        import grpc  # noqa: F401
    except ImportError as error:
        raise UserError(f"no driver for {what}: {error}: pip install '.[grpc]'") from None
