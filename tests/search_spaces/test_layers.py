"""Properties of the layers and of irregular networks that no published variant shows."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import search_spaces
from search_spaces import levit
from search_spaces.arch import Ffn, kept
from search_spaces.attention import AttentionBias, BakedBias
from search_spaces.efficientvit import Cascade, CascadedGroupAttention, CascadeHead
from search_spaces.layers import FeedForward
from search_spaces.registry import FAMILIES
from search_spaces.tokens import foremost, on_strongest, strongest, take_tokens
from search_spaces.weights import fit
from search_spaces.widths import Width

NORMS = nn.BatchNorm1d | nn.BatchNorm2d


# Irregular networks


def check_irregular(family: str, seed: int, helpers: ModuleType) -> None:
    """Eval equals folded; each image is by itself; every parameter learns."""
    arch = helpers.random_arch(family, seed)
    model = helpers.build(arch, seed)
    x = helpers.image(arch, 4, seed)
    helpers.calibrate(model, x, seed)
    folded = search_spaces.fold(model)
    with torch.no_grad():
        wanted = model(x)
        assert wanted.shape == (4, arch.num_classes)
        assert helpers.error(folded(x), wanted) < 1e-8
        alone = torch.cat([model(x[i : i + 1]) for i in range(4)])
        assert helpers.error(alone, wanted) < 1e-8
        assert torch.equal(model(x), wanted)  # fold() worked on a copy
    assert not any(isinstance(m, NORMS | AttentionBias) for m in folded.modules())
    assert not any(value.requires_grad for value in folded.parameters())

    model.train()
    model(x).square().sum().backward()
    for name, value in model.named_parameters():
        assert value.grad is not None, name
        assert value.grad.isfinite().all(), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(12))
def test_irregular_networks(family: str, seed: int, helpers: ModuleType) -> None:
    check_irregular(family, seed, helpers)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", range(0, 200, 50))
def test_many_irregular_networks(family: str, start: int, helpers: ModuleType) -> None:
    for seed in range(100 + start, 150 + start):
        check_irregular(family, seed, helpers)


def emptied(family: str, helpers: ModuleType) -> list[dict[str, Any]]:
    """Networks with parts absent: all attention, all FFNs, all blocks of a stage."""
    found = []
    for what in ("attn", "ffn", "blocks"):
        raw = helpers.document(search_spaces.get_arch(helpers.SMALLEST[family], 3).at(64))
        if family == "evit" and what == "blocks":
            continue
        for stage in raw.get("stages", [raw]):
            for block in stage["blocks"]:
                if what == "attn" and family == "evit":
                    block["keep_rate"] = 1.0
                if what == "ffn" and family == "efficientvit":
                    block |= {"before": [], "after": [{"conv": True, "ffn": None}]}
                else:
                    block[what] = None
        if what == "blocks":
            raw["stages"][1]["blocks"] = []
            for block in (block for stage in raw["stages"] for block in stage["blocks"]):
                del block["blocks"]
        found.append(raw)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_parts(family: str, helpers: ModuleType) -> None:
    for raw in emptied(family, helpers):
        arch = helpers.read(raw)
        model = search_spaces.create_model(arch).eval()
        assert search_spaces.table(arch).params() == sum(value.numel() for value in model.parameters())
        with torch.no_grad():
            x = torch.randn(1, 3, arch.resolution, arch.resolution)
            assert model(x).shape == search_spaces.fold(model)(x).shape == (1, 3)


@pytest.mark.parametrize("family", ["levit", "efficientvit", "shvit", "sepvit"])
def test_a_stage_without_blocks_has_no_idle_parameters(family: str, helpers: ModuleType) -> None:
    raw = helpers.document(helpers.random_arch(family, 1))
    raw["stages"][0]["blocks"] = []
    arch = helpers.read(raw)
    model = helpers.build(arch, 1)
    model(helpers.image(arch)).sum().backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


# Grids


def sides(model: nn.Module, x: Tensor) -> list[int]:
    """The grid's side after each stage."""
    found: list[int] = []

    def note(_module: nn.Module, _inputs: Any, out: Tensor) -> None:
        found.append(round(out.shape[1] ** 0.5) if out.ndim == 3 else out.shape[2])

    for stage in model.stages:
        stage.register_forward_hook(note)
    with torch.no_grad():
        model(x)
    return found


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("levit_128s", [14, 7, 4]),
        ("efficientvit_m0", [14, 7, 4]),
        ("shvit_s1", [14, 7, 4]),
        ("shvit_s4", [16, 8, 4]),
        ("sepvit_lite", [56, 28, 14, 7]),
    ],
)
def test_published_grids(name: str, wanted: list[int], helpers: ModuleType) -> None:
    model = search_spaces.create_model(name).eval()
    assert sides(model, helpers.image(model.arch, 1, dtype=torch.float32)) == wanted


