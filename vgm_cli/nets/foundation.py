"""Frozen networks whose features are a grid: what a tokenizer's latents are drawn towards (VA-VAE).

DINOv2 and MAE: hustvl/LightningDiT@2725fed vavae/ldm/models/foundation_models.py. Any other network that maps images
(B, C, H, W) in [-1, 1] to (B, D, h, w) serves as well. Weights come from files that the user has.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.errors import MISSING_ASSET, USAGE, VgmError
from vgm_cli.nets import vit
from vgm_cli.nets.colour_features import ColourCNN, load_colour_features, to_small
from vgm_cli.nets.mnist_features import MEAN, STD, MnistCNN, load_mnist_features, to_digits
from vgm_cli.nn.example import noise
from vgm_cli.ranges import Depth, Side, Width
from vgm_cli.weights.state import read_state

ASSETS = resources.files("vgm_cli") / "assets"
WHERE = "file=FILE: DINOv2 (dinov2_vitl14_pretrain.pth, timm/vit_large_patch14_dinov2.lvd142m) or MAE (timm)"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of pixels in [0, 1]


class Frozen(nn.Module):
    """A network that is never trained and stays in evaluation mode."""

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)


class VisionFeatures(Frozen):
    """Features of the patches of a vision transformer, (B, D, h, w), of images (B, 3 or 1, S, S) in [-1, 1].

    Without a file it has random weights, for plans alone: forward then raises VgmError (exit code 4), as does a file
    that holds no such network.
    """

    def __init__(
        self,
        file: str | None = None,  # weights; sizes are read off them
        size: Side | None = 224,  # images are resized to it (bilinear), None: not; 224 is 16 patches of DINOv2
        normalise: bool = False,  # pixels are normalised as for ImageNet, which VA-VAE's training leaves out
        heads: Depth | None = None,  # attention heads; None: of 64 channels, as published
        width: Width = 1024,  # without a file: of the tokens
        depth: Depth = 24,  # without a file: number of blocks
        patch: Width = 14,  # without a file: side of a patch in pixels
        grid: Depth = 37,  # without a file: patches per side of the position table
    ):
        super().__init__()
        self.size, self.normalise, self.loaded = size, normalise, file is not None
        if file is not None and not Path(file).is_file():
            raise VgmError(f"no such file: {file}", WHERE, MISSING_ASSET)
        if file is not None and torch.get_default_device().type != "meta":
            self.vit = vit.build(read_state(file, WHERE), file, heads)
        else:
            self.vit = vit.VisionTransformer(width, depth, heads or max(width // 64, 1), patch, grid, 4 * width)
        self.requires_grad_(False).eval()

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        side = 32 if config["size"] else 2 * config["patch"]
        return {"x": noise(1, 3, side, side)}

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        if not self.loaded:
            raise VgmError("the foundation model has no weights", WHERE, MISSING_ASSET)
        if x.shape[2] != x.shape[3]:
            raise VgmError(f"the foundation model takes square images, not {x.shape[2]}x{x.shape[3]}", code=USAGE)
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        if self.size is not None:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)
        if x.shape[2] % self.vit.side:
            raise VgmError(f"{x.shape[2]} pixels are no multiple of the patch {self.vit.side}", "size=224", USAGE)
        if self.normalise:
            mean, std = (x.new_tensor(v)[:, None, None] for v in IMAGENET)
            x = ((x + 1) / 2 - mean) / std
        return self.vit.grid_features(x)


class DigitFeatures(Frozen):
    """The shipped digit classifier's features before its last halving, (B, 64, 7, 7), of images (B, C, H, W) in
    [-1, 1], which become 28x28 grey ones."""

    def __init__(self) -> None:
        super().__init__()
        net = MnistCNN()
        if torch.get_default_device().type != "meta":
            net = load_mnist_features(str(ASSETS / "mnist-features.safetensors"))
        self.body = net.body[:4]
        self.requires_grad_(False).eval()

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"x": noise(1, 1, 28, 28)}

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.body((to_digits(x) - MEAN) / STD)


class ColourFeatures(Frozen):
    """The shipped colour network's features before its last halving, (B, 96, 8, 8), of images (B, C, H, W) in [-1, 1],
    which become 32x32 ones."""

    def __init__(self) -> None:
        super().__init__()
        net = ColourCNN()
        if torch.get_default_device().type != "meta":
            net = load_colour_features(str(ASSETS / "colour-features.safetensors"))
        self.body = net.body[:3]
        self.requires_grad_(False).eval()

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"x": noise(1, 3, 32, 32)}

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.body(to_small(x))
