"""Networks of timm's: documents, folders, weights, classifiers; timm's own module is the oracle."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from nas.errors import UserError
from nas.export.folder import save_model, save_weights
from nas.networks.build import classifier_of, create
from nas.networks.targets import find_target, published, read_network
from nas.networks.timm_network import TimmNetwork
from nas.networks.weights import load
from search_spaces.registry import FAMILIES

LCNET = TimmNetwork("lcnet_050", 32, 3)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with a trained network of timm's."""
    torch.manual_seed(1)
    save_model(create(LCNET), tmp_path / "run")
    return tmp_path / "run"


def file_of(model: nn.Module, path: Path) -> Path:
    save_weights(model, path)
    return path


def noise(resolution: int) -> torch.Tensor:
    return torch.randn(2, 3, resolution, resolution, generator=torch.Generator().manual_seed(0))


def test_a_document_names_the_network() -> None:
    assert json.loads(LCNET.to_json()) == {"timm": "lcnet_050", "resolution": 32, "num_classes": 3}
    assert TimmNetwork.from_json(LCNET.to_json()) == LCNET
    assert TimmNetwork.from_json('{"timm": "lcnet_050", "resolution": 32}') == TimmNetwork("lcnet_050", 32, 1000)
    assert LCNET.replace(num_classes=4).num_classes == 4
    others = (LCNET.replace(num_classes=4), LCNET.at(64), TimmNetwork("lcnet_075", 32, 3))
    assert LCNET.digest() not in {other.digest() for other in others}
    assert LCNET.digest() == TimmNetwork("lcnet_050").at(32).replace(num_classes=3).digest()


@pytest.mark.parametrize(
    "document",
    [
        '{"timm": "lcnet_050"}',
        '{"timm": "lcnet_050", "resolution": "32"}',
        '{"timm": "lcnet_050", "resolution": 32, "num_classes": true}',
        '{"timm": "lcnet_050", "resolution": 32, "depth": 3}',
        '{"timm": "lcnet_050", "resolution": 5000}',
        '{"timm": "lcnet_050", "resolution": 32, "num_classes": -1}',
        '{"timm": "lcnet_05", "resolution": 32}',
        '{"timm": 3, "resolution": 32}',
    ],
)
def test_a_damaged_document_is_told(tmp_path: Path, document: str) -> None:
    path = tmp_path / "arch.json"
    path.write_text(document)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: ") as error:
        read_network(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("classes", [0, 100_001])
def test_classes_out_of_range(classes: int) -> None:
    with pytest.raises(UserError, match="give 1 to 100000"):
        LCNET.replace(num_classes=classes)


def test_a_folder_holds_the_network_and_its_weights(run: Path) -> None:
    target = find_target(str(run))
    assert (target.timm, target.arch, target.network) == (LCNET, None, LCNET)
    assert (target.folder, target.weights) == (run, run / "model.safetensors")
    torch.manual_seed(1)
    oracle = timm.create_model("lcnet_050", num_classes=3).eval()
    model = load(str(run))
    assert (model.arch, model.untrained, model.training) == (LCNET, [], True)
    assert torch.equal(model.eval()(noise(32)), oracle(noise(32)))


def test_a_folder_at_another_resolution(run: Path) -> None:
    target = find_target(f"{run}@64")
    assert (target.network, target.trained_at) == (LCNET.at(64), 32)
    with pytest.raises(UserError, match=r"trained at 32 px: `vitnas train .* --resolution 64` resizes it"):
        target.weights  # noqa: B018
    own = target.as_trained()
    assert (own.timm, own.weights) == (LCNET, run / "model.safetensors")


def test_other_classes_leave_the_classifier_untrained(tmp_path: Path) -> None:
    published = timm.create_model("lcnet_050")
    path = file_of(published, tmp_path / "lcnet_050.safetensors")
    model = load(LCNET, path)
    assert model.loaded is not None
    assert model.untrained == ["classifier.weight", "classifier.bias"]
    assert model.loaded.classes == 1000
    assert torch.equal(model.eval().forward_features(noise(32)), published.eval().forward_features(noise(32)))


def test_counts_of_batches_and_a_prefix_are_no_matter(tmp_path: Path) -> None:
    published = timm.create_model("lcnet_050", num_classes=3)
    state = {f"module.{k}": v for k, v in published.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save({"state_dict": state}, tmp_path / "old.pth")
    model = load(LCNET, tmp_path / "old.pth")
    assert model.untrained == []
    assert torch.equal(model.eval()(noise(32)), published.eval()(noise(32)))


def test_positions_of_another_resolution_are_resized_as_timm_does(tmp_path: Path) -> None:
    published = timm.create_model("test_vit")
    path = file_of(published, tmp_path / "vit.safetensors")
    model = load(TimmNetwork("test_vit", 96, 3), path)
    assert model.loaded is not None
    assert "resized to 96 px: pos_embed" in (model.loaded.note or "")
    overlay = {"state_dict": published.state_dict()}
    oracle = timm.create_model("test_vit", pretrained=True, pretrained_cfg_overlay=overlay, img_size=96, num_classes=3)
    assert torch.equal(model.eval().forward_features(noise(96)), oracle.eval().forward_features(noise(96)))


@pytest.mark.parametrize(
    ("name", "said"),
    [("lcnet_075", "is .* in the weights but .* in the network"), ("test_resnet", "lack"), ("test_vit", "lack")],
)
def test_weights_of_another_network_are_refused(tmp_path: Path, name: str, said: str) -> None:
    path = file_of(timm.create_model(name), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=rf"other\.safetensors: .*{said}") as error:
        load(LCNET, path)
    assert "\n" not in str(error.value)


def test_a_network_that_cannot_be_built_is_told() -> None:
    with pytest.raises(UserError, match=r"timm/nest_tiny cannot be built at 30 px for 3 classes: .*divide"):
        create(TimmNetwork("nest_tiny", 30, 3))


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("lcnet_050", 1),
        ("mobilenetv3_small_100", 1),
        ("mobilenetv4_conv_small_050", 1),
        ("repghostnet_050", 1),
        ("tf_efficientnet_lite0", 1),
        ("tiny_vit_5m_224", 1),
        ("regnety_002", 1),
        ("repvit_m0_9", 2),
    ],
)
def test_the_classifiers_of_timm(name: str, heads: int) -> None:
    """Their weights, and nothing else, decide the logits' last step: zeros there give zeros."""
    with torch.no_grad():
        model = create(TimmNetwork(name, 64, 3)).eval()
        layers = classifier_of(model)
        assert [(layer.out_features, len(layers)) for layer in layers] == [(3, heads)] * heads
        for i, layer in enumerate(layers):
            layer.weight.zero_()
            layer.bias.fill_(i + 1.0)
        assert model(noise(64)).tolist() == [[(heads + 1) / 2] * 3] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_classifiers_of_the_families(family: str) -> None:
    with torch.no_grad():
        model = create(published(next(iter(FAMILIES[family].variants))).replace(num_classes=3).at(64)).eval()
        layers = classifier_of(model)
        for i, layer in enumerate(layers):
            layer.weight.zero_()
            layer.bias.fill_(i + 1.0)
        assert model(noise(64)).tolist() == [[(len(layers) + 1) / 2] * 3] * 2


def test_a_classifier_that_is_not_linear_is_refused() -> None:
    with pytest.raises(UserError, match="its classifier is no linear layer"):
        classifier_of(create(TimmNetwork("dpn48b", 64, 3)))
