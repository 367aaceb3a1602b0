"""What a person sees on standard error while a command runs: live lines in a terminal, single ones in a pipe."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from nas.cli.forecast import Forecast, Pace, Plan, about
from nas.quality.tier import told_score
from nas.report.tables import console_of, prose

if TYPE_CHECKING:
    from nas.data.dataset import ImageData
    from nas.search.loop import Progress
    from nas.search.request import SearchRequest

DRAW_EVERY_S = 0.2
SPEAK_EVERY_S = 30.0
"""In a pipe, while something runs."""
LINES_EVERY = 10
"""Trials between two lines in a pipe, where none is trained."""
READING = "reading the networks"
BAR, WIDEST_BAR, NO_BAR_BELOW = 10, 30, 70
"""Columns of a bar: at least, at most, and of a terminal that has none."""

Say = Callable[[str], None]
Phase = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Line:
    """One thing that goes on. total: 0 where nothing is counted. left_s: seconds, where they are known. state: what
    else is told, the most important first. unit: of the count."""

    what: str
    done: int = 0
    total: int = 0
    left_s: float | None = None
    state: Sequence[str] = ()
    unit: str = ""

    def pieces(self) -> list[str]:
        """All that stands after the bar, the most important first."""
        count = [f"{self.done:,}/{self.total:,} {self.unit}".rstrip()] if self.total else []
        left = [f"{about(self.left_s)} left"] if self.left_s is not None else []
        return [*count, *left, *self.state]

    def fitted(self, width: int) -> tuple[str, int, str]:
        """What stands before the bar, the bar's width, and what stands behind it, in `width` columns.

        Pieces that do not fit are left out whole, from the end; the count stays.
        """
        bar = BAR + 1 if self.total and width >= NO_BAR_BELOW else 0
        what, pieces = self.what, self.pieces()
        room = width - bar - len(pieces[0]) - 1 if pieces else width - bar
        if len(what) > room:
            what = what[: max(0, room + 1)].rpartition(" ")[0].rstrip(" ,:")
        kept = pieces[:1]
        for piece in pieces[1:]:
            if len(what) + bar + 1 + len(", ".join([*kept, piece])) > width:
                break
            kept.append(piece)
        rest = ", ".join(kept)
        if bar:
            bar = min(WIDEST_BAR, bar - 1 + width - len(what) - bar - 1 - len(rest))
        return what, bar, rest

    def __str__(self) -> str:
        return " ".join([self.what, ", ".join(self.pieces())]).rstrip()


class Screen:
    """Live lines in a terminal, which are drawn only when told to: a refreshing thread would take time from what is
    measured. In a pipe, or on a terminal that cannot move its cursor, a line an event, and one every `SPEAK_EVERY_S`.

    quiet: nothing is shown.
    """

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or console_of(stderr=True)
        self._lines: tuple[Line, ...] = ()
        self._silent = quiet
        shown = not quiet and os.environ.get("RANK", "0") == "0"  # of torchrun's processes one speaks
        able = self.console.is_terminal and not self.console.is_dumb_terminal
        self._live = (
            Live(get_renderable=self._drawn, console=self.console, transient=True, auto_refresh=False)
            if shown and able
            else None
        )
        self._speaks = shown and not able
        self._drawn_at = self._spoken_at = time.monotonic()
        self._ended = threading.Event()
        self._beat = threading.Thread(target=self._speak_regularly, daemon=True)

    def __enter__(self) -> Screen:
        if self._live is not None:
            self._live.start()
        elif self._speaks:
            self._beat.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._lines = ()
            self._live.stop()
        elif self._speaks:
            self._ended.set()
            self._beat.join()

    def show(self, *lines: Line, at_once: bool = False, speak: bool = False) -> None:
        """What goes on now. at_once: it is drawn, however soon after the last time. speak: a pipe is told."""
        self._lines = lines
        now = time.monotonic()
        if self._live is not None and (at_once or now - self._drawn_at >= DRAW_EVERY_S):
            self._drawn_at = now
            self._live.refresh()
        elif self._speaks and speak:
            self.speak()

    def say(self, line: str) -> None:
        """A line that stays."""
        if not self._silent:
            self._spoken_at = time.monotonic()
            prose(self.console, line)

    def speak(self) -> None:
        """Tell in a pipe what goes on."""
        if text := "; ".join(map(str, self._lines)):
            self.say(text)

    def _speak_regularly(self) -> None:
        while not self._ended.wait(max(1.0, self._spoken_at + SPEAK_EVERY_S - time.monotonic())):
            if time.monotonic() - self._spoken_at >= SPEAK_EVERY_S:
                self.speak()

    def _drawn(self) -> Group:
        return Group(*(drawn(line, self.console.width - 1) for line in self._lines))


def drawn(line: Line, width: int) -> Table:
    """A line with its bar."""
    what, bar, rest = line.fitted(width)
    grid = Table.grid(padding=(0, 1, 0, 0))
    row: list[tuple[RenderableType, int]] = [
        (what, len(what)),
        (ProgressBar(line.total, line.done, width=bar), bar),
        (rest, len(rest)),
    ]
    shown = [(content, columns) for content, columns in row if columns]
    for _, columns in shown:
        grid.add_column(width=columns, no_wrap=True)
    grid.add_row(*(content for content, _ in shown))
    return grid


@contextmanager
def waiting(what: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A line in a terminal while the block runs; a pipe hears of it only where it takes long. Yields what counts (done,
    total), where something does."""
    with Screen(quiet) as screen:
        screen.show(Line(what), at_once=True)
        yield lambda done, total: screen.show(Line(what, done, total))


