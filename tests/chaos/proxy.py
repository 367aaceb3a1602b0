"""A gRPC proxy of one's own in front of a storage, to kill and to start again."""

from __future__ import annotations

import os
import signal
import sys
import traceback

from postgres import free_port

from nas.study.serve import serve


class Proxy:
    """A fork that serves `storage` at `url`; use it as a context."""

    def __init__(self, storage: str) -> None:
        self._storage, self._port = storage, free_port()
        self.url = f"grpc://127.0.0.1:{self._port}"
        self.pids: list[int] = []

    def __enter__(self) -> Proxy:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it and wait until workers may come."""
        ready, told = os.pipe()
        pid = os.fork()
        if pid:
            self.pids.append(pid)
            os.close(told)
            with os.fdopen(ready) as answer:
                if not answer.read():
                    raise RuntimeError("the proxy did not start")
            return
        try:
            os.close(ready)
            serve(self._storage, "127.0.0.1", self._port, lambda _: (os.write(told, b"1"), os.close(told)))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(1)

    def kill(self) -> None:
        while self.pids:
            os.kill(self.pids[0], signal.SIGKILL)
            os.waitpid(self.pids.pop(), 0)
