"""The search axes: every point can be built, published networks are points, names are shared."""

from __future__ import annotations

import dataclasses
import random
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import search_spaces
from search_spaces import Arch, ArchError
from search_spaces.registry import FAMILIES
from search_spaces.space import LEVELS, PARAMETERS, Space, fingerprint, with_attention

VARIANTS = [(family.name, name) for family in FAMILIES.values() for name in family.variants]
MIDDLE = dict.fromkeys(PARAMETERS, LEVELS // 2)
SHALLOW = MIDDLE | {name: 0 for name in PARAMETERS if name.startswith("depth")}
DEEP = MIDDLE | {"form": 0} | {name: LEVELS - 1 for name in PARAMETERS if name.startswith("depth")}


def points(space: Space, count: int, corners: tuple[int, ...]) -> list[dict[str, int]]:
    """The corners of single parameters, both ends of all, and random points."""
    rng = random.Random(7)
    found = [dict.fromkeys(PARAMETERS, level) for level in (0, LEVELS - 1)]
    found += [SHALLOW | {name: level} for name in space.options for level in corners]
    found += [{name: rng.randrange(LEVELS) for name in PARAMETERS} for _ in range(count)]
    return found


def check_points(family: str, count: int, corners: tuple[int, ...]) -> None:
    for params in points(FAMILIES[family].space, count, corners):
        arch = FAMILIES[family].space.decode(params, 10)
        assert arch.family == family
        assert arch.num_classes == 10
        table = search_spaces.table(arch)
        assert 0 < table.params() < 10**9
        assert table.macs() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_point_can_be_built(family: str) -> None:
    check_points(family, 3, (LEVELS - 1,))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_very_many_points_can_be_built(family: str) -> None:
    check_points(family, 400, (0, LEVELS - 1))


def check_running(family: str, count: int, helpers: ModuleType) -> None:
    rng = random.Random(11)
    for _ in range(count):
        params = {name: rng.randrange(LEVELS) for name in PARAMETERS}
        params |= {name: rng.randrange(3) for name in PARAMETERS if name.startswith("width") or name == "resolution"}
        arch = FAMILIES[family].space.decode(params, 10)
        model = helpers.build(arch, 1, torch.float32)
        with torch.no_grad():
            found = model(helpers.image(arch, 2, dtype=torch.float32))
        assert found.shape == (2, 10)
        assert found.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_random_points_run(family: str, helpers: ModuleType) -> None:
    check_running(family, 1, helpers)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_many_random_points_run(family: str, helpers: ModuleType) -> None:
    check_running(family, 25, helpers)


@pytest.mark.parametrize(("family", "name"), VARIANTS)
def test_published_networks_are_points(family: str, name: str) -> None:
    space = FAMILIES[family].space
    params = space.encode(FAMILIES[family].variants[name].values)
    assert list(params) == list(PARAMETERS)
    assert all(isinstance(level, int) and 0 <= level < LEVELS for level in params.values())
    assert space.decode(params, 1000) == search_spaces.get_arch(name)
    assert space.decode(params, 10) == search_spaces.get_arch(name, 10)


@pytest.mark.parametrize("family", FAMILIES)
def test_encode_undoes_decode(family: str) -> None:
    """Every option of every parameter can be reached and is found again."""
    space = FAMILIES[family].space
    first = {name: options[0] for name, options in space.options.items()}
    for name, options in space.options.items():
        for option in options:
            params = space.encode(first | {name: option})
            assert options[params[name] * len(options) // LEVELS] == option
            assert space.decode(params, 10) == space.arch(first | {name: option}, 10)


def test_values_outside_the_space_are_refused() -> None:
    family = FAMILIES["levit"]
    with pytest.raises(ValueError, match="100"):
        family.space.encode({**family.variants["levit_128s"].values, "width_s1": 100})


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_shared(family: str) -> None:
    """All parameters have one name and one range in every family, which ignores those it has no use for."""
    space = FAMILIES[family].space
    assert set(space.options) <= set(PARAMETERS)
    assert all(2 <= len(options) <= LEVELS for options in space.options.values())
    assert all(len(set(options)) == len(options) for options in space.options.values())
    for name in PARAMETERS:
        changed = {space.decode(DEEP | {name: level}, 10) for level in range(LEVELS)}
        assert (len(changed) > 1) == (name in space.options), name


@pytest.mark.parametrize("family", FAMILIES)
def test_all_five_axes_are_searched(family: str) -> None:
    axes = {name.split("_")[0] for name in FAMILIES[family].space.options}
    assert axes >= {"width", "depth", "heads", "mix", "keep", "resolution"}


GROWING = ("resolution", "width", "depth", "keep")


@pytest.mark.parametrize("family", FAMILIES)
def test_options_are_ordered(family: str) -> None:
    """A higher level of these axes never means fewer multiply-accumulates."""
    space, base = FAMILIES[family].space, MIDDLE | {"form": 0}
    for name in space.options:
        if not name.startswith(GROWING):
            continue
        macs = [search_spaces.count(space.decode(base | {name: level}, 10)).macs for level in (0, 3, 6)]
        assert macs == sorted(macs), name
        assert macs[0] < macs[-1], name


@pytest.mark.parametrize("family", FAMILIES)
def test_keep_axis_reaches_every_stage(family: str) -> None:
    """At the lowest level every stage's keep parameter lowers the counted work."""
    space = FAMILIES[family].space
    full = DEEP | {name: LEVELS - 1 for name in PARAMETERS if name.startswith("keep")}
    most = search_spaces.table(space.decode(full, 10)).macs()
    for name in space.options:
        if name.startswith("keep"):
            assert search_spaces.table(space.decode(full | {name: 0}, 10)).macs() < most, name


def spaces() -> dict[str, Space]:
    return {name: family.space for name, family in FAMILIES.items()}


def test_fingerprint_changes_with_every_option() -> None:
    before = fingerprint(spaces())
    assert fingerprint(spaces()) == before
    assert fingerprint(dict(reversed(spaces().items()))) == before
    seen = {before}
    for family, space in spaces().items():
        for name, options in space.options.items():
            fewer: dict[str, Any] = {**space.options, name: options[1:]}
            turned = {**space.options, name: tuple(reversed(options))}
            without = {key: value for key, value in space.options.items() if key != name}
            for changed in (fewer, turned, without):
                seen.add(fingerprint(spaces() | {family: dataclasses.replace(space, options=changed)}))
        seen.add(fingerprint({key: value for key, value in spaces().items() if key != family}))
    assert len(seen) == 1 + sum(3 * len(space.options) + 1 for space in spaces().values())


@pytest.mark.parametrize(
    ("depth", "share", "wanted"),
    [
        (4, 1.0, [True] * 4),
        (4, 0.0, [False] * 4),
        (4, 0.5, [False, False, True, True]),
        (1, 0.34, [True]),
        (5, 0.34, [False, False, False, True, True]),
    ],
)
def test_share_of_blocks_with_attention(depth: int, share: float, wanted: list[bool]) -> None:
    assert with_attention(depth, share) == wanted


def test_list_models_is_what_was_published() -> None:
    names = search_spaces.list_models()
    assert len(names) == len(set(names)) == 52
    for name in names:
        assert search_spaces.get_arch(name).num_classes == 1000
        assert search_spaces.get_arch(name, 7).num_classes == 7


def test_published_top1() -> None:
    """Every top-1 stated has a source; those nobody published are absent, not guessed."""
    found = {name: variant for family in FAMILIES.values() for name, variant in family.variants.items()}
    wanted = {
        "levit_128s": 76.6, "levit_128": 78.6, "levit_192": 80.0, "levit_256": 81.6, "levit_384": 82.6,
        "efficientvit_m0": 63.2, "efficientvit_m1": 68.4, "efficientvit_m2": 70.8, "efficientvit_m3": 73.4,
        "efficientvit_m4": 74.3, "efficientvit_m5": 77.1, "shvit_s1": 72.8, "shvit_s2": 75.2, "shvit_s3": 77.4,
        "shvit_s4": 79.4, "deit_tiny": 72.2, "deit_small": 79.8, "deit_base": 81.8, "evit_small_keep90": 79.8,
        "evit_small_keep80": 79.8, "evit_small_keep70": 79.5, "evit_small_keep60": 78.9, "evit_small_keep50": 78.5,
        "evit_small_keep90_drop": 79.9, "evit_small_keep80_drop": 79.7, "evit_small_keep70_drop": 79.4,
        "evit_small_keep60_drop": 79.1, "evit_small_keep50_drop": 78.4, "evit_base_keep70": 81.3,
        "sepvit_lite": 72.3, "sepvit_tiny": 82.7, "sepvit_small": 83.6, "sepvit_base": 84.2,
    }  # fmt: skip
    assert {name: variant.top1 for name, variant in found.items() if variant.top1 is not None} == wanted
    assert all(variant.source for variant in found.values())


# Other resolutions


def runs(arch: Arch, helpers: ModuleType) -> None:
    """Both forms of a network take two images and tell them apart."""
    model = helpers.build(arch, 1, torch.float32)
    with torch.no_grad():
        x = helpers.image(arch, 2, dtype=torch.float32)
        for form in (model, search_spaces.fold(model)):
            found = form(x)
            assert found.shape == (2, arch.num_classes)
            assert found.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=4, deadline=None, database=None, derandomize=True)
@given(
    levels=st.lists(st.integers(0, LEVELS - 1), min_size=len(PARAMETERS), max_size=len(PARAMETERS)),
    resolution=st.sampled_from(range(32, 513, 32)),
)
def test_every_point_at_every_multiple_of_32(family: str, levels: list[int], resolution: int) -> None:
    """It is the network the family would have made had the trial said that resolution."""
    space, params = FAMILIES[family].space, dict(zip(PARAMETERS, levels, strict=True))
    arch = space.decode(params, 10, resolution)
    values = {name: options[params[name] * len(options) // LEVELS] for name, options in space.options.items()}
    assert arch == space.arch(values | {"resolution": resolution}, 10)
    assert search_spaces.table(arch).params() > 0
    assert space.decode(params, 10).at(resolution) == arch


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("resolution", [32, pytest.param(64, marks=pytest.mark.slow), 96])
def test_small_images_run(family: str, resolution: int, helpers: ModuleType) -> None:
    """Forwards and backwards, down to a grid of one position."""
    params = MIDDLE | {name: 0 for name in PARAMETERS if name.startswith("width")}
    arch = FAMILIES[family].space.decode(params, 10, resolution)
    runs(arch, helpers)
    model = helpers.build(arch).train()
    model(helpers.image(arch, 4)).square().sum().backward()
    assert all(value.grad.isfinite().all() for value in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "resolution", [32, 160, *(pytest.param(px, marks=pytest.mark.slow) for px in (64, 96, 128, 224))]
)
def test_published_networks_at_other_resolutions(family: str, resolution: int, helpers: ModuleType) -> None:
    """Only what the resize rule covers (bias tables, positions, window tokens) differs."""
    name = helpers.SMALLEST[family]
    variant, arch = FAMILIES[family].variants[name], search_spaces.get_arch(name)
    found = arch.at(resolution)
    assert found == FAMILIES[family].space.arch(variant.values | {"resolution": resolution}, 1000)
    assert found.at(arch.resolution) == arch
    before, after = (search_spaces.table(a).widths() for a in (arch, found))
    assert before.keys() == after.keys()
    assert [w for w in before if before[w].rule != "resize" and before[w] != after[w]] == []


def test_windows_follow_the_grids() -> None:
    """SepViT at 64 px has grids of 16, 8, 4 and 2: as many windows as at 224 px, so the same window tokens."""
    arch = search_spaces.get_arch("sepvit_lite").at(64)
    windows = [[block.attn.window for block in stage.blocks] for stage in arch.stages]
    assert windows == [[2], [2, 4], [2, 4] * 3, [2, 2]]
    assert arch.stages[0].blocks[0].attn.heads == 1
    cascade = search_spaces.get_arch("efficientvit_m0").at(128)
    assert {block.attn.window for stage in cascade.stages for block in stage.blocks} == {4}


@pytest.mark.parametrize(
    ("name", "resolution", "match"),
    [
        ("sepvit_lite", 100, r"resolution 100: the 25 x 25 grid of stages\.0 cannot be cut into 8 x 8 windows"),
        ("deit_tiny", 72, "patch_size 16"),
        ("levit_128s", 8, "resolution"),
        ("sepvit_lite", 0, "."),
        ("efficientvit_m0", 0, "."),
        ("shvit_s1", 1024, "resolution"),
    ],
)
def test_resolutions_that_cannot_be(name: str, resolution: int, match: str) -> None:
    with pytest.raises(ArchError, match=match):
        search_spaces.get_arch(name).at(resolution)
    family = next(f for f, n in VARIANTS if n == name)
    with pytest.raises(ArchError, match=match):
        FAMILIES[family].space.decode(MIDDLE, 10, resolution)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(6))
def test_irregular_networks_at_other_resolutions(family: str, seed: int, helpers: ModuleType) -> None:
    arch = helpers.random_arch(family, seed)
    assert arch.at(arch.resolution) == arch
    wanted = 2 * arch.resolution
    found = arch.at(wanted)
    assert found.resolution == wanted
    runs(found, helpers)
