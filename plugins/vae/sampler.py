"""What a VAE draws: images from the prior, reconstructions, the latent plane."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vgm_cli.api import Request
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ranges import Few

from .bounds import reparameterise
from .model import VAE


class VAESampler:
    """z ~ N(0, I) through the decoder. pixels: mean of p(x | z), or a sample of it."""

    def __init__(self, pixels: Literal["mean", "sample"] = "mean"):
        self.pixels = pixels

    def __call__(self, model: VAE, request: Request) -> Tensor:
        z = request.randn((model.latent_dim,))
        h, s = model.parameters_of(z)
        request.info["nfe"] = 1
        if self.pixels == "mean":
            return model.likelihood.mean(h) * 2 - 1
        return model.likelihood.sample(h, s, request.rand(tuple(request.shape))) * 2 - 1


class ReconstructionSampler:
    """Given images through encoder and decoder. pairs: item 2k is image k, item 2k + 1 its reconstruction; else item k
    is the reconstruction of image k. noise: z from the posterior, not its mean. VgmError: no images."""

    def __init__(self, pairs: bool = True, noise: bool = False):
        self.pairs, self.noise = pairs, noise
        self.grid_period = 2 if pairs else 0

    def __call__(self, model: VAE, request: Request) -> Tensor:
        if request.images is None:
            raise VgmError("there is nothing to reconstruct", "--input DATA", USAGE)
        number = [i // 2 if self.pairs else i for i in request.index]
        x = request.images[[k % len(request.images) for k in number]]
        mu, logvar = model.posterior((x + 1) / 2)
        eps = request.randn((model.latent_dim,))
        again = model.mean(reparameterise(mu, logvar, eps) if self.noise else mu) * 2 - 1
        request.info["nfe"] = 2
        if not self.pairs:
            return again
        original = torch.tensor([i % 2 == 0 for i in request.index], device=x.device)
        return torch.where(original[:, None, None, None], x, again)


def manifold(unit_square: Tensor) -> Tensor:
    """Coordinates in (0, 1) -> latents of the same probability under N(0, I) (figure 4): like unit_square."""
    return torch.special.ndtri(unit_square)


class ManifoldSampler:
    """The latent plane: item i is point i of a side x side grid on the unit square, rows first. VgmError: not 2-D."""

    def __init__(self, side: Few = 8):
        self.side = self.grid_columns = side

    def __call__(self, model: VAE, request: Request) -> Tensor:
        if model.latent_dim != 2:
            raise VgmError(
                f"the picture needs 2 latents, this model has {model.latent_dim}", "model.latent_dim=2", USAGE
            )
        points = [divmod(i % self.side**2, self.side) for i in request.index]
        square = (torch.tensor(points, dtype=torch.float64, device=request.device) + 0.5) / self.side
        request.info["nfe"] = 1
        return model.mean(manifold(square).float()) * 2 - 1
