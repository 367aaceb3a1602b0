"""What a teacher shows: its pooled features of every image, which the student's are matched to while it trains.

A linear layer between the two is thrown away (as in Romero et al., FitNets, ICLR 2015, but on the last features). So
the teacher may be of any classes and any architecture, and images without labels teach too. It sees each image once,
plain and at its own size, however the student's are augmented.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import Compose

from nas.data.batches import loader
from nas.data.images import Images
from nas.networks.build import classifier_of
from nas.training.probe import Features, find_features

UNLABELLED = -1
"""The label of an image that has none."""
AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class FeatureTeacher:
    """A network whose features teach."""

    model: nn.Module
    """As `create` or `load` made it, of any classes."""
    transform: Compose
    """Makes its images, plain."""
    student: Compose
    """Makes the student's, plain."""
    unlabelled: Images | None = None
    """More images to learn from."""

    def lessons(self, student: nn.Module, images: Images, device: str | torch.device, workers: int = 0) -> Lessons:
        """For a student's training on images."""
        return Lessons(self, student, images, device, workers)


class Lessons:
    """The teacher's features of a training's images, standardised, and the layer that the student's are matched with.

    images: those of the training, with their row as label; `labels` has the true ones. match: (B, F) features of the
    student -> (B, T), the teacher's.
    """

    def __init__(
        self, teacher: FeatureTeacher, student: nn.Module, images: Images, device: str | torch.device, workers: int
    ) -> None:
        more = teacher.unlabelled
        sources = [images.sources[i] for i in range(len(images))]
        self.labels = torch.tensor([*images.labels, *[UNLABELLED] * (0 if more is None else len(more))]).to(device)
        sources += [] if more is None else [more.sources[i] for i in range(len(more))]
        files = images.files if more is None else None
        self.images = Images(sources, range(len(sources)), images.transform, files)
        self._teacher, self._student, self._device, self._workers = teacher, student, device, workers
        self._layer = classifier_of(student)[0]
        width = sum(layer.in_features for layer in classifier_of(teacher.model))
        self.match = nn.Linear(self._layer.in_features, width).to(device)
        nn.init.zeros_(self.match.weight)
        nn.init.zeros_(self.match.bias)
        self.wanted: Tensor | None = None
        self.seen = torch.empty(0)

    def begin(self, fresh: bool) -> None:
        """Let the teacher see all images, once. fresh: begin with the match that suits the student best as it is in
        eval mode; else it begins with the teacher's mean."""
        if self.wanted is not None:
            return
        found = self._features_of(self._teacher.model, self._teacher.transform)
        deviation, mean = torch.std_mean(found.values, 0, correction=0)
        values = (found.values - mean) / torch.where(deviation > 0, deviation, 1.0)
        wanted = values.new_zeros(len(self.images), values.shape[1])
        wanted[found.labels] = values
        self.wanted = wanted.to(self._device)
        if fresh:
            own = self._features_of(self._student, self._teacher.student).values[:, : self._layer.in_features]
            weight, bias = ridge(own, values)
            with torch.no_grad():
                self.match.weight.copy_(weight)
                self.match.bias.copy_(bias)

    def _features_of(self, model: nn.Module, transform: Compose) -> Features:
        """Features, and as their labels the rows of their images: those that can be decoded, which are trained on."""
        batches = loader(self.images.transformed(transform), AT_ONCE, shuffle=False, seed=0, workers=self._workers)
        return find_features(model, batches, self._device)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While it lasts, the student's features are kept in `seen`."""

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.seen = inputs[0]

        handle = self._layer.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def distance(self, rows: Tensor) -> Tensor:
        """Mean squared error of the matched features `seen` of the images in some rows; 1: the teacher's variance."""
        assert self.wanted is not None, "the lessons have not begun"
        return F.mse_loss(self.match(self.seen).float(), self.wanted[rows])


def ridge(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (T, F) and bias (T,) of the linear map from x (N, F) to y (N, T) of least squared error, its penalty the
    mean variance of x."""
    middle = x.mean(0)
    centred = x - middle
    penalty = centred.square().mean() * torch.eye(x.shape[1])
    weight = torch.linalg.solve(centred.T @ centred / len(x) + penalty, centred.T @ (y - y.mean(0)) / len(x)).T
    return weight, y.mean(0) - weight @ middle
