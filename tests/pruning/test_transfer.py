"""Transfer: any network of a family gets valid weights from any other, the same function where it only grew."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pruning import slice_weights
from pruning.importance import score
from pruning.transfer import matched, transfer, transfer_origins
from pruning.units import anatomy, cut
from search_spaces import Arch, get_arch
from search_spaces.registry import FAMILIES
from search_spaces.space import LEVELS, PARAMETERS

Doc = dict[str, Any]
PARAMS = st.fixed_dictionaries({name: st.integers(0, LEVELS - 1) for name in PARAMETERS})
QUICK = settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@torch.no_grad()
def logits(arch: Arch, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Outputs of the network that holds exactly these weights."""
    with torch.device("meta"):
        model = FAMILIES[arch.family].build(arch)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().to(x.dtype)(x)


def check_pair(parent: Arch, child: Arch, weights: dict[str, Tensor], image: Callable[[Arch], Tensor]) -> None:
    state = transfer(parent, weights, child)
    found = logits(child, state, image(child))
    assert found.shape[1] == child.num_classes
    assert found.isfinite().all()
    storage = {value.data_ptr() for value in weights.values()}
    assert not any(value.data_ptr() in storage for value in state.values())
    again = transfer(parent, weights, parent)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def check_space(
    family: str,
    first: dict[str, int],
    second: dict[str, int],
    classes: int,
    resolutions: tuple[int | None, int | None] = (None, None),
) -> None:
    space = FAMILIES[family].space
    parent, child = space.decode(first, 3, resolutions[0]), space.decode(second, classes, resolutions[1])
    weights = FAMILIES[family].build(parent).state_dict()
    check_pair(parent, child, weights, lambda arch: torch.randn(1, 3, arch.resolution, arch.resolution))


@pytest.mark.parametrize("family", FAMILIES)
@QUICK
@given(first=PARAMS, second=PARAMS, classes=st.sampled_from([3, 5]))
def test_any_two_networks_of_a_space(family: str, first: dict[str, int], second: dict[str, int], classes: int) -> None:
    check_space(family, first, second, classes, (64, 96))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@settings(QUICK, max_examples=60)
@given(first=PARAMS, second=PARAMS, classes=st.sampled_from([3, 5]))
def test_very_many_networks_of_a_space(
    family: str, first: dict[str, int], second: dict[str, int], classes: int
) -> None:
    check_space(family, first, second, classes)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(7))
def test_any_two_irregular_networks(family: str, seed: int, helpers: ModuleType) -> None:
    """Other numbers of stages, patches and branches too."""
    parent, child = helpers.random_arch(family, seed), helpers.random_arch(family, seed + 100)
    weights = helpers.build(parent, seed).state_dict()
    check_pair(parent, child, weights, lambda arch: helpers.image(arch, 2))


# The child only adds: the outputs stay


def blocks_of(raw: Doc) -> list[list[Doc]]:
    return [stage["blocks"] for stage in raw.get("stages", [raw])]


def attentions(raw: Doc) -> list[Doc]:
    found = [block["attn"] for stage in blocks_of(raw) for block in stage]
    found += [s["downsample"]["attn"] for s in raw.get("stages", []) if "attn" in (s.get("downsample") or {})]
    return [attn for attn in found if attn]


def ffns(part: Any) -> list[Doc]:
    if isinstance(part, list):
        return [found for item in part for found in ffns(item)]
    if not isinstance(part, dict):
        return []
    own = [part] if "hidden" in part else []
    return own + [found for value in part.values() for found in ffns(value)]


def deeper(raw: Doc) -> None:
    """A new block first, in the middle and last."""
    for stage in filter(None, blocks_of(raw)):
        new = copy.deepcopy(stage[0])
        if "keep_rate" in new:
            new["keep_rate"] = 1.0
        stage[:] = [new, *stage, new]


def wider_ffn(raw: Doc) -> None:
    for ffn in ffns(raw):
        ffn["hidden"] += 5
        if ffn.get("squeezed"):
            ffn["squeezed"] += 3


