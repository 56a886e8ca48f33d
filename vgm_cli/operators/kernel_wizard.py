"""The learned blur of Tran et al., "Explore Image Deblurring via Encoded Blur Kernel Space" (CVPR 2021, 2104.00317).

VinAIResearch/blur-kernel-space-exploring@f2fe73e, GOPRO_wVAE: the half of its KernelWizard that blurs a sharp image by
a code; parameter names are the official checkpoint's. The half that estimates codes is left out.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.errors import FAILED, MISSING_ASSET, VgmError
from vgm_cli.weights.state import read_state

USED = ("feature_extractor.", "adapter.", "recon_trunk.")
WHERE = "weights=GOPRO_wVAE.pth of VinAIResearch/blur-kernel-space-exploring"


class Residual(nn.Module):
    """x + conv(relu(conv(x)))."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class Skip(nn.Module):
    """One level of the U-shaped adapter around the next; `code` joins at the innermost one.

    The activation before the convolution acts in place in the official code, so what skips is activated too.
    """

    def __init__(self, outer: int, inner: int, submodule: Skip | None, outermost: bool = False):
        super().__init__()
        self.outermost = outermost
        down = nn.Conv2d(outer, inner, 4, 2, 1, bias=False)
        up = nn.ConvTranspose2d(inner * 2, outer, 4, 2, 1, bias=outermost)
        # positions as in the official Sequentials: norms are identities, activations hold no weights
        self.down = nn.Sequential(down) if outermost else nn.Sequential(nn.Identity(), down)
        self.up = nn.Sequential(nn.ReLU(), up)
        if submodule is not None:
            self.submodule = submodule

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        if not self.outermost:
            x = F.leaky_relu(x, 0.2)
        h = self.down(x)
        h = self.submodule(h, code) if hasattr(self, "submodule") else torch.cat([h, code], dim=1)
        h = self.up(h)
        return torch.tanh(h) if self.outermost else torch.cat([h, x], dim=1)


class Adapter(nn.Module):
    def __init__(self, nf: int):
        super().__init__()
        block = Skip(nf * 8, nf * 8, None)
        for outer, inner in ((nf * 4, nf * 8), (nf * 2, nf * 4), (nf, nf * 2)):
            block = Skip(outer, inner, block)
        self.model = Skip(nf, nf, block, outermost=True)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        return self.model(x, code)


class KernelWizard(nn.Module):
    """Blur of x: (B, 3, 256, 256) in [0, 1] by code: (B, 8 nf, 2, 2) -> (B, 3, 256, 256)."""

    def __init__(self, nf: int = 64, front: int = 10, back: int = 20):
        super().__init__()
        slope = nn.LeakyReLU(0.1)
        strided = [layer for _ in range(2) for layer in (nn.Conv2d(nf, nf, 3, 2, 1), slope)]
        first = [nn.Conv2d(3, nf, 3, padding=1), slope, *strided]
        self.feature_extractor = nn.Sequential(*first, *(Residual(nf) for _ in range(front)))
        self.adapter = Adapter(nf)
        grow: list[nn.Module] = []
        for width in (nf, 64):
            grow += [nn.Conv2d(nf, width * 4, 3, padding=1), nn.PixelShuffle(2), slope]
        last = [nn.Conv2d(64, 64, 3, padding=1), slope, nn.Conv2d(64, 3, 3, padding=1)]
        self.recon_trunk = nn.Sequential(*(Residual(nf) for _ in range(back)), *grow, *last)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        return x + self.recon_trunk(self.adapter(self.feature_extractor(x), code))


def load(path: str) -> KernelWizard:
    """The network with the official weights (.pth or .safetensors). VgmError: missing or unfitting file."""
    if not Path(path).is_file():
        raise VgmError(f"no such file: {path}", WHERE, MISSING_ASSET)
    state = read_state(path, WHERE)
    try:
        network = KernelWizard()
        network.load_state_dict({k: v.float() for k, v in state.items() if k.startswith(USED)})
    except RuntimeError as e:
        raise VgmError(f"{path} is no KernelWizard: {str(e).splitlines()[0]}", WHERE, FAILED) from e
    return network.eval().requires_grad_(False)
