"""The linear probe: features, the fit, and the classifier it becomes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from nas.errors import UserError
from nas.networks.build import classifier_of, create
from nas.networks.timm_network import TimmNetwork
from nas.training import probe as module
from nas.training.probe import Probe, find_features, fit_probe, install
from search_spaces import get_arch
from search_spaces.network import heads_of


def clusters(images: int, features: int, classes: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % classes
    centres = torch.randn(classes, features, generator=generator)
    return centres[labels] + spread * torch.randn(images, features, generator=generator), labels


def answers(probe: Probe, features: Tensor) -> Tensor:
    return features @ probe.weight.T + probe.bias


@pytest.mark.parametrize("features", [8, 100])
def test_it_is_the_logistic_regression_of_its_strength(features: int) -> None:
    """With fewer features than images and with more; scikit-learn leaves the bias free, which matters little here."""
    x, y = clusters(60, features, 3, spread=2)
    x = 5 + x * torch.logspace(-2, 2, features)
    found = fit_probe(x, y, 3, seed=0)
    scaled = (x - x.mean(0)) / x.std(0, correction=0)
    oracle = LogisticRegression(C=1 / found.strength, tol=1e-8, max_iter=1000).fit(scaled.double(), y)
    wanted = torch.from_numpy(oracle.predict_proba(scaled.double()))
    assert answers(found, x).softmax(1).double() == pytest.approx(wanted, abs=5e-3)


def test_its_strength_is_that_of_least_loss_on_held_out_images() -> None:
    few = fit_probe(*clusters(60, 20, 3, spread=6), 3, seed=0)
    clear = fit_probe(*clusters(60, 20, 3, spread=0.3), 3, seed=0)
    assert few.strength > 100 * clear.strength
    assert few.held_out is not None
    assert clear.held_out is not None
    assert few.held_out.loss <= F.cross_entropy(torch.zeros(1, 3), torch.tensor([0])).item() + 0.02
    assert clear.held_out.top1 == 100
    assert clear.held_out.images == 60
    assert clear.held_out.interval[0] < 100 == clear.held_out.interval[1]


def test_accuracy_is_that_on_images_held_out() -> None:
    """Labels that features say nothing of cannot be guessed, however many features there are to learn them by."""
    x, y = torch.randn(80, 200, generator=torch.Generator().manual_seed(0)), torch.arange(80) % 2
    found = fit_probe(x, y, 2, seed=0)
    assert found.held_out is not None
    assert found.held_out.interval[0] < 50 < found.held_out.interval[1]
    assert found.held_out.loss < 0.75


def test_seeds_choose_the_folds_and_nothing_else_is_random() -> None:
    x, y = clusters(60, 8, 3, spread=3)
    first, again, other = (fit_probe(x, y, 3, seed=seed) for seed in (0, 0, 1))
    assert first.held_out == again.held_out != other.held_out
    assert torch.equal(first.weight, again.weight)


def test_a_fit_tells_its_progress_and_stops_within_a_step() -> None:
    told: list[tuple[int, int]] = []

    def progress(done: int, most: int) -> None:
        told.append((done, most))
        if len(told) == 4:
            raise KeyboardInterrupt

    x, y = clusters(60, 8, 3)
    with pytest.raises(KeyboardInterrupt):
        fit_probe(x, y, 3, 0, progress)
    assert told[0] == (0, len(module.STRENGTHS) * (module.FOLDS + 1))
    assert len(told) == 4
    fit_probe(x, y, 3, 0, lambda *step: told.append(step))
    assert told[4:] == sorted(told[4:])
    assert told[-1][0] == told[-1][1]


def test_a_large_problem_holds_out_one_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FOLDED", 0)
    found = fit_probe(*clusters(60, 8, 3), 3, seed=0)
    assert found.held_out is not None
    assert found.held_out.images == 12


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([0, 0, 1, 1], 2),  # two images a class
        ([0] * 9 + [1], 2),  # a class of one image
        ([0, 1, 0, 1, 0, 1], 4),  # classes without images
        ([0, 1, 2], 3),  # one image a class
    ],
)
def test_few_images_are_enough(labels: list[int], classes: int) -> None:
    y = torch.tensor(labels)
    x = 10 * F.one_hot(y, 16) + torch.randn(len(y), 16, generator=torch.Generator().manual_seed(0))
    found = fit_probe(x, y, classes, seed=0)
    assert found.weight.isfinite().all()
    assert found.bias.isfinite().all()
    assert (answers(found, x).argmax(1) == y).double().mean() >= 0.9
    assert (found.held_out is None) == (len(set(labels)) == len(labels))


def test_constant_features_are_ignored() -> None:
    x, y = clusters(40, 6, 2)
    x[:, 1], x[:, 4] = 0, 1e4
    found = fit_probe(x, y, 2, seed=0)
    assert (found.weight[:, [1, 4]] == 0).all()
    assert (answers(found, x).argmax(1) == y).double().mean() > 0.9


@pytest.mark.parametrize(
    ("value", "words"), [(float("nan"), "1 of 40 images are not finite"), (None, "the same for every image")]
)
def test_features_without_use_are_refused(value: float | None, words: str) -> None:
    x, y = clusters(40, 6, 2)
    if value is None:
        x[:] = x[0].clone()
    else:
        x[3, 2] = value
    with pytest.raises(UserError, match=words):
        fit_probe(x, y, 2, seed=0)


# Networks


def network(name: str) -> nn.Module:
    timm = name.startswith("test")
    return create((TimmNetwork(name, 32) if timm else get_arch(name).at(32)).replace(num_classes=3))


@pytest.mark.parametrize(("name", "layers"), [("levit_128s", 2), ("test_efficientnet", 1), ("test_vit", 1)])
def test_an_installed_probe_is_the_network_s_answer(name: str, layers: int) -> None:
    torch.manual_seed(0)
    model = network(name)
    if layers == 2:
        nn.init.constant_(model.get_parameter("head.dist.norm.bias"), 1e-4)  # its heads have other features
    images, labels = torch.rand(12, 3, 32, 32), torch.arange(12) % 3
    done: list[int] = []
    found = find_features(model, [(images[:8], labels[:8]), (images[8:], labels[8:])], progress=done.append)
    assert done == [8, 12]
    assert torch.equal(found.labels, labels)
    assert len(classifier_of(model)) == layers
    probe = fit_probe(found.values, labels, 3, seed=0)
    install(model, probe)
    with torch.no_grad():
        assert torch.allclose(model(images), answers(probe, found.values), rtol=1e-3, atol=1e-4)
        if layers == 2:
            for head in heads_of(model, images):
                assert torch.allclose(head.mean(0), answers(probe, found.values).mean(0), rtol=1e-3, atol=1e-4)


def test_dropout_is_off_and_hooks_are_gone() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9))
    model.add_module("head", nn.Linear(3, 2))
    model.arch = get_arch("shvit_s1")
    images = torch.rand(4, 3, 1, 1)
    found = find_features(model.train(), [(images, torch.zeros(4, dtype=torch.int64))])
    assert torch.equal(found.values, images.flatten(1))
    assert not model.head._forward_pre_hooks


def test_a_network_that_does_not_end_in_a_linear_layer_is_refused() -> None:
    model = nn.Sequential(nn.Flatten())
    model.add_module("head", nn.Linear(3, 2))
    model.add_module("softmax", nn.Softmax(1))
    model.arch = get_arch("shvit_s1")
    with pytest.raises(UserError, match=r"does not end in a linear layer.*: choose another network"):
        find_features(model, [(torch.rand(4, 3, 1, 1), torch.zeros(4, dtype=torch.int64))])


def test_a_probe_of_other_classes_is_not_installed() -> None:
    model = network("test_efficientnet")
    with pytest.raises(ValueError, match="a probe of"):
        install(model, fit_probe(*clusters(20, 5, 2), 2, seed=0))


def test_the_rounding_of_a_dead_channel_is_no_feature() -> None:
    x, y = clusters(60, 8, 3)
    dead = 1e-9 * torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
    found = fit_probe(torch.cat([x, dead], 1), y, 3, seed=0)
    assert not found.weight[:, 8:].any()
    assert found.weight[:, :8].abs().max() < 100