@pytest.mark.parametrize("family", ["levit", "efficientvit", "shvit", "sepvit"])
def test_equal_neighbours_keep_their_downsampling(family: str, helpers: ModuleType) -> None:
    name = helpers.SMALLEST[family]
    raw = helpers.document(search_spaces.get_arch(name))
    for stage in raw["stages"]:
        stage["embed_dim"] = raw["stages"][-1]["embed_dim"]
    model = search_spaces.create_model(helpers.read(raw)).eval()
    x = helpers.image(224, 1, dtype=torch.float32)
    assert sides(model, x) == sides(search_spaces.create_model(name).eval(), x)


# Attention bias


def test_bias_of_every_pair_of_positions() -> None:
    for grid, stride in ((3, 1), (4, 2), (5, 2), (1, 1)):
        bias = AttentionBias("a", Width("heads", 2), grid, stride)
        nn.init.normal_(bias.table)
        found = bias()
        queries = [(y, x) for y in range(0, grid, stride) for x in range(0, grid, stride)]
        keys = [(y, x) for y in range(grid) for x in range(grid)]
        assert found.shape == (2, len(queries), len(keys))
        for i, (qy, qx) in enumerate(queries):
            for j, (ky, kx) in enumerate(keys):
                assert torch.equal(found[:, i, j], bias.table[:, abs(qy - ky) * grid + abs(qx - kx)])


@pytest.mark.parametrize("name", ["levit_128s", "efficientvit_m0"])
def test_no_stale_bias(name: str, helpers: ModuleType) -> None:
    """A table edited in eval mode acts at once; a folded model has its own copy."""
    model = helpers.randomise(search_spaces.create_model(name).double().eval(), 1)
    x = helpers.image(224, 3)
    helpers.calibrate(model, x, 1)
    with torch.no_grad():
        folded = search_spaces.fold(model)
        before = model(x)
        table = next(m for m in model.modules() if isinstance(m, AttentionBias)).table
        table += torch.randn_like(table)
        after = model(x)
        assert helpers.error(after, before) > 1e-3
        assert helpers.error(search_spaces.fold(model)(x), after) < 1e-8
        assert helpers.error(folded(x), before) < 1e-8
        table.zero_()
        assert helpers.error(model(x), after) > 1e-3


def test_folded_model_has_nothing_left_to_do() -> None:
    for name in ("levit_128s", "efficientvit_m0", "shvit_s1"):
        folded = search_spaces.fold(search_spaces.create_model(name))
        kinds = {type(module) for module in folded.modules()}
        assert not kinds & {nn.BatchNorm1d, nn.BatchNorm2d, AttentionBias}
        assert (BakedBias in kinds) == (name != "shvit_s1")
        assert not folded.training


# Tokens that are kept


@pytest.mark.parametrize(
    ("rate", "tokens", "wanted"),
    [(1.0, 49, 49), (0.5, 49, 25), (0.5, 196, 98), (0.7, 16, 12), (1e-9, 49, 1), (0.55, 100, 55), (0.9, 1, 1)],
)
def test_kept(rate: float, tokens: int, wanted: int) -> None:
    assert kept(rate, tokens) == wanted


