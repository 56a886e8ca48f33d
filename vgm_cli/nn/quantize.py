"""Codebooks: the nearest code with straight-through gradients, its moving-average and its Gumbel-softmax forms.

van den Oord et al. 2017 (arXiv 1711.00937); Esser et al. 2021 (arXiv 2012.09841); unit-length codes of few dimensions:
Yu et al. 2022 (arXiv 2110.04627), Sun et al. 2024 (arXiv 2406.06525). Official code:
CompVis/taming-transformers@3ba01b2 taming/modules/vqvae/quantize.py; FoundationVision/LlamaGen@ce98ec4
tokenizer/tokenizer_image/vq_model.py.

All have forward(z, noise) -> (codes, loss, indices), tokens(z) -> ids, lookup(ids) -> codes, and codebook_size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.nn.collectives import total
from vgm_cli.nn.precision import full_precision

Unknown = Literal["random", "extra"] | int


def channels_first(x: Tensor) -> Tensor:
    """(B, h, w, c) -> (B, c, h, w)."""
    return x.permute(0, 3, 1, 2).contiguous()


# -- fewer ids than codes ----------------------------------------------------------------------------------------------


def to_used(indices: Tensor, used: Tensor, unknown: int | Tensor) -> Tensor:
    """Code numbers (any shape) -> their places in `used` (n,); those that are not in it -> `unknown`."""
    match = indices[..., None] == used  # (..., n)
    return torch.where(match.any(-1), match.long().argmax(-1), unknown)


def to_all(ids: Tensor, used: Tensor) -> Tensor:
    """The inverse of `to_used`; the extra id becomes the first used code."""
    return used[torch.where(ids >= len(used), 0, ids)]


# -- the nearest code --------------------------------------------------------------------------------------------------


class VectorQuantizer(nn.Module):
    """Nearest code of a learned codebook, with straight-through gradients: z (B, c, h, w) -> codes like z."""

    embedding: Any  # nn.Embedding, or Averages

    def __init__(
        self,
        n_embed: int,  # number of codes
        embed_dim: int,  # length c of a code
        beta: float = 0.25,  # weight of the codebook term where legacy, of the commitment term otherwise
        legacy: bool = True,  # beta on the codebook's term, as in all published weights; False: on the commitment
        l2_norm: bool = False,  # latents and codes have unit length when they are used
        entropy_weight: float = 0.0,  # of `entropy_loss`
        remap: Sequence[int] | str | None = None,  # the code numbers in use, or a .npy of them; ids count only those
        unknown_index: Unknown = "random",  # the id of other codes: random, "extra" for one id more, or a number
    ):
        super().__init__()
        self.beta, self.legacy, self.l2_norm, self.entropy_weight = beta, legacy, l2_norm, entropy_weight
        self.embedding = self.new_codebook(n_embed, embed_dim)
        self.codebook_size = n_embed
        self.unknown_index = unknown_index
        self.used: Tensor | None
        if remap is not None:
            used = np.load(remap) if isinstance(remap, str) else remap
            self.register_buffer("used", torch.as_tensor(used, dtype=torch.int64))
            self.codebook_size = len(used) + (unknown_index == "extra")
        else:
            self.used = None

    def new_codebook(self, n_embed: int, embed_dim: int) -> nn.Module:
        embedding = nn.Embedding(n_embed, embed_dim)
        nn.init.uniform_(embedding.weight, -1.0 / n_embed, 1.0 / n_embed)
        if self.l2_norm:
            embedding.weight.data = F.normalize(embedding.weight.data, dim=-1)
        return embedding

    @property
    def codebook(self) -> Tensor:
        """(n_embed, c), of unit length with l2_norm."""
        weight = self.embedding.weight.float()
        return F.normalize(weight, dim=-1) if self.l2_norm else weight

    def forward(self, z: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """z: (B, c, h, w) -> quantised (B, c, h, w), codebook loss (), indices (B, h, w) int64. noise is not used."""
        with full_precision(z.device):  # bfloat16 distances pick wrong codes
            z, codes, indices, terms = self.terms(z.float())
        return z + (codes - z).detach(), self.combine(terms), indices

    def terms(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """z: (B, c, h, w) -> z as it is compared, codes, indices (B, h, w), and the unweighted parts of the loss."""
        z = F.normalize(z, dim=1) if self.l2_norm else z
        distance = self.distance(z)  # (B h w, n)
        indices = distance.detach().argmin(1).view(z.shape[0], *z.shape[2:])
        codes = self.embed(indices)
        terms = {
            "commitment": (codes.detach() - z).square().mean(),
            "codebook": (codes - z.detach()).square().mean(),
        }
        if self.entropy_weight:
            terms["entropy"] = entropy_loss(-distance)
        return z, codes, indices, terms

    def combine(self, terms: dict[str, Tensor]) -> Tensor:
        """The codebook loss ()."""
        commitment, codebook = (1.0, self.beta) if self.legacy else (self.beta, 1.0)
        loss = commitment * terms["commitment"] + codebook * terms["codebook"]
        return loss + self.entropy_weight * terms["entropy"] if "entropy" in terms else loss

    def distance(self, z: Tensor) -> Tensor:
        """Squared distances of z (B, c, h, w) to every code: (B h w, n)."""
        flat, codes = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]), self.codebook
        return flat.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * flat @ codes.T

    def embed(self, indices: Tensor) -> Tensor:
        """(B, h, w) code numbers -> (B, c, h, w)."""
        return channels_first(F.embedding(indices, self.codebook))

    @torch.no_grad()
    def indices(self, z: Tensor) -> Tensor:
        """z: (B, c, h, w) -> code numbers (B, h, w), the first of equally near codes."""
        z = F.normalize(z.float(), dim=1) if self.l2_norm else z.float()
        with full_precision(z.device):
            return self.distance(z).argmin(1).view(z.shape[0], *z.shape[2:])

    def tokens(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """z: (B, c, h, w) -> ids (B, h, w) in [0, codebook_size); generator: for the ids of unknown codes."""
        indices = self.indices(z)
        if self.used is None:
            return indices
        unknown: int | Tensor
        if self.unknown_index == "random":
            unknown = torch.randint(len(self.used), indices.shape, generator=generator).to(indices.device)
        else:
            unknown = len(self.used) if self.unknown_index == "extra" else self.unknown_index
        return to_used(indices, self.used, unknown)

    def lookup(self, ids: Tensor) -> Tensor:
        """(B, h, w) ids -> codes (B, c, h, w)."""
        return self.embed(ids if self.used is None else to_all(ids, self.used))

    @torch.no_grad()
    def place(self, z: Tensor) -> None:
        """Put the codes on latents z (B, c, h, w) of data, spread evenly; codes beyond their number stay."""
        flat = z.float().permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        n = min(len(flat), len(self.embedding.weight))
        self.embedding.weight[:n] = flat[torch.linspace(0, len(flat) - 1, n, device=flat.device).long()]


def entropy_loss(affinity: Tensor, temperature: float = 0.01) -> Tensor:
    """Mean entropy of the assignments minus the entropy of their mean, for affinities (N, n): low where assignments
    are sure and all codes are used. The two small constants are the official ones."""
    flat = affinity / temperature
    probs = flat.softmax(-1)
    mean = probs.mean(0)
    of_mean = -(mean * (mean + 1e-5).log()).sum()
    each = -(probs * (flat + 1e-5).log_softmax(-1)).sum(-1).mean()
    return each - of_mean


# -- moving averages ---------------------------------------------------------------------------------------------------


class Averages(nn.Module):
    """A codebook with what its update needs: how often each code was chosen, and the sum of what it was chosen for."""

    weight: Tensor
    cluster_size: Tensor
    embed_avg: Tensor

    def __init__(self, n_embed: int, embed_dim: int):
        super().__init__()
        self.register_buffer("weight", torch.randn(n_embed, embed_dim))
        self.register_buffer("cluster_size", torch.zeros(n_embed))
        self.register_buffer("embed_avg", self.weight.clone())


class EMAVectorQuantizer(VectorQuantizer):
    """Codes are moving averages of the latents that chose them (VQ-VAE, app. A.1; taming's EmbeddingEMA); no gradient
    reaches them, so the loss is the commitment, times beta. Updated by every training pass, over all processes."""

    def __init__(self, n_embed: int, embed_dim: int, beta: float = 0.25, decay: float = 0.99, **more: Any):
        super().__init__(n_embed, embed_dim, beta, legacy=False, **more)
        self.decay, self.eps = decay, 1e-5

    def new_codebook(self, n_embed: int, embed_dim: int) -> nn.Module:
        return Averages(n_embed, embed_dim)

    def terms(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        z, codes, indices, terms = super().terms(z)
        if self.training and torch.is_grad_enabled():
            self.update(z.detach(), indices)
        return z, codes, indices, terms

    def combine(self, terms: dict[str, Tensor]) -> Tensor:
        loss = self.beta * terms["commitment"]
        return loss + self.entropy_weight * terms["entropy"] if "entropy" in terms else loss

    @torch.no_grad()
    def update(self, z: Tensor, indices: Tensor) -> None:
        """Move counts and sums towards those of this batch, then the codes to their quotient (Laplace-smoothed)."""
        flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        book = self.embedding
        chosen = F.one_hot(indices.flatten(), len(book.weight)).to(flat)  # (B h w, n)
        counts, sums = total(chosen.sum(0)), total(chosen.T @ flat)
        book.cluster_size.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        book.embed_avg.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        n = book.cluster_size.sum()
        smoothed = (book.cluster_size + self.eps) / (n + len(counts) * self.eps) * n
        book.weight.copy_(book.embed_avg / smoothed[:, None])

    def place(self, z: Tensor) -> None:
        super().place(z)
        self.embedding.embed_avg.copy_(self.embedding.weight)
        self.embedding.cluster_size.fill_(1.0)


# -- Gumbel-softmax ----------------------------------------------------------------------------------------------------


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
        """z: (B, hidden, h, w) -> the most likely codes (B, h, w)."""
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


# -- how a codebook is used --------------------------------------------------------------------------------------------


def code_usage(indices: Tensor, n_embed: int) -> dict[str, Tensor]:
    """How many of n_embed codes a batch uses: the perplexity of their frequencies, and the count."""
    share = torch.bincount(indices.flatten(), minlength=n_embed).float() / indices.numel()
    return {"perplexity": (-(share * (share + 1e-10).log()).sum()).exp(), "cluster_usage": (share > 0).sum()}


def recent_usage(recent: Tensor, indices: Tensor, n_embed: int) -> float:
    """Push indices into the ring `recent` (last entries newest, changed in place); the share of codes found in it."""
    flat = indices.flatten()[-len(recent) :].to(recent)
    recent.copy_(torch.cat([recent[len(flat) :], flat]))
    return int((torch.bincount(recent.long(), minlength=n_embed) > 0).sum()) / n_embed
