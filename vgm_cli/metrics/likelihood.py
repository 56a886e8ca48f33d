"""Bits per dimension, and THE CONTRACT by which any model offers a likelihood.

`vgm evaluate RUN --metrics bits-per-dim` looks at what a sampler would be handed (`loaded.view`: the bare network, or
whatever the objective's `view()` names) and calls, if it is there,

    log_likelihood(self, x: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, str]

    x            uint8 (B, C, H, W), 8-bit pixels 0..255, on the model's device, under torch.no_grad;
    generators   B CPU generators, one per image. Every draw of image i comes from generators[i] (dequantisation noise,
                 posterior samples, probes), so that its value depends neither on the batch nor on other images;
    returns      (nats, kind): nats (B,) float, log p(x) of the DISCRETE image (or a lower bound of it), natural
                 logarithm, summed over dimensions; kind: a few words for the protocol that say how it was had and what
                 it is, e.g. "exact", "ELBO", "IWAE-50 bound", "ODE, one Hutchinson probe, uniform dequantisation".

A conditional model may add a keyword `y: Tensor | None = None` ((B,) int64 labels); it is passed where the data has
labels and the checkpoint was trained with them. A latent-variable model may add `samples: int = ...` (posterior draws;
1 is the ELBO), which `bits-per-dim:samples=N` sets, and `estimator: str = ...` where it knows several, which
`bits-per-dim:estimator=NAME` sets. A model that needs the codec of its tokens to see with (a pyramid's) may add
`codec: Any = None`, which is passed. bits per dimension = -nats / (C H W ln 2).

Rules. The model dequantises itself. With data scaled to z = a x + b and a density p(z) of (x + u) scaled the same way,
u ~ U(0, 1) (or U(-1/2, 1/2)): nats = log p(z) + C H W log a, a lower bound in expectation (Theis et al.,
arXiv:1511.01844). A Bernoulli or categorical decoder needs no noise. Models of fewer bits (Glow's n_bits = 5) reduce x
themselves, state it in `kind`, and give the nats of the reduced image.

Behind a frozen codec there is no likelihood of pixels. The host then encodes and hands over what the model is trained
on: x is float latents (B, c, h, w) (drawn from the posterior with the same generators), or int64 tokens; nats are those
of the latents or tokens; the metric is called `bits-per-latent-dim` and divides by their number. A view that wants
this sets `latent_likelihood = True`; without it the verb refuses. Where the codec's decoder is a distribution of pixels
(api.HasPixelLikelihood) and the model one of its tokens, both make a bound of log p(x): `bits-per-dim`. A codec
that has `log_likelihood` itself is measured without any model.

Diffusion and flow models need nothing of this: a `Denoiser` is measured by the probability-flow ODE, or with
method=elbo bounded by its ELBO (both below), whose three parts are values of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgm_cli.api import HasLatentLikelihood, HasLogLikelihood, HasPixelLikelihood, generators, seed_of
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.iddpm import process_of
from vgm_cli.diffusion.likelihood import Bound, bits_per_dim, elbo, log_likelihood, pixel_levels, rademacher
from vgm_cli.diffusion.solvers.ode import ODE
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.metrics.base import MetricBase, Subject, Value
from vgm_cli.ranges import Count, Positive, Steps
from vgm_cli.registry import coerce, signature
from vgm_cli.ui import ui

METHODS = ("dopri5", "elbo", "vlb")
IMAGES = 256  # measured where -n does not say
LEVELS = 127.5  # data are uint8 / LEVELS - 1


def dequantise(x: Tensor, uniform: Tensor) -> Tensor:
    """uint8 (B, C, H, W) and a draw from U(0, 1) like it -> the training scale, each level spread over 2/255 about
    itself: (x + u - 1/2) / 127.5 - 1. The discrete image's nats are the density's minus D ln 127.5."""
    return (x.to(uniform.dtype) + uniform - 0.5) / LEVELS - 1


def denoiser_likelihood(
    view: Denoiser,
    x: Tensor,
    generators: list[torch.Generator],
    *,
    method: str = "dopri5",
    steps: int = 100,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    probes: int | None = 1,
    dequantised: bool = True,
    **cond: Any,
) -> tuple[Tensor, str]:
    """Likelihood of a Denoiser by its probability-flow ODE: (nats (B,), the method in words).

    x: uint8 (B, C, H, W), or float latents (B, c, h, w). probes: Hutchinson probes to average, each a run of the ODE;
    None: the exact trace, one gradient per dimension and evaluation, for small images only. dequantised: as of
    BitsPerDim.
    """
    shape = x.shape[1:]
    discrete = x.dtype == torch.uint8
    z = x.float() / LEVELS - 1 if discrete else x.float()
    if discrete and dequantised:
        z = dequantise(x, torch.stack([torch.rand(shape, generator=g) for g in generators]).to(x.device))
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for _ in range(probes or 1):
        draw = torch.stack([torch.rand(shape, generator=g) for g in generators]).to(z) if probes else None
        probe = None if draw is None else rademacher(draw)
        found = log_likelihood(view, z, probe, method=method, steps=steps, rtol=rtol, atol=atol, **cond)
        total += found.log_prob.double()
    nats = total / (probes or 1)
    if discrete:
        nats = nats - z[0].numel() * float(np.log(LEVELS))
    trace = "exact trace" if probes is None else f"{probes} Hutchinson probe{'s' * (probes > 1)}"
    solver = f"{method} rtol {rtol:g} atol {atol:g}" if method == "dopri5" else f"{method} {steps} steps"
    noise = "uniform dequantisation" if dequantised else "a density at 8-bit values, NOT dequantised"
    return nats, f"ODE, {solver}, {trace}" + (f", {noise}" if discrete else "")


def bound_likelihood(view: Denoiser, x: Tensor, generators: list[torch.Generator], **cond: Any) -> tuple[Tensor, str]:
    """Likelihood of a discrete process by its variational bound, one evaluation and one draw per timestep: (nats (B,),
    words).

    x: uint8 (B, C, H, W). VgmError: latents, or a network of continuous time.
    """
    if x.dtype != torch.uint8:
        raise VgmError("the variational bound is one of 8-bit pixels, not of latents", "method=dopri5", USAGE)
    process, z = process_of(view), x.float() / LEVELS - 1

    def noise() -> Tensor:
        return torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(z)

    bits = process.bpd_loop(lambda x, t: view.network(x, t, **cond), z, noise)["total_bpd"]
    return -bits.double() * z[0].numel() * math.log(2), f"variational bound, {process.steps} steps"


def denoiser_bound(
    view: Denoiser, x: Tensor, generators: list[torch.Generator], *, steps: int = 100, **cond: Any
) -> tuple[Bound, str]:
    """The ELBO of a Denoiser: its parts in nats, and what they are. x: as of denoiser_likelihood.

    steps: noise levels that each image is tried at, (u + i / steps) mod 1 with its own u. Nothing is dequantised.
    """
    discrete = x.dtype == torch.uint8
    z = x.float() / LEVELS - 1 if discrete else x
    u = torch.stack([torch.rand((), generator=g) for g in generators]).to(x.device)
    levels = (u + torch.arange(steps, device=x.device)[:, None] / steps) % 1

    def randn() -> Tensor:
        return torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x.device)

    found = elbo(view, z, levels, randn, pixel_levels(device=x.device) if discrete else None, **cond)
    return found, f"ELBO, {steps} noise levels an image"


PARTS = Bound._fields


class BitsPerDim(MetricBase):
    """-log2 p per dimension of held-out (or training) images: by the model's own likelihood, or for a Denoiser by the
    probability-flow ODE, its ELBO (an upper bound, whose three parts are reported too), or the bound of its own
    discrete steps."""

    needs_model = True
    gives = tuple(f"{name}{part}" for name in ("bits-per-dim", "bits-per-latent-dim")
                  for part in ("", *(f"-{p}" for p in PARTS)))  # fmt: skip

    def __init__(
        self,
        n: Count | None = None,  # images, evenly spaced over the data; None: 256
        probes: int = 1,  # of the trace's estimate; 0: the exact trace
        method: str = "dopri5",  # a solver of the ODE, elbo, or vlb, see above
        steps: Steps = 100,  # of solvers with fixed steps; of elbo, the noise levels that an image is tried at
        rtol: Positive = 1e-5,  # relative tolerance of dopri5
        atol: Positive = 1e-5,  # absolute tolerance of dopri5
        samples: Count | None = None,  # posterior draws of latent-variable models; None: the model's own number
        estimator: str | None = None,  # which estimator, of models that know several
        passes: Count = 1,  # over the images, each with its own draws; the mean is given
        dequantised: bool = True,  # of the ODE: false is no likelihood of pixels and may be negative, with a warning
    ):
        if method not in (*METHODS, *ODE):
            raise unknown("method", method, (*METHODS, *ODE))
        if probes < 0:
            raise VgmError(f"bits-per-dim:probes={probes}: 0 is the exact trace", code=USAGE)
        if not dequantised:
            ui.warn("dequantised=false measures a density at 8-bit values: no figure to compare with others")
        self.n, self.passes = n, passes
        self.asked = {k: v for k, v in (("samples", samples), ("estimator", estimator)) if v is not None}
        self.ode: dict[str, Any] = {
            "probes": probes or None,
            "method": method,
            "steps": steps,
            "rtol": rtol,
            "atol": atol,
            "dequantised": dequantised,
        }

    def __call__(self, subject: Subject, seed: int) -> list[Value]:
        """uncertainty: the standard error over images. Raises VgmError when the model offers no likelihood."""
        if subject.dataset is None:
            raise VgmError("bits-per-dim needs images to score", "give --reference", USAGE)
        ask = self.answerer(subject)
        count = len(subject.dataset)
        n = min(self.n or subject.n or IMAGES, count)
        rows = (np.arange(n) * count) // n  # evenly spaced: many sets are sorted by class
        spans = [rows[i : i + subject.batch_size] for i in range(0, n, subject.batch_size)]

        decoder = subject.codec if isinstance(subject.codec, HasPixelLikelihood) else None

        @torch.no_grad()
        def work(part: np.ndarray) -> tuple[str, list[tuple[Tensor, int]]]:
            """What the nats are, and nats with their dimensions: of x, (B,), or (B, 1 + parts) of a bound, their sum
            first; and of the image given x by a codec's decoder."""
            batch = subject.dataset.gather(part.tolist())
            gens = generators(seed_of("likelihood", seed, int(row)) for row in part)
            image = x = batch["x"].to(subject.device)
            if subject.codec is not None:
                x = encode(subject.codec, x, gens)
            items = {
                name: own for name, p in subject.conditions.parts.items() if (own := p.of_data(batch, part)) is not None
            }
            cond = subject.conditions.encode(items, subject.device)
            asked = [ask(x, gens, cond) for _ in range(self.passes)]
            nats, kind = torch.stack([n for n, _ in asked]).mean(0), asked[0][1]
            found = [(nats.double().cpu(), x[0].numel())]
            if decoder is not None and not x.is_floating_point():
                found.append((decoder.pixel_log_likelihood(image, x).double().cpu(), image[0].numel()))
            return kind, found

        parts = subject.shares(spans, work)
        kind, terms = parts[0][0], list(zip(*(found for _, found in parts)))
        nats = [torch.cat([part for part, _ in term]) for term in terms]
        name = "bits-per-dim" if subject.codec is None else "bits-per-latent-dim"
        values = in_bits(name, nats[0], terms[0][0][1], kind)
        if len(nats) > 1:
            bound = f"ELBO, the codes by the trained prior ({kind})"
            values += in_bits("bits-per-dim", nats[0] + nats[1], terms[1][0][1], bound)
        return values

    def answerer(
        self, subject: Subject
    ) -> Callable[[Tensor, list[torch.Generator], dict[str, Any]], tuple[Tensor, str]]:
        """The function that computes nats for this model: its own `log_likelihood`, or a Denoiser's bound or ODE."""
        view = subject.view
        if isinstance(view, HasLogLikelihood):
            own = view.log_likelihood
            if subject.codec is not None and not (isinstance(view, HasLatentLikelihood) and view.latent_likelihood):
                raise VgmError("this model sees latents of a codec, so it has no likelihood of pixels", code=USAGE)
            takes = signature(own).parameters
            more = {k: coerce(v, takes[k], "bits-per-dim") for k, v in self.asked.items() if k in takes}
            more |= {"codec": subject.codec} if "codec" in takes else {}
            if "estimator" in self.asked and "estimator" not in takes:
                raise VgmError("this model knows one estimate of its likelihood", "leave estimator away", USAGE)
            return lambda x, gens, cond: own(x, gens, **{k: v for k, v in cond.items() if k in takes}, **more)
        if isinstance(view, Denoiser) and self.ode["method"] == "vlb":
            return lambda x, gens, cond: bound_likelihood(view, x, gens, **cond)
        if isinstance(view, Denoiser) and self.ode["method"] == "elbo":
            return lambda x, gens, cond: bounded(*denoiser_bound(view, x, gens, steps=self.ode["steps"], **cond))
        if isinstance(view, Denoiser):
            return lambda x, gens, cond: denoiser_likelihood(view, x, gens, **self.ode, **cond)
        name = subject.header.component.get("name")
        raise VgmError(
            f"{name} offers no likelihood", "vgm_cli/metrics/likelihood.py says what a model must offer", USAGE
        )


