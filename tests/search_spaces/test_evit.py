"""EViT: token counts as tabulated, DeiT at keep 1.0, and a reference in plain loops over tokens."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import search_spaces
from search_spaces import Arch, ArchError
from search_spaces.arch import kept
from search_spaces.network import set_keep_progress
from search_spaces.registry import FAMILIES

FUSED = {90: (178, 162, 147), 80: (158, 128, 104), 70: (139, 99, 71), 60: (119, 73, 45), 50: (99, 51, 27)}
DROPPED = {90: (177, 160, 144), 80: (157, 126, 101), 70: (138, 97, 68), 60: (118, 71, 43), 50: (98, 49, 25)}
ROWS = [(keep, suffix, row) for suffix, table in (("", FUSED), ("_drop", DROPPED)) for keep, row in table.items()]


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
@pytest.mark.parametrize(("keep", "suffix", "row"), ROWS)
def test_token_counts(size: str, keep: int, suffix: str, row: tuple[int, int, int]) -> None:
    """The reductions are in the 0-based layers 3, 6 and 9."""
    first, second, third = row
    arch = search_spaces.get_arch(f"evit_{size}_keep{keep}{suffix}")
    assert arch.token_counts() == [196] * 3 + [first] * 3 + [second] * 3 + [third] * 3


@pytest.mark.parametrize(("keep", "suffix"), [(70, ""), (50, "_drop")])
def test_tokens_that_really_flow(keep: int, suffix: str) -> None:
    model = search_spaces.create_model(f"evit_tiny_keep{keep}{suffix}").eval()
    seen: list[int] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0].shape[1] - 1))
    with torch.no_grad():
        model(torch.randn(1, 3, 224, 224))
    assert seen == model.arch.token_counts()


def test_reduction_precedes_the_mlp() -> None:
    """In a reducing layer attention sees all tokens, the MLP only those that stay."""
    model = search_spaces.create_model("evit_tiny_keep50_drop").eval()
    seen: dict[str, int] = {}
    for part in ("attn", "ffn"):
        getattr(model.blocks[3], part).register_forward_hook(
            lambda _module, inputs, _output, part=part: seen.update({part: inputs[0].shape[1]})
        )
    with torch.no_grad():
        model(torch.randn(1, 3, 224, 224))
    assert seen == {"attn": 197, "ffn": 99}


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_keep_one_is_deit(size: str, helpers: ModuleType) -> None:
    """Whether it says fused or not, a keep rate of 1 leaves DeiT, with the same parameter names."""
    deit = helpers.randomise(search_spaces.create_model(f"deit_{size}").eval(), 1)
    raw = helpers.document(search_spaces.get_arch(f"evit_{size}_keep70"))
    for block in raw["blocks"]:
        block["keep_rate"] = 1.0
    model = search_spaces.create_model(helpers.read(raw)).eval()
    model.load_state_dict(deit.state_dict())
    x = helpers.image(224, 1, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(x), deit(x))


def test_keep_below_one_is_not_deit(helpers: ModuleType) -> None:
    deit = helpers.randomise(search_spaces.create_model("deit_tiny").eval(), 1)
    x = helpers.image(224, 2, dtype=torch.float32)
    outputs = [deit(x)]
    for name in ("evit_tiny_keep50", "evit_tiny_keep50_drop"):
        model = search_spaces.create_model(name).eval()
        model.load_state_dict(deit.state_dict())
        outputs.append(model(x))
    for i, found in enumerate(outputs):
        for wanted in outputs[:i]:
            assert helpers.error(found, wanted) > 1e-3


def test_float_trap() -> None:
    """ceil(rate * tokens) in exact decimal arithmetic, where binary rounding would give one more."""
    assert math.ceil(0.55 * 100) == 56  # what the trap looks like
    assert kept(0.55, 100) == 55
    for percent in range(1, 101):
        for tokens in (*range(1, 40), 49, 64, 100, 196, 256, 324, 361, 576, 1024, 4096):
            assert kept(percent / 100, tokens) == math.ceil(Fraction(percent, 100) * tokens), (percent, tokens)


# The schedule of keep rates


def flow(model: nn.Module, x: Tensor) -> list[int]:
    """Tokens leaving each block, the class token not counted."""
    seen: list[int] = []
    handles = [
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0].shape[1] - 1))
        for block in model.blocks
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("suffix", ["", "_drop"])
def test_token_counts_along_the_schedule(suffix: str, helpers: ModuleType) -> None:
    """At each progress the tokens are those of an Arch whose rate is half a cosine on its way from 1 to 0.5."""
    model = search_spaces.create_model(f"evit_tiny_keep50{suffix}")
    raw, x = helpers.document(model.arch), torch.randn(1, 3, 224, 224)
    first = []
    for progress in (-1, 0, 0.25, 0.5, 0.8, 1, 7):
        set_keep_progress(model, progress)
        rate = 0.5 + 0.5 * (1 + math.cos(math.pi * min(1, max(0, progress)))) / 2
        for block in (raw["blocks"][i] for i in (3, 6, 9)):
            block["keep_rate"] = rate
        wanted = helpers.read(raw).token_counts()
        assert flow(model.train(), x) == wanted
        assert flow(model.eval(), x) == model.arch.token_counts()
        first.append(wanted[3] - (suffix == "" and wanted[3] < 196))
    assert first == [196, 196, 182, 147, 108, 98, 98]


def test_each_block_goes_to_its_own_rate(helpers: ModuleType) -> None:
    """Halfway, a block has come half of its own way."""
    attn = {"heads": 1, "key_dim": 4, "value_dim": 4, "scale": 0.5}
    blocks = [{"attn": attn, "keep_rate": rate, "fuse": False, "ffn": None} for rate in (0.8, 1.0, 0.4)]
    arch = helpers.random_arch("evit", 0, resolution=80, patch_size=8, blocks=blocks)
    model = helpers.build(arch).train()
    set_keep_progress(model, 0.5)
    assert flow(model, helpers.image(arch)) == [90, 90, 63]


@pytest.mark.parametrize("fuse", [True, False])
def test_schedule_begins_as_deit_and_ends_as_it_was(fuse: bool, helpers: ModuleType) -> None:
    attn = {"heads": 2, "key_dim": 4, "value_dim": 6, "scale": 0.5}
    blocks = [{"attn": attn, "keep_rate": r, "fuse": fuse, "ffn": {"hidden": 20}} for r in (1.0, 0.6, 0.5, 1.0)]
    arch = helpers.random_arch("evit", 0, resolution=64, patch_size=8, embed_dim=12, blocks=blocks)
    model, x = helpers.build(arch, 1), helpers.image(arch)
    deit = helpers.build(helpers.read(helpers.document(arch) | {"blocks": [b | {"keep_rate": 1.0} for b in blocks]}))
    deit.load_state_dict(model.state_dict())
    with torch.no_grad():
        reduced, whole = model(x), deit(x)
        assert helpers.error(reduced, whole) > 1e-3
        set_keep_progress(model, 0)
        assert torch.equal(model(x), reduced)  # in eval mode
        assert torch.equal(model.train()(x), whole)
        copied, folded = copy.deepcopy(model), search_spaces.fold(model)
        assert torch.equal(copied(x), whole)
        assert torch.equal(copied.eval()(x), reduced)
        assert torch.equal(folded(x), reduced)
        assert torch.equal(nn.Sequential(model).eval()(x), reduced)  # as a wrapper does
        set_keep_progress(nn.Sequential(model).train(), 1)
        assert torch.equal(model(x), reduced)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "evit"])
def test_other_families_have_no_schedule(family: str, helpers: ModuleType) -> None:
    arch = helpers.random_arch(family, 1)
    model, x = helpers.build(arch, 1), helpers.image(arch)
    helpers.calibrate(model, x, 1)
    with torch.no_grad():
        before = model(x)
        set_keep_progress(model, 0)
        assert torch.equal(model(x), before)


# A reference in plain loops, from the description of the mechanism.


def layer_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean()
    scaled = centred / math.sqrt(float(centred.square().mean()) + 1e-6)
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return state[f"{name}.weight"] @ x + state[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def mlp(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return linear(gelu(linear(x, state, f"{name}.fc1")), state, f"{name}.fc2")


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def reference(arch: Arch, state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Logits of one image (3, R, R). Where tokens have merged, `sizes` says of how many patches each is."""
    size = arch.patch_size
    side = arch.resolution // size
    weight = state["patch_embed.weight"].flatten(1)
    tokens = [state["cls_token"][0, 0]]
    for row in range(side):
        for column in range(side):
            patch = pixels[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
            tokens.append(weight @ patch.flatten() + state["patch_embed.bias"])
    tokens = [token + position for token, position in zip(tokens, state["pos_embed"][0], strict=True)]

    sizes = [1] * len(tokens)
    for i, block in enumerate(arch.blocks):
        if block.attn is not None:
            updates, scores, keys = attention(tokens, sizes, block.attn, state, f"blocks.{i}")
            tokens = [token + update for token, update in zip(tokens, updates, strict=True)]
            if block.merge:
                tokens, sizes = merging(tokens, sizes, keys, block)
            else:
                tokens, sizes = reduction(tokens, sizes, scores, block)
        if block.ffn is not None:
            tokens = [t + mlp(layer_norm(t, state, f"blocks.{i}.norm2"), state, f"blocks.{i}.ffn") for t in tokens]
    return linear(layer_norm(tokens[0], state, "norm"), state, "head")


def attention(
    tokens: list[Tensor], sizes: list[int], doc: Any, state: dict[str, Tensor], name: str
) -> tuple[list[Tensor], list[float], list[Tensor]]:
    """What each token gains, the class token's attention to each other token, and each token's key: means over heads.

    A token of n patches is attended to as n equal ones are.
    """
    heads, key_dim, value_dim = doc.heads, doc.key_dim, doc.value_dim
    qkv = [linear(layer_norm(token, state, f"{name}.norm1"), state, f"{name}.attn.qkv") for token in tokens]
    queries = [row[: heads * key_dim] for row in qkv]
    keys = [row[heads * key_dim : 2 * heads * key_dim] for row in qkv]
    values = [row[2 * heads * key_dim :] for row in qkv]
    gains, scores = [], [0.0] * (len(tokens) - 1)
    for i, query in enumerate(queries):
        mixed = []
        for head in range(heads):
            q = query[head * key_dim : (head + 1) * key_dim]
            logits = [float(q @ key[head * key_dim : (head + 1) * key_dim]) * doc.scale for key in keys]
            weights = softmax([logit + math.log(size) for logit, size in zip(logits, sizes, strict=True)])
            pairs = zip(weights, values, strict=True)
            mixed.append(sum(w * value[head * value_dim : (head + 1) * value_dim] for w, value in pairs))
            if i == 0:
                scores = [score + weight / heads for score, weight in zip(scores, weights[1:], strict=True)]
        gains.append(linear(torch.cat(mixed), state, f"{name}.attn.proj"))
    return gains, scores, [key.view(heads, key_dim).mean(0) for key in keys]


def reduction(
    tokens: list[Tensor], sizes: list[int], scores: list[float], block: Any
) -> tuple[list[Tensor], list[int]]:
    """The class token, the ceil(rate * others) best of the others, and the raw weighted sum of the rest."""
    others = tokens[1:]
    keep = math.ceil(Fraction(str(block.keep_rate)) * len(others))
    if keep == len(others):
        return tokens, sizes
    order = sorted(range(len(others)), key=lambda j: -scores[j])
    reduced, kept_sizes = [tokens[0]] + [others[j] for j in order[:keep]], [1] + [sizes[1 + j] for j in order[:keep]]
    if block.fuse:
        reduced.append(sum(scores[j] * others[j] for j in order[keep:]))
        kept_sizes.append(1)
    return reduced, kept_sizes


def merging(tokens: list[Tensor], sizes: list[int], keys: list[Tensor], block: Any) -> tuple[list[Tensor], list[int]]:
    """ToMe: of the tokens 1, 2, 3, ... after the class token, 2, 4, ... are each linked to the one of 1, 3, ... whose
    key is most like theirs; the closest links merge until ceil(rate * others) are left."""
    others = len(tokens) - 1
    count = others - math.ceil(Fraction(str(block.keep_rate)) * others)
    if count == 0:
        return tokens, sizes
    links = []
    for a in range(2, others + 1, 2):
        alike = {b: float(keys[a] @ keys[b] / keys[a].norm() / keys[b].norm()) for b in range(1, others + 1, 2)}
        b = max(alike, key=lambda b, alike=alike: alike[b])
        links.append((alike[b], a, b))
    links.sort(reverse=True)
    into = {a: b for _, a, b in links[:count]}
    totals = {b: sizes[b] * tokens[b] for b in range(1, others + 1, 2)}
    merged = {b: sizes[b] for b in totals}
    for a, b in into.items():
        totals[b] = totals[b] + sizes[a] * tokens[a]
        merged[b] += sizes[a]
    left = [0] + [a for a in range(2, others + 1, 2) if a not in into]
    return (
        [tokens[j] for j in left] + [totals[b] / merged[b] for b in totals],
        [sizes[j] for j in left] + list(merged.values()),
    )


@pytest.mark.parametrize("seed", range(25))
def test_equals_the_reference(seed: int, helpers: ModuleType) -> None:
    helpers.assert_equals_reference(reference, helpers.random_arch("evit", seed), seed)


WAYS = {"dropped": {"fuse": False}, "fused": {"fuse": True}, "merged": {"fuse": False, "merge": True}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rates", [(0.5, 0.5, 0.5), (0.9, 0.7, 0.3), (1.0, 0.55, 1.0), (0.35, 0.35, 0.05)])
@pytest.mark.parametrize(("resolution", "embed", "heads"), [(32, 12, 1), (40, 16, 4)])
def test_schedules_equal_the_reference(
    way: str, rates: tuple[float, ...], resolution: int, embed: int, heads: int, helpers: ModuleType
) -> None:
    """Uniform layers, repeated reductions: a fused token is an ordinary candidate at the next one."""
    if way == "merged":
        rates = tuple(max(rate, 0.5) for rate in rates)
    attn = {"heads": heads, "key_dim": embed // heads, "value_dim": embed // heads, "scale": (embed / heads) ** -0.5}
    blocks = [{"attn": attn, "keep_rate": r, "ffn": {"hidden": 4 * embed}, **WAYS[way]} for r in (*rates, 1.0)]
    arch = helpers.random_arch("evit", 0, resolution=resolution, patch_size=8, embed_dim=embed, blocks=blocks)
    helpers.assert_equals_reference(reference, arch, 5)


@pytest.mark.parametrize("fuse", [True, False])
def test_of_tied_patches_the_first_are_kept(fuse: bool, helpers: ModuleType) -> None:
    """The class token heeds all alike: the queries are zero."""
    attn = {"heads": 2, "key_dim": 4, "value_dim": 4, "scale": 0.5}
    block = {"attn": attn, "keep_rate": 0.5, "fuse": fuse, "ffn": None}
    arch = helpers.random_arch("evit", 0, resolution=64, patch_size=4, embed_dim=8, blocks=[block])
    model = helpers.build(arch, 0)
    model.blocks[0].attn.qkv.weight.data[:8] = model.blocks[0].attn.qkv.bias.data[:8] = 0
    with torch.no_grad():
        tokens = model.tokens(helpers.image(arch, 2))
        whole, _ = model.blocks[0].attn(model.blocks[0].norm1(tokens), False)
        found, _ = model.blocks[0](tokens)
    assert torch.allclose(found[:, :129], (tokens + whole)[:, :129])
    assert found.shape[1] == 129 + fuse


# Merging (ToMe)


def merging_arch(helpers: ModuleType, *rates: float) -> Arch:
    """64 patches; a last block attends to what is left."""
    attn = {"heads": 2, "key_dim": 6, "value_dim": 5, "scale": 0.4}
    blocks = [{"attn": attn, "keep_rate": rate, "ffn": {"hidden": 20}, **WAYS["merged"]} for rate in (*rates, 1.0)]
    return helpers.random_arch("evit", 0, resolution=64, patch_size=8, embed_dim=12, num_classes=5, blocks=blocks)


def whole_of(helpers: ModuleType, arch: Arch) -> Arch:
    """The same blocks, all tokens kept."""
    return helpers.read(helpers._replaced(helpers.document(arch), "keep_rate", 1.0))


def test_merging_at_keep_one_is_deit(helpers: ModuleType) -> None:
    arch = whole_of(helpers, merging_arch(helpers, 0.5))
    plain = helpers.read(helpers._replaced(helpers.document(arch), "merge", False))
    model, deit, x = helpers.build(arch), helpers.build(plain, 1), helpers.image(arch)
    model.load_state_dict(deit.state_dict())
    assert search_spaces.table(arch) == search_spaces.table(plain)
    with torch.no_grad():
        assert torch.equal(model(x), deit(x))


@pytest.mark.parametrize("rates", [(0.6,), (0.8, 0.7)])
def test_equal_tokens_merge_without_a_trace(rates: tuple[float, ...], helpers: ModuleType) -> None:
    """Proportional attention is exact where what merges is equal: patches of four colours, positions that say nothing.

    Of each colour 8 patches are on even and 8 on odd positions, more than either reduction takes of all.
    """
    arch = merging_arch(helpers, *rates)
    model, whole = helpers.build(arch, 3), helpers.build(whole_of(helpers, arch))
    model.pos_embed.data[:] = model.pos_embed.data[:, 1:2]
    whole.load_state_dict(model.state_dict())
    colours = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = nn.functional.interpolate(colours, size=64)
    with torch.no_grad():
        assert helpers.error(model(x), whole(x)) < 1e-5
        assert helpers.error(model(helpers.image(arch)), whole(helpers.image(arch))) > 1e-3


def test_merging_counts_its_products(helpers: ModuleType) -> None:
    """Of 64 patches 32 are on even positions and 25 merge: keys of 6 dims are compared, tokens of 12 added up."""
    arch = merging_arch(helpers, 0.6)
    dropped = helpers.read(helpers._replaced(helpers.document(arch), "merge", False))
    more = search_spaces.table(arch).macs() - search_spaces.table(dropped).macs()
    assert more == 32 * 32 * 6 + 32 * 25 * 12


def test_images_merge_for_themselves(helpers: ModuleType) -> None:
    arch = merging_arch(helpers, 0.7, 0.5)
    model, x = helpers.build(arch, 1), helpers.image(arch, 4)
    with torch.no_grad():
        assert helpers.error(torch.cat([model(each[None]) for each in x]), model(x)) < 1e-10


def test_documents_from_before_merging(helpers: ModuleType) -> None:
    """They lack the field and mean what they meant: their text and digest are as they were."""
    arch = search_spaces.get_arch("evit_tiny_keep70")
    assert "merge" not in arch.to_json()
    assert arch.digest().startswith("b2ebad78b344")
    merging = merging_arch(helpers, 0.5)
    assert helpers.document(merging)["blocks"][0]["merge"] is True
    assert Arch.from_json(merging.to_json()) == merging


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fuse": True}, "blocks.1: tokens are either merged or fused"),
        ({"keep_rate": 0.49}, "blocks.1.keep_rate: merging keeps at least half"),
    ],
)
def test_what_cannot_be_merged(changes: dict[str, Any], words: str, helpers: ModuleType) -> None:
    raw = helpers.document(merging_arch(helpers, 1.0))
    raw["blocks"][1] |= changes
    with pytest.raises(ArchError, match=words):
        helpers.read(raw)


def test_the_space_merges_as_far_as_it_can() -> None:
    """At a keep rate of 0.4 half of the tokens merge."""
    space = FAMILIES["evit"].space
    values = {name: options[0] for name, options in space.options.items()}
    rates = {}
    for form in space.options["form"]:
        arch = space.arch(values | {"form": form}, 10)
        reducing = [block for block in arch.blocks if block.keep_rate < 1]
        rates[form] = [(block.keep_rate, block.fuse, block.merge) for block in reducing]
    assert rates == {
        "merged": [(0.5, False, True)] * 3,
        "fused": [(0.4, True, False)] * 3,
        "dropped": [(0.4, False, False)] * 3,
    }


def test_merging_trains_along_the_schedule(helpers: ModuleType) -> None:
    arch = merging_arch(helpers, 0.5, 0.6)
    model, x = helpers.build(arch, 1).train(), helpers.image(arch)
    for progress in (0, 0.5, 1):
        set_keep_progress(model, progress)
        model.zero_grad()
        model(x).square().sum().backward()
        assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())
    assert flow(model, x) == arch.token_counts() == [32, 20, 20]
