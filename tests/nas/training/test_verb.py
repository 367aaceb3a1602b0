"""`vitnas train`: its folder, going on after a kill, several processes, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import quick
import torch
from forked import Forked
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import nas.data
import nas.data.dataset
import nas.training.begun
import nas.training.engine
import nas.training.evaluation
import nas.training.prepare
import nas.training.run
import nas.training.updater
from nas.bench import files as bench_files
from nas.cli.app import main
from nas.data.batches import loader
from nas.data.dataset import open_data
from nas.data.images import sample
from nas.data.pixels import Pixels
from nas.errors import TrainingError, UserError
from nas.export import folder as export_folder
from nas.export import side_by_side
from nas.export.artifact import Exporter
from nas.files import folder_lock
from nas.identity import file_digest
from nas.measure.samples import Measurement
from nas.networks.targets import Target
from nas.training.evaluation import evaluate
from nas.training.inputs import first_network
from nas.training.recipes import RECIPES
from nas.training.result import TrainResult
from nas.training.start import Start
from search_spaces import Arch, create_model, get_arch

ARGS = ("--epochs", "2", "--batch-size", "32", "--device", "cpu")
BRIEF = ("--epochs", "1", "--batch-size", "64", "--device", "cpu")


@pytest.fixture(scope="module")
def small(helpers, tmp_path_factory) -> Callable[..., str]:
    """Paths of tiny Archs as arch.json."""

    def write(family: str, **changes) -> str:
        arch = helpers.random_arch(family, 3, num_classes=10, **changes)
        path = tmp_path_factory.mktemp(family) / "arch.json"
        path.write_text(arch.to_json())
        return str(path)

    return write


@pytest.fixture(scope="module")
def deit(small) -> str:
    """DeiT of two narrow blocks at 32 px."""
    block = {
        "attn": {"heads": 2, "key_dim": 16, "value_dim": 16, "scale": 0.25},
        "keep_rate": 1.0,
        "fuse": False,
        "ffn": {"hidden": 128},
    }
    return small("evit", resolution=32, patch_size=8, embed_dim=64, blocks=[block] * 2)


def few_digits(patch: pytest.MonkeyPatch) -> None:
    def open_few(*args) -> nas.data.dataset.ImageData:
        data = open_data(*args)
        return dataclasses.replace(data, train=sample(data.train, 128, 0), val=sample(data.val, 32, 0))

    patch.setattr(nas.data.dataset, "open_data", open_few)
    quick.short_probes(patch)


@pytest.fixture
def few(monkeypatch) -> None:
    """A few digits are enough."""
    few_digits(monkeypatch)


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_a_folder_that_export_and_bench_take(vitnas, deit, tmp_path, monkeypatch):
    """What bench's child does with weights is tested in test_bench."""
    out = tmp_path / "out"
    code, _, err = vitnas("train", deit, "--out", str(out), *ARGS, "--lr", "0.004", "--json")
    assert code == 0, err
    assert "no --data" in err
    first = err
    found = metrics(out)
    assert {path.name for path in out.iterdir()} == {
        "arch.json",
        "model.safetensors",
        "model.onnx",
        "metrics.json",
        "preprocess.json",
        "labels.txt",
        "model.seen.npy",
        "state",
        ".lock",
    }
    assert [path.name for path in (out / "state").iterdir()] == ["state.json"]
    assert [row["epoch"] for row in found["epochs"]] == [1, 2]
    assert found["recipe"]["name"] == "quick"
    assert found["recipe"]["peak_lr"] == 0.004
    assert found["final"]["of"] == "last weights"
    assert found["command"].startswith("vitnas train")
    data = open_data(None, 32, 10, seed=0)
    model = create_model(Arch.from_json((out / "arch.json").read_bytes()), weights=out / "model.safetensors")
    accuracy = evaluate(model, loader(data.val, 64, shuffle=False, seed=0))
    assert (found["final"]["val_images"], found["data"]["val"]) == (accuracy.total, accuracy.total)
    assert found["final"]["top1"] == pytest.approx(accuracy.top1)
    low, high = found["final"]["top1_ci"]
    assert (low, high) == pytest.approx(accuracy.interval)
    assert [found[key] for key in ("top1", "top1_ci", "images")] == [accuracy.top1, [low, high], accuracy.total]
    assert found["classes"] == found["data"]["class_names"] == list("0123456789")
    assert found["train_threads"] == 1
    assert found["seconds"] == sum(row["seconds"] for row in found["epochs"])
    assert accuracy.top1 > 20
    again = TrainResult.read(out / "metrics.json")
    assert json.loads(json.dumps(again.to_json())) == found
    later = ("seen", "processes", "top1", "top1_ci", "images", "classes", "seconds", "train_threads", "interrupted")
    (tmp_path / "old.json").write_text(json.dumps({key: found[key] for key in found.keys() - {*later}}))
    assert TrainResult.read(tmp_path / "old.json").final == again.final

    code, text, err = vitnas("train", deit, "--out", str(out), *ARGS, "--lr", "0.004")
    assert code == 0
    assert "is finished" in err
    assert "again" not in err
    told = f"{accuracy.top1:.1f}% top-1 (95%: {low:.1f} to {high:.1f}, {accuracy.total} images)"
    assert f"epoch 2/2: {told}" in first
    assert text.startswith(f"{told} of ")
    assert text.splitlines()[-3:] == [
        f"  vitnas predict {out} IMAGE",
        f"  vitnas bench {out} timm/lcnet_050@32",
        f"  vitnas prune --model {out}",
    ]
    vitnas.refused(vitnas("train", deit, "--out", str(out), *ARGS), "another run", "lr")
    longer = f"`vitnas train {out} --epochs 3 --out NEW` begins with its weights"
    vitnas.refused(vitnas("train", deit, "--out", str(out), *ARGS, "--epochs", "3"), "another run", longer)

    code, text, _ = vitnas("export", str(out), "--out", str(tmp_path / "exported"))
    assert (code, "with the given weights" in text) == (0, True)
    again = load_file(tmp_path / "exported" / "model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in load_file(out / "model.safetensors").items())
    timed: list[bytes] = []

    def call(self, method, settings, stem, images, **source):
        assert method == "trained"
        return Path(
            bench_files._trained(settings=dataclasses.asdict(settings), stem=stem, images=images, **source)["path"]
        )

    def compare(paths, *_):
        timed.extend(path.read_bytes() for path in paths.values())
        return dict.fromkeys(paths, Measurement([[1.0]] * 6))

    monkeypatch.setattr(Exporter, "call", call)
    monkeypatch.setattr(side_by_side, "compare", compare)
    code, text, err = vitnas("bench", str(out), "--rounds", "6", "--threads", "1")
    assert (code, len(timed)) == (0, 1), err
    assert str(out) in text


@pytest.mark.usefixtures("few")
def test_what_an_onnx_check_refuses_is_written(vitnas, deit, tmp_path, monkeypatch):
    """Weights and metrics are there, an older model.onnx is not; the same command exports again, without training."""
    out = tmp_path / "out"
    args = ("train", deit, "--out", str(out), *BRIEF)
    out.mkdir()
    (out / "model.onnx").write_text("of an older network")
    agreement = export_folder.agreement

    def refuse(*args):
        raise UserError("the exported network disagrees with PyTorch by 2.0e-02 of its largest logit")

    monkeypatch.setattr(export_folder, "agreement", refuse)
    for times in (1, 2):
        code, text, err = vitnas(*args, "--json")
        assert code == 1, err
        (line,) = (line for line in err.splitlines() if line.startswith("no model.onnx"))
        assert "disagrees with PyTorch by 2.0e-02" in line
        assert "(model.safetensors, metrics.json)" in err
        assert metrics(out)["error"] == json.loads(text)["error"] == line
        assert metrics(out)["final"]["top1"] == json.loads(text)["final"]["top1"]
        assert ("going on after epoch 1 of 1" in err) == (times == 2)
        assert not (out / "model.onnx").exists()
        model = create_model(Arch.from_json((out / "arch.json").read_bytes()), weights=out / "model.safetensors")
        assert model.arch.num_classes == 10
    monkeypatch.setattr(export_folder, "agreement", agreement)
    monkeypatch.setattr(nas.training.updater.Updater, "step", None)
    assert vitnas(*args)[0] == 0
    assert (metrics(out)["error"], (out / "model.onnx").is_file()) == (None, True)
    assert [path.name for path in (out / "state").iterdir()] == ["state.json"]


@pytest.mark.usefixtures("few")
def test_it_goes_on_only_with_the_same_inputs(vitnas, deit, tmp_path):
    """By what files hold, not by what they are called."""
    data, out, student = tmp_path / "data", tmp_path / "out", tmp_path / "arch.json"
    for label in ("cat", "dog"):
        (data / label).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(data / label / f"{i}.png")
    student.write_text(Path(deit).read_text())
    args = ("train", str(student), "--data", str(data), "--out", str(out), "--epochs", "1", "--batch-size", "4")
    assert vitnas(*args)[0] == 0
    code, _, err = vitnas(*args)
    assert (code, f"{out} is finished" in err) == (0, True)
    (data / "fox").mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32), (0, 60 * i, 0)).save(data / "fox" / f"{i}.png")
    vitnas.refused(vitnas(*args), f"{out} was begun with another content of the images of --data", "another --out")
    shutil.rmtree(data / "fox")
    student.write_text(
        Path(deit).read_text().replace('"hidden":128', '"hidden":64').replace('"hidden": 128', '"hidden": 64')
    )
    vitnas.refused(vitnas(*args), "another content of the network of --model")


