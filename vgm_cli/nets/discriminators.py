"""PatchGAN discriminator. Isola et al., CVPR 2017 (arXiv 1611.07004), as used by VQGAN and latent diffusion.

Official code: CompVis/taming-transformers@3ba01b2 taming/modules/discriminator/model.py, modules/util.py (ActNorm).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vgm_cli.nn.example import noise
from vgm_cli.ranges import Depth, Width


class ActNorm(nn.Module):
    """Per-channel shift and scale, set by the first training batch to zero mean and unit deviation.

    x: (B, C, H, W) -> scale * (x + loc).
    """

    initialized: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))
        self._settled = False  # spares a device synchronisation per step once the buffer is known to be set

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        std, mean = torch.std_mean(x.float(), dim=(0, 2, 3), keepdim=True)  # (1, C, 1, 1)
        self.loc.copy_(-mean)
        self.scale.copy_(1 / (std + 1e-6))
        self.initialized.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self._settled:
            if not self.initialized.item():
                self.initialize(x)
            self._settled = True
        return self.scale * (x + self.loc)

    def _load_from_state_dict(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super()._load_from_state_dict(*args, **kwargs)
        self._settled = False  # the loaded buffer decides


class NLayerDiscriminator(nn.Module):
    """Real or fake for every patch: images (B, in_channels, H, W) -> logits (B, 1, h, w).

    ndf: width of the first layer. n_layers: strided convolutions; 3 makes 70-pixel patches. use_actnorm: ActNorm in
    place of BatchNorm. Weights start from N(0, 0.02), BatchNorm's from N(1, 0.02).
    """

    def __init__(self, in_channels: Width = 3, ndf: Width = 64, n_layers: Depth = 3, use_actnorm: bool = False):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2, True)]
        width = ndf
        for i in range(1, n_layers + 1):
            wider = ndf * min(2**i, 8)
            stride = 2 if i < n_layers else 1
            # a bias before BatchNorm would be subtracted again
            layers.append(nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=use_actnorm))
            layers.append(ActNorm(wider) if use_actnorm else nn.BatchNorm2d(wider))
            layers.append(nn.LeakyReLU(0.2, True))
            width = wider
        layers.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)
        self.apply(_initialise)

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"x": noise(1, config["in_channels"], *[max(32, 4 * 2 ** config["n_layers"])] * 2)}

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
