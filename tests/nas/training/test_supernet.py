"""The supernet: candidates on shared memory are the networks that slicing gives, and what they learn stays."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.errors import TrainingError, UserError
from nas.training.candidate import Candidate
from nas.training.supernet import Supernet, maximum
from pruning import slice_weights
from search_spaces import Arch, get_arch, table
from search_spaces.registry import FAMILIES
from search_spaces.space import random_params

State = dict[str, Tensor]
CHANGES = {"sepvit": {"resolution": 32}, "evit": {"resolution": 32, "patch_size": 8}}


def networks(family: str, helpers: ModuleType, count: int = 3, stages: int = 2) -> list[Arch]:
    """Irregular networks of one resolution and number of stages: other widths, heads, depths and branches each."""
    changes = CHANGES.get(family, {"resolution": 64})
    archs = (helpers.random_arch(family, seed, num_classes=4, **changes) for seed in itertools.count())
    return list(itertools.islice((a for a in archs if len(getattr(a, "stages", (0,) * stages)) == stages), count))


def shared(family: str, helpers: ModuleType) -> tuple[Supernet, list[Arch]]:
    """A supernet with random weights, in float64."""
    archs = networks(family, helpers)
    net = Supernet.among(archs)
    helpers.randomise(net.owner.double(), 1)
    net.to("cpu")
    return net, archs


def corner(name: str, whole: Tensor, wanted: tuple[int, ...]) -> Tensor | None:
    """What slicing resizes and sharing cuts: bias tables (heads, offsets), tokens (1, windows, 1, C)."""
    if not name.endswith(("bias.table", "window_token")):
        return None
    dim = 1
    side, cut = (round(size**0.5) for size in (whole.shape[dim], wanted[dim]))
    square = whole.unflatten(dim, (side, side))[:, :cut, :cut].flatten(1, 2)
    return square[tuple(slice(size) for size in wanted)]


def sliced(net: Supernet, values: State, arch: Arch) -> State:
    """The candidate's part of the owner's tensors, by `slice_weights`."""
    state = slice_weights(net.arch, values, arch)
    return {
        name: value if (cut := corner(name, values[name], value.shape)) is None else cut
        for name, value in state.items()
    }


def standalone(net: Supernet, arch: Arch, helpers: ModuleType) -> nn.Module:
    model = helpers.build(arch)
    model.load_state_dict(sliced(net, net.owner.state_dict(), arch))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_are_the_networks_of_sliced_weights(family: str, helpers: ModuleType) -> None:
    net, archs = shared(family, helpers)
    for arch in archs:
        candidate = net.candidate(arch)
        x = helpers.image(arch, 3)
        candidate.begin()
        helpers.calibrate(candidate.model, x, 5)
        candidate.finish()
        with torch.no_grad():
            wanted = standalone(net, arch, helpers)(x)
            assert helpers.error(candidate.model.eval()(x), wanted) < 1e-9  # float64; the requirement is 1e-6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:grad and param do not obey")
def test_what_a_candidate_learns_is_the_owners(family: str, helpers: ModuleType) -> None:
    """Gradients and running statistics of one step: those of the network alone, nothing anywhere else."""
    net, archs = shared(family, helpers)
    for arch in archs:
        net.to("cpu")  # gradients at zero
        before = {name: value.clone() for name, value in net.owner.state_dict().items()}
        alone, candidate = standalone(net, arch, helpers).train(), net.candidate(arch)
        x, y = helpers.image(arch, 4), torch.arange(4)
        candidate.model.train()
        candidate.begin()
        for model in (alone, candidate.model):
            F.cross_entropy(model(x), y).backward()
        candidate.finish()
        gradients = {name: p.grad for name, p in net.owner.named_parameters()}
        found, total = sliced(net, before | gradients, arch), 0.0
        for name, parameter in alone.named_parameters():
            assert torch.allclose(found[name], parameter.grad, atol=1e-9), name
            total += parameter.grad.abs().sum().item()
        assert sum(g.abs().sum().item() for g in gradients.values()) == pytest.approx(total, rel=1e-6)
        own, now = sliced(net, before, arch), net.owner.state_dict()
        for name, wanted in sliced(net, now, arch).items():
            assert torch.allclose(alone.state_dict()[name], wanted), name
        inside = sum(distance(own[name], value) for name, value in alone.state_dict().items())
        assert sum(distance(before[name], value) for name, value in now.items()) == pytest.approx(inside, rel=1e-6)
        assert inside > 0 or family in ("evit", "sepvit")


def distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().sum().item()


def test_a_second_step_starts_from_new_weights_and_no_gradients(helpers: ModuleType) -> None:
    """Copies (here of queries, keys and values) follow the owner."""
    net, archs = shared("levit", helpers)
    candidate = net.candidate(archs[0])
    assert candidate._taken[0], "nothing is copied: the test shows nothing"
    x, y = helpers.image(archs[0], 4), torch.arange(4)
    outputs = []
    for _ in range(2):
        candidate.begin()
        candidate.model.eval()
        logits = candidate(x)
        F.cross_entropy(logits, y).backward()
        candidate.finish()
        outputs.append(logits.detach())
        assert not any(gradient.any() for gradient in candidate._gradients)
        with torch.no_grad():
            for parameter in net.owner.parameters():
                parameter -= 0.1 * parameter.grad
    with torch.no_grad():
        candidate.begin()
        wanted = standalone(net, archs[0], helpers)(x)
        assert helpers.error(candidate(x), wanted) < 1e-9
    assert helpers.error(outputs[1], wanted) > 1e-6


@pytest.mark.parametrize("name", ["levit_128s", "efficientvit_m0", "deit_tiny", "sepvit_lite"])
def test_a_smaller_resolution_takes_the_corner(name: str, helpers: ModuleType) -> None:
    large = get_arch(name, 4).at(128)
    small = large.at(96)
    net = Supernet.among([large, small])
    helpers.randomise(net.owner, 1)
    candidate = net.candidate(small)
    candidate.begin()
    own = dict(candidate.model.named_parameters())
    for key, parameter in net.owner.named_parameters():
        if key.endswith("bias.table"):
            side, cut = (round(t.shape[1] ** 0.5) for t in (parameter, own[key]))
            assert torch.equal(own[key], parameter.view(-1, side, side)[:, :cut, :cut].flatten(1))
        elif key == "pos_embed":
            assert torch.equal(own[key][:, 0], parameter[:, 0])
            grid = parameter[:, 1:].unflatten(1, (8, 8))[:, :6, :6].flatten(1, 2)
            assert torch.equal(own[key][:, 1:], grid)
        else:
            assert torch.equal(own[key], parameter)
    with torch.no_grad():
        assert candidate(helpers.image(128, 2, dtype=torch.float32)).isfinite().all()


def digits(count: int, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Batches of 16 images (16, 3, size, size) with their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = F.interpolate(torch.from_numpy(data.images[:count]).float()[:, None] / 8 - 1, size=size)
    return list(zip(x.expand(-1, 3, -1, -1).split(16), torch.from_numpy(data.target[:count]).split(16), strict=True))


def small_shvits(helpers: ModuleType) -> list[Arch]:
    def arch(width: int, depth: int, hidden: int, dim: int) -> Arch:
        attn = {"dim": dim, "heads": 2, "key_dim": 8, "value_dim": dim // 2, "scale": 0.35}
        block = {"conv": True, "attn": attn, "ffn": {"hidden": hidden, "keep_rate": 1.0}}
        stage = {"embed_dim": width, "downsample": None, "blocks": [block] * depth}
        raw = {"version": 1, "family": "shvit", "num_classes": 10, "resolution": 32, "distilled": False}
        return helpers.read(raw | {"stem": [8, 8, width // 2], "stages": [stage]})

    return [arch(16, 1, 16, 8), arch(24, 1, 48, 6), arch(24, 2, 24, 12), arch(32, 2, 64, 8)]


def test_training_lowers_the_loss_of_the_largest_and_the_smallest(helpers: ModuleType) -> None:
    archs, batches = small_shvits(helpers), digits(160)
    net = Supernet.among(archs, seed=0)
    assert (net.smallest, net.largest) == (archs[0], archs[3])
    before = [net.evaluate(arch, batches[:2], batches) for arch in (net.smallest, net.largest)]
    seen: list[tuple[int, int, float]] = []
    net.train(batches, 320, 4e-3, seed=0, progress=lambda *args: seen.append(args))
    after = [net.evaluate(arch, batches[:2], batches) for arch in (net.smallest, net.largest)]
    assert all(new.loss < 0.9 * old.loss and new.correct > old.correct for old, new in zip(before, after, strict=True))
    assert [done for done, _, _ in seen] == list(range(16, 321, 16))


def test_a_training_begins_anew_whatever_was_before(helpers: ModuleType) -> None:
    archs, batches = small_shvits(helpers), digits(48)
    net, again = Supernet.among(archs, seed=0), Supernet.among(archs, seed=0)
    again.step(*batches[0])
    for each in (net, again):
        each.train(batches, 48, 4e-3, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(net.owner.parameters(), again.owner.parameters(), strict=True))


def test_want_of_memory_halves_the_batch(helpers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images of a step are the same, in parts; where not even two fit, the training fails in one line."""
    archs, batches, learn = small_shvits(helpers), digits(64), Supernet._learn
    sizes: list[int] = []
    room = 4

    def crowded(net: Supernet, arch: Arch, images: Tensor, loss: object) -> tuple[Tensor, Tensor]:
        sizes.append(len(images))
        found = learn(net, arch, images, loss)
        if len(images) > room:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")
        return found

    monkeypatch.setattr(Supernet, "_learn", crowded)
    net = Supernet.among(archs)
    net.train(batches, 64, 1e-3, seed=0)
    assert sizes[:2] == [16, 8]
    assert set(sizes[2:]) == {4}
    assert len(sizes) == 2 + 4 * 4 * 4, "steps, parts and networks"
    room = 1
    with pytest.raises(TrainingError, match="memory with two images"):
        Supernet.among(archs).train(batches, 64, 1e-3, seed=0)