def test_a_second_command_on_a_folder_is_refused(vitnas, deit, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with folder_lock(out):
        vitnas.refused(vitnas("train", deit, "--out", str(out), *ARGS), f"{out} is in use by vitnas", str(os.getpid()))


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state/state.json", "{"),
        ("state/state.json", "[1]"),
        ("state/state.json", '{"colour": "red"}'),
        ("state/state.json", '{"options": {}, "started": "2026-01-02", "rounds": 5}'),
        ("metrics.json", "{}"),
        ("metrics.json", "no JSON"),
        ("state/checkpoint", ""),
        ("state/checkpoint", "no checkpoint"),
    ],
)
def test_a_damaged_file_is_one_line(vitnas, deit, finished, tmp_path, file, content):
    out = tmp_path / "out"
    if file == "state/checkpoint":
        (out / "state").mkdir(parents=True)
    else:
        shutil.copytree(finished, out)
    (out / file).write_text(content)
    code, _, err = vitnas("train", deit, "--out", str(out), *BRIEF)
    assert (code, err.count("\n")) == (2, 1 + ("no --data" in err)), err
    assert str(out / file) in err
    assert (out / file).read_text() == content


ONCE = ("--epochs", "3", "--batch-size", "32", "--device", "cpu")
"""Of the `few` images: four updates an epoch."""


