"""Progress in a real terminal of 60, 80 and 120 columns, on one that cannot move its cursor, and in a pipe."""

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
from types import SimpleNamespace

import pytest
from rich.console import Console

from nas.cli.progress import Line, Screen, plan_of, watch, watch_images, watch_phases
from nas.quality.plan import TrainingPlan
from nas.search.loop import Progress
from nas.search.rows import Trial

BEST = Trial(trial=0, family="efficientvit", state="complete", latency_ms=1.234, quality=36.84)
TRIALS = Line("trials", 12, 100, 750, ("8 within 1.5 ms", "best score 36.8 (efficientvit, 1.23 ms)"))
SEARCH = SimpleNamespace(trials=12, budget_ms=1.5, plan=None, timeout_s=None)


@pytest.mark.parametrize(
    ("width", "bar", "rest"),
    [
        (30, 0, "12/100"),
        (60, 0, "12/100, about 12 min left, 8 within 1.5 ms"),
        (80, 30, "12/100, about 12 min left, 8 within 1.5 ms"),
        (120, 29, "12/100, about 12 min left, 8 within 1.5 ms, best score 36.8 (efficientvit, 1.23 ms)"),
    ],
)
def test_a_line_fits_by_leaving_out_what_matters_least(width, bar, rest):
    assert TRIALS.fitted(width) == ("trials", bar, rest)


@pytest.mark.parametrize("width", range(24, 130))
def test_no_line_is_wider_than_the_terminal(width):
    long = Line("final training, trial 1234 of a very long name, seed 2", 123_456, 1_234_567, 8_000, ("one", "two"))
    for line in (TRIALS, long, Line("measuring the reference network efficientvit_m0")):
        what, bar, rest = line.fitted(width)
        assert len(" ".join(filter(None, (what, "-" * bar, rest)))) <= width
        assert not line.total or f"{line.done:,}/{line.total:,}" in rest
        assert line.what.startswith(what)
        assert line.what[len(what) : len(what) + 1] in ("", " ", ",", ":")


def shown(width, play):
    """What a terminal of a width, without colours, is sent."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system=None, width=width, height=10, _environ={})
    with Screen(console=console) as screen:
        play(screen)
    return file.getvalue()


def test_two_lines_are_drawn():
    text = shown(
        80, lambda screen: screen.show(TRIALS, Line("trial 13: training, epoch 2/9", 1200, 9000), at_once=True)
    )
    assert "12/100, about 12 min left" in text
    assert "trial 13: training, epoch 2/9" in text
    assert "1,200/9,000" in text


PLAY = """
from types import SimpleNamespace
from nas.cli.progress import watch
from nas.search.loop import Progress
from nas.search.rows import Trial
best = Trial(trial=0, family="efficientvit", state="complete", latency_ms=1.234, quality=36.84)
with watch(SimpleNamespace(trials=12, budget_ms=1.5, plan=None, timeout_s=None)) as (update, say, phase):
    update(Progress(10, 12, 8, best, 60.0, 1.0))
    phase("measuring the reference network efficientvit_m0", 0, 0)
    say("a line that stays, with more words than a narrow terminal can hold in one of its lines: " + "word " * 20)
    phase("trial 10: exporting", 0, 0)
    phase("trial 10: training, epoch 2/9", 1200, 9000)
    update(Progress(11, 12, 8, best, 60.0, 1.0))
"""


def in_terminal(program, width, **environment):
    """All that a program sends to a real terminal of a width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    variables = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    variables |= {"TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)} | environment
    child = subprocess.Popen([sys.executable, "-c", program], stdin=theirs, stdout=theirs, stderr=theirs, env=variables)
    os.close(theirs)
    told = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            told += chunk
    except OSError:  # Linux: the other end is closed
        pass
    os.close(ours)
    assert child.wait() == 0, told.decode()
    return told.decode()


def visible(text):
    """Lines as drawn, one after the other, without what moves the cursor or colours."""
    import re

    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "\r", text)
    return [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]


@pytest.mark.parametrize(
    "width", [80, *(pytest.param(width, marks=pytest.mark.slow) for width in (60, 120))]
)  # at others test_a_line_fits_by_leaving_out_what_matters_least
def test_in_a_real_terminal(width):
    lines = visible(in_terminal(PLAY, width, NO_COLOR="1"))
    assert all(len(line) < width for line in lines), lines
    trials = [line for line in lines if line.startswith("trials")]
    assert all("10/12, about" in line or "11/12, about" in line for line in trials)
    assert "10/12" in trials[0]
    assert ("━" in trials[0]) == (width >= 70)
    assert ("best score 36.8" in trials[0]) == (width >= 100)
    assert any(line.startswith("measuring the reference network efficientvit_m0") for line in lines)
    assert any(line.startswith("trial 10: training, epoch 2/9") and "1,200/9,000" in line for line in lines)
    stays = " ".join(lines[lines.index(next(line for line in lines if line.startswith("a line"))) :])
    assert "with more words than a narrow terminal can hold in one of its lines: word" in stays


