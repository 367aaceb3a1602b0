"""The client of `vitnas storage serve`: Optuna's gRPC proxy of a study's storage, at grpc://HOST:PORT.

Who decides holds a stream open; the server ends its turn when the stream ends, also by the holder's death. What the
holder calls meanwhile carries the token that the stream began with, and is refused once its turn is over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from optuna.exceptions import StorageInternalError
from optuna.storages import GrpcStorageProxy

from nas.errors import UserError
from nas.study.database import CONNECT_TIMEOUT_S, joined, proxy_address

HOLD, TOKEN = "/vitnas.Lock/Hold", "vitnas-turn"
"""The method that gives the lock, and the metadata of calls made under it."""
KEEPALIVE_S = 10
"""A side that is silent for longer is asked whether it lives, and dead to the other one after as long again."""
KEEPALIVE = [("grpc.keepalive_time_ms", KEEPALIVE_S * 1000), ("grpc.keepalive_timeout_ms", KEEPALIVE_S * 1000)]


class Proxy(GrpcStorageProxy):
    """Optuna's proxy, whose errors are those of a database (a lost one: StorageInternalError of a ConnectionError), and
    which has a lock."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._turn = threading.local()
        host, port = proxy_address(url)
        super().__init__(host=host, port=port)

    def _setup(self) -> None:
        import grpc
        from optuna.storages._grpc.auto_generated.api_pb2_grpc import StorageServiceStub
        from optuna.storages._grpc.client import GrpcClientCache

        options = [
            *KEEPALIVE,
            ("grpc.max_receive_message_length", -1),
            ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_S * 1000),  # also the longest a connection may take
            ("grpc.max_reconnect_backoff_ms", CONNECT_TIMEOUT_S * 1000),
            ("grpc.initial_reconnect_backoff_ms", 200),
        ]
        self._channel = grpc.insecure_channel(joined(self._host, self._port), options)
        stub = StorageServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._stub = cast(Any, _Calls(stub, self._metadata))
        self._cache = GrpcClientCache(self._stub)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lock of the storage; the calls that this thread makes meanwhile end with it.

        Raises:
            UserError: the server has no lock, or another process does not give it up.
            StorageInternalError: the server is lost.
        """
        import grpc

        stream = self._channel.unary_stream(HOLD)(b"")
        try:
            try:
                self._turn.token = next(stream).decode()
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                    raise UserError(
                        f"the server at {self.url} has no lock: start it with `vitnas storage serve`"
                    ) from None
                if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise UserError(str(error.details())) from None
                raise _as_databases(error)  # noqa: B904  its cause is set
            yield
        finally:
            self._turn.token = None
            stream.cancel()

    def _metadata(self) -> list[tuple[str, str]]:
        token = getattr(self._turn, "token", None)
        return [(TOKEN, token)] if token else []


class _Calls:
    """Optuna's calls to the server, with metadata."""

    def __init__(self, stub: Any, metadata: Callable[[], list[tuple[str, str]]]) -> None:
        self._stub, self._metadata = stub, metadata

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        import grpc

        call = getattr(self._stub, name)
        codes = grpc.StatusCode
        told_by_optuna = (codes.NOT_FOUND, codes.ALREADY_EXISTS, codes.FAILED_PRECONDITION, codes.INVALID_ARGUMENT)

        def made(request: Any) -> Any:
            try:
                return call(request, metadata=self._metadata())
            except grpc.RpcError as error:
                if error.code() in told_by_optuna:
                    raise
                raise _as_databases(error)  # noqa: B904  its cause is set

        return made


def _as_databases(error: Any) -> StorageInternalError:
    """An error of gRPC as Optuna's of a database."""
    import grpc

    why = str(error.details())
    if why.startswith("failed to connect"):  # then come all addresses, and what each said
        why = f"nothing answers there: {why.rpartition(': ')[2]}"
    told = StorageInternalError(why)
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.CANCELLED):
        told.__cause__ = ConnectionError(why)
    return told