@pytest.fixture(scope="module")
def whole(deit, tmp_path_factory) -> dict[str, Tensor]:
    """Weights of the training ONCE that nothing has interrupted."""
    return load_file(trained_in(tmp_path_factory.mktemp("whole"), deit, ONCE) / "model.safetensors")


@pytest.fixture(scope="module")
def finished(deit, tmp_path_factory) -> Path:
    """The folder of a training that is finished: to be copied."""
    return trained_in(tmp_path_factory.mktemp("finished"), deit, BRIEF)


def trained_in(out: Path, model: str, words: tuple[str, ...]) -> Path:
    """A folder in which a few digits have trained a network."""
    with pytest.MonkeyPatch.context() as patch:
        few_digits(patch)
        patch.setattr(sys, "argv", ["vitnas", "train", model, "--out", str(out), *words])
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code == 0
    return out


def signalled(monkeypatch, at: int, number: int = signal.SIGINT) -> None:
    """A signal comes within this update of a training's, from 0."""
    step = nas.training.updater.Updater.step

    def during(self, i, batches):
        if i == at:
            signal.raise_signal(number)
        return step(self, i, batches)

    monkeypatch.setattr(nas.training.updater.Updater, "step", during)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("number", "at", "done", "which"),
    [
        (signal.SIGINT, 1, "64 images of epoch 1", "64 images of epoch 1, which was not judged"),
        (signal.SIGTERM, 5, "epoch 1 of 3 and 64 images of epoch 2", "epoch 1, {top1}"),
        (signal.SIGINT, 11, "epoch 3 of 3", "epoch 3, which was not judged"),
    ],
)
def test_a_signal_leaves_a_network_and_goes_on_exactly(
    vitnas, deit, whole, tmp_path, monkeypatch, number, at, done, which
):
    """The update in progress is finished; the network is the last epoch's, or what there is of the first one."""
    out = tmp_path / "out"
    args = ("train", deit, "--out", str(out), *ONCE)
    with monkeypatch.context() as patched:
        signalled(patched, at, number)
        code, text, err = vitnas(*args)
    assert (code, text) == (130, "")
    found = metrics(out)
    assert (found["interrupted"], found["error"]) == (done, None)
    lines = err.splitlines()[-3:]
    assert lines[0].startswith(f"interrupted after {done}: writing the network")
    top1 = f"{found['top1']:.1f}% top-1 (95%: " if found["top1"] is not None else ""
    assert lines[1].startswith(f"{out} holds the network of {which.format(top1=top1)}")
    assert lines[2] == f"interrupted; to go on: vitnas {' '.join(args)}"
    kept = load_file(out / "model.safetensors")
    assert create_model(Arch.from_json((out / "arch.json").read_bytes()), weights=out / "model.safetensors")
    assert (out / "model.onnx").is_file()
    code, _, err = vitnas(*args)
    assert (code, f"going on after {done}" in err) == (0, True)
    assert metrics(out)["interrupted"] is None
    assert [path.name for path in (out / "state").iterdir()] == ["state.json"]
    ours = load_file(out / "model.safetensors")
    assert all(torch.equal(ours[name], value) for name, value in whole.items())
    assert all(torch.equal(kept[name], value) for name, value in whole.items()) == (at == 11)


