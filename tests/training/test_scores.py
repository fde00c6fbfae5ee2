"""Scores against loops of plain Python, written from the definitions."""

import math

import numpy as np
import pytest

from cnn_jax.training.scores import calibrate, score

CLASSES = 7


@pytest.fixture(scope="module")
def examples():
    """Logits with ties, and a class (6) that has no example and is never predicted."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES - 1, 200)
    logits = np.round(rng.normal(size=(200, CLASSES)) * 2, 1)
    logits[np.arange(200), labels] += 1
    logits[:, CLASSES - 1] = -20
    return logits.astype(np.float32), labels


def probabilities(row) -> list[float]:
    weights = [math.exp(float(value)) for value in row]
    return [weight / sum(weights) for weight in weights]


def ranked(row) -> list[int]:
    return sorted(range(CLASSES), key=lambda number: (-row[number], number))


def test_loss_and_top_k(examples):
    logits, labels = examples
    scores = score(logits, labels)
    pairs = list(zip(logits, labels, strict=True))
    losses = [-math.log(probabilities(row)[label]) for row, label in pairs]
    np.testing.assert_allclose(scores.losses, losses, rtol=1e-12)
    assert scores.loss == pytest.approx(sum(losses) / 200, rel=1e-12)
    assert scores.top1 == sum(ranked(row)[0] == label for row, label in pairs) / 200
    assert scores.top5 == sum(label in ranked(row)[:5] for row, label in pairs) / 200
    assert 0.2 < scores.top1 < scores.top5 < 1


def test_each_class(examples):
    logits, labels = examples
    scores = score(logits, labels)
    predicted = np.array([ranked(row)[0] for row in logits])
    for each in range(CLASSES):
        true = sum((predicted == each) & (labels == each))
        false, missed = sum(predicted == each) - true, sum(labels == each) - true
        assert scores.precision[each] == (true / (true + false) if true + false else 0)
        assert scores.recall[each] == (true / (true + missed) if true + missed else 0)
        both = 2 * true + false + missed
        assert scores.f1[each] == (2 * true / both if both else 0)
        for other in range(CLASSES):
            expected = sum((labels == each) & (predicted == other))
            assert scores.confusion[each, other] == expected
    assert scores.f1[-1] == scores.support[-1] == 0


def test_calibration_error_by_its_definition(examples):
    logits, labels = examples
    error = 0.0
    for number in range(15):
        members = [
            (max(probabilities(row)), ranked(row)[0] == label)
            for row, label in zip(logits, labels, strict=True)
            if number / 15 < max(probabilities(row)) <= (number + 1) / 15
        ]
        if members:
            confidence, right = (sum(each) / len(members) for each in zip(*members, strict=True))
            error += len(members) / 200 * abs(right - confidence)
    assert score(logits, labels).calibration.error == pytest.approx(error, rel=1e-9)


def test_calibration_of_a_case_worked_by_hand():
    found = calibrate(np.array([0.9, 0.8, 0.3, 0.5]), np.array([1, 0, 1, 0]), bins=2)
    assert found.count.tolist() == [2, 2]
    np.testing.assert_allclose(found.accuracy, [0.5, 0.5])
    np.testing.assert_allclose(found.confidence, [0.4, 0.85])
    assert found.error == pytest.approx(0.5 * 0.1 + 0.5 * 0.35)
    assert calibrate(np.array([1.0, 1.0]), np.array([1, 1])).error == 0


def test_the_worst_mistakes_come_first(examples):
    logits, labels = examples
    scores = score(logits, labels)
    wrong = [n for n in range(200) if ranked(logits[n])[0] != labels[n]]
    expected = sorted(wrong, key=lambda n: probabilities(logits[n])[labels[n]])
    assert scores.worst(10).tolist() == expected[:10]
    assert len(scores.worst(1000)) == len(wrong)


@pytest.mark.parametrize("labels", [[-1], [3], []])
def test_a_label_that_is_no_class_is_refused(labels):
    with pytest.raises(ValueError, match=r"labels: must be one or more, each >= 0 and < 3"):
        score(np.zeros((len(labels), 3), np.float32), np.array(labels, np.int64))
