"""`vitnas prune` as a user meets it, on small networks: what it writes, resumes, refuses and says."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import nas.prune
import nas.prune.figures
import nas.prune.images
import nas.prune.rounds
import nas.prune.steps
import nas.prune.widths
from nas.cli.run_list import list_runs
from nas.data.pixels import Pixels
from nas.errors import UserError
from nas.evaluate import precision
from nas.evaluate.onnx_file import OnnxFile
from nas.evaluate.precision import HeldOut
from nas.export import side_by_side
from nas.export.card import Card, Preprocess
from nas.export.quantize import Recipe, left_in_float
from nas.measure.samples import Measurement
from nas.prune import steps
from nas.prune.request import parse_pruning_budget
from search_spaces import Arch, create_model, get_arch, table

MS_PER_MAC = 5e-6
KEPT = {"stages": 2, "blocks": 1, "heads": 2}
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220)}


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little training and few images."""
    monkeypatch.setattr(steps, "BRIEF_IMAGES", 160)
    monkeypatch.setattr(nas.prune.images, "CALIBRATION_IMAGES", 32)
    monkeypatch.setattr(nas.prune.images, "EVALUATED_IMAGES", 64)
    monkeypatch.setattr(steps, "CLOSING_ROUNDS", 3)


@pytest.fixture
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Latencies that follow MACs: a millisecond and MS_PER_MAC. Holds how many networks each run had. Plots
    are left blank."""
    runs: list[int] = []

    def compare(paths, settings, rounds, progress=None, *_):
        runs.append(len(paths))
        found = {}
        for name, path in paths.items():
            latency = 1 + table(Arch.from_json(Path(path).read_bytes())).macs() * MS_PER_MAC
            found[name] = Measurement(rounds_ms=[[latency] * 3] * 3)
        return found

    monkeypatch.setattr(side_by_side, "compare", compare)
    monkeypatch.setattr(nas.prune.figures, "reallocation_plot", lambda result: b"")
    monkeypatch.setattr(nas.prune.figures, "importance_plot", lambda parts: b"")
    return runs


def small(classes: int = 10) -> Arch:
    """A network of the EfficientViT family at 48 px: two stages of a block with two heads, widths that are multiples
    of 8."""

    def smaller(part: Any, key: str = "") -> Any:
        if isinstance(part, list):
            return [smaller(value) for value in part[: KEPT.get(key)]]
        if isinstance(part, dict):
            return {name: smaller(value, name) for name, value in part.items()}
        return part // 2 if key in ("embed_dim", "hidden", "squeezed") else part

    raw = smaller(json.loads(get_arch("efficientvit_m0", classes).to_json()))
    return Arch.from_json(json.dumps(raw | {"resolution": 48, "stem": [8, 8, 8]}))


@pytest.fixture
def arch_file(tmp_path: Path) -> Path:
    path = tmp_path / "net" / "arch.json"
    path.parent.mkdir()
    path.write_text(small().to_json())
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three classes of noisy one-coloured images."""
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(20):
            pixels = np.clip(np.array(colour) + rng.normal(0, 40, (24, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def words(model: Path | str, out: Path, *more: str) -> list[str]:
    return ["prune", "--model", str(model), "--out", str(out), "--runtime", "torch", "--threads", "1", *more]


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "prune.json").read_text())


def test_end_to_end_without_data(vitnas, arch_file, tmp_path):
    """Digits, brief training, half the MACs, timed on ONNX Runtime; every file is there and holds together."""
    out = tmp_path / "out"
    command = words(arch_file, out, "--finetune", "0.1", "--rounds", "2", "--runtime", "onnxruntime")
    code, printed, said = vitnas(*command)
    assert code == 0, said
    assert "digits" in said
    assert "ImageNet" in said
    data = result(out)
    assert data["data"]["demo"]
    assert data["trained_images"] == 160
    whole, arch = small(), Arch.from_json((out / "arch.json").read_bytes())
    assert table(arch).macs() <= table(whole).macs() / 2
    assert data["budget"]["met"]
    assert data["after"]["macs"] == table(arch).macs()
    assert data["before"]["macs"] == table(whole).macs()
    assert arch.resolution == whole.resolution
    assert data["before"]["latency_ms"] > 0
    assert {"before", "pruned", "recovered", "control"} == {k for k, v in data["accuracy"].items() if v}
    for found in data["accuracy"].values():
        assert found["images"] == 64
        assert 0 <= found["top1_ci"][0] <= found["top1"] <= found["top1_ci"][1] <= 100
    assert data["control"]["ci"][0] <= data["control"]["difference"] <= data["control"]["ci"][1]
    assert "pruned minus unpruned, fine-tuned alike" in printed
    assert f"Network: {out} (arch.json, model.safetensors, model.onnx, prune.json)" in printed
    assert all(size % 8 == 0 for name, size in widths(arch).items() if name.split(".")[-1] in ("hidden", "qk", "embed"))
    model = create_model(arch, weights=out / "model.safetensors").eval()
    assert not model.untrained
    x = torch.randn(1, 3, arch.resolution, arch.resolution)
    card = Card.read(out)
    assert card.classes == data["data"]["class_names"] == [str(digit) for digit in range(10)]
    assert (card.preprocess.resize, card.preprocess.size) == (arch.resolution, arch.resolution), "all of a digit"
    assert card.accuracy.top1 == data["accuracy"]["recovered"]["top1"]
    session = onnxruntime.InferenceSession(out / "model.onnx")
    (found,) = session.run(None, {"images": x.numpy()})
    assert np.allclose(found, model(x).detach().numpy(), atol=1e-3)
    assert (out / "report.html").is_file()
    assert "0.5x" in printed
    assert not list((out / "state").glob("*.safetensors"))

    before = (out / "prune.json").read_bytes()
    code, _, said = vitnas(*command)
    assert code == 0
    assert "finished" in said
    assert (out / "prune.json").read_bytes() == before


@pytest.mark.parametrize("wrong", [0, 2])
def test_int8_is_judged_on_held_out_images(
    vitnas, images, tmp_path, monkeypatch: pytest.MonkeyPatch, wrong: int
) -> None:
    """Its file is there where it costs no more than it may, says its own accuracy, and is what is timed."""
    monkeypatch.setattr(precision, "RECIPES", (Recipe(kept=("first",)),))
    timed: dict[str, bytes] = {}

    def compare(paths: dict[str, Path], *_: object) -> dict[str, Measurement]:
        timed.update({name: path.read_bytes() for name, path in paths.items()})
        return dict.fromkeys(paths, Measurement([[1.0]] * 30))

    monkeypatch.setattr(side_by_side, "compare", compare)

    def right(self: HeldOut, path: Path, runtime: str, threads: int) -> np.ndarray:
        assert (runtime, threads, len(self.images)) == ("onnxruntime", 1, 6)
        quantised = any(node.op_type == "QuantizeLinear" for node in onnx.load(path).graph.node)
        return np.arange(6) >= wrong * quantised

    monkeypatch.setattr(HeldOut, "right", right)
    trained(images, tmp_path / "net")
    out = tmp_path / "out"
    command = words(tmp_path / "net", out, "--data", str(images), "--finetune", "0", "--rounds", "1", "--no-control")
    command += ["--runtime", "onnxruntime", "--precision", "int8", "--max-drop", "10", "--dynamic-batch"]
    code, printed, said = vitnas(*command)
    assert code == (1 if wrong else 0), said
    assert "latency is measured in int8; accuracies and model.onnx are of fp32" in result(out)["notes"]
    notes = [note for note in result(out)["notes"] if note.startswith("model.int8.onnx: ")]
    price = result(out)["price"]
    assert (price["precision"], price["float_top1"], price["images"]) == ("int8", 100, 6)
    assert price["top1"] == pytest.approx(100 - price["drop"])
    if wrong:
        assert notes[0].startswith("model.int8.onnx: infeasible: int8 costs 33.3 points of top-1")
        assert notes[0].endswith("more than --max-drop 10 allows")
        assert not (out / "model.int8.onnx").exists()
        assert f"Infeasible: {price['refusal']}. Budget macs 0.5x: met (" in " ".join(printed.split())
        assert "<h1>Infeasible in int8. Budget met" in (out / "report.html").read_text()
        code, _, said = vitnas(*command, "--max-drop", "50")
        assert code == 1, "a finished run says the same"
        assert "judged with --max-drop 10: " in said
    else:
        assert "Infeasible" not in printed
        assert "model.onnx, model.int8.onnx, prune.json" in " ".join(printed.split())
        assert notes[0].startswith("model.int8.onnx: int8 costs 0.0 points of top-1")
        assert Card.read(out / "model.int8.onnx").accuracy.top1 == 100
        assert OnnxFile.open(out / "model.int8.onnx").batch_size is None
        (tmp_path / "timed.onnx").write_bytes(timed["after"])
        assert OnnxFile.open(tmp_path / "timed.onnx").batch_size == 1
        kept = left_in_float(onnx.load(tmp_path / "timed.onnx"))
        assert price["left_in_float"][0] == kept[0] == "/stem/stem.0/Conv"
    assert (out / "model.onnx").is_file()


def test_too_few_images_for_int8_are_told_before_anything_is_made(vitnas, images, tmp_path) -> None:
    trained(images, tmp_path / "net")
    for path in [path for path in images.rglob("*.png") if int(path.stem) > 2]:
        path.unlink()
    command = words(tmp_path / "net", tmp_path / "out", "--data", str(images), "--precision", "int8")
    code, out, err = vitnas(*command, "--runtime", "onnxruntime")
    said = (code, out, err.splitlines(keepends=True)[-1])  # after the line on the data, if any
    vitnas.refused(said, "int8 is calibrated on", "give 8 or more")
    assert not (tmp_path / "out").exists()


def widths(arch: Arch) -> dict[str, int]:
    return {name: width.size for name, width in table(arch).widths().items()}


def test_a_folder_brings_its_weights(vitnas, images, tmp_path, fake_clock):
    """Nothing is trained before pruning; the same images are split and calibrated; the result can be pruned again."""
    model = trained(images, tmp_path / "net")
    pixels = Pixels((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 0.95)
    Card(preprocess=Preprocess.own(48, pixels)).write(tmp_path / "net")
    out = tmp_path / "out"
    code, _, said = vitnas(
        *words(tmp_path / "net", out, "--data", str(images), "--finetune", "0", "--rounds", "1", "--macs", "0.7x")
    )
    assert code == 0, said
    data = result(out)
    assert data["trained_images"] == data["tuned_images"] == 0
    assert not data["data"]["demo"]
    assert data["data"]["classes"] == 3
    assert data["accuracy"]["recovered"] is None
    again = tmp_path / "again"
    code, _, said = vitnas(
        *words(out, again, "--data", str(images), "--finetune", "1", "--rounds", "1", "--distill", "--params", "0.9x")
    )
    assert code == 0, said
    second = result(again)
    assert second["trained_images"] == 0
    assert second["before"]["params"] == data["after"]["params"] < sum(p.numel() for p in model.parameters())
    assert second["after"]["params"] <= 0.9 * second["before"]["params"]
    for folder in (out, again):
        assert Card.read(folder).preprocess.pixels == pixels, "how its images are prepared"


def trained(images: Path, folder: Path, classes: int = 3) -> torch.nn.Module:
    """A network whose branches do something, saved with its Arch."""
    torch.manual_seed(0)
    model = create_model(small(classes))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.constant_(parameter, 0.5)
    folder.mkdir(exist_ok=True)
    (folder / "arch.json").write_text(model.arch.to_json())
    save_file(model.state_dict(), folder / "model.safetensors")
    return model


def test_weights_of_other_classes_get_a_probe(vitnas, images, tmp_path, fake_clock):
    """A classifier fitted to the training images; all before it stays, BatchNorm's statistics too."""
    theirs = trained(images, tmp_path / "net", classes=5).state_dict()
    cut = ("--axes", "ffn", "--macs", "0.8x", "--rounds", "1", "--no-compensate", "--no-reallocate", "--no-control")
    out = tmp_path / "out"
    code, _, said = vitnas(*words(tmp_path / "net", out, "--data", str(images), *cut))
    assert code == 0, said
    assert "have another classifier or none: the network's is a linear probe on 54 images" in said
    assert "to do: a linear probe; " in said
    data = result(out)
    assert (data["probe_images"], data["trained_images"], data["tuned_images"]) == (54, 0, 54)
    assert data["options"]["distill"], "the network that taught has trained weights"
    assert data["accuracy"]["before"]["top1"] > 60
    ours = load_file(out / "model.safetensors")
    assert torch.equal(ours["stem.0.norm.running_mean"], theirs["stem.0.norm.running_mean"])


@pytest.mark.parametrize("budget", ["4ms", pytest.param("0.6x", marks=pytest.mark.slow)])
def test_latency_budget_is_met_as_measured(vitnas, images, tmp_path, fake_clock, budget):
    trained(images, tmp_path / "net")
    out = tmp_path / "out"
    code, _, said = vitnas(
        *words(tmp_path / "net", out, "--data", str(images), "--finetune", "0", "--latency-budget", budget)
    )
    assert code == 0, said
    data = result(out)
    assert data["budget"]["metric"] == "latency"
    assert data["after"]["latency_ms"] <= data["budget"]["target"]
    assert data["after"]["latency_ms"] >= 0.8 * data["budget"]["target"]
    assert fake_clock[0] > 8  # the whole network, and one for each group of knobs
    assert all(row["shown"] for row in data["costs"])
    assert all(row["rate"] == pytest.approx(MS_PER_MAC, rel=0.01) for row in data["costs"])


def test_a_latency_budget_missed_as_measured_is_said(vitnas, images, tmp_path, monkeypatch):
    """A device on which nothing gets faster: the budget cannot be reached, one line says so."""
    monkeypatch.setattr(
        side_by_side,
        "compare",
        lambda paths, *_, **__: {name: Measurement(rounds_ms=[[2.0] * 3] * 3) for name in paths},
    )
    trained(images, tmp_path / "net")
    command = words(tmp_path / "net", tmp_path / "out", "--data", str(images), "--latency-budget", "0.5x")
    code, _, said = vitnas(*command)
    assert code == 2
    assert "cannot be reached" in said
    assert "2.00 ms" in said


def test_a_budget_just_above_the_smallest_latency_is_met(vitnas, images, tmp_path, fake_clock):
    """Although what is aimed at, a little below the budget, is out of reach."""
    trained(images, tmp_path / "net")
    cut = ("--data", str(images), "--finetune", "0", "--rounds", "1", "--no-reallocate", "--no-compensate")
    cut += ("--axes", "ffn")
    code, _, said = vitnas(*words(tmp_path / "net", tmp_path / "least", *cut, "--latency-budget", "0.01x"))
    assert code == 2
    least = float(re.search(r"come to (\S+) ms", said)[1])
    budget = ("--latency-budget", f"{1.012 * least:.4f}ms")
    code, _, said = vitnas(*words(tmp_path / "net", tmp_path / "out", *cut, *budget))
    assert code == 0, said
    assert result(tmp_path / "out")["after"]["latency_ms"] == pytest.approx(least, rel=0.005)


def test_reallocations_over_the_budget_leave_what_was_cut(vitnas, images, tmp_path, fake_clock, monkeypatch):
    """Interrupted between two of them too; once the cut is judged, none is tried again."""
    trained(images, tmp_path / "net")
    more = ("--data", str(images), "--rounds", "1", "--no-compensate", "--axes", "ffn", "--latency-budget", "4ms")
    command = words(tmp_path / "net", tmp_path / "out", *more, "--no-control")
    apply, tries = nas.prune.rounds.Rounds._apply, []

    def over(self, model, parts, scores, target, reallocate):
        tries.extend([target] * reallocate)
        if reallocate and len(tries) == 2:
            raise KeyboardInterrupt
        with monkeypatch.context() as patch:
            if reallocate:
                patch.setattr(nas.prune.rounds.Rounds, "_latency", lambda self, arch: 4.2)
            return apply(self, model, parts, scores, target, reallocate)

    monkeypatch.setattr(nas.prune.rounds.Rounds, "_apply", over)
    assert vitnas(*command)[0] == 130
    state = json.loads((tmp_path / "out" / "state" / "state.json").read_text())
    assert not state["rounds"][-1]["reallocated"]
    assert state["network"] == f"round-{len(state['rounds'])}"
    with monkeypatch.context() as patch:
        patch.setattr(steps, "tune", lambda *_: (_ for _ in ()).throw(MemoryError))
        code, _, said = vitnas(*command)
    assert code == 1
    assert "no reallocation was within the latency budget" in said
    tried = len(tries)
    assert tried > 2
    code, _, said = vitnas(*command)
    assert code == 0, said
    assert len(tries) == tried
    assert "they hold no control" in vitnas(*command[:-1])[2]


def test_the_closing_run_decides(vitnas, images, tmp_path, fake_clock, monkeypatch):
    """A budget met while pruning and missed in the closing run is reported as missed, with exit code 1."""
    honest = side_by_side.compare

    def slower_at_the_end(paths, settings, rounds, progress=None, *_):
        found = honest(paths, settings, rounds, progress)
        if rounds == nas.prune.steps.CLOSING_ROUNDS:
            found["after"] = Measurement(rounds_ms=[[statistics.mean([found["before"].p50_ms])] * 3] * 3)
        return found

    monkeypatch.setattr(side_by_side, "compare", slower_at_the_end)
    trained(images, tmp_path / "net")
    out = tmp_path / "out"
    code, printed, _ = vitnas(
        *words(tmp_path / "net", out, "--data", str(images), "--finetune", "0", "--latency-budget", "0.7x"),
        *("--rounds", "1", "--no-reallocate"),
    )
    assert code == 1
    assert "NOT met" in printed
    assert not result(out)["budget"]["met"]


def waits(paths, settings, rounds, progress=None, *_):
    return {name: Measurement(rounds_ms=[[1.6, 14.9, 15.1]] * rounds) for name in paths}


def test_waiting_times_at_the_end_are_marked(vitnas, images, tmp_path, fake_clock, monkeypatch):
    """A latency budget stays unjudged until the same command meets a quiet machine."""
    trained(images, tmp_path / "net")
    more = ("--data", str(images), "--finetune", "1", "--rounds", "1", "--no-control")
    out = tmp_path / "ms"
    command = words(tmp_path / "net", out, *more, "--latency-budget", "0.8x")
    quiet = side_by_side.compare

    def waits_at_the_end(paths, settings, rounds, *_):
        return (waits if rounds == steps.CLOSING_ROUNDS else quiet)(paths, settings, rounds)

    monkeypatch.setattr(side_by_side, "compare", waits_at_the_end)
    code, printed, said = vitnas(*command)
    assert code == 1
    assert printed.startswith("Other processes keep")
    assert "not judged" in printed
    assert (printed + said).count("right after pruning: ") == 1
    assert "fine-tuning changed it from" in printed
    data = result(out)
    assert data["after"]["waiting"]
    assert data["budget"]["verdict"] is None
    assert "waiting times, not speed" in (out / "report.html").read_text()
    assert "not known here" in vitnas("show", str(out))[1]
    monkeypatch.setattr(side_by_side, "compare", quiet)
    assert vitnas(*command)[0] == 0
    assert not result(out)["waiting"]
    assert "not known here" not in vitnas("show", str(out))[1]


@pytest.mark.slow
def test_waiting_times_do_not_hinder_a_budget_of_macs(vitnas, images, tmp_path, fake_clock, monkeypatch):
    trained(images, tmp_path / "net")
    more = ("--data", str(images), "--finetune", "1", "--rounds", "1", "--no-control")
    monkeypatch.setattr(side_by_side, "compare", waits)
    code, printed, _ = vitnas(*words(tmp_path / "net", tmp_path / "macs", *more))
    assert code == 0
    assert "waiting" in printed
    assert "14.90 ms" not in vitnas("runs", str(tmp_path))[1]


def test_a_latency_budget_is_not_begun_with_waiting_times(vitnas, images, tmp_path, fake_clock, monkeypatch):
    trained(images, tmp_path / "net")
    monkeypatch.setattr(side_by_side, "compare", waits)
    command = words(tmp_path / "net", tmp_path / "out", "--data", str(images), "--latency-budget", "0.8x")
    code, printed, said = vitnas(*command)
    assert (code, printed) == (2, "")
    assert said.endswith("the same command then goes on\n")
    assert "waiting times, not speed" in said.splitlines()[-1]


def test_reallocation_alone(vitnas, images, tmp_path, fake_clock):
    trained(images, tmp_path / "net")
    out = tmp_path / "out"
    code, _, said = vitnas(
        *words(tmp_path / "net", out, "--data", str(images), "--finetune", "0", "--macs", "1x", "--axes", "ffn,qk,v")
    )
    assert code == 0, said
    data = result(out)
    assert 0.9 * data["before"]["macs"] < data["after"]["macs"] <= data["before"]["macs"]
    before, after = widths(small(3)), widths(Arch.from_json((out / "arch.json").read_bytes()))
    assert any(after[name] > size for name, size in before.items())
    assert any(after[name] < size for name, size in before.items())
    code, _, said = vitnas(*words(tmp_path / "net", tmp_path / "o2", "--macs", "1x", "--no-reallocate"))
    assert code == 2
    assert "nothing to do" in said


def test_no_reallocation_only_cuts(vitnas, images, tmp_path, fake_clock):
    trained(images, tmp_path / "net")
    out = tmp_path / "out"
    cut = ("--finetune", "0", "--rounds", "1", "--no-reallocate", "--axes", "ffn", "--macs", "0.8x")
    assert vitnas(*words(tmp_path / "net", out, "--data", str(images), *cut))[0] == 0
    before, after = widths(small(3)), widths(Arch.from_json((out / "arch.json").read_bytes()))
    assert all(after[name] <= size for name, size in before.items())
    assert {name.split(".")[-1] for name in before if after[name] < before[name]} <= {"hidden", "squeezed"}


def test_interrupted_runs_go_on_after_the_last_round(vitnas, images, tmp_path, fake_clock, monkeypatch):
    trained(images, tmp_path / "net")
    command = words(tmp_path / "net", tmp_path / "out", "--data", str(images), "--finetune", "0")
    assert vitnas(*words(tmp_path / "net", tmp_path / "whole", "--data", str(images), "--finetune", "0"))[0] == 0

    scores = nas.prune.rounds.Rounds._scores
    scored = []

    def stop_in_round_3(self, model, what):
        scored.append(what)
        if what == "round 3" and len(scored) == 3:
            raise KeyboardInterrupt
        return scores(self, model, what)

    monkeypatch.setattr(nas.prune.rounds.Rounds, "_scores", stop_in_round_3)
    code, _, said = vitnas(*command)
    assert code == 130
    assert "interrupted" in said
    (tmp_path / "net" / "arch.json").write_text(small(3).replace(resolution=64).to_json())
    vitnas.refused(vitnas(*command), "another content of the network")  # not with its budget
    (tmp_path / "net" / "arch.json").write_text(small(3).to_json())
    code, _, said = vitnas(*command)
    assert code == 0
    assert "going on after round-2" in said
    assert scored == ["round 1", "round 2", "round 3", "round 3"]
    whole, found = tmp_path / "whole", tmp_path / "out"
    assert (found / "arch.json").read_text() == (whole / "arch.json").read_text()
    assert (found / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    code, _, said = vitnas(*command, "--criterion", "magnitude")
    assert code == 2
    assert "another run" in said
    assert "criterion" in said


def test_a_folder_goes_on_only_with_what_it_was_begun_with(vitnas, images, tmp_path, fake_clock):
    """The same words, but what they name holds something else: finished results stay, and are not told for new ones."""
    trained(images, tmp_path / "net")
    command = words(tmp_path / "net", tmp_path / "out", "--data", str(images), "--finetune", "0", "--rounds", "1")
    assert vitnas(*command)[0] == 0
    kept = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    changes = {
        "the network": (tmp_path / "net" / "arch.json", small(3).replace(resolution=64).to_json().encode()),
        "the weights": (tmp_path / "net" / "model.safetensors", b"others"),
        "the images": (images / "red" / "0.png", (images / "red" / "1.png").read_bytes() + b"more"),
    }
    for what, (path, content) in changes.items():
        before = path.read_bytes()
        path.write_bytes(content)
        vitnas.refused(vitnas(*command), f"another content of {what}", "--out")
        path.write_bytes(before)
        assert {path: path.read_bytes() for path in kept} == kept
    assert "finished" in vitnas(*command)[2]
    (tmp_path / "net").rename(tmp_path / "moved")
    assert "finished" in vitnas(*words(tmp_path / "moved", tmp_path / "out", *command[command.index("--data") :]))[2]


def test_a_step_of_the_end_that_fails_leaves_the_others(vitnas, images, tmp_path, fake_clock, monkeypatch):
    """The network and its weights are there, the failure is told and recorded, and the same command makes up for it."""
    trained(images, tmp_path / "net")
    out = tmp_path / "out"
    command = words(tmp_path / "net", out, "--data", str(images), "--rounds", "1", "--macs", "0.8x", "--json")

    def fails(error: BaseException):
        def fail(*_, **__):
            raise error

        return fail

    for name, error, step, missing in (
        ("nas.prune.steps.tune", MemoryError(), "fine-tuning", ()),
        ("nas.prune.run.keep_network", MemoryError(), "fine-tuning", ()),
        ("nas.prune.steps.tune_control", MemoryError(), "control", ()),
        ("nas.export.folder.agreement", UserError("the exported network disagrees"), "model.onnx", ("model.onnx",)),
        ("nas.prune.steps.measured", UserError("could not be measured: killed"), "closing run", ("report.html",)),
        ("", None, None, ()),
    ):
        with monkeypatch.context() as patch:
            if step:
                patch.setattr(name, fails(error))
            code, printed, said = vitnas(*command)
        assert code == (1 if step else 0), said
        (line,) = json.loads(printed)["failures"] or [None]
        assert (line is None) == (step is None)
        if step:
            assert line.startswith(f"{step} failed: ")
            assert line in said
            assert result(out)["failures"] == [line]
            assert "finished" not in said
            assert (result(out)["accuracy"]["recovered"] is None) == (step == "fine-tuning")
        files = {path.name for path in out.iterdir()}
        assert {"arch.json", "model.safetensors"} <= files
        assert not files & set(missing)
    assert {"arch.json", "model.safetensors", "model.onnx", "report.html"} <= files
    assert json.loads(printed)["after"]["macs"] == result(out)["after"]["macs"]
    assert "finished" in vitnas(*command)[2]


def test_broken_images_are_named(vitnas, images, tmp_path, fake_clock):
    trained(images, tmp_path / "net")
    (images / "red" / "0.png").write_bytes(b"no image")
    command = words(tmp_path / "net", tmp_path / "out", "--data", str(images), "--finetune", "1", "--rounds", "1")
    code, _, said = vitnas(*command)
    assert code == 0, said
    assert "0.png" in said
    assert any("0.png" in note for note in result(tmp_path / "out")["notes"])
    for path in images.rglob("*.png"):
        path.write_bytes(b"no image")
    shutil.rmtree(tmp_path / "out")
    code, _, said = vitnas(*command)
    assert code == 2
    assert "cannot be decoded" in said


@pytest.mark.parametrize(
    "criterion",
    ["magnitude", "torch-pruning", *(pytest.param(c, marks=pytest.mark.slow) for c in ("taylor2", "random"))],
)
def test_every_criterion_meets_the_budget(vitnas, images, tmp_path, fake_clock, criterion):
    trained(images, tmp_path / "net")
    out = tmp_path / "out"
    code, _, said = vitnas(
        *words(
            tmp_path / "net", out, "--data", str(images), "--finetune", "0", "--criterion", criterion, "--rounds", "1"
        )
    )
    assert code == 0, said
    assert result(out)["after"]["macs"] <= result(out)["before"]["macs"] / 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--macs", "0.5x", "--params", "0.5x"], ["one budget"]),
        (["--macs", "1.5x"], ["at most 1x"]),
        (["--macs", "0x"], ["0x"]),
        (["--macs", "many"], ["150M"]),
        (["--macs", "90G"], ["above", "lower it"]),
        (["--macs", "0.5"], ["--macs 0.5", "did you mean 0.5x"]),
        (["--macs", "10"], ["cannot be reached", "MMACs"]),
        (["--params", "0.2x", "--axes", "qk"], ["cannot be reached", "--axes qk", "parameters"]),
        (["--latency-budget", "2"], ["unit", "2ms"]),
        (["--criterion", "tailor"], ["tailor", "taylor"]),
        (["--axes", "ffn,width"], ["--axes", "embed"]),
        (["--rounds", "0"], ["rounds"]),
        (["--multiple-of", "0"], ["multiple-of"]),
        (["--finetune", "-1"], ["finetune"]),
        (["--data", "nowhere"], ["nowhere", "no such folder"]),
        (["--num-classes", "7"], ["--num-classes is 7", "3 classes"]),
        (["--weights", "nowhere.safetensors"], ["no such file"]),
        (["--weights", "pickle.pth"], ["Python objects", "state dict"]),
        (["--weights", "narrow.safetensors"], ["stem.0.linear.weight", "(4, 3, 3, 3)"]),
    ],
)
def test_bad_input(vitnas, images, tmp_path, fake_clock, monkeypatch, more, said):
    trained(images, tmp_path / "net")
    monkeypatch.chdir(tmp_path)
    state = create_model(small(3)).state_dict()
    state["stem.0.linear.weight"] = torch.zeros(4, 3, 3, 3)
    save_file(state, "narrow.safetensors")
    torch.save(torch.nn.Linear(2, 2), "pickle.pth")
    given = [] if "--data" in more else ["--data", str(images)]
    code, out, err = vitnas(*words(tmp_path / "net", tmp_path / "out", *given, "--finetune", "0", *more))
    vitnas.refused((code, out, err.splitlines(keepends=True)[-1]), *said)  # after the line on the data, if any


@pytest.mark.parametrize("model", ["efficientvit_m9", "nowhere/arch.json"])
def test_models_that_do_not_exist(vitnas, tmp_path, model):
    vitnas.refused(vitnas(*words(model, tmp_path / "out")), model)


def test_an_untrained_network_is_refused(vitnas, images, tmp_path, fake_clock):
    model = create_model(small(3))
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "arch.json").write_text(model.arch.to_json())
    save_file(model.state_dict(), tmp_path / "net" / "model.safetensors")
    command = words(tmp_path / "net", tmp_path / "out", "--data", str(images))
    code, _, said = vitnas(*command)
    assert code == 2
    assert "no effect on the loss" in said


