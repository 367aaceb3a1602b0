"""Slicing: smaller networks load and run, and equal the larger one with the removed units silenced."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning
from torch import Tensor, nn

import search_spaces
from pruning import slice_weights
from pruning.slicing import resize
from pruning.units import cut
from search_spaces import Arch
from search_spaces.registry import FAMILIES
from search_spaces.widths import Axis, places

State = dict[str, Tensor]


def load(child: Arch, state: State, helpers: ModuleType) -> nn.Module:
    model = helpers.build(child)
    model.load_state_dict(state, strict=True)
    return model


def outputs(*models: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [model(x) for model in models]


# Any smaller network


def check_random_child(family: str, seed: int, helpers: ModuleType) -> None:
    parent = helpers.random_arch(family, seed)
    child, blocks = helpers.shrink(parent, seed + 1)
    state = slice_weights(parent, helpers.build(parent, seed).state_dict(), child, blocks=blocks)
    model = load(child, state, helpers)
    table = search_spaces.table(child)
    assert table.params() == sum(value.numel() for value in model.parameters())
    assert {entry.name: entry.shape for entry in table.entries} == {k: tuple(v.shape) for k, v in state.items()}
    (found,) = outputs(model, x=helpers.image(child, 2))
    assert found.shape == (2, child.num_classes)
    assert found.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(10))
def test_any_smaller_network_loads_and_runs(family: str, seed: int, helpers: ModuleType) -> None:
    check_random_child(family, seed, helpers)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_very_many_smaller_networks(family: str, helpers: ModuleType) -> None:
    for seed in range(100, 300):
        check_random_child(family, seed, helpers)


@pytest.mark.parametrize(
    ("parent", "child"),
    [
        ("levit_128", "levit_128s"),
        ("efficientvit_m5", "efficientvit_m4"),
        ("shvit_s3", "shvit_s1"),
        ("deit_small", "evit_tiny_keep70"),
        ("sepvit_tiny", "sepvit_lite"),
    ],
)
def test_published_networks_out_of_larger_ones(parent: str, child: str, helpers: ModuleType) -> None:
    large, small = search_spaces.get_arch(parent), search_spaces.get_arch(child)
    if child == "efficientvit_m4":  # its third head in stage 1 is wider than any of M5's, its kernels are not smaller
        raw, donor = helpers.document(small), helpers.document(large)
        raw["stages"][0] = donor["stages"][0]
        raw["stem"] = donor["stem"]
        raw["stages"][1] |= {"blocks": donor["stages"][1]["blocks"][:2], "embed_dim": donor["stages"][1]["embed_dim"]}
        raw["stages"][1]["downsample"] = donor["stages"][1]["downsample"]
        raw["stages"][2]["downsample"] |= {"before": donor["stages"][2]["downsample"]["before"]}
        small = helpers.read(raw)
    with torch.device("meta"):
        parent, model = (helpers.build(arch, dtype=torch.float32) for arch in (large, small))
        state = slice_weights(large, parent.state_dict(), small)
    model.load_state_dict(state, strict=True, assign=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(4))
def test_the_whole_network_is_its_own_slice(family: str, seed: int, helpers: ModuleType) -> None:
    arch = helpers.random_arch(family, seed)
    weights = helpers.build(arch, seed).state_dict()
    state = slice_weights(arch, weights, arch)
    assert state.keys() == weights.keys()
    for name, value in state.items():
        assert torch.equal(value, weights[name])
        assert value.data_ptr() != weights[name].data_ptr() or value.numel() == 0


# Masked equals sliced. The removed units are silenced in the parent by hand: outgoing weights zero, or what
# produces them zero, so that nothing but the slice under test decides which units the child has.

ATTN = {"heads": 3, "key_dim": 5, "value_dim": 6, "scale": 0.55}
FFN = {"hidden": 14, "keep_rate": 0.7}


def levit_parent(helpers: ModuleType, form: str = "linear", keep: float = 1.0) -> Arch:
    blocks = [{"attn": ATTN, "ffn": FFN}] * 3
    stages = [
        {"embed_dim": 12, "downsample": None, "keep_rate": 1.0, "blocks": blocks},
        {"embed_dim": 15, "downsample": {"attn": ATTN, "ffn": FFN}, "keep_rate": keep, "blocks": blocks},
    ]
    return helpers.random_arch("levit", 0, form=form, stages=stages, resolution=64, distilled=True, num_classes=5)


def efficientvit_parent(helpers: ModuleType) -> Arch:
    heads = [
        {"offset": 4 * j, "dim": 4, "key_dim": 5, "value_dim": 4, "kernel": k, "scale": 0.55}
        for j, k in enumerate((5, 3, 3))
    ]
    mixer = {"conv": True, "ffn": FFN}
    blocks = [{"before": [mixer], "attn": {"window": 3, "heads": heads}, "after": [mixer]}] * 3
    merge = {"before": mixer, "hidden": 16, "squeezed": 4, "after": mixer}
    stages = [
        {"embed_dim": 12, "downsample": None, "blocks": blocks},
        {"embed_dim": 12, "downsample": merge, "blocks": blocks},
    ]
    return helpers.random_arch("efficientvit", 0, stages=stages, resolution=64, num_classes=5)


def shvit_parent(helpers: ModuleType) -> Arch:
    mixer = {"conv": True, "ffn": FFN}
    blocks = [{"conv": True, "attn": {"dim": 5, **ATTN}, "ffn": FFN}] * 3
    merge = {"before": mixer, "hidden": 16, "squeezed": 4, "after": mixer}
    stages = [
        {"embed_dim": 12, "downsample": None, "blocks": blocks},
        {"embed_dim": 12, "downsample": merge, "blocks": blocks},
    ]
    return helpers.random_arch("shvit", 0, stages=stages, resolution=64, num_classes=5)


def evit_parent(helpers: ModuleType, keep: float = 0.6) -> Arch:
    blocks = [{"attn": ATTN, "keep_rate": rate, "fuse": True, "ffn": {"hidden": 14}} for rate in (1.0, 1.0, keep, 1.0)]
    return helpers.random_arch("evit", 0, blocks=blocks, resolution=32, patch_size=8, embed_dim=12, num_classes=5)


def sepvit_parent(helpers: ModuleType, window: int = 8) -> Arch:
    attn = {
        **ATTN,
        "window": window,
        "point_key_dim": 5,
        "point_scale": 0.4,
        "keep_rate": 1.0,
        "residual": list(range(18)),
    }
    stages = [{"embed_dim": 18, "blocks": [{"attn": attn, "ffn": FFN}] * 3}]
    return helpers.random_arch("sepvit", 0, stages=stages, num_classes=5)


PARENTS = {
    "levit": levit_parent,
    "efficientvit": efficientvit_parent,
    "shvit": shvit_parent,
    "evit": evit_parent,
    "sepvit": sepvit_parent,
}
FORMS = {
    "levit": levit_parent,
    "levit-conv": lambda helpers: levit_parent(helpers, "conv"),
    "levit-drop": lambda helpers: levit_parent(helpers, keep=0.5),
    "shvit": shvit_parent,
    "evit": evit_parent,
    "sepvit": sepvit_parent,
}


def parent_of(kind: str, helpers: ModuleType) -> tuple[Arch, nn.Module, Tensor]:
    arch = {**PARENTS, **FORMS}[kind](helpers)
    model = helpers.build(arch, 3)
    x = helpers.image(arch, 3, 4)
    helpers.calibrate(model, x, 5)
    return arch, model, x


def block_of(raw: dict[str, Any], stage: int, block: int) -> tuple[dict[str, Any], str]:
    if "stages" in raw:
        return raw["stages"][stage]["blocks"][block], f"stages.{stage}.blocks.{block}"
    return raw["blocks"][block], f"blocks.{block}"


def check(
    child: dict[str, Any],
    select: dict[str, Any],
    parent: Arch,
    whole: State,
    masked: nn.Module,
    x: Tensor,
    helpers: ModuleType,
    blocks: dict[str, str] | None = None,
) -> nn.Module:
    """Slice the untouched weights: the result must equal the masked parent, and differ from the whole one."""
    arch = helpers.read(child)
    select = {name: np.asarray(kept) for name, kept in select.items()}
    sliced = load(arch, slice_weights(parent, whole, arch, select, blocks), helpers)
    original = copy.deepcopy(masked)
    original.load_state_dict(whole)
    found, wanted, before = outputs(sliced, masked, original, x=x)
    assert helpers.error(found, wanted) < 1e-8  # float64; the requirement is 1e-5
    assert helpers.error(before, wanted) > 1e-4, "the masked units did nothing: the comparison shows nothing"
    return sliced


def snapshot(model: nn.Module) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def silence(module: nn.Module, rows: list[int]) -> None:
    """Make some outputs of a projection (with its BatchNorm, if it has one) zero."""
    last = getattr(module, "norm", module)
    last.weight[rows] = 0
    last.bias[rows] = 0


@torch.no_grad()
def disconnect(module: nn.Module, columns: list[int]) -> None:
    """Make a projection ignore some inputs."""
    getattr(module, "linear", module).weight[:, columns] = 0


def removed(size: int, kept: list[int]) -> list[int]:
    return [unit for unit in range(size) if unit not in kept]


@pytest.mark.parametrize("family", PARENTS)
def test_ffn_hidden(family: str, helpers: ModuleType) -> None:
    """Not the first units, and not in their old order."""
    parent, model, x = parent_of(family, helpers)
    whole, raw = snapshot(model), helpers.document(parent)
    kept, select = [13, 2, 3, 7, 11], {}
    for block in (0, 2):
        doc, name = block_of(raw, 0, block)
        module = model.get_submodule(name)
        if family == "efficientvit":
            doc["after"][0]["ffn"]["hidden"] = len(kept)
            name, ffn = f"{name}.after.0", module.after[0].ffn
        else:
            doc["ffn"]["hidden"] = len(kept)
            ffn = module.ffn
        select[f"{name}.ffn.hidden"] = kept
        disconnect(ffn.fc2, removed(14, kept))
    check(raw, select, parent, whole, model, x, helpers)


def rows_of(family: str, unit: str, per_head: list[list[int]]) -> tuple[list[int], list[int]]:
    """Rows of the fused projection for units of each of three heads, and columns of the output projection.

    LeViT and SHViT lay out q, k, v of one head after the other; EViT and SepViT all q, all k, all v.
    """
    qk, v, heads = 5, 6, 3
    rows, columns = [], []
    for head, units in enumerate(per_head):
        for u in units:
            if family in ("levit", "shvit"):
                start = head * (2 * qk + v)
                rows += [start + u, start + qk + u] if unit == "qk" else [start + 2 * qk + u]
            elif unit == "qk":
                rows += [head * qk + u, heads * qk + head * qk + u]
            else:
                rows.append(2 * heads * qk + head * v + u)
            columns.append(head * v + u)
    return rows, columns


PER_HEAD = {
    "same in every head": [[4, 0, 2]] * 3,
    "own in each head": [[4, 0, 2], [1, 3, 4], [0, 1, 3]],
}


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("choice", PER_HEAD)
def test_query_and_key_units(kind: str, choice: str, helpers: ModuleType) -> None:
    """Silent q and k units add nothing to the logits, as long as the scale stays."""
    parent, model, x = parent_of(kind, helpers)
    whole, raw, kept = snapshot(model), helpers.document(parent), PER_HEAD[choice]
    doc, name = block_of(raw, -1, 1)
    name = name.replace("stages.-1", f"stages.{len(raw.get('stages', [])) - 1}")
    doc["attn"]["key_dim"] = 3
    silence(model.get_submodule(f"{name}.attn.qkv"), rows_of(parent.family, "qk", [removed(5, k) for k in kept])[0])
    select = {f"{name}.attn.qk": kept[0] if choice.startswith("same") else kept}
    check(raw, select, parent, whole, model, x, helpers)

    doc["attn"]["scale"] = 3**-0.5  # what deriving the scale from the new width would do
    with pytest.raises(AssertionError, match="error"):
        check(raw, select, parent, whole, model, x, helpers)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("choice", PER_HEAD)
def test_value_units(kind: str, choice: str, helpers: ModuleType) -> None:
    parent, model, x = parent_of(kind, helpers)
    whole, raw, kept = snapshot(model), helpers.document(parent), PER_HEAD[choice]
    doc, name = block_of(raw, 0, 1)
    doc["attn"]["value_dim"] = 3
    gone = [removed(6, k) for k in kept]
    disconnect(model.get_submodule(f"{name}.attn.proj"), rows_of(parent.family, "v", gone)[1])
    if doc["attn"].get("residual"):
        doc["attn"]["residual"] = [head * 6 + unit for head, units in enumerate(kept) for unit in units]
    select = {f"{name}.attn.v": kept[0] if choice.startswith("same") else kept}
    check(raw, select, parent, whole, model, x, helpers)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("heads", [[2], [2, 0]])
def test_heads(kind: str, heads: list[int], helpers: ModuleType) -> None:
    """Bias rows go with their heads (in EViT: in a block that does not rank tokens by its heads)."""
    parent, model, x = parent_of(kind, helpers)
    whole, raw = snapshot(model), helpers.document(parent)
    doc, name = block_of(raw, 0, 1)
    doc["attn"]["heads"] = len(heads)
    gone = [head * 6 + unit for head in removed(3, heads) for unit in range(6)]
    disconnect(model.get_submodule(f"{name}.attn.proj"), gone)
    if doc["attn"].get("residual"):
        doc["attn"]["residual"] = [head * 6 + unit for head in heads for unit in range(6)]
    check(raw, {f"{name}.attn.heads": heads}, parent, whole, model, x, helpers)


def test_heads_with_units_of_their_own(helpers: ModuleType) -> None:
    """A row of a two-dimensional selection belongs to the larger network's head."""
    parent, model, x = parent_of("levit", helpers)
    whole, raw = snapshot(model), helpers.document(parent)
    doc, name = block_of(raw, 0, 1)
    doc["attn"] |= {"heads": 2, "value_dim": 3}
    heads, kept = [2, 0], PER_HEAD["own in each head"]
    gone = [removed(6, units if head in heads else []) for head, units in enumerate(kept)]
    disconnect(model.get_submodule(f"{name}.attn.proj"), rows_of("levit", "v", gone)[1])
    check(raw, {f"{name}.attn.heads": heads, f"{name}.attn.v": kept}, parent, whole, model, x, helpers)


