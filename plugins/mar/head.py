"""The diffusion head: a small network that denoises one token, told what the transformer knows of its place.

Li et al. 2024 (arXiv 2406.11838), sec. 3.2 and appendix B. Official code: LTH14/mar@fe470ac models/diffloss.py
(SimpleMLPAdaLN, DiffLoss), under whose parameter names it stands here. The process is the house's,
vgm_cli/diffusion/discrete: betas of the cosine, a learned variance, the bound in bits added to the squared error.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgm_cli.diffusion.discrete import DiscreteDiffusion, Network, named_betas, space_timesteps
from vgm_cli.diffusion.guidance import extrapolate
from vgm_cli.nets.dit import TimestepEmbedder

Chain = Literal["ddpm", "ddim"]
Mean = Literal["eps", "x0"]
Variance = Literal["learned_range", "fixed_small", "fixed_large"]


def modulation(width: int, parts: int) -> nn.Sequential:
    """(R, width) conditions -> (R, parts * width): shifts, scales, gates."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


class ResidualBlock(nn.Module):
    """x + gate MLP(scale norm(x) + shift). x, y: (R, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = modulation(width, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class LastLayer(nn.Module):
    """A norm without weights, shifted and scaled, and the way out. x, y: (R, width) -> (R, out)."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = modulation(width, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


class TokenDenoiser(nn.Module):
    """forward(x (R, C), t (R,), z (R, D)) -> (R, 2C): the noise, or the token itself, and where the variance
    lies between its bounds. t: the original process's timestep; z: the transformer's output at the token's place."""

    repeated = ("res_blocks",)

    def __init__(self, channels: int, condition: int, width: int, depth: int, gain: float = 0.0):
        super().__init__()
        self.checkpointing = False
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = nn.Linear(condition, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.final_layer = LastLayer(width, 2 * channels)
        self.initialise(gain)

    @torch.no_grad()
    def initialise(self, gain: float) -> None:
        """Xavier linears, a small time embedding; modulations and output that much smaller, at zero as published."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.time_embed.mlp[0], self.time_embed.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
        for part in (*self.res_blocks, self.final_layer):
            part.adaLN_modulation[1].weight.mul_(gain)  # type: ignore[union-attr, index, operator]
        self.final_layer.linear.weight.mul_(gain)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        own = self.input_proj.weight.dtype
        x, y = self.input_proj(x.to(own)), self.time_embed(t) + self.cond_embed(z.to(own))
        for block in self.res_blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, y, use_reentrant=False)
            else:
                x = block(x, y)
        return self.final_layer(x, y)  # type: ignore[no-any-return]


class DiffusionHead(nn.Module):
    """p(token | z) as a diffusion process."""

    def __init__(
        self,
        channels: int,  # of a token
        condition: int,  # width of z
        width: int,  # of the network's blocks
        depth: int,  # blocks
        schedule: str,  # of the betas, see discrete.named_betas
        steps: int,  # of the process
        mean: Mean = "eps",  # what the network says of a noisy token: its noise, or x0, the token
        gain: float = 0.0,  # see TokenDenoiser.initialise
    ):
        super().__init__()
        self.net = TokenDenoiser(channels, condition, width, depth, gain)
        self.betas, self.mean = named_betas(schedule, steps), mean
        self.process = DiscreteDiffusion(self.betas, mean)

    def losses(self, x0: Tensor, z: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Terms (R,) of every row: mse, vb (bits per dimension, not scaled) and their sum, loss. x0, noise: (R, C);
        z: (R, D); t: (R,) int64."""
        return self.process.losses(lambda x, s: self.net(x, s, z), x0, t, noise)

    def respaced(self, steps: int | str, variance: Variance = "learned_range") -> DiscreteDiffusion:
        """The process over so many of its steps (discrete.space_timesteps), with the head's variance or a fixed one."""
        return DiscreteDiffusion(self.betas, self.mean, variance, keep=space_timesteps(len(self.betas), steps))

    def sample(
        self,
        process: DiscreteDiffusion,  # a respaced one
        z: Tensor,  # (R, D), or (2R, D) with the rows to be guided away from behind the others
        x: Tensor,  # (R, C) standard normal, where the chain begins; one for both halves of z
        noise: Callable[[], Tensor],  # the next step's (R, C)
        scale: Tensor | None = None,  # (R,) of guidance, of the noise and not of the variance; None with z (R, D)
        temperature: float = 1.0,  # factor on the noise of every step, not on the beginning
        chain: Chain = "ddpm",  # ancestral steps, or DDIM's
        eta: float = 0.0,  # DDIM's share of noise
        clip_denoised: bool | float = False,  # x0 to [-1, 1], or to +-that, in every step
    ) -> Tensor:
        """Tokens (R, C)."""
        if not len(x):
            return x
        guide = guided(self.net, z, scale)
        model = guide if process.learned else lambda x, t: guide(x, t)[:, : x.shape[1]]
        chained = process.sample_loop(model, x, lambda: temperature * noise(), chain, eta, clip_denoised)
        return deque(chained, maxlen=1).pop()[0]


def guided(net: Callable[[Tensor, Tensor, Tensor], Tensor], z: Tensor, scale: Tensor | None) -> Network:
    """(x (R, C), t (R,)) -> (R, 2C) of a denoiser told z: its own output, or with a scale (R,) its noise (or its token,
    which is the same) guided away from that of the second half of z, the variance being the first half's."""
    if scale is None:
        return lambda x, t: net(x, t, z)

    def both(x: Tensor, t: Tensor) -> Tensor:
        wanted, worse = net(torch.cat([x, x]), torch.cat([t, t]), z).float().chunk(2)
        eps = extrapolate((worse[:, : x.shape[1]], wanted[:, : x.shape[1]]), (scale[:, None].to(wanted),))
        return torch.cat([eps, wanted[:, x.shape[1] :]], dim=1)

    return both