@pytest.mark.parametrize("form", ["linear", "conv"])
@pytest.mark.parametrize("rate", [0.3, 0.5, 0.9])
def test_ffn_leaves_other_tokens_alone(form: str, rate: float, helpers: ModuleType) -> None:
    """The ceil(rate * N) tokens of largest norm go through the FFN, the rest stay to the last bit."""
    doc = Ffn(hidden=10, keep_rate=rate)
    part = helpers.randomise(FeedForward("f", doc, Width("e", 6), 25, nn.ReLU, form).double().eval(), 1)
    whole = FeedForward("f", Ffn(hidden=10, keep_rate=1.0), Width("e", 6), 25, nn.ReLU, form).double().eval()
    whole.load_state_dict(part.state_dict())
    x = torch.randn(3, 25, 6, dtype=torch.float64) * torch.rand(3, 25, 1, dtype=torch.float64)
    grid = x if form == "linear" else x.transpose(1, 2).reshape(3, 6, 5, 5)
    with torch.no_grad():
        found, full = part(grid), whole(grid)
    assert found.shape == grid.shape
    if form == "conv":
        found, full = found.flatten(2).transpose(1, 2), full.flatten(2).transpose(1, 2)
    for i in range(3):
        order = sorted(range(25), key=lambda t, i=i: -float(x[i, t].norm()))
        for rank, t in enumerate(order):
            if rank < kept(rate, 25):
                assert torch.allclose(found[i, t], full[i, t])
                assert not torch.allclose(found[i, t], x[i, t])
            else:
                assert torch.equal(found[i, t], x[i, t])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 1e-3, 5.0])
