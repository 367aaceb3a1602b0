"""What goes wrong in a search, and what it leaves: a made-up device and made-up trainings, no child processes."""

from __future__ import annotations

import csv
import html
import json
import shutil
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import nas.export
import nas.export.side_by_side
import nas.measure
import nas.measure.hardware
import nas.quality
import nas.quality.tiers
import nas.search.best
import nas.search.closing
import nas.search.final
import nas.search.finish
import nas.search.loop
import nas.search.report
import nas.search.request
import nas.search.run
import nas.search.trial
from nas.cli.display import what_now
from nas.errors import TrainingError, UserError
from nas.evaluate.precision import Price
from nas.export.card import HELD_OUT, Card
from nas.export.quantize import Recipe
from nas.measure.remote import LinkLost
from nas.measure.runtime import Settings
from nas.measure.samples import MeasureError, Measurement
from nas.process import WorkerError
from nas.quality.candidate import Candidate
from nas.quality.plan import TrainingPlan
from nas.quality.shared import SupernetTier
from nas.quality.trained import HalvingTier
from nas.quality.trainer import CandidateTrainer
from nas.search.accuracy import Accuracies
from nas.search.lower import LowerFile, LowerFiles
from nas.search.precision import EXPECTED_DROP, HOPELESS, RATIOS
from nas.search.request import SearchRequest
from search_spaces import Arch, create_model, table

TRIALS = 4


def alike(fault: BaseException) -> Any:
    """One that is treated as the others are: a slow test."""
    return pytest.param(fault, marks=pytest.mark.slow)


class Device:
    """Latencies that follow MACs; `faults` are raised in place of the first measurements, by their number."""

    def __init__(self) -> None:
        self.faults: dict[int, BaseException] = {}
        self.ratios: dict[str | None, float] = {}
        """Of latency, by precision; 1 else."""
        self.measured: list[Arch] = []
        self.compared = 0
        self.running: list[Any] = []

    def write(self, network: Arch, settings: Any, stem: Path) -> Path:
        path = Path(f"{stem}.json")
        path.write_text(network.to_json())
        return path

    def prepare(self) -> None:
        pass

    def measure(self, path: Path, *_: Any, computed_in: str | None = None, **__: Any) -> Measurement:
        fault = self.faults.pop(len(self.measured), None)
        self.measured.append(Arch.from_json(path.read_text()))
        if fault is not None:
            raise fault
        return self.timed(path, computed_in)

    def compare(self, paths: dict[str, Path], settings: Any, *_: Any, **__: Any) -> dict[str, Measurement]:
        self.compared += 1
        return {label: self.timed(path, settings[label].precision) for label, path in paths.items()}

    def timed(self, path: Path, precision: str | None) -> Measurement:
        latency = self.ratios.get(precision, 1.0) * table(Arch.from_json(path.read_text())).macs() / 1e8
        return Measurement([[latency] * 3] * 8, [[1.0] * 3] * 8)


class Taught(HalvingTier):
    """Trains nothing. `faults`: raised by a training, by how many were begun before; `begun` lists their networks."""

    faults: dict[int, BaseException]
    begun: list[str]

    def begin(
        self,
        candidate: Candidate,
        images: Any,
        recipe: Any,
        seed: int,
        checkpoint: Path,
        weights: Any = None,
        teacher: Any = None,
    ) -> Any:
        arch, fault = candidate.arch, self.faults.pop(len(self.begun), None)
        self.begun.append(arch.digest())

        class Training:
            loader = SimpleNamespace(close=lambda: None)

            def __init__(self) -> None:
                self.recipe, self.epoch = recipe, 0

            @property
            def network(self) -> Any:
                return create_model(arch)

            def run(self, until: int | None = None, progress: Any = None) -> None:
                checkpoint.parent.mkdir(parents=True, exist_ok=True)
                if fault is not None:
                    raise fault
                self.epoch = until or recipe.epochs

        return Training()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, small_shvit: None) -> Device:
    found = Device()
    for module in (nas.search.trial, nas.search.closing):
        monkeypatch.setattr(module, "Exporter", lambda *_: nullcontext(found))
    for module in (nas.search.loop, nas.search.trial, nas.export.side_by_side):
        monkeypatch.setattr(module, "device_lock", lambda device: nullcontext())
    monkeypatch.setattr(nas.search.trial, "open_measurer", lambda *_: nullcontext(found))
    monkeypatch.setattr(nas.export.side_by_side, "compare", found.compare)
    monkeypatch.setattr(nas.search.best, "write_onnx", lambda arch, path, *_: path.write_bytes(b"untrained"))
    monkeypatch.setattr(nas.search.best, "label_onnx", lambda *_, **__: None)
    monkeypatch.setattr(nas.measure.hardware, "SAMPLE_S", 0.0)
    monkeypatch.setattr(nas.search.report, "plot_front", lambda data: b"")
    return found


@pytest.fixture
def tier(monkeypatch: pytest.MonkeyPatch) -> type[Taught]:
    monkeypatch.setattr(Taught, "faults", {}, raising=False)
    monkeypatch.setattr(Taught, "begun", [], raising=False)
    monkeypatch.setitem(nas.quality.tiers.TIERS, "train", Taught)
    monkeypatch.setattr(
        CandidateTrainer,
        "judge",
        lambda self, network, images: SimpleNamespace(top1=50.0, total=8, hits=(True, False) * 4),
    )

    def save_onnx(model: Any, folder: Path, *_: Any, **__: Any) -> None:
        (folder / "model.onnx").write_bytes(b"trained")

    monkeypatch.setattr(nas.search.best, "save_onnx", save_onnx)
    return Taught


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """80 images of each of two classes: as few as may be searched on."""
    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(80):
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / "images" / label / f"{i}.png")
    return tmp_path / "images"