def test_parts_add_up_to_the_whole_s_gradient(helpers: ModuleType) -> None:
    """Without BatchNorm's statistics, which are of each part."""
    images, labels = digits(16)[0]
    found = []
    for parts in (1, 4):
        net = Supernet.among(small_shvits(helpers))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.BatchNorm2d, "train", lambda self, mode=True: nn.Module.train(self, False))
            patch.setattr(nn.BatchNorm1d, "train", lambda self, mode=True: nn.Module.train(self, False))
            losses = net.step(images, labels, parts)
        found.append((losses, [parameter.grad for parameter in net.owner.parameters()]))
    (one, whole), (other, parted) = found
    assert torch.allclose(torch.stack(one), torch.stack(other), rtol=1e-4)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(whole, parted, strict=True))


def test_evaluating_calibrates_a_copy_of_the_statistics(helpers: ModuleType) -> None:
    archs, batches = small_shvits(helpers), digits(64)
    net = Supernet.among(archs)
    net.step(*batches[0])
    before = {name: value.clone() for name, value in net.owner.state_dict().items()}
    found = net.evaluate(archs[2], batches[:3], batches)
    assert found == net.evaluate(archs[2], batches[:3], batches)
    assert found.total == 64
    assert all(torch.equal(value, before[name]) for name, value in net.owner.state_dict().items())
    alone = helpers.build(archs[2], dtype=torch.float32)
    alone.load_state_dict(slice_weights(net.arch, before, archs[2]))
    for module in alone.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        alone.train()
        for images, _ in batches[:3]:
            alone(images)
        alone.eval()
        loss = torch.cat([F.cross_entropy(alone(x), y, reduction="none") for x, y in batches]).mean()
    assert found.loss == pytest.approx(loss.item(), rel=1e-4)


