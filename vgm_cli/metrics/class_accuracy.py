"""Class accuracy: the share of conditional samples that a classifier recognises as the class they were made for."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.metrics.base import Measured, MetricBase, Value
from vgm_cli.nets.mnist_features import CLASSES


def accuracy_of(logits: Tensor, labels: np.ndarray) -> float:
    """logits: (N, 10), labels: (N,)."""
    if len(labels) != len(logits):
        raise VgmError(f"{len(logits)} images have {len(labels)} labels", code=USAGE)
    if len(labels) and not (0 <= int(labels.min()) and int(labels.max()) < CLASSES):
        raise VgmError(f"class-accuracy recognises digits 0 to 9, the labels reach {int(labels.max())}", code=USAGE)
    return float((logits.argmax(1).cpu() == torch.as_tensor(labels).long()).double().mean())


class ClassAccuracy(MetricBase):
    """Share of samples that the digit classifier recognises as their class: the shipped one, unless `features` names
    another file."""

    network = "mnist"
    needs_samples = frozenset({"logits", "labels"})

    def __call__(self, samples: Measured, reference: Measured, seed: int) -> list[Value]:
        assert samples.logits is not None and samples.labels is not None and samples.n
        value = accuracy_of(samples.logits, samples.labels)
        return [Value("class-accuracy", value, float(np.sqrt(value * (1 - value) / samples.n)))]
