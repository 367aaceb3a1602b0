"""Knobs: what can go, what follows it, and that the network left is the one whose removed units are silent."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import search_spaces
from pruning import slice_weights
from pruning.units import Knob, anatomy, cut
from search_spaces import Arch, ArchError
from search_spaces.gates import gates_of
from search_spaces.registry import FAMILIES
from search_spaces.tokens import foremost
from search_spaces.widths import NEW

SEEDS = range(8)
UNITS = {
    "levit": {"stem", "embed", "hidden", "qk", "v", "heads", "attn", "ffn"},
    "efficientvit": {"stem", "embed", "hidden", "squeezed", "qk", "v", "heads", "attn", "ffn", "conv"},
    "shvit": {"stem", "embed", "hidden", "squeezed", "qk", "v", "heads", "attn", "ffn", "conv"},
    "evit": {"hidden", "qk", "v", "heads", "attn", "ffn"},
    "sepvit": {"hidden", "qk", "point_qk", "v", "heads", "attn", "ffn"},
}
"""What can go without a trace; EViT's and SepViT's stage widths are all under LayerNorm."""
PAIRS = [(family, unit) for family, units in UNITS.items() for unit in sorted(units)]


def difference(subject: Any, settings: dict[str, int], helpers: ModuleType) -> tuple[float, float]:
    """How far the sliced network is from the silenced one, and how far that is from the whole one."""
    done = cut(subject.parts, subject.scores, settings)
    gone = [knob.width for knob in subject.parts.knobs if knob.kind == "blocks" and settings.get(knob.name, 1) == 0]
    wanted = helpers.silenced(subject, done, gone)
    with torch.no_grad():
        found = helpers.child_of(subject, done)(subject.x)
    return helpers.error(found, wanted, subject.out), float((wanted - subject.out).abs().max())


# Masked equals sliced


@pytest.mark.parametrize(("family", "unit"), PAIRS)
@pytest.mark.parametrize("networks", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_masked_equals_sliced_in_every_kind_of_unit(family: str, unit: str, networks: int, helpers: ModuleType) -> None:
    """All knobs of a kind at once, in the first networks where that does something."""
    shown = 0
    for seed in SEEDS:
        subject = helpers.subject(family, seed)
        knobs = [knob for knob in subject.provable() if helpers.unit_name(knob) == unit]
        if knobs and shown < networks:
            error, effect = difference(subject, helpers.shrunk(knobs, seed), helpers)
            assert error < 1e-8  # float64; the requirement is 1e-5
            shown += effect > 1e-6
    assert shown, "no network shows anything"


def check_all_at_once(family: str, seed: int, helpers: ModuleType) -> None:
    subject = helpers.subject(family, seed)
    rng = np.random.default_rng(seed)
    knobs = [knob for knob in subject.provable() if rng.random() < (0.3 if knob.kind == "blocks" else 0.7)]
    error, _ = difference(subject, helpers.shrunk(knobs, seed), helpers)
    assert error < 1e-8


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(5))
def test_masked_equals_sliced_in_many_knobs_at_once(family: str, seed: int, helpers: ModuleType) -> None:
    check_all_at_once(family, seed, helpers)


def test_masked_equals_sliced_on_any_cpu(helpers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last bits of scores differ by CPU and kernel: here at random. This network's stem is cut to two channels,
    so that in areas without signal tokens equal each other, of which some are chosen.
    """
    generator = torch.Generator().manual_seed(0)

    def other_bits(scores: torch.Tensor, keep: int) -> torch.Tensor:
        noise = torch.randn(scores.shape, generator=generator, dtype=scores.dtype)
        return foremost(scores * (1 + 2**-50 * noise), keep)

    monkeypatch.setattr("search_spaces.tokens.foremost", other_bits)
    for _ in range(3):
        check_all_at_once("efficientvit", 3, helpers)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_equals_sliced_in_very_many_networks(family: str, helpers: ModuleType) -> None:
    for seed in range(100, 180):
        check_all_at_once(family, seed, helpers)
        helpers.subject.cache_clear()