def test_a_dumb_terminal_gets_lines():
    text = in_terminal(PLAY, 80, TERM="dumb")
    assert "\x1b" not in text
    assert "measuring the reference network efficientvit_m0" in text


def play_search(capsys):
    with watch(SEARCH) as (update, say, phase):
        update(Progress(10, 12, 8, BEST, 60.0, 1.0))
        phase("measuring the reference network efficientvit_m0", 0, 0)
        say("a note " * 40)
        phase("trial 10: exporting", 0, 0)
        update(Progress(11, 12, 8, BEST, 60.0, 1.0))
        update(Progress(12, 12, 9, BEST, 60.0, 1.0))
        phase("closing side-by-side run", 1, 30)
        phase("closing side-by-side run", 2, 30)
    return capsys.readouterr().err.splitlines()


def test_in_a_pipe_a_line_an_event(capsys):
    lines = play_search(capsys)
    state = "8 within 1.5 ms, best score 36.8 (efficientvit, 1.23 ms)"
    assert lines[0].startswith("trials 10/12, about ")
    assert lines[0].endswith(state)
    assert "measuring the reference network efficientvit_m0" in lines[1]
    assert lines[2] == ("a note " * 40).strip()
    assert lines[3].startswith("trials 12/12, about ")
    assert lines[4].endswith("closing side-by-side run 1/30")
    assert len(lines) == 5


def test_in_a_pipe_something_is_told_regularly(capsys, monkeypatch):
    """Though nothing happens: the other thread ends the wait here, not time."""
    import threading

    from nas.cli import progress

    monkeypatch.setattr(progress, "SPEAK_EVERY_S", 0.0)
    spoken = threading.Event()
    with Screen() as screen:
        monkeypatch.setattr(screen, "say", lambda line: spoken.set())
        screen.show(Line("training", 5, 10))
        assert spoken.wait(60)


def test_quiet_says_nothing(capsys):
    with watch(SEARCH, quiet=True) as (update, say, phase):
        update(Progress(10, 12, 8, BEST, 60.0, 1.0))
        say("a note")
        phase("closing side-by-side run", 1, 30)
    assert capsys.readouterr().err == ""


def test_one_of_torchruns_processes_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with watch_phases() as (progress, _):
        progress("scoring", 1, 2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("quality", "teacher", "trained"),
    [
        ("race", None, (3, 1600, 0)),
        ("race", "x", (3, 1600, 800)),
        ("race", "none", (3, 0, 0)),
        ("train", None, (2, 0, 0)),
    ],
)
def test_what_a_search_has_before_it_follows_from_its_tier_and_teacher(quality, teacher, trained):
    plan = TrainingPlan("images", images=400, final_epochs=2, seeds=2, teacher=teacher)
    request = SimpleNamespace(trials=12, timeout_s=None, quality=quality, plan=plan)
    found = plan_of(request, SimpleNamespace(train=range(1000)))
    assert (found.networks, found.taught_images, found.tuned_images) == trained
    assert (found.final_images, found.seeds) == (2000, 2)


def test_a_training_says_its_epoch(capsys):
    with watch_images() as (progress, _):
        progress("training, epoch 1/9", 0, 9000)
        progress("training, epoch 2/9", 1000, 9000)
        progress("exporting", 0, 0)
    assert capsys.readouterr().err.splitlines()[:2] == ["training, epoch 1/9 0/9,000 images", "exporting"]


def test_what_takes_seconds_is_told_in_a_terminal_only(capsys):
    program = "from nas.cli.progress import load; import time; load('colorsys'); load('json')"
    assert visible(in_terminal(program, 80)) == ["loading PyTorch"]
    exec(program, {})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("watching", ["watch_phases()", "watch_images()"])
def test_before_the_first_phase_something_is_shown(watching):
    lines = visible(
        in_terminal(f"from nas.cli.progress import *\nwith {watching} as (progress, say): say('a note')", 80)
    )
    assert lines[0].startswith("reading the ")
    assert "a note" in lines
