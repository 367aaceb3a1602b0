"""EViT's oracle: its class attention, computed here by hand, chooses the tokens; its weights are the first ones."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from search_spaces import Arch, ArchError
from search_spaces.network import set_keep_progress
from search_spaces.oracle import start_from, with_oracle

ATTN = {"heads": 2, "key_dim": 4, "value_dim": 6, "scale": 0.5}


def arch_of(helpers: ModuleType, rates: tuple[float, ...], fuse: bool = False, **changes: Any) -> Arch:
    """Four blocks on 64 patches."""
    blocks = [{"attn": ATTN, "keep_rate": rate, "fuse": fuse, "ffn": {"hidden": 20}} for rate in rates]
    fields = {"resolution": 64, "patch_size": 8, "embed_dim": 12, "num_classes": 5, "blocks": blocks} | changes
    return helpers.random_arch("evit", 0, **fields)


@torch.no_grad()
def rows_by_hand(oracle: nn.Module, x: Tensor) -> list[Tensor]:
    """The mean over heads of each block's class row (B, 64), from what enters its attention."""
    inputs: list[Tensor] = []
    handles = [b.attn.qkv.register_forward_hook(lambda _m, _i, out: inputs.append(out)) for b in oracle.blocks]
    oracle(x)
    for handle in handles:
        handle.remove()
    rows = []
    for qkv in inputs:
        q, k = qkv[:, 0, :8].view(-1, 2, 4), qkv[:, :, 8:16].reshape(len(x), -1, 2, 4)
        logits = torch.einsum("bhd,bnhd->bhn", q, k) * 0.5
        rows.append(logits.softmax(-1).mean(1)[:, 1:])
    return rows


def silent(model: nn.Module) -> nn.Module:
    """A network whose tokens stay what they were before the first block."""
    with torch.no_grad():
        for block in model.blocks:
            for layer in (block.attn.proj, block.ffn.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
    return model


@torch.no_grad()
def last_tokens(model: nn.Module, x: Tensor) -> Tensor:
    """What leaves the last block (B, N, C)."""
    seen: list[Tensor] = []
    handle = model.blocks.register_forward_hook(lambda _m, _i, out: seen.append(out))
    model(x)
    handle.remove()
    return seen[0]


def test_kept_tokens_are_the_oracle_s(helpers: ModuleType) -> None:
    """The best half by its block 1, and of these the best 60% by its block 3: patches it sees, wherever they moved."""
    arch = arch_of(helpers, (1.0, 0.5, 1.0, 0.6))
    model = silent(helpers.build(arch, 1)).train()
    oracle, x = helpers.build(arch_of(helpers, (1.0,) * 4), 2), helpers.image(arch, 3)
    rows = rows_by_hand(oracle, x)
    with torch.no_grad():
        tokens = model.tokens(x)
    with with_oracle(model, oracle):
        found = last_tokens(model, x)
        again = last_tokens(model, helpers.image(arch, 3, seed=5))  # each batch is looked at anew
    for i in range(3):
        half = sorted(range(64), key=lambda n, i=i: -float(rows[1][i, n]))[:32]
        chosen = sorted(half, key=lambda n, i=i: -float(rows[3][i, n]))[: math.ceil(0.6 * 32)]
        assert torch.equal(found[i, 1:], tokens[i, [1 + n for n in chosen]])
    assert not torch.equal(again, found)
    assert not torch.equal(last_tokens(model, x), found)


def test_a_fused_token_counts_for_what_is_in_it(helpers: ModuleType) -> None:
    """It is weighted by the network's own attention and ranked by the sum of the oracle's."""
    arch = arch_of(helpers, (0.5, 0.6, 1.0, 1.0), fuse=True)
    model = silent(helpers.build(arch, 1)).train()
    oracle, x = helpers.build(arch_of(helpers, (1.0,) * 4), 2), helpers.image(arch, 3)
    rows, own = rows_by_hand(oracle, x), rows_by_hand(model, x)
    with torch.no_grad():
        tokens = model.tokens(x)[:, 1:]
    with with_oracle(model, oracle):
        found = last_tokens(model, x)[:, 1:]
    for i in range(3):
        order = sorted(range(64), key=lambda n, i=i: -float(rows[0][i, n]))
        fused = sum(own[0][i, n] * tokens[i, n] for n in order[32:])
        candidates = [(float(rows[1][i, n]), tokens[i, n]) for n in order[:32]]
        candidates.append((sum(float(rows[1][i, n]) for n in order[32:]), fused))
        candidates.sort(key=lambda pair: -pair[0])
        assert found.shape[1] == 21
        assert torch.allclose(found[i, :20], torch.stack([token for _, token in candidates[:20]]), rtol=1e-12)


@pytest.mark.parametrize("fuse", [True, False])
def test_its_own_twin_changes_nothing(fuse: bool, helpers: ModuleType) -> None:
    """Up to the first reduction the oracle with the same weights attends as the network does, even if it reduces."""
    arch = arch_of(helpers, (1.0, 1.0, 0.5, 1.0), fuse)
    model, x = helpers.build(arch, 1).train(), helpers.image(arch)
    twin = helpers.build(arch_of(helpers, (0.3, 1.0, 0.7, 1.0)))
    twin.load_state_dict(model.state_dict())
    other = helpers.build(arch, 2)
    with torch.no_grad():
        wanted = model(x)
        with with_oracle(nn.Sequential(model), twin.train()):
            assert helpers.error(model(x), wanted) < 1e-12
        with with_oracle(model, other):
            assert helpers.error(model(x), wanted) > 1e-3
            evaluated = model.eval()(x)
        assert torch.equal(model.train()(x), wanted)
        assert torch.equal(model.eval()(x), evaluated)


def test_along_the_schedule(helpers: ModuleType) -> None:
    """While nothing is dropped the oracle is not asked; then its rows serve whatever the counts are."""
    arch = arch_of(helpers, (0.5, 1.0, 0.6, 0.7), fuse=True)
    model, x = helpers.build(arch, 1).train(), helpers.image(arch)
    oracle = helpers.build(arch, 2)
    calls: list[int] = []
    oracle.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    with with_oracle(model, oracle):
        for progress, asked in ((0, 0), (0.3, 1), (0.6, 2), (1, 3)):
            set_keep_progress(model, progress)
            model(x).square().sum().backward()
            assert len(calls) == asked
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())
    assert all(value.grad is None for value in oracle.parameters())
    assert set(model.state_dict()) == set(oracle.state_dict())


