"""A run's folder: its name, who may remove it, and what a killed command left there."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from nas import files
from nas.errors import UserError
from nas.files import folder_lock, job_folder, machine_tag
from nas.identity import IMAGES
from nas.job import Job
from nas.measure.device import default_threads
from nas.measure.runtime import Settings
from nas.search import folder as search_folder
from nas.search import loop
from nas.search.request import SearchRequest, default_study
from search_spaces.registry import FAMILIES


def name(
    threads: int | None = None, batch_size: int = 1, precision: str = "fp32", num_classes: int = 1000, **options
) -> str:
    settings = Settings("onnxruntime", "cpu", threads or default_threads(), batch_size, precision)
    fixed = (2.0, settings, tuple(FAMILIES), 1, None, "", Path("runs"), None, "auto", None, num_classes)
    return default_study(SearchRequest(*fixed, **options))


def test_what_differs_from_the_default_is_in_a_run_s_name():
    assert name(num_classes=1000) == name() == "cpu-onnxruntime-2ms-all"
    assert name(precision="fp16", quality="train") == "cpu-onnxruntime-fp16-2ms-all-train"
    threads = default_threads() + 1
    assert name(threads, 8, throughput_at=32, resolution=160, num_classes=10) == (
        f"cpu-onnxruntime-2ms-all-{threads}t-b8-at32-160px-10c"
    )


@pytest.mark.parametrize("found", ["nothing", "a study", "an empty folder"])
def test_a_refused_worker_removes_no_folder_but_an_empty_one_of_its_own(found, tmp_path, monkeypatch):
    folder = tmp_path / "short"

    def open_study(*_):
        if found == "a study":
            (folder / "study.journal").write_text("another worker's")
        raise UserError("threads 4, not 2")

    if found == "an empty folder":
        folder.mkdir()  # of a worker with a database
    monkeypatch.setattr("nas.study.trials.open_study", open_study)
    monkeypatch.setattr(SearchRequest, "check", lambda request: None)
    monkeypatch.setattr(SearchRequest, "identity", lambda *_: {})
    settings = Settings("onnxruntime", "cpu", 1)
    options = SearchRequest(2.0, settings, ("shvit",), 2, None, "short", tmp_path, None, "random", 0, 10)
    with pytest.raises(UserError, match="threads 4"):
        loop.search(options, print, print)
    left = {"nothing": [], "a study": ["short", "study.journal"], "an empty folder": ["short"]}
    assert [path.name for path in tmp_path.rglob("*")] == left[found]


def test_hardware_json_is_written_where_a_refused_worker_removed_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("nas.measure.hardware.describe", lambda settings: {"cpu": "one"})
    search_folder.write_hardware(tmp_path / "short", Settings())
    assert (tmp_path / "short" / "hardware.json").is_file()


def test_a_job_sweeps_what_a_killed_one_left(tmp_path, ended):
    job = Job(tmp_path, {}, print, print, "cpu")
    job.make_folder()
    left = job.kept / f".state.{machine_tag()}-{ended}-0123abcd.draft.json"
    left.touch()
    job.make_folder()
    assert not left.exists()


def test_what_an_older_vitnas_began_goes_on_only_where_it_is_finished(tmp_path):
    """Its digests of images compare with none of today's: no user has changed them."""
    begun, said = Job(tmp_path, {}, print, print, "cpu"), []
    begun.agree({IMAGES: "0123456789abcdef", "the network of --model": "a"})
    begun.make_folder()
    begun.save()
    today = {IMAGES: "2:0123456789abcdef", "the network of --model": "a"}
    with pytest.raises(UserError, match="was begun by an older vitnas: give another --out"):
        Job(tmp_path, {}, said.append, print, "cpu").agree(today)
    begun.result.touch()
    begun.finish()
    Job(tmp_path, {}, said.append, print, "cpu").agree(today)
    assert len(said) == 1
    assert "by an older vitnas" in said[0]
    inputs = search_folder.training_inputs(tmp_path, begun.state.inputs)
    (tmp_path / search_folder.TRAINING_INPUTS).write_text(inputs)
    with pytest.raises(UserError, match="trainings of an older vitnas; use --study"):
        search_folder.training_inputs(tmp_path, today)


@pytest.mark.parametrize(("beside", "named"), [({}, "--unlabelled"), ({"data": "images"}, "--data")])
def test_which_images_differ_is_told(tmp_path, beside, named):
    """Those without labels take the place of others, or are beside them."""
    options = {"unlabelled": "more"} | beside
    job = Job(tmp_path, options, print, print, "cpu")
    job.agree({IMAGES: "2:0"})
    job.make_folder()
    job.save()
    with pytest.raises(UserError, match=f"another content of the images of {named}: give another --out"):
        Job(tmp_path, options, print, print, "cpu").agree({IMAGES: "2:1"})


def test_two_prunings_of_one_folder(tmp_path, monkeypatch):
    """The second is refused, with a line that names the first."""
    from nas.prune.run import prune

    monkeypatch.setattr("sys.argv", ["vitnas", "prune"])
    options = SimpleNamespace(folder=tmp_path / "pruned", model="shvit_s1", check=lambda: None)
    (tmp_path / "pruned").mkdir()
    with (
        folder_lock(options.folder),
        pytest.raises(UserError, match=r"pruned is in use by vitnas prune \(process \d+ on "),
    ):
        prune(options, print, print)


@pytest.mark.parametrize("written", [True, False])
def test_a_job_s_folder_that_was_made_for_nothing_goes_again(written, tmp_path):
    def fail():
        with job_folder(tmp_path / "runs" / "pruned"):
            if written:
                (tmp_path / "runs" / "pruned" / "state").mkdir()
            raise UserError("no such network")

    with pytest.raises(UserError, match="no such network"):
        fail()
    assert (tmp_path / "runs").exists() == written


def test_a_folder_that_was_there_stays(tmp_path):
    with job_folder(tmp_path):
        pass
    assert tmp_path.exists()


def test_a_folder_that_its_maker_removes_meanwhile_is_made_again(tmp_path, monkeypatch):
    folder = tmp_path / "pruned"
    locked = files._locked

    def removed_first(*arguments):
        monkeypatch.setattr(files, "_locked", locked)
        (folder / files.LOCK).unlink()
        folder.rmdir()
        return locked(*arguments)

    monkeypatch.setattr(files, "_locked", removed_first)
    with job_folder(folder):
        assert (folder / files.LOCK).is_file()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*file/pruned"), job_folder(tmp_path / "file" / "pruned"):
        pass
