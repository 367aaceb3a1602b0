"""When which process runs: rounds of short timed slices, one process running at a time.

Every network lives in its own pinned process, stopped by SIGSTOP unless it is being timed, because the
thread pools of live sessions spin and slow each other down. A machine drifts within seconds, so a
candidate and a fixed reference network take turns and both keep every sample.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from nas.machine import usable_cpus
from nas.measure.runtime import RUNTIMES, Settings
from nas.measure.samples import FEWEST_ROUNDS, MAX_ROUNDS, PRECISION, QUANTA, MeasureError, Measurement, enough
from nas.process import Worker, WorkerError

WORKER = "nas.measure.worker"
USAGE_S = 10
"""For what is asked of a process after the last round."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in `compare`. results: of the whole rounds made until then, `done` in number."""

    def __init__(self, results: dict[str, Measurement | MeasureError], done: int):
        super().__init__()
        self.results, self.done = results, done


class Measurer:
    """Measures candidates one after the other against a reference that stays loaded.

    settings: as checked by `check_settings`. reference: the file of a small network of the same runtime
    and batch size. workdir: folder for what the processes print (`reference.log`, and `candidate.log`
    of the last candidate). The caller holds `device_lock`. Entering raises MeasureError where the
    reference cannot be loaded; the reference is loaded again whenever its process has died.
    """

    def __init__(self, settings: Settings, reference: Path, workdir: Path):
        self._settings = settings
        self._patience_s = RUNTIMES[settings.runtime].patience_s
        self._reference_path = reference
        self._workdir = workdir
        self._reference: _Model | None = None
        self._prepared: _Model | None = None
        self._fastest_ms = math.inf
        """Of all samples of the reference."""

    def __enter__(self) -> Self:
        self._start_reference(time.monotonic() + self._patience_s)
        return self

    def __exit__(self, *_: object) -> None:
        for model in (self._reference, self._prepared):
            if model:
                model.close()

    def prepare(self) -> None:
        """Starts the next candidate's process; it imports its runtime while the caller goes on."""
        if self._prepared is None:
            self._prepared = self._new_candidate(self._settings)

    def measure(
        self,
        path: Path,
        budget_ms: float | None = None,
        timeout_s: float | None = None,
        pause: Sequence[Worker] = (),
        batch_size: int | None = None,
        precision: float = PRECISION,
        computed_in: str | None = None,
    ) -> Measurement:
        """Latency of the network in `path`, in a process of its own; see `enough` for how long.

        pause: workers of the caller, stopped while anything is timed. batch_size, computed_in: of the network, where
        its batch or its precision is not that of the settings. timeout_s: None is the runtime's own. precision:
        half-width of the interval over the median, at which timing ends. A network is not given up early as over the
        budget while the reference waits for a CPU, too. Raises MeasureError where the process raises, crashes, hangs,
        or gets fewer than 3 rounds done in that time.
        """
        timeout_s = timeout_s or self._patience_s
        started = time.monotonic()
        deadline = started + timeout_s
        result = Measurement()
        candidate: _Model | None = None
        try:
            own = dataclasses.replace(
                self._settings,
                batch_size=batch_size or self._settings.batch_size,
                precision=computed_in or self._settings.precision,
            )
            if own == self._settings:
                candidate, self._prepared = self._prepared or self._new_candidate(own), None
            else:
                candidate = self._new_candidate(own)
            candidate.load(path, deadline)
            result.load_s = time.monotonic() - started
            with _stopped(pause):
                candidate.warm_up(deadline)
                while not enough(result.rounds_ms, None if self._waits(result) else budget_ms, precision):
                    round_started = time.monotonic()
                    result.reference_rounds_ms.append(self._time_reference(deadline))
                    result.rounds_ms.append(candidate.time_slice(deadline))
                    now = time.monotonic()
                    time_is_up = now + 2 * (now - round_started) > deadline
                    if time_is_up and len(result.rounds_ms) >= FEWEST_ROUNDS:
                        break
                result = candidate.with_usage(result, path, time.monotonic() + USAGE_S)
        except WorkerError as error:
            late = f"not measured in {timeout_s:g} s, {len(result.rounds_ms)} rounds done"
            raise MeasureError(late if time.monotonic() > deadline else str(error)) from None
        finally:
            if candidate:
                candidate.close()
        result.wall_s = time.monotonic() - started
        return result

    def _waits(self, result: Measurement) -> bool:
        """Whether the reference's samples are turns of the scheduler (see `nas.measure.samples.quanta`)."""
        reference_ms = result.reference_p50_ms
        return reference_ms is not None and reference_ms > QUANTA * self._fastest_ms

    def _new_candidate(self, settings: Settings) -> _Model:
        return _Model(settings, self._workdir / "candidate.log")

    def _time_reference(self, deadline: float) -> list[float]:
        samples: list[float] = []
        if self._reference is not None:
            with contextlib.suppress(WorkerError):  # not the candidate's fault: once more
                samples = self._reference.time_slice(deadline)
        samples = samples or self._start_reference(deadline).time_slice(deadline)
        self._fastest_ms = min(self._fastest_ms, *samples)
        return samples

    def _start_reference(self, deadline: float) -> _Model:
        if self._reference:
            self._reference.close()
        try:
            self._reference = _Model(self._settings, self._workdir / "reference.log")
            self._reference.load(self._reference_path, deadline)
            self._reference.warm_up(deadline)
            return self._reference
        except WorkerError as error:
            if self._reference:
                self._reference.close()
            raise MeasureError(f"reference model: {error}") from None