def test_of_tied_scores_the_first_win(value: float, dtype: torch.dtype) -> None:
    """Tied exactly, and tied but for what the order of summation does to the last bits."""
    scores = torch.full((1, 400), value, dtype=dtype)
    scores[0, 300:] += 1
    wanted = [*range(300, 400), *range(100)]
    assert foremost(scores, 200)[0].tolist() == wanted
    if dtype != torch.bfloat16:
        noise = torch.rand(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2**-22
        assert foremost((scores * (1 + noise)).to(dtype), 200)[0].tolist() == wanted


def test_tokens_that_equal_each_other_are_chosen_alike_at_any_width() -> None:
    """Masked channels are summed with the others, sliced ones are not."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        token, mask = torch.randn(24, generator=generator), torch.randint(0, 2, (24,), generator=generator)
        order = torch.stack([torch.randperm(24, generator=generator) for _ in range(64)])
        masked = (token * mask)[order].unsqueeze(0)  # each token is the same sum in another order
        assert strongest(masked, 30)[0].tolist() == list(range(30))


def test_on_strongest_is_differentiable() -> None:
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: on_strongest(t, 3, lambda rows: rows.sin() * 2), (x,))


def test_take_tokens_takes_each_images_own() -> None:
    x = torch.arange(24).view(2, 4, 3)
    index = torch.tensor([[3, 0], [1, 1]])
    assert torch.equal(take_tokens(x, index), torch.stack([x[0][index[0]], x[1][index[1]]]))
    assert torch.equal(strongest(torch.tensor([[[1.0], [-5.0], [3.0]]]), 2), torch.tensor([[1, 2]]))


def test_levit_attention_on_kept_tokens(helpers: ModuleType) -> None:
    """With some positions dropped, each image's bias follows its own positions."""
    doc = levit.Attn(heads=3, key_dim=4, value_dim=5, scale=0.6)
    attn = levit.Attention("a", doc, Width("e", 8), Width("e", 8), 4, 6, "linear").double().eval()
    helpers.randomise(attn, 2)
    index = torch.tensor([[3, 0, 15, 8, 7, 1], [2, 14, 5, 6, 9, 10]])
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    with torch.no_grad():
        found, projected = attn(x, index), attn.qkv(x)
        for i in range(2):
            mixed = torch.zeros(6, 15, dtype=torch.float64)
            for head in range(3):
                q, k, v = projected[i, :, head * 13 : (head + 1) * 13].split((4, 4, 5), dim=1)
                logits = q @ k.T * 0.6
                for a in range(6):
                    for b in range(6):
                        (ay, ax), (by, bx) = divmod(int(index[i, a]), 4), divmod(int(index[i, b]), 4)
                        logits[a, b] += attn.bias.table[head, abs(ay - by) * 4 + abs(ax - bx)]
                mixed[:, head * 5 : (head + 1) * 5] = logits.softmax(1) @ v
            wanted = x[i] + attn.proj(nn.functional.hardswish(mixed)[None])[0]
            assert torch.allclose(found[i], wanted, rtol=1e-9)


# LeViT's two forms


@pytest.mark.parametrize("seed", range(12))
def test_levit_forms_agree(seed: int, helpers: ModuleType) -> None:
    """Irregular blocks, FFN-token keep, and token drop in the last stage."""
    raw = helpers.document(helpers.random_arch("levit", seed))
    raw["stages"][-1]["keep_rate"] = (0.3, 0.6, 1.0)[seed % 3]
    linear, conv = (helpers.read(raw | {"form": form}) for form in ("linear", "conv"))
    first, second = helpers.build(linear, seed), helpers.build(conv)
    x = helpers.image(linear, 3, seed)
    helpers.calibrate(first, x, seed)
    fit(second, first.state_dict())
    with torch.no_grad():
        assert helpers.error(second(x), first(x)) < 1e-8
        assert helpers.error(search_spaces.fold(second)(x), first(x)) < 1e-8
        assert helpers.error(second.train()(x), first.train()(x)) < 1e-7
    counts = [search_spaces.table(arch) for arch in (linear, conv)]
    assert (counts[0].params(), counts[0].macs()) == (counts[1].params(), counts[1].macs())


def test_levit_token_drop_reaches_the_blocks(helpers: ModuleType) -> None:
    raw = helpers.document(search_spaces.get_arch("levit_128s"))
    raw["stages"][2]["keep_rate"] = 0.5
    for form in ("linear", "conv"):
        model = search_spaces.create_model(helpers.read(raw | {"form": form})).eval()
        shapes = []
        for block in model.stages[2].blocks:
            block.register_forward_hook(lambda _m, _i, out, shapes=shapes: shapes.append(tuple(out.shape)))
        with torch.no_grad():
            model(torch.randn(1, 3, 224, 224))
        assert shapes == [(1, 8, 384) if form == "linear" else (1, 384, 8, 1)] * 4


# EfficientViT's windows and cascade


@pytest.mark.parametrize(("grid", "window"), [(4, 4), (4, 7), (6, 3), (5, 2), (7, 3)])
def test_cascade_equals_a_reference(grid: int, window: int, helpers: ModuleType) -> None:
    """Head by head and window by window; padding at the right and bottom, cropped after."""
    heads = (
        CascadeHead(offset=0, dim=3, key_dim=2, value_dim=4, kernel=3, scale=0.5),
        CascadeHead(offset=4, dim=4, key_dim=3, value_dim=2, kernel=5, scale=0.7),
        CascadeHead(offset=1, dim=2, key_dim=4, value_dim=5, kernel=1, scale=0.9),
    )
    doc = Cascade(window=window, heads=heads)
    attn = helpers.randomise(CascadedGroupAttention("a", doc, Width("e", 9), grid).double().eval(), 3)
    x = torch.randn(2, 9, grid, grid, dtype=torch.float64)
    side = min(window, grid)
    padded = nn.functional.pad(x, (0, -grid % side, 0, -grid % side))
    wanted = torch.zeros_like(padded)
    with torch.no_grad():
        for top in range(0, padded.shape[2], side):
            for left in range(0, padded.shape[3], side):
                part = padded[:, :, top : top + side, left : left + side]
                outputs: list[Tensor] = []
                for j, head in enumerate(doc.heads):
                    feature = part[:, head.offset : head.offset + head.dim]
                    if outputs:
                        feature = feature + outputs[-1]
                    q, k, v = attn.qkv[j](feature).split((head.key_dim, head.key_dim, head.value_dim), dim=1)
                    q = attn.query[j](q)
                    logits = torch.einsum("bcyx,bcuv->byxuv", q, k) * head.scale
                    for y in range(side):
                        for z in range(side):
                            for u in range(side):
                                for w in range(side):
                                    logits[:, y, z, u, w] += attn.bias.table[j, abs(y - u) * side + abs(z - w)]
                    weights = logits.flatten(3).softmax(-1).view_as(logits)
                    outputs.append(torch.einsum("byxuv,bcuv->bcyx", weights, v))
                wanted[:, :, top : top + side, left : left + side] = attn.proj(torch.cat(outputs, 1).relu())
        assert torch.allclose(attn(x), x + wanted[:, :, :grid, :grid], rtol=1e-9)