def command(out: Path, *words: str, trials: int = TRIALS, budget: str = "10ms") -> list[str]:
    base = ("search", "--latency-budget", budget, "--trials", str(trials), "--study", "s", "--out", str(out))
    return [
        *base,
        *("--family", "shvit", "--resolution", "64", "--sampler", "random", "--seed", "1", "--no-cache"),
        *words,
    ]


def trained(out: Path, pictures: Path, *words: str) -> list[str]:
    short = ("--train-images", "100", "--epochs", "1", "--final-epochs", "1", "--seeds", "1", "--threads", "1")
    return command(out, "--data", str(pictures), "--from-scratch", *short, "--json", *words)


def study_of(out: Path) -> Any:
    import optuna

    from nas.study.storage import open_storage

    storage = open_storage(out / "s" / "study.journal", read_only=True)
    return optuna.load_study(study_name="s", storage=storage)


def states(out: Path) -> list[str]:
    return [trial.state.name for trial in study_of(out).get_trials(deepcopy=False)]


def errors(out: Path) -> list[str]:
    return [t.user_attrs["error"] for t in study_of(out).get_trials(deepcopy=False) if "error" in t.user_attrs]


def best(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "s" / "best").iterdir()}


@pytest.mark.parametrize(
    "words", [("search", "--latency-budget", "1ms"), ("prune", "--model", "levit_128s"), ("train", "levit_128s")]
)
@pytest.mark.parametrize("seed", ["-1", str(2**32)])
def test_seeds_out_of_range(vitnas, words, seed):
    vitnas.refused(vitnas(*words, "--seed", seed), "--seed")


# A trial


