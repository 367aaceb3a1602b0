"""Weights under the names of timm and of the official repositories, from there to us and back.

The official names are listed here as their modules register them; timm ported those modules in the same order, so
that the n-th official tensor is timm's n-th.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import search_spaces
from search_spaces import Arch
from search_spaces.checkpoints import WeightsError
from search_spaces.weights import namings, rename, translate

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def conv_bn(*places: str) -> list[str]:
    """A convolution or linear layer `c` and its BatchNorm."""
    return [f"{place}.{name}" for place in places for name in ("c.weight", *(f"bn.{part}" for part in NORM))]


def affine(*places: str) -> list[str]:
    return [f"{place}.{name}" for place in places for name in ("weight", "bias")]


def classifier(place: str) -> list[str]:
    return [*(f"{place}.bn.{part}" for part in NORM), *affine(f"{place}.l")]


def stem() -> list[str]:
    return conv_bn(*(f"patch_embed.{i}" for i in (0, 2, 4, 6)))


def levit(arch: Arch) -> list[str]:
    """facebookresearch/LeViT: one sequence of residual attentions and FFNs, and of downsamplings without residual."""
    names, number = stem(), 0

    def ffn() -> list[str]:
        return conv_bn(f"blocks.{number}.m.0", f"blocks.{number}.m.2")

    for stage in arch.stages:
        if stage.downsample:
            place = f"blocks.{number}"
            names += [f"{place}.attention_biases", *conv_bn(f"{place}.kv", f"{place}.q.1", f"{place}.proj.1")]
            number += 1
            if stage.downsample.ffn:
                names += ffn()
                number += 1
        for block in stage.blocks:
            if block.attn:
                place = f"blocks.{number}.m"
                names += [f"{place}.attention_biases", *conv_bn(f"{place}.qkv", f"{place}.proj.1")]
                number += 1
            if block.ffn:
                names += ffn()
                number += 1
    return [*names, *classifier("head"), *(classifier("head_dist") if arch.distilled else ())]


def pyramid(arch: Arch, block: Callable[[str, Any], list[str]]) -> list[str]:
    """EfficientViT and SHViT: one sequence a stage, the three parts of a downsampling first."""
    names = stem()
    for s, stage in enumerate(arch.stages):
        place = f"blocks{s + 1}"
        if s:
            names += conv_bn(f"{place}.0.0.m", f"{place}.0.1.m.pw1", f"{place}.0.1.m.pw2")
            names += conv_bn(f"{place}.1.conv1", f"{place}.1.conv2")
            names += [*affine(f"{place}.1.se.fc1", f"{place}.1.se.fc2"), *conv_bn(f"{place}.1.conv3")]
            names += conv_bn(f"{place}.2.0.m", f"{place}.2.1.m.pw1", f"{place}.2.1.m.pw2")
        for i, doc in enumerate(stage.blocks):
            names += block(f"{place}.{i + 3 * (s > 0)}", doc)
    return [*names, *classifier("head"), *(classifier("head_dist") if arch.distilled else ())]


def efficientvit_block(place: str, doc: Any) -> list[str]:
    """microsoft/Cream, EfficientViT."""
    attn, heads = f"{place}.mixer.m.attn", range(len(doc.attn.heads))
    return [
        *conv_bn(f"{place}.dw0.m", f"{place}.ffn0.m.pw1", f"{place}.ffn0.m.pw2"),
        f"{attn}.attention_biases",
        *conv_bn(*(f"{attn}.qkvs.{j}" for j in heads), *(f"{attn}.dws.{j}" for j in heads), f"{attn}.proj.1"),
        *conv_bn(f"{place}.dw1.m", f"{place}.ffn1.m.pw1", f"{place}.ffn1.m.pw2"),
    ]


def shvit_block(place: str, doc: Any) -> list[str]:
    """ysj9909/SHViT."""
    mixer = f"{place}.mixer.m"
    attn = [*affine(f"{mixer}.pre_norm"), *conv_bn(f"{mixer}.qkv", f"{mixer}.proj.1")] if doc.attn else []
    return [*conv_bn(f"{place}.conv.m"), *attn, *conv_bn(f"{place}.ffn.m.pw1", f"{place}.ffn.m.pw2")]


OFFICIAL: dict[str, Callable[[Arch], list[str]]] = {
    "levit_128s": levit,
    "efficientvit_m0": lambda arch: pyramid(arch, efficientvit_block),
    "shvit_s1": lambda arch: pyramid(arch, shvit_block),
}
TIMM = {"deit_tiny": "deit_tiny_patch16_224"}


@lru_cache(maxsize=1)
def oracle(helpers: ModuleType, name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """timm's module with random weights, an image and its logits, all in double precision: rounding is magnified."""
    x = helpers.image(224, 4, dtype=torch.float32)
    model = helpers.calibrate(helpers.randomise(timm.create_model(TIMM.get(name, name)), 1), x, 2).double()
    with torch.no_grad():
        return model, x[:1].double(), model(x[:1].double())


