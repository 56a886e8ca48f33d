"""A codebook by Gumbel-softmax: the choice is relaxed while training, and its logits are a 1x1 convolution.

Jang et al. 2017 (arXiv 1611.01144); as in CompVis/taming-transformers@3ba01b2 taming/modules/vqvae/quantize.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.nn.precision import full_precision
from vgm_cli.nn.quantize import channels_first


class GumbelQuantizer(nn.Module):
    """A relaxed categorical choice (Jang et al. 2017, arXiv 1611.01144): logits by a 1x1 convolution, one-hot forward.

    straight_through: soft gradients behind a hard choice; False mixes codes in training. kl_weight: of the divergence
    from the uniform prior. temperature is annealed from outside (`warmup_cosine`).
    """

    def __init__(
        self,
        n_embed: int,
        embed_dim: int,
        hidden: int | None = None,
        straight_through: bool = True,
        kl_weight: float = 5e-4,
        temperature: float = 1.0,
    ):
        super().__init__()
        self.proj = nn.Conv2d(embed_dim if hidden is None else hidden, n_embed, 1)
        self.embed = nn.Embedding(n_embed, embed_dim)
        self.codebook_size = n_embed
        self.straight_through, self.kl_weight, self.temperature = straight_through, kl_weight, temperature

    def forward(self, z: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """z: (B, hidden, h, w); noise: exponential draws (B, n, h, w), None for the most likely codes.

        Returns codes (B, c, h, w), the weighted divergence (), indices (B, h, w).
        """
        with full_precision(z.device):
            logits = F.conv2d(z.float(), self.proj.weight.float(), self.proj.bias.float())  # type: ignore[union-attr]
            noisy = logits if noise is None else (logits - noise.log()) / self.temperature
            soft = noisy.softmax(1)  # (B, n, h, w)
            indices = soft.argmax(1)
            choice = soft
            if self.straight_through or not self.training:
                hard = F.one_hot(indices, self.codebook_size).permute(0, 3, 1, 2).to(soft)
                choice = hard - soft.detach() + soft
            codes = torch.einsum("bnhw,nd->bdhw", choice, self.embed.weight.float())
            q = logits.softmax(1)
            kl = (q * (q * self.codebook_size + 1e-10).log()).sum(1).mean()
        return codes, self.kl_weight * kl, indices

    @torch.no_grad()
    def tokens(self, z: Tensor) -> Tensor:
        """z: (B, hidden, h, w) -> the most likely codes (B, h, w) int64."""
        return self.proj(z).argmax(1)

    def lookup(self, ids: Tensor) -> Tensor:
        """(B, h, w) ids -> codes (B, c, h, w)."""
        return channels_first(self.embed(ids))


def warmup_cosine(
    n: int, warm_up_steps: int, lr_min: float, lr_max: float, lr_start: float, max_decay_steps: int
) -> float:
    """taming's LambdaWarmUpCosineScheduler at step n: a line from lr_start to lr_max, then half a cosine to lr_min."""
    if n < warm_up_steps:
        return (lr_max - lr_start) / warm_up_steps * n + lr_start
    t = min((n - warm_up_steps) / (max_decay_steps - warm_up_steps), 1.0)
    return lr_min + 0.5 * (lr_max - lr_min) * (1 + math.cos(t * math.pi))
