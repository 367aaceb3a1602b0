"""`vitnas show`: what a run has found out, at any width, and no prediction for a network that was trained."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import onnx
import pytest
from rich.console import Console

import nas.cli
import nas.cli.facts
from nas.cli.facts import few, lines_of
from nas.export.card import Accuracy, Card, Latency, Preprocess
from nas.export.folder import save_model, save_onnx
from nas.export.onnx import label_onnx
from nas.export.options import FileOptions
from search_spaces import create_model

FLOWERS = ["daisy", "dandelion", "rose", "sunflower", "tulip"]
CARD = Card(
    preprocess=Preprocess(resize=36, size=32, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3),
    classes=FLOWERS,
    accuracy=Accuracy(top1=59.5, ci=(52.2, 66.4), images=180, data="flowers"),
    latency=Latency(
        ms=1.234,
        ci=(1.2, 1.3),
        device="cpu",
        runtime="onnxruntime",
        precision="fp32",
        threads=1,
        batch_size=1,
        cpu="Fixture CPU @ 2.45 GHz",
    ),
)


@pytest.fixture(scope="module")
def made(helpers, tmp_path_factory) -> Path:
    """A trained search's folder, which stays as it is."""
    folder = tmp_path_factory.mktemp("facts")
    model = create_model(helpers.random_arch("shvit", 0, num_classes=5, resolution=32))
    save_model(model, folder / "best")
    save_onnx(model, folder / "best", FileOptions(), trained=True, card=CARD)
    (folder / "trials.csv").touch()
    return folder


@pytest.fixture
def search(made, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "fl")


def test_a_trained_search_tells_its_own_facts(vitnas, search):
    code, out, _ = vitnas("show", str(search))
    assert code == 0
    for line in (
        "(search): shvit, 32 px, 5 classes",
        "weights: trained",
        "data: flowers",
        "classes: daisy, dandelion, rose, sunflower, tulip",
        "images: mean 0.5 0.5 0.5, std 0.5 0.5 0.5, bicubic, crop 0.875",
        "accuracy: 59.5% top-1 (95%: 52.2 to 66.4, 180 images)",
        "latency: 1.23 ms (95%: 1.20 to 1.30), onnxruntime fp32, cpu (Fixture CPU @ 2.45 GHz), 1 thread, batch 1",
    ):
        assert line in out
    assert "prior" not in out
    facts = json.loads(vitnas("show", str(search), "--json")[1])
    assert (facts["top1"], facts["top1_ci"], facts["classes"]) == (59.5, [52.2, 66.4], FLOWERS)
    assert facts["latency"]["ms"] == 1.234
    assert (facts["kind"], facts["weights"], facts["quality_estimate"]) == ("search", "trained", None)


def test_accuracy_and_latency_are_those_of_the_file_that_was_measured(vitnas, search):
    best = search / "best"
    measured = CARD.latency.model_copy(update={"precision": "int8", "ms": 0.75})
    shutil.copyfile(best / "model.onnx", best / "model.int8.onnx")
    for name, changes in (("model", {"latency": None}), ("model.int8", {"accuracy": None, "latency": measured})):
        label_onnx(best / f"{name}.onnx", None, trained=True, card=CARD.model_copy(update=changes))
    out = vitnas("show", str(search))[1]
    assert "accuracy: 59.5% top-1 (95%: 52.2 to 66.4, 180 images), in fp32\n" in out
    assert "latency: 0.75 ms (95%: 1.20 to 1.30), onnxruntime int8" in out
    assert "latency: not known" in vitnas("show", str(best / "model.onnx"))[1]
    assert "accuracy: not known" in vitnas("show", str(best / "model.int8.onnx"))[1]
    lower = CARD.model_copy(update={"accuracy": Accuracy.counted(58.0, 180, "flowers"), "latency": measured})
    label_onnx(best / "model.int8.onnx", None, trained=True, card=lower)
    assert re.search(r"accuracy: 58.0% top-1 \(.*\), in int8\n", vitnas("show", str(search))[1])


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_figure_is_cut(width, vitnas, search, monkeypatch, capsys):
    monkeypatch.setattr(nas.cli.facts, "console_of", lambda: Console(width=width, markup=False, highlight=False))
    wide = json.loads(vitnas("show", str(search), "--json")[1])
    nas.cli.facts.show(wide | {"model": "runs/fl"})
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert " ".join(lines_of(wide | {"model": "runs/fl"})) in " ".join(text.split())
    for figure in re.findall(r"\d+\.\d\d", " ".join(f"{stage['ffn_ratio']:.2f}" for stage in wide["stages"])):
        assert figure in text


