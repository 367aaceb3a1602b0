"""Latencies measured on this machine, kept between studies: one SQLite file, every sample in it.

A result counts for the same network, settings, machine and code only, and only while the machine runs at the speed it
ran at then, by the reference network measured beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import DiskFull, UserError, is_full
from nas.files import expanded
from nas.measure.samples import SURE_ROUNDS, Measurement, quanta

if TYPE_CHECKING:
    from nas.measure.runtime import Settings
    from nas.networks.timm_network import TimmNetwork
    from search_spaces import Arch

ENVIRONMENT = "VITNAS_CACHE"
REFERENCE = "efficientvit_m0"
"""The published network that is timed beside every other one."""
SAME_SPEED = 0.05  # the reference network's latency then and now, relative
BUSY_S = 20  # for another process's write
MOST = 300
"""Results that `Cache.relative` reads: about 1 ms each."""
SHAPING = (
    "search_spaces/*.py",
    "nas/networks/build.py",
    "nas/networks/timm_network.py",
    "nas/measure/**/*.py",
    "nas/export/artifact.py",
    "nas/export/graph.py",
    "nas/export/onnx.py",
    "nas/export/options.py",
    "nas/export/quantize.py",
    "nas/machine.py",
    "nas/process.py",
)
"""The code that decides what network is built, what file is made of it, and how that is timed."""
LIBRARIES = ("torch", "timm", "onnx", "onnxruntime", "onnxruntime-gpu")
"""What makes those networks and files; a runtime's own version is in `hardware.fingerprint`."""


def default_path() -> Path:
    """$VITNAS_CACHE/latency.sqlite, by default under ~/.cache/vitnas."""
    return expanded(os.environ.get(ENVIRONMENT) or "~/.cache/vitnas") / "latency.sqlite"


@cache
def code_digest() -> str:
    """Of the code and libraries that a latency depends on: measured by other code, it is another quantity."""
    return digest_of(shaping_files())


def shaping_files() -> list[Path]:
    """The files of `SHAPING`, in its order."""
    root = Path(__file__).parents[2]
    return [path for pattern in SHAPING for path in sorted(root.glob(pattern))]


def digest_of(sources: Iterable[Path]) -> str:
    """Of files' content, and of the versions of `LIBRARIES`."""
    found = hashlib.sha256(json.dumps([_version(name) for name in LIBRARIES]).encode())
    for path in sources:
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:16]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


class Cache:
    """Results of one machine with one kind of settings.

    machine: what must agree, `hardware.fingerprint` of the settings, the reference network and `code_digest`.
    Raises OSError or sqlite3.Error where the file cannot be used.
    """

    def __init__(self, machine: dict[str, Any], path: Path | None = None) -> None:
        self.path = path or default_path()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._machine = machine
        self._rows = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None)
        self._rows.execute(
            "CREATE TABLE IF NOT EXISTS latency (key TEXT PRIMARY KEY, arch TEXT, machine TEXT, measured TEXT, "
            "result TEXT)"
        )

    def get(
        self, network: Arch | TimmNetwork, batch_size: int, reference_ms: float, precision: str | None = None
    ) -> tuple[str, Measurement] | None:
        """When it was measured (ISO 8601), and the result; None where there is none from a machine at this speed.

        Args:
            reference_ms: the reference network's median now.
            precision: of this network, where it is not that of the settings, and so of the reference network.
        """
        found = self.last(network, batch_size, precision)
        then = found[1].reference_p50_ms if found else None
        return found if then is not None and abs(then / reference_ms - 1) <= SAME_SPEED else None

    def last(
        self, network: Arch | TimmNetwork, batch_size: int, precision: str | None = None
    ) -> tuple[str, Measurement] | None:
        """As `get`, whatever the machine's speed is now: to be told with its date."""
        row = self._rows.execute(
            "SELECT measured, result FROM latency WHERE key = ?", [self._key(network, batch_size, precision)]
        ).fetchone()
        return row and (row[0], Measurement.from_dict(json.loads(row[1])))

    def relative(self, batch_size: int) -> list[tuple[Arch, float]]:
        """Networks of the families that were measured last with these settings, at whatever speed of the machine, and
        their latencies over the reference network's in the same rounds; the last one last, `MOST` at most."""
        from search_spaces import Arch, ArchError

        rows = self._rows.execute(
            "SELECT key, arch, result FROM latency WHERE machine = ? ORDER BY measured DESC LIMIT ?",
            [json.dumps(self._machine, sort_keys=True), MOST],
        )
        found = []
        for key, document, result in rows:
            try:
                arch = Arch.from_json(document)
            except ArchError:  # of timm's, or of another vitnas
                continue
            measured = Measurement.from_dict(json.loads(result))
            if key == self._key(arch, batch_size, None) and measured.reference_p50_ms and not quanta(measured):
                found.append((arch, measured.p50_ms / measured.reference_p50_ms))
        return found[::-1]

    def put(
        self, network: Arch | TimmNetwork, batch_size: int, result: Measurement, precision: str | None = None
    ) -> None:
        """Keep a result, in place of an earlier one."""
        self._rows.execute(
            "INSERT OR REPLACE INTO latency VALUES (?, ?, ?, ?, ?)",
            [
                self._key(network, batch_size, precision),
                network.to_json(),
                json.dumps(self._machine, sort_keys=True),
                datetime.now().astimezone().isoformat(timespec="seconds"),
                json.dumps(result.to_dict()),
            ],
        )

    def close(self) -> None:
        self._rows.close()

    def _key(self, network: Arch | TimmNetwork, batch_size: int, precision: str | None) -> str:
        document = [network.digest(), batch_size, self._machine, *([precision] if precision else [])]
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def machine_of(settings: Settings) -> dict[str, Any]:
    """What must agree for a latency measured with these settings to count (see `Cache`)."""
    from nas.measure.hardware import fingerprint

    return fingerprint(settings) | {"at": settings.device, "reference": REFERENCE, "code": code_digest()}


@contextmanager
def opened(settings: Settings) -> Iterator[Cache]:
    """The cache of this machine with these settings.

    Raises:
        UserError: its file cannot be used.
    """
    path = default_path()
    try:
        try:
            cache = Cache(machine_of(settings))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        with closing(cache):
            yield cache
    except sqlite3.Error as error:
        if is_full(error):
            raise DiskFull(path.parent, error=error) from None
        damaged = not isinstance(error, sqlite3.OperationalError)
        raise UserError(f"{path}: {error}{': remove it, and latencies are measured again' * damaged}") from None


def known(network: Arch | TimmNetwork, settings: Settings) -> tuple[str, Measurement] | None:
    """When a network was last measured here with these settings, and the result (`p50_ms`, `ci_ms`); None if it never
    was, or in too few rounds for an interval of 95%, or while others used its CPUs (`quanta`).

    The machine's speed then is not compared with its speed now, as a search does: tell the date (ISO 8601) beside it.
    settings: as `nas.measure.device.settings_for` makes them. Nothing is measured, and no file is made.

    Raises:
        UserError: the cache cannot be used.
    """
    if not default_path().is_file():
        return None
    with opened(settings) as cache:
        found = cache.last(network, settings.batch_size)
    return found if found and len(found[1].rounds_ms) >= SURE_ROUNDS and not quanta(found[1]) else None
