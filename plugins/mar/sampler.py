"""MAR's sampler: tokens in random order, several at a time, guided or not; it completes images, too.

Decoding itself, with its sources, is decoding.py, the chain of the diffusion head head.py. Deviations: order and noise
come from every item's own generator, and noise is drawn for the tokens that need it; fixed orders, DDIM chains and
completion are not official.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vgm_cli.api import Request, send
from vgm_cli.ar.masking import kept_codes
from vgm_cli.ar.orders import Order, permutation_on, random_orders
from vgm_cli.ar.sampling import in_one_dtype
from vgm_cli.conditioning import unconditional
from vgm_cli.ranges import NonNegative, Steps, Whole

from .decoding import Draw, Ramp, by_order, guidance_scales
from .head import Chain, Variance
from .model import MAR


class MARSampler:
    """Tokens in an order of every image's own, more and more at a time, each denoised by the head.

    As a restoration method it completes images: tokens of which a pixel is made anew are made anew, and those `grow` or
    fewer places from them; all others stay, bit for bit.
    """

    completes = True

    def __init__(
        self,
        steps: Steps = 64,  # passes of the transformer; the paper's table has 256, one per token
        diffusion_steps: Steps | str = 100,  # of the head's chain, see discrete.space_timesteps ("ddim50", "10,20")
        temperature: NonNegative = 1.0,  # factor on the noise of every step of the chain, not on its beginning
        guidance_scale: NonNegative = 1.0,  # where the request names none; 1 is no guidance
        ramp: Ramp = "linear",  # guidance grows from none with the tokens that are known, or is constant
        order: Order = "random",  # which token comes first: any, or a fixed order
        chain: Chain = "ddpm",  # ancestral steps, or DDIM's, which want about five times more of them
        eta: NonNegative = 0.0,  # DDIM's share of noise
        clip_denoised: bool | float = False,  # tokens to [-1, 1], or to +-that, in every step of the chain
        variance: Variance = "learned_range",  # of ancestral steps; fixed ones are for short runs
        grow: Whole = 0,  # tokens around a hole that are made anew, too
    ):
        self.steps, self.diffusion_steps, self.temperature = steps, diffusion_steps, temperature
        self.guidance_scale, self.ramp, self.order = guidance_scale, ramp, order
        self.chain, self.eta, self.clip_denoised, self.grow = chain, eta, clip_denoised, grow
        self.variance = variance

    def accepts(self, model: Any, codec: Any) -> str | None:
        """MAR alone, in latents or on pixels; None, or why not."""
        return None if isinstance(model, MAR) else "it is no masked autoencoder with a diffusion head (mar)"

    def __call__(self, model: MAR, request: Request) -> Tensor:
        """(N, C, H, W)."""
        steps = request.steps or self.steps
        tokens, unknown = self.given(model, request)
        orders = self.orders(model, request)

        def watch(k: int, tokens: Tensor, known: Tensor) -> None:
            if request.callback is not None:
                request.callback(k, steps, model.unpatchify(tokens), None)

        with in_one_dtype(model, request.device) as network:
            tokens = by_order(self.drawing(network, request), tokens, unknown, orders, steps, watch)
        return model.unpatchify(tokens)

    def given(self, model: MAR, request: Request) -> tuple[Tensor, Tensor]:
        """Tokens (N, positions, C) to begin with, and which of them are unknown: all, but those that are kept."""
        if request.images is None or request.mask is None:
            tokens = torch.zeros(len(request), model.positions, model.channels, device=request.device)
            return tokens, torch.ones_like(tokens[..., 0], dtype=torch.bool)
        kept = kept_codes(request.mask, model.grid, self.grow)
        request.info["made"] = ~kept
        return model.patchify(request.images.to(request.device)), ~kept.flatten(1)

    def orders(self, model: MAR, request: Request) -> Tensor:
        """(N, positions), the last to be made first."""
        if self.order == "random":
            return random_orders(request.rand((model.positions,)))
        return permutation_on(self.order, *model.grid, request.device).flip(0).expand(len(request), -1)

    def drawing(self, model: MAR, request: Request) -> Draw:
        """How the tokens of a step are drawn: one pass of the transformer, guided in a doubled batch, and one chain of
        the head for each of them."""
        y, null = request.cond.get("y"), None
        scale = self.guidance_scale if request.guidance_scale is None else request.guidance_scale
        if y is not None and scale != 1 and model.num_classes:
            null = unconditional(model, request.cond, request.null)["y"]
        process = model.diffloss.respaced(self.diffusion_steps, self.variance)
        request.info["nfe"] = 0

        def draw(tokens: Tensor, known: Tensor, chosen: Tensor, k: int) -> Tensor:
            request.info["nfe"] += 1 if null is None else 2
            noise = own_noise(request, chosen.sum(1).tolist(), process.steps, model.channels)
            scales = None
            if y is None or null is None:
                z = model(tokens, known, y)[chosen]
            else:
                both = model(tokens.repeat(2, 1, 1), known.repeat(2, 1), torch.cat([y, null]))
                z = both[chosen.repeat(2, 1)]
                own = guidance_scales(scale, self.ramp, known, chosen)
                scales = own[:, None].expand_as(chosen)[chosen]
            first, chain = next(noise), (self.temperature, self.chain, self.eta, self.clip_denoised)
            return model.diffloss.sample(process, z, first, lambda: next(noise), scales, *chain)

        return draw


def own_noise(request: Request, counts: list[int], steps: int, channels: int) -> Iterator[Tensor]:
    """Standard normal (R, channels) of so many tokens of each image, for the beginning of a chain and for every step;
    each image's from its own generator, whatever the others draw."""
    drawn = [torch.randn((n, steps, channels), generator=g) for n, g in zip(counts, request.generators)]
    return iter(send(torch.cat(drawn), request.device).unbind(1))