@pytest.mark.parametrize("form", ["levit", "levit-conv"])
def test_strided_attention(form: str, helpers: ModuleType) -> None:
    parent, model, x = parent_of(form, helpers)
    whole, raw = snapshot(model), helpers.document(parent)
    attn, name = model.stages[1].downsample.attn, "stages.1.downsample.attn"
    raw["stages"][1]["downsample"]["attn"] |= {"heads": 2, "key_dim": 3, "value_dim": 2}
    heads, units, values = [2, 1], [[0, 1, 2], [4, 3, 1], [1, 2, 0]], [[0, 1], [5, 2], [3, 4]]
    silence(attn.q, [head * 5 + unit for head in range(3) for unit in removed(5, units[head])])
    silence(attn.kv, [head * 11 + unit for head in range(3) for unit in removed(5, units[head])])
    disconnect(attn.proj, list(range(6)))
    disconnect(attn.proj, [head * 6 + unit for head in heads for unit in removed(6, values[head])])
    select = {f"{name}.heads": heads, f"{name}.qk": units, f"{name}.v": values}
    check(raw, select, parent, whole, model, x, helpers)


def test_cascade_queries_and_last_values(helpers: ModuleType) -> None:
    """EfficientViT: q and k of any head, and the value width of the last, are free."""
    parent, model, x = parent_of("efficientvit", helpers)
    whole, raw = snapshot(model), helpers.document(parent)
    doc, name = block_of(raw, 1, 1)
    attn, kept, values = model.get_submodule(name).attn, [4, 0, 2], [3, 0]
    doc["attn"]["heads"][1]["key_dim"] = 3
    silence(attn.qkv[1], removed(5, kept) + [5 + unit for unit in removed(5, kept)])
    silence(attn.query[1], removed(5, kept))
    doc["attn"]["heads"][2]["value_dim"] = 2
    disconnect(attn.proj, [8 + unit for unit in removed(4, values)])
    select = {f"{name}.attn.heads.1.qk": kept, f"{name}.attn.heads.2.v": values}
    check(raw, select, parent, whole, model, x, helpers)

    doc["attn"]["heads"][1]["scale"] = 3**-0.5
    with pytest.raises(AssertionError, match="error"):
        check(raw, select, parent, whole, model, x, helpers)


