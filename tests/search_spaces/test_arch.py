"""Reading Arch documents: round trips, and ArchError in one line for everything that is not one."""

from __future__ import annotations

import copy
import json
import math
import resource
import time
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import search_spaces
from search_spaces import Arch, ArchError
from search_spaces.registry import FAMILIES
from search_spaces.space import LEVELS, PARAMETERS

SETTINGS = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
SECONDS = 2.0
"""Processor time that reading and counting one small document may take."""


def rejected(text: str | bytes) -> str:
    """The one-line message with which a document is refused."""
    with pytest.raises(ArchError) as caught:
        Arch.from_json(text)
    return one_line(caught.value)


def one_line(error: ArchError) -> str:
    message = str(error)
    assert message
    assert message.isprintable(), message
    assert len(message) < 1000
    return message


def harmless(text: str | bytes) -> Arch | None:
    """Read and count a document in little time: an Arch, or None for one refused with ArchError."""
    start = time.process_time()
    try:
        arch = Arch.from_json(text)
        search_spaces.table(arch)
    except ArchError as error:
        one_line(error)
        arch = None
    assert time.process_time() - start < SECONDS
    return arch


# Round trips


@pytest.mark.parametrize("name", search_spaces.list_models())
def test_published_round_trip(name: str) -> None:
    arch = search_spaces.get_arch(name)
    again = Arch.from_json(arch.to_json())
    assert again == arch
    assert type(again) is type(arch)
    assert again.to_json() == arch.to_json()
    assert again.digest() == arch.digest()
    assert hash(again) == hash(arch)
    assert Arch.from_json(arch.to_json().encode()) == arch


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20, **SETTINGS)
@given(levels=st.lists(st.integers(0, LEVELS - 1), min_size=len(PARAMETERS), max_size=len(PARAMETERS)))
def test_points_of_the_space_round_trip(family: str, levels: list[int]) -> None:
    arch = FAMILIES[family].space.decode(dict(zip(PARAMETERS, levels, strict=True)), 10)
    assert Arch.from_json(arch.to_json()) == arch


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(20))
def test_irregular_round_trip(family: str, seed: int, helpers: ModuleType) -> None:
    arch = helpers.random_arch(family, seed)
    assert Arch.from_json(arch.to_json()) == arch
    assert len(arch.summary()) >= 1


def test_digest_tells_documents_apart() -> None:
    archs = [search_spaces.get_arch(name) for name in search_spaces.list_models()]
    assert len({arch.digest() for arch in archs}) == len(archs)
    arch = archs[0]
    assert arch.replace(num_classes=10).digest() != arch.digest()
    assert arch.replace(num_classes=10).replace(num_classes=arch.num_classes) == arch


def test_replace_validates() -> None:
    with pytest.raises(ArchError, match="num_classes"):
        search_spaces.get_arch("levit_128s").replace(num_classes=0)
    with pytest.raises(ArchError, match="patch_size"):
        search_spaces.get_arch("deit_tiny").replace(resolution=225)


