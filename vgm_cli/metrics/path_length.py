"""Perceptual path length: how much an image changes, in LPIPS, per unit step in a generator's latent space.

Paper: Karras et al., A Style-Based Generator Architecture (arXiv:1812.04948), section 4.1; numbers as NVlabs/stylegan
metrics/perceptual_path_length.py and NVlabs/stylegan2-ada-pytorch (ppl2_wend: space w, sampling end, no crop, 50,000).

THE CONTRACT: a model is measured when what a sampler would be handed (`loaded.view`) has

    path_samples(self, generators, epsilon, space, sampling) -> tuple[Tensor, Tensor]

    generators   B CPU generators, one per pair: its latents, position t and (shared) noise inputs come from it;
    epsilon      the step: the pair is at t and t + epsilon;
    space        "z" (slerp between two normalised latents) or "w" (lerp between two mapped latents);
    sampling     "full" (t uniform in [0, 1)) or "end" (t = 0);
    returns      two image batches, each (B, C, H, W) about [-1, 1], made with the same noise and without truncation.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.api import HasPaths, generators, seed_of
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.metrics.base import MetricBase, Subject, Value
from vgm_cli.metrics.image import load_lpips
from vgm_cli.ranges import Count, NonNegative

PAIRS = 50_000
SIDE = 256  # larger images are box-averaged to this
SPACES, SAMPLINGS = ("z", "w"), ("full", "end")


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Unit-length spherical interpolation. a, b: (B, D), t: (B, 1) -> (B, D)."""
    a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    d = (a * b).sum(-1, keepdim=True)
    angle = t * torch.acos(d.clamp(-1, 1))
    c = F.normalize(b - d * a, dim=-1)
    return F.normalize(a * angle.cos() + c * angle.sin(), dim=-1)


def prepare(x: Tensor, crop: bool = False) -> Tensor:
    """Images (B, C, H, W) as LPIPS compares them: with `crop` the middle of a face, then averaged down to 256
    pixels."""
    if crop:
        c = x.shape[2] // 8
        x = x[:, :, c * 3 : c * 7, c * 2 : c * 6]
    factor = x.shape[2] // SIDE
    return F.avg_pool2d(x, factor) if factor > 1 else x


def path_length(distances: Tensor, epsilon: float, low: float = 1, high: float = 99) -> tuple[float, float]:
    """(mean, standard error) of distance / epsilon^2 between two percentiles, themselves kept. distances: (N,)."""
    d = distances.double().numpy() / epsilon**2
    kept = d[(d >= np.percentile(d, low, method="lower")) & (d <= np.percentile(d, high, method="higher"))]
    return float(kept.mean()), float(kept.std(ddof=1) / len(kept) ** 0.5) if len(kept) > 1 else 0.0


class PerceptualPathLength(MetricBase):
    """Mean LPIPS distance of two images a step epsilon apart in latent space, over epsilon^2 (see the top of this
    file)."""

    needs_model = True
    needs_data = False

    def __init__(
        self,
        n: Count | None = None,  # pairs; None: 50,000
        epsilon: NonNegative = 1e-4,  # length of the step
        space: str = "w",  # w, or z
        sampling: str = "end",  # end: t = 0; full: t in [0, 1)
        crop: bool = False,  # compare the middle of a face only
        vgg: str | None = None,  # file of LPIPS' VGG weights; None: the cache
        heads: str | None = None,  # file of LPIPS' linear layers; None: the cache
    ):
        if epsilon == 0:
            raise VgmError("ppl:epsilon=0: there is no step", code=USAGE)
        if space not in SPACES:
            raise unknown("latent space", space, SPACES)
        if sampling not in SAMPLINGS:
            raise unknown("sampling", sampling, SAMPLINGS)
        self.n, self.epsilon, self.space, self.sampling, self.crop = n, epsilon, space, sampling, crop
        self.net, self.files = load_lpips(vgg, heads)

    def __call__(self, subject: Subject, seed: int) -> list[Value]:
        view = subject.view
        if not isinstance(view, HasPaths):
            name = subject.header.component.get("name")
            raise VgmError(f"{name} has no latent paths", "ppl is of generators such as StyleGAN's", USAGE)
        n = self.n or subject.n or PAIRS
        net = self.net.to(subject.device)

        @torch.no_grad()
        def work(span: range) -> Tensor:
            gens = generators(seed_of("path", seed, i) for i in span)
            a, b = (
                prepare(x.float(), self.crop) for x in view.path_samples(gens, self.epsilon, self.space, self.sampling)
            )
            return net(a, b).flatten().cpu()

        spans = [range(i, min(i + subject.batch_size, n)) for i in range(0, n, subject.batch_size)]
        value, error = path_length(torch.cat(subject.shares(spans, work)), self.epsilon)
        options = {"space": self.space, "sampling": self.sampling, "epsilon": self.epsilon, "crop": self.crop}
        return [Value("ppl", value, error, {**options, **self.files}, n=n)]