@pytest.mark.parametrize(
    "fault",
    [
        TrainingError("the loss is no longer finite in epoch 1", 1),
        alike(UserError("no batch holds two images that can be decoded")),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied\nmore"),
        MemoryError(),
        alike(OSError(5, "Input/output error")),
        alike(ValueError("cannot reshape")),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_a_training_that_fails_is_a_failed_trial(vitnas, device, tier, pictures, tmp_path, fault):
    """The others go on; it is not made again, as a trial that lost its device is."""
    tier.faults[1] = fault
    code, out, err = vitnas(*trained(tmp_path, pictures))
    assert code == 0, err
    assert states(tmp_path).count("FAIL") == 1
    assert len(states(tmp_path)) == TRIALS
    (error,) = errors(tmp_path)
    assert "\n" not in error
    assert str(fault).split("\n")[0].split("]")[-1].strip() in error or type(fault).__name__ in error
    assert json.loads(out)["winner"]


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch, tier: type[Taught]) -> dict[str, BaseException]:
    """A tier whose families' weights are made up; what is raised in place of making them, by family."""
    faults: dict[str, BaseException] = {}

    class Weights(SupernetTier):
        faults, begun, begin = tier.faults, tier.begun, tier.begin

        def _made(self, family: str) -> Any:
            tier.begun.append(family)
            if family in faults:
                raise faults[family]
            found = SimpleNamespace(top1=50.0, total=29)
            return SimpleNamespace(arch=SimpleNamespace(resolution=64), evaluate=lambda *_: found)

    monkeypatch.setitem(nas.quality.tiers.TIERS, "supernet", Weights)
    return faults


def test_a_family_without_shared_weights_fails_its_own_trials(vitnas, device, shared, tier, pictures, tmp_path):
    shared["shvit"] = MemoryError()
    more = ("--quality", "supernet", "--family", "levit")
    code, _, err = vitnas(*trained(tmp_path, pictures, *more))
    assert code == 0, err
    trials = study_of(tmp_path).get_trials(deepcopy=False)
    assert {(t.params["family"], t.state.name) for t in trials} == {("shvit", "FAIL"), ("levit", "COMPLETE")}
    assert all(error == "the shared weights of shvit: MemoryError" for error in errors(tmp_path))
    assert tier.begun.count("shvit") == 1, "not tried again"


def test_no_family_has_shared_weights(vitnas, device, shared, pictures, tmp_path):
    shared["shvit"] = UserError("no batch holds two images")
    code, _, err = vitnas(*trained(tmp_path, pictures, "--quality", "supernet"))
    assert code == 2
    assert err.splitlines()[-1].startswith("vitnas: no family's weights could be trained")
    assert "no batch holds two images" in err
    assert states(tmp_path) == ["FAIL"]


def test_a_lost_link_is_tried_again(vitnas, device, tmp_path):
    device.faults[1] = LinkLost("the connection ended")
    assert vitnas(*command(tmp_path))[0] == 0
    trials = study_of(tmp_path).get_trials(deepcopy=False)
    (lost,) = (t for t in trials if t.state.name == "FAIL")
    assert [t.params for t in trials if t.user_attrs.get("retry_of") == lost.number] == [lost.params]
    assert states(tmp_path).count("COMPLETE") == TRIALS


@pytest.mark.parametrize("fault", [MeasureError("killed by signal 9"), WorkerError("exited with 1"), MemoryError()])
def test_a_network_that_cannot_be_measured_is_a_failed_trial(vitnas, device, tmp_path, fault):
    device.faults[1] = fault
    assert vitnas(*command(tmp_path))[0] == 0
    assert states(tmp_path).count("FAIL") == 1
    assert len(states(tmp_path)) == TRIALS


def test_a_full_disk_ends_the_search_and_its_trial_is_made_again(vitnas, device, tmp_path):
    device.faults[2] = OSError(28, "No space left on device")
    code, _, err = vitnas(*command(tmp_path))
    assert code == 1
    assert "no space left in" in err
    assert states(tmp_path) == ["COMPLETE", "FAIL", "WAITING"]
    assert (tmp_path / "s" / "report.html").is_file()
    assert vitnas(*command(tmp_path))[0] == 0
    assert states(tmp_path).count("COMPLETE") == TRIALS


def test_ctrl_c_in_a_trial(vitnas, device, tmp_path):
    device.faults[2] = KeyboardInterrupt()
    code, out, err = vitnas(*command(tmp_path))
    assert code == 130
    assert err.splitlines()[-1].startswith("interrupted; to go on: vitnas search")
    assert "o go on" not in out, "it is told once"
    assert errors(tmp_path) == ["interrupted"]
    assert states(tmp_path)[-1] == "WAITING"
    assert "An interrupted trial is made again by the same command." in out
    assert "failed" not in out
    assert "Failed trials" not in (tmp_path / "s" / "report.html").read_text()
    code, _, err = vitnas(*command(tmp_path))
    assert code == 0
    assert "all trials are done" not in err
    assert "all trials are done: only the final steps are run again" in vitnas(*command(tmp_path))[2]


def test_ctrl_c_before_any_trial_gives_no_advice(vitnas, device, tmp_path):
    device.faults[1] = KeyboardInterrupt()
    _, out, _ = vitnas(*command(tmp_path, "--against", "levit_128s"))
    assert "No trial was measured" in out
    assert "may help" not in out
    assert "--against was measured" not in out
    assert "What would help" not in (tmp_path / "s" / "report.html").read_text()


@pytest.mark.parametrize("threads", [1, 2])
def test_waiting_times_are_not_ranked(vitnas, device, tmp_path, monkeypatch, threads):
    """At 2 threads on a busy machine a search ends before its first trial; at 1 it goes on."""
    monkeypatch.setattr(nas.search.trial, "PROBE_PAUSE_S", 0.0)
    monkeypatch.setattr(nas.search.request, "check_settings", lambda settings: None)
    monkeypatch.setattr("nas.measure.device.settings_for", lambda *_: Settings(threads=threads))
    device.timed = lambda path, *_: Measurement([[1.0, 8.0, 9.0]] * 8, [[1.0] * 3] * 8)
    code, _, err = vitnas(*command(tmp_path, budget="20ms"))
    if threads == 1:
        assert code == 0
        return
    assert code == 2
    assert "at 2 threads a network waits for them, so these figures are waiting times" in err.splitlines()[-1]
    assert len(device.measured) == nas.search.trial.PROBES
    assert not (tmp_path / "s").exists(), "it would bind what is tried next to 2 threads"
    (tmp_path / "s").mkdir()
    assert vitnas(*command(tmp_path, budget="20ms"))[0] == 2
    assert (tmp_path / "s" / "study.journal").is_file(), "a folder that was there may be another worker's"


# The verdict


@pytest.mark.parametrize("interrupted", [False, True])
def test_where_nothing_surely_fits_the_headline_and_the_exit_code_say_so(vitnas, device, tmp_path, interrupted):
    device.timed = lambda path, *_: Measurement([[9.0] * 3, [11.0] * 3] * 4, [[1.0] * 3] * 8)
    if interrupted:
        device.faults[3] = KeyboardInterrupt()
    code, out, _ = vitnas(*command(tmp_path))
    assert code == (130 if interrupted else 1)
    assert device.compared == (0 if interrupted else 4), "measured longer"
    first = " ".join(out.split("Report")[0].split())
    assert "No network surely fits 10 ms; the best of those that may (" in first
    assert "ms (unsure: 95% " in first
    page = (tmp_path / "s" / "report.html").read_text()
    assert "No network surely fits 10 ms; the best of those that may" in page
    lines = (tmp_path / "s" / "trials.csv").read_text().splitlines()
    verdicts = {line.split(",")[lines[0].split(",").index("verdict")] for line in lines[1:]}
    assert "unsure" in verdicts


def test_a_network_that_surely_fits_is_the_headline(vitnas, device, tmp_path):
    code, out, _ = vitnas(*command(tmp_path, "--json"))
    data = json.loads(out)
    assert code == 0
    assert data["winner"]["verdict"] == "fits"
    assert {row["verdict"] for row in data["final"]} == {"fits"}


# The end

SHORT = "best/ holds the search's own training of 1 epoch of 100 images, not a full one"


def assert_short(data: dict[str, Any]) -> None:
    """best/ holds a candidate's own training, and says so."""
    assert not data["untrained"]
    assert data["short_training"] == {"epochs": 1, "images": 100}
    assert any(note.startswith(SHORT) for note in data["notes"])


@pytest.mark.parametrize(
    "fault", [UserError("disagrees with PyTorch by 2e-04"), alike(MemoryError()), alike(RuntimeError("ONNX"))]
)
def test_a_network_that_cannot_be_exported_is_there_with_its_weights(
    vitnas, device, tier, pictures, tmp_path, monkeypatch, fault
):
    def refused(*_: Any, **__: Any) -> None:
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(nas.search.best, "save_onnx", refused)
        for _ in range(2):  # again at every rerun
            code, out, err = vitnas(*trained(tmp_path, pictures))
            assert code == 1, err
            assert set(best(tmp_path)) == {"arch.json", "model.safetensors", "model.seen.npy"}
            (line,) = json.loads(out)["failures"]
            assert "best/model.onnx failed" in line
            assert line in err
            assert "best/model.onnx failed" in (tmp_path / "s" / "report.html").read_text()
    begun = list(tier.begun)
    code, out, _ = vitnas(*trained(tmp_path, pictures))
    assert code == 0
    assert json.loads(out)["failures"] == []
    assert set(best(tmp_path)) == {"arch.json", "model.safetensors", "model.seen.npy", "model.onnx"}
    assert tier.begun == begun, "nothing is trained again"


@pytest.mark.parametrize("fault", [MemoryError(), alike(UserError("no batch")), OSError(28, "No space left on device")])
def test_a_final_training_that_fails(vitnas, device, tier, pictures, tmp_path, monkeypatch, fault):
    real = nas.search.final.train_from

    def refused(options: Any, tier: Any, label: str, *more: Any) -> Any:
        if not failed:
            failed.append(label)
            raise fault
        return real(options, tier, label, *more)

    failed: list[str] = []
    monkeypatch.setattr(nas.search.final, "train_from", refused)
    code, out, err = vitnas(*trained(tmp_path, pictures))
    assert code == 1, err
    data = json.loads(out)
    assert data["failures"][0].startswith(f"final training of {failed[0]} failed")
    assert data["accuracy"] is None
    assert_short(data)
    assert vitnas(*trained(tmp_path, pictures))[0] == 0
    assert best(tmp_path)["model.onnx"] == b"trained"


@pytest.mark.parametrize("fault", [UserError("ssh does not get through"), OSError(28, "No space left"), MemoryError()])
def test_a_closing_run_that_fails(vitnas, device, tmp_path, monkeypatch, fault):
    def refused(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr(nas.export.side_by_side, "compare", refused)
    code, out, err = vitnas(*command(tmp_path, "--json"))
    assert code == 1, err
    data = json.loads(out)
    assert data["winner"]
    assert data["failures"][0].startswith("closing side-by-side run failed")
    assert best(tmp_path)["model.onnx"] == b"untrained"
    assert "no closing side-by-side run" in (tmp_path / "s" / "report.html").read_text()


def test_a_report_that_fails(vitnas, device, tmp_path, monkeypatch):
    def full(data: Any) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nas.search.report, "plot_front", full)
    code, out, _ = vitnas(*command(tmp_path, "--json"))
    assert code == 1
    assert "report failed" in json.loads(out)["failures"][0]
    assert "arch.json" in best(tmp_path)


@pytest.mark.parametrize("step", ["closing", "training", "judging", "writing"])
def test_ctrl_c_at_the_end_keeps_what_was_done(vitnas, device, tier, pictures, tmp_path, monkeypatch, step):
    def interrupt(*_: Any, **__: Any) -> None:
        patch.undo()
        raise KeyboardInterrupt

    where = {
        "closing": (nas.export.side_by_side, "compare"),
        "training": (nas.search.final, "train_from"),
        "judging": (nas.search.final, "settle"),
        "writing": (nas.search.report, "write_run"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*where[step], interrupt)
        _, out, err = vitnas(*trained(tmp_path, pictures))
    assert "interrupted in this step" in err
    assert json.loads(out)["interrupted"]
    assert_short(json.loads(out))
    assert SHORT in html.unescape((tmp_path / "s" / "report.html").read_text())
    assert best(tmp_path)["model.onnx"] == b"trained"
    code, out, _ = vitnas(*trained(tmp_path, pictures))
    assert code == 0
    assert best(tmp_path)["model.onnx"] == b"trained"
    assert json.loads(out)["short_training"] is None
    assert not any(SHORT in note for note in json.loads(out)["notes"])
    if step != "closing":
        return
    ended, files = best(tmp_path), ("result.json", "report.html", "trials.csv")
    written = [(tmp_path / "s" / name).read_bytes() for name in files]
    with monkeypatch.context() as patch:
        patch.setattr(*where[step], interrupt)
        code, _, err = vitnas(*trained(tmp_path, pictures))
    assert code == 130
    assert "the results of the run that had ended with these trials stay as they are" in err
    assert (best(tmp_path), [(tmp_path / "s" / name).read_bytes() for name in files]) == (ended, written)


@pytest.mark.parametrize("is_kept", [True, False])
def test_ctrl_c_in_a_trial_leaves_the_best_of_the_search_s_own_trainings(
    vitnas, device, tier, pictures, tmp_path, monkeypatch, is_kept
):
    """With what it was judged on, and which images it has seen; where its weights are gone, best/ says so."""
    cards, seen, ended, finish = cards_of(monkeypatch), [], [], nas.search.run.finish_run

    def finishing(options: Any, study: Any, run: Any, *more: Any, **words: Any) -> Any:
        trainer = run.tier.trainer
        seen.append(trainer.halves(64)[1].sources)
        if not is_kept:
            shutil.rmtree(trainer.kept)
        ended.append(finish(options, study, run, *more, **words))
        return ended[0]

    monkeypatch.setattr(nas.search.best, "record", lambda folder, images, parent: seen.append(images.sources))
    monkeypatch.setattr(nas.search.run, "finish_run", finishing)
    tier.faults[2] = KeyboardInterrupt()
    code, out, _ = vitnas(*trained(tmp_path, pictures))
    data, found = json.loads(out), best(tmp_path)
    assert code == 130
    if not is_kept:
        assert data["untrained"]
        assert found["model.onnx"] == b"untrained"
        assert "best/ is untrained: the search has kept no training of this network" in data["notes"]
        return
    assert_short(data)
    lines = what_now(ended[0], tmp_path / "s", None)
    assert lines[0] == f"Network: {tmp_path / 's' / 'best' / 'model.onnx'} (briefly trained weights)"
    digest = Arch.from_json(found["arch.json"].decode()).digest()[:16]
    assert found["model.safetensors"] == (tmp_path / "s" / "kept" / f"{digest}.safetensors").read_bytes()
    card = cards["model.onnx"]
    judging, taught = seen
    assert (card.accuracy.top1, card.accuracy.images) == (50.0, len(judging))
    assert card.accuracy.data.endswith(HELD_OUT)
    assert len(taught) == 100
    assert not set(taught) & set(judging)


def test_ctrl_c_while_the_final_training_is_judged(vitnas, device, tier, pictures, tmp_path, monkeypatch):
    """Its weights are there, and their accuracy is not known."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    cards = cards_of(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(nas.search.final, "replace_file", interrupt)
        code, out, _ = vitnas(*trained(tmp_path, pictures))
    assert (code, json.loads(out)["failures"]) == (130, [])
    assert best(tmp_path)["model.onnx"] == b"trained"
    assert (cards["model.onnx"].accuracy, cards["model.onnx"].classes) == (None, ["a", "b"])
    assert vitnas(*trained(tmp_path, pictures))[0] == 0
    assert cards["model.onnx"].accuracy.top1 == 50


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_file_says_only_what_was_found_out_with_it(vitnas, device, tier, pictures, tmp_path, monkeypatch, precision):
    """Accuracy is of fp32 weights or of the int8 file, latency of the file in the precision asked for."""
    cards = cards_of(monkeypatch)
    priced(monkeypatch, {}, {})
    code, _, err = vitnas(*trained(tmp_path, pictures, "--precision", precision))
    assert code == 0, err
    card = cards["model.onnx"]
    assert (card.accuracy.top1, card.latency is None) == (50, precision == "int8")
    if precision == "int8":
        assert best(tmp_path)["model.int8.onnx"] == b"lower"
        card = cards["model.int8.onnx"]
    assert card.latency.precision == precision


def priced(
    monkeypatch: pytest.MonkeyPatch,
    trained: dict[str, float],
    kept: dict[str, float],
    recipe: Recipe | None = None,
    measured: bytes | None = None,
) -> list[str]:
    """Has int8 cost so many points of 50% with full trainings and the search's own, by the key of a candidate; half a
    point else. Holds the keys in the order in which they are judged."""
    judged: list[str] = []

    def of(self: LowerFiles, candidate: Candidate, precision: str) -> LowerFile:
        judged.append(candidate.key)
        drops = kept if nas.search.final.weights_of(self.request, candidate) is None else trained
        drop = drops.get(candidate.key, 0.5)
        ci, softmax = (drop - 1, drop + 1), ("2 x softmax",)
        price = Price(
            recipe or Recipe(), "onnxruntime", 200, 50.0, 50 - drop, drop, ci, self.request.max_drop, 1, softmax
        )
        return LowerFile(b"lower", price, measured)

    def shipped(self: LowerFiles, candidate: Candidate, precision: str, trained: Accuracies) -> Accuracies:
        return replace(trained, top1=[of(self, candidate, precision).price.top1], precision=precision)

    monkeypatch.setattr(LowerFiles, "of", of)
    monkeypatch.setattr(LowerFiles, "shipped", shipped)
    monkeypatch.setattr(Card, "read", lambda path: Card())
    return judged


def test_a_network_that_int8_costs_too_much_wins_nothing(vitnas, device, tier, pictures, tmp_path, monkeypatch):
    """Neither with the search's own training, nor after the full one: the next one is trained and written then. Where
    there is none, there is no winner, and what was measured is told."""
    cards_of(monkeypatch)
    fully: dict[str, float] = {}
    briefly: dict[str, float] = {}
    judged = priced(monkeypatch, fully, briefly)
    command = trained(tmp_path, pictures, "--precision", "int8")
    before = json.loads(vitnas(*command)[1])
    assert best(tmp_path)["model.int8.onnx"] == b"lower"
    fully[judged[0]] = 7.0  # the winner's
    shutil.rmtree(tmp_path / "s" / "final")
    _, out, err = vitnas(*command)
    after = json.loads(out)
    assert after["winner"]["label"] != before["winner"]["label"], err
    (told,) = [row for row in after["final"] if "accuracy" in row["over"]]
    assert (told["label"], told["verdict"]) == (before["winner"]["label"], "over")
    assert told["latency_ms"] > 0
    assert after["short_training"] is None
    assert any(note.startswith(f"{told['label']}: infeasible: int8 costs 7.0 points") for note in after["notes"])
    assert "best/model.int8.onnx: left in float: 2 x softmax" in after["notes"]
    shutil.rmtree(tmp_path / "s" / "final")
    briefly |= dict.fromkeys(judged, 7.0)
    code, out, err = vitnas(*command)
    assert (code, json.loads(out)["winner"]) == (1, None)
    assert (
        study_of(tmp_path).user_attrs["result"]
        == "nothing fits 10 ms with its accuracy known to hold in int8 (--max-drop)"
    )


@pytest.mark.parametrize(("fails", "why"), [(True, "judging it failed"), (False, "no weights of it are kept")])
def test_a_network_that_cannot_be_judged_wins_nothing(
    vitnas, device, tier, pictures, tmp_path, monkeypatch, fails, why
):
    """The first of the closing run; without weights it is trained before."""
    cards_of(monkeypatch)
    judged = priced(monkeypatch, {}, {})
    of = LowerFiles.of

    def unknown(self: LowerFiles, candidate: Candidate, precision: str) -> LowerFile | None:
        found = of(self, candidate, precision)
        if candidate.key == judged[0] and fails:
            raise RuntimeError("the tool fails")
        return None if candidate.key == judged[0] else found

    monkeypatch.setattr(LowerFiles, "of", unknown)
    code, out, err = vitnas(*trained(tmp_path, pictures, "--precision", "int8"))
    result = json.loads(out)
    (lost,) = [row for row in result["final"] if "accuracy" in row["over"]]
    assert (code, len(result["failures"]), result["winner"]["verdict"]) == (int(fails), int(fails), "fits"), err
    assert f"{lost['label']}: infeasible, as what int8 costs is not known: {why}" in result["notes"]


def test_a_network_is_tried_and_shipped_in_the_first_precision_that_meets_the_budget(
    vitnas, device, tier, pictures, tmp_path, monkeypatch
):
    """Its file, its latency and its accuracy are those of that precision, at every place that tells it."""
    cards = cards_of(monkeypatch)
    priced(monkeypatch, {}, {})
    device.ratios["int8"] = 0.6
    monkeypatch.setitem(EXPECTED_DROP, "int8", -0.5)  # all answer alike: so it ranks first
    words = trained(tmp_path, pictures, "--precision", "auto", "--latency-budget", "0.02ms", "--trials", "8")
    code, out, err = vitnas(*words)
    assert code == 0, err
    assert "each network is measured in fp32 and int8 in turn, until it surely meets the budget" in err
    with (tmp_path / "s" / "trials.csv").open() as file:
        rows = {int(row["trial"]): row for row in csv.DictReader(file)}
    kept = {"fp32": 0, "int8": 0}
    for trial in study_of(tmp_path).trials:
        found = trial.user_attrs["detail"]
        first, told = found["by_precision"]["fp32"], found["by_precision"][found["precision"]]
        assert found["latency_ms"] == told
        assert found["precision"] == rows[trial.number]["precision"] == ("fp32" if first <= 0.02 else "int8")
        assert trial.user_attrs["feasible"] == (told <= 0.02)
        assert ("int8" in found["by_precision"]) == (0.02 < first <= 0.02 / (HOPELESS * RATIOS["int8"][0]))
        kept[found["precision"]] += 1
    result = json.loads(out)
    assert all(kept.values()), kept
    winner = result["winner"]
    assert (winner["precision"], winner["top1"]) == ("int8", 49.5)
    assert rows[winner["trial"]]["latency_ms"] == str(winner["latency_ms"])
    assert all(row["precision"] == rows[row["trial"]]["precision"] for row in result["final"])
    assert all(row["precision"] == rows[row["trial"]]["precision"] for row in result["pareto"])
    assert best(tmp_path)["model.int8.onnx"] == b"lower"
    assert (cards["model.int8.onnx"].latency.precision, cards["model.onnx"].latency) == ("int8", None)
    page = (tmp_path / "s" / "report.html").read_text()
    assert "onnxruntime int8" in page
    assert "<th>precision</th>" in page
    vitnas.refused(vitnas(*command(tmp_path, "--precision", "auto")), "--precision auto needs --data")


@pytest.mark.parametrize("chosen", [(), ("--dynamic-batch",)])
def test_a_file_of_another_recipe_is_timed_as_it_is_shipped(
    vitnas, device, tier, pictures, tmp_path, monkeypatch, chosen
):
    """Its latency is told everywhere, once timed, but by a file that takes something else; over the budget it wins
    nothing."""
    cards = cards_of(monkeypatch)
    priced(monkeypatch, {}, {}, Recipe("nncf"), b"measured" if chosen else None)
    first, alone = device.compare, []

    def compare(paths: dict[str, Path], *rest: Any) -> dict[str, Measurement]:
        if {path.read_bytes() for path in paths.values()} != {b"measured" if chosen else b"lower"}:
            return first(paths, *rest)
        alone.append([*paths])
        return dict.fromkeys(paths, Measurement([[slow]] * 30))

    monkeypatch.setattr(nas.export.side_by_side, "compare", compare)
    slow, words = 9.0, trained(tmp_path, pictures, "--precision", "int8", *chosen)
    code, out, err = vitnas(*words)
    result = json.loads(out)
    assert (code, result["winner"]["latency_ms"]) == (0, 9.0), err
    assert best(tmp_path)["model.int8.onnx"] == b"lower"
    told = cards["model.int8.onnx"].latency
    assert (told is None) if chosen else (told.ms == 9.0)
    assert len(alone) == len({label for (label,) in alone}) == len(result["final"])
    assert f"{result['winner']['label']}: its file is made by another recipe" in "\n".join(result["notes"])
    shutil.rmtree(tmp_path / "s")
    slow = 11.0
    code, out, _ = vitnas(*words)
    result = json.loads(out)
    assert (code, result["winner"], {row["verdict"] for row in result["final"]}) == (1, None, {"over"})


def cards_of(monkeypatch: pytest.MonkeyPatch) -> dict[str, Card]:
    """What the files in best/ are labelled with, by their names, as they are written."""
    found: dict[str, Card] = {}

    def save_onnx(model: Any, folder: Path, *_: Any, card: Card, **__: Any) -> None:
        (folder / "model.onnx").write_bytes(b"trained")
        found["model.onnx"] = card

    def label_onnx(path: Path, arch: Arch, trained: bool, card: Card) -> None:
        found["model.int8.onnx"] = card

    monkeypatch.setattr(nas.search.best, "save_onnx", save_onnx)
    monkeypatch.setattr(nas.search.best, "label_onnx", label_onnx)
    return found


def test_what_is_known_is_on_disk_before_the_final_trainings(vitnas, device, tier, pictures, tmp_path, monkeypatch):
    """A kill -9 during hours of training finds a report and a network."""
    seen = []

    def killed(*_: Any, **__: Any) -> None:
        seen.append({path.name for path in (tmp_path / "s").iterdir()} | set(best(tmp_path)))
        raise KeyboardInterrupt

    monkeypatch.setattr(nas.search.final, "train_from", killed)
    vitnas(*trained(tmp_path, pictures))
    assert {"report.html", "trials.csv", "pareto.json", "arch.json", "model.onnx"} <= seen[0]


def test_workers_end_one_after_the_other(vitnas, device, tier, pictures, tmp_path, monkeypatch):
    """Whoever ends second has what the first one trained."""
    from nas.files import folder_lock

    assert vitnas(*trained(tmp_path, pictures))[0] == 0
    begun, locked = list(tier.begun), []
    real = nas.search.finish.closing_run

    def inside(*words: Any) -> Any:
        with pytest.raises(UserError), folder_lock(tmp_path / "s", name=nas.search.finish.LOCK):
            pass
        locked.append(True)
        return real(*words)

    monkeypatch.setattr(nas.search.finish, "closing_run", inside)
    assert vitnas(*trained(tmp_path, pictures))[0] == 0
    assert locked
    assert tier.begun == begun


def test_no_file_of_another_network_stays(vitnas, device, tier, pictures, tmp_path, monkeypatch):
    assert vitnas(*trained(tmp_path, pictures))[0] == 0
    other = json.loads(best(tmp_path)["arch.json"]) | {"num_classes": 3}
    (tmp_path / "s" / "best" / "arch.json").write_text(json.dumps(other))

    def refused(*_: Any, **__: Any) -> None:
        raise UserError("disagrees")

    monkeypatch.setattr(nas.search.best, "save_onnx", refused)
    vitnas(*trained(tmp_path, pictures))
    assert set(best(tmp_path)) == {"arch.json", "model.safetensors", "model.seen.npy"}


def test_trainings_on_other_images_are_not_taken_for_these(vitnas, device, tier, pictures, tmp_path):
    """Without its journal the study is a new one, but its folder's trainings are not."""
    assert vitnas(*trained(tmp_path, pictures))[0] == 0
    for path in (tmp_path / "s").glob("study.journal*"):
        path.unlink()
    (pictures / "a" / "more.png").write_bytes((pictures / "a" / "0.png").read_bytes())
    kept = best(tmp_path)
    vitnas.refused(vitnas(*trained(tmp_path, pictures)), "the images of --data", "--study")
    assert not (tmp_path / "s" / "study.journal").exists()
    assert best(tmp_path) == kept
    (pictures / "a" / "more.png").unlink()
    begun = list(tier.begun)
    assert vitnas(*trained(tmp_path, pictures))[0] == 0
    assert len(tier.begun) == len(begun) + TRIALS, "the final trainings are kept"


def test_after_ctrl_c_no_other_worker_s_end_is_waited_for(vitnas, device, tmp_path):
    from nas.files import folder_lock

    (tmp_path / "s").mkdir()
    device.faults[2] = KeyboardInterrupt()
    with folder_lock(tmp_path / "s", name=nas.search.finish.LOCK):
        code, _, err = vitnas(*command(tmp_path))
    assert code == 130
    assert "another worker of this search is at its end, and writes the report" in err
    assert err.splitlines()[-1].startswith("interrupted; to go on: vitnas search")


def test_a_trained_network_stays_where_later_all_are_over_the_budget(
    vitnas, device, tier, pictures, tmp_path, monkeypatch
):
    assert vitnas(*trained(tmp_path, pictures))[0] == 0
    kept = best(tmp_path)
    slow = Measurement([[1000.0] * 3] * 8)
    monkeypatch.setattr(nas.export.side_by_side, "compare", lambda paths, *_, **__: dict.fromkeys(paths, slow))
    code, out, _ = vitnas(*trained(tmp_path, pictures))
    assert code == 1
    assert any("best/ is left as it was" in note for note in json.loads(out)["notes"])
    assert best(tmp_path) == kept


# Two processes


def test_one_process_measures_and_another_trains(vitnas, device, tier, pictures, tmp_path, monkeypatch):
    from nas.search import helping, loop, tasks
    from nas.study import jobs
    from nas.study.leases import Lease

    for module in (helping, loop, tasks):
        monkeypatch.setattr(module, "LOOK_S", 0.01)
    for name in ("interruptible", "training_threads"):
        monkeypatch.setattr(helping, name, lambda *_: nullcontext())

    @contextmanager
    def at_work(study: Any, does: Any) -> Any:
        study.set_user_attr(f"{jobs.WORKER}other", {"does": does, **Lease.mine().to_json()})
        yield

    trained_by, begin = set(), tier.begin

    def watched(*given: Any, **named: Any) -> Any:
        trained_by.add(threading.current_thread().name)
        return begin(*given, **named)

    monkeypatch.setattr(helping, "at_work", at_work)
    monkeypatch.setattr(tier, "begin", watched)
    made, said = [], []

    def help_it() -> None:
        while not study_of_measuring():
            time.sleep(0.01)
        settings = Settings(threads=0)
        plan = TrainingPlan(str(pictures), 100, 1, 1, 1)
        request = SearchRequest(
            10.0,
            settings,
            ("shvit",),
            TRIALS,
            study="s",
            out=tmp_path,
            quality="train",
            resolution=64,
            seed=1,
            plan=plan,
        )
        made.append(helping.train_measured(request, said.append))

    def study_of_measuring() -> bool:
        try:
            return jobs.workers(study_of(tmp_path), jobs.MEASURES) > 0
        except (UserError, KeyError):
            return False

    helper = threading.Thread(target=help_it, name="helper")
    helper.start()
    code, out, err = vitnas(*trained(tmp_path, pictures, "--only", "measure"))
    helper.join()
    assert code == 0, err
    assert trained_by == {"helper"}
    assert states(tmp_path) == ["COMPLETE"] * TRIALS
    found = json.loads(out)
    assert best(tmp_path)["model.onnx"] == b"trained"
    finals = len(found["accuracy"]["rows"])
    within = sum(trial.user_attrs["feasible"] for trial in study_of(tmp_path).get_trials(deepcopy=False))
    assert made == [within + finals]
    assert said[-1] == f"the search that measures has ended: {made[0]} trainings made here"
    assert jobs.workers(study_of(tmp_path), jobs.MEASURES) == 0
    vitnas.refused(vitnas(*trained(tmp_path, pictures, "--only", "train")), "nothing waits for a training")


def test_who_trains_alone_needs_a_study(vitnas, pictures, tmp_path):
    vitnas.refused(vitnas(*trained(tmp_path, pictures, "--only", "train")), "there is no study 's' in")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--only", "both"), "--only 'both'"),
        (("--workers", "many"), "--workers 'many'"),
        (("--workers", "2"), "--workers is 2: one a training device"),
        (("--only", "measure", "--workers", "1"), "give one of them"),
        (("--train-device", "cuda:7"), "cuda:7"),
        (("--train-processes", "0"), "--train-processes is 0: give 1 to "),
        (("--train-processes", "999"), "the CPUs that this process may use"),
        (("--only", "measure", "--train-processes", "2"), "--only measure trains nothing"),
        (("--only", "measure", "--quality", "supernet"), "supernet"),
    ],
)
def test_bad_words_on_processes(vitnas, device, pictures, tmp_path, words, why):
    vitnas.refused(vitnas(*trained(tmp_path, pictures, *words)), why)
    assert not (tmp_path / "s").exists()


