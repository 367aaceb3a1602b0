"""Parameters and MACs against the published integers, against the modules, and against fvcore."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from torch import nn

import search_spaces
from search_spaces.registry import FAMILIES
from search_spaces.space import random_params

# name: (parameters, MACs in millions with BatchNorm folded and attention counted)
PUBLISHED = {
    "levit_128s": (7_777_058, 304.7),
    "levit_128": (9_213_936, 405.3),
    "levit_192": (10_947_069, 657.0),
    "levit_256": (18_893_876, 1127.3),
    "levit_384": (39_128_836, 2351.8),
    "efficientvit_m0": (2_349_436, 79.2),
    "efficientvit_m1": (2_980_560, 167.1),
    "efficientvit_m2": (4_187_554, 201.0),
    "efficientvit_m3": (6_900_722, 262.7),
    "efficientvit_m4": (8_804_228, 299.3),
    "efficientvit_m5": (12_473_772, 521.6),
    "deit_tiny": (5_717_416, 1258),
    "deit_small": (22_050_664, 4608),
    "deit_base": (86_567_656, 17583),
    "shvit_s1": (6_330_808, 241.4),
    "shvit_s2": (11_483_072, 365.5),
    "shvit_s3": (14_245_273, 600.7),
    "shvit_s4": (16_588_484, 986.4),
    "sepvit_lite": (3_661_128, 573),
    "sepvit_tiny": (31_182_856, 4533),
    "sepvit_small": (46_570_504, 7476),
    "sepvit_base": (82_377_064, 13082),
}
EVIT_MACS = {
    ("tiny", ""): (1096, 946, 824, 718, 632),
    ("small", ""): (4030, 3484, 3036, 2641, 2314),
    ("small", "_drop"): (3996, 3451, 3003, 2614, 2287),
    ("base", ""): (15412, 13341, 11622, 10099, 8829),
    ("base", "_drop"): (15284, 13215, 11498, 9995, 8725),
}
PUBLISHED |= {
    f"evit_{size}_keep{keep}{suffix}": (PUBLISHED[f"deit_{size}"][0], macs)
    for (size, suffix), row in EVIT_MACS.items()
    for keep, macs in zip((90, 80, 70, 60, 50), row, strict=True)
}
PUBLISHED |= {f"evit_tiny_keep{keep}_drop": (5_717_416, None) for keep in (90, 80, 70, 60, 50)}  # no published MACs
ONE_HEAD = {
    "levit_128s": 7_391_290,
    "levit_128": 8_828_168,
    "levit_192": 10_561_301,
    "levit_256": 18_379_852,
    "levit_384": 38_358_300,
}
FOLDED = {
    "efficientvit_m0": 2_334_916,
    "efficientvit_m1": 2_964_256,
    "efficientvit_m2": 4_168_338,
    "efficientvit_m3": 6_875_890,
    "efficientvit_m4": 8_776_340,
    "efficientvit_m5": 12_436_260,
    "shvit_s1": 6_308_660,
    "shvit_s2": 11_453_508,
    "shvit_s3": 14_210_010,
    "shvit_s4": 16_546_248,
}
SMALLEST = ("levit_128s", "efficientvit_m0", "shvit_s1", "evit_tiny_keep70", "evit_tiny_keep70_drop", "sepvit_lite")


def every(names: Any, default: tuple[str, ...] = SMALLEST) -> list[Any]:
    """All names, those outside `default` marked slow."""
    return [name if name in default else pytest.param(name, marks=pytest.mark.slow) for name in names]


def module_params(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters())


def fvcore_macs(model: nn.Module, resolution: int) -> float:
    """fvcore's count of the folded model, plus scaled_dot_product_attention, which fvcore skips."""

    def attention(inputs: list[Any], outputs: list[Any]) -> int:
        *batch, queries, key_dim = get_shape(inputs[0])
        *_, keys, value_dim = get_shape(inputs[2])
        return int(torch.tensor(batch).prod()) * queries * keys * (key_dim + value_dim)

    counter = FlopCountAnalysis(search_spaces.fold(model), torch.zeros(1, 3, resolution, resolution))
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counter.set_op_handle("aten::scaled_dot_product_attention", attention)
    return counter.total()


def test_every_variant_has_its_published_row() -> None:
    assert sorted(PUBLISHED) == sorted(search_spaces.list_models())


