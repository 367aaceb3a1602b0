"""A linear probe: a network's last layer, fitted to images while all before it stays as it is.

The classifier is multinomial logistic regression on standardised features, its strength chosen by cross-validation. On
20 classes of Tiny-ImageNet and on CIFAR-10, 2,000 images, it has 0.3 to 1.5 points more top-1 and 0.06 to 0.13 nats
less cross-entropy than ridge regression on one-hot labels with calibrated logits (seven features of five networks); on
cats and dogs 0.4 to 0.8 points less, which the images' noise allows. It takes 1 to 4 CPU seconds, ridge 0.1 to 2.

scikit-learn's LogisticRegression, started warm from strength to strength on the same axes, ends at the same accuracy
and cross-entropy in 0.8 to 2 times the CPU seconds where there are 2 to 20 classes (tolerance 1e-3), and its
LogisticRegressionCV in 1.1 to 2.9 times; but with 400 classes, 4,000 images and 640 features that tolerance is 5 points
worse (12 CPU seconds beside 9), and one of 5e-5 still 1 point (42 CPU seconds).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.data.batches import Batch
from nas.errors import UserError
from nas.intervals import of_share
from nas.networks.build import classifier_of
from nas.training.device import failing_as
from nas.training.evaluation import each_batch
from nas.units import counted

STRENGTHS = tuple(10 ** (-step / 2) for step in range(-2, 8))
"""Penalties an image that are tried, strongest first."""
PATIENCE = 2
"""Weaker penalties that are tried after the best one."""
FOLDS = 5
FOLDED = 1_000_000_000
"""Images x features x classes up to which each fold is held out in its turn; beyond, one of them."""
MOST_VALUES = 100_000_000
"""Features and logits of all images together that a fit is given at most: 0.4 GB, which it has some copies of."""
STEPS = 200
TOLERANCE = 1e-5
"""Nats that a step must gain."""
VARIES = 1e-5
"""A feature's standard deviation, over its largest value or the largest deviation of all, below which it is constant:
what is left is the rounding of a dead channel."""
PRIOR = 1.0
"""The penalty on a bias's distance from the logarithm of its class's share: that share counts as an image or so."""
SPREAD = 1e-6
"""A principal axis's variance, over the largest one's, below which it is rounding."""
ALIVE = 1e-3
"""The standard deviation of a channel that is alive, over the largest of all, is above this."""


@dataclass(frozen=True, eq=False)
class Features:
    """What a network's last linear layers are given."""

    values: Tensor
    """(N, F) float32; of several layers side by side."""
    labels: Tensor
    """(N,) int64."""


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear classifier: logits = features @ weight.T + bias."""

    weight: Tensor
    """(classes, F) float32."""
    bias: Tensor
    """(classes,) float32."""
    centre: Tensor
    """(F,) float32: the mean of the features it was fitted on."""
    strength: float
    """The penalty: half of it times the squared weights of standardised features is added to the cross-entropy's sum
    over images, in nats."""
    held_out: HeldOut | None
    """None: no class has two images."""
    seconds: float
    """That fitting took."""


@dataclass(frozen=True)
class HeldOut:
    """What probes of equal strength that were fitted without these images say of them."""

    images: int
    top1: float
    """In percent."""
    interval: tuple[float, float]
    """Wilson's 95% interval, in percent."""
    loss: float
    """Mean cross-entropy, nats."""


# Features