def test_weights_start_from_the_oracle(helpers: ModuleType) -> None:
    model = helpers.build(arch_of(helpers, (0.5, 1.0, 1.0, 1.0), num_classes=3), 1)
    oracle = helpers.build(arch_of(helpers, (1.0,) * 4), 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert start_from(nn.Sequential(model), oracle) == ["head.weight", "head.bias"]
    for name, value in model.state_dict().items():
        source = before if name.startswith("head.") else oracle.state_dict()
        assert torch.equal(value, source[name])


def test_merging_takes_no_oracle(helpers: ModuleType) -> None:
    """It may be one: what it would merge is not asked for."""
    plain, raw = arch_of(helpers, (0.5, 1.0, 0.6, 1.0)), helpers.document(arch_of(helpers, (0.5, 1.0, 0.6, 1.0)))
    merging = helpers.read(raw | {"blocks": [block | {"merge": True} for block in raw["blocks"]]})
    x = helpers.image(plain)
    with pytest.raises(ArchError, match="merges"), with_oracle(helpers.build(merging), helpers.build(plain)):
        pass
    found = []
    for arch in (plain, merging):
        model = helpers.build(plain, 1).train()
        with with_oracle(model, helpers.build(arch, 2)), torch.no_grad():
            found.append(model(x))
    assert torch.equal(*found)


def test_unfit_oracles(helpers: ModuleType) -> None:
    arch = arch_of(helpers, (1.0, 0.5, 1.0, 1.0))
    model = helpers.build(arch)
    deaf = helpers.document(arch_of(helpers, (1.0,) * 4))
    deaf["blocks"][1]["attn"] = None
    faults = {
        "3 blocks": arch_of(helpers, (1.0,) * 3),
        "patches": arch_of(helpers, (1.0,) * 4, resolution=128),
        "resolution": arch_of(helpers, (1.0,) * 4, resolution=32, patch_size=4),
        r"blocks\.1": helpers.read(deaf),
        "no EViT": helpers.random_arch("levit", 1),
    }
    for match, oracle in faults.items():
        with pytest.raises(ArchError, match=match), with_oracle(model, helpers.build(oracle)):
            pass
    with pytest.raises(ArchError, match="the network is no EViT"), with_oracle(nn.Linear(1, 1), model):
        pass