def test_a_training_and_a_pruning(vitnas, search, tmp_path):
    folder = search / "best"
    metrics = {"data": {"name": "flowers"}, "options": {"model": "shvit_s1", "weights": "timm"}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    out = vitnas("show", str(folder))[1]
    assert "(training)" in out
    assert "weights: trained: shvit_s1, fine-tuned from timm" in out
    for start, told in (
        ({"source": "random"}, "trained from random weights"),
        ({"source": "run", "file": "runs/a"}, "fine-tuned from runs/a"),
        ({"source": "cache", "file": "hub/b"}, "fine-tuned from its published weights"),
    ):
        (folder / "metrics.json").write_text(json.dumps(metrics | {"start": start}))
        assert f"weights: trained: shvit_s1, {told}" in vitnas("show", str(folder))[1]
    label_onnx(folder / "model.onnx", None, trained=True, card=CARD.model_copy(update={"latency": None}))
    out = vitnas("show", str(folder))[1]
    assert f"latency: not kept with a training; `vitnas bench {folder}` measures it" in out
    (folder / "metrics.json").unlink()
    pruned = {
        "model": "shvit_s1",
        "data": {"name": "flowers"},
        "options": {"model": "shvit_s1"},
        "budget": {"text": "0.5x", "metric": "macs"},
        "after": {"latency_ms": 2.5, "ci": [2.4, 2.6]},
        "settings": {"device": "cpu", "runtime": "openvino", "precision": "int8", "threads": 2, "batch_size": 4},
        "hardware": {"cpu": "C"},
    }
    (folder / "prune.json").write_text(json.dumps(pruned))
    out = vitnas("show", str(folder))[1]
    assert "(pruning)" in out
    assert "weights: trained: shvit_s1, pruned to 0.5x macs" in out
    assert "accuracy: 59.5% top-1 (95%: 52.2 to 66.4, 180 images), in fp32\n" in out
    assert "latency: 2.50 ms (95%: 2.40 to 2.60), openvino int8, cpu (C), 2 threads, batch 4" in out
    price = {"precision": "int8", "top1": 58.0, "top1_ci": [50.7, 64.9], "images": 180, "drop": 1.5}
    (folder / "prune.json").write_text(json.dumps(pruned | {"price": price}))
    facts = json.loads(vitnas("show", str(folder), "--json")[1])
    assert (facts["top1"], facts["top1_precision"], facts["latency"]["precision"]) == (58.0, "int8", "int8")
    assert "accuracy: 58.0% top-1 (95%: 50.7 to 64.9, 180 images), in int8\n" in vitnas("show", str(folder))[1]
    agreed = {"top1": 97.0, "top1_ci": [90.0, 99.0], "images": 30}
    pruned |= {"options": {"unlabelled": "photos"}, "accuracy": {"pruned": agreed}, "kept": "pruned"}
    (folder / "prune.json").write_text(json.dumps(pruned))
    out = vitnas("show", str(folder))[1]
    assert "accuracy: not known" in out, "whatever an early vitnas wrote into model.onnx"
    assert "with the unpruned network: 97.0% agreement (95%: 90.0 to 99.0, 30 images)" in out
    facts = json.loads(vitnas("show", str(folder), "--json")[1])
    assert (facts["top1"], facts["agreement"]["top1"]) == (None, 97.0)
    (folder / "prune.json").write_text("{}")
    vitnas.refused(vitnas("show", str(folder)), "prune.json is damaged")


PRUNED = {
    "model": "shvit_s1",
    "data": {"name": "flowers"},
    "budget": {"text": "0.5x", "metric": "macs"},
    "after": {"latency_ms": 2.5, "ci": [2.4, 2.6]},
    "settings": {"device": "cpu", "runtime": "openvino", "precision": "int8", "threads": 2, "batch_size": 4},
    "hardware": {"cpu": "C"},
}
TRAINED = {"data": {"name": "flowers"}, "options": {"model": "shvit_s1", "weights": "timm"}}
DEEP = '{"a":' * 100_000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("prune.json", {key: value for key, value in PRUNED.items() if key != gone}) for gone in PRUNED),
        ("prune.json", PRUNED | {"after": {"latency_ms": math.inf, "ci": [1, 2]}}),
        ("prune.json", PRUNED | {"settings": PRUNED["settings"] | {"threads": -1}}),
        ("prune.json", PRUNED | {"after": {"latency_ms": 2.5, "ci": None}}),
        ("prune.json", []),
        ("prune.json", DEEP),
        ("metrics.json", DEEP),
        ("metrics.json", TRAINED | {"options": []}),
        ("metrics.json", TRAINED | {"data": {"name": 3}}),
        ("metrics.json", b"\xff"),
    ],
)
def test_a_damaged_file_of_a_run_is_one_line(vitnas, search, name, content):
    path = search / "best" / name
    if name == "prune.json" and isinstance(content, dict):
        content = {"options": {"model": "shvit_s1"}} | content
    path.write_bytes(content if isinstance(content, bytes) else as_text(content).encode())
    vitnas.refused(vitnas("show", str(search / "best")), f"{name} is damaged")