def load(module: str, quiet: bool = False) -> None:
    """Import what takes seconds, and say so."""
    if module not in sys.modules:
        with waiting("loading PyTorch", quiet):
            importlib.import_module(module)


@contextmanager
def watch(
    options: SearchRequest, images: ImageData | None = None, quiet: bool = False
) -> Iterator[tuple[Callable[[Progress], None], Say, Phase]]:
    """Progress of a search: yields callbacks for a trial's end, for a line to say, and for what goes on inside a trial
    or after them (what, done, in all)."""
    forecast = Forecast(plan_of(options, images))
    every = 1 if options.plan else LINES_EVERY
    trials, told = Line("trials", 0, options.trials), ""
    with Screen(quiet) as screen:
        screen.show(Line("opening the study"), at_once=True)

        def update(progress: Progress) -> None:
            nonlocal trials
            forecast.trial(progress.done, progress.trial_s, progress.measuring_s)
            trials = Line("trials", progress.done, progress.total, forecast.left_s(), state_of(progress, options))
            speak = progress.done % every == 0 or progress.done >= progress.total
            screen.show(trials, at_once=True, speak=speak)

        def phase(what: str, done: int, total: int) -> None:
            nonlocal told
            forecast.phase(what, done, total)
            new, told = what != told, what
            lines = replace(trials, left_s=forecast.left_s()), Line(what, done, total)
            screen.show(*lines, at_once=new, speak=new and not what.startswith("trial "))

        yield update, screen.say, phase


def plan_of(options: SearchRequest, images: ImageData | None) -> Plan:
    """What a search with these images has before it."""
    plan = options.plan
    if plan is None or images is None:
        return Plan(options.trials, timeout_s=options.timeout_s)
    from nas.quality.plan import NO_TEACHER

    every, races = len(images.train), options.quality == "race"
    plan = plan.settled(options.quality, every)
    once = plan.full_epochs * min(plan.images, every)
    tried = races and plan.teacher != NO_TEACHER
    return Plan(
        options.trials,
        final_images=plan.full_epochs * every,
        seeds=plan.seeds,
        networks=3 if races else 2,  # one is cut from a parent, which is tuned for it
        taught_images=2 * once if tried else 0,
        tuned_images=once if tried and plan.teacher is not None else 0,
        validation_images=plan.full_epochs * every,
        validated=plan.validate,
        timeout_s=options.timeout_s,
    )


def state_of(progress: Progress, options: SearchRequest) -> list[str]:
    """What is told of a search beside its count, the most important first."""
    from nas.search.rows import known

    best = progress.best
    found = [f"{progress.feasible} within {options.budget_ms:g} ms"]
    if best:
        found.append(f"best score {told_score(known(best.quality)):.1f} ({best.family}, {best.latency_ms:.2f} ms)")
    return found


@contextmanager
def watch_phases(quiet: bool = False) -> Iterator[tuple[Phase, Say]]:
    """Progress of a command that goes through phases: yields (progress callback, say)."""
    told = ""
    with Screen(quiet) as screen:
        screen.show(Line(READING), at_once=True)

        def progress(what: str, done: int, total: int) -> None:
            nonlocal told
            new, told = what != told, what
            screen.show(Line(what, done, total or 0), at_once=new, speak=new)

        yield progress, screen.say


@contextmanager
def watch_images(quiet: bool = False) -> Iterator[tuple[Phase, Say]]:
    """As `watch_phases`, where the phase `training`, whose parts are epochs, counts images, with the time left. A part
    is told behind a phase's name and a comma."""
    pace, told = Pace(), ""
    with Screen(quiet) as screen:
        screen.show(Line("reading the images"), at_once=True)

        def progress(what: str, done: int, total: int) -> None:
            nonlocal told
            name, _, _ = what.partition(",")
            new, told = name != told, name
            line = Line(what, done, total or 0)
            if name == "training" and total:
                pace.see(name, done)
                speed = pace.images_per_s
                line = Line(
                    what,
                    done,
                    total,
                    (total - done) / speed if speed else None,
                    [f"{speed:,.0f} a second"] if speed else (),
                    "images",
                )
            screen.show(line, at_once=new, speak=new)

        yield progress, screen.say