@pytest.mark.parametrize(
    ("name", "naming"),
    [
        (name, naming)
        for name in (*OFFICIAL, *TIMM)
        for naming in ("timm", "official")
        if naming == "timm" or name in OFFICIAL
    ],
)
def test_names_lead_to_us_and_back(name: str, naming: str, helpers: ModuleType, tmp_path: Path) -> None:
    (theirs, x, wanted), arch = oracle(helpers, name), search_spaces.get_arch(name)
    state = theirs.state_dict()
    names = OFFICIAL[name](arch) if naming == "official" else list(state)
    named = dict(zip(names, state.values(), strict=True))
    indices = {key.replace("biases", "bias_idxs"): torch.zeros(4, 4).long() for key in names if "biases" in key}
    torch.save({"model": named | indices, "epoch": 299}, tmp_path / "checkpoint.pth")

    model = search_spaces.create_model(name, weights=tmp_path / "checkpoint.pth").double().eval()
    assert model.untrained == []
    assert naming in model.loaded.note
    with torch.no_grad():
        assert helpers.error(model(x), wanted) < 1e-5

    ours = model.state_dict()
    numbers = translate({key: torch.tensor(i) for i, key in enumerate(names)}, arch, ours)
    back = {names[int(number)]: ours[own] for own, number in numbers.items()}
    places = zip(state, names, strict=True)
    theirs.load_state_dict({key: back[other].reshape(state[key].shape) for key, other in places})
    theirs.train()
    theirs.eval()  # gathers the attention biases anew
    with torch.no_grad():
        assert helpers.error(theirs(x), wanted) < 1e-5


@pytest.mark.parametrize("seed", range(8))
def test_irregular_levits_have_official_names(seed: int, helpers: ModuleType) -> None:
    """Attentions and FFNs that are missing count for nothing in the official sequence."""
    arch = helpers.random_arch("levit", seed)
    own = helpers.build(arch).state_dict()
    named = {name: torch.zeros(1) for name in levit(arch)}
    assert rename(named, namings(arch)["the official repository's"]).keys() == own.keys()


def sepvit(arch: Arch) -> dict[str, str]:
    """The names of liwei109/SepViT, and what we call the same."""
    names = {}
    for s, stage in enumerate(arch.stages):
        modules = {f"patch_embeds.{s}.proj": "patch_embed", f"patch_embeds.{s}.norm": "norm"}
        modules |= {f"pos_block.{s}.proj.0": "position.branch"}
        for i, block in enumerate(stage.blocks):
            parts = {"norm1": "attn.norm", "attn.DSA_qkv": "attn.qkv", "attn.proj": "attn.proj", "norm2": "norm"}
            parts |= {"mlp.fc1": "ffn.fc1", "mlp.fc2": "ffn.fc2"}
            side = 56 // 2**s
            if side > block.attn.window:
                parts |= {"attn.win_tokens_norm": "attn.point_norm", "attn.PSA_qk": "attn.point_qk"}
                names[f"blocks.{s}.{i}.win_tokens"] = f"stages.{s}.blocks.{i}.attn.window_token"
            modules |= {f"blocks.{s}.{i}.{theirs}": f"blocks.{i}.{own}" for theirs, own in parts.items()}
        for theirs, own in modules.items():
            names |= {f"{theirs}.{end}": f"stages.{s}.{own}.{end}" for end in ("weight", "bias")}
    return names | {f"{place}.{end}": f"{place}.{end}" for place in ("norm", "head") for end in ("weight", "bias")}


def test_sepvit_under_its_official_names(helpers: ModuleType, tmp_path: Path) -> None:
    """No release and no port exists to compare logits with: every tensor stands where the official code has it."""
    arch = search_spaces.get_arch("sepvit_lite")
    first = helpers.randomise(search_spaces.create_model(arch), 1).eval()
    names = sepvit(arch)
    assert sorted(names.values()) == sorted(first.state_dict())
    torch.save({"model": {theirs: first.state_dict()[own] for theirs, own in names.items()}}, tmp_path / "sepvit.pth")
    second = search_spaces.create_model(arch, weights=tmp_path / "sepvit.pth").eval()
    x = helpers.image(224, 1, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(first(x), second(x))


def test_a_distilled_deit_is_taken_without_its_distillation(helpers: ModuleType, tmp_path: Path) -> None:
    distilled = helpers.randomise(timm.create_model("deit_tiny_distilled_patch16_224"), 1)
    torch.save({"model": distilled.state_dict()}, tmp_path / "deit.pth")
    model = search_spaces.create_model("deit_tiny", weights=tmp_path / "deit.pth").eval()
    assert "less accurate than published" in model.loaded.note
    plain = timm.create_model("deit_tiny_patch16_224").eval()
    kept = {key: v for key, v in distilled.state_dict().items() if not key.startswith(("dist_token", "head_dist"))}
    positions = kept["pos_embed"]
    plain.load_state_dict(kept | {"pos_embed": positions[:, [0, *range(2, positions.shape[1])]]})
    x = helpers.image(224, 2, dtype=torch.float32)
    with torch.no_grad():
        assert helpers.error(model(x), plain(x)) < 1e-5


@pytest.mark.parametrize(("name", "wanted"), [("levit_128s", "false"), ("shvit_s1", "true")])
def test_another_number_of_heads_says_which_arch_fits(name: str, wanted: str, tmp_path: Path) -> None:
    arch = search_spaces.get_arch(name)
    other = arch.replace(distilled=not arch.distilled)
    names = OFFICIAL[name](other)
    torch.save(dict.fromkeys(names, torch.ones(1)), tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=f'"distilled": {wanted}'):
        search_spaces.create_model(arch, weights=tmp_path / "weights.pth")
