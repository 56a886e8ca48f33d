"""A small digit classifier whose 64-d embedding is the feature space of Frechet distance and others on digits.

There is no published network for this role, so the numbers are comparable only between runs that name the same weights
(their sha256 is part of every result). Weights: vgm_cli/assets/mnist-features.safetensors, trained by
`python -m vgm_cli.metrics.train_mnist_features`; the file's metadata states data, recipe and held-out accuracy.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.errors import VgmError
from vgm_cli.nets.shipped_features import read_features

SIZE = 28
CLASSES = 10
KIND = "mnist-features"  # metadata "vgm.features" of a weights file
MEAN, STD = 0.1307, 0.3081  # of MNIST in [0, 1]
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, Pillow's "L"
RESIZE = f"grey (ITU-R 601) and antialiased bilinear to {SIZE}x{SIZE} where needed"


def to_digits(x: Tensor) -> Tensor:
    """x: uint8 (B, C, H, W), or float (B, C, H, W) in [-1, 1]; C in {1, 3} -> float (B, 1, 28, 28) in [0, 1].

    Colour becomes grey by ITU-R 601 luma, other sizes are resized (bilinear, antialiased); 28x28 grey is untouched.
    """
    x = x.float() / 255 if x.dtype == torch.uint8 else (x.float() + 1) / 2
    if x.shape[1] == 3:
        x = (x * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    elif x.shape[1] != 1:
        raise VgmError(f"digit features take 1 or 3 channels, not {x.shape[1]}")
    if x.shape[-2:] != (SIZE, SIZE):
        x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
    return x


def block(c_in: int, c_out: int, stride: int = 1, side: int = 3) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, side, stride, side // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class MnistCNN(nn.Module):
    """(B, 1, 28, 28) in [0, 1] -> embedding (B, dim) and digit logits (B, 10)."""

    def __init__(self, dim: int = 64):
        super().__init__()
        self.dim = dim
        self.body = nn.Sequential(
            block(1, 16),
            block(16, 32, stride=2),
            block(32, 64),
            block(64, 64, stride=2),
            block(64, 48, stride=2),
        )
        self.embed = nn.Linear(48 * 4 * 4, dim)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = (x - MEAN) / STD  # (B, 1, 28, 28)
        x = self.body(x)  # (B, 48, 4, 4)
        features = self.embed(x.flatten(1))  # (B, dim): before the non-linearity, so that it is closer to Gaussian
        return features, self.head(F.relu(features))  # (B, dim), (B, 10)


def load_mnist_features(path: str | Path) -> MnistCNN:
    """The network in eval mode, fp32, from a file that the training script wrote.

    Raises VgmError (exit code 4) when the file is missing, (1) when it is something else.
    """
    state = read_features(path, KIND, "digit", "vgm_cli.metrics.train_mnist_features")
    net = MnistCNN(dim=state["embed.weight"].shape[0])
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)
