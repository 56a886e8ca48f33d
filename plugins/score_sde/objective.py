"""Training of score networks, and of the noise-conditional classifier that guides them.

Song et al. 2021 (2011.13456), eq. 7, app. A to C; yang-song/score_sde_pytorch@cb1f359 losses.py. Deviation: half sums
and means are those of one image, then averaged over the batch, as there; times are drawn for each row of the global
batch by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.api import Batch, ObjectiveBase, Step
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nets.ncsnpp import NCSNpp
from vgm_cli.nn.shapes import expand
from vgm_cli.ranges import Positive, Width, ordered

from .predictors import scaled
from .sde import EPS, LABELS, SDE, Kind

Network = Callable[[Tensor, Tensor], Tensor]  # (x (B, ...), labels (B,)) -> like x


def reduced(square: Tensor, reduce_mean: bool) -> Tensor:
    """Squared errors (B, ...) over an image: their mean, or half their sum: (B,)."""
    flat = square.flatten(1)
    return flat.mean(1) if reduce_mean else 0.5 * flat.sum(1)


def continuous_losses(
    sde: SDE,
    network: Network,
    x: Tensor,  # (B, ...) data in the network's range
    t: Tensor,  # (B,) times
    z: Tensor,  # (B, ...) standard normal
    reduce_mean: bool = True,
    likelihood_weighting: bool = False,
) -> Tensor:
    """Denoising score matching in continuous time, (B,): std^2 |score + z / std|^2, or g^2 times that square, which
    bounds the likelihood."""
    mean, std = sde.marginal(x, t)
    x_t = mean + scaled(std, z)
    score = sde.score(network(x_t, sde.labels(t, True)), t, True).float()
    if not likelihood_weighting:
        return reduced((scaled(std, score) + z).square(), reduce_mean)
    g = sde.coefficients(t)[1].to(x.dtype)
    return reduced((score + scaled(1 / std, z)).square(), reduce_mean) * g**2


def smld_losses(sde: SDE, network: Network, x: Tensor, labels: Tensor, z: Tensor, reduce_mean: bool = False) -> Tensor:
    """NCSN's loss, (B,): labels (B,) are entries of the descending ladder."""
    sigma = sde.sigmas.flip(0).to(x.device)[labels].to(x.dtype)
    score = network(x + scaled(sigma, z), labels).float()
    return reduced((score + scaled(1 / sigma, z)).square(), reduce_mean) * sigma**2


def ddpm_losses(sde: SDE, network: Network, x: Tensor, labels: Tensor, z: Tensor, reduce_mean: bool = True) -> Tensor:
    """DDPM's loss, (B,): the error of the noise. labels (B,) are steps, 0 the least noisy."""
    bar = sde.alphas_cumprod.to(x.device)[labels]
    noise = network(scaled(bar.sqrt(), x) + scaled((1 - bar).sqrt(), z), labels).float()
    return reduced((noise - z).square(), reduce_mean)


class ScoreMatching(ObjectiveBase):
    """Denoising score matching on VE, VP or sub-VP, in continuous time or on the ladders of SMLD and DDPM.

    The range of images is the network's: [0, 1] where it was built with centered=false. VgmError: settings that do not
    go together, see `check_network`.
    """

    shardable = True

    def __init__(
        self,
        model: nn.Module,  # the network that is trained: (x, labels, **cond) -> like x
        sde: Kind = "vp",  # variance exploding, preserving, or sub-VP
        continuous: bool = True,  # false: the num_scales levels of SMLD (ve) or DDPM (vp) alone
        likelihood_weighting: bool = False,  # g^2 in place of std^2, in continuous time: a bound of the likelihood
        reduce_mean: bool = True,  # the loss is a mean over values; false: half their sum (officially of ve)
        sigma_min: Positive = 0.01,  # of ve, in the network's range
        sigma_max: Positive = 50.0,  # of ve: about the largest distance of two training images
        beta_min: Positive = 0.1,  # of vp and subvp
        beta_max: Positive = 20.0,  # of vp and subvp
        num_scales: Width = 1000,  # levels of SMLD and DDPM
        eps: Positive = EPS,  # the smallest time that is trained
    ):
        ordered(sigma_min, sigma_max, "sigma_min, sigma_max")
        if sde == "subvp" and not continuous:
            raise VgmError("sub-VP is trained in continuous time", "objective.continuous=true", USAGE)
        if likelihood_weighting and not continuous:
            raise VgmError("the likelihood weighting is one of continuous time", "objective.continuous=true", USAGE)
        self.sde = SDE(
            kind=sde,
            steps=num_scales,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            beta_min=beta_min,
            beta_max=beta_max,
        )
        self.unit = isinstance(model, NCSNpp) and not model.centered
        if isinstance(model, NCSNpp):
            check_network(model, self.sde, continuous)
        self.model, self.networks = model, {"model": model}
        self.continuous, self.likelihood_weighting = continuous, likelihood_weighting
        self.reduce_mean, self.eps = reduce_mean, eps

    def losses(self, x: Tensor, draw: Tensor, z: Tensor, **cond: Any) -> Tensor:
        """x (B, ...) in the network's range; draw (B,): uniform in [0, 1), or int64 levels; z like x: (B,)."""

        def network(x_t: Tensor, labels: Tensor) -> Tensor:
            return self.model(x_t, labels, **cond)

        if not self.continuous:
            loss = smld_losses if self.sde.kind == "ve" else ddpm_losses
            return loss(self.sde, network, x, draw, z, self.reduce_mean)
        t = draw * (1 - self.eps) + self.eps
        return continuous_losses(self.sde, network, x, t, z, self.reduce_mean, self.likelihood_weighting)

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """batch x: (B, C, H, W) in [-1, 1], cond: keywords of the network."""
        x = in_range(batch["x"], self.unit)
        draw = step.rand(len(x), "t") if self.continuous else step.randint(self.sde.steps, len(x), "t")
        return self.losses(x, draw, step.randn(x.shape, "noise"), **batch.get("cond", {})).mean(), {}

    def view(self) -> dict[str, Any]:
        return view_of(self.sde, self.continuous, self.unit, self.eps)


