"""timm as the oracle: the same state dict gives the same logits, gradients and running statistics."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import search_spaces
from search_spaces.checkpoints import WeightsError
from search_spaces.network import heads_of
from search_spaces.registry import FAMILIES
from search_spaces.weights import fit, translate

SMALLEST = ("levit_128s", "efficientvit_m0", "shvit_s1", "deit_tiny")
ORACLES = {
    name: variant.timm for family in FAMILIES.values() for name, variant in family.variants.items() if variant.timm
}


def every(names: Any, default: tuple[str, ...] = SMALLEST) -> list[Any]:
    """All names, those outside `default` marked slow."""
    return [name if name in default else pytest.param(name, marks=pytest.mark.slow) for name in names]


@lru_cache(maxsize=6)
def oracle(helpers: ModuleType, name: str) -> nn.Module:
    """timm's model in eval mode, all its parameters and running statistics random. Shared: copy before changing it."""
    model = helpers.randomise(timm.create_model(name), 1)
    return helpers.calibrate(model, pictures(helpers, model.pretrained_cfg["input_size"][1], 8), 2)


def pictures(helpers: ModuleType, arch_or_size: Any, count: int) -> Tensor:
    """Some of the images the running statistics are near: others would magnify rounding errors."""
    return helpers.image(arch_or_size, 8, dtype=torch.float32)[:count]


def ours(name: str, state: dict[str, Tensor], **changes: Any) -> nn.Module:
    arch = search_spaces.get_arch(name).replace(**changes)
    model = search_spaces.create_model(arch)
    fit(model, translate(state, arch, model.state_dict()))
    return model.eval()


def same(found: nn.Module, wanted: nn.Module, x: Tensor, helpers: ModuleType) -> None:
    """Logits agree to 1e-4 in fp32."""
    with torch.no_grad():
        assert helpers.error(found(x), wanted(x)) < 1e-4


def test_all_of_timms_models_are_compared() -> None:
    wanted = {"levit_128s", "levit_128", "levit_192", "levit_256", "levit_384"}
    wanted |= {f"efficientvit_m{i}" for i in range(6)} | {f"shvit_s{i}" for i in range(1, 5)}
    assert set(ORACLES) == wanted | {"deit_tiny", "deit_small", "deit_base"}


@pytest.mark.parametrize("name", every(ORACLES))
def test_eval_logits(name: str, helpers: ModuleType) -> None:
    theirs = oracle(helpers, ORACLES[name])
    model = ours(name, theirs.state_dict())
    x = pictures(helpers, model.arch, 3)
    same(model, theirs, x, helpers)
    model, x = model.double(), x.double()
    with torch.no_grad():
        assert helpers.error(search_spaces.fold(model)(x), model(x)) < 1e-8


@pytest.mark.parametrize("name", every(ORACLES))
def test_train_logits_gradients_and_statistics(name: str, helpers: ModuleType) -> None:
    """Every parameter gets timm's gradient, so every parameter stands where timm has it."""
    theirs = copy.deepcopy(oracle(helpers, ORACLES[name])).train()
    model = ours(name, theirs.state_dict()).train()
    x = pictures(helpers, model.arch, 4)
    same(model, theirs, x, helpers)

    model, theirs, x = model.double(), theirs.double(), x[:3].double()
    wanted, found = theirs(x), model(x)
    assert helpers.error(found, wanted) < 1e-8
    direction = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (wanted * direction).sum().backward()
    (found * direction).sum().backward()

    own = {key: value.grad for key, value in model.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in own.values())
    grads = {key: value.grad for key, value in theirs.named_parameters()}
    grads = translate(grads, model.arch, own)
    assert grads.keys() == own.keys()
    floor = 1e-6 * max(float(grad.norm()) for grad in grads.values())
    for key, grad in own.items():
        wanted_grad = grads[key].reshape(grad.shape)
        assert (grad - wanted_grad).norm() <= 1e-6 * max(float(wanted_grad.norm()), floor), key

    state = translate(theirs.state_dict(), model.arch, model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.allclose(value, state[key].reshape(value.shape), rtol=1e-4, atol=1e-5), key


@pytest.mark.parametrize("name", every([name for name in ORACLES if name.startswith("levit")]))
@pytest.mark.parametrize(
    ("source", "form"),
    [("conv", "linear"), ("linear", "conv"), pytest.param("conv", "conv", marks=pytest.mark.slow)],
)
def test_levit_forms(name: str, source: str, form: str, helpers: ModuleType) -> None:
    """timm's levit_* and levit_conv_* weights fit either of our forms."""
    wanted = oracle(helpers, name.replace("levit_", "levit_conv_") if source == "conv" else name)
    theirs = copy.deepcopy(wanted)
    model = ours(name, theirs.state_dict(), form=form)
    x = pictures(helpers, 224, 3)
    if source != form:  # random networks magnify the rounding of another order of sums
        model, theirs, x = model.double(), theirs.double(), x.double()
    same(model, theirs, x, helpers)
    same(model.train(), theirs.train(), x, helpers)


def test_levit_with_one_head(helpers: ModuleType) -> None:
    x = pictures(helpers, 224, 4)
    theirs = helpers.randomise(timm.create_model("levit_128s", distilled=False), 1)
    helpers.calibrate(theirs, x, 2)
    same(ours("levit_128s", theirs.state_dict(), distilled=False), theirs, x, helpers)


def test_both_heads_of_levit(helpers: ModuleType) -> None:
    theirs = copy.deepcopy(oracle(helpers, "levit_128s"))
    model = ours("levit_128s", theirs.state_dict())
    x = pictures(helpers, 224, 4)
    with torch.no_grad():
        found, wanted = heads_of(model.train(), x), heads_of(theirs.train(), x)
        assert len(found) == len(wanted) == 2
        for ours_, theirs_ in zip(found, wanted, strict=True):
            assert helpers.error(ours_, theirs_) < 1e-4


FILES = [
    pytest.param(name, suffix, marks=[] if (name, suffix) == (SMALLEST[0], ".safetensors") else pytest.mark.slow)
    for name in ORACLES
    for suffix in (".safetensors", ".pth")
    if suffix == ".pth" or name in SMALLEST
]


@pytest.mark.parametrize(("name", "suffix"), FILES)
def test_weights_from_a_file(name: str, suffix: str, helpers: ModuleType, tmp_path: Path) -> None:
    """timm's names, then ours."""
    theirs = oracle(helpers, ORACLES[name])
    x = pictures(helpers, search_spaces.get_arch(name), 2)
    path = tmp_path / f"weights{suffix}"
    _save(theirs.state_dict(), path)
    model = search_spaces.create_model(name, weights=path).eval()
    same(model, theirs, x, helpers)
    _save(model.state_dict(), path)
    again = search_spaces.create_model(name, weights=str(path)).state_dict()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())


