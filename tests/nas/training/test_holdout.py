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
    [((1000, 1000), 300), ((100, 100), 40), ((10_000, 10_000), 2000), ((30_000, 30_000), 2000)],
)
def test_how_many_choose(of_class, held):
    parts = hold_out(images(*of_class), seed=0)
    assert len(parts.judge) == held
    assert sorted(parts.train + parts.judge) == list(range(sum(of_class)))
    assert not parts.warning


def test_of_too_few_none_is_held_out():
    parts = hold_out(images(9, 9), seed=0)
    assert (parts.train, parts.judge) == (list(range(18)), [])
    assert "too few images to hold some out" in parts.warning
    assert "no class has 5 images to hold some out" in hold_out(images(*[4] * 50), seed=0).warning


def test_small_classes_are_trained_on_whole():
    data = images(200, 1, 4, 200)
    chosen = hold_out(data, seed=0).judge
    labels = np.asarray(data.labels)
    assert set(labels[chosen]) == {0, 3}
    assert len(chosen) >= LEAST
    assert hold_out(data, seed=1).judge != chosen


@pytest.mark.parametrize("unseen", [100, 3, 0])
def test_what_the_weights_have_seen_chooses_only_where_nothing_else_can(monkeypatch, unseen):
    data, seen = images(100, 100), np.ones(200, bool)
    seen[100 - unseen // 2 : 100 + (unseen + 1) // 2] = False
    monkeypatch.setattr(nas.training.holdout, "seen_by", lambda start: np.ones(1, np.uint64))
    monkeypatch.setattr(nas.training.holdout, "seen_among", lambda images, known: seen)
    parts = hold_out(data, 0, "runs/a/model.safetensors")
    assert len(parts.judge) >= LEAST
    assert not set(parts.train) & set(parts.judge)
    assert seen[parts.judge].any() == ("the weights were trained on" in parts.warning) == (unseen < LEAST)