@pytest.mark.parametrize(
    ("key", "content"),
    [
        ("classes", '["\\ud800"]'),
        ("classes", DEEP),
        ("preprocess", DEEP),
        *(("preprocess", CARD.preprocess.model_dump() | {"size": size}) for size in (-1, 0, 10**400, math.inf)),
        ("accuracy", CARD.accuracy.model_dump() | {"images": -180}),
        ("accuracy", CARD.accuracy.model_dump() | {"top1": math.nan}),
        ("latency", CARD.latency.model_dump() | {"threads": -1}),
        ("latency", CARD.latency.model_dump() | {"ms": math.inf}),
        ("latency", CARD.latency.model_dump() | {"ci": [math.nan, 1]}),
    ],
)
def test_a_file_that_says_nonsense_is_one_line(vitnas, tmp_path, key, content):
    model = onnx.ModelProto()
    onnx.helper.set_model_props(model, {"vitnas.weights": "trained", f"vitnas.{key}": as_text(content)})
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    vitnas.refused(vitnas("show", str(tmp_path / "model.onnx")), "model.onnx is damaged")


@pytest.mark.parametrize(("name", "content"), [("labels.txt", b"\xff"), ("preprocess.json", DEEP.encode())])
def test_damaged_files_beside_a_network(vitnas, search, name, content):
    (search / "best" / "model.onnx").unlink()
    (search / "best" / name).write_bytes(content)
    code, out, err = vitnas("show", str(search))
    assert (code, out) == (2, "")
    assert name in err
    assert "is damaged" in err


def test_names_write_nothing_on_the_terminal(capsys):
    nas.cli.facts.prose(Console(), "rose\x1b[2J \ud800")
    assert capsys.readouterr().out == "rose\\x1b[2J \\ud800\n"


def as_text(content: object) -> str:
    return content if isinstance(content, str) else json.dumps(content)


def test_a_file_tells_what_it_holds(vitnas, search, tmp_path):
    code, out, _ = vitnas("show", str(search / "best" / "model.onnx"))
    assert code == 0
    assert "(ONNX file): shvit, 32 px, 5 classes" in out
    assert "accuracy: 59.5% top-1" in out
    other = tmp_path / "other.onnx"
    other.write_bytes(b"")
    vitnas.refused(vitnas("show", str(other)), "is empty: fetch or export it again")
    other.write_bytes(onnx.ModelProto(ir_version=8).SerializeToString())
    vitnas.refused(vitnas("show", str(other)), "says nothing of itself")


def test_only_a_network_that_nobody_has_trained_is_predicted(vitnas, search):
    (search / "best" / "model.safetensors").unlink()
    out = vitnas("show", str(search / "best" / "arch.json"))[1]
    assert "weights: random" in out
    assert "prior" in out
    out = vitnas("show", "shvit_s1")[1]
    assert "(published network)" in out
    assert "latency: not known here; `vitnas bench` measures it" in out


def test_an_untrained_search_tells_its_own_estimate(vitnas, search):
    label_onnx(search / "best" / "model.onnx", None, trained=False, card=Card())
    (search / "best" / "model.safetensors").unlink()
    result = {
        "data": {"name": "flowers"},
        "winner": {"quality": 35.0, "quality_estimate": 50.0, "quality_ci": [18.14, 81.86]},
        "quality_tier": {"label": "score (train)"},
    }
    (search / "result.json").write_text(json.dumps(result))
    out = vitnas("show", str(search))[1]
    assert "data: flowers" in out
    assert "score (train): 35.0; its estimate is 50.0% (95%: 18.1 to 81.9)" in out
    assert "prior" not in out
    assert "prior" in vitnas("show", f"{search}@64")[1]
    (search / "result.json").write_text("{}")
    vitnas.refused(vitnas("show", str(search)), "result.json is damaged")


def test_facts_hold_at_the_resolution_of_the_weights(vitnas, search):
    out = vitnas("show", f"{search}@64")[1]
    assert "shvit, 64 px" in out
    assert "59.5%" not in out
    assert "1.23 ms" not in out


@pytest.mark.parametrize("begun", ["study.journal", "state/state.json"])
def test_a_run_without_a_result(vitnas, tmp_path, begun):
    (tmp_path / begun).parent.mkdir(exist_ok=True)
    (tmp_path / begun).touch()
    vitnas.refused(vitnas("show", str(tmp_path)), "without a network so far", "goes on")


def test_weights_alone_say_nothing_of_their_accuracy(vitnas, search):
    for name in ("model.onnx", "labels.txt", "preprocess.json"):
        (search / "best" / name).unlink()
    out = vitnas("show", str(search))[1]
    assert "weights: trained" in out
    assert "accuracy: not known" in out
    assert "prior" not in out


def test_many_names_are_counted():
    assert few(["a", "b"]) == "a, b"
    assert few([f"class {i}" for i in range(1000)]).endswith("class 5 and 994 more")
    assert few(["x" * 100, "y"]) == "x" * 60 + " and 1 more"
