"""SUPIR's samplers: EDM's Euler steps whose estimates are pulled towards the first stage while noise is high, and
DPM-Solver++(2M) SDE; guidance and control that change with the noise level; tiles.

Yu et al. 2024 (arXiv 2401.13627), sec. 3.3. Official code: Fanghua-Yu/SUPIR@bda91af
sgm/modules/diffusionmodules/{sampling,guiders,denoiser}.py, SUPIR/models/SUPIR_model.py batchify_sample, SUPIR/util.py
PIL2Tensor. The noise level counts over SDXL's highest, 14.6146.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vgm_cli.api import Request
from vgm_cli.conditioning import unconditional
from vgm_cli.diffusion import timesteps
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.guidance import extrapolate
from vgm_cli.diffusion.path import DiscreteVPPath
from vgm_cli.diffusion.samplers import report
from vgm_cli.diffusion.solvers.k_diffusion import dpmpp_2m_sde
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ranges import Fraction, NonNegative, Positive, Side, Steps, Unbounded, Width

from .codec import robust
from .colour import adain_fix, wavelet_fix
from .model import SUPIRUNet
from .presets import ADDED, NEGATIVE
from .tiles import Tiles

SIGMA_MAX = 14.6146
Estimate = Callable[[Tensor, float, float], Tensor]  # (x, sigma, control scale) -> x0


# -- noise levels ------------------------------------------------------------------------------------------------------


def levels(path: DiscreteVPPath) -> Tensor:
    """sigma / alpha of every timestep, ascending: (steps,) float64."""
    return path.ve_sigma(path.t_of_timestep(torch.arange(path.steps)))


def nearest(sigma: float | Tensor, table: Tensor) -> Tensor:
    """The timesteps whose levels are nearest to sigma (N,) or a number: (N,) or () int64."""
    sigma = torch.as_tensor(sigma, dtype=table.dtype)
    return (sigma[..., None] - table).abs().argmin(-1)


def sigmas(path: DiscreteVPPath, steps: int) -> Tensor:
    """The levels of `steps` roughly equally spaced timesteps from the last one down, and 0: (steps + 1,) float64.
    VgmError: more steps than there are."""
    if steps > path.steps:
        raise VgmError(f"steps={steps}: between 1 and {path.steps}", code=USAGE)
    index = np.linspace(path.steps - 1, 0, steps, endpoint=False).astype(int)
    return timesteps.append_zero(levels(path)[torch.from_numpy(index)])


def highest(path: DiscreteVPPath) -> float:
    """The level over which others count: the official constant on SDXL's schedule, on others the last one."""
    top = float(levels(path)[-1])
    return SIGMA_MAX if abs(top - SIGMA_MAX) < 1e-3 else top


def linear(at_data: float, at_noise: float, sigma: float, sigma_max: float = SIGMA_MAX) -> float:
    """A number that goes from at_noise, where all is noise, to at_data with the noise level."""
    return (at_noise - at_data) * sigma / sigma_max + at_data


# -- solvers -----------------------------------------------------------------------------------------------------------


