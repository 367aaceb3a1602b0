"""The end of a long command, in steps: what fails is told and recorded, and the next step goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nas.errors import reason


class Ending:
    """failures: a line for each step that has failed. interrupted: whether Ctrl-C has ended one."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._failed: dict[str, str] = {}
        self.interrupted = False

    @property
    def failures(self) -> list[str]:
        return list(self._failed.values())

    def fail(self, what: str, why: str) -> None:
        """Record that a step has failed."""
        self._failed[what] = f"{what} failed: {why}"
        self._say(self._failed[what])

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """A step, which fails with what the block raises; made again without a failure, it has none."""
        self._failed.pop(what, None)
        try:
            yield
        except KeyboardInterrupt:
            self.interrupted = True
            self._say(f"interrupted in this step: {what}")
        except Exception as error:
            self.fail(what, reason(error))
