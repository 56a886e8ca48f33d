"""LPIPS, the learned perceptual distance. Zhang et al., CVPR 2018 (arXiv 1801.03924), version 0.1 with VGG16.

Official code: richzhang/PerceptualSimilarity; CompVis/taming-transformers@3ba01b2 taming/modules/losses/lpips.py.
Weights come from files that the user has: torchvision's VGG16 (vgg16-397923af.pth) and the five linear heads that the
PyPI package `lpips` ships as weights/v0.1/vgg.pth (7 kB). Deviation: the heads' dropout, inactive in evaluation, is
left out, so that it cannot wake up inside a training loop.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vgm_cli.convert_api import Layout
from vgm_cli.errors import MISSING_ASSET, USAGE, VgmError
from vgm_cli.nets.vgg import WIDTHS, VGG16Features
from vgm_cli.nn.example import noise
from vgm_cli.weights.state import read_state

SHIFT = (-0.030, -0.088, -0.188)  # maps [-1, 1] to what VGG16 was trained on
SCALE = (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """Perceptual distance of image pairs. vgg, heads: weight files (.pth, .pt or .safetensors), both or neither;
    without them weights must arrive by load_state_dict before the first forward, else that raises VgmError (code 4).
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, vgg: str | None = None, heads: str | None = None):
        super().__init__()
        if (vgg is None) != (heads is None):
            raise VgmError("LPIPS needs both files, vgg and heads", WHERE, USAGE)
        for file in (vgg, heads):
            if file is not None and not Path(file).is_file():
                raise VgmError(f"no such file: {file}", WHERE, MISSING_ASSET)
        self.vgg = VGG16Features()
        self.heads = nn.ModuleList(nn.Conv2d(c, 1, 1, bias=False) for c in WIDTHS)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)
        self.loaded = False
        self.register_load_state_dict_post_hook(_note_loaded)
        if vgg is not None and heads is not None and not self.shift.is_meta:
            self.load_state_dict(to_ours({**read_state(vgg, WHERE), **read_state(heads, WHERE)}))
        self.requires_grad_(False)
        self.eval()

    def features(self, x: Tensor) -> list[Tensor]:
        """Five VGG16 activations of x: (B, 3 or 1, H, W) in [-1, 1]."""
        return self.vgg((x - self.shift) / self.scale)  # a single channel broadcasts to three

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        x = noise(1, 3, 32, 32)
        return {"a": x, "b": x.flip(-1)}

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """a, b: (B, 3 or 1, H, W) in [-1, 1], H and W >= 16 -> distances (B, 1, 1, 1). Differentiable in both."""
        if not self.loaded:
            raise VgmError("LPIPS has no weights", WHERE, MISSING_ASSET)
        if min(a.shape[2:]) < 16:
            raise VgmError(f"LPIPS needs images of at least 16 pixels, got {tuple(a.shape[2:])}", code=USAGE)
        total: Tensor | float = 0.0
        for fa, fb, head in zip(self.features(a), self.features(b), self.heads):
            total = total + head((unit(fa) - unit(fb)).square()).mean(dim=(2, 3), keepdim=True)
        assert isinstance(total, Tensor)
        return total


WHERE = "vgg=vgg16-397923af.pth (torchvision's ImageNet VGG16) heads=vgg.pth (lpips/weights/v0.1 of PyPI's lpips)"


def unit(x: Tensor) -> Tensor:
    """Unit length over channels; the epsilon is added to the norm."""
    return x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)


def _note_loaded(module: LPIPS, _keys: object) -> None:
    module.loaded = True


# -- weights ---------------------------------------------------------------------------------------------------------


HEAD = re.compile(r"lin(\d)\.model\.\d\.weight")
SLICE = re.compile(r"(?:net\.slice\d\.|features\.|vgg\.features\.)(\d+)\.(weight|bias)")


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's VGG16 and lpips' heads, or taming's whole LPIPS, -> ours. KeyError when something is missing."""
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if m := HEAD.fullmatch(name):
            ours[f"heads.{m[1]}.weight"] = tensor
        elif m := SLICE.fullmatch(name):
            ours[f"vgg.features.{m[1]}.{m[2]}"] = tensor
        elif name.startswith("heads."):
            ours[name] = tensor
    for name in NAMES:
        if name not in ours:
            raise KeyError(name)
    return {name: ours[name].float() for name in NAMES}


def from_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ours -> taming's layout (net.sliceK.N, linK.model.1, scaling_layer)."""
    theirs: dict[str, Tensor] = {
        "scaling_layer.shift": torch.tensor(SHIFT)[None, :, None, None],
        "scaling_layer.scale": torch.tensor(SCALE)[None, :, None, None],
    }
    for name in NAMES:
        kind, *_, index, part = name.split(".")
        if kind == "heads":
            theirs[f"lin{index}.model.1.weight"] = state[name]
        else:
            theirs[f"net.slice{slice_of(int(index))}.{index}.{part}"] = state[name]
    return theirs


def slice_of(index: int) -> int:
    """The slice (1 to 5) that holds layer `index` of torchvision's features."""
    from vgm_cli.nets.vgg import TAPS

    return 1 + sum(index > tap for tap in TAPS)


def recognise(keys: Iterable[str]) -> bool:
    keys = set(keys)
    return {"lin0.model.1.weight", "net.slice1.0.weight"} <= keys


NAMES = [
    *(f"vgg.features.{i}.{k}" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28) for k in ("weight", "bias")),
    *(f"heads.{i}.weight" for i in range(5)),
]

CONVERTER = Layout(
    name="lpips",
    component="lpips",
    recognise=recognise,
    to_ours=to_ours,
    from_ours=from_ours,
    config=lambda state: {},
    summary="taming-transformers' LPIPS (VGG16 slices and linear heads)",
)