def test_budgets():
    assert parse_pruning_budget(None, None, None).text == "0.5x"
    assert parse_pruning_budget("150M", None, None).target(3e8) == 1.5e8
    assert parse_pruning_budget(None, "0.25x", None).target(4e6) == 1e6
    assert parse_pruning_budget(None, None, "1.5ms").target(2.0) == 1.5


def test_widths_of_blocks():
    """In a cascade a head's values are as wide as what the next head reads; only the last head's are free."""
    raw = json.loads(get_arch("efficientvit_m4").to_json())
    raw["stages"][0]["blocks"][0]["attn"]["heads"][3]["value_dim"] = 64
    rows = nas.prune.widths.block_widths(Arch.from_json(json.dumps(raw)))
    found = {"embed": 128, "heads": 4, "qk": 16, "v": 40, "ffn": 512, "ratio": 4}
    assert asdict(rows["stages.0.blocks.0"]) == found | {"qk_range": (16, 16), "v_range": (32, 64)}
    assert rows["stages.1.blocks.0"].v == 64
    assert asdict(nas.prune.widths.block_widths(get_arch("levit_128s"))["stages.1.blocks.2"]) == {
        "embed": 256,
        "heads": 6,
        "qk": 16,
        "v": 32,
        "ffn": 512,
        "ratio": 2,
        "qk_range": (16, 16),
        "v_range": (32, 32),
    }
    assert nas.prune.widths.block_widths(get_arch("deit_tiny"))["blocks.11"].ffn == 768