def test_the_random_networks_are_as_irregular_as_meant(helpers: ModuleType) -> None:
    found = {family: [helpers.subject(family, seed).arch for seed in SEEDS] for family in FAMILIES}
    assert {arch.form for arch in found["levit"]} == {"linear", "conv"}
    assert any(rate < 1 for arch in found["levit"] for rate in (stage.keep_rate for stage in arch.stages))
    assert any(b.attn and b.attn.heads > 1 for a in found["shvit"] for s in a.stages for b in s.blocks)
    assert any(b.attn and b.attn.residual for a in found["sepvit"] for s in a.stages for b in s.blocks)
    assert any(b.attn and b.attn.keep_rate < 1 for a in found["sepvit"] for s in a.stages for b in s.blocks)
    assert any(block.keep_rate < 1 for arch in found["evit"] for block in arch.blocks)
    runs = [
        [(head.offset, head.offset + head.dim) for head in block.attn.heads]
        for arch in found["efficientvit"]
        for stage in arch.stages
        for block in stage.blocks
        if block.attn and len(block.attn.heads) > 1
    ]
    assert any(a[0] < b[1] and b[0] < a[1] for a, b, *_ in runs), "no heads overlap"
    assert any(a[1] < b[0] or b[1] < a[0] for a, b, *_ in runs), "no heads leave a gap"
    assert any(a[1] - a[0] != b[1] - b[0] for a, b, *_ in runs), "all chunks are equal"
    for family in ("levit", "efficientvit", "shvit"):
        rates = [rate for arch in found[family] for rate in rates_of(arch.model_dump())]
        assert any(rate < 1 for rate in rates), "no FFN drops tokens"


def rates_of(part: Any) -> list[float]:
    """Keep rates of all FFNs in a document."""
    if isinstance(part, dict):
        own = [part["keep_rate"]] if part.keys() == {"hidden", "keep_rate"} else []
        return own + [rate for value in part.values() for rate in rates_of(value)]
    return [rate for value in part for rate in rates_of(value)] if isinstance(part, list | tuple) else []


LEFT_OUT = {("shvit", "embed")} | {("evit", u) for u in ("embed", "heads", "qk")}
LEFT_OUT |= {("sepvit", u) for u in ("embed", "v", "heads")}


@pytest.mark.parametrize(("family", "unit"), sorted(LEFT_OUT))
def test_what_is_left_out_does_leave_a_trace(family: str, unit: str, helpers: ModuleType) -> None:
    """Units under a LayerNorm or GroupNorm, and the heads and keys that rank or match EViT's tokens."""
    for seed in SEEDS:
        subject = helpers.subject(family, seed)
        names = {knob.name for knob in subject.provable()}
        knobs = [k for k in subject.parts.knobs if k.name not in names and helpers.unit_name(k) == unit and k.size > 1]
        if any(difference(subject, {knob.name: 1}, helpers)[0] > 1e-4 for knob in knobs):
            return
    pytest.fail("they could be tested")


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_else_is_left_out(family: str, helpers: ModuleType) -> None:
    for seed in SEEDS:
        subject = helpers.subject(family, seed)
        left_out = {*subject.parts.knobs} - {*subject.provable()}
        assert {(family, helpers.unit_name(knob)) for knob in left_out} <= LEFT_OUT
        if family == "shvit":
            assert all(any(name.endswith("attn.dim") for name in knob.follows) for knob in left_out)


# Negative controls


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scale_taken_from_the_new_width_fails(family: str, helpers: ModuleType) -> None:
    errors = []
    for seed in SEEDS:
        subject = helpers.subject(family, seed)
        knobs = [knob for knob in subject.parts.knobs if knob.kind == "qk" and knob.size > 2]
        if not knobs:
            continue
        done = cut(subject.parts, subject.scores, {knob.name: 2 for knob in knobs})
        raw = rescaled(helpers.document(done.arch), {2})
        wrong = type(done)(helpers.read(raw), done.select, done.blocks)
        with torch.no_grad():
            found = helpers.child_of(subject, wrong)(subject.x)
        errors.append(helpers.error(found, helpers.silenced(subject, done)))
        if len(errors) > 2:
            break
    assert max(errors) > 1e-2


