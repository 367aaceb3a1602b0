"""BatchNorm's statistics, taken again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nas.errors import UserError
from nas.training.statistics import take_statistics

IMAGES = 3 + 2 * torch.randn(21, 3, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.zeros(21, dtype=torch.int64)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3), nn.Flatten(), nn.BatchNorm1d(48))


def test_they_are_the_mean_over_images_whatever_the_batches() -> None:
    model = network().train()
    model[1].running_mean.fill_(float("nan"))
    parts = (slice(0, 16), slice(16, 17), slice(17, 21))
    assert take_statistics(model, [(IMAGES[part], LABELS[part]) for part in parts]) == 20
    wanted = (16 * IMAGES[:16].mean((0, 2, 3)) + 4 * IMAGES[17:].mean((0, 2, 3))) / 20
    variance = (16 * IMAGES[:16].var((0, 2, 3)) + 4 * IMAGES[17:].var((0, 2, 3))) / 20
    assert model[1].running_mean.numpy() == pytest.approx(wanted.numpy(), rel=1e-5)
    assert model[1].running_var.numpy() == pytest.approx(variance.numpy() * 1, rel=2e-2)
    assert not any(module.training for module in model.modules())
    assert [model[1].momentum, model[3].momentum] == [0.1, 0.1]


def test_each_layer_sees_what_the_layers_before_it_make() -> None:
    model = network()
    take_statistics(model, [(IMAGES, LABELS)])
    with torch.no_grad():
        out = model(IMAGES)
    assert out.mean(0).abs().max() < 1e-2
    assert out.var(0).numpy() == pytest.approx(torch.ones(48).numpy(), rel=2e-2)


def test_a_network_without_batchnorm_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    assert take_statistics(model, [(IMAGES, LABELS)]) == 0


def test_batches_of_one_image_are_not_enough() -> None:
    with pytest.raises(UserError, match="two"):
        take_statistics(network(), [(IMAGES[:1], LABELS[:1])])
