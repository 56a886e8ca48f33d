"""Frozen networks of images: their features as a grid, what a tokenizer's latents are drawn towards (VA-VAE), and at
several depths, what a projected discriminator looks at (StyleGAN-T, ADD).

DINOv2 and MAE: hustvl/LightningDiT@2725fed vavae/ldm/models/foundation_models.py; levels of a vision transformer:
autonomousvision/stylegan-t@36ab80c networks/{discriminator,vit_utils}.py. Any other network that maps images (B, C, H,
W) in [-1, 1] to (B, D, h, w) serves for grids, any `ShowsLevels` for discriminators. Weights come from files that the
user has.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.errors import MISSING_ASSET, USAGE, VgmError
from vgm_cli.nets import colour_features, mnist_features, vit
from vgm_cli.nets.colour_features import ColourCNN, load_colour_features, to_small
from vgm_cli.nets.mnist_features import MEAN, STD, MnistCNN, load_mnist_features, to_digits
from vgm_cli.nn.example import noise
from vgm_cli.ranges import Depth, Side, Whole, Width
from vgm_cli.weights.state import read_state

ASSETS = resources.files("vgm_cli") / "assets"
WHERE = "file=FILE: DINOv2 (dinov2_vitl14_pretrain.pth, timm/vit_large_patch14_dinov2.lvd142m) or MAE (timm)"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of pixels in [0, 1]


@runtime_checkable
class ShowsLevels(Protocol):
    """A network of images that shows what it computes at several depths.

    channels: of every level. side: of the images that it sees, to which others are resized; None: they stay. dim: width
    of `embedding`. Both functions are differentiable.
    """

    channels: Sequence[int]
    side: int | None
    dim: int

    def levels(self, x: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) in [-1, 1] -> features (B, channels[k], N_k) of every level; N_k places or patches."""
        ...

    def embedding(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> one vector of each, (B, dim)."""
        ...


class Frozen(nn.Module):
    """A network that is never trained and stays in evaluation mode."""

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)


class VisionFeatures(Frozen):
    """Features of the patches of a vision transformer, (B, D, h, w), of images (B, 3 or 1, H, W) in [-1, 1].

    Without a file it has random weights, for plans alone: forward then raises VgmError (exit code 4), as does a file
    that holds no such network. For discriminators normalise=true and resize=area are StyleGAN-T's.
    """

    def __init__(
        self,
        file: str | None = None,  # weights; sizes are read off them
        size: Side | None = 224,  # both sides become it, None: they stay; 224 is 16 patches of DINOv2
        normalise: bool = False,  # pixels are normalised as for ImageNet, which VA-VAE's training leaves out
        heads: Depth | None = None,  # attention heads; None: of 64 channels, as published
        width: Width = 1024,  # without a file: of the tokens
        depth: Depth = 24,  # without a file: number of blocks
        patch: Width = 14,  # without a file: side of a patch in pixels
        grid: Depth = 37,  # without a file: patches per side of the position table
        resize: Literal["bilinear", "area"] = "bilinear",  # how images are resized
        hooks: tuple[Whole, ...] | None = None,  # blocks behind which are levels; None: four, 2, 5, 8, 11 of twelve
        hook_patch: bool = True,  # the last level are the tokens before the first block
    ):
        super().__init__()
        self.size, self.normalise, self.loaded = size, normalise, file is not None
        if file is not None and not Path(file).is_file():
            raise VgmError(f"no such file: {file}", WHERE, MISSING_ASSET)
        if file is not None and torch.get_default_device().type != "meta":
            self.vit = vit.build(read_state(file, WHERE), file, heads)
        else:
            self.vit = vit.VisionTransformer(width, depth, heads or max(width // 64, 1), patch, grid, 4 * width)
        blocks = len(self.vit.blocks)
        self.hooks = hooks or tuple(max(1, blocks * k // 4) - 1 for k in (1, 2, 3, 4))
        if max(self.hooks) >= blocks:
            raise VgmError(f"hooks={list(self.hooks)} of {blocks} blocks", "their numbers begin with 0", USAGE)
        self.hook_patch, self.resize, self.side, self.dim = hook_patch, resize, size, self.vit.dim
        self.channels = (self.vit.patch.weight.shape[0],) * (len(self.hooks) + hook_patch)
        self.requires_grad_(False).eval()

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        side = 32 if config["size"] else 2 * config["patch"]
        return {"x": noise(1, 3, side, side)}

    def prepared(self, x: Tensor) -> Tensor:
        """Images as the transformer sees them. VgmError: there are no weights, or the images do not fit."""
        if not (self.loaded or x.is_meta):
            raise VgmError("the foundation model has no weights", WHERE, MISSING_ASSET)
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        if self.size is not None:
            x = F.interpolate(x, (self.size, self.size), mode=self.resize)
        if any(n % self.vit.side for n in x.shape[2:]):
            sides = " by ".join(map(str, x.shape[2:]))
            raise VgmError(f"{sides} pixels are no multiples of the patch {self.vit.side}", "size=224", USAGE)
        if self.normalise:
            mean, std = (x.new_tensor(v)[:, None, None] for v in IMAGENET)
            x = ((x + 1) / 2 - mean) / std
        return x

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.vit.grid_features(self.prepared(x))

    def levels(self, x: Tensor) -> list[Tensor]:
        """ShowsLevels: the patches of every level, the class token added to each, (B, D, N)."""
        found = self.vit.levels(self.prepared(x), self.hooks)
        return [(t[:, 1:] + t[:, :1]).transpose(1, 2) for t in found[: len(self.channels)]]

    def embedding(self, x: Tensor) -> Tensor:
        """ShowsLevels: the class token's features."""
        return self.vit(self.prepared(x))  # type: ignore[no-any-return]


class SmallFeatures(Frozen):
    """A shipped network of small pictures: the features of its first blocks as a grid. Levels are those of its first
    four blocks, before their rectifiers, whose zeros would hide half of what there is."""

    channels: Sequence[int]
    side: int | None

    def __init__(self, net: nn.Module, blocks: int, dim: int):
        super().__init__()
        self.net, self.blocks, self.dim = net, blocks, dim
        self.requires_grad_(False).eval()

    @abstractmethod
    def inputs(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] as the network takes them."""

    def normalised(self, x: Tensor) -> Tensor:
        """Images as the network's first block takes them."""
        return self.inputs(x)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.net.body[: self.blocks](self.normalised(x))  # type: ignore[index, operator, no-any-return]

    def levels(self, x: Tensor) -> list[Tensor]:
        """ShowsLevels."""
        h, found = self.normalised(x), []
        for block in self.net.body[:4]:  # type: ignore[index, union-attr]
            h = block[:2](h)
            found.append(h.flatten(2))
            h = F.relu(h)
        return found

    def embedding(self, x: Tensor) -> Tensor:
        """ShowsLevels: what Frechet distances are measured on."""
        return self.net(self.inputs(x))[0]  # type: ignore[no-any-return]


class DigitFeatures(SmallFeatures):
    """The shipped digit classifier's features before its last halving, (B, 64, 7, 7), of images (B, C, H, W) in
    [-1, 1], which become 28x28 grey ones."""

    channels, side = (16, 32, 64, 64), mnist_features.SIZE

    def __init__(self) -> None:
        net = MnistCNN()
        if torch.get_default_device().type != "meta":
            net = load_mnist_features(str(ASSETS / "mnist-features.safetensors"))
        super().__init__(net, 4, net.dim)

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"x": noise(1, 1, 28, 28)}

    def inputs(self, x: Tensor) -> Tensor:
        return to_digits(x)

    def normalised(self, x: Tensor) -> Tensor:
        return (to_digits(x) - MEAN) / STD


class ColourFeatures(SmallFeatures):
    """The shipped colour network's features before its last halving, (B, 96, 8, 8), of images (B, C, H, W) in [-1, 1],
    which become 32x32 ones."""

    channels, side = (32, 64, 96, 64), colour_features.SIZE

    def __init__(self) -> None:
        net = ColourCNN()
        if torch.get_default_device().type != "meta":
            net = load_colour_features(str(ASSETS / "colour-features.safetensors"))
        super().__init__(net, 3, net.dim)

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"x": noise(1, 3, 32, 32)}

    def inputs(self, x: Tensor) -> Tensor:
        return to_small(x)
