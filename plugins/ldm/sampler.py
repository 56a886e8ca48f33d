"""The samplers of the official scripts: DDIM and PLMS on every (1000 // S)-th step, DPM-Solver++ as Stable Diffusion
has it, img2img, and completion of pictures.

CompVis/latent-diffusion@a506df5 ldm/models/diffusion/{ddim,plms}.py; CompVis/stable-diffusion@21f890f
ldm/models/diffusion/dpm_solver, scripts/img2img.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.api import Request
from vgm_cli.diffusion import solvers
from vgm_cli.diffusion.crops import in_crops
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.path import DiscreteVPPath
from vgm_cli.diffusion.samplers import GaussianSampler, report
from vgm_cli.diffusion.solvers.plms import plms
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ranges import Fraction, NonNegative, Side, Steps


def official_timesteps(count: int, total: int) -> Tensor:
    """Every (total // count)-th timestep, each one later than it: ascending, (n,) int64. n is more than `count` where
    that does not divide total. VgmError: the last would lie behind the end, as for 3 of 1000."""
    if not 1 <= count <= total:
        raise VgmError(f"steps={count}: between 1 and {total}", code=USAGE)
    found = torch.arange(0, total, total // count) + 1
    if found[-1] >= total:
        fewer = next(n for n in range(count, 0, -1) if (total - 1) % (total // n))
        raise VgmError(f"steps={count}: the last of these timesteps is {total} of {total}", f"--steps {fewer}", USAGE)
    return found


@dataclass(kw_only=True)
class LDMSampler(GaussianSampler):
    """Latent diffusion's own samplers. solver: ddim, plms (eta 0), or dpm-solver++ (order 2, steps even in time).

    eta: 0 deterministic, 1 as noisy as DDPM; temperature: of that noise. quantize_denoised: every estimate of x0 is
    snapped to the codec's codes. strength: of img2img, the share of the way back to noise that the given pictures go;
    None starts from noise. crop: side of the crops of latents larger than the network was trained on, every
    crop_stride of their pixels; see vgm_cli/diffusion/crops.py. VgmError: no network of discrete timesteps, a codec
    without codes, a strength without pictures.
    """

    steps: Steps = 50
    solver: Literal["ddim", "plms", "dpm-solver++"] = "ddim"
    eta: NonNegative = 0.0
    temperature: NonNegative = 1.0
    quantize_denoised: bool = False
    strength: Fraction | None = None
    crop: Side | None = None
    crop_stride: Side = 64  # from one crop to the next

    completes = True

    def __post_init__(self) -> None:
        if self.solver != "ddim" and self.eta:
            raise VgmError(f"{self.solver} adds no noise", "eta=0, or solver=ddim", USAGE)
        if self.solver == "dpm-solver++" and (self.strength is not None or self.quantize_denoised):
            raise VgmError("img2img and quantised estimates are DDIM's and PLMS'", "solver=ddim", USAGE)

    def accepts(self, model: Any, codec: Any) -> str | None:
        """Networks of discrete timesteps; None, or why not."""
        if isinstance(model, Denoiser) and isinstance(model.path, DiscreteVPPath):
            return None
        return "it needs a network of discrete timesteps"

    def guided(self, view: Denoiser, request: Request) -> Denoiser:
        if self.crop is not None:
            view = copy.copy(view)
            view.network, view.nfe = in_crops(view.network, self.crop, self.crop_stride), 0
        return super().guided(view, request)

    def solve(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        if not isinstance(model.path, DiscreteVPPath):
            raise VgmError("LDM's samplers need a network of discrete timesteps", "sampler.name=ddim", USAGE)
        total = model.path.steps
        if self.solver == "dpm-solver++":
            index = torch.linspace(total - 1, 0, steps + 1, dtype=torch.float64)
        else:
            ascending = official_timesteps(steps, total)
            index = torch.cat([ascending.flip(0), torch.zeros(1, dtype=torch.long)]).double()
        times = model.path.t_of_timestep(index)
        alphas, sigmas = model.path.alpha(times), model.path.sigma(times)
        x, first = self.start(request, alphas, sigmas, steps)
        times, alphas, sigmas = times[first:], alphas[first:], sigmas[first:]
        keep = self.keeper(request, alphas, sigmas)

        def predict(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
            return model.predict_both(x, times[i], **request.cond)

        def predict_kept(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
            return predict(keep(x, i), i)

        def noise() -> Tensor:
            return request.randn() * self.temperature

        clip = quantiser(request.codec) if self.quantize_denoised else None
        callback = report(request, len(times) - 1)
        if self.solver == "plms":
            x = plms(predict, x, alphas, sigmas, clip=clip, keep=keep, callback=callback)
        elif self.solver == "ddim":
            keywords: dict[str, Any] = {"noise": noise if self.eta else None, "clip": clip, "callback": callback}
            x = solvers.ddim(predict_kept, x, alphas, sigmas, eta=self.eta, **keywords)
        else:
            x = solvers.dpm_solver(predict_kept, x, alphas, sigmas, order=2, callback=callback)
        return x if request.mask is None else self.pasted(request, x)

    def start(self, request: Request, alphas: Tensor, sigmas: Tensor, steps: int) -> tuple[Tensor, int]:
        """Where sampling starts, and at which point of the grid: pure noise at the first; of img2img the pictures
        noised to one point before."""
        if self.strength is None:
            return request.randn(), 0
        if request.images is None:
            raise VgmError("img2img starts from pictures", "--image FILE, or strength=null", USAGE)
        count = len(alphas) - 1
        done = int(self.strength * steps)
        if done >= count:
            raise VgmError(f"strength={self.strength:g} leaves nothing of the picture", "a strength below 1", USAGE)
        at = count - 1 - done
        rows = [i % len(request.images) for i in request.index]
        x = (request.images[rows] if request.mask is None else request.images).to(request.device)
        return alphas[at] * x + sigmas[at] * request.randn(), at + 1

    def keeper(self, request: Request, alphas: Tensor, sigmas: Tensor) -> Callable[[Tensor, int], Tensor]:
        """x with what the mask keeps set to the noised picture, before every step."""
        if request.mask is None or request.images is None:
            return lambda x, i: x
        known, mask = request.images.to(request.device), latent_mask(request)

        def keep(x: Tensor, i: int) -> Tensor:
            noised = alphas[i] * known + sigmas[i] * request.randn()
            return (noised * mask + (1 - mask) * x).to(x.dtype)

        return keep

    def pasted(self, request: Request, x: Tensor) -> Tensor:
        """The result with what the mask keeps put back as it was."""
        if request.images is None:
            return x
        mask = latent_mask(request)
        return request.images.to(x) * mask + (1 - mask) * x


def latent_mask(request: Request) -> Tensor:
    """The mask of pixels on the model's grid, (N, 1, h, w): kept where every pixel below is."""
    assert request.mask is not None
    mask = request.mask.to(request.device).float()
    return -F.adaptive_max_pool2d(-mask, tuple(request.shape[-2:]))


def quantiser(codec: Any) -> Callable[[Tensor], Tensor]:
    """Latents -> the codec's nearest codes. VgmError: it has none."""
    if not hasattr(codec, "quantize"):
        raise VgmError("quantize_denoised needs a codec with codes", "a vq-autoencoder", USAGE)
    return lambda z: codec.scale(codec.quantize(codec.unscale(z))[0])
