"""A whole race, from its first trial to best/: real trainings and files of small networks, made-up latencies."""

from __future__ import annotations

import csv
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quick
import torch
from PIL import Image
from torch import nn

from nas.export.artifact import Exporter
from nas.export.card import Card
from nas.export.folder import save_weights
from nas.measure.samples import Measurement
from nas.networks.build import create
from nas.networks.counts import counts_of
from nas.networks.timm_network import TimmNetwork
from nas.quality.trainer import CandidateTrainer
from nas.search.speed import POWER
from search_spaces import Arch, get_arch

PX, FOLDER, TEACHER = 32, "race", "timm/test_byobnet"


def ms_of(network: Arch | TimmNetwork) -> float:
    return (counts_of(network).macs / 1e6) ** POWER


def as_trained(network: nn.Module) -> nn.Module:
    """A network whose residual branches all have an effect: before training they end in a BatchNorm of weight 0."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
    return network


class Stopwatch:
    """Latencies that follow multiply-accumulates."""

    def __init__(self) -> None:
        self.ms: dict[Path, float] = {}
        """By the file that was exported last."""

    def prepare(self) -> None:
        pass

    def measure(self, path: Path, *_: Any, **__: Any) -> Measurement:
        return Measurement([[self.ms[path]] * 3] * 8, [[ms_of(quick.small_reference())] * 3] * 8)

    def compare(self, paths: dict[str, Path], *_: Any, **__: Any) -> dict[str, Measurement]:
        return {label: self.measure(path) for label, path in paths.items()}


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exports: Path) -> list[str]:
    """A race with a zoo of a network within the budget, one over it to cut from, and a teacher of other classes."""
    for short in (quick.few_rounds, quick.blank_plots, quick.small_shvit, quick.short_probes):
        short(monkeypatch)
    quick.exports_here(monkeypatch, exports)
    watch, write = Stopwatch(), Exporter.write

    def written(exporter: Exporter, network: Any, settings: Any, stem: Path) -> Path:
        path = write(exporter, network, settings, stem)
        watch.ms[path] = ms_of(network)
        return path

    monkeypatch.setattr(Exporter, "write", written)
    monkeypatch.setattr("nas.search.trial.open_measurer", lambda *_: nullcontext(watch))
    monkeypatch.setattr("nas.export.side_by_side.compare", watch.compare)
    monkeypatch.setattr("nas.search.race.reference_arch", quick.small_reference)
    monkeypatch.setattr("nas.quality.trained.HalvingTier._doubt", lambda *_: 100.0)  # all finals are trained
    zoo, rng = tmp_path / "zoo", np.random.default_rng(0)
    zoo.mkdir()
    torch.manual_seed(0)
    for name in ("shvit_s1", "shvit_s2"):
        save_weights(as_trained(create(get_arch(name).at(PX).replace(num_classes=10))), zoo / f"{name}.safetensors")
    save_weights(create(TimmNetwork(TEACHER.removeprefix("timm/"))), zoo / "test_byobnet.safetensors")
    for part, count in (("train", 60), ("val", 20)):
        for label, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
            folder = tmp_path / "images" / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(0, 60, (PX, PX, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    budget = 1.1 * ms_of(get_arch("shvit_s1").at(PX).replace(num_classes=2))
    return [
        *("search", "--latency-budget", f"{budget:.4f}ms", "--trials", "6", "--study", FOLDER, "--family", "shvit"),
        *("--data", str(tmp_path / "images"), "--weights-from", str(zoo), "--teacher", TEACHER, "--out", str(tmp_path)),
        *("--resolution", str(PX), "--train-images", "100", "--epochs", "1", "--final-epochs", "1", "--seeds", "1"),
        *("--seed", "1", "--threads", "1", "--no-cache", "--json"),
    ]


@pytest.mark.slow
def test_a_race_from_its_first_trial_to_best(
    vitnas: Any, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ready network that fits, the one over the budget that is tuned and cut, and a teacher tuned for the finals;
    the same command again trains nothing."""
    code, out, err = vitnas(*command)
    assert code == 0, err
    found, folder = json.loads(out), tmp_path / FOLDER
    rows = list(csv.DictReader((folder / "trials.csv").open()))
    assert {(row["kind"], row["parent"]) for row in rows} == {("ready", ""), ("derived", "shvit_s2")}
    assert {row["name"] for row in rows if row["kind"] == "ready"} == {"shvit_s1@32", "shvit_s2@32"}
    assert all(row["parent"] == ("shvit_s2" if row["kind"] == "derived" else "") for row in found["pareto"])
    ready, derived, gain = found["best_ready"], found["best_derived"], found["gain_over_ready"]
    assert (ready["name"], derived["parent"]) == ("shvit_s1@32", "shvit_s2")
    assert gain["points"] == pytest.approx(derived["accuracy"] - ready["accuracy"])
    assert found["teacher_gain"]["of"] == f"{TEACHER}@32"
    assert found["teacher"] == (f"{TEACHER}@32" if found["teacher_gain"]["points"] > 0 else None)
    assert any(note.startswith("24 images judge: ") for note in found["notes"])
    for kept in (
        "training/parents/shvit_s2-32px",
        "training/teachers/timm-test_byobnet@32-32px",
        "final/parent-shvit_s2-32px-1-seed0",
    ):
        assert (folder / f"{kept}.json").is_file()
        assert (folder / f"{kept}.safetensors").is_file()
    files = {"arch.json", "model.onnx", "model.safetensors", "model.seen.npy", "preprocess.json", "labels.txt"}
    assert {path.name for path in (folder / "best").iterdir()} == files
    assert json.loads((folder / "best" / "arch.json").read_text()) == found["winner"]["arch"]
    card = Card.read(folder / "best")
    assert (card.classes, card.accuracy.top1) == (["blue", "red"], found["winner"]["accuracy"])
    monkeypatch.setattr(CandidateTrainer, "train", None)
    code, out, err = vitnas(*command)
    assert code == 0, err
    again = json.loads(out)
    assert (again["winner"]["name"], again["teacher_gain"]) == (found["winner"]["name"], found["teacher_gain"])
