"""`vitnas prune --model timm/NAME` on a tiny network: how an interrupted run goes on, what a finished one says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import nas.prune
import nas.prune.figures
import nas.prune.images
import nas.prune.outside
import nas.prune.run
from nas.errors import DiskFull, UserError
from nas.identity import file_digest
from nas.measure.runtime import LOWER, Settings
from nas.measure.samples import Measurement
from nas.networks.build import create
from nas.networks.pretrained import Pretrained
from nas.networks.timm_network import TimmNetwork
from nas.prune import steps
from nas.prune.images import PruneJob
from nas.prune.request import PruneRequest, parse_pruning_budget
from pruning import outside
from pruning.outside_probe import Probe

KEPT = ("accuracy", "rounds", "notes", "layers", "trained_images", "tuned_images", "before", "after")


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small input, little training, no weights to fetch; neither the trial nor the closing run is made."""
    whole = outside.load_outside

    def load_outside(name: str, num_classes: int | None):
        return whole(name, num_classes)[0], 32

    def no_way(*_):
        raise UserError("no way to the hub")

    def closing_run(options, models, *_):
        (options.folder / "model.onnx").write_bytes(b"")
        return {name: Measurement([[1.0] * 3] * 3) for name in models}

    monkeypatch.setattr(outside, "load_outside", load_outside)
    monkeypatch.setattr("nas.networks.pretrained.find_pretrained", no_way)
    monkeypatch.setattr(outside, "run_probe", lambda *_: Probe(1, None))
    monkeypatch.setattr(nas.prune.outside, "_closing_run", closing_run)
    monkeypatch.setattr(steps, "BRIEF_IMAGES", 48)
    monkeypatch.setattr(nas.prune.images, "CALIBRATION_IMAGES", 16)
    monkeypatch.setattr(nas.prune.figures, "reallocation_plot", lambda result: b"")
    monkeypatch.setattr(nas.prune.figures, "importance_plot", lambda parts: b"")


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(15):
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path / f"images/{name}/{i}.png")
    data = ["--data", str(tmp_path / "images"), "--threads", "1", "--multiple-of", "4", "--rounds", "2"]
    return ["prune", "--model", "timm/test_resnet", *data]


@pytest.mark.parametrize("criterion", ["taylor", pytest.param("random", marks=pytest.mark.slow)])
def test_an_interrupted_run_goes_on_and_a_finished_one_is_left_as_it_is(
    vitnas, words, tmp_path: Path, monkeypatch, criterion: str
) -> None:
    words += ["--criterion", criterion, "--distill"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, _, said = vitnas(*words, "--out", str(whole))
    assert code == 0, said
    phase, begun = PruneJob.phase, []

    @contextmanager
    def one_phase(job: PruneJob, name: str) -> Iterator:
        begun.append(name)
        if len(begun) > 1:
            raise KeyboardInterrupt
        with phase(job, name) as progress:
            yield progress

    monkeypatch.setattr(PruneJob, "phase", one_phase)
    ends, stood = [], []
    while ends[-1:] != [0]:
        begun.clear()
        code, _, said = vitnas(*words, "--out", str(cut))
        assert code in (0, 130), said
        ends.append(code)
        stood.append(said.count("going on after"))
    assert ends == [130] * 8 + [0]
    assert stood == [0] + [1] * 8
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    first, second = (json.loads((folder / "prune.json").read_text()) for folder in (whole, cut))
    assert {key: first[key] for key in KEPT} == {key: second[key] for key in KEPT}
    assert first["after"]["macs"] <= first["before"]["macs"] / 2
    assert len(first["rounds"]) == 1
    assert not list(cut.glob("state/*.safetensors"))

    before = {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()}
    code, _, said = vitnas(*words, "--out", str(cut))
    assert code == 0
    assert "is finished: these are its results" in said
    assert {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()} == before
    Image.new("RGB", (32, 32)).save(tmp_path / "images/cat/new.png")
    vitnas.refused(vitnas(*words, "--out", str(cut)), "another content of the images of --data", "another --out")


def test_published_weights_of_another_network_are_refused(vitnas, words, tmp_path: Path, monkeypatch) -> None:
    """No reason to go on from random ones, as where they cannot be had."""
    file = tmp_path / "test_resnet.safetensors"
    save_file({"fc.weight": torch.zeros(2, 4)}, file)
    found = Pretrained("timm/test_resnet", file, "folder", file_digest(file), None)
    monkeypatch.setattr("nas.networks.pretrained.find_pretrained", lambda *_: found)
    code, _, said = vitnas(*words, "--out", str(tmp_path / "out"))
    assert code == 2
    assert said.splitlines()[-1].startswith(f"vitnas: {file}: the weights lack")


@pytest.mark.parametrize("linear", [True, False])
def test_published_weights_of_other_classes_get_a_probe(
    vitnas, words, tmp_path: Path, monkeypatch, linear: bool
) -> None:
    """Where the network ends in a linear layer; else all of it is briefly trained, which is said."""
    torch.manual_seed(0)
    theirs = create(TimmNetwork("test_resnet", 32, 5))
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.weight, 0.5)
    file = tmp_path / "test_resnet.safetensors"
    save_file(theirs.state_dict(), file)
    found = Pretrained("timm/test_resnet", file, "folder", file_digest(file), None)
    monkeypatch.setattr("nas.networks.pretrained.find_pretrained", lambda *_: found)
    if not linear:
        monkeypatch.setattr("nas.training.probe.classifier_of", none_linear)
    out = tmp_path / "out"
    code, _, said = vitnas(*words, "--out", str(out), "--finetune", "0")
    assert code == 0, said
    data = json.loads((out / "prune.json").read_text())
    assert data["weights"] == "timm"
    assert (data["probe_images"], data["trained_images"]) == ((26, 0) if linear else (0, 48))
    assert data["seen"]["images"] == data["data"]["train"] == 26, "all that the classifier has seen"
    assert ("the network's is a linear probe on 26 images" in said) == linear
    assert ("does not end in a linear layer" in said) != linear