def in_range(x: Tensor, unit: bool) -> Tensor:
    """Images in [-1, 1], or in [0, 1] for a network of these."""
    return (x + 1) / 2 if unit else x


def view_of(sde: SDE, continuous: bool, unit: bool, eps: float = EPS) -> dict[str, Any]:
    """How the host looks at a network of this paper. continuous: sub-VP always is. unit: of ve, its images
    are in [0, 1]; the host's are in [-1, 1], where noise is twice as large."""
    view: dict[str, Any] = {"name": "denoiser"}
    if sde.kind == "ve":
        double = 2 if unit else 1
        path = {"name": "ve", "sigma_min": double * sde.sigma_min, "sigma_max": double * sde.sigma_max, "t_min": eps}
        view |= {"path": path, "prediction": "score", "time": "sigma"}
        if not continuous:
            view |= {"time": "ladder", "time_scale": float(sde.steps - 1)}
        return view | ({"data_range": "unit"} if unit else {})
    if not continuous and sde.kind == "vp":
        ends = {"beta_start": sde.beta_min / sde.steps, "beta_end": sde.beta_max / sde.steps}
        path = {"name": "vp-discrete", "schedule": "linear", "steps": sde.steps, **ends}
        return view | {"path": path, "prediction": "eps", "time": "index"}
    path = {"name": sde.kind, "beta_min": sde.beta_min, "beta_max": sde.beta_max, "t_min": eps}
    return view | {"path": path, "prediction": "eps", "time": "unit", "time_scale": LABELS}


def check_network(network: NCSNpp, sde: SDE, continuous: bool) -> None:
    """VgmError: the network divides by, or embeds, another thing than what it is told on this SDE. (Preset and
    objective are set together: scale_by_sigma alone does not make a VP network of a VE one.)"""
    ve, fourier = sde.kind == "ve", network.embedding_type == "fourier"
    if network.scale_by_sigma != ve:
        text = "networks of VE divide by sigma" if ve else f"networks of {sde.kind} do not divide by sigma"
        wanted = "ncsnpp-cifar10" if ve else "ddpmpp-cifar10"
        raise VgmError(f"{text}: model.scale_by_sigma={str(ve).lower()}", f"model.preset={wanted} is such a one", USAGE)
    if fourier != (ve and continuous):
        is_told = "levels of noise in continuous time" if ve and continuous else "times or numbers of levels"
        wanted = "fourier" if ve and continuous else "positional"
        raise VgmError(f"this network is told {is_told}", f"model.embedding_type={wanted}", USAGE)
    if not ve and not network.centered:
        raise VgmError(f"networks of {sde.kind} see images in [-1, 1]", "model.centered=true", USAGE)
    if ve and not continuous:
        ladder = network.sigmas
        ours = sde.sigmas.flip(0)
        if len(ladder) != len(ours) or not (ladder.is_meta or torch.allclose(ladder.double().cpu(), ours, rtol=1e-4)):
            keys = f"sigma_min={sde.sigma_min:g}, sigma_max={sde.sigma_max:g}, num_scales={sde.steps}"
            raise VgmError("the network divides by another ladder than it is trained on", f"model: {keys}", USAGE)


class NoiseClassifier(ObjectiveBase):
    """Cross entropy of the label of x_t, times uniform, on the SDE of the network that will be guided.

    The classifier is told what that network is told.
    """

    def __init__(
        self,
        model: nn.Module,  # the classifier: (x_t, labels of the time) -> logits (B, classes)
        sde: Kind = "ve",  # variance exploding, preserving, or sub-VP
        continuous: bool = True,  # whether the guided network is one of continuous time
        unit: bool = True,  # that network's images are in [0, 1], of ve
        sigma_min: Positive = 0.01,  # of ve, in that range
        sigma_max: Positive = 50.0,  # of ve, in that range
        beta_min: Positive = 0.1,  # of vp and subvp
        beta_max: Positive = 20.0,  # of vp and subvp
        num_scales: Width = 1000,  # levels of SMLD and DDPM
        eps: Positive = EPS,  # the smallest time
    ):
        ordered(sigma_min, sigma_max, "sigma_min, sigma_max")
        self.sde = SDE(
            kind=sde,
            steps=num_scales,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            beta_min=beta_min,
            beta_max=beta_max,
        )
        self.model, self.networks = model, {"model": model}
        self.continuous, self.eps = continuous, eps
        self.unit = unit and sde == "ve"

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """batch x: (B, C, H, W), label: (B,). Logs the share of labels that are the first guess. VgmError: no
        labels."""
        y = batch.get("label")
        if y is None:
            raise VgmError("a classifier needs labelled images", "one folder per class", USAGE)
        x = in_range(batch["x"], self.unit)
        t = step.rand(len(x), "t") * (1 - self.eps) + self.eps
        mean, std = self.sde.marginal(x, t)
        x_t = mean + expand(std, x) * step.randn(x.shape, "noise")
        logits = self.model(x_t, self.sde.labels(t, self.continuous)).float()
        accuracy = (logits.argmax(1) == y).float().mean()
        return F.cross_entropy(logits, y), {"accuracy": accuracy.detach()}
