"""Networks exported and timed side by side, while nothing else is measured on their device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from nas.files import scratch
from nas.measure.device import compare, device_lock
from nas.measure.protocol import Interrupted
from nas.measure.runtime import Settings
from nas.measure.samples import MeasureError, Measurement
from nas.text import first_line

Network = TypeVar("Network")
Results = dict[str, Measurement | MeasureError]
"""By a network's name: its latency, or why it has none."""


@dataclass(frozen=True)
class Longer:
    """Which networks are measured longer, in further runs of as many rounds.

    which: of the results so far, the names of those; empty ends it. most_rounds: of the first run and the further ones
    together. failed: called with the name and the error of one that cannot be measured longer, which keeps what it has.
    """

    which: Callable[[Results], Sequence[str]]
    most_rounds: int
    failed: Callable[[str, MeasureError], None]


def measure_side_by_side(
    networks: Mapping[str, Network],
    export: Callable[[Network, Path], Path],
    settings: Settings | Mapping[str, Settings],
    rounds: int,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    longer: Longer | None = None,
    timeout_s: float | None = None,
    waiting: Callable[[str, float, float], None] = lambda *_: None,
) -> Results:
    """Export networks, then time them in one interleaved run (see `nas.measure.protocol.compare`).

    A network that cannot be exported or timed has its error as its result; the others go on.

    Args:
        export: writes a network's file, and returns its path. It is given a path without a suffix. A MeasureError that
            it raises is that network's result.
        settings: of all networks, or of each by its name; of one device.
        folder: the run's, in which the files lie while they are timed; None: the system's temporary folder.
        progress: called with the rounds done and their number.
        timeout_s: seconds for a network to load and warm up, and for each of its rounds; None: its runtime's.
        waiting: called with the name of a network that does not answer, the seconds waited and their limit.

    Raises:
        Interrupted: Ctrl-C while networks are timed. In a further run it holds the results of the runs before.
        Exception: what `export` raises, other than RuntimeError and ValueError.
    """
    results: Results = {}
    first = next(iter(settings.values())) if isinstance(settings, Mapping) else settings
    with scratch(folder) as room, device_lock(first.device):
        paths: dict[str, Path] = {}

        def time(names: Sequence[str]) -> Results:
            chosen = {name: paths[name] for name in names}
            given = {name: settings[name] for name in names} if isinstance(settings, Mapping) else settings
            return compare(chosen, given, rounds, progress, timeout_s, waiting)

        for i, (name, network) in enumerate(networks.items()):
            try:
                paths[name] = export(network, room / str(i))
            except MeasureError as error:
                results[name] = error
            except (RuntimeError, ValueError) as error:
                results[name] = MeasureError(f"cannot be exported: {first_line(error)}")
        try:
            results |= time(list(paths))
        except Interrupted as interrupt:
            raise Interrupted(results | interrupt.results, interrupt.done) from None
        if longer is not None:
            _measure_longer(results, time, rounds, longer)
    return results


def _measure_longer(results: Results, time: Callable[[Sequence[str]], Results], rounds: int, longer: Longer) -> None:
    """Add further runs of `time` to the results, in place."""
    done, failed = rounds, set[str]()
    while done < longer.most_rounds and (names := [name for name in longer.which(results) if name not in failed]):
        try:
            more = time(names)
        except KeyboardInterrupt:
            raise Interrupted(results, done) from None
        for name, result in more.items():
            first = results[name]
            if isinstance(result, MeasureError):
                failed.add(name)
                longer.failed(name, result)
            elif isinstance(first, Measurement):
                results[name] = replace(result, rounds_ms=first.rounds_ms + result.rounds_ms)
        done += rounds