def test_cascade_without_its_last_head(helpers: ModuleType) -> None:
    """The values head 1 gave to head 2's channels stay in the projection."""
    parent, model, x = parent_of("efficientvit", helpers)
    whole, raw = snapshot(model), helpers.document(parent)
    doc, name = block_of(raw, 0, 0)
    del doc["attn"]["heads"][2]
    disconnect(model.get_submodule(name).attn.proj, list(range(8, 12)))
    check(raw, {}, parent, whole, model, x, helpers)


def test_cascade_without_its_last_head_keeps_the_chosen_values(helpers: ModuleType) -> None:
    """A selection goes by the larger network's names: head 1's values are head 2's channels there."""
    parent, model, x = parent_of("efficientvit", helpers)
    whole, raw = snapshot(model), helpers.document(parent)
    doc, name = block_of(raw, 0, 0)
    del doc["attn"]["heads"][2]
    doc["attn"]["heads"][1]["value_dim"] = 2
    disconnect(model.get_submodule(name).attn.proj, [*range(8, 12), 4, 6])
    check(raw, {f"{name}.attn.heads.2.dim": [3, 1]}, parent, whole, model, x, helpers)


def test_expansion_and_squeeze(helpers: ModuleType) -> None:
    for family in ("efficientvit", "shvit"):
        parent, model, x = parent_of(family, helpers)
        whole, raw, name = snapshot(model), helpers.document(parent), "stages.1.downsample"
        hidden, squeezed = [15, 1, 8, 4, 5, 11], [3, 1]
        raw["stages"][1]["downsample"] |= {"hidden": 6, "squeezed": 2}
        merge = model.stages[1].downsample
        disconnect(merge.project, removed(16, hidden))
        disconnect(merge.se.fc1, removed(16, hidden))
        disconnect(merge.se.fc2, removed(4, squeezed))
        check(raw, {f"{name}.hidden": hidden, f"{name}.squeezed": squeezed}, parent, whole, model, x, helpers)


