"""The samplers: predictor and corrector, the probability flow with its latent codes, and both for restoration.

Song et al. 2021 (2011.13456), sec. 4 and 5, app. I; yang-song/score_sde_pytorch@cb1f359 sampling.py,
controllable_generation.py and the notebook. Class-conditional sampling is that of every sampler of the host:
classifier=RUN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vgm_cli.api import Request
from vgm_cli.diffusion.denoiser import Denoiser, no_denoiser
from vgm_cli.diffusion.samplers import GaussianSampler, report
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.operators.base import Operator
from vgm_cli.ranges import Blocks, Positive, Steps

from .predictors import Corrector, Norm, Pair, Predictor, scaled, walk
from .process import Process

Told = Callable[[int, Tensor, Tensor, Tensor], None]


def telling(process: Process, request: Request, steps: int) -> Told | None:
    """A callback for `walk` that tells the request's of images in [-1, 1]."""
    tell = report(request, steps)
    if tell is None:
        return None
    return lambda i, t, x, x0: tell(i, process.out_of(x, t), process.images(x0))


@dataclass(kw_only=True)
class ScoreSDESampler(GaussianSampler):
    """At each of N = `steps` times from noise to `eps` Langevin steps, then a step down. Every pair of the two goes.

    norm=batch is the official step size of Langevin, which makes an image depend on the others of its batch: on
    --batch-size. Evaluations: N (corrector_steps + 1). VgmError: VP and sub-VP in fewer steps than beta_max, but for
    euler-maruyama without corrector.
    """

    steps: Steps = 1000
    predictor: Predictor = "reverse-diffusion"  # the step down
    corrector: Corrector = "langevin"  # or ald: annealed, its step size by t alone
    corrector_steps: Blocks = 1  # at each time
    snr: Positive = 0.16  # signal-to-noise ratio of the corrector
    norm: Norm = "image"  # norms that langevin's step size follows from, see above
    probability_flow: bool = False  # the ODE in place of the reverse SDE
    eps: Positive | None = None  # where sampling ends; None: 1e-5 of VE, 1e-3 of VP and sub-VP
    denoise: bool = True  # the last step without its noise

    def solve(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        process = Process.of(model, steps, request.cond)
        if not self.denoise:
            request.info["notes"] = [NOISY]
        x, mean = walk(
            process.sde,
            process.score,
            request.randn() * process.sde.prior_std,
            predictor=self.predictor,
            corrector=self.corrector,
            corrector_steps=self.corrector_steps,
            snr=self.snr,
            norm=self.norm,
            flow=self.probability_flow,
            eps=self.eps or process.eps,
            noise=request.randn,
            callback=telling(process, request, steps),
        )
        return process.images(mean if self.denoise else x)


NOISY = "denoise=false leaves the last step's noise in the images: no eye sees it, but FID does"


@dataclass(kw_only=True)
class ScoreSDEFlowSampler(GaussianSampler):
    """The probability flow by Dormand-Prince 5(4): noise is an image's latent code, and the other way round.

    With images given (--input) their codes are found first; interpolate=k makes k images of each of them, on the way
    from its code to that of the next. Images do not depend on their batch. VgmError: another kind of network.
    """

    rtol: Positive = 1e-5  # relative tolerance
    atol: Positive = 1e-5  # absolute tolerance
    eps: Positive | None = None  # where sampling ends; None: 1e-5 of VE, 1e-3 of VP and sub-VP
    denoise: bool = False  # ends with the mean of one step of reverse diffusion
    temperature: Positive = 1.0  # factor on the latent codes: below 1 images are smoother
    interpolate: Steps | None = None  # images on the way from one given image's code to the next; None: its own alone
    steps: Steps = 1000  # N of that last step; the solver finds its own steps

    def solve(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        process = Process.of(model, steps, request.cond)
        end, accuracy = self.eps or process.eps, {"rtol": self.rtol, "atol": self.atol}
        if request.images is None:
            if self.interpolate is not None:
                raise VgmError("interpolate needs images to go between", "--input DATA", USAGE)
            z = request.randn() * process.sde.prior_std
        else:
            z = self.codes(process, request, request.images, accuracy)
        tell = report(request, steps)
        told = None if tell is None else lambda i, x, x0: tell(i, process.images(x), x0)
        x = process.decode(z * self.temperature, eps=end, callback=told, **accuracy)
        return process.images(process.denoised(x, end) if self.denoise else x)

    def codes(self, process: Process, request: Request, images: Tensor, accuracy: dict[str, float]) -> Tensor:
        """The code of each item (B, ...): of its image, or between that and the next one's. The last is followed by
        the first."""
        k = self.interpolate or 1
        place = torch.tensor(request.index, device=images.device)
        first = process.encode(process.into(images[(place // k) % len(images)]), **accuracy)
        if k == 1:
            return first
        last = process.encode(process.into(images[(place // k + 1) % len(images)]), **accuracy)
        angle = (place % k).double() / k * (math.pi / 2)
        return scaled(angle.cos(), first) + scaled(angle.sin(), last)


@dataclass(kw_only=True)
class ScoreSDERestorer:
    """Inpainting, colorization, and every other linear task without noise, as predictor and corrector with what is
    known put in: after each of them the known part of the state becomes the measurement, noised anew to that time.

    What is known are coefficients in the operator's singular basis: pixels of inpainting, the grey channel of
    colorization. VgmError: an operator that is not linear, a measurement with noise.
    """

    steps: Steps = 1000  # N, see score-sde
    predictor: Predictor = "reverse-diffusion"
    corrector: Corrector = "langevin"
    corrector_steps: Blocks = 1
    snr: Positive = 0.16
    norm: Norm = "image"
    probability_flow: bool = False
    eps: Positive = 1e-5  # where sampling ends
    denoise: bool = True
    init: Literal["official", "noised"] = "official"  # the start's known part: without noise, or noised as later

    def accepts(self, model: Any, codec: Any) -> str | None:
        """None for networks on VE, VP and sub-VP, otherwise the reason why not."""
        if (reason := no_denoiser(model)) is not None:
            return reason
        try:
            Process.of(model, self.steps)
        except VgmError:
            return "it is not on VE, VP or sub-VP"
        return None

    def __call__(self, view: Denoiser, request: Request) -> Tensor:
        """x0 of (N, *request.shape)."""
        operator, y = request.operator, request.measurement
        if operator is None or y is None:
            raise VgmError("this method needs something that is known", "vgm restore --method score-sde-restore", USAGE)
        check(operator)
        before, steps = view.nfe, request.steps or self.steps
        process = Process.of(view, steps, request.cond)
        if not self.denoise:
            request.info["notes"] = [NOISY]
        known, seen = Known(process, operator, y), []

        def impose(x: Tensor, t: Tensor) -> Pair:
            return known.impose(x, t, request.randn())

        tell = telling(process, request, steps)

        def told(i: int, t: Tensor, x: Tensor, x0: Tensor) -> None:
            seen.append((y - operator(process.images(x0))).flatten(1).norm(dim=1).float().cpu())
            if tell is not None:
                tell(i, t, x, x0)

        x = known.start(request.randn() * process.sde.prior_std)
        if self.init == "noised":
            x = known.impose(x, torch.ones(len(x), device=x.device), request.randn())[0]
        x, mean = walk(
            process.sde,
            process.score,
            x,
            predictor=self.predictor,
            corrector=self.corrector,
            corrector_steps=self.corrector_steps,
            snr=self.snr,
            norm=self.norm,
            flow=self.probability_flow,
            eps=self.eps,
            noise=request.randn,
            impose=impose,
            callback=told,
        )
        request.info["nfe"], request.info["residual"] = view.nfe - before, seen
        return process.images(mean if self.denoise else x).float()


def check(operator: Operator) -> None:
    """VgmError: what is known is no part of the image, or it has noise."""
    if operator.latent or not operator.linear:
        raise VgmError(f"score-sde-restore needs a linear task, {operator.name} is none", "--method dps", USAGE)
    if operator.noise.sigma:
        raise VgmError("score-sde-restore takes what is known as it is: it removes no noise", "--noise none", USAGE)


class Known:
    """What a measurement y (B, ...) says of images in the network's range: their coefficients in the singular basis of
    the operator where its singular values are not 0."""

    def __init__(self, process: Process, operator: Operator, y: Tensor):
        self.process, self.svd = process, operator.svd
        self.image = process.into(operator.pinv(y)).to(y.dtype)
        self.seen = (self.svd.singular.to(y.device) > 0).expand(len(y), *self.image.shape[1:])
        self.coefficients = self.svd.Vt(self.image)

    def start(self, noise: Tensor) -> Tensor:
        """The official start: what is known, and the noise where nothing is. Colorization masks the noise before its
        change of basis, so that the red channel's is left out and grey is not quite known."""
        hidden = torch.where(self.seen, 0.0, noise)
        return self.svd.V(torch.where(self.seen, self.coefficients, 0.0)).to(noise.dtype) + hidden

    def impose(self, x: Tensor, t: Tensor, z: Tensor) -> Pair:
        """x (B, ...) at times t with what is known noised by z, then the same with it free of noise."""
        mean, std = self.process.sde.marginal(self.coefficients, t)
        x = self.mixed(x, mean + scaled(std, z))
        return x, self.mixed(x, mean)

    def mixed(self, x: Tensor, known: Tensor) -> Tensor:
        """x with its known coefficients replaced."""
        return self.svd.V(torch.where(self.seen, known, self.svd.Vt(x))).to(x.dtype)
