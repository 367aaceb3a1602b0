"""Training and evaluation on tiny networks and pictures."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn

import nas.training.updater
from nas.data.batches import loader
from nas.data.dataset import open_data
from nas.errors import UserError
from nas.training import updater
from nas.training.evaluation import Accuracy, evaluate
from nas.training.fit import fit
from nas.training.updater import TEMPERATURE, distillation_loss
from search_spaces import create_model

FAMILIES = ("levit", "efficientvit", "shvit", "evit", "sepvit")


def network(seed: int = 0, classes: int = 10) -> nn.Sequential:
    """Two convolutions and a BatchNorm head, which cannot train on one image."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.BatchNorm1d(16),
        nn.Dropout(0.1),
        nn.Linear(16, classes),
    )


@pytest.fixture(scope="module")
def digits():
    return open_data(None, 16, 10, seed=0)


def batches(data, batch_size: int = 32, seed: int = 0):
    return loader(data.train, batch_size, shuffle=True, seed=seed)


def noise(sizes: list[int], resolution: int = 16, classes: int = 10) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(n, 3, resolution, resolution, generator=generator),
            torch.randint(0, classes, (n,), generator=generator),
        )
        for n in sizes
    ]


def test_evaluate_counts_and_averages_over_images():
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            return x.mean((2, 3))

    data = noise([4, 3], classes=3)
    found = evaluate(Fixed(), data)
    logits = torch.cat([images for images, _ in data]).mean((2, 3))
    labels = torch.cat([labels for _, labels in data])
    assert found.total == 7
    assert found.correct == sum(int(row.argmax()) == int(label) for row, label in zip(logits, labels, strict=True))
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (3, 10), (341, 360), (360, 360)])
def test_interval_is_wilsons(correct, total):
    z, p = 1.959964, correct / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total**2))
    accuracy = Accuracy(correct, total, 0.0)
    assert accuracy.top1 == pytest.approx(100 * p)
    assert accuracy.interval == pytest.approx((100 * (centre - half), 100 * (centre + half)), abs=1e-3)


@pytest.fixture(scope="module")
def trained(digits) -> nn.Module:
    model = network()
    fit(model, batches(digits), 6000, 0.01, seed=0)
    return model


def test_digits_well_above_chance(trained, digits):
    found = evaluate(trained, loader(digits.val, 64, shuffle=False, seed=0))
    assert found.total == len(digits.val)
    assert found.interval[0] > 60


def test_a_vision_transformer_with_zero_gammas_learns(helpers, digits):
    """Residual branches start at zero; they must not stay there."""
    arch = helpers.random_arch("efficientvit", seed=3, num_classes=10, resolution=64)
    data = open_data(None, arch.resolution, 10, seed=0)
    torch.manual_seed(0)
    model = create_model(arch)
    silent = [name for name, value in model.named_parameters() if not value.any() and name.endswith("norm.weight")]
    assert silent
    fit(model, batches(data), 1500, 3e-3, seed=0)
    assert all(model.get_parameter(name).any() for name in silent)
    assert evaluate(model, loader(data.val, 64, shuffle=False, seed=0)).interval[0] > 20


@pytest.mark.parametrize("how", ["train", "frozen"])
def test_fit_freezes_batch_norm_where_asked(how, digits):
    model = network()
    before = model[1].running_mean.clone()
    fit(model, batches(digits), 64, 0.01, seed=0, batch_norm=how)
    assert torch.equal(model[1].running_mean, before) == (how == "frozen")


def test_equal_seeds_give_equal_weights(digits):
    def weights(seed: int) -> list[Tensor]:
        model = network()
        fit(model, batches(digits, seed=seed), 320, 0.01, seed=seed)
        return list(model.state_dict().values())

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_seed_of_fit_covers_augmentation_and_dropout(digits):
    """One order of images, another seed of `fit`: only crops and dropout can differ."""
    weights = []
    for seed in (0, 1):
        model = network()
        fit(model, batches(digits), 64, 0.01, seed=seed)
        weights.append(model[0].weight)
    assert not torch.equal(*weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains(family, helpers):
    """Images in channels_last give the same outputs, and training moves weights that can still be saved."""
    arch = helpers.random_arch(family, seed=5)
    model = helpers.randomise(create_model(arch), seed=1).eval()
    data = noise([4, 4], arch.resolution, arch.num_classes)
    images = data[0][0]
    with torch.no_grad():
        assert torch.allclose(model(images), model(images.to(memory_format=torch.channels_last)), rtol=1e-3, atol=1e-4)
    before = [value.clone() for value in model.parameters()]
    fit(model, data, 16, 1e-3, seed=0)
    after = list(model.parameters())
    assert all(value.isfinite().all() for value in after)
    assert sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) > len(before) / 2
    save(model.state_dict())