@pytest.mark.parametrize("name", every(PUBLISHED))
def test_published_counts(name: str) -> None:
    params, macs = PUBLISHED[name]
    table = search_spaces.table(search_spaces.get_arch(name))
    assert table.params() == params
    assert macs is None or table.macs() == pytest.approx(macs * 1e6, rel=0.005)


@pytest.mark.parametrize("name", every(ONE_HEAD))
def test_levit_with_one_head(name: str) -> None:
    arch = search_spaces.get_arch(name).replace(distilled=False)
    assert search_spaces.table(arch).params() == ONE_HEAD[name]


@pytest.mark.parametrize("name", every(PUBLISHED))
def test_table_counts_the_module(name: str) -> None:
    arch = search_spaces.get_arch(name)
    with torch.device("meta"):
        model = FAMILIES[arch.family].build(arch)
    table = search_spaces.table(arch)
    assert table.params() == module_params(model)
    assert {e.name: e.shape for e in table.entries} == {n: tuple(v.shape) for n, v in model.state_dict().items()}
    trainable = dict(model.named_parameters())
    assert all(entry.trainable == (entry.name in trainable) for entry in table.entries)


@pytest.mark.parametrize("name", every(FOLDED))
def test_folded_parameters(name: str) -> None:
    """The figures keep the bias tables, which fold() turns into buffers."""
    model = search_spaces.create_model(name)
    tables = sum(value.numel() for key, value in model.named_parameters() if key.endswith("bias.table"))
    assert module_params(search_spaces.fold(model)) + tables == FOLDED[name]


@pytest.mark.parametrize("name", every(PUBLISHED, tuple(name for name in SMALLEST if not name.endswith("_drop"))))
def test_macs_against_fvcore(name: str) -> None:
    arch = search_spaces.get_arch(name)
    counted = fvcore_macs(search_spaces.create_model(arch), arch.resolution)
    if getattr(arch, "distilled", False):  # published with both heads, which fold() merges into one
        counted += arch.stages[-1].embed_dim * arch.num_classes
    assert search_spaces.table(arch).macs() == pytest.approx(counted, rel=1e-4)  # fusion's weighted sum is not ours


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(6))
def test_irregular_macs_against_fvcore(family: str, seed: int, helpers: ModuleType) -> None:
    """Every width is its own, so a width counted in place of another shows."""
    raw = helpers.document(helpers.random_arch(family, seed))
    if family == "evit":  # fvcore counts the fused token's weighted sum, the table (as published) does not
        raw["blocks"] = [block | {"fuse": False} for block in raw["blocks"]]
    if "distilled" in raw:  # fold() merges the two heads
        raw["distilled"] = False
    arch = helpers.read(raw)
    counted = fvcore_macs(helpers.build(arch, dtype=torch.float32), arch.resolution)
    table = search_spaces.table(arch)
    assert table.macs() == counted
    assert table.params() == module_params(helpers.build(arch))


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_count_as_the_built_network(family: str, helpers: ModuleType) -> None:
    """Every axis at random, and irregular documents, in which a width counted in place of another shows."""
    rng = np.random.default_rng(0)
    archs = [FAMILIES[family].space.decode(random_params(rng), 10) for _ in range(2)]
    archs += [helpers.random_arch(family, seed) for seed in range(4)]
    for arch in archs:
        table, stages = search_spaces.table(arch), search_spaces.stage_counts(arch)
        found = search_spaces.count(arch)
        assert (found.params, found.macs) == (table.params(), table.macs()), arch
        assert len(stages) == len(arch.summary())
        assert (sum(s.params for s in stages), sum(s.macs for s in stages)) == (found.params, found.macs)


@pytest.mark.parametrize("name", PUBLISHED)
def test_documents_count_as_published(name: str) -> None:
    params, macs = PUBLISHED[name]
    found = search_spaces.count(search_spaces.get_arch(name))
    assert found.params == params
    assert macs is None or found.macs == pytest.approx(macs * 1e6, rel=0.005)


def test_a_family_that_does_not_count_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = search_spaces.get_arch("shvit_s1")
    counted = search_spaces.count(arch)
    monkeypatch.setitem(FAMILIES, "shvit", replace(FAMILIES["shvit"], count=None))
    assert search_spaces.count(arch) == counted


def test_more_parameters_than_can_be_built_are_refused() -> None:
    arch = search_spaces.get_arch("deit_base").replace(embed_dim=8192)
    with pytest.raises(search_spaces.ArchError, match="are more than the 500,000,000 this tool builds"):
        search_spaces.count(arch)