@failing_as("taking features")
def find_features(
    model: nn.Module,
    batches: Iterable[Batch],
    device: str | torch.device = "cpu",
    *,
    progress: Callable[[int], None] | None = None,
) -> Features:
    """Features of one pass over the images; leaves the model on `device`, in eval mode.

    Args:
        model: (B, 3, R, R) -> (B, classes), as `create` or `load` made it.
        progress: called after each batch with the images done.

    Raises:
        UserError: the network does not end in a linear layer, or no image can be used. TrainingError: there is no
            memory for one image, or PyTorch fails.
    """
    layers = classifier_of(model)
    given: list[Tensor] = [torch.empty(0)] * len(layers)

    def keep(place: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            given[place] = inputs[0]

        return hook

    values: list[Tensor] = []
    labels: list[Tensor] = []
    done = 0
    handles = [layer.register_forward_pre_hook(keep(place)) for place, layer in enumerate(layers)]
    try:
        for logits, truth in each_batch(model, batches, device):
            if not values:
                _check(layers, given, logits)
            values.append(torch.cat(given, 1).float().cpu())
            labels.append(truth.cpu())
            done += len(truth)
            if progress is not None:
                progress(done)
    finally:
        for handle in handles:
            handle.remove()
    if not values:
        raise UserError("no image could be used: a probe needs some")
    return Features(torch.cat(values), torch.cat(labels))


def _check(layers: Sequence[nn.Linear], given: Sequence[Tensor], logits: Tensor) -> None:
    """Raise UserError unless the network's answer is the mean of its last layers'."""
    if layers and all(each.ndim == 2 and len(each) == len(logits) for each in given):
        with torch.no_grad():
            answer = torch.stack(
                [F.linear(x, layer.weight, layer.bias) for layer, x in zip(layers, given, strict=True)]
            )
        close = torch.isclose(answer.mean(0), logits, rtol=1e-2, atol=1e-3) | ~logits.isfinite()
        if logits.shape == answer.shape[1:] and close.all():
            return
    raise UserError(
        "the network does not end in a linear layer on pooled features, which a probe and the recipe finetune need: "
        "choose another network, or --recipe quick --weights timm"
    )


def without_dead(features: Tensor) -> Tensor:
    """Features (N, F) with those of channels that are all but dead held at their mean, so that a probe leaves them out.

    Such channels are what a cut leaves. A probe standardises its features, and what is rounding would have weights of
    thousands, which the first update of a training turns into noise: a network cut to a fifth of its parameters fell
    from 76.9 to 25.0% of four classes.
    """
    deviation = features.std(0, correction=0)
    return features.where(deviation > ALIVE * deviation.max(), features.mean(0))


def install(model: nn.Module, probe: Probe) -> None:
    """Make a probe the network's classifier, in place.

    Of several linear layers each gets its own features' part so that their mean is the probe; on average over the
    images it was fitted on, each alone answers as the probe does.

    Raises:
        ValueError: the probe is of other features or classes.
    """
    layers = classifier_of(model)
    widths = [layer.in_features for layer in layers]
    if probe.weight.shape != (layers[0].out_features, sum(widths)):
        raise ValueError(f"a probe of {tuple(probe.weight.shape)} for a classifier of {layers[0]}")
    middle = probe.bias + probe.weight @ probe.centre
    parts = zip(layers, probe.weight.split(widths, 1), probe.centre.split(widths), strict=True)
    with torch.no_grad():
        for layer, weight, centre in parts:
            layer.weight.copy_(len(layers) * weight)
            layer.bias.copy_(middle - len(layers) * weight @ centre)


def give_probe(
    model: nn.Module,
    batches: Iterable[Batch],
    classes: int,
    seed: int,
    device: str | torch.device = "cpu",
    progress: Callable[[int], None] | None = None,
) -> None:
    """Make a linear probe, without all but dead channels, the classifier of a network that `create` or `load` made.

    Args:
        batches: of the images that it is fitted to, one pass, without augmentation.
        progress: as `find_features` takes it.

    Raises:
        UserError: a network without a linear classifier, or features that no probe can be fitted to.
    """
    found = find_features(model, batches, device, progress=progress)
    install(model, fit_probe(without_dead(found.values), found.labels, classes, seed))


# The fit


def most_images(model: nn.Module, classes: int) -> int:
    """How many images a probe on a network can be fitted to, as memory allows.

    Raises:
        UserError: the network does not end in a linear layer.
    """
    return max(1, MOST_VALUES // (sum(layer.in_features for layer in classifier_of(model)) + classes))


@failing_as("fitting the probe")
def fit_probe(
    features: Tensor,
    labels: Tensor,
    classes: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, most: None,
) -> Probe:
    """Fit a probe; its strength is that of least cross-entropy on held-out images.

    Args:
        features: (N, F) float32.
        labels: (N,), from 0 to classes - 1; classes may be without images.
        seed: which images are held out together.
        progress: called before each step with the fits done, and how many there are at most; may raise to stop.

    Raises:
        UserError: features that are not finite, or are the same for every image.
        TrainingError: there is no memory, or PyTorch fails.
    """
    began = time.monotonic()
    problem = _Problem(features, labels, classes, progress)
    strength, held_out = _choose(problem, seed)
    coefficients = problem.zeros()
    for each in (s for s in STRENGTHS if s >= strength):
        coefficients = problem.fit(coefficients, each * problem.images)
    progress(problem.most, problem.most)
    weight, bias = problem.folded_back(coefficients)
    return Probe(weight, bias, problem.mean, strength * problem.images, held_out, time.monotonic() - began)


class _Problem:
    """Logistic regression in the principal axes of standardised features, the bias as one axis more.

    There the penalised loss is nearly as steep along each axis, once each is divided by its own curvature: L-BFGS takes
    tens of steps, not hundreds. The bias is pulled a little to the logarithm of its class's share, so that a class
    without images has one.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int, progress: Callable[[int, int], None]) -> None:
        self.images, self.classes, self.labels = len(labels), classes, labels
        self.progress, self.done, self.most = progress, 0, len(STRENGTHS)
        broken = ~features.isfinite().all(1)
        if broken.any():
            raise UserError(
                f"the network's features of {int(broken.sum()):,} of {counted(len(features), 'image')} are not finite "
                "numbers: its weights are damaged, or do not suit these images"
            )
        self.mean, deviation = features.mean(0), features.std(0, correction=0)
        varies = (deviation > VARIES * features.abs().amax(0)) & (deviation > VARIES * deviation.max())
        if not varies.any():
            raise UserError(
                "the network's features are the same for every image: a probe has nothing to tell classes by; "
                "its weights are damaged, or do not suit these images"
            )
        self.scale = torch.where(varies, 1 / deviation, 0.0)
        values = (features - self.mean) * self.scale
        self.axes, self.spread = _principal_axes(values)
        self.scores = F.pad(values @ self.axes, (0, 1), value=1.0)
        self.prior = ((labels.bincount(minlength=classes) + 0.5) / (len(labels) + 0.5 * classes)).log()

    def zeros(self) -> Tensor:
        """Coefficients to begin with, (axes + 1, classes)."""
        return torch.zeros(self.scores.shape[1], self.classes)

    def fit(self, start: Tensor, strength: float, rows: Tensor | None = None) -> Tensor:
        """Coefficients of least penalised cross-entropy on some rows (None: all), from those of another strength."""
        scores, labels = (self.scores, self.labels) if rows is None else (self.scores[rows], self.labels[rows])
        penalty = F.pad(torch.full_like(self.spread, strength), (0, 1), value=PRIOR)[:, None] / len(labels)
        curvature = (F.pad(self.spread, (0, 1), value=1.0)[:, None] / self.classes + penalty).sqrt()
        scaled, penalty = scores / curvature.T, penalty / (2 * curvature**2)
        wanted = (start * curvature).requires_grad_()
        optimiser = torch.optim.LBFGS(
            [wanted], max_iter=STEPS, tolerance_grad=0, tolerance_change=TOLERANCE, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            self.progress(self.done, self.most)
            optimiser.zero_grad()
            value = F.cross_entropy(scaled @ wanted + self.prior, labels) + (penalty * wanted**2).sum()
            value.backward()
            return value

        optimiser.step(loss)
        self.done += 1
        return wanted.detach() / curvature

    def logits(self, coefficients: Tensor, rows: Tensor) -> Tensor:
        return self.scores[rows] @ coefficients + self.prior

    def folded_back(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (classes, F) and bias (classes,) for the features as they came."""
        weight = ((self.axes @ coefficients[:-1]) * self.scale[:, None]).T
        return weight, coefficients[-1] + self.prior - weight @ self.mean


def _principal_axes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Axes (F, r) that the rows of (N, F) spread along, and their variances (r,)."""
    images, width = values.shape
    wide = width > images
    product = values @ values.T if wide else values.T @ values
    spread, axes = (each.float() for each in torch.linalg.eigh(product.double() / images))
    kept = spread > SPREAD * spread[-1]
    spread, axes = spread[kept], axes[:, kept]
    return (values.T @ (axes / (spread * images).sqrt()) if wide else axes), spread


def _choose(problem: _Problem, seed: int) -> tuple[float, HeldOut | None]:
    """The strength an image of least held-out loss, and what was found with it."""
    folds = list(_folds(problem, seed))
    if not folds:
        return 1.0, None
    problem.most += len(STRENGTHS) * len(folds)
    truth = problem.labels[torch.cat([held for _, held in folds])]
    starts = [problem.zeros() for _ in folds]
    best, chosen, since = None, STRENGTHS[0], 0
    for strength in STRENGTHS:
        starts = [
            problem.fit(start, strength * problem.images, rows) for start, (rows, _) in zip(starts, folds, strict=True)
        ]
        logits = torch.cat([problem.logits(each, held) for each, (_, held) in zip(starts, folds, strict=True)])
        loss = F.cross_entropy(logits, truth).item()
        if best is None or loss < best.loss:
            top1 = 100 * (logits.argmax(1) == truth).double().mean().item()
            found = of_share(top1, len(truth))
            best, chosen, since = HeldOut(len(truth), top1, (found.low, found.high), loss), strength, 0
        else:
            since += 1
            if since == PATIENCE:
                break
    return chosen, best


def _folds(problem: _Problem, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows to fit on, rows held out): each class is spread evenly over the folds."""
    labels = problem.labels.numpy()
    most = int(np.bincount(labels).max())
    if most < 2:
        return
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty(len(labels), dtype=np.int64)
    fold[order] = np.arange(len(labels)) % min(FOLDS, len(labels))
    few = problem.images * problem.scores.shape[1] * problem.classes <= FOLDED
    for each in range(min(FOLDS, len(labels)) if few else 1):
        yield torch.from_numpy(np.flatnonzero(fold != each)), torch.from_numpy(np.flatnonzero(fold == each))
