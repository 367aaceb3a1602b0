"""Measuring networks of which no latency is known yet, for `vitnas models --measure`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

from nas.errors import UserError
from nas.measure.cache import REFERENCE, opened
from nas.measure.samples import SURE_ROUNDS, quanta, quanta_line
from nas.units import counted

if TYPE_CHECKING:
    from nas.measure.runtime import Settings
    from search_spaces import Arch


def fill(
    archs: Mapping[str, Arch], settings: Settings, progress: Callable[[str, int, int], None] = lambda *_: None
) -> dict[str, str]:
    """Measure networks, by name, one after the other beside the reference network, and keep each in the cache at once.

    Afterwards `known` has them; what waited for CPUs that others used is not kept. Ctrl-C, too, keeps what was measured
    until then. progress: called with (the name, networks done, in all).

    Returns:
        Why, by its name, a network could not be measured, or not well enough for `known`.

    Raises:
        UserError: the reference network cannot be measured here, or the cache cannot be used.
    """
    from nas.export.artifact import Exporter
    from nas.files import scratch
    from nas.measure.device import device_lock, open_measurer
    from nas.measure.hardware import describe
    from nas.measure.samples import MeasureError
    from nas.process import WorkerError
    from search_spaces import get_arch

    failed: dict[str, str] = {}
    if not archs:
        return failed
    waiting: str | None = None
    with ExitStack() as stack:
        cache = stack.enter_context(opened(settings))
        room, exporter = stack.enter_context(scratch()), stack.enter_context(Exporter())
        try:
            with device_lock(settings.device):
                reference = exporter.write(get_arch(REFERENCE), settings, room / "reference")
                measurer = stack.enter_context(open_measurer(settings, reference, room))
        except (MeasureError, WorkerError) as error:
            raise UserError(f"the reference network {REFERENCE} cannot be measured here: {error}") from None
        for done, (name, arch) in enumerate(archs.items()):
            progress(name, done, len(archs))
            try:
                with device_lock(settings.device):
                    path = exporter.write(arch, settings, room / "candidate")
                    result = measurer.measure(path, pause=exporter.running)
                if quanta(result):
                    failed[name] = waiting = waiting or quanta_line(describe(settings))
                else:
                    cache.put(arch, settings.batch_size, result)
                    if (rounds := len(result.rounds_ms)) < SURE_ROUNDS:
                        told = f"only {counted(rounds, 'round')} in {result.wall_s:.0f} s"
                        failed[name] = f"{told}, and an interval of 95% needs {SURE_ROUNDS}"
            except (MeasureError, WorkerError) as error:
                failed[name] = str(error)
    return failed