def test_final_trainings_alone_are_made_together(vitnas, device, tier, pictures, tmp_path, monkeypatch):
    made = []

    def run_together(training: Any, devices: Any, *_: Any) -> None:
        made.append((len(devices), training.recipe.epochs))
        training.epoch = training.recipe.epochs

    monkeypatch.setattr("nas.training.device.usable_cpus", lambda: [0, 1])
    monkeypatch.setattr("nas.training.together.run_together", run_together)
    code, out, err = vitnas(*trained(tmp_path, pictures, "--train-processes", "2", "--seeds", "2"))
    assert code == 0, err
    assert made == [(2, 1)] * 2 * len(json.loads(out)["accuracy"]["rows"])


def test_every_seed_is_judged_as_it_is_shipped_and_once(vitnas, device, tier, pictures, tmp_path, monkeypatch):
    """By the recipe that the first one's weights were judged with; the answers are kept beside the trainings."""
    cards_of(monkeypatch)
    judged: list[Recipe | None] = []
    price = Price(Recipe("nncf", images=9), "onnxruntime", 16, 50.0, 50.0, 0.0, (-1.0, 1.0), 1.0)
    monkeypatch.setattr(LowerFiles, "of", lambda self, candidate, precision: LowerFile(None, price))

    def right(network: Any, weights: Path, path: Path, data: Any, images: Any, settings: Any, recipe: Any) -> Any:
        judged.append(recipe)
        assert (settings.precision, weights.is_file()) == ("int8", True)
        return np.arange(len(images)) < 4 * len(judged)

    monkeypatch.setattr("nas.evaluate.precision.deployed_right", right)
    words = trained(tmp_path, pictures, "--precision", "int8", "--seeds", "2", "--trials", "2")
    _, out, err = vitnas(*words)
    result = json.loads(out)
    assert not result["failures"], err
    (row,) = (row for row in result["accuracy"]["rows"] if row["label"] == result["winner"]["label"])
    assert judged == [price.recipe] * 4, "of the winner and of the published network beside it"
    assert (row["top1"], row["images"]) == ([25.0, 50.0], 16)
    assert (row["precision"], result["winner"]["top1"]) == ("int8", row["mean"])
    assert row["words"].endswith(", in int8")
    assert json.loads(vitnas(*words)[1])["accuracy"]["rows"] == result["accuracy"]["rows"]
    assert len(judged) == 4