def silence_channels(model: nn.Module, stage: int, gone: list[int]) -> None:
    """Make every BatchNorm that writes into a stage's channels write zero into some of them."""
    first = model.stages[0]
    if stage == 0:
        silence(model.stem.get_submodule("6"), gone)
    for module in (model.stages[stage], first if stage == 0 else model.stages[stage]):
        for name, part in module.named_modules():
            if name.split(".")[-1] in ("proj", "fc2") and hasattr(part, "norm"):
                if name.startswith("downsample.before"):
                    continue
                silence(part, gone)
            if name.endswith("conv.branch") and not name.startswith("downsample.before"):
                silence(part, gone)
            if name == "downsample.project":
                silence(part, gone)
    if stage + 1 < len(model.stages) and hasattr(model.stages[stage + 1].downsample, "before"):
        before = model.stages[stage + 1].downsample.before
        silence(before.conv.branch, gone)
        silence(before.ffn.fc2, gone)
    if stage == len(model.stages) - 1:
        for head in (model.head.cls, model.head.dist):
            if head is not None:
                disconnect(head, gone)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("form", ["levit", "levit-conv", "levit-drop"])
def test_levit_channels(stage: int, form: str, helpers: ModuleType) -> None:
    """One embedding width runs through every layer of its stage and into the next."""
    parent, model, x = parent_of(form, helpers)
    whole, raw = snapshot(model), helpers.document(parent)
    kept = [11, 2, 3, 0, 7, 8, 5]
    raw["stages"][stage]["embed_dim"] = len(kept)
    silence_channels(model, stage, removed((12, 15)[stage], kept))
    check(raw, {f"stages.{stage}.embed": kept}, parent, whole, model, x, helpers)