def test_schedule_and_weight_decay(monkeypatch):
    """The rate rises over the first twentieth, then falls along a cosine; norms and biases do not decay."""
    made = []
    create = nas.training.updater.create_optimizer_v2
    monkeypatch.setattr(updater, "create_optimizer_v2", lambda *a, **k: made.append(create(*a, **k)) or made[0])
    model, rates, seen = network(), [], []

    def progress(done: int, total: int, loss: float) -> None:
        rates.append(made[0].param_groups[0]["lr"])
        seen.append((done, total))
        assert math.isfinite(loss)

    fit(model, noise([4] * 10), 400, 0.01, seed=0, progress=progress)
    assert seen == [(4 * i, 400) for i in range(1, 101)]
    assert rates[0] == pytest.approx(0.001)
    assert max(rates) == pytest.approx(0.01, rel=0.02)
    assert rates.index(max(rates)) == 5
    assert rates[50] == pytest.approx(0.005)
    assert rates[-1] < 1e-4
    assert all(a > b for a, b in itertools.pairwise(rates[5:]))
    decays = {id(p): group["weight_decay"] for group in made[0].param_groups for p in group["params"]}
    assert {p.ndim for p in model.parameters() if decays[id(p)] == 0} == {1}
    assert all(decays[id(p)] == 0.05 for p in model.parameters() if p.ndim > 1)


def test_updates_are_those_of_a_plain_loop():
    """AdamW on the smoothed label loss, a fresh gradient each time, dropout on and BatchNorm counting."""
    data = noise([8, 8, 8, 8])
    rates = [0.001] + [0.01 * (1 + math.cos(math.pi * done / 32)) / 2 for done in (8, 16, 24)]
    model, twin, losses = network().eval(), network(), []
    fit(model, data, 32, 0.01, seed=4, progress=lambda done, total, loss: losses.append(loss))
    assert not model.training
    torch.manual_seed(4)
    decaying = [p for p in twin.parameters() if p.ndim > 1]
    others = [p for p in twin.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decaying, "weight_decay": 0.05}, {"params": others, "weight_decay": 0}])
    for (images, labels), rate, loss in zip(data, rates, losses, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        smooth = 0.9 * F.one_hot(labels, 10) + 0.1 / 10
        expected = -(smooth * twin(images).log_softmax(1)).sum(1).mean()
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        optimizer.zero_grad()
        expected.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, twin.state_dict()[name], atol=1e-4), name


def test_gradients_are_clipped():
    """The gradient a step of a huge loss leaves behind."""
    model = network()
    with torch.no_grad():
        model[-1].weight.mul_(1e4)
    fit(model, noise([8]), 8, 1e-6, seed=0)
    total = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    assert total == pytest.approx(1.0, rel=1e-3)


def test_images_are_rounded_up_to_batches_and_passes_repeat():
    seen = []
    fit(network(), noise([4, 4]), 9, 1e-3, seed=0, progress=lambda done, total, loss: seen.append((done, total)))
    assert seen == [(4, 9), (8, 9), (9, 9)]


def test_batches_of_one_image_are_left_out():
    seen = []
    fit(network(), noise([4, 1]), 8, 1e-3, seed=0, progress=lambda done, total, loss: seen.append(done))
    assert seen == [4, 8]
    with pytest.raises(UserError, match="no batch holds two images"):
        fit(network(), noise([1, 1]), 8, 1e-3, seed=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_survives_broken_files(tmp_path, workers):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(30):
            Image.new("L", (16, 16), 8 * i).save(tmp_path / name / f"{i}.png")
    data = open_data(tmp_path, 16, 2, seed=0)
    for file in data.train.sources[:2]:
        file.write_bytes(file.read_bytes()[:30])
    images = loader(data.train, 2, shuffle=True, seed=0, workers=workers)
    seen = []
    fit(network(classes=2), images, 60, 1e-3, seed=0, progress=lambda done, total, loss: seen.append(done))
    assert seen[-1] == 60
    assert sorted(images.skipped) == sorted(str(file) for file in data.train.sources[:2])


def divergence(teacher: nn.Module, student: nn.Module, images: Tensor) -> float:
    """Mean KL(teacher || student) of the class probabilities at T = 1."""
    with torch.no_grad():
        wanted, found = teacher(images).log_softmax(1), student(images).log_softmax(1)
    return float((wanted.exp() * (wanted - found)).sum(1).mean())


def test_distillation_brings_the_student_nearer_to_its_teacher(trained, digits):
    """Against the same training without one, on images neither has seen; the teacher itself is left as it was."""
    images = torch.stack([digits.val[i][0] for i in range(128)])
    before = [value.clone() for value in trained.state_dict().values()]
    trained.zero_grad()
    gaps = {}
    for teacher in (None, trained):
        trained.train()
        student = network(seed=8)
        fit(student, batches(digits), 3000, 0.01, seed=0, teacher=teacher)
        gaps[teacher is not None] = divergence(trained.eval(), student, images)
    assert gaps[True] < 0.8 * gaps[False]
    assert all(torch.equal(a, b) for a, b in zip(before, trained.state_dict().values(), strict=True))
    assert all(value.grad is None for value in trained.parameters())


def test_distillation_loss_by_hand():
    torch.manual_seed(0)
    logits, wanted, labels = torch.randn(5, 4), torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    label_loss = F.cross_entropy(logits, labels)
    expected = 0.0
    for z, t in zip(logits, wanted, strict=True):
        p, q = (t / TEMPERATURE).softmax(0), (z / TEMPERATURE).softmax(0)
        expected += float((p * (p / q).log()).sum()) / 5
    found = distillation_loss(label_loss, logits, wanted)
    assert float(found) == pytest.approx((float(label_loss) + TEMPERATURE**2 * expected) / 2, rel=1e-5)
    assert float(distillation_loss(label_loss, logits, logits)) == pytest.approx(float(label_loss) / 2)


def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(UserError, match=r"the loss is (nan|inf) after \d+ images: lower the learning rate \(1e\+30\)"):
        fit(network(), noise([8] * 4), 400, 1e30, seed=0)
