"""Variational auto-encoder: Gaussian posterior and prior, perceptron or convolutional encoder and decoder.

Kingma & Welling 2013 (arXiv 1312.6114), appendix C; the authors published no code. Tensors are named as in
clementchadebec/benchmark_VAE@6419e21 (pythae), whose default networks are the perceptrons with ReLU.
Inside, pixels are in [0, 1]; `encode` and `decode`, the codec's face, take and give [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.losses.pixels import LEVELS, make_likelihood
from vgm_cli.ranges import Positive, Width

from . import bounds
from .hmc import log_px_by_hmc

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU}
Binarise = Literal["none", "dynamic", "threshold"]
Estimator = Literal["importance", "hmc"]


def activation_of(name: str) -> type[nn.Module]:
    if name not in ACTIVATIONS:
        raise unknown("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]


class Encoder(nn.Module):
    """x -> mean and log-variance of q(z | x). flat: the first layer takes pixels in a row."""

    def __init__(self, layers: list[nn.Module], features: int, latent_dim: int, flat: bool):
        super().__init__()
        self.layers, self.flat = nn.ModuleList(layers), flat
        self.embedding = nn.Linear(features, latent_dim)
        self.log_var = nn.Linear(features, latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, C, H, W) in [0, 1] -> mu, log sigma^2, (B, D) each."""
        x = x.flatten(1) if self.flat else x
        for layer in self.layers:
            x = layer(x)
        x = x.flatten(1)
        return self.embedding(x), self.log_var(x)


class Decoder(nn.Module):
    """z -> the parameters of p(x | z): h, and s where the likelihood has a scale of its own."""

    def __init__(self, layers: list[nn.Module], scale: nn.Module | None, shape: tuple[int, int, int]):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.scale, self.shape = scale, shape

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """z: (N, D) -> h and s or None, (N, C, H, W) each."""
        for layer in self.layers[:-1]:
            z = layer(z)
        h = self.layers[-1](z).reshape(-1, *self.shape)
        return h, None if self.scale is None else self.scale(z).reshape(-1, *self.shape)