@pytest.mark.parametrize("stage", [0, 1])
def test_efficientvit_channels(stage: int, helpers: ModuleType) -> None:
    """The heads' chunks, and the values added to them, are runs of the embedding width."""
    parent, model, x = parent_of("efficientvit", helpers)
    whole, raw = snapshot(model), helpers.document(parent)
    kept = [0, 2, 3, 5, 6, 7, 9]  # 3 of the first head's chunk, 3 of the second's, 1 of the third's
    gone = removed(12, kept)
    raw["stages"][stage]["embed_dim"] = 7
    for block in raw["stages"][stage]["blocks"]:
        for head, (offset, dim) in zip(block["attn"]["heads"], ((0, 3), (3, 3), (6, 1)), strict=True):
            head |= {"offset": offset, "dim": dim}
        for head, value in zip(block["attn"]["heads"], (3, 1, 4), strict=True):
            head["value_dim"] = value
    silence_channels(model, stage, gone)
    for block in model.stages[stage].blocks:
        silence(block.attn.qkv[0], [10 + c - 4 for c in gone if 4 <= c < 8])
        silence(block.attn.qkv[1], [10 + c - 8 for c in gone if c >= 8])
    check(raw, {f"stages.{stage}.embed": kept}, parent, whole, model, x, helpers)


def test_shvit_channels_beside_the_attended_ones(helpers: ModuleType) -> None:
    """Channels outside the attended part have no GroupNorm statistics to change."""
    parent, model, x = parent_of("shvit", helpers)
    whole, raw = snapshot(model), helpers.document(parent)
    kept = [0, 1, 2, 3, 4, 6, 9, 11]
    raw["stages"][0]["embed_dim"] = len(kept)
    silence_channels(model, 0, removed(12, kept))
    check(raw, {"stages.0.embed": kept}, parent, whole, model, x, helpers)


# Depth, kernels, grids


@pytest.mark.parametrize("family", PARENTS)
def test_block_map(family: str, helpers: ModuleType) -> None:
    """The child's blocks 0 and 1 are the parent's 0 and 2 (EViT: 2 and 3, where the reduction is)."""
    parent, model, x = parent_of(family, helpers)
    whole, raw = snapshot(model), helpers.document(parent)
    holder = raw["stages"][0] if "stages" in raw else raw
    prefix = "stages.0.blocks" if "stages" in raw else "blocks"
    chosen = [2, 3] if family == "evit" else [0, 2]
    holder["blocks"] = [holder["blocks"][i] for i in chosen]
    holder["blocks"][1] = copy.deepcopy(holder["blocks"][1])
    select, name = {}, f"{prefix}.{chosen[1]}"
    if family == "efficientvit":
        holder["blocks"][1]["before"][0]["ffn"]["hidden"] = 2
        select[f"{name}.before.0.ffn.hidden"] = [9, 5]
        disconnect(model.get_submodule(name).before[0].ffn.fc2, removed(14, [9, 5]))
    else:
        holder["blocks"][1]["ffn"]["hidden"] = 2
        select[f"{name}.ffn.hidden"] = [9, 5]
        disconnect(model.get_submodule(name).ffn.fc2, removed(14, [9, 5]))
    arch = helpers.read(raw)
    state = slice_weights(
        parent, whole, arch, {k: np.asarray(v) for k, v in select.items()},
        {f"{prefix}.{ours}": f"{prefix}.{theirs}" for ours, theirs in enumerate(chosen)},
    )  # fmt: skip
    part = model.get_submodule(prefix)
    shorter = (
        type(part)(*[part[i] for i in chosen])
        if isinstance(part, nn.Sequential)
        else type(part)([part[i] for i in chosen])
    )
    model.set_submodule(prefix, shorter)
    found, wanted = outputs(load(arch, state, helpers), model, x=x)
    assert helpers.error(found, wanted) < 1e-8


def test_kernels_are_cropped_to_their_centre(helpers: ModuleType) -> None:
    parent, model, x = parent_of("efficientvit", helpers)
    whole, raw = snapshot(model), helpers.document(parent)
    doc, name = block_of(raw, 0, 1)
    doc["attn"]["heads"][0]["kernel"] = 3
    weight = model.get_submodule(name).attn.query[0].linear.weight
    border = torch.ones(5, 5, dtype=torch.bool)
    border[1:4, 1:4] = False
    with torch.no_grad():
        weight[:, :, border] = 0
    check(raw, {}, parent, whole, model, x, helpers)


def test_dropping_attention_or_ffn(helpers: ModuleType) -> None:
    for family in ("levit", "shvit", "evit", "sepvit"):
        parent, model, x = parent_of(family, helpers)
        whole, raw = snapshot(model), helpers.document(parent)
        doc, name = block_of(raw, 0, 1)
        doc["attn"] = None
        block_of(raw, 0, 0)[0]["ffn"] = None
        block = model.get_submodule(name)
        block.attn = None
        model.get_submodule(block_of(raw, 0, 0)[1]).ffn = None
        arch = helpers.read(raw)
        found, wanted = outputs(load(arch, slice_weights(parent, whole, arch), helpers), model, x=x)
        assert helpers.error(found, wanted) < 1e-8