def test_tuning_that_harms_is_not_kept(vitnas, images, tmp_path, fake_clock, monkeypatch):
    trained(images, tmp_path / "net")
    command = words(tmp_path / "net", tmp_path / "plain", "--data", str(images), "--finetune", "0", "--rounds", "1")
    assert vitnas(*command)[0] == 0
    monkeypatch.setattr(steps, "worse_after_tuning", lambda recovered, pruned: True)
    command = words(tmp_path / "net", tmp_path / "tuned", "--data", str(images), "--finetune", "1", "--rounds", "1")
    code, _, said = vitnas(*command)
    assert code == 0
    assert "fine-tuning lowered the accuracy" in said
    plain, kept = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "tuned"))
    assert plain == kept


def test_layers_are_refitted_after_a_cut(vitnas, images, tmp_path, fake_clock):
    cut = ("--data", str(images), "--finetune", "0", "--rounds", "1", "--no-reallocate", "--axes", "ffn")
    weights = {}
    trained(images, tmp_path / "net")
    for name, more in (("with", ()), ("without", ("--no-compensate",))):
        out = tmp_path / name
        code, _, said = vitnas(*words(tmp_path / "net", out, *cut, "--macs", "0.8x", *more))
        assert code == 0, said
        weights[name] = (out / "model.safetensors").read_bytes()
        assert (result(out)["rounds"][0]["refitted"] > 0) == (not more)
        assert ("layers refitted" in said) == (not more)
    assert weights["with"] != weights["without"]


