"""Which images choose between networks."""

from __future__ import annotations

import numpy as np
import pytest

import nas.training.holdout
from nas.data.images import Images
from nas.training.holdout import LEAST, hold_out


def images(*of_class: int) -> Images:
    labels = [label for label, count in enumerate(of_class) for _ in range(count)]
    return Images([np.zeros((4, 4), np.uint8)] * len(labels), labels, None)


@pytest.mark.parametrize(
    ("of_class", "held"),
    [((1000, 1000), 300), ((100, 100), 40), ((10_000, 10_000), 2000), ((30_000, 30_000), 2000), ((9, 9), 0)],
)
def test_how_many_choose(of_class, held):
    rest, chosen = hold_out(images(*of_class), seed=0)
    assert len(chosen) == held
    assert sorted(rest + chosen) == list(range(sum(of_class)))


def test_small_classes_are_trained_on_whole():
    data = images(200, 1, 4, 200)
    _, chosen = hold_out(data, seed=0)
    labels = np.asarray(data.labels)
    assert set(labels[chosen]) == {0, 3}
    assert len(chosen) >= LEAST
    assert hold_out(data, seed=1)[1] != chosen


def test_what_the_weights_have_seen_does_not_choose(monkeypatch):
    data = images(100, 100)
    seen = np.arange(200) % 2 == 0
    monkeypatch.setattr(nas.training.holdout, "seen_by", lambda start: np.ones(1, np.uint64))
    monkeypatch.setattr(nas.training.holdout, "seen_among", lambda images, known: seen)
    _, chosen = hold_out(data, 0, "runs/a/model.safetensors")
    assert len(chosen) >= LEAST
    assert not seen[chosen].any()
