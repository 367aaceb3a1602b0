"""Published networks in a search: their weights at any resolution, their own pixels, and their linear probe."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nas.data.dataset import ImageData
from nas.data.images import Images, plain_transform
from nas.data.pixels import Pixels
from nas.export.folder import save_weights
from nas.quality.plan import TrainingPlan
from nas.quality.ready import give_probe, own_pixels, with_weights
from nas.quality.trainer import CandidateTrainer
from nas.training.probe import fit_probe, without_dead
from search_spaces import create_model, get_arch

HALF = Pixels(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.fixture
def trainer(tmp_path: Path) -> CandidateTrainer:
    """40 images of noise, red or blue."""
    rng = np.random.default_rng(0)
    labels = [i % 2 for i in range(40)]
    colours = [np.array([(220, 20, 20), (20, 20, 220)][label]) for label in labels]
    pictures = [np.clip(c + rng.normal(0, 40, (32, 32, 3)), 0, 255).astype(np.uint8) for c in colours]
    images = Images(pictures, labels, plain_transform(32))
    data = ImageData("colours", ["red", "blue"], images, images, images, demo=False)
    return CandidateTrainer(data, TrainingPlan("colours"), 0, "cpu", tmp_path, list, lambda *_: None)


def test_images_become_what_each_networks_weights_want(trainer):
    usual, other = trainer.split(32)[1], trainer.split(32, HALF)[1]
    raw = usual[0][0] * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    raw += torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    assert torch.allclose(other[0][0], (raw - 0.5) / 0.5, atol=1e-5)
    assert trainer.split(32, HALF)[1] is other, "decoded once for each"
    assert trainer.split(32)[1] is usual
    assert usual.labels == other.labels


def test_weights_of_another_resolution_are_resized(tmp_path):
    """LeViT has a table of attention biases, which follows the resolution."""
    arch = get_arch("levit_128s").at(64).replace(num_classes=10)
    published = create_model(arch)
    save_weights(published, tmp_path / "levit_128s.safetensors")
    for size in (64, 96):
        model = with_weights(arch.at(size).replace(num_classes=2), tmp_path / "levit_128s.safetensors")
        assert model.arch.resolution == size
        assert model(torch.zeros(2, 3, size, size)).shape == (2, 2)
        (name, first), *_ = model.state_dict().items()
        assert torch.equal(first, published.state_dict()[name])


def test_a_probe_tells_the_users_classes_apart(trainer):
    arch = get_arch("efficientvit_m0").replace(num_classes=2).at(64)
    model = create_model(arch)
    used, judges = trainer.split(64, own_pixels(arch))
    give_probe(model, used, trainer, own_pixels(arch))
    assert trainer.judge(model, judges).top1 == 100


def test_a_channel_that_is_all_but_dead_has_no_weight_in_a_probe():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    live = torch.eye(3)[labels] + torch.randn(60, 3, generator=generator)
    dead = 1e-4 * torch.randn(60, 4, generator=generator)
    found = fit_probe(without_dead(torch.cat([live, dead], 1)), labels, 3, seed=0)
    assert not found.weight[:, 3:].any()
    assert found.weight[:, :3].all()
