"""A network with its weights, by all the ways to name one."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from nas.errors import UserError
from nas.export.folder import save_model, save_weights
from nas.networks.targets import find_arch
from nas.networks.weights import load
from search_spaces import create_model

ARCH = find_arch("efficientvit_m0").replace(resolution=32, num_classes=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a trained network, with one that has no weights, and with a file of ONNX's name."""
    folder = tmp_path_factory.mktemp("networks") / "run"
    save_model(create_model(ARCH), folder / "best")
    save_model(create_model(ARCH), folder / "untrained", with_weights=False)
    (folder / "net.onnx").touch()
    return folder


def test_a_run_and_its_arch_come_with_their_weights(run: Path) -> None:
    kept = (run / "best" / "model.safetensors").read_bytes()
    for network in (run, str(run), run / "best", run / "best" / "arch.json"):
        model = load(network)
        assert (model.arch, model.untrained) == (ARCH, [])
        save_weights(model, run / "again.safetensors")
        assert (run / "again.safetensors").read_bytes() == kept


def test_given_weights_go_before_those_beside(run: Path) -> None:
    other = create_model(ARCH)
    save_weights(other, run / "other.safetensors")
    for network in (run, ARCH):
        model = load(network, weights=run / "other.safetensors")
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_published_name_has_weights_of_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = timm.create_model("efficientvit_m0").state_dict()
    torch.save(state, tmp_path / "efficientvit_m0.pth")
    monkeypatch.setenv("VITNAS_WEIGHTS", str(tmp_path))
    for model in (load("efficientvit_m0"), load("efficientvit_m0", weights="timm")):
        assert model.untrained == []
        assert any(torch.equal(value, state["patch_embed.conv1.conv.weight"]) for value in model.state_dict().values())


@pytest.mark.parametrize(
    ("network", "weights", "said"),
    [
        ("efficientvit_m9", "timm", "unknown model 'efficientvit_m9'"),
        ("{run}/none", None, "no such file or folder"),
        ("{run}", "{run}/none.pt", "{run}: .*none.pt"),
        ("{run}", "{run}/best/arch.json", "{run}: .*arch.json"),
        ("{run}@64", None, "trained at 32 px"),
        ("{run}/untrained", None, "untrained has no model.safetensors: `vitnas train` makes one"),
        ("{run}/net.onnx", None, "net.onnx is an ONNX file: give a folder"),
        ("timm/test_vit", "timm", "timm/test_vit: could not fetch test_vit.r160_in1k .HF_HUB_OFFLINE is set.: put "),
        ("shvit_s1", "{run}/best/model.safetensors", "shvit_s1: .*lack"),
    ],
)
def test_what_cannot_be_loaded_is_told(run: Path, network: str, weights: str | None, said: str) -> None:
    network, weights, said = (text and text.format(run=run) for text in (network, weights, said))
    with pytest.raises(UserError, match=said):
        load(network, weights=weights)


def test_weights_of_another_network_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("shvit_s1.safetensors", "test_vit.safetensors"):
        save_weights(create_model(ARCH), tmp_path / name)
    monkeypatch.setenv("VITNAS_WEIGHTS", str(tmp_path))
    for network, name in (("shvit_s1", "shvit_s1"), ("timm/test_vit", "test_vit")):
        with pytest.raises(UserError, match=f"^{network}: {tmp_path}/{name}.safetensors: the weights lack "):
            load(network)


def test_an_arch_needs_weights() -> None:
    with pytest.raises(UserError, match='give its weights, "timm" or a file'):
        load(ARCH)