def added_branches(raw: Doc) -> None:
    """Each attention, FFN or convolution that one block has and another has not."""
    for stage in blocks_of(raw):
        for key, value in itertools.chain.from_iterable([*(block.items() for block in stage)]):
            for block in stage:
                if value and key in ("attn", "ffn", "conv", "before", "after") and not block[key]:
                    block[key] = value


def more_queries(raw: Doc) -> None:
    """At other scales, as a space that derives the scale from the width has it."""
    for attn in attentions(raw):
        for head in attn["heads"] if isinstance(attn["heads"], list) else [attn]:
            head["key_dim"] += 3
            head["scale"] *= 0.7
            if "point_key_dim" in head:
                head["point_key_dim"] += 2
                head["point_scale"] *= 1.3


def more_values(raw: Doc) -> None:
    for attn in attentions(raw):
        (attn["heads"][-1] if isinstance(attn["heads"], list) else attn)["value_dim"] += 3


def more_heads(raw: Doc) -> None:
    for attn in attentions(raw):
        if isinstance(attn["heads"], list):
            attn["heads"].append(copy.deepcopy(attn["heads"][-1]) | {"dim": attn["heads"][-1]["value_dim"]})
            attn["heads"][-1]["offset"] = 0
        else:
            attn["heads"] += 2


def wider_kernels(raw: Doc) -> None:
    for attn in attentions(raw):
        for head in attn["heads"]:
            head["kernel"] += 2


def wider_stages(raw: Doc) -> None:
    """Where attention takes a part of the channels, the part stays, and the channels move."""
    for stage in raw["stages"]:
        stage["embed_dim"] += 6
    raw["stem"] = [width + 2 for width in raw["stem"]]


def moved_chunks(raw: Doc) -> None:
    """Wider stages whose heads read wider chunks at new places."""
    for stage in raw["stages"]:
        stage["embed_dim"] *= 2
        for attn in [block["attn"] for block in stage["blocks"] if block["attn"]]:
            for head in attn["heads"]:
                head |= {"offset": 2 * head["offset"], "dim": 2 * head["dim"]}
            for head, following in itertools.pairwise(attn["heads"]):
                head["value_dim"] = following["dim"]


def first_blocks(raw: Doc) -> None:
    """Where a stage has none yet (SepViT then has a position encoding too)."""
    window = 8 // 2 ** (len(raw["stages"]) - 1)
    attn = {"window": window, "heads": 2, "key_dim": 3, "value_dim": 4, "scale": 0.5, "point_key_dim": 3}
    attn |= {"point_scale": 0.5, "keep_rate": 1.0, "residual": None}
    for stage in raw["stages"]:
        stage["blocks"] = stage["blocks"] or [{"attn": attn, "ffn": {"hidden": 7, "keep_rate": 1.0}}]


def squeeze_excite(raw: Doc) -> None:
    for stage in raw["stages"][1:]:
        stage["downsample"]["squeezed"] = 3


def second_classifier(raw: Doc) -> None:
    raw["distilled"] = True


def other_form(raw: Doc) -> None:
    raw["form"] = "conv" if raw["form"] == "linear" else "linear"


GROWN = {
    deeper: tuple(FAMILIES),
    wider_ffn: tuple(FAMILIES),
    added_branches: tuple(FAMILIES),
    more_queries: tuple(FAMILIES),
    more_values: ("levit", "efficientvit", "shvit", "evit"),
    more_heads: ("levit", "efficientvit", "shvit", "evit"),
    wider_kernels: ("efficientvit",),
    wider_stages: ("levit", "efficientvit", "shvit"),
    moved_chunks: ("efficientvit",),
    first_blocks: ("sepvit",),
    squeeze_excite: ("efficientvit", "shvit"),
    second_classifier: ("levit", "efficientvit", "shvit"),
    other_form: ("levit",),
}