def rescaled(part: Any, dims: set[int]) -> Any:
    """A document whose scales follow from its key dims."""
    if isinstance(part, list):
        return [rescaled(value, dims) for value in part]
    if not isinstance(part, dict):
        return part
    part = {key: rescaled(value, dims) for key, value in part.items()}
    for scale, dim in (("scale", "key_dim"), ("point_scale", "point_key_dim")):
        if part.get(dim) in dims:
            part[scale] = part[dim] ** -0.5
    return part


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bias_left_behind_fails(family: str, helpers: ModuleType) -> None:
    """Zero rows silence a unit only together with what BatchNorm (in EViT and SepViT the bias) adds."""
    for seed in SEEDS:
        subject = helpers.subject(family, seed)
        knobs = [k for k in subject.parts.knobs if k.width.endswith("ffn.hidden") and k.size > 3]
        if not knobs:
            continue
        done = cut(subject.parts, subject.scores, {knob.name: 2 for knob in knobs})
        with torch.no_grad():
            right = helpers.child_of(subject, done)(subject.x)
            for shifted in (True, False):
                model = helpers.build(subject.arch)
                model.load_state_dict(subject.model.state_dict())
                for knob in knobs:
                    fc1 = model.get_submodule(knob.width.removesuffix("hidden") + "fc1")
                    gone = np.setdiff1d(np.arange(knob.size), done.select[knob.width])
                    getattr(fc1, "linear", fc1).weight[gone] = 0
                    norm = getattr(fc1, "norm", None)
                    if norm is not None:
                        norm.running_mean[gone] = 0
                    if not shifted:
                        (fc1 if norm is None else norm).bias[gone] = 0
                error = helpers.error(model(subject.x), right)
                assert error > 1e-2 if shifted else error < 1e-8
        return
    pytest.fail("no network has an FFN")


# Knobs and cuts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", SEEDS)
def test_knobs_tile_their_widths_and_have_gates(family: str, seed: int, helpers: ModuleType) -> None:
    subject = helpers.subject(family, seed)
    runs: dict[str, list[Knob]] = {}
    for knob in subject.parts.knobs:
        runs.setdefault(knob.width, []).append(knob)
    assert len({knob.name for knob in subject.parts.knobs}) == len(subject.parts.knobs)
    for width, knobs in runs.items():
        gates = [helpers.gate_units(gate, width) for gate in gates_of(subject.model).values()]
        reached = {unit for units in gates if units is not None for unit in units.flatten()}
        assert reached == set(range(sum(knob.size for knob in knobs) * knobs[0].rows)), width
        ends = [knob.start + knob.size for knob in knobs]
        assert [knob.start for knob in knobs] == [0, *ends[:-1]]
        if knobs[0].kind != "blocks":
            assert ends[-1] == subject.parts.sizes[width]


