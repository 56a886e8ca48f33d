"""Random changes of pictures for training small networks on small sets: moves, colours, blur, noise, holes.

Each is a function of the pictures x (B, C, H, W) in [-1, 1] and of uniform draws u (B, k) in [0, 1), so that randomness
stays with the caller. None flips a picture: arrows, clocks and hands have a direction.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MOVE, RECOLOUR, DEFOCUS, HOLE = 6, 12, 1, 4  # draws that each of them takes


def move(x: Tensor, u: Tensor, degrees: float = 15.0, scale: float = 0.15, shift: float = 0.1) -> Tensor:
    """Rotation, scale of either axis and shear to +-scale, shifts to that share of a side; the border is continued."""
    most = u.new_tensor([math.radians(degrees), scale, scale, scale, 2 * shift, 2 * shift])
    angle, sx, sy, shear, dx, dy = ((2 * u - 1) * most).unbind(1)
    cos, sin = angle.cos(), angle.sin()
    rows = [(1 + sx) * cos, -sin + shear, dx, sin, (1 + sy) * cos, dy]
    grid = F.affine_grid(torch.stack(rows, 1).view(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def recolour(x: Tensor, u: Tensor, amount: float = 0.1) -> Tensor:
    """A linear map of the three channels (C is 3) near the identity, entries changed by +-amount, and an offset of as
    much; 1 makes other colours altogether. Values are held in [-1, 1]."""
    change = (2 * u - 1) * amount
    matrix = torch.eye(3, device=x.device) + change[:, :9].view(-1, 3, 3)
    moved = torch.einsum("bij,bjhw->bihw", matrix, x) + change[:, 9:, None, None]
    return moved.clamp(-1, 1)


def defocus(x: Tensor, u: Tensor, most: float = 1.5) -> Tensor:
    """A blend with a Gaussian blur of deviation `most` pixels: as a network that is not sure would draw it."""
    radius = math.ceil(2 * most)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=x.device) / most) ** 2)
    taps = (taps / taps.sum()).expand(x.shape[1], 1, -1)
    blurred = F.conv2d(F.pad(x, [radius] * 4, mode="replicate"), taps[..., None], groups=x.shape[1])
    blurred = F.conv2d(blurred, taps[:, :, None], groups=x.shape[1])
    return torch.lerp(x, blurred, u[:, :, None, None])


def hole(x: Tensor, u: Tensor, most: float = 0.4) -> Tensor:
    """A rectangle of sides up to that share of the picture's becomes grey."""
    h, w = x.shape[-2:]
    rows, columns = torch.arange(h, device=x.device) / h, torch.arange(w, device=x.device) / w
    y, xx, dy, dx = u[:, :, None].unbind(1)
    inside = ((rows - y).abs() < dy * most / 2)[:, :, None] & ((columns - xx).abs() < dx * most / 2)[:, None]
    return x.masked_fill(inside[:, None], 0.0)
