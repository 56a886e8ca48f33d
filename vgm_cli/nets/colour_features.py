"""A small network whose embedding of colour pictures is the feature space of Frechet distance and others, and in which
pictures are told apart.

There is no published network of this size, so the numbers are comparable only between runs that name the same weights
(their sha256 is part of every result). Weights: vgm_cli/assets/colour-features.safetensors, trained on OpenMoji's
pictures by `python -m vgm_cli.metrics.train_colour_features`; the file's metadata states data, recipe, scores, licence.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.nets.mnist_features import block
from vgm_cli.nets.shipped_features import read_features

SIZE = 32
CLASSES = 8
DIM = 96
KIND = "colour-features"  # metadata "vgm.features" of a weights file
RESIZE = f"antialiased bilinear to {SIZE}x{SIZE} where needed"


def to_small(x: Tensor) -> Tensor:
    """uint8 (B, C, H, W), or float (B, C, H, W) in [-1, 1]; C in {1, 3} -> float (B, 3, 32, 32) in [-1, 1].

    Grey gets three equal channels, other sizes are resized (bilinear, antialiased).
    """
    x = x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x.float()
    if x.shape[-2:] != (SIZE, SIZE):
        x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
    return x.expand(-1, 3, -1, -1)


class ColourCNN(nn.Module):
    """(B, 3, 32, 32) in [-1, 1] -> embedding (B, dim), each number of unit deviation on the training pictures, and
    logits of OpenMoji's classes (B, 8)."""

    def __init__(self, dim: int = DIM):
        super().__init__()
        self.dim = dim
        self.body = nn.Sequential(
            block(3, 32, stride=2, side=5),
            block(32, 64, stride=2),
            block(64, 96),
            block(96, 64, stride=2),
        )
        self.embed = nn.Linear(64 * 4 * 4, dim)
        self.norm = nn.BatchNorm1d(dim, affine=False)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)  # (B, 64, 4, 4)
        features = self.norm(self.embed(x.flatten(1)))  # (B, dim)
        return features, self.head(F.relu(features))  # (B, dim), (B, 8)


def load_colour_features(path: str | Path) -> ColourCNN:
    """The network in eval mode, fp32, from a file that the training script wrote.

    Raises VgmError (exit code 4) when the file is missing, (1) when it is something else.
    """
    state = read_features(path, KIND, "colour", "vgm_cli.metrics.train_colour_features")
    net = ColourCNN(dim=state["embed.weight"].shape[0])
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)