def test_a_step_teaches_the_others_by_the_largest(helpers: ModuleType) -> None:
    """Labels are seen by the largest alone."""
    net, batch = Supernet.among(small_shvits(helpers)), digits(16)[0]
    asked: list[Arch] = []
    learn = net._learn
    losses = []

    def spy(arch: Arch, images: Tensor, loss: object) -> tuple[Tensor, Tensor]:
        asked.append(arch)
        losses.append(learn(arch, images, loss))
        return losses[-1]

    net._learn = spy
    label_loss, other = net.step(*batch)
    assert asked[:2] == [net.largest, net.smallest]
    assert len(asked) == 4
    wanted = F.cross_entropy(losses[0][0], batch[1], label_smoothing=0.1)
    assert torch.equal(label_loss, wanted)
    soft = [F.cross_entropy(logits, losses[0][0].softmax(1)) for logits, _ in losses[1:]]
    assert torch.allclose(other, torch.stack(soft).mean())
    assert all(parameter.grad.any() for name, parameter in net.owner.named_parameters() if name.startswith("head"))
    first = [parameter.grad.clone() for parameter in net.owner.parameters()]
    net._random = np.random.default_rng(0)
    net.step(*batch)
    assert all(torch.equal(a, b.grad) for a, b in zip(first, net.owner.parameters(), strict=True))