# Fuzzing

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=30)
    | st.sampled_from([0, -1, 1, 2, 8192, 8193, 2**31, 2**63, 2**64, -0.0, 1e308, math.nan, math.inf, "", "levit"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=100, **SETTINGS)
@given(st.binary(max_size=200) | st.text(max_size=200))
def test_arbitrary_text(text: str | bytes) -> None:
    rejected(text)


@settings(max_examples=100, **SETTINGS)
@given(values, st.sampled_from([*FAMILIES, "vit", ""]), st.dictionaries(st.text(max_size=12), values, max_size=4))
def test_arbitrary_json(value: Any, family: str, extra: dict[str, Any]) -> None:
    rejected(json.dumps(value))
    rejected(json.dumps({"family": family, **extra}))


def paths(node: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a document."""
    found = [at] if at else []
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        found += paths(value, (*at, key))
    return found


def mutate(raw: Any, data: st.DataObject) -> Any:
    """The document with one fault (or harmless change) at a random place."""
    raw = copy.deepcopy(raw)
    path = data.draw(st.sampled_from(paths(raw)))
    node = raw
    for key in path[:-1]:
        node = node[key]
    key, action = path[-1], data.draw(st.sampled_from(["delete", "replace", "number", "extra", "repeat", "swap"]))
    if action == "delete":
        del node[key]
    elif action == "replace":
        node[key] = data.draw(values)
    elif action == "number" and isinstance(node[key], int | float):
        node[key] = data.draw(
            st.sampled_from([-node[key], 0, node[key] + 1, node[key] * 1000, float(node[key]), str(node[key])])
            | st.integers(-3, 9000)
            | st.floats()
        )
    elif action == "extra":
        holder = node if isinstance(node, dict) else raw
        holder[data.draw(st.text(max_size=20))] = data.draw(values)
    elif action == "repeat" and isinstance(node[key], list):
        node[key] = node[key] * data.draw(st.sampled_from([0, 2, 7, 70]))
    elif action == "swap":
        other = data.draw(st.sampled_from(paths(raw)))
        taken = raw
        for step in other:
            taken = taken[step]
        node[key] = copy.deepcopy(taken)
    return raw


def check_mutants(family: str, data: st.DataObject, helpers: ModuleType) -> None:
    raw = helpers.document(helpers.random_arch(family, data.draw(st.integers(0, 30))))
    for _ in range(data.draw(st.integers(1, 3))):
        raw = mutate(raw, data) if paths(raw) else raw
    arch = harmless(json.dumps(raw))
    if arch is not None:
        assert Arch.from_json(arch.to_json()) == arch


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20, **SETTINGS)
@given(data=st.data())
def test_mutated_documents(family: str, data: st.DataObject, helpers: ModuleType) -> None:
    check_mutants(family, data, helpers)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=1000, **{**SETTINGS, "derandomize": False})
@given(data=st.data())
def test_many_mutated_documents(family: str, data: st.DataObject, helpers: ModuleType) -> None:
    check_mutants(family, data, helpers)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=30, **SETTINGS)
@given(data=st.data())
def test_damaged_text(family: str, data: st.DataObject, helpers: ModuleType) -> None:
    """Truncated, or with a few bytes replaced."""
    text = bytearray(helpers.random_arch(family, data.draw(st.integers(0, 9))).to_json().encode())
    if data.draw(st.booleans()):
        rejected(bytes(text[: data.draw(st.integers(0, len(text) - 3))]))
        return
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    harmless(bytes(text))


@pytest.mark.parametrize("depth", [100, 10_000, 1_000_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"stages":', "}")])
def test_deep_nesting(depth: int, opening: str, closing: str) -> None:
    rejected(opening * depth)
    rejected(opening * depth + "1" + closing * depth)
    if depth == 100:
        raw = json.loads(search_spaces.get_arch("levit_128s").to_json())
        raw["stages"] = json.loads("[" * depth + "]" * depth)
        assert rejected(json.dumps(raw)).startswith("stages")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "7",
        "{}",
        "[]",
        '"levit"',
        "NaN",
        "9" * 5000,
        '{"family": "levit"',
        '{"family": "\\ud800"}',
        '{"family": "levit", "version": 1e999}',
        '{"family": "levit", "a\\nb": 1}',
        "\ufeff{}",
        b"\xff\xfe{\x00}\x00",
        b"\x00" * 50,
        b"\x80",
    ],
)
def test_odd_texts(text: str | bytes) -> None:
    rejected(text)


# Faults a person makes


def edited(name: str, *path: Any, value: Any) -> str:
    """A published document with the value at `path` replaced."""
    raw = json.loads(search_spaces.get_arch(name).to_json())
    node = raw
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return json.dumps(raw)


EMBED = ("stages", 1, "embed_dim")
BLOCK = ("stages", 1, "blocks", 0)


@pytest.mark.parametrize("value", [0, -1, -(2**70), 8193, 10**12, 2**70, 128.5, 128.0, "128", None, True, [128], {}])
def test_dims_that_are_none(value: Any) -> None:
    assert "stages.1.embed_dim" in rejected(edited("levit_128s", *EMBED, value=value))


@pytest.mark.parametrize("value", [0, -0.5, 1.0001, math.nan, math.inf, "1", None])
def test_keep_rates_that_are_none(value: Any) -> None:
    assert "keep_rate" in rejected(edited("evit_tiny_keep70", "blocks", 3, "keep_rate", value=value))


@pytest.mark.parametrize("value", [2, 0, "1", None, 1.5])
def test_other_versions(value: Any) -> None:
    assert "version" in rejected(edited("levit_128s", "version", value=value))


def test_unknown_family_names_the_known_ones() -> None:
    message = rejected(edited("levit_128s", "family", value="levitt"))
    assert all(family in message for family in FAMILIES)


@pytest.mark.parametrize("name", ["levit_128s", "efficientvit_m0", "shvit_s1", "deit_tiny", "sepvit_lite"])
def test_every_key_is_needed_and_no_other_is_known(name: str) -> None:
    raw = json.loads(search_spaces.get_arch(name).to_json())
    for path in paths(raw):
        if not isinstance(path[-1], str) or any(step not in (0, *path[:1]) for step in path if isinstance(step, int)):
            continue
        for missing in (True, False):
            damaged = copy.deepcopy(raw)
            node = damaged
            for key in path[:-1]:
                node = node[key]
            if missing:
                del node[path[-1]]
            else:
                node[path[-1] + "_"] = 1
            assert path[-1] in rejected(json.dumps(damaged))


@pytest.mark.parametrize(
    ("name", "path", "value", "named"),
    [
        # the cascade: head 0's values are added to head 1's channels
        ("efficientvit_m0", (*BLOCK, "attn", "heads", 0, "value_dim"), 31, "value_dim is 31"),
        ("efficientvit_m0", (*BLOCK, "attn", "heads", 1, "dim"), 31, "heads.0"),
        ("efficientvit_m0", (*BLOCK, "attn", "heads", 3, "offset"), 120, "embed_dim"),
        ("efficientvit_m0", (*BLOCK, "attn", "heads"), [], "heads"),
        ("efficientvit_m0", (*BLOCK, "attn", "heads", 0, "kernel"), 4, "kernel"),
        ("efficientvit_m0", (*BLOCK, "attn", "window"), 0, "window"),
        ("efficientvit_m0", ("stages", 1, "downsample"), None, "stages.1.downsample"),
        ("shvit_s1", (*BLOCK, "attn", "dim"), 225, "attn.dim"),
        ("shvit_s1", ("stages", 2, "downsample"), None, "stages.2.downsample"),
        ("levit_128s", ("stages", 1, "downsample"), None, "stages.1.downsample"),
        ("levit_128s", ("stages", 0, "keep_rate"), 0.5, "stages.0.keep_rate"),
        ("levit_128s", ("stages", 1, "keep_rate"), 0.5, "stages.1.keep_rate"),
        ("levit_128s", ("stem",), [16, 32], "stem"),
        ("levit_128s", ("stages",), [], "stages"),
        ("deit_tiny", ("resolution",), 225, "patch_size"),
        ("deit_tiny", ("blocks",), [], "blocks"),
        ("sepvit_lite", (*BLOCK, "attn", "window"), 5, "window 5"),
        ("sepvit_lite", ("resolution",), 200, "window"),
        ("sepvit_lite", (*BLOCK, "attn", "residual"), [0, 1], "residual"),
        ("sepvit_lite", (*BLOCK, "attn", "heads"), 0, "heads"),
    ],
)
def test_inconsistent_blocks(name: str, path: tuple[Any, ...], value: Any, named: str) -> None:
    assert named in rejected(edited(name, *path, value=value))


def test_first_stage_with_a_downsampling() -> None:
    raw = json.loads(search_spaces.get_arch("levit_128s").to_json())
    raw["stages"][0]["downsample"] = raw["stages"][1]["downsample"]
    assert "stages.0.downsample" in rejected(json.dumps(raw))


def test_reduction_without_attention_is_refused() -> None:
    raw = json.loads(search_spaces.get_arch("evit_tiny_keep70").to_json())
    raw["blocks"][3]["attn"] = None
    assert "blocks.3.keep_rate" in rejected(json.dumps(raw))


def test_too_many_parameters_are_refused_before_they_are_made() -> None:
    raw = json.loads(search_spaces.get_arch("deit_base").to_json())
    raw["embed_dim"] = 8192
    raw["blocks"] = raw["blocks"] * 4
    arch = Arch.from_json(json.dumps(raw))
    for build in (search_spaces.table, search_spaces.create_model):
        with pytest.raises(ArchError, match="parameters") as caught:
            build(arch)
        one_line(caught.value)


def test_a_large_document_takes_little_memory() -> None:
    """A deep network on a large grid: few parameters, a thousand tokens in each of 64 blocks."""
    raw = json.loads(search_spaces.get_arch("levit_128s").to_json())
    tiny = {"heads": 1, "key_dim": 1, "value_dim": 1, "scale": 1.0}
    raw["resolution"] = 512
    raw["stages"] = raw["stages"][:1]
    raw["stages"][0] |= {"embed_dim": 8, "blocks": [{"attn": tiny, "ffn": {"hidden": 8, "keep_rate": 1.0}}] * 64}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert harmless(json.dumps(raw)) is not None
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 * 1024, f"{grown // 1024} MiB to count a network of {len(raw['stages'][0]['blocks'])} blocks"
