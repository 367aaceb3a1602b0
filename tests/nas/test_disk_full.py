"""A full disk anywhere is one line that names the place, also where a child process meets it."""

import errno
import io
import json
import os
import tempfile
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from nas import errors, files, process
from nas.errors import DiskFull, UserError
from nas.measure import agent, remote
from nas.process import Worker, WorkerError
from nas.search.folder import make_folder

FULL = OSError(errno.ENOSPC, "No space left on device")


def fail(error: Exception):
    raise error


class FullLog(io.StringIO):
    def write(self, text):
        raise FULL


def answer_of(method, monkeypatch, **args) -> dict:
    """What the child's end answers to one request."""
    answers = io.BytesIO()
    monkeypatch.setattr(process, "_requests", [json.dumps({"method": "it", "args": args})], raising=False)
    monkeypatch.setattr(process, "_answers", answers, raising=False)
    process.serve({"it": method})
    return json.loads(answers.getvalue())


def test_a_child_whose_log_is_full_answers_all_the_same(monkeypatch):
    monkeypatch.setattr("sys.stderr", FullLog())
    assert answer_of(lambda: fail(ValueError("no network")), monkeypatch) == {"error": "ValueError: no network"}
    assert "no space left" in answer_of(lambda: print("here", file=FullLog()), monkeypatch)["full"]


def test_a_child_names_the_place_that_is_full(tmp_path, monkeypatch):
    run, temporary = tmp_path / "run", tmp_path / "tmp"
    run.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(process, "temporary_folder", lambda: temporary)
    monkeypatch.setattr(errors, "free_space", lambda folder: 1024 if folder == run else 1 << 30)
    told = answer_of(lambda stem: fail(FULL), monkeypatch, stem=str(run / "candidate"))["full"]
    assert told.startswith(f"no space left in {run} (1.0 KiB free)")
    assert answer_of(lambda stem: fail(FULL), monkeypatch, stem="run/candidate")["full"] == told
    named = OSError(errno.ENOSPC, "No space left on device", str(temporary / "zipped"))
    told = answer_of(lambda stem: fail(named), monkeypatch, stem=str(run / "candidate"))["full"]
    assert told.startswith(f"no space left in {temporary} (")
    assert answer_of(lambda: fail(DiskFull(run, 1 << 20)), monkeypatch)["full"] == str(DiskFull(run, 1 << 20))


def test_the_parent_raises_what_the_child_met(monkeypatch):
    worker = object.__new__(Worker)
    monkeypatch.setattr(worker, "_await_ready", lambda timeout_s: None, raising=False)
    answer = {"full": "no space left in /run (0.0 KiB free)"}
    monkeypatch.setattr(worker, "_answer", lambda timeout_s: answer, raising=False)
    with pytest.raises(DiskFull, match="no space left in /run"):
        worker.receive(1)


def test_a_full_disk_of_another_machine_is_told_as_its(monkeypatch):
    connection = object.__new__(remote.Connection)
    connection.target = "board"
    connection._worker = SimpleNamespace(
        send=lambda *_, **__: None, receive=lambda *_: fail(DiskFull(".", told="no space left in files"))
    )
    with pytest.raises(DiskFull, match=r"^board: no space left in files"):
        connection.call("put", 1)
    with pytest.raises(DiskFull):  # for `serve` to tell
        agent.answering(lambda: fail(DiskFull("files")))()
    assert agent.answering(lambda: fail(UserError("no runtime")))() == {"refused": "no runtime"}


@pytest.mark.parametrize("full", [True, False])
def test_a_child_that_could_print_nothing_for_want_of_space_says_so(full, monkeypatch):
    worker = object.__new__(Worker)
    worker._process, worker._printed = SimpleNamespace(wait=lambda timeout_s: 1), tempfile.TemporaryFile()  # noqa: SIM115
    space = SimpleNamespace(f_bavail=0 if full else 1 << 20, f_frsize=4096)
    monkeypatch.setattr(os, "fstatvfs", lambda file: space)
    found = worker._why_it_ended()
    assert errors.is_full(WorkerError(found)) == full
    assert found.startswith("exited with 1")


@pytest.mark.parametrize(("free", "kind"), [(0, DiskFull), (1 << 30, UserError)])
def test_no_folder_for_temporary_files(free, kind, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: fail(FileNotFoundError(errno.ENOENT, "No usable")))
    monkeypatch.setattr(files, "free_space", lambda folder: free)
    with pytest.raises(UserError, match=str(tmp_path)) as raised:
        Worker("nas.export.artifact")
    assert type(raised.value) is kind


@pytest.mark.parametrize("take", [files.folder_lock, files.job_folder, files.scratch, make_folder])
def test_a_run_s_folder_on_a_full_disk(take, tmp_path, monkeypatch):
    for module, name in ((os, "open"), (files.Path, "mkdir"), (tempfile, "mkdtemp"), (tempfile, "TemporaryFile")):
        monkeypatch.setattr(module, name, lambda *_, **__: fail(FULL))
    with pytest.raises(DiskFull, match="no space left"), nullcontext(take(tmp_path / "run")) as taken, taken:
        pass