def test_layers_are_refitted_on_images_of_all_classes(vitnas, images, tmp_path, fake_clock, monkeypatch):
    """Although few of the calibration images are taken, which are in the order of their classes."""
    given = []

    def compensate(parent, weights, child, state, origins, images):
        given.append(images)
        return state, 0

    monkeypatch.setattr("pruning.compensation.compensate", compensate)
    monkeypatch.setattr("pruning.compensation.images_for", lambda resolution: 12)
    trained(images, tmp_path / "net")
    cut = ("--data", str(images), "--finetune", "0", "--rounds", "2", "--no-reallocate", "--axes", "ffn")
    code, _, said = vitnas(*words(tmp_path / "net", tmp_path / "out", *cut, "--macs", "0.8x"))
    assert code == 0, said
    assert [len(each) for each in given] == [12, 12]
    colours = given[0].mean((2, 3)).argmax(1)
    assert set(colours.tolist()) == {0, 1, 2}
    assert colours.tolist() not in (sorted(colours.tolist()), sorted(colours.tolist(), reverse=True))


def test_a_folder_of_an_older_vitnas_goes_on_without_refitting(vitnas, images, tmp_path, fake_clock, monkeypatch):
    cut = ("--data", str(images), "--finetune", "0", "--rounds", "1", "--no-reallocate", "--axes", "ffn")
    trained(images, tmp_path / "net")
    command = words(tmp_path / "net", tmp_path / "out", *cut, "--macs", "0.8x")
    with monkeypatch.context() as stopped:
        stopped.setattr(nas.prune.rounds.Rounds, "run", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        assert vitnas(*command)[0] == 130
    path = tmp_path / "out" / "state" / "state.json"
    state = json.loads(path.read_text())
    del state["options"]["compensate"], state["options"]["no_distill"], state["found"]["taught"]
    path.write_text(json.dumps(state))
    code, _, said = vitnas(*command, "--no-distill")
    assert code == 0, said
    assert "is finished" in vitnas(*command)[2]
    assert "begun by an older vitnas: layers are not refitted" in said
    options = result(tmp_path / "out")["options"]
    assert (options["compensate"], options["distill"]) == (False, False)
    assert result(tmp_path / "out")["rounds"][0]["refitted"] == 0


def test_images_without_labels(vitnas, images, tmp_path, fake_clock):
    trained(images, tmp_path / "net")
    (images / "red" / "._0.png").write_bytes(b"what macOS leaves behind")
    out, budget = tmp_path / "out", ("--rounds", "1", "--no-control", "--macs", "0.7x")
    command = words(tmp_path / "net", out, "--unlabelled", str(images), *budget)
    code, printed, said = vitnas(*command)
    assert code == 0, said
    assert "agreement with the unpruned network's own answers" in said
    assert "before pruning: 100.0% agreement (95%: " in printed
    found = result(out)
    assert found["accuracy"]["before"]["top1"] == 100
    assert found["options"]["criterion"] == "features"
    assert found["options"]["distill"]
    assert found["data"]["train"] == 54
    assert sum(found["data"]["train_counts"]) == 54, "each has one of the network's three classes"
    assert (out / "labels.txt").read_text().split() == ["0", "1", "2"]
    card = Card.read(out)
    assert (card.accuracy, card.classes) == (None, ["0", "1", "2"])
    (row,) = (row for row in list_runs(tmp_path) if row["run"] == "out")
    assert row["best"].endswith("% agreement")
    shown = vitnas("show", str(out))[1]
    assert "accuracy: not known" in shown
    assert "with the unpruned network: " in shown
    for text in (printed, shown, (out / "report.html").read_text()):
        assert "top-1" not in text
    assert "is finished" in vitnas(*command)[2]
    Image.new("RGB", (24, 24)).save(images / "red" / "new.png")
    vitnas.refused(vitnas(*command), "another content of the images of --unlabelled")


def test_images_without_labels_for_a_network_of_other_classes_than_the_published(
    vitnas, images, arch_file, tmp_path, fake_clock, monkeypatch
):
    """And a precision that only labels could judge, on a CPU that has it."""
    monkeypatch.setattr("nas.measure.runtimes.eager.no_bf16", lambda: None)
    trained(images, tmp_path / "net3")
    weights = ("--weights", str(tmp_path / "net3" / "model.safetensors"))
    cut = ("--unlabelled", str(images), "--rounds", "1", "--no-control", "--macs", "0.7x", "--finetune", "0")
    command = words(arch_file, tmp_path / "out", *cut, *weights)
    vitnas.refused(vitnas(*command), "no classifier for 10 classes", "--num-classes")
    lower = ("--num-classes", "3", "--precision", "bf16")
    code, _, said = vitnas(*words(arch_file, tmp_path / "out3", *cut, *weights, *lower))
    assert code == 0, said
    assert "without labels bf16 is not judged, and no model.bf16.onnx is written" in said
    assert result(tmp_path / "out3")["accuracy"]["before"]["top1"] == 100
    assert (tmp_path / "out3" / "labels.txt").read_text().split() == ["0", "1", "2"]


def test_images_without_labels_need_a_network_that_knows_its_classes(vitnas, images, arch_file, tmp_path):
    out, folder = tmp_path / "out", ("--unlabelled", str(images))
    vitnas.refused(vitnas(*words(arch_file, out, *folder)), "has no weights: --unlabelled needs a trained network")
    vitnas.refused(vitnas(*words(arch_file, out, *folder, "--data", str(images))), "give --data, or --unlabelled")
    vitnas.refused(vitnas(*words(arch_file, out, "--unlabelled", "")), "--unlabelled is empty")
    trained(images, tmp_path / "net2")
    vitnas.refused(vitnas(*words(tmp_path / "net2", out, *folder, "--num-classes", "0")), "num_classes")
    only = ("--unlabelled", str(images), "--no-distill")
    vitnas.refused(vitnas(*words(tmp_path / "net2", out, *only)), "only the unpruned network can teach")
    few = ("--unlabelled", str(images / "nowhere"))
    vitnas.refused(vitnas(*words(tmp_path / "net2", out, *few)), "no such folder")
    (tmp_path / "few").mkdir()
    few = ("--unlabelled", str(tmp_path / "few"))
    vitnas.refused(vitnas(*words(tmp_path / "net2", out, *few)), "--unlabelled needs 20 or more")
