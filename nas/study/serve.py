"""The gRPC server in front of a study's storage: Optuna's calls, and a lock for those that decide.

Hundreds of workers so share a few connections to a database. The server keeps nothing of its own: it may be stopped and
started again at any time, and workers that use the database itself take turns with those that use the server.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from optuna.storages._grpc.auto_generated.api_pb2_grpc import add_StorageServiceServicer_to_server
from optuna.storages._grpc.servicer import OptunaStorageProxyService

from nas.errors import UserError
from nas.study.database import EXCLUSIVE_TIMEOUT_S, joined
from nas.study.errors import driver_reason
from nas.study.patient import database_errors, is_lost
from nas.study.proxy import HOLD, KEEPALIVE, KEEPALIVE_S, TOKEN
from nas.study.storage import holding, open_storage

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

T = TypeVar("T")
THREADS = 14
"""Calls answered at a time; of a database's 15 connections, one is left for the client whose turn it is."""
GRACE_S = 2
"""For the calls that are being answered when the server ends."""
OPTIONS = [
    *KEEPALIVE,
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_S * 500),  # clients ask as often as this server does
    ("grpc.max_receive_message_length", -1),
    ("grpc.so_reuseport", 0),  # a port that another server has is an error
]


def serve(storage: str | Path, host: str, port: int, started: Callable[[int], None]) -> None:
    """Serve a storage until Ctrl-C or SIGTERM.

    It has no login: keep `host` a local one, or one of a network whose users are trusted.

    Args:
        storage: a journal file or a database's URL, made where it does not exist.
        port: 0 for any free one.
        started: called with the port, once workers may come.

    Raises:
        UserError: the storage cannot be used, or the address cannot be listened on.
    """
    ended = asyncio.Event()

    async def until_ended() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, ended.set)
        await serve_until(ended, storage, host, port, started)

    asyncio.run(until_ended())


async def serve_until(
    ended: asyncio.Event, named: str | Path, host: str, port: int, started: Callable[[int], None]
) -> None:
    """`serve`, until an event of this loop."""
    port, storage = _free(host, port), open_storage(named)
    turns = _Turns(storage, named)
    server = grpc.aio.server(ThreadPoolExecutor(THREADS), interceptors=[turns], options=OPTIONS)
    add_StorageServiceServicer_to_server(  # type: ignore[no-untyped-call]
        OptunaStorageProxyService(storage), server
    )
    service, method = HOLD.strip("/").split("/")
    handler = grpc.method_handlers_generic_handler(service, {method: grpc.unary_stream_rpc_method_handler(turns.hold)})
    server.add_generic_rpc_handlers((handler,))
    try:
        server.add_insecure_port(joined(host, port))
    except RuntimeError as error:
        raise UserError(f"cannot listen on {joined(host, port)}: {error}") from None
    await server.start()
    started(port)
    await ended.wait()
    await server.stop(GRACE_S)


class _Turns(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Who may decide, one client at a time; what it calls meanwhile runs in the one thread that holds the storage's
    lock."""

    def __init__(self, storage: BaseStorage, named: str | Path) -> None:
        self._storage, self._named = storage, named
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "turn")
        self._holder = ""
        """The token of whose turn it is; only the thread reads and sets it."""

    async def hold(self, _: bytes, context: Any) -> None:
        """Answer with a token once it is the client's turn, which ends with this stream."""
        try:
            await asyncio.wait_for(self._turn.acquire(), EXCLUSIVE_TIMEOUT_S)
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "another process keeps the study's storage locked")
        stack, token = ExitStack(), secrets.token_hex(8)

        def enter() -> None:
            stack.enter_context(holding(self._storage))
            self._holder = token

        def leave() -> None:
            self._holder = ""
            stack.close()

        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, enter)
            await context.write(token.encode())
            await asyncio.Event().wait()
        except UserError as error:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, str(error))
        except database_errors() as error:
            await context.abort(*self._told(error))
        finally:
            self._thread.submit(leave)  # after `enter`, where that still waits, and before the next one's
            self._turn.release()

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], call: Any) -> Any:
        """The handler of a call, whose errors are told in one line, and which runs in its caller's turn if it has
        one."""
        handler = await continuation(call)
        if handler is None or handler.unary_unary is None:
            return handler
        token = dict(call.invocation_metadata).get(TOKEN)

        def answer(request: Any, context: Any) -> Any:
            try:
                if token is None:
                    return handler.unary_unary(request, context)
                return self._thread.submit(self._in_turn, token, handler.unary_unary, request, context).result()
            except UserError as error:
                context.abort(grpc.StatusCode.INTERNAL, str(error))
            except database_errors() as error:
                context.abort(*self._told(error))

        return grpc.unary_unary_rpc_method_handler(answer, handler.request_deserializer, handler.response_serializer)

    def _in_turn(self, token: str, call: Callable[[Any, Any], T], request: Any, context: Any) -> T:
        if token != self._holder:
            raise ConnectionError("the turn to decide was lost")
        return call(request, context)

    def _told(self, error: Exception) -> tuple[Any, str]:
        code = grpc.StatusCode.UNAVAILABLE if is_lost(error) else grpc.StatusCode.INTERNAL
        return code, driver_reason(error, self._named)


def _free(host: str, port: int) -> int:
    """The port, or a free one for 0.

    Raises:
        UserError: it cannot be listened on; gRPC does not say why.
    """
    if not host:
        raise UserError("--host is empty: give an address, such as 127.0.0.1, or 0.0.0.0 for all of this machine's")
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}: give 1 to 65535, or 0 for any free one")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with closing(socket.create_server((host, port), family=family)) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (")[0]
        raise UserError(f"cannot listen on {joined(host, port)}: {why}; take another --host or --port") from None