def compare(
    paths: Mapping[str, Path],
    settings: Settings | Mapping[str, Settings],
    rounds: int = MAX_ROUNDS,
    progress: Callable[[int, int], None] | None = None,
    timeout_s: float | None = None,
    waiting: Callable[[str, float, float], None] = lambda *_: None,
) -> dict[str, Measurement | MeasureError]:
    """Latencies of several networks side by side, by name: one process each, one running at a time.

    settings: of all of them, or of each by its name; one device. The order changes from round to round (fixed seed), so
    that none always follows the same one. A network that fails, or does not answer in timeout_s (None: its runtime's
    patience), has its MeasureError as its value. progress is called with (rounds done, rounds), waiting with a network
    that does not answer and what `Worker` says of it. The caller holds `device_lock`.

    Raises:
        Interrupted: Ctrl-C.
    """
    results: dict[str, Measurement | MeasureError] = {name: Measurement() for name in paths}
    models: dict[str, _Model] = {}
    order = random.Random(0)
    own = settings if isinstance(settings, Mapping) else dict.fromkeys(paths, settings)
    limits_s = {name: timeout_s or RUNTIMES[own[name].runtime].patience_s for name in paths}

    def load(name: str, result: Measurement, deadline: float) -> None:
        models[name] = stack.enter_context(
            contextlib.closing(_Model(own[name], waiting=lambda *waited: waiting(name, *waited)))
        )
        models[name].load(paths[name], deadline)
        result.load_s = time.monotonic() - (deadline - limits_s[name])
        models[name].warm_up(deadline)

    def add_round(name: str, result: Measurement, deadline: float) -> None:
        result.rounds_ms.append(models[name].time_slice(deadline))

    done = -1
    with contextlib.ExitStack() as stack:
        try:
            for number in range(rounds + 1):
                step = add_round if number else load
                for name in order.sample(list(paths), len(paths)):
                    result = results[name]
                    if isinstance(result, MeasureError):
                        continue
                    started = time.monotonic()
                    try:
                        step(name, result, started + limits_s[name])
                        result.wall_s += time.monotonic() - started
                    except WorkerError as error:
                        if name in models:
                            models[name].close()
                        results[name] = MeasureError(str(error))
                done = number
                if progress:
                    progress(done, rounds)
            for name, result in results.items():
                if isinstance(result, Measurement):
                    results[name] = models[name].with_usage(result, paths[name], time.monotonic() + limits_s[name])
        except KeyboardInterrupt:
            raise Interrupted(_whole_rounds(results, done), max(0, done)) from None
    return results


def _whole_rounds(
    results: Mapping[str, Measurement | MeasureError], done: int
) -> dict[str, Measurement | MeasureError]:
    """What was interrupted in the round after `done`, up to it."""
    found = {}
    for name, result in results.items():
        if isinstance(result, Measurement):
            kept = dataclasses.replace(result, rounds_ms=result.rounds_ms[: max(0, done)])
            result = kept if kept.rounds_ms else MeasureError("interrupted before its first round")
        found[name] = result
    return found


class _Model:
    """One network in a pinned process, stopped by SIGSTOP unless it is asked for something."""

    def __init__(
        self, settings: Settings, log: Path | None = None, waiting: Callable[[float, float], None] | None = None
    ):
        self._worker = Worker(WORKER, usable_cpus()[: settings.threads], log, waiting=waiting)
        self._worker.send("start", settings=dataclasses.asdict(settings))
        self._has_file = RUNTIMES[settings.runtime].artifact == "onnx"

    def load(self, path: Path, deadline: float) -> None:
        self._worker.receive(_left(deadline))
        self._worker.call("load", _left(deadline), path=str(path))

    def warm_up(self, deadline: float) -> None:
        self._ask("warm_up", deadline)

    def time_slice(self, deadline: float) -> list[float]:
        samples: list[float] = self._ask("time_slice", deadline)["samples_ms"]
        return samples

    def with_usage(self, result: Measurement, path: Path, deadline: float) -> Measurement:
        """A result with what the network needs beside time; without, where its process does not answer any more."""
        file_mb = path.stat().st_size / 1e6 if self._has_file else None
        try:
            found = self._ask("usage", deadline)
        except WorkerError as error:
            found = {"unread": [f"memory and energy are not told: {error}"]}
        return dataclasses.replace(result, file_mb=file_mb, **found)

    def _ask(self, method: str, deadline: float) -> dict[str, Any]:
        self._worker.resume()
        try:
            return self._worker.call(method, _left(deadline))
        finally:
            self._worker.pause()

    def close(self) -> None:
        self._worker.close()


@contextlib.contextmanager
def _stopped(workers: Sequence[Worker]) -> Iterator[None]:
    try:
        for worker in workers:
            worker.pause()
        yield
    finally:
        for worker in workers:
            worker.resume()


def _left(deadline: float) -> float:
    return max(0.1, deadline - time.monotonic())
