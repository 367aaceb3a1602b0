"""What is made of a run's network of timm's: ONNX, a bench's files, facts, rows; timm's own module is the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn

from nas.bench.run import trained_elsewhere
from nas.errors import UserError
from nas.export.artifact import write_artifact
from nas.export.card import Card
from nas.export.folder import save_model, save_onnx, save_weights
from nas.export.options import FileOptions
from nas.measure.runtime import Settings
from nas.networks.build import create, for_inference
from nas.networks.counts import counts_of
from nas.networks.targets import find_target
from nas.networks.timm_network import TimmNetwork
from nas.networks.weights import load

LCNET = TimmNetwork("lcnet_050", 32, 3)
CARD = Card(classes=["a", "b", "c"])


def used(model: nn.Module) -> nn.Module:
    """With statistics as a training leaves them, not those that make BatchNorm an identity."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def noise(resolution: int, batch_size: int = 1) -> torch.Tensor:
    return torch.randn(batch_size, 3, resolution, resolution, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a trained network of timm's."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    model = create(LCNET)
    used(model)
    save_model(model, folder)
    save_onnx(model, folder, FileOptions(), trained=True, card=CARD)
    return folder


def logits(path: Path, images: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images.numpy()})[0]


def test_the_onnx_file_computes_what_timm_s_network_does(run: Path) -> None:
    oracle = timm.create_model("lcnet_050", num_classes=3)
    oracle.load_state_dict(load(run).state_dict())
    with torch.no_grad():
        wanted = oracle.eval()(noise(32)).numpy()
    found = logits(run / "model.onnx", noise(32))
    assert abs(found - wanted).max() < 1e-5 * abs(wanted).max()
    model = onnx.load(run / "model.onnx")
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    facts = {prop.key: prop.value for prop in model.metadata_props}
    assert TimmNetwork.from_json(facts["vitnas.arch"]) == LCNET


@pytest.mark.parametrize(
    ("name", "layer"),
    [("repghostnet_050", "fusion_bn"), ("mobileone_s0", "conv_kxk"), ("repvit_m0_9", "head_dist")],
)
def test_branches_are_merged_for_inference(name: str, layer: str) -> None:
    model = used(create(TimmNetwork(name, 32, 3)))
    inferring = for_inference(model)
    assert any(layer in each for each, _ in model.named_modules())
    assert not any(layer in each for each, _ in inferring.named_modules())
    assert model.training
    with torch.no_grad():
        wanted = model.eval()(noise(32, 2))
    assert (inferring(noise(32, 2)) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_wrong_merge_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def merged(model: nn.Module, inplace: bool) -> nn.Module:
        model.get_submodule("classifier").bias.data += 1
        return model

    monkeypatch.setattr("timm.utils.model.reparameterize_model", merged)
    with pytest.raises(UserError, match="disagrees with PyTorch"):
        save_onnx(used(create(LCNET)), tmp_path, FileOptions(), trained=True, card=CARD)
    assert not (tmp_path / "model.onnx").exists()


def test_a_run_is_exported(vitnas, run: Path, tmp_path: Path) -> None:
    code, out, err = vitnas("export", str(run), "--out", str(tmp_path / "out"), "--batch-size", "2")
    assert (code, err) == (0, "")
    assert "timm/lcnet_050 with the given weights; ONNX Runtime and PyTorch agree" in out
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"arch.json", "model.safetensors", "labels.txt"}
    wanted, images = logits(run / "model.onnx", noise(32)), noise(32).expand(2, -1, -1, -1)
    assert abs(logits(tmp_path / "out" / "model.onnx", images) - wanted).max() < 1e-5 * abs(wanted).max()


def test_a_name_of_timm_s_is_exported(vitnas, tmp_path: Path) -> None:
    code, out, _ = vitnas("export", "timm/lcnet_050@32", "--num-classes", "3", "--out", str(tmp_path / "out"))
    assert code == 0
    assert "timm/lcnet_050 with random, untrained weights" in out
    assert find_target(str(tmp_path / "out")).network == LCNET
    _, out, _ = vitnas("runs", str(tmp_path), "--json")
    assert [(row["kind"], row["best"]) for row in json.loads(out)] == [("export", "timm/lcnet_050")]


def test_published_weights_are_told(vitnas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_weights(create(LCNET), tmp_path / "lcnet_050.safetensors")
    monkeypatch.setenv("VITNAS_WEIGHTS", str(tmp_path))
    words = ("timm/lcnet_050@32", "--num-classes", "3", "--weights", "timm", "--out", str(tmp_path / "out"))
    code, out, _ = vitnas("export", *words)
    assert code == 0
    assert f"pretrained weights of timm/lcnet_050: from {tmp_path}/lcnet_050.safetensors (sha256 " in out


def test_a_classifier_for_other_classes_is_not_exported(vitnas, run: Path, tmp_path: Path) -> None:
    save_weights(load(run), tmp_path / "three.safetensors")
    words = ("export", "timm/lcnet_050@32", "--weights", str(tmp_path / "three.safetensors"), "--out", str(tmp_path))
    vitnas.refused(vitnas(*words), "a classifier of 3 classes and the network one of 1000", "--num-classes 3")


def test_a_bench_measures_the_run_s_network(run: Path, tmp_path: Path) -> None:
    target = find_target(str(run))
    assert target.network is not None
    path = write_artifact(target.network, Settings(), tmp_path / "0")
    assert logits(path, noise(32)).shape == (1, 3)
    assert trained_elsewhere(target) is None
    assert trained_elsewhere(find_target(f"{run}@64")) == f"{run}@64: trained at 32 px, measured at 64 px."


def test_show_tells_of_a_run(vitnas, run: Path) -> None:
    _, out, _ = vitnas("show", str(run), "--json")
    facts = json.loads(out)
    params = sum(each.numel() for each in timm.create_model("lcnet_050", num_classes=3).parameters())
    wanted = {"timm": "lcnet_050", "family": "timm", "resolution": 32, "num_classes": 3, "params": params}
    wanted |= {"stages": None, "weights": "trained", "classes": ["a", "b", "c"]}
    assert {key: facts[key] for key in wanted} == wanted
    for place in (run, run / "model.onnx"):
        _, out, _ = vitnas("show", str(place))
        assert "timm/lcnet_050, 32 px, 3 classes, 0.60 M parameters, 1.3 MMACs" in " ".join(out.split())
        assert "nothing else is counted in timm's networks" in " ".join(out.split())


def test_counts_of_timm_s_networks() -> None:
    counted = FlopCountAnalysis(timm.create_model("lcnet_050").eval(), noise(64)).unsupported_ops_warnings(False)
    theirs = counted.uncalled_modules_warnings(False).by_operator()
    assert counts_of(TimmNetwork("lcnet_050", 64)).macs == theirs["conv"] + theirs["linear"]
    with pytest.raises(UserError, match="timm/efficientformer_l1 cannot run at 64 px"):
        counts_of(TimmNetwork("efficientformer_l1", 64))


def test_a_run_of_timm_s_is_not_pruned(vitnas, run: Path, tmp_path: Path) -> None:
    words = ("prune", "--model", str(run), "--macs", "0.5x", "--out", str(tmp_path / "out"))
    vitnas.refused(vitnas(*words), "is one of timm's networks: only timm/NAME itself is pruned")
    assert not (tmp_path / "out").exists()