def test_resize_keeps_what_does_not_vary() -> None:
    """A constant stays, a table that varies along y varies along y only, the class token stays."""
    table = torch.full((2, 49), 3.0)
    assert torch.allclose(resize(table, 1, 16), torch.full((2, 16), 3.0))
    down = torch.arange(7.0).repeat_interleave(7).view(1, 49)
    small = resize(down, 1, 25).view(5, 5)
    assert torch.allclose(small, small[:, :1].expand(5, 5), atol=1e-5)
    assert (small[1:, 0] > small[:-1, 0]).all()
    across = resize(torch.arange(7.0).repeat(7).view(1, 49), 1, 25).view(5, 5)
    assert torch.allclose(across, small.T, atol=1e-5)
    positions = torch.randn(1, 50, 4)
    assert torch.equal(resize(positions, 1, 26)[:, 0], positions[:, 0])
    assert torch.allclose(resize(positions, 1, 26)[:, 1:], resize(positions[:, 1:], 1, 25))
    assert resize(positions, 1, 50) is positions
    assert resize(positions, 1, 82).shape == (1, 82, 4)
    with pytest.raises(ValueError, match="square"):
        resize(positions, 1, 30)


@pytest.mark.parametrize(
    ("name", "resolution", "key"),
    [
        ("levit_128s", 160, "stages.0.blocks.0.attn.bias.table"),
        ("levit_128s", 256, "stages.1.downsample.attn.bias.table"),
        ("efficientvit_m0", 64, "stages.0.blocks.0.attn.bias.table"),
        pytest.param("deit_tiny", 160, "pos_embed", marks=pytest.mark.slow),
        ("deit_tiny", 288, "pos_embed"),
    ],
)
def test_other_resolutions(name: str, resolution: int, key: str, helpers: ModuleType) -> None:
    """Bias tables and positions follow the grid; everything else is as it was."""
    parent = search_spaces.get_arch(name)
    child = parent.replace(resolution=resolution)
    whole = helpers.build(parent, 1).state_dict()
    state = slice_weights(parent, whole, child)
    model = load(child, state, helpers)
    (found,) = outputs(model, x=helpers.image(child, 1))
    assert found.isfinite().all()
    assert state[key].shape != whole[key].shape
    same = [k for k, value in state.items() if value.shape == whole[k].shape]
    assert all(torch.equal(state[k], whole[k]) for k in same)
    assert all(k.endswith(("bias.table", "pos_embed")) for k in state.keys() - same)


def test_window_tokens_follow_the_grid(helpers: ModuleType) -> None:
    parent = sepvit_parent(helpers, window=2)
    raw = helpers.document(parent) | {"resolution": 24}
    state = slice_weights(parent, helpers.build(parent, 1).state_dict(), helpers.read(raw))
    assert state["stages.0.blocks.0.attn.window_token"].shape == (1, 9, 1, 18)
    load(helpers.read(raw), state, helpers)


def test_linear_and_conv_forms_exchange_weights(helpers: ModuleType) -> None:
    linear, model, x = parent_of("levit", helpers)
    conv = linear.replace(form="conv")
    there = slice_weights(linear, model.state_dict(), conv)
    back = slice_weights(conv, there, linear)
    assert all(torch.equal(back[name], value) for name, value in model.state_dict().items())
    found, wanted = outputs(load(conv, there, helpers), model, x=x)
    assert helpers.error(found, wanted) < 1e-8


@pytest.mark.parametrize("classes", [1, 3, 9])
@pytest.mark.parametrize("family", PARENTS)
def test_another_number_of_classes_leaves_the_classifier_out(family: str, classes: int, helpers: ModuleType) -> None:
    parent, model, _ = parent_of(family, helpers)
    child = parent.replace(num_classes=classes)
    state = slice_weights(parent, model.state_dict(), child)
    missing = model.state_dict().keys() - state.keys()
    assert missing
    assert all(name.startswith("head.") and name.endswith(("weight", "bias")) for name in missing)
    kept = helpers.build(child).load_state_dict(state, strict=False)
    assert set(kept.missing_keys) == missing
    assert not kept.unexpected_keys


# torch-pruning as the oracle: the same units taken out of the same layers


def pruned(layer: nn.Module, function: Any, gone: list[int]) -> nn.Module:
    layer = copy.deepcopy(layer)
    function(layer, gone)
    return layer


def same_tensors(layer: nn.Module, state: State, name: str) -> None:
    for key, value in layer.state_dict().items():
        assert torch.equal(state[f"{name}.{key}"], value), f"{name}.{key}"


KEPT = [1, 2, 5, 8, 13]


