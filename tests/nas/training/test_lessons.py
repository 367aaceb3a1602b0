"""Lessons: a teacher's features of every image, whatever its classes, with and without labels."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from nas.data.images import Images, plain_transform, train_transform
from nas.data.listing import images_below
from nas.errors import UserError
from nas.networks.build import classifier_of
from nas.training.engine import Training
from nas.training.lessons import UNLABELLED, FeatureTeacher, ridge
from nas.training.recipes import QUICK, RECIPES
from nas.training.updater import Updater
from search_spaces import create_model

PLAIN = dataclasses.replace(QUICK, batch_size=8, epochs=8, lr=0.1)


def pictures(folder: Path, count: int, resolution: int = 32) -> Images:
    """Noise of as many colours."""
    rng = np.random.default_rng(0)
    for i in range(count):
        base = rng.integers(0, 200, 3)
        pixels = (base + rng.integers(0, 55, (40, 40, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return Images(images_below(str(folder)), [i % 3 for i in range(count)], train_transform(resolution, None, False))


@pytest.fixture
def parts(helpers: Any, tmp_path: Path) -> tuple[nn.Module, FeatureTeacher, Images]:
    """A student of 3 classes at 32 px, a teacher of 7 at 64 px with four images of its own, and 24 images."""
    student = create_model(helpers.random_arch("shvit", 3, num_classes=3, resolution=32))
    teacher = helpers.randomise(create_model(helpers.random_arch("levit", 1, num_classes=7, resolution=64)), 1)
    for name in ("labelled", "more"):
        (tmp_path / name).mkdir()
    images, more = pictures(tmp_path / "labelled", 24), pictures(tmp_path / "more", 4)
    Path(images.sources[1]).write_bytes(b"no picture")
    more = Images(more.sources, [UNLABELLED] * 4, more.transform)
    return student, FeatureTeacher(teacher, plain_transform(64), plain_transform(32), more), images


def features_of(model: nn.Module, image: Tensor) -> Tensor:
    found: list[Tensor] = []
    layer = classifier_of(model)[0]
    handle = layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    with torch.no_grad():
        model.eval()(image[None])
    handle.remove()
    return found[0][0]


def test_each_row_has_the_features_of_its_image(parts: tuple[nn.Module, FeatureTeacher, Images]) -> None:
    """Also behind one that cannot be decoded, and of the images without labels."""
    student, teacher, images = parts
    lessons = teacher.lessons(student, images, "cpu")
    lessons.begin(fresh=True)
    assert lessons.labels.tolist() == [*images.labels, *[UNLABELLED] * 4]
    plain = lessons.images.transformed(teacher.transform)
    rows = [0, 2, 23, 24, 27]
    raw = torch.stack([features_of(teacher.model, plain[row][0]) for row in rows])
    assert [plain[row][1] for row in rows] == rows
    assert lessons.wanted is not None
    wanted = lessons.wanted[rows][:, : raw.shape[1]]
    scaled = (raw - raw.mean(0)) / raw.std(0)
    assert torch.allclose((wanted - wanted.mean(0)) / wanted.std(0), scaled, atol=2e-2)
    assert (lessons.wanted[1] == 0).all()
    assert torch.allclose(lessons.wanted.square().sum(0), torch.tensor(27.0), rtol=1e-3), "one variance each"


def test_the_match_begins_as_the_best_linear_one() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(400, 5), torch.randn(3, 5)
    found, bias = ridge(1000 * x, 1000 * x @ weight.T + 7)
    assert torch.allclose(found, weight / 2, atol=0.2), "the penalty is as large as the variance"
    assert torch.allclose(bias, (1000 * x @ weight.T + 7).mean(0) - found @ (1000 * x).mean(0), atol=0.5)


def test_the_loss_is_of_the_labels_there_are(parts: tuple[nn.Module, FeatureTeacher, Images]) -> None:
    student, teacher, images = parts
    lessons = teacher.lessons(student, images, "cpu")
    lessons.begin(fresh=True)
    student.eval()
    updater = Updater(student, PLAIN, 10, "cpu", lessons=lessons)
    x = torch.randn(4, 3, 32, 32)
    assert lessons.wanted is not None
    for rows in (torch.tensor([0, 5, 24, 25]), torch.tensor([24, 25, 26, 27])):
        features = torch.stack([features_of(student, each) for each in x])
        wanted = F.mse_loss(lessons.match(features), lessons.wanted[rows])
        told = rows < 24
        if told.any():
            logits, labels = student(x)[told], rows[told] % 3
            wanted = wanted + F.cross_entropy(logits, labels, label_smoothing=PLAIN.label_smoothing)
        assert updater._loss(x, rows).item() == pytest.approx(wanted.item(), rel=1e-4)


def test_the_student_comes_nearer_and_goes_on_after_a_stop(
    helpers: Any, parts: tuple[nn.Module, FeatureTeacher, Images], tmp_path: Path
) -> None:
    """The same weights as without a stop; the layer that matches leaves no trace in them."""
    student, teacher, images = parts
    names, start = [*student.state_dict()], {name: value.clone() for name, value in student.state_dict().items()}
    losses, ended = [], []
    for stops in (False, True):
        student.load_state_dict(start)
        torch.manual_seed(7)
        training = Training(student, images, PLAIN, teacher=teacher, checkpoint=tmp_path / f"checkpoint{stops}")
        training.run(1)
        if stops:
            training = Training(student, images, PLAIN, teacher=teacher, checkpoint=tmp_path / f"checkpoint{stops}")
        training.run()
        losses.append([row["loss"] for row in training.history])
        ended.append({name: value.clone() for name, value in student.state_dict().items()})
    assert losses[0][-1] < losses[0][0] - 0.1
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert [*student.state_dict()] == names
    for name, value in ended[0].items():
        assert torch.allclose(value, ended[1][name], atol=1e-5), name


def test_what_cannot_learn_features(parts: tuple[nn.Module, FeatureTeacher, Images], tmp_path: Path) -> None:
    student, teacher, images = parts
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="without mixup"):
        Training(student, images, dataclasses.replace(RECIPES["evit"], batch_size=8), teacher=teacher)
    with pytest.raises(UserError, match="holds no images"):
        images_below(str(empty))
