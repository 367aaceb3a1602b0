"""Metrics against scikit-learn's and figures worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, top_k_accuracy_score

from nas.evaluate.metrics import Answers, by_class, calibration, calibration_error, confusion, top1, top5


@pytest.fixture(scope="module")
def outputs() -> tuple[np.ndarray, np.ndarray]:
    """Logits (300, 9) that are often right, and labels."""
    random = np.random.default_rng(0)
    truth = random.integers(0, 9, 300)
    logits = random.normal(size=(300, 9)).astype(np.float32)
    logits[np.arange(300), truth] += 1
    return logits, truth


def test_accuracy_is_scikit_learns(outputs: tuple[np.ndarray, np.ndarray]) -> None:
    logits, truth = outputs
    answers = Answers.of(logits, truth)
    first, five = top1(answers), top5(answers, 9)
    assert first.percent == pytest.approx(100 * accuracy_score(truth, logits.argmax(1)))
    assert five is not None
    assert five.percent == pytest.approx(100 * top_k_accuracy_score(truth, logits, k=5, labels=range(9)))
    assert first.ci[0] < first.percent < first.ci[1] < five.percent


def test_what_is_taken_for_what_is_scikit_learns(outputs: tuple[np.ndarray, np.ndarray]) -> None:
    logits, truth = outputs
    expected = confusion_matrix(truth, logits.argmax(1), labels=range(9))
    answers, found = Answers.of(logits, truth), np.zeros((9, 9), int)
    for cell in confusion(answers):
        assert cell.images
        found[cell.truth, cell.predicted] = cell.images
    assert (found == expected).all()
    shares = by_class(answers)
    assert [shares[i].percent for i in range(9)] == pytest.approx(100 * expected.diagonal() / expected.sum(1))


def test_equal_outputs_rank_in_order() -> None:
    """As argmax does: the outputs of quantised networks are often equal."""
    answers = Answers.of(np.array([[1.0, 1, 0], [1, 1, 0], [2, 2, 2]]), np.array([0, 1, 2]))
    assert answers.rank.tolist() == [0, 1, 2]
    assert answers.right.tolist() == [True, False, False]
    assert answers.predicted.tolist() == [0, 0, 0]


def test_batches_are_joined(outputs: tuple[np.ndarray, np.ndarray]) -> None:
    logits, truth = outputs
    parts = [Answers.of(logits[part], truth[part]) for part in (slice(0, 7), slice(7, 300))]
    joined, whole = Answers.joined(parts), Answers.of(logits, truth)
    assert all((getattr(joined, name) == getattr(whole, name)).all() for name in ("truth", "predicted", "rank"))
    assert joined.confidence == pytest.approx(whole.confidence)


def test_confidence_is_the_softmax() -> None:
    answers = Answers.of(np.log([[0.7, 0.2, 0.1]]), np.array([1]))
    assert answers.confidence == pytest.approx([0.7])
    assert answers.truth_confidence == pytest.approx([0.2])


def test_the_most_confident_mistakes_come_first() -> None:
    shares = np.array([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8], [0.3, 0.7]])
    assert Answers.of(np.log(shares), np.array([1, 1, 1, 0])).mistakes() == [1, 3, 0]


def test_the_calibration_error_by_hand() -> None:
    """Bins of 1/15: 0.9 and 0.92 lie in (13/15, 14/15], 0.6 ends (8/15, 9/15]. Half of the first two are right."""
    shares = np.array([[0.9, 0.1], [0.92, 0.08], [0.6, 0.4], [0.4, 0.6]])
    bins = calibration(Answers.of(np.log(shares), np.array([0, 1, 0, 1])))
    assert [(i, each.images) for i, each in enumerate(bins) if each.images] == [(8, 2), (13, 2)]
    assert bins[13].accuracy == 0.5
    assert bins[13].confidence == pytest.approx(0.91)
    assert bins[0].accuracy is None
    assert calibration_error(bins) == pytest.approx(100 * (2 * 0.41 + 2 * 0.4) / 4)


def test_certain_and_right_is_calibrated() -> None:
    bins = calibration(Answers.of(1000 * np.eye(3), np.arange(3)))
    assert calibration_error(bins) == 0
    assert bins[-1].images == 3


def test_five_of_five_classes_tells_nothing() -> None:
    assert top5(Answers.of(np.eye(5), np.arange(5)), 5) is None