def test_linear_layers_against_torch_pruning(helpers: ModuleType) -> None:
    parent, model, _ = parent_of("evit", helpers)
    raw, heads = helpers.document(parent), [0, 2]
    raw["blocks"][1]["ffn"]["hidden"] = 5
    raw["blocks"][1]["attn"]["heads"] = 2
    select = {"blocks.1.ffn.hidden": np.array(KEPT), "blocks.1.attn.heads": np.array(heads)}
    state = slice_weights(parent, model.state_dict(), helpers.read(raw), select)
    block, gone = model.blocks[1], removed(14, KEPT)
    same_tensors(pruned(block.ffn.fc1, torch_pruning.prune_linear_out_channels, gone), state, "blocks.1.ffn.fc1")
    same_tensors(pruned(block.ffn.fc2, torch_pruning.prune_linear_in_channels, gone), state, "blocks.1.ffn.fc2")
    rows = [start + unit for start in (5, 20) for unit in range(5)] + list(range(36, 42))
    same_tensors(pruned(block.attn.qkv, torch_pruning.prune_linear_out_channels, rows), state, "blocks.1.attn.qkv")
    columns = list(range(6, 12))
    same_tensors(pruned(block.attn.proj, torch_pruning.prune_linear_in_channels, columns), state, "blocks.1.attn.proj")


def test_convolutions_and_norms_against_torch_pruning(helpers: ModuleType) -> None:
    parent, model, _ = parent_of("shvit", helpers)
    raw = helpers.document(parent)
    raw["stages"][1]["downsample"]["hidden"] = 5
    raw["stages"][0]["embed_dim"] = 8
    channels = [0, 1, 2, 3, 4, 6, 9, 11]
    select = {"stages.1.downsample.hidden": np.array(KEPT), "stages.0.embed": np.array(channels)}
    state = slice_weights(parent, model.state_dict(), helpers.read(raw), select)
    merge, name, gone, narrow = (
        model.stages[1].downsample,
        "stages.1.downsample",
        removed(16, KEPT),
        removed(12, channels),
    )
    expand = pruned(merge.expand.linear, torch_pruning.prune_conv_out_channels, gone)
    same_tensors(pruned(expand, torch_pruning.prune_conv_in_channels, narrow), state, f"{name}.expand.linear")
    for part in ("expand", "conv"):
        norm = pruned(getattr(merge, part).norm, torch_pruning.prune_batchnorm_out_channels, gone)
        same_tensors(norm, state, f"{name}.{part}.norm")
    depthwise = pruned(merge.conv.linear, torch_pruning.prune_depthwise_conv_out_channels, gone)
    same_tensors(depthwise, state, f"{name}.conv.linear")
    same_tensors(pruned(merge.se.fc1, torch_pruning.prune_conv_in_channels, gone), state, f"{name}.se.fc1")
    same_tensors(pruned(merge.se.fc2, torch_pruning.prune_conv_out_channels, gone), state, f"{name}.se.fc2")
    same_tensors(
        pruned(merge.project.linear, torch_pruning.prune_conv_in_channels, gone), state, f"{name}.project.linear"
    )
    stem = pruned(model.stem.get_submodule("6").linear, torch_pruning.prune_conv_out_channels, narrow)
    same_tensors(stem, state, "stem.6.linear")


def test_layer_norms_against_torch_pruning(helpers: ModuleType) -> None:
    parent, model, _ = parent_of("sepvit", helpers)
    raw = helpers.document(parent)
    channels = [0, 3, 4, 9, 17]
    raw["stages"][0]["embed_dim"] = 5
    for block in raw["stages"][0]["blocks"]:
        block["attn"]["residual"] = None
    state = slice_weights(parent, model.state_dict(), helpers.read(raw), {"stages.0.embed": np.array(channels)})
    gone = removed(18, channels)
    for name in ("stages.0.norm", "stages.0.blocks.1.attn.norm", "norm"):
        norm = pruned(model.get_submodule(name), torch_pruning.prune_layernorm_out_channels, gone)
        same_tensors(norm, state, name)
    position = pruned(model.stages[0].position.branch, torch_pruning.prune_depthwise_conv_out_channels, gone)
    same_tensors(position, state, "stages.0.position.branch")


LAYERS = {
    nn.Linear: (torch_pruning.prune_linear_out_channels, torch_pruning.prune_linear_in_channels),
    nn.Conv2d: (torch_pruning.prune_conv_out_channels, torch_pruning.prune_conv_in_channels),
    nn.BatchNorm1d: (torch_pruning.prune_batchnorm_out_channels,),
    nn.BatchNorm2d: (torch_pruning.prune_batchnorm_out_channels,),
    nn.LayerNorm: (torch_pruning.prune_layernorm_out_channels,),
    nn.GroupNorm: (torch_pruning.prune_groupnorm_out_channels,),
}
UNITS = {
    "levit": ("stem", "embed", "hidden", "qk", "v", "heads"),
    "efficientvit": ("stem", "embed", "hidden", "squeezed", "qk", "v"),
    "shvit": ("stem", "embed", "hidden", "squeezed", "qk", "v", "heads"),
    "evit": ("embed", "hidden", "qk", "v", "heads"),
    "sepvit": ("embed", "hidden", "qk", "point_qk", "v", "heads"),
}


