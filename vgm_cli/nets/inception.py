"""InceptionV3 as TensorFlow's 2015-12-05 graph has it: the network behind FID, sFID, IS, KID, precision and recall.

Paper: Szegedy et al., Rethinking the Inception Architecture (arXiv:1512.00567). Weights and key names:
mseitzer/pytorch-fid and toshas/torch-fidelity (pt_inception-2015-12-05-6726825d.pth, one file under two names), or
NVIDIA's TorchScript inception-2015-12-05.pt (NVlabs/stylegan2-ada-pytorch).

Differs from torchvision's: average pools do not count padding, the last block pools by maximum, 1008 logits, no
auxiliary head, batch-norm eps 1e-3, input resized without half-pixel centres and scaled by (x - 128) / 128.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.errors import FAILED, MISSING_ASSET, USAGE, VgmError
from vgm_cli.nn.meta import on_meta
from vgm_cli.weights.state import read_state

SIZE = 299
FORMATS = (
    "pytorch-fid or torch-fidelity state dict (pt_inception-2015-12-05-6726825d.pth, "
    "weights-inception-2015-12-05-6726825d.pth; from the releases of github.com/mseitzer/pytorch-fid or "
    "github.com/toshas/torch-fidelity), or NVIDIA's TorchScript inception-2015-12-05.pt "
    "(nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics)"
)


def missing_weights(message: str, more: str = "") -> VgmError:
    """Exit code 4, naming the accepted files and where they are."""
    hint = f"pass --features FILE or set VGM_INCEPTION: {FORMATS}"
    return VgmError(message, f"{hint}; {more}" if more else hint, MISSING_ASSET)


def tf1_resize(x: Tensor, size: int = SIZE) -> Tensor:
    """Bilinear resize as tf.image.resize_bilinear of TensorFlow 1: source = target * (in / out), no half-pixel centre,
    no antialiasing. x: float (B, C, H, W) -> (B, C, size, size). Columns first, then rows, as the graph does."""
    for dim in (-1, -2):
        old = x.shape[dim]
        if old == size:
            continue
        place = torch.arange(size, dtype=torch.float32, device=x.device) * (old / size)
        low = place.long().clamp_(max=old - 1)
        high = (low + 1).clamp_(max=old - 1)
        part = (place - low).to(x.dtype)
        part = part if dim == -1 else part[:, None]
        a = x.index_select(dim, low)
        x = a + (x.index_select(dim, high) - a) * part
    return x


class ConvBN(nn.Module):
    """Convolution without bias, batch norm (eps 1e-3), ReLU."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int | tuple[int, int], stride: int = 1, padding: int | tuple[int, int] = 0
    ):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


ROW: dict[str, Any] = {"kernel": (1, 7), "padding": (0, 3)}
COLUMN: dict[str, Any] = {"kernel": (7, 1), "padding": (3, 0)}
ROW3: dict[str, Any] = {"kernel": (1, 3), "padding": (0, 1)}
COLUMN3: dict[str, Any] = {"kernel": (3, 1), "padding": (1, 0)}