def test_a_cut_keeps_the_most_important_units_in_their_order(helpers: ModuleType) -> None:
    arch = helpers.random_arch(
        "levit", 0, resolution=64, form="linear", stages=[
            {"embed_dim": 6, "downsample": None, "keep_rate": 1.0, "blocks": [
                {"attn": {"heads": 2, "key_dim": 4, "value_dim": 3, "scale": 0.5}, "ffn": None}]},
        ],
    )  # fmt: skip
    parts = anatomy(arch)
    attn = "stages.0.blocks.0.attn"
    scores = {knob.width: np.zeros((knob.rows, knob.size)) for knob in parts.knobs}
    scores["stages.0.embed"] = np.array([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    scores[f"{attn}.qk"] = np.array([[1.0, 4.0, 3.0, 2.0], [9.0, 7.0, 6.0, 8.0]])
    scores[f"{attn}.heads"] = np.array([2.0, 1.0])
    done = cut(parts, scores, {"stages.0.embed": 3, f"{attn}.qk": 2, f"{attn}.heads": 1})
    assert {name: units.tolist() for name, units in done.select.items()} == {
        "stages.0.embed": [0, 2, 5],
        f"{attn}.qk": [[1, 2], [0, 3]],
        f"{attn}.heads": [0],
    }
    grown = cut(parts, scores, {"stages.0.embed": 8, f"{attn}.qk": 5})
    assert grown.select["stages.0.embed"].tolist() == [0, 1, 2, 3, 4, 5, NEW, NEW]
    assert grown.select[f"{attn}.qk"].tolist() == [[0, 1, 2, 3, NEW]] * 2
    assert (grown.arch.stages[0].embed_dim, grown.arch.stages[0].blocks[0].attn.key_dim) == (8, 5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(2))
def test_two_cuts_are_one(family: str, seed: int, helpers: ModuleType) -> None:
    """Cutting a cut network gives the tensors that cutting at once gives."""
    subject = helpers.subject(family, seed)
    widths = [knob for knob in subject.parts.knobs if knob.kind != "blocks"]
    small = helpers.shrunk(widths, seed)
    middle = {knob.name: (knob.size + small[knob.name] + 1) // 2 for knob in widths}
    weights = subject.model.state_dict()
    first = cut(subject.parts, subject.scores, middle)
    between = slice_weights(subject.arch, weights, first.arch, first.select, first.blocks)
    scores = {
        name: np.take_along_axis(values, first.select[name], -1) if name in first.select else values
        for name, values in subject.scores.items()
    }
    parts = anatomy(first.arch)
    names = dict(zip([knob.name for knob in widths], [k.name for k in parts.knobs if k.kind != "blocks"], strict=True))
    second = cut(parts, scores, {names[name]: size for name, size in small.items()})
    twice = slice_weights(first.arch, between, second.arch, second.select, second.blocks)
    both = cut(subject.parts, subject.scores, small)
    once = slice_weights(subject.arch, weights, both.arch, both.select, both.blocks)
    assert second.arch == both.arch
    assert twice.keys() == once.keys()
    assert all(torch.equal(twice[name], value) for name, value in once.items())


# Archs resized and without branches


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", SEEDS)
def test_growing_and_cutting_back_is_the_same_arch(family: str, seed: int, helpers: ModuleType) -> None:
    """Whatever is tied to a width goes there and back with it."""
    subject = helpers.subject(family, seed)
    arch, parts = subject.arch, subject.parts
    assert arch.resized({}) == arch
    assert cut(parts, subject.scores, {}).select == {}
    larger = cut(parts, subject.scores, {k.name: k.size + 2 for k in parts.knobs if k.kind not in ("heads", "blocks")})
    back = {name: np.flatnonzero(np.atleast_2d(units)[0] >= 0) for name, units in larger.select.items()}
    emptied = [b for b, origin in larger.blocks.items() if b != origin]
    if not emptied:
        assert larger.arch.resized(back) == arch
    if parts.knobs:
        assert larger.arch != arch


def cascade_arch(helpers: ModuleType) -> Arch:
    heads = [
        {"offset": offset, "dim": dim, "key_dim": 3, "value_dim": value, "kernel": 3, "scale": 0.5}
        for offset, dim, value in ((0, 5, 4), (3, 4, 2), (8, 2, 6))
    ]
    block = {"before": [], "attn": {"window": 4, "heads": heads}, "after": []}
    stages = [{"embed_dim": 12, "downsample": None, "blocks": [block]}]
    return helpers.random_arch("efficientvit", 0, stages=stages, resolution=64)


def heads_of(arch: Arch) -> list[tuple[int, int, int]]:
    return [(head.offset, head.dim, head.value_dim) for head in arch.stages[0].blocks[0].attn.heads]


def test_cascade_heads_follow_their_channels(helpers: ModuleType) -> None:
    """Heads read channels 0-4, 3-6 (overlapping) and 8-9 (after a gap); a head's values are the next one's channels."""
    arch, attn = cascade_arch(helpers), "stages.0.blocks.0.attn"
    assert heads_of(arch.resized({"stages.0.embed": np.array([1, 3, 4, 6, 7, 9, 11])})) == [
        (0, 3, 3), (1, 3, 1), (5, 1, 6),
    ]  # fmt: skip
    chosen = np.array([0, 1, 2, 3, NEW, 4, 5, 6, 7, NEW, 8, 9, NEW, NEW, 10, 11])
    assert heads_of(arch.resized({"stages.0.embed": chosen})) == [(0, 6, 5), (3, 5, 4), (10, 4, 6)]
    assert heads_of(arch.resized({f"{attn}.heads": np.arange(2)})) == [(0, 5, 4), (3, 4, 2)]
    both = {f"{attn}.heads": np.arange(1), f"{attn}.heads.2.v": np.arange(3), "stages.0.embed": np.arange(6)}
    assert heads_of(arch.resized({**both, "stages.0.embed": np.array([0, 3, 6, 8])})) == [(0, 2, 2)]
    assert heads_of(arch.resized({f"{attn}.heads.2.v": np.arange(3)})) == [(0, 5, 4), (3, 4, 2), (8, 2, 3)]
    parts = anatomy(arch)
    chunks = [(k.start, k.size, {*k.follows}) for k in parts.knobs if k.kind == "embed" and k.width == "stages.0.embed"]
    first, second, third = (f"{attn}.heads.{j}.dim" for j in range(3))
    assert chunks == [
        (0, 3, {first}), (3, 2, {first, second}), (5, 2, {second}), (7, 1, set()), (8, 2, {third}), (10, 2, set()),
    ]  # fmt: skip
    with pytest.raises(ArchError, match="dim"):
        arch.resized({"stages.0.embed": np.arange(7)})


def sepvit_arch(helpers: ModuleType, residual: list[int] | None, embed: int = 8) -> Arch:
    attn = {
        "window": 4, "heads": 2, "key_dim": 3, "value_dim": 3, "scale": 0.5, "point_key_dim": 2, "point_scale": 0.5,
        "keep_rate": 1.0, "residual": residual,
    }  # fmt: skip
    stages = [{"embed_dim": embed, "blocks": [{"attn": attn, "ffn": None}]}]
    return helpers.random_arch("sepvit", 0, stages=stages)


@pytest.mark.parametrize(
    ("residual", "units", "wanted"),
    [
        (None, {}, None),
        (None, {"v": [0, 2]}, (0, 2, 3, 5)),
        (None, {"v": [[0, 2], [1, 2]]}, (0, 2, 4, 5)),
        (None, {"v": [0, 1, 2, NEW]}, (0, 1, 2, -1, 3, 4, 5, -1)),
        (None, {"heads": [0]}, None),
        (None, {"heads": [1]}, (3, 4, 5)),
        (None, {"heads": [1], "v": [[0, 1], [1, 2]]}, (4, 5)),
        (None, {"embed": [1, 2, 4, 5, 7]}, (-1, 0, 1, -1, 2, 3)),
        (None, {"embed": [0, 1, 2, 3, NEW, 4, 5, 6, 7]}, (0, 1, 2, 3, 5, 6)),
        ([7, -1, 0, 0, 5, 2], {"embed": [0, 5, 7], "v": [0, 1]}, (2, -1, 0, 1)),
        ([7, -1, 0, 0, 5, 2], {}, (7, -1, 0, 0, 5, 2)),
    ],
)
def test_the_inner_residual_follows(
    residual: list[int] | None, units: dict[str, Any], wanted: tuple[int, ...] | None, helpers: ModuleType
) -> None:
    names = {"embed": "stages.0.embed"}
    chosen = {names.get(key, f"stages.0.blocks.0.attn.{key}"): np.array(value) for key, value in units.items()}
    resized = sepvit_arch(helpers, residual).resized(chosen)
    assert resized.stages[0].blocks[0].attn.residual == wanted


def test_partial_attention_follows_its_channels(helpers: ModuleType) -> None:
    attn = {"dim": 3, "heads": 2, "key_dim": 4, "value_dim": 3, "scale": 0.5}
    stages = [{"embed_dim": 8, "downsample": None, "blocks": [{"conv": False, "attn": attn, "ffn": None}]}]
    arch = helpers.random_arch("shvit", 0, stages=stages, resolution=64)
    for chosen, dim in (([0, 2, 3, 7], 2), ([0, 1, 2, NEW, 3, 4, 5, 6, 7, NEW], 4), ([1, 2], 2)):
        resized = arch.resized({"stages.0.embed": np.array(chosen)})
        assert (resized.stages[0].embed_dim, resized.stages[0].blocks[0].attn.dim) == (len(chosen), dim)
    knobs = [k for k in anatomy(arch).knobs if k.width == "stages.0.embed"]
    assert [(k.start, k.size, k.follows, k.grows) for k in knobs] == [
        (0, 3, ("stages.0.blocks.0.attn.dim",), False),
        (3, 5, ("stages.0.blocks.0.attn.rest",), True),
    ]


def levit_arch(helpers: ModuleType, *blocks: tuple[bool, bool]) -> Arch:
    attn, ffn = {"heads": 2, "key_dim": 4, "value_dim": 3, "scale": 0.5}, {"hidden": 6, "keep_rate": 0.5}
    raw = [{"attn": attn if a else None, "ffn": ffn if f else None} for a, f in blocks]
    stages = [
        {"embed_dim": 6, "downsample": None, "keep_rate": 1.0, "blocks": raw},
        {"embed_dim": 8, "downsample": {"attn": attn, "ffn": ffn}, "keep_rate": 1.0, "blocks": raw},
    ]
    return helpers.random_arch("levit", 0, resolution=64, form="linear", stages=stages)


def test_blocks_left_empty_go_but_for_the_first(helpers: ModuleType) -> None:
    arch = levit_arch(helpers, (True, True), (True, False), (False, True), (True, True))
    gone = [f"stages.0.blocks.{branch}" for branch in ("0.attn", "0.ffn", "1.attn", "3.ffn")]
    left, origins = arch.without([*gone, "stages.1.downsample.ffn", "stages.1.blocks.2.ffn"])
    assert [(b.attn is None, b.ffn is None) for b in left.stages[0].blocks] == [
        (True, True), (True, False), (False, True),
    ]  # fmt: skip
    assert left.stages[1].downsample.ffn is None
    assert [b.attn is None for b in left.stages[1].blocks] == [False, False, False]
    assert origins == {
        "stages.0.blocks.0": "stages.0.blocks.0",
        "stages.0.blocks.1": "stages.0.blocks.2",
        "stages.0.blocks.2": "stages.0.blocks.3",
        "stages.1.blocks.0": "stages.1.blocks.0",
        "stages.1.blocks.1": "stages.1.blocks.1",
        "stages.1.blocks.2": "stages.1.blocks.3",
    }
    same, identity = arch.without([])
    assert same == arch
    assert all(ours == theirs for ours, theirs in identity.items())
    assert len(identity) == 8


def test_a_mixer_goes_piece_by_piece(helpers: ModuleType) -> None:
    mixer = {"conv": True, "ffn": {"hidden": 6, "keep_rate": 0.5}}
    block = {"before": [mixer], "attn": None, "after": [mixer]}
    merge = {"before": mixer, "hidden": 8, "squeezed": 4, "after": mixer}
    stages = [
        {"embed_dim": 6, "downsample": None, "blocks": [block, block]},
        {"embed_dim": 8, "downsample": merge, "blocks": []},
    ]
    arch = helpers.random_arch("efficientvit", 0, resolution=64, stages=stages)
    second, down = "stages.0.blocks.1", "stages.1.downsample"
    left, origins = arch.without([f"{second}.before.0.conv", f"{second}.before.0.ffn", f"{down}.before.conv"])
    assert (left.stages[0].blocks[1].before[0].conv, left.stages[0].blocks[1].before[0].ffn) == (False, None)
    assert left.stages[1].downsample.before.conv is False
    assert origins == {f"stages.0.blocks.{i}": f"stages.0.blocks.{i}" for i in range(2)}
    rest = [f"{second}.{side}.0.{branch}" for side in ("before", "after") for branch in ("conv", "ffn")]
    assert arch.without(rest)[1] == {"stages.0.blocks.0": "stages.0.blocks.0"}


@pytest.mark.parametrize("ffn", [{"hidden": 6}, None])
@pytest.mark.parametrize("place", [0, 1])
def test_attention_that_ranks_tokens_cannot_go(ffn: dict[str, int] | None, place: int, helpers: ModuleType) -> None:
    """Nor can its block, which would take the reduction with it; in a block that keeps all tokens it can."""
    attn = {"heads": 2, "key_dim": 4, "value_dim": 3, "scale": 0.5}
    blocks = [{"attn": attn, "keep_rate": 1.0, "fuse": False, "ffn": ffn} for _ in range(3)]
    blocks[place]["keep_rate"] = 0.5
    arch = helpers.random_arch("evit", 0, resolution=32, patch_size=8, blocks=blocks)
    with pytest.raises(ArchError, match="cannot rank tokens"):
        arch.without([f"blocks.{place}.attn"])
    assert arch.without(["blocks.2.attn"])[0].token_counts()[-1] == arch.token_counts()[-1]
    knobs = {knob.width for knob in anatomy(arch).knobs}
    assert f"blocks.{place}.attn" not in knobs
    assert "blocks.2.attn" in knobs


def test_attention_between_stages_is_no_knob(helpers: ModuleType) -> None:
    arch = levit_arch(helpers, (True, True))
    with pytest.raises(ArchError, match="attn"):
        arch.without(["stages.1.downsample.attn"])
    assert {k.width for k in anatomy(arch).knobs if k.kind == "blocks"} == {
        f"stages.{path}" for path in ("0.blocks.0.attn", "0.blocks.0.ffn", "1.blocks.0.attn", "1.blocks.0.ffn",
                                      "1.downsample.ffn")
    }  # fmt: skip


def test_anatomy_needs_no_weights() -> None:
    """A network of any size is taken apart on the meta device."""
    parts = anatomy(search_spaces.get_arch("sepvit_base"))
    assert all(parameter.is_meta for gate in parts.gates.values() for parameter in gate.parameters())
    assert {knob.kind for knob in parts.knobs} == {"ffn", "qk", "v", "heads", "embed", "blocks"}
    assert not any(isinstance(gate.mask, torch.Tensor) for gate in parts.gates.values())
    assert isinstance(next(iter(parts.gates.values())), nn.Module)