def restore_edm(
    estimate: Estimate,
    x: Tensor,
    levels: Tensor,
    centre: Tensor,
    *,
    restore: float = 4.0,  # how soon the pull towards `centre` fades: an exponent; 0 or less: there is none
    restore_min: float = 0.05,  # steps that end at this level or below are not pulled
    s_churn: float = 0.0,  # noise that is added before each step, over all steps
    s_tmin: float = 0.0,  # levels at which it is added: from here ...
    s_tmax: float = math.inf,  # ... to here
    s_noise: float = 1.003,  # deviation of the noise that is added
    control: float = 1.0,  # control scale
    control_start: float | None = None,  # at the highest level; None: the same
    sigma_max: float = SIGMA_MAX,  # the highest level
    noise: Callable[[], Tensor],  # the next draw like x
    always_draws: bool = False,  # draws are made where no noise is added, too
    callback: Callable[[int, Tensor, Tensor | None], None] | None = None,  # (i, x, x0)
) -> Tensor:
    """Restoration-guided Euler steps from x (B, ...) at levels[0] to levels[-1] = 0. centre: like x, what is pulled
    to."""
    steps = len(levels) - 1
    for i, (sigma, after) in enumerate(zip(levels[:-1].tolist(), levels[1:].tolist())):
        gamma = min(s_churn / steps, math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
        raised = sigma * (1 + gamma)
        drawn = noise() if gamma > 0 or always_draws else None
        if gamma > 0 and drawn is not None:
            x = x + drawn * (s_noise * math.sqrt(raised**2 - sigma**2))
        scale = control if control_start is None else linear(control, control_start, sigma, sigma_max)
        x0 = estimate(x, raised, scale)
        if after > restore_min and restore > 0:
            x0 = x0 - (x0 - centre) * (sigma / sigma_max) ** restore
        if callback is not None:
            callback(i, x, x0)
        x = x + (x - x0) * ((after - raised) / raised)
    return x


def restore_dpmpp_2m(
    estimate: Estimate,
    x: Tensor,
    levels: Tensor,
    *,
    control: float = 1.0,  # control scale
    eta: float = 1.0,  # share of noise that is renewed
    s_noise: float = 1.003,  # deviation of that noise
    noise: Callable[[], Tensor],  # the next draw like x
    callback: Callable[[int, Tensor, Tensor | None], None] | None = None,  # (i, x, x0)
) -> Tensor:
    """DPM-Solver++(2M) SDE from x (B, ...) at levels[0] on Karras' levels between the first and the last of `levels`
    above 0. The first step adds no noise, as officially."""
    low, high = float(levels[-2]), float(levels[0])
    grid = timesteps.karras(len(levels) - 1, low, high, dtype=torch.float64)
    first = True

    def later() -> Tensor:
        nonlocal first
        drawn, first = (torch.zeros_like(x) if first else noise()), False
        return drawn

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return estimate(x, float(sigma[0]), control)

    return dpmpp_2m_sde(denoise, x, grid, eta=eta, s_noise=s_noise, noise=later, callback=callback)


# -- the sampler -------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class SUPIRSampler:
    """Restores pictures whose latents (by the codec's second encoder) the network follows. Defaults are those of the
    official test script; presets: quality, fidelity, faces, paper, lightning-q, lightning-f.

    Draws of an item: the posterior of the first stage, the start, then one for every step that adds noise.
    """

    steps: Steps = 50
    solver: Literal["edm", "dpmpp-2m"] = "edm"
    guidance_scale: NonNegative = 4.0  # towards the text, at the last step; a request's goes before
    guidance_start: NonNegative | None = 1.0  # at the first step; None: the same
    restore: float = -1.0  # how soon the pull towards the first stage fades (4: the paper's); 0 or less: no pull
    restore_min: NonNegative = 0.05  # steps that end at this level or below are not pulled
    s_churn: NonNegative = 5.0  # noise that is added before each step, over all steps
    s_noise: NonNegative = 1.01  # deviation of the noise that is added
    s_tmin: NonNegative = 0.0  # levels at which it is added: from here ...
    s_tmax: Unbounded = math.inf  # ... to here
    eta: NonNegative = 1.0  # of dpmpp-2m: share of noise that is renewed
    control_scale: NonNegative = 1.0  # below 1 follows the picture less and looks better
    control_start: NonNegative | None = None  # the same at the first step; None: the same
    colour_fix: Literal["wavelet", "adain", "none"] = "wavelet"  # colours of the first stage
    stage: Literal[1, 2] = 2  # 1: the first stage alone, no sampling
    tile: Width | None = None  # sample in tiles of this many pixels; None: the whole at once
    tile_overlap: Fraction = 0.5  # share of a tile that its neighbour covers, too
    upscale: Positive = 1.0  # sides of the result over those of the input
    min_side: Side | None = None  # a smaller side is enlarged to it on the way; None: the network's own
    multiple: Width | None = None  # of which sides are on the way; None: 64, or what a small network needs
    added: str = ADDED  # behind every text
    negative: str = NEGATIVE  # text that guidance leads away from, where the user gives none

    blind = True

    def accepts(self, model: Any, codec: Any) -> str | None:
        """None for a SUPIR network behind a codec with two encoders; else why not."""
        if not isinstance(model, Denoiser) or not isinstance(model.network, SUPIRUNet):
            return "it is no SUPIR network"
        if not isinstance(model.path, DiscreteVPPath):
            return "its noise has no timesteps"
        return None if robust(codec) is not None else "its codec has no encoder for degraded pictures"

    # sizes

    def grain(self, model: Any, codec: Any) -> int:
        """Sides are multiples of what codec and network make of one position."""
        return int(codec.factor * model.network.control.factor)

    def sizes(
        self, size: Sequence[int], side: int, least: int, fixed: int | None = None
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """For a picture of `size` (h, w): the size at which it is restored, and that of the result. side: of the
        network's images; least: a multiple of this it needs; fixed: the shorter side of both, whatever it was."""
        height, width = (n * self.upscale for n in size)
        returned = round(height), round(width)
        low = side if self.min_side is None else self.min_side
        if min(height, width) < low:
            height, width = (n * (low / min(height, width)) for n in (height, width))
        if fixed is not None:
            height, width = (n * (fixed / min(height, width)) for n in (height, width))
            returned = round(height), round(width)
        multiple = (64 if side >= 512 else least) if self.multiple is None else self.multiple
        at = tuple(max(1, int(np.round(n / multiple))) * multiple for n in (height, width))
        return (at[0], at[1]), returned

    # sampling

    def __call__(self, view: Denoiser, request: Request) -> Tensor:
        """Latents (N, c, h, w) of the size of request.cond["control"]. VgmError: not that network or codec, no
        picture."""
        if (why := self.accepts(view, request.codec)) is not None:
            raise VgmError(f"SUPIR's sampler does not take this network: {why}", "`vgm ls samplers`", USAGE)
        return self.solve(view, request, request.codec)

    def solve(self, view: Any, request: Request, codec: Any) -> Tensor:
        """Sampling in the official order of draws. codec: decode, encode, latents."""
        if "control" not in request.cond:
            raise VgmError("SUPIR restores a picture, and none is given", "--hint IMAGE, or vgm restore", USAGE)
        control = request.cond["control"]
        shape = tuple(control.shape[1:])
        request.info["stage1"] = first = codec.decode(control)
        if self.stage == 1:
            request.info["nfe"] = 0
            return control
        centre = codec.latents(codec.encode(first), request.randn(shape))
        steps = self.steps if request.steps is None else request.steps
        path = view.path
        grid = sigmas(path, steps)
        x = request.randn(shape) * math.sqrt(1 + float(grid[0]) ** 2)
        tiles = self.tiles(codec.factor, shape) if self.tile else None
        estimate = self.guided(view, request, tiles)
        keywords: dict[str, Any] = {
            "control": self.control_scale,
            "s_noise": self.s_noise,
            "noise": lambda: request.randn(shape),
            "callback": report(request, steps),
        }
        if self.solver == "dpmpp-2m":
            return restore_dpmpp_2m(estimate, x, grid, eta=self.eta, **keywords).float()
        return restore_edm(
            estimate,
            x,
            grid,
            centre,
            restore=self.restore,
            restore_min=self.restore_min,
            s_churn=self.s_churn,
            s_tmin=self.s_tmin,
            s_tmax=self.s_tmax,
            control_start=self.control_start,
            sigma_max=highest(path),
            always_draws=tiles is not None,
            **keywords,
        ).float()

    def tiles(self, factor: int, shape: tuple[int, ...]) -> Tiles | None:
        """Windows of latents, or None where one holds all."""
        size = max(1, (self.tile or 0) // factor)
        return Tiles(size, max(1, round(size * (1 - self.tile_overlap)))) if max(shape[1:]) > size else None

    def guided(self, view: Any, request: Request, tiles: Tiles | None) -> Estimate:
        """The network's guided estimate of x0, in tiles where there are some. A single picture may bring a row of
        every keyword for each tile, such as a text of its own."""
        n, scale = len(request), self.guidance_scale if request.guidance_scale is None else request.guidance_scale
        start = scale if self.guidance_start is None else self.guidance_start
        cond, top = dict(request.cond), highest(view.path)
        plain = len(cond) == 1 or scale == start == 1  # nothing to be guided by, or not at all
        null = {} if plain else unconditional(view.network, cond, request.null)
        request.info["nfe"] = 0

        def estimate(x: Tensor, sigma: float, control: float, box: Any = None, number: int = 0) -> Tensor:
            request.info["nfe"] += 1 if plain else 2
            wanted, worse = (seen(c, box, number, n) for c in (cond, null))
            if plain:
                return self.estimate(view, x, sigma, wanted, control)
            both = {k: torch.cat([worse[k].to(v), v]) for k, v in wanted.items()}
            away, towards = self.estimate(view, torch.cat([x, x]), sigma, both, control).chunk(2)
            return extrapolate((away, towards), (linear(scale, start, sigma, top),))

        if tiles is None:
            return estimate
        return lambda x, sigma, control: tiles.blend(
            lambda i, box: estimate(x[:, :, box[0], box[1]], sigma, control, box, i), x
        )

    def estimate(self, view: Any, x: Tensor, sigma: float, cond: dict[str, Tensor], control: float) -> Tensor:
        """x0 at x (B, c, h, w) of level sigma, the network being asked at the nearest level that it was trained on."""
        t = view.path.t_of_timestep(nearest(sigma, levels(view.path)))
        z = x * float(view.path.alpha(t))
        return view.predict(z, t, "x0", **cond, control_scale=control)  # type: ignore[no-any-return]

    def finish(self, images: Tensor, request: Request) -> Tensor:
        """Decoded pictures (N, C, H, W) with the first stage's colours."""
        first = request.info["stage1"].to(images)
        if self.stage == 1 or self.colour_fix == "none":
            return images
        return wavelet_fix(images, first) if self.colour_fix == "wavelet" else adain_fix(images, first)


def seen(cond: dict[str, Tensor], box: Any, number: int, n: int) -> dict[str, Tensor]:
    """What one tile of n pictures is told: its part of the picture, and its own row where there is one for each."""
    own = {k: v[number : number + 1] if n == 1 and len(v) > 1 else v for k, v in cond.items()}
    return own if box is None or not own else {**own, "control": own["control"][:, :, box[0], box[1]]}