@pytest.mark.usefixtures("few")
def test_a_second_signal_ends_it_at_once(vitnas, deit, tmp_path, monkeypatch):
    """Within the update, whose half is not kept."""
    out = tmp_path / "out"
    backward = torch.Tensor.backward
    calls = []

    def twice(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 6:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return backward(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", twice)
    code, _, err = vitnas("train", deit, "--out", str(out), *ONCE)
    assert (code, len(calls)) == (130, 6)
    assert metrics(out)["interrupted"] == "epoch 1 of 3"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "holds the network of epoch 1, " in err


@pytest.mark.usefixtures("few")
def test_ctrl_c_in_the_writing_leaves_nothing_of_earlier_weights(vitnas, deit, tmp_path, monkeypatch):
    """Beside the weights of epoch 2 no file of epoch 1 stays."""
    first = tmp_path / "first"
    with monkeypatch.context() as patched:
        signalled(patched, 5)
        assert vitnas("train", deit, "--out", str(first), *ONCE)[0] == 130
    weights = (first / "model.safetensors").read_bytes()
    for where, left in (
        ("nas.measure.hardware.describe", {"model.onnx", "metrics.json"}),
        ("nas.training.folder.replace_file", set()),
        ("nas.training.folder.save_onnx", {"metrics.json"}),
    ):
        out = tmp_path / where
        shutil.copytree(first, out)
        with monkeypatch.context() as patched:
            signalled(patched, 8)
            patched.setattr(where, _interrupt)
            assert vitnas("train", deit, "--out", str(out), *ONCE)[0] == 130
        assert {path.name for path in out.iterdir()} & {"model.onnx", "metrics.json"} == left
        same = (out / "model.safetensors").read_bytes() == weights
        assert same == ("model.onnx" in left)
        if left:
            assert metrics(out)["interrupted"].startswith("epoch 1" if same else "epoch 2")


@pytest.mark.usefixtures("few")
def test_a_signal_before_the_first_update_is_done_leaves_nothing(vitnas, deit, tmp_path, monkeypatch):
    monkeypatch.setattr(nas.training.updater.Updater, "step", _interrupt)
    code, _, err = vitnas("train", deit, "--out", str(tmp_path / "out"), *ONCE)
    assert code == 130
    assert "no update was finished: nothing is kept" in err


@pytest.mark.usefixtures("few")
def test_a_training_begun_by_an_older_vitnas_goes_on_as_it_was_begun(vitnas, deit, whole, tmp_path, monkeypatch):
    """Its state lacks the options of today, and the recipe's defaults have changed since."""
    out = tmp_path / "out"
    args = ("train", deit, "--out", str(out), *ONCE)
    with monkeypatch.context() as patched:
        signalled(patched, 5)
        assert vitnas(*args)[0] == 130
    path = out / "state" / "state.json"
    state = json.loads(path.read_text())
    for name in ("minutes", "probe", "from_probe", "rates"):
        del state["options"][name]
    del state["found"]["course"]
    path.write_text(json.dumps(state))
    monkeypatch.setattr(nas.training.begun, "EARLIER", (RECIPES["quick"],))
    monkeypatch.setitem(RECIPES, "quick", dataclasses.replace(RECIPES["quick"], lr=1e-5, mixup=0.5, batch_size=16))
    code, _, err = vitnas(*args)
    assert code == 0, err
    assert "going on after epoch 1 of 3" in err
    ours = load_file(out / "model.safetensors")
    assert all(torch.equal(ours[name], value) for name, value in whole.items())


@pytest.mark.usefixtures("few")
def test_minutes_become_epochs(vitnas, deit, tmp_path, monkeypatch):
    """By the pace of some updates; a training that goes on keeps the number."""
    out, clock = tmp_path / "out", itertools.count()
    args = ("train", deit, "--out", str(out), "--minutes", "1", "--batch-size", "32", "--device", "cpu")
    with monkeypatch.context() as patched:
        patched.setattr(nas.training.prepare, "monotonic", lambda: 4.0 * next(clock))
        signalled(patched, 5)
        code, _, err = vitnas(*args)
    assert code == 130, err
    assert "--minutes 1: 3 epochs, one takes about 17 s" in err, "four updates of 4 s, and 32 images judged"
    code, _, err = vitnas(*args)
    assert code == 0, err
    assert "going on after" in err
    assert [row["epoch"] for row in metrics(out)["epochs"]] == [1, 2, 3]
    vitnas.refused(vitnas(*args, "--epochs", "2"), "--epochs and --minutes: give one of them")


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("few")
def test_a_finished_training_writes_again_what_was_lost(vitnas, deit, finished, tmp_path, monkeypatch):
    """From its weights; without those it says what is lost."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    args = ("train", deit, "--out", str(out), *BRIEF)
    arch = (out / "arch.json").read_text()
    monkeypatch.setattr(nas.training.updater.Updater, "step", None)
    (out / "model.onnx").unlink()
    (out / "arch.json").write_text("{")
    code, _, err = vitnas(*args)
    assert code == 0, err
    assert "missing or changed since it was finished: arch.json, model.onnx: written again from model.saf" in err
    assert ((out / "arch.json").read_text(), (out / "model.onnx").is_file()) == (arch, True)
    assert "again" not in vitnas(*args)[2]
    weights = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(weights[:-4] + b"\0\1\2\3")
    code, text, err = vitnas(*args)
    assert (code, text) == (2, "")
    assert "model.safetensors: the trained weights are lost" in err.splitlines()[-1]


@pytest.mark.usefixtures("few")
def test_of_a_failed_training_all_processes_exit_with_1(vitnas, deit, tmp_path, monkeypatch):
    monkeypatch.setattr(nas.training.run, "ranks", lambda: (1, 2))

    def fail(run, training):
        raise TrainingError("the loss is nan")

    monkeypatch.setattr(nas.training.run.TrainingRun, "_epochs", fail)
    code, out, err = vitnas("train", deit, "--out", str(tmp_path / "out"), *ARGS)
    assert (code, out) == (1, "")
    assert "nan" not in err


@pytest.mark.usefixtures("few")
def test_a_failing_judge_loses_no_epoch(vitnas, deit, tmp_path, monkeypatch):
    """The next run of the command judges the epoch that was not."""
    out = tmp_path / "out"
    args = ("train", deit, "--out", str(out), *BRIEF)

    def failing(*args):
        raise TrainingError("out of memory with one image to judge")

    with monkeypatch.context() as patched:
        patched.setattr(nas.training.evaluation, "evaluate", failing)
        code, text, err = vitnas(*args)
    assert code == 1, err
    assert "out of memory with one image to judge; the weights of epoch 1 are kept" in err
    assert text.startswith("Epoch 1 was not judged")
    assert metrics(out)["final"]["epoch"] == 1
    assert (out / "model.safetensors").is_file()
    monkeypatch.setattr(nas.training.updater.Updater, "step", None)
    code, text, err = vitnas(*args)
    assert code == 0, err
    assert "% top-1 (95%: " in text.splitlines()[0]


KILLED = """
import dataclasses, os, signal, sys
from pathlib import Path
from types import SimpleNamespace
import nas.data.dataset, nas.data.images
from nas.cli.app import main
from nas.training.updater import Updater

open_all, sample = nas.data.dataset.open_data, nas.data.images.sample

def open_few(*args):
    data = open_all(*args)
    return dataclasses.replace(data, train=sample(data.train, 128, 0), val=sample(data.val, 32, 0))

nas.data.dataset.open_data = open_few

whole, left = Updater.step, 3

def step(*args):
    global left
    left -= Path(checkpoint).is_file()
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*args)

checkpoint = sys.argv.pop(1)
Updater.step = step
main()
"""


def killed(args: list[str], checkpoint: Path) -> None:
    """Run the command in a process that is killed within the epoch after its first checkpoint."""
    child = Forked(KILLED, str(checkpoint), "train", *args)
    _, err = child.communicate(120)
    assert child.returncode == -signal.SIGKILL, err


@pytest.mark.usefixtures("few")
def test_killed_it_goes_on_bit_for_bit(vitnas, small, tmp_path):
    """`kill -9` within an epoch, then the same command: the weights of a training that was never stopped."""
    model = small("levit", resolution=32)
    first, second = tmp_path / "killed", tmp_path / "whole"
    args = [model, "--epochs", "2", "--batch-size", "32", "--device", "cpu"]
    killed([*args, "--out", str(first)], first / "state" / "checkpoint")
    assert not (first / "metrics.json").exists()
    code, _, err = vitnas("train", *args, "--out", str(first))
    assert code == 0, err
    assert "going on after epoch 1 of 2" in err
    assert vitnas("train", *args, "--out", str(second))[0] == 0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    losses = [[row["loss"] for row in metrics(folder)["epochs"]] for folder in (first, second)]
    assert losses[0] == losses[1]


PAIR = """
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import torch
from nas.data.dataset import open_data
from nas.data.images import sample
from nas.training.recipes import RECIPES
from nas.training.engine import Training
from nas.training.processes import processes, ranks
from search_spaces import Arch, create_model

with processes("cpu") as device:
    rank, world = ranks()
    for path, ema in ((deit, None), (levit, 0.99)):
        arch = Arch.from_json(Path(path).read_bytes())
        torch.manual_seed(rank)  # DistributedDataParallel hands out the first process's weights
        data = sample(open_data(None, arch.resolution, 10, seed=0).calibration, 140, seed=0)
        recipe = replace(RECIPES["quick"], epochs=2, batch_size=32, ema=ema, clip=("agc", 0.1))
        name = f"{arch.family}-{world}"
        for stop in (1, 2) if ema else (2,):
            file = Path(folder, name)
            training = Training(create_model(arch), data, recipe, device=device, checkpoint=file, accumulate=2)
            training.run(stop)
        torch.save(training.network.state_dict(), Path(folder, f"{name}-{rank}.pt"))
"""


def test_two_processes_are_one_with_twice_the_batch(small, deit, tmp_path):
    """On a network without BatchNorm to rounding; one with BatchNorm ends equal in both, also after a stop."""
    levit = small("levit", resolution=32)
    script = f"deit, levit, folder = {deit!r}, {levit!r}, {str(tmp_path)!r}\n{PAIR}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(2):
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = os.environ | {key: str(value) for key, value in where.items()}
        started.append(Forked(script, env=env))
    exec(script, {})
    for child in started:
        _, err = child.communicate(120)
        assert child.returncode == 0, err

    def weights(name: str) -> dict[str, Tensor]:
        return torch.load(tmp_path / f"{name}.pt", weights_only=True)

    alone, first, second = weights("evit-1-0"), weights("evit-2-0"), weights("evit-2-1")
    fresh = create_model(Arch.from_json(Path(deit).read_bytes())).state_dict()
    assert all(torch.equal(first[name], value) for name, value in second.items())
    moved = max(float((alone[name] - fresh[name]).abs().max()) for name in fresh)
    assert max(float((alone[name] - value).abs().max()) for name, value in first.items()) < 1e-3 * moved
    first, second = weights("levit-2-0"), weights("levit-2-1")
    assert any("running_mean" in name for name in first)
    assert all(torch.equal(first[name], value) for name, value in second.items())


@pytest.mark.slow
def test_torchrun(deit, tmp_path):
    """One folder, one voice."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "nas.cli", "train", deit]
    for _ in range(2):
        done = subprocess.run(
            [*command, "--out", str(out), *ARGS],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(" top-1 (95%: ") == 1
    assert done.stderr.count("is finished") == 1
    found = metrics(out)
    assert found["processes"] == 2
    assert found["final"]["top1"] > 20


@pytest.mark.usefixtures("few")
def test_a_loss_that_is_not_finite_leaves_the_last_good_weights(vitnas, deit, tmp_path, monkeypatch):
    out = tmp_path / "out"
    step = nas.training.updater.Updater.step
    updates = []

    def failing(self, at, batches):
        updates.append(at)
        return step(self, at, batches) * (float("nan") if at == 6 else 1.0)

    monkeypatch.setattr(nas.training.updater.Updater, "step", failing)
    code, _, err = vitnas("train", deit, "--out", str(out), *ARGS)
    assert code == 1
    assert updates[-1] == 6
    (line,) = (line for line in err.splitlines() if "no longer finite" in line)
    assert "in epoch 2: lower the learning rate" in line
    assert "the weights of epoch 1 are kept" in line
    found = metrics(out)
    assert found["final"]["epoch"] == 1
    assert "no longer finite" in found["error"]
    data = nas.data.dataset.open_data(None, 32, 10, 0)
    model = create_model(Arch.from_json((out / "arch.json").read_bytes()), weights=out / "model.safetensors")
    assert evaluate(model, loader(data.val, 64, shuffle=False, seed=0)).top1 == pytest.approx(found["final"]["top1"])
    monkeypatch.setattr(nas.training.updater.Updater, "step", step)
    code, _, err = vitnas("train", deit, "--out", str(out), *ARGS)
    assert (code, metrics(out)["error"]) == (0, None)
    assert "going on after epoch 1" in err


@pytest.mark.usefixtures("few")
def test_a_loss_that_is_not_finite_at_once_leaves_no_weights(vitnas, deit, tmp_path):
    code, _, err = vitnas("train", deit, "--out", str(tmp_path / "out"), *ARGS, "--lr", "999")
    assert code == 1, err
    assert "there are no earlier weights" in err or "the weights of epoch" in err


# Fine-tuning, teachers


@pytest.fixture(scope="module")
def trained(helpers, small, tmp_path_factory) -> Path:
    """A folder with a LeViT at 64 px and its weights."""
    from nas.export.folder import save_weights

    arch = Arch.from_json(Path(small("levit", resolution=64, distilled=True)).read_bytes())
    folder = tmp_path_factory.mktemp("trained")
    (folder / "arch.json").write_text(arch.to_json())
    save_weights(helpers.randomise(create_model(arch), 1), folder / "model.safetensors")
    return folder


@pytest.mark.usefixtures("few")
def test_fine_tuning_begins_with_the_weights_given(vitnas, trained, tmp_path, monkeypatch):
    """At another resolution the bias tables are resized; without --weights they are those beside the Arch."""
    begun = {}

    class Peek(nas.training.engine.Training):
        def __init__(self, model, *args, **kwargs) -> None:
            values = {name: value.clone() for name, value in model.state_dict().items()}
            begun.setdefault(model.arch.resolution, values)  # before the probe, which changes the classifier
            super().__init__(model, *args, **kwargs)

    monkeypatch.setattr(nas.training.engine, "Training", Peek)
    weights, checkpoint = str(trained / "model.safetensors"), str(tmp_path / "checkpoint.pth")
    given, digest = load_file(weights), file_digest(Path(weights))
    short = ("--lr", "1e-3", "--epochs", "1", "--batch-size", "64")
    torch.save({"model": {f"module.{name}": value for name, value in given.items()}, "epoch": 9}, checkpoint)
    args = ("--weights", checkpoint, *short)
    for size in (64, 96):
        out = tmp_path / str(size)
        code, _, err = vitnas("train", str(trained), "--resolution", str(size), *args, "--out", str(out))
        assert code == 0, err
        assert metrics(out)["recipe"]["name"] == "finetune"
        assert ("64 px, resized to 96 px" in err) == (size == 96)
        assert f"{checkpoint}: taken from model; prefix module. stripped" in err
    assert all(torch.equal(given[name], value) for name, value in begun[64].items())
    changed = {name for name, value in begun[96].items() if not torch.equal(given[name], value)}
    assert changed
    assert all(name.endswith("bias.table") for name in changed)
    for name, more, recipe in (("own", (), "finetune"), ("random", ("--from-scratch",), "quick")):
        begun.clear()
        args = ("train", str(trained), *short, *more, "--out", str(tmp_path / name))
        code, _, err = vitnas(*args)
        assert code == 0
        assert (f"begins with the weights of {weights} (sha256 {digest}; --weights none: with random" in err) == (
            name == "own"
        )
        assert metrics(tmp_path / name)["recipe"]["name"] == recipe
        assert all(torch.equal(given[key], value) for key, value in begun[64].items()) == (name == "own")
    begun.clear()
    args = ("train", f"{trained}@96", *short, "--out", str(tmp_path / "at"))
    code, _, err = vitnas(*args)
    assert code == 0, err
    assert "64 px, resized to 96 px" in err
    unchanged = {name for name, value in given.items() if torch.equal(begun[96][name], value)}
    assert unchanged == given.keys() - changed
    both = vitnas("train", f"{trained}@96", "--resolution", "64", "--out", str(tmp_path / "both"))
    vitnas.refused(both, f"{trained}@96 and --resolution 64: give one of them")


def test_weights_of_a_third_resolution_are_resized_and_their_faults_told(trained, tmp_path):
    """Neither the Arch's own resolution nor that of the training: found by the tensors' shapes."""
    arch = Arch.from_json((trained / "arch.json").read_bytes()).at(224)
    file, told = tmp_path / "weights.safetensors", []
    inputs = SimpleNamespace(target=Target("levit", arch=arch), network=arch.at(32), start=Start(file))
    given = load_file(trained / "model.safetensors")
    save_file(given, file)
    first_network(SimpleNamespace(seed=0), inputs, told.append)
    assert told == ["weights of 64 px, resized to 32 px"]
    broken = list(given)[-1]
    given[broken].view(-1)[0] = torch.nan
    save_file(given, file)
    with pytest.raises(UserError, match=f"not finite: {broken}"):
        first_network(SimpleNamespace(seed=0), inputs, told.append)


@pytest.mark.usefixtures("few")
def test_where_a_network_of_other_classes_begins(vitnas, trained, tmp_path):
    """Its own classifier is not used, and that is told."""
    data, out = tmp_path / "data", tmp_path / "out"
    for label in ("cat", "dog", "fox"):
        (data / label).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(data / label / f"{i}.png")
    args = ("train", str(trained), "--data", str(data), "--epochs", "1", "--batch-size", "4")
    code, _, err = vitnas(*args, "--out", str(out))
    assert code == 0, err
    assert (
        "model.safetensors has a classifier of 10 classes: one for the 3 classes of these images begins untrained"
        in err
    )
    assert metrics(out)["classes"] == ["cat", "dog", "fox"]
    for folder in (data, data / "cat" / "out"):
        vitnas.refused(vitnas(*args, "--out", str(folder)), f"--out {folder} is in the folder of the images")
    vitnas.refused(vitnas(*args, "--out", str(trained)), f"--out {trained} holds the weights that the training begins")


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("distillation", ["hard", "soft"])
def test_a_folder_teaches(vitnas, trained, deit, tmp_path, distillation):
    """A teacher of another family and resolution."""
    out = tmp_path / "out"
    code, _, err = vitnas(
        "train",
        deit,
        "--teacher",
        str(trained),
        "--distillation",
        distillation,
        "--out",
        str(out),
        "--epochs",
        "1",
        "--batch-size",
        "64",
    )
    assert code == 0, err
    assert f"{distillation} distillation from {trained}" in err
    assert metrics(out)["recipe"]["distillation"] == distillation


def test_timm_s_networks_teach_as_they_were_trained(tmp_path):
    """Their weights from a file; their own normalisation and resolution."""
    import timm

    from nas.training.teachers import find_teacher

    model = timm.create_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k", num_classes=10, depth=1).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"--teacher-weights: .*/weights\.pth: the weights lack 132 of the 152 tensors"):
        find_teacher("timm/vit_tiny_patch16_224", str(tmp_path / "weights.pth"), ["class"] * 10)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    teacher = find_teacher("timm/vit_tiny_patch16_224", str(tmp_path / "weights.pth"), ["class"] * 10).eval()
    pixels = torch.rand(2, 3, 224, 224)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    with torch.no_grad():
        assert torch.allclose(teacher((pixels - mean) / std), model((pixels - 0.5) / 0.5), atol=1e-4)
        assert teacher(torch.rand(2, 3, 64, 64)).shape == (2, 10)
    half = Pixels((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    teacher = find_teacher("timm/vit_tiny_patch16_224", str(tmp_path / "weights.pth"), ["class"] * 10, half).eval()
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (half.mean, half.std))
    with torch.no_grad():
        assert torch.allclose(teacher((pixels - mean) / std), model((pixels - 0.5) / 0.5), atol=1e-4), "of a student's"


@pytest.mark.usefixtures("few")
def test_an_oracle_lends_weights_and_chooses_tokens(vitnas, small, deit, tmp_path):
    oracle = tmp_path / "oracle"
    args = ("--epochs", "1", "--batch-size", "16")
    assert vitnas("train", deit, "--out", str(oracle), *args)[0] == 0
    raw = json.loads(Path(deit).read_text())
    raw["blocks"][0] |= {"keep_rate": 0.5, "fuse": True}
    student = tmp_path / "arch.json"
    student.write_text(json.dumps(raw))
    code, _, err = vitnas("train", str(student), "--oracle", str(oracle), "--out", str(tmp_path / "out"), *args)
    assert code == 0, err
    assert "chooses the tokens" in err
    assert metrics(tmp_path / "out")["seen"]["images"] == metrics(oracle)["seen"]["images"], "the same ones"
    (oracle / "model.seen.npy").unlink()
    data = ("--out", str(tmp_path / "again"), *args)
    code, _, err = vitnas("train", str(student), "--oracle", str(oracle), *data)
    assert f"which images {oracle / 'model.safetensors'} was trained on is unknown" in err
    assert metrics(tmp_path / "again")["seen"] is None
    assert metrics(tmp_path / "out")["final"]["loss"] < metrics(oracle)["final"]["loss"]
    refused = vitnas("train", small("levit"), "--oracle", str(oracle), "--out", str(tmp_path / "x"), *args)
    vitnas.refused(refused, "EViT")


# Refused


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--recipe", "slow"), ("unknown --recipe 'slow'", "quick")),
        (("--epochs", "0"), ("--epochs is 0",)),
        (("--seed", "-1"), ("--seed", "0")),
        (("--seed", "99999999999999999999"), ("--seed",)),
        (("--workers", "100000"), ("--workers is 100000",)),
        (("--minutes", "0"), ("--minutes is 0: give more than 0",)),
        (("--from-scratch", "--weights", "timm"), ("--from-scratch and --weights timm: give one of them",)),
        (("--workers", "-1"), ("--workers is -1",)),
        (("--lr", "nan"), ("--lr is nan",)),
        (("--num-classes", "-3"), ("--num-classes",)),
        (("--num-classes", "2000000000"), ("--num-classes is 2000000000: give 2 to",)),
        (("--resolution", "-32"), ("--resolution is -32",)),
        (("--resolution", "0"), ("--resolution is 0",)),
        (("--resolution", "320000"), ("resolution", "512")),
        (("--batch-size", "1"), ("--batch-size is 1",)),
        (("--accumulate", "0"), ("--accumulate is 0",)),
        (("--lr", "0"), ("--lr is 0",)),
        (("--precision", "int8"), ("--precision 'int8'", "bf16")),
        (("--device", "tpu"), ("--device 'tpu'",)),
        (("--distillation", "firm"), ("--distillation 'firm'",)),
        (("--distillation", "features"), ("--distillation features needs --teacher",)),
        (("--num-classes", "12"), ("--num-classes",)),
        (("--data", "/no/such/folder"), ("/no/such/folder",)),
        (("--resolution", "33"), ("33",)),
        (("--weights", "no.safetensors"), ("no.safetensors: no such file",)),
        (("--weights", "timm"), ("--weights", "no pretrained weights")),
        (("--teacher-weights", "x.pth"), ("--teacher-weights needs --teacher",)),
        (("--teacher", "timm/no_such_network"), ("--teacher timm/no_such_network", "no such network")),
        (("--teacher", "no_such_network"), ("no_such_network",)),
        (("--teacher", "no/folder"), ("no/folder",)),
        (("--teacher", "sepvit_lite"), ("--teacher sepvit_lite", "no pretrained weights")),
        (("--teacher", "timm/resnet10t", "--teacher-weights", "x.pth"), ("x.pth: no such file",)),
    ],
)
def test_bad_input_is_one_line(vitnas, deit, tmp_path, args, words):
    out = tmp_path / "out"
    vitnas.refused(vitnas("train", deit, "--out", str(out), "--device", "cpu", *args), *words)
    assert not out.exists()


def test_a_teacher_without_trained_weights_is_refused(vitnas, deit, tmp_path, monkeypatch):
    """A folder without any, a host that cannot be reached."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "arch.json").write_text(get_arch("shvit_s1", 10).at(64).to_json())

    monkeypatch.setattr("nas.connection.unreachable", lambda: "cannot reach the host")
    for words, expected in (
        (("--teacher", str(bare)), "has no model.safetensors"),
        (("--teacher", "timm/regnety_160.deit_in1k"), "cannot reach the host"),
        (("--teacher", "levit_128s"), "could not fetch"),
    ):
        vitnas.refused(vitnas("train", deit, "--out", str(tmp_path / "out"), *words), expected)


def test_a_full_disk_is_told(vitnas, deit, tmp_path, fill_disk):
    fill_disk()
    code, _, err = vitnas("train", deit, "--out", str(tmp_path / "out"), *ARGS)
    assert code == 1
    assert f"no space left in {tmp_path / 'out' / 'state'}" in err.splitlines()[-1]
    assert "needed): make room, then the same command goes on" in err.splitlines()[-1]


def test_what_fills_no_batch_is_told_once(vitnas, deit, few, tmp_path):
    out = tmp_path / "out"
    command = ("train", deit, "--out", str(out), "--epochs", "1", "--batch-size", "50", "--device", "cpu")
    code, _, err = vitnas(*command)
    assert code == 0, err
    assert err.count("28 of 128 images an epoch fill no batch of 50 and are left out (others in each epoch)") == 1


def test_the_rate_is_that_of_the_whole_training(tmp_path, capsys):
    from nas.cli.display import show_train
    from nas.training.result import Epoch, Final

    rows = [{"epoch": 1, "seconds": 1.0, "images_per_s": 200.0}, {"epoch": 2, "seconds": 3.0, "images_per_s": 40.0}]
    result = TrainResult(
        **dict.fromkeys(("model", "command", "started", "finished", "family"), ""),
        **{key: {} for key in ("data", "options", "hardware", "phases")},
        epochs=[Epoch(**row, loss=1.0, lr=1e-3) for row in rows],
        final=Final(**rows[-1], loss=1.0, lr=1e-3, of="last weights"),
        recipe={"epochs": 2, "name": "quick"},
        params=1_000_000,
        macs=1_000_000,
        resolution=32,
        notes=[],
        error=None,
    )
    show_train(result, tmp_path, to_stderr=False)
    assert "trained in 0:04 at 80 images/s" in capsys.readouterr().out