def _save(state: dict[str, Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)


def test_weights_for_other_classes_leave_the_classifier(helpers: ModuleType, tmp_path: Path) -> None:
    state = oracle(helpers, "deit_tiny_patch16_224").state_dict()
    torch.save(state, tmp_path / "deit.pth")
    with pytest.warns(UserWarning, match=r"head\.weight, head\.bias"):
        model = search_spaces.create_model("deit_tiny", num_classes=3, weights=tmp_path / "deit.pth")
    assert model.head.weight.shape == (3, 192)
    assert torch.equal(model.pos_embed, state["pos_embed"])


@pytest.mark.parametrize("name", every(SMALLEST, SMALLEST[:1]))
def test_timm_weights_up_to_the_download(name: str, helpers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = oracle(helpers, ORACLES[name])
    asked = []

    def create(wanted: str, pretrained: bool = False, **_: Any) -> nn.Module:
        asked.append((wanted, pretrained))
        return theirs

    monkeypatch.setattr(timm, "create_model", create)
    model = search_spaces.create_model(name, weights="timm").eval()
    same(model, theirs, pictures(helpers, model.arch, 2), helpers)
    assert asked == [(ORACLES[name], True)]


def test_timm_that_cannot_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(*_: Any, **__: Any) -> nn.Module:
        raise OSError("no connection\nand a second line of detail")

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(WeightsError, match="no connection") as caught:
        search_spaces.create_model("levit_128s", weights="timm")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["sepvit_lite", "evit_tiny_keep70"])
def test_models_that_timm_does_not_have(name: str) -> None:
    with pytest.raises(WeightsError, match="timm has no pretrained weights"):
        search_spaces.create_model(name, weights="timm")


@pytest.mark.parametrize("fault", ["lacks", "extra", "shape", "other family"])
def test_weights_that_do_not_fit_name_the_tensor(fault: str, tmp_path: Path) -> None:
    state = dict(search_spaces.create_model("efficientvit_m0").state_dict())
    tensor = "stages.1.blocks.0.attn.qkv.2.linear.weight"
    if fault == "lacks":
        del state[tensor]
    elif fault == "extra":
        state["stages.9.weight"] = torch.zeros(3)
        tensor = "stages.9.weight"
    elif fault == "shape":
        state[tensor] = state[tensor][:-1]
    else:
        state, tensor = dict(search_spaces.create_model("sepvit_lite").state_dict()), "the weights lack"
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=tensor) as caught:
        search_spaces.create_model("efficientvit_m0", weights=tmp_path / "weights.pth")
    assert "\n" not in str(caught.value)


def test_unknown_names_have_near_matches() -> None:
    with pytest.raises(KeyError, match="levit_128s"):
        search_spaces.create_model("levit_128x")
    with pytest.raises(KeyError):
        search_spaces.get_arch("resnet50")
