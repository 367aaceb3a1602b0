"""Files, folder locks and scratch folders: whole or absent, one command at a time, nothing left behind."""

import errno
import multiprocessing
import os
import resource
import stat
import sys
import threading

import pytest

from nas import files
from nas.errors import DiskFull, UserError, disk_errors, is_full
from nas.files import drafted, folder_lock, replace_file, scratch, sweep_drafts
from nas.text import first_line


def test_a_file_is_replaced_whole_with_the_mode_of_the_umask(tmp_path):
    path = tmp_path / "report.json"
    replace_file(path, "old")
    before = os.umask(0o027)
    try:
        with drafted(path) as draft:
            assert draft.suffix == ".json"
            assert draft.parent == tmp_path
            other = tmp_path / "other"  # as safetensors does
            other.touch(0o600)
            other.write_text("new")
            other.replace(draft)
            assert path.read_text() == "old"
    finally:
        os.umask(before)
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_no_draft(tmp_path):
    path = tmp_path / "model.onnx"
    replace_file(path, b"old")

    def write() -> None:
        with drafted(path) as draft:
            draft.write_bytes(b"half")
            raise ValueError("no network")

    with pytest.raises(ValueError, match="no network"):
        write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "state.json"
    with drafted(path) as first, drafted(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_links_and_pipes_stay_what_they_are(tmp_path):
    replace_file(tmp_path / "there", "old")
    (tmp_path / "link").symlink_to("there")
    replace_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there").read_text() == "new"
    replace_file(os.devnull, "nothing")
    assert not os.path.isfile(os.devnull)


def test_drafts_of_ended_processes_are_swept(tmp_path, ended):
    folder = tmp_path / "best"
    folder.mkdir()
    left = folder / f".model.{files.machine_tag()}-{ended}-0123abcd.draft.onnx"
    kept = [
        folder / f".model.{files.machine_tag()}-{os.getppid()}-0123abcd.draft.onnx",
        folder / f".model.ffffffff-{ended}-0123abcd.draft.onnx",  # another machine's
        folder / ".draft.txt",
    ]
    for path in (left, *kept):
        path.touch()
    sweep_drafts(tmp_path)
    assert sorted(folder.iterdir()) == sorted(kept)


def test_a_file_that_may_not_grow_is_a_full_disk_in_one_line(tmp_path):
    path = tmp_path / "model.onnx"
    replace_file(path, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(DiskFull, match=r"ulimit -f.*at least 2\.0 MiB needed") as raised:
            replace_file(path, bytes(2 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_library_that_hides_a_full_disk(tmp_path, monkeypatch):
    def write() -> None:
        with drafted(tmp_path / "checkpoint.pt") as draft:
            draft.write_bytes(b"12")
            raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    with pytest.raises(RuntimeError, match="PytorchStreamWriter"):
        write()
    monkeypatch.setattr(files, "free_space", lambda folder: 0)
    with pytest.raises(DiskFull, match="no space left"):
        write()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        ValueError("I/O error: No space left on device (os error 28)"),
        RuntimeError("database or disk is full"),
    ],
)
def test_what_a_full_disk_raises(error, tmp_path):
    assert is_full(error)

    def write() -> None:
        with disk_errors(tmp_path):
            try:
                raise error
            except Exception as inner:
                raise KeyError("trial") from inner

    with pytest.raises(DiskFull, match="make room") as raised:
        write()
    assert raised.value.place == tmp_path


def test_other_errors_are_no_full_disk(tmp_path):
    assert not is_full(OSError(errno.EACCES, "Permission denied"))
    with pytest.raises(PermissionError), disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_first_line():
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(ValueError("a" * 300)) == "a" * 200
    assert (
        first_line(RuntimeError("Exception from src/a.cpp:1:\nCheck failed at src/b.cpp:2:\nno room\n\n")) == "no room"
    )
    assert first_line(MemoryError()) == "MemoryError"
    assert first_line(KeyError()) == "KeyError"


def test_the_second_command_on_a_folder_is_refused_and_told_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vitnas", "prune", "--storage", "postgresql://user:secret@host/db"])
    with folder_lock(tmp_path):
        with (
            pytest.raises(
                UserError, match=rf"{tmp_path} is in use by vitnas prune \(process {os.getpid()} on .*since 2"
            ),
            folder_lock(tmp_path),
        ):
            pass
        assert "secret" not in (tmp_path / ".lock").read_text()
        with folder_lock(tmp_path, name=".report.lock"):
            pass
    assert (tmp_path / ".lock").read_text() == ""
    with folder_lock(tmp_path):
        pass


def test_who_waits_for_a_folder_is_told_once_and_gets_it(tmp_path):
    told, inside, done = threading.Event(), threading.Event(), threading.Event()

    def wait() -> None:
        with folder_lock(tmp_path, waiting=True, say=lambda line: told.set()):
            inside.set()
        done.set()

    with folder_lock(tmp_path):
        thread = threading.Thread(target=wait)
        thread.start()
        assert told.wait(30)
        assert not inside.is_set()
    assert done.wait(30)
    thread.join()


def test_a_folder_without_locks_costs_a_line_and_not_the_command(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    lines = []
    with folder_lock(tmp_path, say=lines.append):
        pass
    assert len(lines) == 1
    assert "cannot be locked (No locks available)" in lines[0]
    with scratch(tmp_path) as folder, scratch(tmp_path):
        assert folder.is_dir()
    assert not (tmp_path / "tmp").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match=r"cannot write to .*missing"), folder_lock(tmp_path / "missing"):
        pass


def test_a_forked_child_does_not_keep_the_locks_of_a_killed_parent(tmp_path, monkeypatch):
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()

    def stay() -> None:
        there.send("up")
        there.recv()

    flock = files.fcntl.flock

    def as_a_kill_does(file, how):
        if how != files.fcntl.LOCK_UN:
            flock(file, how)

    monkeypatch.setattr(files.fcntl, "flock", as_a_kill_does)
    with folder_lock(tmp_path):
        child = fork.Process(target=stay)
        child.start()
        assert here.recv() == "up"
    try:
        with folder_lock(tmp_path):
            pass
    finally:
        here.send("end")
        child.join()


def test_scratch_lies_in_the_run_and_goes_with_the_block(tmp_path):
    with scratch(tmp_path) as first, scratch(tmp_path) as second:
        assert first.parent == second.parent == tmp_path / "tmp"
        (first / "network.onnx").touch()
    assert not list(tmp_path.iterdir())


def test_scratch_of_a_killed_process_is_swept_and_a_live_ones_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    left = tmp_path / f"vitnas-{files.machine_tag()}-left"
    other = tmp_path / "vitnas-ffffffff-other"  # another machine's
    for folder in (left, other):
        folder.mkdir()
        (folder / "network.onnx").touch()
    with scratch() as live:
        assert sorted(tmp_path.iterdir()) == sorted([live, other])
        with scratch():
            assert live.is_dir()
    assert list(tmp_path.iterdir()) == [other]


def test_a_scratch_folder_that_is_always_removed_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "TRIES", 3)
    monkeypatch.setattr(files.tempfile, "mkdtemp", lambda prefix, dir: str(tmp_path / "removed"))
    with pytest.raises(UserError, match="other processes remove it"), scratch(tmp_path):
        pass
