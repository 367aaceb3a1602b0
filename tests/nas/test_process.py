"""Huge pages: trainings have them, what is measured does not."""

import os
import subprocess
import sys

import pytest

import nas.process
from nas.cli import LONG
from nas.cli.__main__ import start
from nas.process import HUGE_PAGES, MARK, TUNABLES, Worker

TOLD = """
import os
from nas.process import serve
serve({"told": lambda: {"tunables": os.environ.get("GLIBC_TUNABLES")}})
"""


class Started(Exception):
    """Instead of another program."""


@pytest.fixture
def executed(monkeypatch, tmp_path):
    """The programs that this process would have become, with their environments; Linux gives huge pages if asked."""
    found = []

    def execve(path, words, environment):
        found.append((path, words, environment))
        raise Started

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(nas.process, "THP", tmp_path / "enabled")
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-P", "/bin/vitnas", "train", "--help"])
    monkeypatch.delenv(TUNABLES, raising=False)
    return found


@pytest.mark.parametrize("verb", LONG)
def test_a_verb_that_trains_starts_again_in_huge_pages(executed, monkeypatch, verb):
    monkeypatch.setattr(sys, "argv", ["vitnas", verb, "--help"])
    with pytest.raises(Started):
        start()
    [(path, words, environment)] = executed
    assert (path, words) == (sys.executable, [sys.executable, "-P", "/bin/vitnas", "train", "--help"])
    assert environment == os.environ | {TUNABLES: HUGE_PAGES, MARK: "1"}


@pytest.mark.parametrize("words", [[], ["bench", "--help"], ["--version"]])
def test_other_verbs_do_not(executed, monkeypatch, words):
    monkeypatch.setattr("nas.cli.app.main", lambda: None)
    monkeypatch.setattr(sys, "argv", ["vitnas", *words])
    start()
    assert not executed


@pytest.mark.parametrize("given", ["", HUGE_PAGES, "glibc.malloc.check=3"])
def test_what_the_user_set_stays(executed, monkeypatch, given):
    monkeypatch.setenv(TUNABLES, given)
    nas.process.start_again_in_huge_pages()
    assert not executed


@pytest.mark.parametrize("allowed", ["[always] madvise never", "always madvise [never]", None])
def test_nothing_is_started_where_linux_gives_none_or_all(executed, tmp_path, allowed):
    if allowed is None:
        (tmp_path / "enabled").unlink()
    else:
        (tmp_path / "enabled").write_text(allowed)
    nas.process.start_again_in_huge_pages()
    assert not executed


@pytest.mark.parametrize(
    ("given", "marked", "trains", "seen"),
    [
        (HUGE_PAGES, True, False, None),
        (HUGE_PAGES, True, True, HUGE_PAGES),
        (HUGE_PAGES, False, False, HUGE_PAGES),
        ("glibc.malloc.check=3", False, False, "glibc.malloc.check=3"),
    ],
)
def test_a_process_that_measures_has_memory_as_users_have_it(monkeypatch, tmp_path, given, marked, trains, seen):
    (tmp_path / "tells_tunables.py").write_text(TOLD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(TUNABLES, given)
    monkeypatch.delenv(MARK, raising=False)
    if marked:
        monkeypatch.setenv(MARK, "1")
    with Worker("tells_tunables", trains=trains) as worker:
        assert worker.call("told", 60)["tunables"] == seen


def test_the_command_answers_as_before():
    words = [sys.executable, "-m", "nas.cli", "train", "--help"]
    found = subprocess.run(words, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
    assert "nas.cli train [OPTIONS]" in found.stdout