def whole(family: str, seed: int, helpers: ModuleType, more: Callable[[Doc], None]) -> tuple[Arch, Doc]:
    """A random network without what makes this growth inexact: token dropping, an inner residual in another order."""
    raw = helpers.document(helpers.random_arch(family, seed))
    if more in (wider_stages, moved_chunks, more_heads, added_branches):
        raw = helpers._replaced(raw, "keep_rate", 1.0)
    if more is second_classifier:
        raw["distilled"] = False
    if more is squeeze_excite:
        raw = helpers._replaced(raw, "squeezed", None)
    if more is first_blocks:
        raw["stages"][0]["blocks"] = []
    if family == "sepvit":
        raw = helpers._replaced(raw, "residual", None)
    return helpers.read(raw), raw


@pytest.mark.parametrize(("more", "family"), [(more, family) for more, names in GROWN.items() for family in names])
@pytest.mark.parametrize("networks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_only_grew_computes_the_same(
    more: Callable[[Doc], None], family: str, networks: int, helpers: ModuleType
) -> None:
    """In the first random networks that the growth changes."""
    shown = 0
    for seed in (2, 0, 1, *range(3, 20)):  # EfficientViT's third is the first with several heads in a cascade
        if shown == networks:
            break
        arch, raw = whole(family, seed, helpers, more)
        more(raw)
        larger = helpers.read(raw)
        if larger == arch:
            continue
        model, x = helpers.build(arch, seed), helpers.image(arch, 4, seed)
        helpers.calibrate(model, x, seed)
        with torch.no_grad():
            before = model(x)
        state = transfer(arch, model.state_dict(), larger, generator=torch.Generator().manual_seed(seed))
        grown = helpers.build(larger)
        grown.load_state_dict(state)
        with torch.no_grad():
            assert helpers.error(grown(x), before) < 1e-6, f"seed {seed}"  # the requirement is 1e-5
        shown += 1
    assert shown == networks


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(4))
def test_origins_tell_where_units_were_taken_from(family: str, seed: int, helpers: ModuleType) -> None:
    parent, child = (helpers.random_arch(family, number) for number in (seed, seed + 50))
    weights = helpers.build(parent, seed).state_dict()
    state, found = transfer(parent, weights, child), transfer_origins(parent, child)
    vectors = {name: origin for name, origin in found.items() if state[name].ndim == 1}
    assert vectors
    for name, origin in vectors.items():
        taken = torch.from_numpy(origin.rows >= 0)
        wanted = weights[origin.name][torch.from_numpy(origin.rows)[taken]]
        factor = 1.0 if origin.factor is None else torch.from_numpy(origin.factor)[taken]
        assert torch.allclose(state[name][taken], wanted * factor), name


# Narrower: by importance, as slicing does; and back


@pytest.mark.parametrize("family", ["levit", "efficientvit", "shvit", "evit"])
@pytest.mark.parametrize("seed", range(2))
def test_narrower_widths_keep_their_most_important_units(family: str, seed: int, helpers: ModuleType) -> None:
    """All kinds of width at once, head by head: the slice that `cut` chooses by the same scores."""
    arch = helpers.random_arch(family, seed) if family != "efficientvit" else get_arch("efficientvit_m0", 10)
    model, parts = helpers.build(arch, seed), anatomy(arch)
    scores = score(model, parts, (), "random", seed)
    kinds = {knob.kind for knob in parts.knobs} - ({"blocks", "heads"} if family == "efficientvit" else {"blocks"})
    done = cut(parts, scores, helpers.shrunk([knob for knob in parts.knobs if knob.kind in kinds], seed))
    weights = model.state_dict()
    found = transfer(arch, weights, done.arch, scores)
    wanted = slice_weights(arch, weights, done.arch, done.select, done.blocks)
    assert found.keys() == wanted.keys()
    assert [name for name, value in wanted.items() if not torch.equal(found[name], value)] == []
    first = transfer(arch, weights, done.arch)
    assert any(not torch.equal(first[name], value) for name, value in wanted.items()), "importance chose the first"


