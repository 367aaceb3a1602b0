"""The far end of a remote device: measures on the machine it runs on, as `remote.py` asks it to.

The whole protocol runs here, so the network's latency enters no measurement. Its current folder is its own, and goes
when it ends. Answers are {"value": ...}, {"refused": a UserError's line} or {"failed": a MeasureError's line}.
"""

import base64
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nas.errors import DiskFull, UserError
from nas.lock import DeviceLock
from nas.machine import default_threads
from nas.measure import hardware, protocol, runtime
from nas.measure.protocol import Measurer
from nas.measure.runtime import Settings
from nas.measure.samples import MeasureError
from nas.process import serve, tell

FILES = Path("files")


class Agent:
    """What lives from one request to the next. Files go by the names they were sent under."""

    def __init__(self) -> None:
        self.locks: dict[str, DeviceLock] = {}
        self.measurers: dict[str, Measurer] = {}

    def put(self, name: str, data: str) -> None:
        """The next piece of a file, in base64; an empty one begins it."""
        with (FILES / name).open("ab" if data else "wb") as file:
            file.write(base64.b64decode(data))

    def drop(self, names: list[str]) -> None:
        for name in names:
            (FILES / name).unlink(missing_ok=True)

    def check_settings(self, settings: dict[str, Any]) -> None:
        runtime.check_settings(Settings(**settings))

    def default_threads(self) -> int:
        return default_threads()

    def fingerprint(self, settings: dict[str, Any]) -> hardware.Hardware:
        return hardware.fingerprint(Settings(**settings))

    def describe(self, settings: dict[str, Any]) -> hardware.Hardware:
        return hardware.describe(Settings(**settings))

    def acquire(self, kind: str, timeout_s: float) -> bool:
        self.locks.setdefault(kind, DeviceLock(kind))
        return self.locks[kind].acquire(timeout_s)

    def release(self, kind: str) -> None:
        if kind in self.locks:
            self.locks[kind].release()

    def open(self, measurer: str, settings: dict[str, Any], reference: str) -> None:
        logs = Path(measurer)
        logs.mkdir(exist_ok=True)
        self.measurers[measurer] = Measurer(Settings(**settings), FILES / reference, logs).__enter__()

    def prepare(self, measurer: str) -> None:
        self.measurers[measurer].prepare()

    def measure(self, measurer: str, name: str, **limits: Any) -> dict[str, Any]:
        return self.measurers[measurer].measure(FILES / name, **limits).to_dict()

    def close(self, measurer: str) -> None:
        self.measurers.pop(measurer).__exit__()

    def compare(
        self, names: dict[str, str], settings: dict[str, dict[str, Any]], rounds: int, timeout_s: float | None
    ) -> dict[str, Any]:
        """Per network {"value": Measurement} or {"failed": line}; tells (rounds done, rounds) and ("waiting", ...)."""
        paths = {key: FILES / name for key, name in names.items()}
        own = {key: Settings(**fields) for key, fields in settings.items()}
        results = protocol.compare(paths, own, rounds, tell, timeout_s, lambda *what: tell("waiting", *what))
        return {
            key: {"failed": str(result)} if isinstance(result, MeasureError) else {"value": dataclasses.asdict(result)}
            for key, result in results.items()
        }


def answering(method: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    def answer(**args: Any) -> dict[str, Any]:
        try:
            return {"value": method(**args)}
        except DiskFull:
            raise
        except UserError as error:
            return {"refused": str(error)}
        except MeasureError as error:
            return {"failed": str(error)}

    return answer


def main() -> None:
    FILES.mkdir()
    agent = Agent()
    names = [name for name in vars(Agent) if not name.startswith("_")]
    serve({name: answering(getattr(agent, name)) for name in names})


if __name__ == "__main__":
    main()
