"""From noise to data: the inverse of a flow block, token by token with a cache or many tokens at a time, and guidance.

Gu et al. 2025 (arXiv 2506.06276), sec. 4; Zhai et al. 2024 (arXiv 2412.06329), sec. 3. Official code:
apple/ml-starflow@e565a46 and apple/ml-tarflow@313120e transformer_flow.py. Everything in float32.
Deviation: the Jacobi iteration stops for each item by its own error; officially for the batch by its mean (`together`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vgm_cli.nn.precision import full_precision

from .block import FlowBlock, Gaussian, Identity, Start
from .model import Flow

# the wanted and the worse Gaussian of tokens, and how far decoding is, in (0, 1] -> the one to draw from
Guide = Callable[[Gaussian, Gaussian, Tensor], Gaussian]


# -- guidance ----------------------------------------------------------------------------------------------------------


def ratio_guided(wanted: Gaussian, worse: Gaussian, w: float) -> Gaussian:
    """The Gaussian p_c (p_c / p_u)^w made proper (STARFlow): with s = min(sigma_c / sigma_u, 1)^2,

    sigma = sigma_c / sqrt(1 + w - w s),  mean = ((1 + w) mean_c - w s mean_u) / (1 + w - w s).
    """
    s = w * (wanted.scale / worse.scale).clamp(max=1).square()
    total = 1 + w - s
    return Gaussian(((1 + w) * wanted.mean - s * worse.mean) / total, wanted.scale / total.sqrt())


def linear_guided(wanted: Gaussian, worse: Gaussian, w: float | Tensor, what: str = "ab") -> Gaussian:
    """Log-scale and mean moved away from the worse ones by w times the difference (TARFlow). what: of a, the log-scale,
    and b, the mean, which are moved."""
    scale, mean = wanted.scale, wanted.mean
    if "a" in what:
        scale = (wanted.scale.log() + w * (wanted.scale.log() - worse.scale.log())).exp()
    if "b" in what:
        mean = mean + w * (mean - worse.mean)
    return Gaussian(mean, scale)


def make_guide(rule: Literal["ratio", "linear"], w: float, what: str = "ab", annealed: bool = False) -> Guide:
    """The guide of a rule. annealed: w grows linearly over the tokens (linear rule)."""
    if rule == "ratio":
        return lambda wanted, worse, share: ratio_guided(wanted, worse, w)
    return lambda wanted, worse, share: linear_guided(wanted, worse, w * share if annealed else w, what)


# -- one block ---------------------------------------------------------------------------------------------------------


@dataclass
class Inverse:
    """Undoes one block for n rows: what both ways of decoding share.

    With a guide, start has 2n rows, the wanted conditions first; both halves go on from the guided tokens.
    temperature: of attention's logits, one for all or one for each of start's rows (2n, 1, 1, 1).
    """

    block: FlowBlock
    start: Start
    rows: int
    tokens: int
    guide: Guide | None = None
    temperature: float | Tensor = 1.0

    def __post_init__(self) -> None:
        self.copies = 1 if self.guide is None else 2
        self.cache = self.block.begin(self.start, self.copies * self.rows, self.tokens, self.temperature)

    @property
    def seen(self) -> int:
        """Inputs in the cache."""
        return self.cache.filled - self.start.length

    def forget(self, n: int) -> None:
        """Take the latest n inputs out of the cache."""
        self.cache.truncate(self.cache.filled - n)

    def __call__(self, inputs: Tensor) -> Gaussian:
        """The Gaussians of the tokens that follow the next inputs (n, t, D)."""
        at = self.seen
        if self.guide is None:
            return self.block.gaussian(self.block.predict(inputs, self.start, self.cache, self.temperature))
        doubled = inputs.repeat(2, 1, 1)
        own = self.block.gaussian(self.block.predict(doubled, self.start, self.cache, self.temperature))
        (mean, worse_mean), (scale, worse_scale) = own.mean.chunk(2), own.scale.chunk(2)
        last = self.tokens if self.block.sos_embed is not None else self.tokens - 1
        share = torch.arange(at + 1, at + 1 + inputs.shape[1], device=inputs.device)[:, None] / last
        return self.guide(Gaussian(mean, scale), Gaussian(worse_mean, worse_scale), share)


def sequential(
    inverse: Inverse, z: Tensor, known: Tensor | None = None, kept: Tensor | None = None
) -> tuple[Tensor, int]:
    """z (B, T, D) of a block's output -> its input (B, T, D), token by token, and how many passes that took.

    known (B, T, D), kept (B, T) bool: tokens that are given; the others follow from those before them in the block's
    order.
    """
    block = inverse.block
    z = block.order(z.float())
    if known is not None and kept is not None:
        known, kept = block.order(known.float()), block.order(kept[..., None])
    made: list[Tensor] = []
    latest = block.first(len(z))
    for i in range(z.shape[1]):
        if latest is None:  # without a start token the first one is z's own
            token = z[:, :1]
        else:
            own = inverse(latest)
            token = own.mean + own.scale * z[:, i : i + 1]
        if known is not None and kept is not None:
            token = torch.where(kept[:, i : i + 1], known[:, i : i + 1], token)
        made.append(token)
        latest = token
    return block.order(torch.cat(made, dim=1)), inverse.seen


def jacobi(
    inverse: Inverse,
    z: Tensor,
    width: int = 16,
    threshold: float = 1e-3,
    iterations: int = 32,
    together: bool = False,
) -> tuple[Tensor, int]:
    """The same as `sequential`, up to the threshold: `width` tokens are guessed at once and guessed again, each from
    the latest guess of those before it, until they no longer change. Exact after `width` iterations.

    threshold: mean squared change over mean square, at which an item stays as it is. together: one error for the whole
    batch. Only for blocks with a start token.
    """
    block, n = inverse.block, len(z)
    z = block.order(z.float())
    sos = block.first(n)
    assert sos is not None
    x, passes = torch.cat([sos, z], dim=1), 0  # x[:, t] is the input whose output says token t
    for begin in range(0, z.shape[1], width):
        end = min(begin + width, z.shape[1])
        inputs = x[:, begin:end]
        done = torch.zeros(n, 1, 1, dtype=torch.bool, device=z.device)
        for i in range(iterations):
            own = inverse(inputs)
            passes += 1
            new = own.mean + own.scale * z[:, begin:end]
            old = x[:, begin + 1 : end + 1]
            new = torch.where(done, old, new)
            change, size = ((t.square().mean((1, 2), keepdim=True)) for t in (new - old, new))
            error = change.mean() / size.mean() if together else change / size
            x = torch.cat([x[:, : begin + 1], new, x[:, end + 1 :]], dim=1)
            done = done | (error < threshold)
            if bool(done.all()) or i + 1 == iterations:
                break
            inverse.forget(end - begin)
            inputs = torch.where(done, inputs, x[:, begin:end])
    return block.order(x[:, 1:]), passes


# -- the whole flow ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoding:
    """How a flow is inverted."""

    w: float = 0.0  # extra weight of guidance, 0 for none
    rule: Literal["ratio", "linear"] | None = None  # of guidance; None: the family's own
    what: str = "ab"  # what the linear rule moves, see linear_guided
    annealed: bool = False  # the linear rule's weight grows over the tokens
    top_only: bool = False  # guide in the top block only
    attn_temp: float = 1.0  # divides attention's logits
    width: int = 0  # tokens of a Jacobi block; 0: token by token
    threshold: float = 1e-3  # see jacobi, as the next two
    iterations: int = 32
    together: bool = False


@torch.no_grad()
def decode(
    model: Flow,
    z: Tensor,
    cond: Mapping[str, Tensor],
    null: Mapping[str, Tensor] | None = None,
    how: Decoding = Decoding(),
    watch: Callable[[int, Tensor], None] | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, int]:
    """Latents (B, C, H, W) -> x of the same shape, and how many passes through a block it took.

    cond: keywords of the network; null: those of no condition, of as many rows, for guidance. watch(i, x) sees x after
    i undone blocks. kept: the top block's own tokens (B, T, D) that are given, and which of them (B, T).
    """
    shape, n, top = z.shape[1:], len(z), len(model.blocks) - 1
    passes = 0
    with full_precision(z.device):
        tokens = model.patchify(z.float()) * torch.as_tensor(model.variance()).sqrt().to(z.device)
        starts = both = model.starts(shape, n, cond)
        if how.w:
            other = null or {}
            both = model.starts(shape, 2 * n, {k: torch.cat([v, other.get(k, v)]) for k, v in cond.items()})
        for i in range(top, -1, -1):
            block = model.steps()[i]
            if isinstance(block, Identity):
                if watch is not None:
                    watch(top - i + 1, model.unpatchify(tokens, z.shape))
                continue
            guided = bool(how.w) and (i == top or not (how.top_only or model.cond_top_only))
            guide = make_guide(how.rule or model.rule, how.w, how.what, how.annealed) if guided else None
            temperature = model.attention_temperature(how.attn_temp, n, guided)
            start = both[i] if guided else starts[i]
            inverse = Inverse(block, start, n, tokens.shape[1], guide, temperature)
            if how.width and inverse.block.sos_embed is not None:
                tokens, own = jacobi(inverse, tokens, how.width, how.threshold, how.iterations, how.together)
            else:
                tokens, own = sequential(inverse, tokens, *(kept if kept and i == top else ()))
            passes += own
            if watch is not None:
                watch(top - i + 1, model.unpatchify(tokens, z.shape))
        return model.unpatchify(tokens, z.shape), passes