class VAE(nn.Module):
    """Variational autoencoder: an encoder q(z | x), a decoder and the likelihood p(x | z) of its output.

    VgmError: unknown names, sizes that do not halve, binarising for a likelihood other than bernoulli.
    """

    def __init__(
        self,
        size: int | tuple[int, int] = 28,  # of the images: a side, or height and width
        channels: Width = 1,  # of the images
        latent_dim: Width = 20,  # length of z
        architecture: Literal["mlp", "conv"] = "mlp",  # fully connected, or stride-2 convolutions
        hidden: Sequence[int] = (500,),  # units (mlp) or channels (conv) of each layer
        activation: Literal["tanh", "relu", "silu"] = "tanh",  # tanh is the paper's
        likelihood: Literal["bernoulli", "gaussian", "discretised-logistic"] = "bernoulli",  # of pixels
        squash: bool = True,  # its mean is a sigmoid
        scale: Literal["learned", "shared"] | float = "learned",  # per pixel by the decoder, one number, or fixed
        binarise: Binarise = "none",  # grey values: as probabilities (none), drawn anew (dynamic), > 1/2 (threshold)
        init_std: Positive | None = None,  # of all initial weights; None: torch's default
    ):
        super().__init__()
        height, width = (size, size) if isinstance(size, int) else size
        self.shape, self.latent_dim = (channels, height, width), latent_dim
        self.likelihood = make_likelihood(likelihood, squash)
        if binarise != "none" and likelihood != "bernoulli":
            raise VgmError(
                f"binarise={binarise} makes no sense for a {likelihood} likelihood", "model.binarise=none", USAGE
            )
        if not hidden:
            raise VgmError("hidden names no layers", "model.hidden=[500]", USAGE)
        self.binarise = binarise
        make = {"mlp": self.perceptrons, "conv": self.convolutions}
        if architecture not in make:
            raise unknown("architecture", architecture, make)
        own_scale = self.likelihood.heads == 2
        learned = own_scale and scale == "learned"
        self.encoder, self.decoder = make[architecture](list(hidden), activation_of(activation), learned)
        self.fixed: float | None = None
        if own_scale and scale == "shared":
            self.log_scale = nn.Parameter(torch.zeros(()))
        elif own_scale and not learned:
            if not isinstance(scale, (int, float)) or scale <= 0:
                raise VgmError(f"scale={scale} is neither learned, shared nor a positive number", code=USAGE)
            self.fixed = math.log(scale)
        if init_std is not None:
            for p in self.parameters():
                nn.init.normal_(p, std=init_std)

    def perceptrons(self, hidden: list[int], act: type[nn.Module], scale_head: bool) -> tuple[Encoder, Decoder]:
        pixels = math.prod(self.shape)

        def stack(sizes: list[int]) -> list[nn.Module]:
            return [nn.Sequential(nn.Linear(a, b), act()) for a, b in pairwise(sizes)]

        encoder = Encoder(stack([pixels, *hidden]), hidden[-1], self.latent_dim, flat=True)
        last = nn.Sequential(nn.Linear(hidden[0], pixels))
        scale = nn.Linear(hidden[0], pixels) if scale_head else None
        return encoder, Decoder([*stack([self.latent_dim, *hidden[::-1]]), last], scale, self.shape)

    def convolutions(self, hidden: list[int], act: type[nn.Module], scale_head: bool) -> tuple[Encoder, Decoder]:
        channels, height, width = self.shape
        times = len(hidden)
        if height % 2**times or width % 2**times:
            raise VgmError(f"{height} x {width} cannot be halved {times} times", "fewer model.hidden channels", USAGE)
        small = (height >> times, width >> times)
        down = [channels, *hidden]
        layers: list[nn.Module] = [nn.Sequential(nn.Conv2d(a, b, 4, 2, 1), act()) for a, b in pairwise(down)]
        features = hidden[-1] * math.prod(small)
        encoder = Encoder(layers, features, self.latent_dim, flat=False)
        up = [nn.Sequential(nn.Linear(self.latent_dim, features), act(), nn.Unflatten(1, (hidden[-1], *small)))]
        up += [nn.Sequential(nn.ConvTranspose2d(a, b, 4, 2, 1), act()) for a, b in zip(hidden[::-1], hidden[-2::-1])]
        last = nn.Sequential(nn.ConvTranspose2d(hidden[0], channels, 4, 2, 1))
        scale = nn.ConvTranspose2d(hidden[0], channels, 4, 2, 1) if scale_head else None
        return encoder, Decoder([*up, last], scale, self.shape)

    # -- the model ---------------------------------------------------------------------------------------------------

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, C, H, W) in [0, 1] -> mu, log sigma^2 of q(z | x), (B, D) each, never in half precision."""
        mu, logvar = self.encoder(x)
        return at_least_float(mu), at_least_float(logvar)

    def parameters_of(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """z: (..., D) -> h and s of the likelihood, (..., C, H, W) each; a scale of one number is ()."""
        h, s = self.decoder(z.flatten(0, -2))
        h = at_least_float(h).view(*z.shape[:-1], *self.shape)
        if s is not None:
            s = at_least_float(s).view_as(h)
        elif hasattr(self, "log_scale"):
            s = self.log_scale
        elif self.fixed is not None:
            s = h.new_tensor(self.fixed)
        if s is not None and self.decoder.scale is None:
            s = s * self.likelihood.s_per_log_scale
        return h, s

    def terms(self, x: Tensor, eps: Tensor, target: Tensor | None = None) -> bounds.Terms:
        """x: (B, C, H, W) in [0, 1], eps: (L, B, D) standard normal. target: what is scored, where it is not x
        itself."""
        mu, logvar = self.posterior(x)
        z = bounds.reparameterise(mu, logvar, eps)
        log_px = self.likelihood.log_prob(x if target is None else target, *self.parameters_of(z))
        return bounds.Terms(log_px, bounds.log_normal(z), bounds.log_normal(z, mu, logvar), bounds.neg_kl(mu, logvar))

    def mean(self, z: Tensor) -> Tensor:
        """Decoder mean: (N, D) -> (N, C, H, W) in [0, 1]."""
        return self.likelihood.mean(self.parameters_of(z)[0])

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        """One image, a ramp of brightness."""
        size = config["size"]
        shape = (config["channels"], *((size, size) if isinstance(size, int) else size))
        return {"x": torch.linspace(0, 1, math.prod(shape)).view(1, *shape)}

    def forward(self, x: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, C, H, W) in [0, 1] -> reconstruction in [0, 1], mu, log sigma^2. eps: (B, D), None for the mean."""
        mu, logvar = self.posterior(x)
        return self.mean(mu if eps is None else bounds.reparameterise(mu, logvar, eps)), mu, logvar

    # -- likelihood of 8-bit images (vgm_cli/metrics/likelihood.py) ----------------------------------------------------

    def log_likelihood(
        self,
        x: Tensor,
        generators: list[torch.Generator],
        samples: int | None = None,
        estimator: Estimator = "importance",
    ) -> tuple[Tensor, str]:
        """Log-likelihood of 8-bit images: (nats (B,), the method in words), see vgm_cli/metrics/likelihood.py.

        x: uint8 (B, C, H, W). samples: posterior draws; for "importance" (a lower bound) 50 by default, where 1 is the
        ELBO with its KL divergence in closed form; for "hmc" (appendix D, for about five latents at most) 500. A
        Bernoulli model is scored on binary images (see binarise), a Gaussian one on uniformly dequantised pixels.
        """
        uniform = torch.stack([torch.rand(x.shape[1:], generator=g) for g in generators]).to(x.device)
        pixels = x.float() / LEVELS
        given, offset, note = pixels, 0.0, ""
        if self.likelihood.continuous:
            given, offset = pixels + (uniform - 0.5) / LEVELS, -pixels[0].numel() * math.log(LEVELS)
            note = ", uniform dequantisation"
        elif self.binarise == "threshold":
            given, note = (pixels > 0.5).float(), ", pixels binarised at 1/2"
        elif self.likelihood.heads == 1:
            given, note = (uniform < pixels).float(), ", pixels binarised at random"
        seen = pixels if self.binarise == "none" and self.likelihood.heads == 1 else given
        if estimator == "hmc":
            samples = samples or 500
            if samples < self.latent_dim + 2:
                raise VgmError(f"hmc fits a Gaussian of {self.latent_dim} latents to {samples} draws", code=USAGE)
            log_px = log_px_by_hmc(
                lambda z: self.likelihood.log_prob(given, *self.parameters_of(z)),
                self.posterior(seen)[0],
                generators,
                samples,
            )
            return log_px + offset, f"hybrid Monte Carlo, {samples} draws{note}"
        samples = samples or 50
        eps = torch.stack([torch.randn(samples, self.latent_dim, generator=g) for g in generators], 1).to(x.device)
        found = [self.terms(seen, e[None], given) for e in eps]  # one draw at a time: memory
        if samples == 1:
            return bounds.estimator_b(found[0]).double() + offset, f"ELBO{note}"
        log_w = torch.cat([t.log_w for t in found]).double()
        return bounds.log_mean_exp(log_w) + offset, f"IWAE-{samples} bound{note}"

    # -- codec ---------------------------------------------------------------------------------------------------------

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        if tuple(image_shape) != self.shape:
            raise VgmError(f"this VAE is for images {self.shape}, got {tuple(image_shape)}", code=USAGE)
        return (self.latent_dim, 1, 1)

    def encode(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) in [-1, 1] -> moments (B, 2D, 1, 1)."""
        return torch.cat(self.posterior((x + 1) / 2), dim=1)[:, :, None, None]

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """moments (B, 2D, 1, 1) -> (B, D, 1, 1); noise like the result, None for the mean."""
        mu, logvar = moments.chunk(2, dim=1)
        return mu if noise is None else bounds.reparameterise(mu, logvar, noise)

    def decode(self, z: Tensor) -> Tensor:
        """z: (B, D, 1, 1) -> images (B, C, H, W) in [-1, 1]."""
        return self.mean(z.flatten(1)) * 2 - 1


def at_least_float(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