def average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class BlockA(nn.Module):
    """35x35; mixed, mixed_1, mixed_2 of the graph."""

    def __init__(self, c: int, pooled: int):
        super().__init__()
        self.branch1x1 = ConvBN(c, 64, 1)
        self.branch5x5_1 = ConvBN(c, 48, 1)
        self.branch5x5_2 = ConvBN(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvBN(c, 64, 1)
        self.branch3x3dbl_2 = ConvBN(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvBN(96, 96, 3, padding=1)
        self.branch_pool = ConvBN(c, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(average(x))], 1)


class BlockB(nn.Module):
    """35x35 -> 17x17; mixed_3."""

    def __init__(self, c: int):
        super().__init__()
        self.branch3x3 = ConvBN(c, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvBN(c, 64, 1)
        self.branch3x3dbl_2 = ConvBN(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvBN(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class BlockC(nn.Module):
    """17x17, factorised 7x7; mixed_4 to mixed_7."""

    def __init__(self, c: int, c7: int):
        super().__init__()
        self.branch1x1 = ConvBN(c, 192, 1)
        self.branch7x7_1 = ConvBN(c, c7, 1)
        self.branch7x7_2 = ConvBN(c7, c7, **ROW)
        self.branch7x7_3 = ConvBN(c7, 192, **COLUMN)
        self.branch7x7dbl_1 = ConvBN(c, c7, 1)
        self.branch7x7dbl_2 = ConvBN(c7, c7, **COLUMN)
        self.branch7x7dbl_3 = ConvBN(c7, c7, **ROW)
        self.branch7x7dbl_4 = ConvBN(c7, c7, **COLUMN)
        self.branch7x7dbl_5 = ConvBN(c7, 192, **ROW)
        self.branch_pool = ConvBN(c, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(average(x))], 1)


class BlockD(nn.Module):
    """17x17 -> 8x8; mixed_8."""

    def __init__(self, c: int):
        super().__init__()
        self.branch3x3_1 = ConvBN(c, 192, 1)
        self.branch3x3_2 = ConvBN(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvBN(c, 192, 1)
        self.branch7x7x3_2 = ConvBN(192, 192, **ROW)
        self.branch7x7x3_3 = ConvBN(192, 192, **COLUMN)
        self.branch7x7x3_4 = ConvBN(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)


class BlockE(nn.Module):
    """8x8; mixed_9 (average pool) and mixed_10 (maximum pool, a quirk of the graph that FID depends on)."""

    def __init__(self, c: int, max_pool: bool):
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = ConvBN(c, 320, 1)
        self.branch3x3_1 = ConvBN(c, 384, 1)
        self.branch3x3_2a = ConvBN(384, 384, **ROW3)
        self.branch3x3_2b = ConvBN(384, 384, **COLUMN3)
        self.branch3x3dbl_1 = ConvBN(c, 448, 1)
        self.branch3x3dbl_2 = ConvBN(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvBN(384, 384, **ROW3)
        self.branch3x3dbl_3b = ConvBN(384, 384, **COLUMN3)
        self.branch_pool = ConvBN(c, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, 1) if self.max_pool else average(x)
        parts = [
            self.branch1x1(x),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]
        return torch.cat(parts, 1)


class InceptionV3(nn.Module):
    """Images to the features that evaluation uses. classes: rows of the last layer, 1008 in the published weights."""

    def __init__(self, classes: int = 1008):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, 128)
        self.Mixed_6c = BlockC(768, 160)
        self.Mixed_6d = BlockC(768, 160)
        self.Mixed_6e = BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, max_pool=False)
        self.Mixed_7c = BlockE(2048, max_pool=True)
        self.fc = nn.Linear(2048, classes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x: float (B, 3, H, W) in [0, 255] -> {"pool": (B, 2048), "spatial": (B, 2023), "logits": (B, 1008),
        "logits_unbiased": (B, 1008)}.

        spatial: the first 7 channels of mixed_6's 1x1 branch, 17x17, flattened channels-last (ADM evaluator.py).
        logits_unbiased: without the last layer's bias, which is what ADM's and torch-fidelity's Inception Score use.
        """
        x = (tf1_resize(x) - 128) / 128  # (B, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = F.max_pool2d(x, 3, 2)  # (B, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, 2)  # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (B, 768, 17, 17)
        x = self.Mixed_6d(x)  # (B, 768, 17, 17); its first 192 channels are the 1x1 branch, graph node mixed_6/conv
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 2023)
        x = self.Mixed_7a(self.Mixed_6e(x))  # (B, 1280, 8, 8)
        x = self.Mixed_7c(self.Mixed_7b(x))  # (B, 2048, 8, 8)
        pool = x.mean((2, 3))  # (B, 2048)
        unbiased = F.linear(pool, self.fc.weight)  # (B, 1008)
        return {"pool": pool, "spatial": spatial, "logits": unbiased + self.fc.bias, "logits_unbiased": unbiased}


def is_torchscript(path: Path) -> bool:
    """A zip archive with code, as torch.jit.save writes it."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as z:
        return any(n.endswith("constants.pkl") or "/code/" in n for n in z.namelist())


def load_inception(path: str | Path) -> nn.Module:
    """InceptionV3 with weights, or NVIDIA's TorchScript module, in eval mode on the CPU.

    Raises VgmError: exit code 4 when the file is missing or of another kind, 1 when it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise missing_weights(f"no Inception weights at {path}")
    if path.suffix in (".pb", ".pkl"):
        raise missing_weights(f"{path} is a TensorFlow graph or a pickle, which is not read")
    if is_torchscript(path):
        try:
            return torch.jit.load(str(path), map_location="cpu").eval()
        except RuntimeError as e:
            raise VgmError(f"{path} cannot be read: {str(e).splitlines()[0]}", f"accepted: {FORMATS}", FAILED) from e
    found = read_state(path, f"accepted: {FORMATS}")
    state = {k: v for k, v in found.items() if not k.endswith("num_batches_tracked")}
    if "AuxLogits.fc.weight" in state or ("fc.weight" in state and state["fc.weight"].shape[0] == 1000):
        raise VgmError(
            f"{path} holds torchvision's ImageNet weights, whose features are not those of FID",
            f"accepted: {FORMATS}",
            USAGE,
        )
    with on_meta():
        net = InceptionV3()
    want = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    wrong = sorted(set(want) ^ set(state)) or [k for k in want if want[k].shape != state[k].shape]
    if wrong:
        raise VgmError(
            f"{path} is not the Inception of FID: {len(wrong)} tensors differ, first '{wrong[0]}'",
            f"accepted: {FORMATS}",
            MISSING_ASSET,
        )
    counts = {k: torch.zeros((), dtype=torch.long) for k in net.state_dict() if k.endswith("num_batches_tracked")}
    net.load_state_dict({k: v.float() for k, v in state.items()} | counts, assign=True)
    return net.eval().requires_grad_(False)