def none_linear(*_: object) -> None:
    raise UserError("its classifier is no linear layer")


def test_a_full_disk_is_no_lack_of_published_weights(vitnas, words, tmp_path: Path, monkeypatch) -> None:
    def full(*_):
        raise DiskFull(tmp_path)

    monkeypatch.setattr("nas.networks.pretrained.find_pretrained", full)
    code, _, said = vitnas(*words, "--out", str(tmp_path / "out"))
    assert code == 1
    assert "no pretrained weights" not in said


def test_tuning_that_harms_is_not_kept(vitnas, words, tmp_path: Path, monkeypatch) -> None:
    """Nor told of by the card of model.onnx."""
    cards, told = [], {"before": 90.0, "pruned": 80.0, "recovered": 40.0}

    def accuracy(job: PruneJob, model, which: str) -> None:
        ci = [told[which] - 5, told[which] + 5]
        job.state.found[which] = {"top1": told[which], "ci": ci, "loss": 1.0, "images": 10, "hits": ""}

    closing_run = nas.prune.outside._closing_run
    monkeypatch.setattr(PruneJob, "accuracy", accuracy)
    monkeypatch.setattr(nas.prune.outside, "_closing_run", lambda *a: (cards.append(a[3]), closing_run(*a))[1])
    monkeypatch.setattr(PruneJob, "finish", PruneJob.save)
    code, _, said = vitnas(*words, "--out", str(tmp_path / "out"), "--no-control")
    assert code == 0
    assert "the weights before it are kept" in said
    data = json.loads((tmp_path / "out/prune.json").read_text())
    assert data["kept"] == "pruned"
    pruned = next((tmp_path / "out/state").rglob("pruned.safetensors"))
    assert (tmp_path / "out/model.safetensors").read_bytes() == pruned.read_bytes()
    assert cards[0].accuracy.top1 == 80.0


def test_a_budget_that_leaves_nothing_to_cut_makes_nothing(vitnas, words, tmp_path: Path) -> None:
    vitnas.refused(vitnas(*words, "--out", str(tmp_path / "out"), "--macs", "90G"), "--macs 90G", "above")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision", LOWER)
def test_lower_precisions_which_nothing_would_judge_are_refused(tmp_path: Path, precision: str) -> None:
    settings = Settings("openvino", precision=precision)
    request = PruneRequest("timm/test_resnet", parse_pruning_budget(), settings, tmp_path)
    with pytest.raises(UserError, match=f"^--precision {precision}: networks outside the five families are measured"):
        nas.prune.outside._check(request, ("taylor",))


def test_a_folder_of_an_older_vitnas_goes_on_without_refitting(vitnas, words, tmp_path: Path, monkeypatch) -> None:
    words += ["--finetune", "0", "--out", str(tmp_path / "out")]
    with monkeypatch.context() as stopped:
        stopped.setattr(nas.prune.outside, "_cut", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert vitnas(*words)[0] == 130
    path = tmp_path / "out/state/state.json"
    state = json.loads(path.read_text())
    del state["options"]["compensate"]
    path.write_text(json.dumps(state))
    code, _, said = vitnas(*words)
    assert code == 0, said
    assert "begun by an older vitnas: layers are not refitted" in said
    data = json.loads((tmp_path / "out/prune.json").read_text())
    assert data["options"]["compensate"] is False
    assert data["rounds"][0]["refitted"] == 0
