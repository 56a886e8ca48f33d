"""Samples of a flow, lines between them, and the missing part of images.

Gu et al. 2025 (arXiv 2506.06276), sec. 3.4, 4 and 5. Official code: apple/ml-starflow@e565a46 sample.py,
utils/inference.py; the completion of images has no public code.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.api import Request, generators, seed_of
from vgm_cli.ar.masking import kept_codes
from vgm_cli.conditioning import unconditional
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ranges import Count, Few, NonNegative, Positive, Whole

from .aspect import sides
from .decoding import Decoding, decode
from .model import Flow

Denoise = Literal["score", "net", "none"]
STRONG = 6.0  # an extra weight of guidance from which samples are rarely good


def clean(model: Flow, x: Tensor, cond: dict[str, Tensor], how: Denoise) -> Tensor:
    """Samples (B, C, H, W) without the noise that the network's data had. score: by the likelihood's own gradient; net:
    by the learned denoiser; none: as they are, for a decoder trained on noisy latents."""
    if how == "none" or not model.noise_std:
        return x
    if how == "score":
        return model.denoised(x, cond, model.noise_std)
    if not model.has_denoiser:
        raise VgmError("this network has no learned denoiser", "sampler.denoise=score", USAGE)
    return x - model.noise_std * model(x, **cond, denoise=True).float()


class FlowSampler:
    """Noise through the inverse flow, then one step of denoising. Everything in float32.

    Guidance of scale s has the extra weight w = s - 1 (the official --cfg), 0 being none.
    """

    def __init__(
        self,
        guidance_scale: NonNegative = 1.0,  # where the request names none
        rule: Literal["ratio", "linear"] | None = None,  # None: ratio for STARFlow, linear for TARFlow
        guide_what: Literal["ab", "a", "b"] = "ab",  # linear rule: log-scales (a), means (b) or both
        annealed: bool = False,  # linear rule: the weight grows over the tokens
        guide_top: bool = False,  # guide in the top block only
        attn_temp: Positive = 1.0,  # divides attention's logits; of a TARFlow, those to be guided away from
        denoise: Denoise = "score",  # score: the likelihood's gradient, net: the learned denoiser, none: raw
        jacobi: Whole = 0,  # tokens that are guessed at a time; 0: one after the other
        jacobi_threshold: Positive = 1e-3,  # relative change at which guesses stay
        jacobi_iterations: Count = 32,  # of guessing, at most
        aspect: str | None = None,  # width:height of the pictures, of the same area; None: the network's own
    ):
        self.guidance_scale, self.denoise, self.aspect = guidance_scale, denoise, aspect
        self.options: dict[str, Any] = {
            "rule": rule,
            "what": guide_what,
            "annealed": annealed,
            "top_only": guide_top,
            "attn_temp": attn_temp,
            "width": jacobi,
            "threshold": jacobi_threshold,
            "iterations": jacobi_iterations,
        }
        if aspect is not None:
            sides(2, aspect, 2)

    def __call__(self, model: Flow, request: Request) -> Tensor:
        shape = tuple(request.shape)
        if self.aspect is not None:
            shape = (shape[0], *sides(round((shape[1] * shape[2]) ** 0.5), self.aspect, 2 * model.patch_size))
        z = request.randn(shape)
        scale = self.guidance_scale if request.guidance_scale is None else request.guidance_scale
        return invert(model, request, z, Decoding(w=scale - 1, **self.options), self.denoise)


def invert(model: Flow, request: Request, z: Tensor, how: Decoding, denoise: Denoise) -> Tensor:
    """Latents (N, C, H, W) of a request's items to clean x, guided by the request's conditions."""
    null = None
    if how.w and request.cond:
        null = unconditional(model, request.cond, request.null)
    total = len(model.blocks)

    def watch(i: int, x: Tensor) -> None:
        if request.callback is not None:
            request.callback(i - 1, total, x, None)

    x, passes = decode(model, z, request.cond, null, how, watch)
    request.info["nfe"] = passes + (total if denoise == "score" and model.noise_std else 0)
    if how.w > STRONG:
        said = f"the guidance scale {how.w + 1:g} is an extra weight of {how.w:g}; published ones are 2 to 5"
        request.info["notes"] = [said]
    return clean(model, x, request.cond, denoise)


class InterpolationSampler:
    """Strips of pictures on arcs in the latent space: item i is point i mod `points` of strip i div `points`.

    Strip k goes from image 2k to image 2k + 1 of request.images, noised as the network's data, or between two draws
    that depend on (seed, k) alone. An item's condition is used for both ends. VgmError: a single image.
    """

    grid_labels = "rows"

    def __init__(self, points: Few = 8, denoise: Denoise = "score", seed: int = 0):
        if points < 2:
            raise VgmError(f"points={points}: a line has at least 2", code=USAGE)
        self.points, self.denoise, self.seed = points, denoise, seed
        self.grid_columns = points

    def __call__(self, model: Flow, request: Request) -> Tensor:
        a, b = (self.ends(model, request, end) for end in (0, 1))
        t = torch.tensor([i % self.points / (self.points - 1) for i in request.index], device=request.device)
        return invert(model, request, arc(a, b, t), Decoding(), self.denoise)

    def ends(self, model: Flow, request: Request, end: int) -> Tensor:
        """Latents of one end of every item's strip."""
        numbers = [2 * (i // self.points) + end for i in request.index]
        own = request.drawn_by(generators(seed_of("starflow-interpolate", self.seed, k) for k in numbers))
        draw = own.randn(request.shape)
        if request.images is None:
            return draw
        if len(request.images) < 2:
            hint = "--input DATA, -n the number of points"
            raise VgmError("interpolation needs two images for every strip", hint, USAGE)
        x = request.images[[k % len(request.images) for k in numbers]].to(request.device)
        return model.encode(x + model.noise_std * draw, request.cond).z


def arc(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Points at t (B,) of the great circles from a to b (B, ...), lengths in proportion: latents of high dimension have
    nearly one length, which a straight line would not keep."""
    u, v = F.normalize(a.flatten(1), dim=1), F.normalize(b.flatten(1), dim=1)
    angle = (u * v).sum(1, keepdim=True).clamp(-1, 1).acos().clamp_min(1e-4)
    t = t[:, None]
    direction = (((1 - t) * angle).sin() * u + (t * angle).sin() * v) / angle.sin()
    length = (1 - t) * a.flatten(1).norm(dim=1, keepdim=True) + t * b.flatten(1).norm(dim=1, keepdim=True)
    return (length * direction).view_as(a)


class InpaintingSampler:
    """The missing part of images by Metropolis-Hastings in the latent space (sec. 5): the hole begins as noise, or as
    the top block continues the tokens that are kept; then new noise at the hole's places in the latents is proposed
    again and again, what is known is put back, and the ratio of the two images' densities decides. The paper takes such
    proposals for symmetric, which makes likely images too frequent; `corrected` allows for where proposals come from.

    What is known counts where all pixels of a token are kept. Outpainting is a hole at a border.
    """

    completes = True

    def __init__(
        self,
        iterations: Whole = 20,  # proposals; 0: the beginning as it is
        begin: Literal["top", "noise"] = "top",  # top: the kept tokens are fixed and the top block writes the others
        denoise: Denoise = "score",  # see FlowSampler
        corrected: bool = False,  # the ratio of densities is divided by the proposals' own; false: as in the paper
    ):
        self.iterations, self.begin, self.denoise, self.corrected = iterations, begin, denoise, corrected

    def accepts(self, model: Any, codec: Any) -> str | None:
        """TARFlow and STARFlow; None, or why not."""
        return None if isinstance(model, Flow) else "it is no TARFlow or STARFlow"

    def __call__(self, model: Flow, request: Request) -> Tensor:
        if request.images is None or request.mask is None:
            hint = "vgm restore --method starflow-inpaint --task inpainting"
            raise VgmError("there is no image to complete", hint, USAGE)
        images, cond = request.images.to(request.device), request.cond
        grid = model.grid(images.shape)
        tokens = kept_codes(request.mask, grid)  # (N, h, w)
        kept = tokens[:, None].repeat_interleave(model.patch_size, 2).repeat_interleave(model.patch_size, 3)
        known = images + model.noise_std * request.randn(tuple(images.shape[1:]))
        x = torch.where(kept, known, request.randn(tuple(images.shape[1:])))
        here = model.encode(x, cond)
        passes = len(model.blocks)
        if self.begin == "top":
            given = (here.outputs[-2], tokens.flatten(1))
            z = torch.where(kept, here.z, request.randn(tuple(images.shape[1:])))
            x, more = decode(model, z, cond, kept=given)
            x = torch.where(kept, known, x)
            here, passes = model.encode(x, cond), passes + more + len(model.blocks)
        accepted = torch.zeros(len(x), device=x.device)
        density = here.log_prob(model.variance())
        for i in range(self.iterations):
            z = torch.where(kept, here.z, request.randn(tuple(images.shape[1:])))
            proposed, more = decode(model, z, cond)
            proposed = torch.where(kept, known, proposed)
            there = model.encode(proposed, cond)
            passes += more + len(model.blocks)
            other = there.log_prob(model.variance())
            ratio = other - density
            if self.corrected:  # both proposals come from a normal density at the hole's places
                ratio = ratio + 0.5 * ((z.square() - here.z.square()) * ~kept).sum((1, 2, 3))
            yes = request.rand().log() < ratio
            accepted += yes
            x, density = torch.where(yes.view(-1, 1, 1, 1), proposed, x), torch.where(yes, other, density)
            here = here._replace(z=torch.where(yes.view(-1, 1, 1, 1), there.z, here.z))
            if request.callback is not None:
                request.callback(i, self.iterations, x, None)
        request.info["nfe"] = passes
        if self.iterations:
            request.info["acceptance"] = share = float(accepted.mean() / self.iterations)
            request.info["notes"] = [f"{share:.0%} of {self.iterations} proposals an image accepted"]
        return torch.where(kept, images, clean(model, x, cond, self.denoise))