def gone_from(axis: Axis, select: dict[str, Any]) -> list[int]:
    """Positions of an axis whose units are not selected."""
    found: set[int] = set()
    for width, chosen in select.items():
        rows, units = places(axis, width)
        kept = np.atleast_2d(chosen)
        found |= {i for i, (row, unit) in enumerate(zip(rows, units, strict=True))
                  if unit >= 0 and unit not in kept[row % len(kept)]}  # fmt: skip
    return sorted(found)


@pytest.mark.parametrize(("family", "unit"), [(family, unit) for family, units in UNITS.items() for unit in units])
def test_every_kind_of_unit_against_torch_pruning(family: str, unit: str, helpers: ModuleType) -> None:
    """All layers of a random network; bias tables, tokens and positions are no layers of torch-pruning's."""
    subjects = (helpers.subject(family, seed) for seed in range(8))
    subject, knobs = next(
        (subject, found)
        for subject in subjects
        if (found := [k for k in subject.parts.knobs if helpers.unit_name(k) == unit and k.size > 1])
    )
    done = cut(subject.parts, subject.scores, helpers.shrunk(knobs, 1))
    state = slice_weights(subject.arch, subject.model.state_dict(), done.arch, done.select)
    changed = set()
    for name, module in subject.model.named_modules():
        functions = next((found for kind, found in LAYERS.items() if isinstance(module, kind)), ())
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            functions = (torch_pruning.prune_depthwise_conv_out_channels,)
        if not functions or f"{name}.weight" not in state:
            continue
        layer = copy.deepcopy(module)
        for function, axis in zip(functions, module.axes["weight"], strict=False):
            gone = gone_from(axis, done.select)
            if gone:
                function(layer, gone)
                changed.add(type(layer).__name__)
        same_tensors(layer, state, name)
    assert changed


def test_cascade_heads_against_torch_pruning(helpers: ModuleType) -> None:
    """Their own projections are whole modules; the output projection loses the columns of their values."""
    parent, model, _ = parent_of("efficientvit", helpers)
    raw, name = helpers.document(parent), "stages.0.blocks.1.attn"
    del raw["stages"][0]["blocks"][1]["attn"]["heads"][1:]
    state = slice_weights(parent, model.state_dict(), helpers.read(raw))
    attn = model.get_submodule(name)
    proj = pruned(attn.proj.linear, torch_pruning.prune_conv_in_channels, list(range(4, 12)))
    same_tensors(proj, state, f"{name}.proj.linear")
    same_tensors(attn.qkv[0], state, f"{name}.qkv.0")
    assert not any(key.startswith((f"{name}.qkv.1.", f"{name}.query.1.")) for key in state)


# Errors


def fails(helpers: ModuleType, child: dict[str, Any], match: str, **kwargs: Any) -> None:
    parent, model, _ = parent_of("levit", helpers)
    with pytest.raises(ValueError, match=match) as caught:
        slice_weights(parent, model.state_dict(), helpers.read(child), **kwargs)
    assert "\n" not in str(caught.value)


def test_impossible_slices_are_value_errors(helpers: ModuleType) -> None:
    parent = levit_parent(helpers)
    raw = helpers.document(parent)
    fails(helpers, helpers.document(efficientvit_parent(helpers)), "efficientvit network out of a levit")

    wide = copy.deepcopy(raw)
    wide["stages"][0]["blocks"][0]["ffn"]["hidden"] = 15
    fails(helpers, wide, "15 units out of 14")

    deep = copy.deepcopy(raw)
    deep["stages"][0]["blocks"].append(deep["stages"][0]["blocks"][0])
    fails(helpers, deep, r"stages\.0\.blocks\.3")
    fails(helpers, raw, "blocks.7", blocks={"stages.0.blocks.1": "stages.0.blocks.7"})

    narrow = copy.deepcopy(raw)
    narrow["stages"][0]["blocks"][0]["ffn"]["hidden"] = 2
    width = "stages.0.blocks.0.ffn.hidden"
    for chosen in ([0], [0, 1, 2], [0, 14], [-3, 0]):
        fails(helpers, narrow, "units", select={width: np.array(chosen)})


@pytest.mark.parametrize("chosen", [[3, 3], [True, False], [0.0, 1.5]])
def test_selections_that_are_not_distinct_indices_are_refused(chosen: list[Any], helpers: ModuleType) -> None:
    raw = helpers.document(levit_parent(helpers))
    raw["stages"][0]["blocks"][0]["ffn"]["hidden"] = 2
    fails(helpers, raw, "hidden", select={"stages.0.blocks.0.ffn.hidden": np.array(chosen)})


def test_a_width_that_does_not_exist_is_refused(helpers: ModuleType) -> None:
    """A misspelt width must not silently keep the first units instead."""
    raw = helpers.document(levit_parent(helpers))
    raw["stages"][0]["blocks"][0]["ffn"]["hidden"] = 2
    fails(helpers, raw, "hiden", select={"stages.0.blocks.0.ffn.hiden": np.array([5, 6])})