def test_weights_are_saved_and_loaded(tmp_path: Path, helpers: ModuleType) -> None:
    archs = small_shvits(helpers)
    net, other = Supernet.among(archs, seed=1), Supernet.among(archs, seed=2)
    net.save(tmp_path / "supernet.safetensors")
    candidate = other.candidate(other.smallest)
    other.load(tmp_path / "supernet.safetensors")
    assert all(torch.equal(value, other.owner.state_dict()[name]) for name, value in net.owner.state_dict().items())
    assert torch.equal(candidate.model.head.cls.linear.weight, net.candidate(net.smallest).model.head.cls.linear.weight)
    with pytest.raises(UserError, match="not the weights of this supernet"):
        Supernet.among(archs[:2]).load(tmp_path / "supernet.safetensors")
    (tmp_path / "broken").write_bytes(b"nothing")
    for name in ("broken", "missing"):
        with pytest.raises(UserError, match="not a readable safetensors"):
            other.load(tmp_path / name)


def check_space(family: str, draws: int) -> None:
    net, rng = Supernet.over(family, 10), np.random.default_rng(0)
    counts = []
    for _ in range(draws):
        arch = FAMILIES[family].space.decode(random_params(rng), 10)
        Candidate(arch, net.owner, net._entries)
        counts.append(table(arch).macs())
    assert table(net.smallest).macs() <= min(counts)
    assert table(net.largest).macs() >= max(counts)


def test_every_network_of_a_space_is_a_candidate() -> None:
    check_space("levit", 2)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_network_of_every_space_is_a_candidate(family: str) -> None:
    check_space(family, 100)


def test_what_cannot_share_is_refused_in_one_line(helpers: ModuleType) -> None:
    archs = small_shvits(helpers)
    net = Supernet.among(archs[:3])
    with pytest.raises(UserError, match="not part of the supernet") as caught:
        net.evaluate(archs[3], [], [])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="one family, number of classes"):
        maximum([archs[0], archs[1].replace(num_classes=3)])
    evit = helpers.random_arch("evit", 0)
    with pytest.raises(UserError, match="patches of one size"):
        maximum([evit, evit.replace(patch_size=evit.patch_size * 2, resolution=evit.patch_size * 8)])
    with pytest.raises(UserError, match="no supernet of sepvit at 100 pixels"):
        Supernet.over("sepvit", 10, resolution=100)
