"""Accuracy on the images of the evaluation, by torch and by any session that runs the network."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ..export.golden import Runner, run_in_batches
from .data import Images, Progress, normalise
from .journal import Journal, digest_of
from .prepared import Prepared
from .tune import evaluate


def accuracy_of(model: nn.Module, ready: Prepared, journal: Journal) -> float | None:
    """Top-1 of the network as torch runs it; None without labels."""
    if not ready.data.has_accuracy:
        return None
    return evaluate(model, ready.test, progress=journal.display.progress).top1


def top1(outputs: np.ndarray, ready: Prepared) -> float | None:
    """Top-1 of outputs for those images; None without labels."""
    if not ready.data.has_accuracy:
        return None
    return float((outputs.argmax(1) == ready.test.labels.numpy()).mean())


def outputs_of(session: Runner, images: Images, progress: Progress) -> np.ndarray:
    """The session's outputs for every image, decoded as they are needed."""
    rows = []
    for indices in torch.arange(len(images)).split(32):
        rows.append(run_in_batches(session, normalise(images.read(indices)).numpy()))
        progress((int(indices[-1]) + 1) / len(images), "accuracy")
    return np.concatenate(rows)


def evaluation_key(ready: Prepared) -> str:
    """Digest of which images they are."""
    return digest_of(ready.data.digest, ready.recipe.data.eval_images, ready.recipe.seed)