def test_without_scores_the_first_units_stay(helpers: ModuleType) -> None:
    arch = get_arch("levit_128s", 10)
    raw = helpers.document(arch)
    raw["stages"][1]["blocks"][0]["ffn"]["hidden"] = 9
    weights = helpers.build(arch, 1).state_dict()
    name = "stages.1.blocks.0.ffn.fc1.linear.weight"
    assert torch.equal(transfer(arch, weights, helpers.read(raw))[name], weights[name][:9])


def test_heads_of_a_cascade_go_from_the_last(helpers: ModuleType) -> None:
    """Each adds the output of the one before, whatever the scores."""
    arch = get_arch("efficientvit_m0", 10)
    raw = helpers.document(arch)
    for attn in attentions(raw):
        del attn["heads"][2:]
    child, weights = helpers.read(raw), helpers.build(arch, 1).state_dict()
    scores = {f"stages.{i}.blocks.{j}.attn.heads": np.arange(4) for i in range(3) for j in range(i + 1)}
    state = transfer(arch, weights, child, scores)
    for key in ("bias.table", "qkv.1.linear.weight", "query.1.linear.weight"):
        name = f"stages.1.blocks.1.attn.{key}"
        assert torch.equal(state[name], weights[name][: len(state[name])])


@pytest.mark.parametrize(("heads", "values", "embed"), [(2, 8, 40), (4, 4, 40), (3, 6, 20), (4, 8, 48), (5, 8, 40)])
def test_the_inner_residual_of_sepvit_adds_what_it_did(
    heads: int, values: int, embed: int, helpers: ModuleType
) -> None:
    """A stage's channels go where the inner channels that they are added to go, in all its blocks."""
    attn = {"heads": 4, "key_dim": 4, "value_dim": 8, "scale": 0.5, "point_key_dim": 4, "point_scale": 0.5, "window": 4}
    attn |= {"keep_rate": 1.0, "residual": None}
    raw = {"version": 1, "family": "sepvit", "num_classes": 3, "resolution": 32}
    parent, child = (
        helpers.read(raw | {"stages": [{"embed_dim": width, "blocks": [{"attn": attn | changes, "ffn": None}] * 2}]})
        for width, changes in ((40, {}), (embed, {"heads": heads, "value_dim": values}))
    )
    weights = helpers.build(parent, 1).state_dict()
    weights["stages.0.norm.bias"] = 1.0 + torch.arange(40)
    scores = {"stages.0.embed": np.arange(40)}
    for block, order in enumerate((1, -1)):
        weights[f"stages.0.blocks.{block}.attn.qkv.bias"][32:] = 1.0 + torch.arange(32)
        scores[f"stages.0.blocks.{block}.attn.heads"] = np.arange(4)[::order]
    state = transfer(parent, weights, child, scores)
    both = min(heads * values, embed)
    channels = state["stages.0.norm.bias"][:both]
    for block in range(2):
        inner = state[f"stages.0.blocks.{block}.attn.qkv.bias"][8 * heads :][:both]
        known = inner > 0
        assert known.any()
        assert torch.equal(channels[known], inner[known])