def bounded(bound: Bound, kind: str) -> tuple[Tensor, str]:
    """(B, 1 + parts): log-likelihoods' lower bound, then what each part takes from it."""
    parts = torch.stack(bound, dim=1)
    return -torch.cat([parts.sum(1, keepdim=True), parts], dim=1), kind


def in_bits(name: str, nats: Tensor, dim: int, kind: str) -> list[Value]:
    """Means of -nats (N,), or (N, 1 + parts) of a bound, per dimension in bits, each with its standard error."""
    bits, n = bits_per_dim(nats, dim, levels=2), len(nats)  # levels = width: no further offset
    options = {"likelihood": kind, "dimensions": dim}
    return [
        Value(title, float(column.mean()), float(column.std()) / n**0.5 if n > 1 else None, options, n=n)
        for title, column in zip((name, *(f"{name}-{p}" for p in PARTS)), bits.view(n, -1).unbind(1))
    ]


def encode(codec: Any, x: Tensor, gens: list[torch.Generator]) -> Tensor:
    """uint8 images -> what a model behind `codec` is trained on, one posterior draw per image."""
    moments = codec.encode(x.float() / LEVELS - 1)
    shape = codec.latent_shape(tuple(x.shape[1:]))
    noise = torch.stack([torch.randn(shape, generator=g) for g in gens]).to(x.device)
    return codec.latents(moments, noise)
