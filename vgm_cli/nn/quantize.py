"""Codebooks: the nearest code with straight-through gradients, learned or moving averages, one or several per position.

van den Oord et al. 2017 (arXiv 1711.00937); Esser et al. 2021 (arXiv 2012.09841); unit-length codes of few dimensions:
Yu et al. 2022 (arXiv 2110.04627), Sun et al. 2024 (arXiv 2406.06525). Official code:
google-deepmind/sonnet@26b0518 sonnet/src/nets/vqvae.py; CompVis/taming-transformers@3ba01b2
taming/modules/vqvae/quantize.py; FoundationVision/LlamaGen@ce98ec4 tokenizer/tokenizer_image/vq_model.py.

All, and the one of vgm_cli/nn/gumbel.py, have forward(z, noise) -> (codes, loss, indices), tokens(z) -> ids,
lookup(ids) -> codes, and codebook_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.nn.collectives import gather, total
from vgm_cli.nn.precision import full_precision

Unknown = Literal["random", "extra"] | int
EntropyTargets = Literal["softmax", "argmax"]


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
        entropy_targets: EntropyTargets = "softmax",  # of `entropy_loss`
        entropy_temperature: float = 0.01,  # of `entropy_loss`
        remap: Sequence[int] | str | None = None,  # the code numbers in use, or a .npy of them; ids count only those
        unknown_index: Unknown = "random",  # the id of other codes: random, "extra" for one id more, or a number
        codebook_weight: float = 1.0,  # of the codebook term, times all that
        reduction: Literal["mean", "sum"] = "mean",  # of both terms over all elements; "sum" makes beta another number
    ):
        super().__init__()
        self.codebook_weight, self.reduction = codebook_weight, reduction
        self.beta, self.legacy, self.l2_norm, self.entropy_weight = beta, legacy, l2_norm, entropy_weight
        self.entropy_targets: EntropyTargets = entropy_targets
        self.entropy_temperature = entropy_temperature
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
            "commitment": self.reduced((codes.detach() - z).square()),
            "codebook": self.reduced((codes - z.detach()).square()),
        }
        if self.entropy_weight:
            terms["entropy"] = entropy_loss(-distance, self.entropy_temperature, self.entropy_targets)
        return z, codes, indices, terms

    def reduced(self, errors: Tensor) -> Tensor:
        return errors.sum() if self.reduction == "sum" else errors.mean()

    def combine(self, terms: dict[str, Tensor]) -> Tensor:
        """The codebook loss ()."""
        commitment, codebook = (1.0, self.beta) if self.legacy else (self.beta, 1.0)
        loss = commitment * terms["commitment"] + self.codebook_weight * codebook * terms["codebook"]
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

    @torch.no_grad()
    def restart(self, dead: Tensor, z: Tensor, u: Tensor) -> None:
        """Move the codes where dead (n,) is true onto latents of all processes' z (B, c, h, w), which u (n,), uniform
        in [0, 1) and the same on every process, chooses."""
        flat = gather(z.float().permute(0, 2, 3, 1).reshape(-1, z.shape[1]))
        chosen = flat[(u * len(flat)).long().clamp(max=len(flat) - 1)]  # (n, c)
        self.embedding.weight.copy_(torch.where(dead[:, None], chosen, self.embedding.weight))


def entropy_loss(affinity: Tensor, temperature: float = 0.01, targets: EntropyTargets = "softmax") -> Tensor:
    """Mean entropy of the assignments minus the entropy of their mean, for affinities (..., n): low where assignments
    are sure and all codes are used. The two small constants are the official ones.

    targets: assignments are the probabilities of all codes, or with "argmax" the likeliest code alone, whose gradient
    is that of the probabilities.
    """
    flat = affinity.flatten(0, -2) / temperature
    probs = flat.softmax(-1)
    if targets == "argmax":
        chosen = F.one_hot(flat.argmax(-1), flat.shape[-1]).to(probs)
        probs = probs - (probs - chosen).detach()
    mean = probs.mean(0)
    of_mean = -(mean * (mean + 1e-5).log()).sum()
    each = -(probs * (flat + 1e-5).log_softmax(-1)).sum(-1).mean()
    return each - of_mean


# -- moving averages ---------------------------------------------------------------------------------------------------


class Flavour(NamedTuple):
    """How the moving averages of a published implementation are kept (docs/papers/vqvae.md has them side by side).

    debias: averages begin at zero and are divided by 1 - decay^t, so that the first batch counts in full and the
        codebook's initial values never do. keep_smoothed: the smoothed counts replace the counts, step after step.
    uniform: codes begin uniform in +- this function of (codes, dimensions); None: standard normal. copied: the sums
        begin as the codes; else they are a draw of their own.
    """

    debias: bool = False
    keep_smoothed: bool = False
    uniform: Callable[[int, int], float] | None = None
    copied: bool = True


FLAVOURS = {
    "sonnet": Flavour(debias=True, uniform=lambda n, c: math.sqrt(3 / c)),
    "zalando": Flavour(keep_smoothed=True, copied=False),
    "pythae": Flavour(keep_smoothed=True, uniform=lambda n, c: 1 / n, copied=False),
    "taming": Flavour(),
}
FlavourName = Literal["sonnet", "zalando", "pythae", "taming"]


class Averages(nn.Module):
    """A codebook with what its update needs: how often each code was chosen, and the sum of what it was chosen for.

    With debiasing, cluster_size and embed_avg are the averages that begin at zero, counter is the number of updates,
    and cluster_size_debiased and embed_avg_debiased are what the codes were made of.
    """

    weight: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    counter: Tensor
    cluster_size_debiased: Tensor
    embed_avg_debiased: Tensor

    def __init__(self, n_embed: int, embed_dim: int, flavour: Flavour = FLAVOURS["taming"]):
        super().__init__()
        limit = None if flavour.uniform is None else flavour.uniform(n_embed, embed_dim)

        def draw() -> Tensor:
            empty = torch.empty(n_embed, embed_dim)
            return empty.normal_() if limit is None else empty.uniform_(-limit, limit)

        weight = draw()
        sums = torch.zeros_like(weight) if flavour.debias else weight.clone() if flavour.copied else draw()
        self.register_buffer("weight", weight)
        self.register_buffer("cluster_size", torch.zeros(n_embed))
        self.register_buffer("embed_avg", sums)
        if flavour.debias:
            self.register_buffer("counter", torch.zeros((), dtype=torch.int64))
            self.register_buffer("cluster_size_debiased", torch.zeros(n_embed))
            self.register_buffer("embed_avg_debiased", torch.zeros_like(weight))


class EMAVectorQuantizer(VectorQuantizer):
    """Codes are moving averages of the latents that chose them (VQ-VAE, app. A.1); no gradient reaches them, so the
    loss is the commitment, times beta. Updated by every training pass, over all processes, after the codes were used.

    flavour: whose averages, see Flavour. eps: of the Laplace smoothing of the counts, 0 for none.
    """

    def __init__(
        self,
        n_embed: int,
        embed_dim: int,
        beta: float = 0.25,
        decay: float = 0.99,
        flavour: FlavourName = "taming",
        eps: float = 1e-5,
        **more: Any,
    ):
        self.flavour = FLAVOURS[flavour]
        super().__init__(n_embed, embed_dim, beta, legacy=False, **more)
        self.decay, self.eps = decay, eps

    def new_codebook(self, n_embed: int, embed_dim: int) -> nn.Module:
        return Averages(n_embed, embed_dim, self.flavour)

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
        sizes, means = book.cluster_size, book.embed_avg
        if self.flavour.debias:
            book.counter.add_(1)
            sizes = book.cluster_size_debiased.copy_(sizes / self.bias)
            means = book.embed_avg_debiased.copy_(means / self.bias)
        n = sizes.sum()
        smoothed = (sizes + self.eps) / (n + len(counts) * self.eps) * n
        if self.flavour.keep_smoothed:
            book.cluster_size.copy_(smoothed)
        book.weight.copy_(means / smoothed[:, None])

    @property
    def bias(self) -> Tensor:
        """Share of an average that begins at zero which its updates so far make up: ()."""
        return 1 - self.decay**self.embedding.counter

    def place(self, z: Tensor) -> None:
        super().place(z)
        self.chosen_once(torch.ones_like(self.embedding.cluster_size, dtype=torch.bool))

    def restart(self, dead: Tensor, z: Tensor, u: Tensor) -> None:
        super().restart(dead, z, u)
        self.chosen_once(dead)

    @torch.no_grad()
    def chosen_once(self, where: Tensor) -> None:
        """Make the averages of some codes (n,) those of codes that one latent per batch has chosen, their own value."""
        book = self.embedding
        share = torch.ones_like(book.cluster_size[0])
        if self.flavour.debias:
            book.counter.clamp_(min=1)
            share = self.bias
            book.cluster_size_debiased.masked_fill_(where, 1.0)
            book.embed_avg_debiased.copy_(torch.where(where[:, None], book.weight, book.embed_avg_debiased))
        book.cluster_size.copy_(torch.where(where, share, book.cluster_size))
        book.embed_avg.copy_(torch.where(where[:, None], share * book.weight, book.embed_avg))


# -- several codes per position ----------------------------------------------------------------------------------------


class GroupedQuantizer(nn.Module):
    """Several codes per position, each of a codebook of its own, for a slice of the channels.

    The n-th code of a position is the id n K + number, K being the size of one codebook, so that ids say which codebook
    they are of; codes of a position lie side by side in a row: ids (B, h, w G) of G codes each.
    """

    def __init__(self, quantizers: Sequence[VectorQuantizer]):
        super().__init__()
        self.groups = nn.ModuleList(quantizers)
        self.size = quantizers[0].codebook_size
        self.codebook_size = self.size * len(quantizers)

    def joined(self, numbers: Sequence[Tensor]) -> Tensor:
        """Numbers (B, h, w) of every codebook -> ids (B, h, w G)."""
        return torch.stack([n + i * self.size for i, n in enumerate(numbers)], -1).flatten(2)

    def forward(self, z: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """z: (B, G c, h, w) -> quantised, the mean of the groups' losses (), ids (B, h, w G)."""
        codes, losses, numbers = zip(*(q(part) for q, part in zip(self.groups, z.chunk(len(self.groups), 1))))
        return torch.cat(codes, 1), torch.stack(losses).mean(), self.joined(numbers)

    def tokens(self, z: Tensor) -> Tensor:
        """z: (B, G c, h, w) -> ids (B, h, w G)."""
        return self.joined([q.tokens(part) for q, part in zip(self.groups, z.chunk(len(self.groups), 1))])  # type: ignore[operator]

    def lookup(self, ids: Tensor) -> Tensor:
        """ids (B, h, w G) -> codes (B, G c, h, w); an id of another codebook counts as that number of its own."""
        numbers = (ids % self.size).unflatten(2, (-1, len(self.groups))).unbind(-1)
        return torch.cat([q.lookup(n) for q, n in zip(self.groups, numbers)], 1)  # type: ignore[operator]

    def place(self, z: Tensor) -> None:
        for q, part in zip(self.groups, z.chunk(len(self.groups), 1)):
            q.place(part)  # type: ignore[operator]

    def restart(self, dead: Tensor, z: Tensor, u: Tensor) -> None:
        parts = (t.split(self.size) for t in (dead, u))
        for q, part, own, draws in zip(self.groups, z.chunk(len(self.groups), 1), *parts):
            q.restart(own, part, draws)  # type: ignore[operator]


# -- how a codebook is used --------------------------------------------------------------------------------------------


def code_counts(indices: Tensor, n_embed: int) -> Tensor:
    """How often each code is in a batch, int64 (n_embed,); unlike torch.bincount without a wait, and on meta too."""
    flat = indices.flatten().long()
    return flat.new_zeros(n_embed).index_add_(0, flat, torch.ones_like(flat))


def code_usage(indices: Tensor, n_embed: int) -> dict[str, Tensor]:
    """How many of n_embed codes a batch uses: the perplexity of their frequencies, and the count."""
    share = code_counts(indices, n_embed).float() / indices.numel()
    return {"perplexity": (-(share * (share + 1e-10).log()).sum()).exp(), "cluster_usage": (share > 0).sum()}


def recent_usage(recent: Tensor, indices: Tensor, n_embed: int) -> float:
    """Push indices into the ring `recent` (last entries newest, changed in place); the share of codes found in it."""
    flat = indices.flatten()[-len(recent) :].to(recent)
    recent.copy_(torch.cat([recent[len(flat) :], flat]))
    return int((code_counts(recent, n_embed) > 0).sum()) / n_embed