def everything_wider(raw: Doc) -> None:
    wider_ffn(raw)
    more_queries(raw)
    if raw["family"] != "sepvit":
        more_values(raw)
    if raw["family"] in ("levit", "shvit"):
        more_heads(raw)
    if raw["family"] in ("levit", "efficientvit", "shvit"):
        wider_stages(raw)
    for stage in filter(None, blocks_of(raw)):
        stage.append(copy.deepcopy(stage[-1]) | ({"keep_rate": 1.0} if raw["family"] == "evit" else {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_wider_and_back_is_where_it_began(family: str, helpers: ModuleType) -> None:
    """With the scores of the way there, where what the parent had not scores least; and without scores."""
    for seed in range(2):
        arch, raw = whole(family, seed, helpers, wider_stages)
        everything_wider(raw)
        larger = helpers.read(raw)
        assert larger != arch
        weights, parts, wide = helpers.build(arch, seed).state_dict(), anatomy(arch), anatomy(larger)
        rng = np.random.default_rng(seed)
        ranks = {knob.width: 1 + rng.random((knob.rows, parts.sizes.get(knob.width, 1))) for knob in parts.knobs}
        padded = {}
        for knob in wide.knobs:
            known = ranks.get(knob.width, np.zeros((0, 0)))
            padded[knob.width] = np.zeros((knob.rows, wide.sizes.get(knob.width, 1)))
            padded[knob.width][: len(known), : known.shape[1]] = known
        for there, back in (ranks, padded), (None, None):
            large = transfer(arch, weights, larger, there)
            small = transfer(larger, large, arch, back)
            assert [name for name, value in weights.items() if not torch.allclose(small[name], value)] == []


# Blocks


def test_blocks_are_matched_in_order_and_by_what_they_are() -> None:
    plain = frozenset({"attn", "ffn"}), {"hidden": 8, "keep_rate": 1.0}
    drops = frozenset({"attn", "ffn"}), {"hidden": 8, "keep_rate": 0.5}
    no_attention = frozenset({"ffn"}), {"hidden": 8, "keep_rate": 1.0}
    assert matched([plain] * 2, [plain] * 4) == {0: 0, 1: 1}
    assert matched([plain] * 4, [plain] * 2) == {0: 0, 1: 1}
    assert matched([no_attention, plain], [no_attention, no_attention, plain]) == {0: 0, 1: 2}
    assert matched([plain, drops], [plain, plain, drops, plain]) == {0: 0, 1: 2}
    assert matched([drops, plain, plain], [plain, drops, plain]) == {0: 0, 1: 1, 2: 2}
    wide = frozenset({"attn", "ffn"}), {"hidden": 32, "keep_rate": 1.0}
    assert matched([wide], [plain, wide]) == {0: 1}
    assert matched([], [plain]) == {}


def test_fewer_blocks_are_the_first(helpers: ModuleType) -> None:
    arch = get_arch("levit_128s", 10)
    raw = helpers.document(arch)
    del raw["stages"][2]["blocks"][2:]
    weights = helpers.build(arch, 1).state_dict()
    state = transfer(arch, weights, helpers.read(raw))
    assert all(torch.equal(value, weights[name]) for name, value in state.items())


# Other grids, classes and scales


@pytest.mark.parametrize("name", ["levit_128s", "efficientvit_m0", "deit_tiny", "sepvit_lite"])
def test_another_resolution_changes_bias_tables_and_positions_only(name: str, helpers: ModuleType) -> None:
    parent = get_arch(name, 10)
    child = parent.at(128)
    weights = helpers.build(parent, 1, torch.float32).state_dict()
    state = transfer(parent, weights, child)
    changed = {key for key, value in state.items() if not torch.equal(value, weights[key])}
    assert all(key.endswith(("bias.table", "pos_embed", "window_token")) for key in changed)
    assert changed or name == "sepvit_lite"


@pytest.mark.parametrize("family", FAMILIES)
def test_another_number_of_classes_leaves_the_classifier_untrained(family: str, helpers: ModuleType) -> None:
    parent = helpers.random_arch(family, 1)
    child = parent.replace(num_classes=parent.num_classes + 2)
    weights = helpers.build(parent, 1, torch.float32).state_dict()
    state = transfer(parent, weights, child)
    changed = {key for key, value in state.items() if not torch.equal(value, weights[key])}
    assert changed
    assert all(key.startswith("head.") and ".norm." not in key for key in changed)


def test_separable_attention_keeps_its_scale_without_windows(helpers: ModuleType) -> None:
    """One window: attention across windows would give each value once more."""
    attn = {"heads": 2, "key_dim": 4, "value_dim": 4, "scale": 0.5, "point_key_dim": 4, "point_scale": 0.5}
    attn |= {"keep_rate": 1.0, "residual": None}
    raw = {"version": 1, "family": "sepvit", "num_classes": 3, "resolution": 32}
    one, four = (
        helpers.read(raw | {"stages": [{"embed_dim": 8, "blocks": [{"attn": attn | {"window": w}, "ffn": None}]}]})
        for w in (8, 4)
    )
    name = "stages.0.blocks.0.attn.proj.weight"
    weights = helpers.build(four, 1).state_dict()
    assert torch.equal(transfer(four, weights, one)[name], 2 * weights[name])
    assert torch.equal(transfer(one, transfer(four, weights, one), four)[name], weights[name])


# Random starts, learning, errors


def test_a_generator_fixes_what_is_random(helpers: ModuleType) -> None:
    arch, raw = whole("levit", 0, helpers, wider_stages)
    everything_wider(raw)
    weights = helpers.build(arch, 0).state_dict()
    states = [
        transfer(arch, weights, helpers.read(raw), generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    assert any(not torch.equal(states[0][name], value) for name, value in states[2].items())


def test_new_channels_under_a_layer_norm_are_not_dead(helpers: ModuleType) -> None:
    """A norm that writes zero into columns that read zero would stay so."""
    arch = helpers.random_arch("evit", 2)
    raw = helpers.document(arch)
    raw["embed_dim"] += 4
    larger = helpers.read(raw)
    model = helpers.build(larger)
    model.load_state_dict(transfer(arch, helpers.build(arch, 1).state_dict(), larger))
    model.train()
    F.cross_entropy(model(helpers.image(larger, 4)), torch.arange(4) % larger.num_classes).backward()
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert all((norm.weight[-4:] == 1).all() for norm in norms)
    assert model.head.weight.grad[:, -4:].abs().min() > 0
    assert (model.cls_token[..., -4:] != 0).all()


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    order = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(x), (32,), generator=order)
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return model.eval()


def test_inherited_weights_learn_faster_than_random_ones(helpers: ModuleType) -> None:
    """Digits: a child narrower here, wider and deeper there, after 10 steps each."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = F.interpolate(torch.from_numpy(digits.images).float()[:, None] / 8 - 1, size=32).expand(-1, 3, -1, -1)
    y = torch.from_numpy(digits.target)
    attn = {"dim": 8, "heads": 1, "key_dim": 8, "value_dim": 8, "scale": 0.35}
    block = {"conv": True, "attn": attn, "ffn": {"hidden": 32, "keep_rate": 1.0}}
    stage = {"embed_dim": 32, "downsample": None, "blocks": [block, block]}
    raw = {"version": 1, "family": "shvit", "num_classes": 10, "resolution": 32, "distilled": False}
    parent = helpers.read(raw | {"stem": [8, 16, 24], "stages": [stage]})
    torch.manual_seed(0)
    model = train(FAMILIES["shvit"].build(parent), x[:1200], y[:1200], 50)
    other = {"conv": True, "attn": attn | {"heads": 2, "value_dim": 6}, "ffn": {"hidden": 48, "keep_rate": 1.0}}
    child = helpers.read(raw | {"stem": [8, 16, 20], "stages": [stage | {"embed_dim": 28, "blocks": [other] * 3}]})
    correct = {}
    for how in ("inherited", "random"):
        torch.manual_seed(1)
        young = FAMILIES["shvit"].build(child)
        if how == "inherited":
            young.load_state_dict(transfer(parent, model.state_dict(), child))
        train(young, x[:1200], y[:1200], 10)
        with torch.no_grad():
            correct[how] = (young(x[1200:]).argmax(1) == y[1200:]).double().mean().item()
    assert correct["inherited"] > correct["random"] + 0.2, correct


def test_errors_say_what_does_not_fit(helpers: ModuleType) -> None:
    parent = helpers.random_arch("levit", 1)
    weights = helpers.build(parent, 1).state_dict()
    with pytest.raises(ValueError, match="shvit network cannot take the weights of a levit one"):
        transfer(parent, weights, helpers.random_arch("shvit", 1))
    raw = helpers.document(parent)
    raw["stem"][0] -= 1
    with pytest.raises(ValueError, match=r"stem\.0 are not those of its \d+ units"):
        transfer(parent, weights, helpers.read(raw), {"stem.0": np.ones(99)})
