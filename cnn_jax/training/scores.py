"""How good predictions are, from all logits and labels at once: NumPy, float64."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

CALIBRATION_BINS = 15
"""Of confidence, as in Guo et al. 2017, arXiv:1706.04599."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy, in bins of equal width over (0, 1].

    Attributes:
      error: the expected calibration error, `sum_b n_b / n |accuracy_b - confidence_b|`
        (Naeini et al. 2015; Guo et al. 2017, arXiv:1706.04599, eq. 5).
      edges: of the bins, one more than there are bins.
      count: examples in each bin.
      accuracy: share of them that are right; nan in an empty bin.
      confidence: mean probability of their predicted class; nan in an empty bin.
    """

    error: float
    edges: np.ndarray
    count: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of a classifier, over all examples.

    Attributes:
      loss: mean cross-entropy, in nats.
      top1, top5: share of examples whose label is the class, among the five classes, of the
        highest logits; of equal logits, the class with the lower number is first. With fewer than
        five classes, `top5` is 1.
      precision, recall, f1: of each class; 0 where nothing was predicted or there is no example.
      support: examples of each class.
      confusion: examples by [label, predicted class].
      calibration: of the probability of the predicted class.
      labels, losses: of each example.
      predicted: class of each example.
      confidence: probability of the predicted class of each example.
    """

    loss: float
    top1: float
    top5: float
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    support: np.ndarray
    confusion: np.ndarray
    calibration: Calibration
    labels: np.ndarray
    losses: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray

    def worst(self, most: int) -> np.ndarray:
        """Returns the numbers of the wrong examples with the highest losses, the worst first."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        return wrong[np.argsort(-self.losses[wrong], kind="stable")][:most]

    def as_dict(self, class_names: Sequence[str]) -> dict[str, Any]:
        """Returns plain values for JSON, without those of each example; None for nan."""
        per_class = (self.precision, self.recall, self.f1, self.support)
        bins = self.calibration
        return {
            "examples": len(self.losses),
            "loss": self.loss,
            "top1": self.top1,
            "top5": self.top5,
            "calibration_error": bins.error,
            "macro_f1": float(self.f1.mean()),
            "classes": [
                {
                    "name": name,
                    "precision": float(precision),
                    "recall": float(recall),
                    "f1": float(f1),
                    "support": int(support),
                }
                for name, precision, recall, f1, support in zip(
                    class_names, *per_class, strict=True
                )
            ],
            "calibration": [
                {
                    "from": float(low),
                    "to": float(high),
                    "count": int(count),
                    "accuracy": float(accuracy) if count else None,
                    "confidence": float(confidence) if count else None,
                }
                for low, high, count, accuracy, confidence in zip(
                    bins.edges[:-1],
                    bins.edges[1:],
                    bins.count,
                    bins.accuracy,
                    bins.confidence,
                    strict=True,
                )
            ],
            "confusion": self.confusion.tolist(),
        }


def score(logits: Float[np.ndarray, "n k"], labels: Int[np.ndarray, " n"]) -> Scores:
    """Returns the scores of these logits; raises ValueError for a label that is no class."""
    examples, classes = logits.shape
    if not examples or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels: must be one or more, each >= 0 and < {classes}")
    exact = logits.astype(np.float64)
    shifted = exact - exact.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    every = np.arange(examples)
    order = np.argsort(-exact, axis=1, kind="stable")
    predicted = order[:, 0]
    confidence = np.exp(log_probabilities[every, predicted])
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    right, support = np.diag(confusion), confusion.sum(axis=1)
    losses = -log_probabilities[every, labels]
    return Scores(
        loss=float(losses.mean()),
        top1=float((predicted == labels).mean()),
        top5=float((order[:, :5] == labels[:, None]).any(axis=1).mean()),
        precision=right / np.maximum(confusion.sum(axis=0), 1),
        recall=right / np.maximum(support, 1),
        f1=2 * right / np.maximum(confusion.sum(axis=0) + support, 1),
        support=support,
        confusion=confusion,
        calibration=calibrate(confidence, predicted == labels),
        labels=labels,
        losses=losses,
        predicted=predicted,
        confidence=confidence,
    )


def calibrate(
    confidence: np.ndarray, right: np.ndarray, *, bins: int = CALIBRATION_BINS
) -> Calibration:
    """Returns how the confidence of predictions compares with the share of them that is right."""
    edges = np.linspace(0.0, 1.0, bins + 1)
    numbers = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    count = np.bincount(numbers, minlength=bins)
    sums = [np.bincount(numbers, weights, bins) for weights in (right, confidence)]
    accuracy, mean_confidence = (
        np.where(count > 0, each / np.maximum(count, 1), np.nan) for each in sums
    )
    gaps = np.where(count > 0, np.abs(accuracy - mean_confidence), 0.0)
    error = float((gaps * count).sum() / count.sum())
    return Calibration(error, edges, count, accuracy, mean_confidence)
