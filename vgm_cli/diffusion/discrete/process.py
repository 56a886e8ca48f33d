"""The discrete Gaussian diffusion process: respacing, posterior, losses, ancestral and DDIM steps.

Ho et al., DDPM (2006.11239); Song et al., DDIM (2010.02502); Nichol & Dhariwal, IDDPM (2102.09672); Dhariwal & Nichol,
ADM (2105.05233). Behaviour follows openai/guided-diffusion@22e0df8, which facebookresearch/DiT@ed81ce2 copies.

Index t counts from 0 (the least noisy step) to steps - 1. Every draw (t, noise) is an argument. Networks are plain
callables `model(x, t)` that receive the ORIGINAL process's timestep: see `DiscreteDiffusion.model_timesteps`.
Deviations: a one-step respacing is allowed (its variance is never used); noise multiplied by 0 is not drawn. DiT's copy
reads LEARNED as learned_range; here "learned" is the raw log-variance as in guided-diffusion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from vgm_cli.diffusion.discrete.betas import named_betas, space_timesteps
from vgm_cli.diffusion.discrete.likelihood import bound_term, mean_flat, normal_kl
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.nn.shapes import expand

Mean = Literal["eps", "x0", "x_prev"]
Variance = Literal["fixed_small", "fixed_large", "learned", "learned_range"]
Loss = Literal["mse", "rescaled_mse", "kl", "rescaled_kl"]
Network = Callable[[Tensor, Tensor], Tensor]


class Posterior(NamedTuple):
    """A Gaussian over x_{t-1} (all shaped like x) and the x0 it was made from."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x0: Tensor


class DiscreteDiffusion:
    """A chain of `steps` Gaussian steps, possibly respaced from a longer one.

    betas: (T,) of the original process, in (0, 1]. mean: what the network predicts. variance: of the reverse step;
    learned ones come from the network's second half of channels. loss: what `losses` returns under "loss". keep: the
    original timesteps to keep (space_timesteps), None for all. rescale_timesteps: the network gets t * 1000 / T.
    """

    def __init__(
        self,
        betas: np.ndarray | Sequence[float],
        mean: Mean = "eps",
        variance: Variance = "learned_range",
        loss: Loss = "mse",
        keep: Sequence[int] | None = None,
        rescale_timesteps: bool = False,
    ):
        for what, value, kind in (
            ("mean type", mean, Mean),
            ("variance type", variance, Variance),
            ("loss", loss, Loss),
        ):
            if value not in get_args(kind):
                raise unknown(what, value, get_args(kind))
        original = np.asarray(betas, dtype=np.float64)
        if original.ndim != 1 or not ((original > 0) & (original <= 1)).all():
            raise VgmError(
                f"betas must be a list of numbers in (0, 1], these {original.size} reach {original.max(initial=0):.3g}",
                "the linear schedule needs more than 20 steps; schedule=cosine works for any number",
                USAGE,
            )
        self.mean, self.variance, self.loss = mean, variance, loss
        self.original_steps = len(original)
        self.rescale_timesteps = rescale_timesteps
        self.timestep_map = list(range(len(original))) if keep is None else sorted(set(keep))
        if keep is not None:
            alpha_bar = np.cumprod(1.0 - original)[self.timestep_map]
            original = 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])
        self.betas = original
        self.steps = len(original)
        self.tables = self._float64_tables(original)
        self._on: dict[torch.device, dict[str, Tensor]] = {}

    @classmethod
    def create(
        cls,
        schedule: str = "linear",
        steps: int = 1000,
        respacing: str | int | Sequence[int] | None = None,
        learn_sigma: bool = True,
        sigma_small: bool = False,
        use_kl: bool = False,
        predict_xstart: bool = False,
        rescale_learned_sigmas: bool = False,
        rescale_timesteps: bool = False,
    ) -> DiscreteDiffusion:
        """The process by the official code's options (create_diffusion / create_gaussian_diffusion)."""
        return cls(
            named_betas(schedule, steps),
            mean="x0" if predict_xstart else "eps",
            variance="learned_range" if learn_sigma else "fixed_small" if sigma_small else "fixed_large",
            loss="rescaled_kl" if use_kl else "rescaled_mse" if rescale_learned_sigmas else "mse",
            keep=space_timesteps(steps, respacing) if respacing else None,
            rescale_timesteps=rescale_timesteps,
        )

    @staticmethod
    def _float64_tables(betas: np.ndarray) -> dict[str, np.ndarray]:
        alpha_bar = np.cumprod(1.0 - betas)
        previous = np.append(1.0, alpha_bar[:-1])
        variance = betas * (1.0 - previous) / (1.0 - alpha_bar)
        # the first posterior variance is 0: its log, and fixed_large's first entry, take the second one's place
        second = variance[1] if len(betas) > 1 else betas[0]
        clipped, large = np.append(second, variance[1:]), np.append(second, betas[1:])
        coef1 = betas * np.sqrt(previous) / (1.0 - alpha_bar)
        coef2 = (1.0 - previous) * np.sqrt(1.0 - betas) / (1.0 - alpha_bar)
        with np.errstate(divide="ignore"):  # a beta of 1 ends the chain in pure noise
            return {
                "alphas_cumprod": alpha_bar,
                "alphas_cumprod_prev": previous,
                "alphas_cumprod_next": np.append(alpha_bar[1:], 0.0),
                "sqrt_alphas_cumprod": np.sqrt(alpha_bar),
                "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - alpha_bar),
                "one_minus_alphas_cumprod": 1.0 - alpha_bar,
                "log_one_minus_alphas_cumprod": np.log(1.0 - alpha_bar),
                "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / alpha_bar),
                "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / alpha_bar - 1),
                "posterior_variance": variance,
                "posterior_log_variance_clipped": np.log(clipped),
                "posterior_mean_coef1": coef1,
                "posterior_mean_coef2": coef2,
                "recip_posterior_mean_coef1": 1.0 / coef1,
                "posterior_mean_coef_ratio": coef2 / coef1,
                "log_betas": np.log(betas),
                "fixed_large_variance": large,
                "fixed_large_log_variance": np.log(large),
            }

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Entry t of a float64 table as fp32, shaped (B, 1, ...) to broadcast against `like`. t: (B,) int64."""
        tables = self._on.get(t.device)
        if tables is None:  # moved once per device; casting before or after indexing gives the same numbers
            tables = {k: torch.from_numpy(v).float().to(t.device) for k, v in self.tables.items()}
            kept = torch.tensor(self.timestep_map, device=t.device)
            scale = 1000.0 / self.original_steps
            tables["model_timesteps"] = kept.float() * scale if self.rescale_timesteps else kept
            self._on[t.device] = tables
        return expand(tables[name][t], like)

    def model_timesteps(self, t: Tensor) -> Tensor:
        """What the network is told at index t: (B,) the original process's timestep, scaled to 1000 if so asked."""
        return self.at("model_timesteps", t, t)

    # forward process

    def q_mean_variance(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q(x_t | x0): mean (B, ...), variance and log-variance (B, 1, ...)."""
        return (
            self.at("sqrt_alphas_cumprod", t, x0) * x0,
            self.at("one_minus_alphas_cumprod", t, x0),
            self.at("log_one_minus_alphas_cumprod", t, x0),
        )

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise; all (B, ...)."""
        return self.at("sqrt_alphas_cumprod", t, x0) * x0 + self.at("sqrt_one_minus_alphas_cumprod", t, x0) * noise

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Posterior:
        """q(x_{t-1} | x_t, x0), DDPM eq. 7; the log-variance is clipped at t = 0."""
        mean = self.at("posterior_mean_coef1", t, x_t) * x0 + self.at("posterior_mean_coef2", t, x_t) * x_t
        log_variance = self.at("posterior_log_variance_clipped", t, x_t)
        return Posterior(mean, self.at("posterior_variance", t, x_t), log_variance, x0)

    def x0_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return self.at("sqrt_recip_alphas_cumprod", t, x_t) * x_t - self.at("sqrt_recipm1_alphas_cumprod", t, x_t) * eps

    def eps_from_x0(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        scaled = self.at("sqrt_recip_alphas_cumprod", t, x_t) * x_t
        return (scaled - x0) / self.at("sqrt_recipm1_alphas_cumprod", t, x_t)

    def x0_from_x_prev(self, x_t: Tensor, t: Tensor, x_prev: Tensor) -> Tensor:
        scaled = self.at("recip_posterior_mean_coef1", t, x_t) * x_prev
        return scaled - self.at("posterior_mean_coef_ratio", t, x_t) * x_t

    # reverse process

    @property
    def learned(self) -> bool:
        """Does the network's output carry a second half of channels for the variance?"""
        return self.variance in ("learned", "learned_range")

    def split(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Network output (B, C or 2C, ...) -> prediction (B, C, ...) and variance channels, in fp32."""
        wanted = x.shape[1] * (2 if self.learned else 1)
        if output.shape[1] != wanted:
            raise VgmError(
                f"the network gives {output.shape[1]} channels where '{self.variance}' variance needs {wanted}",
                "learn_sigma of the model and of the objective must agree",
                USAGE,
            )
        if not self.learned:
            return output.float(), None
        prediction, values = output.float().chunk(2, dim=1)
        return prediction, values

    def p_mean_variance(
        self,
        output: Tensor,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool | float = False,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> Posterior:
        """p(x_{t-1} | x_t) from the network's output at (x, t). denoised_fn: applied to x0 before the clip,
        which is to [-1, 1], or to +-clip_denoised."""
        prediction, values = self.split(output, x)
        if values is not None:
            log_variance = values
            if self.variance == "learned_range":  # IDDPM eq. 15; the fraction is not clamped
                fraction = (values + 1) / 2
                low, high = self.at("posterior_log_variance_clipped", t, x), self.at("log_betas", t, x)
                log_variance = fraction * high + (1 - fraction) * low
            variance = torch.exp(log_variance)
        elif self.variance == "fixed_large":
            variance = self.at("fixed_large_variance", t, x)
            log_variance = self.at("fixed_large_log_variance", t, x)
        else:
            variance = self.at("posterior_variance", t, x)
            log_variance = self.at("posterior_log_variance_clipped", t, x)
        if self.mean == "x0":
            x0 = prediction
        elif self.mean == "eps":
            x0 = self.x0_from_eps(x, t, prediction)
        else:
            x0 = self.x0_from_x_prev(x, t, prediction)
        if denoised_fn is not None:
            x0 = denoised_fn(x0)
        if clip_denoised:
            x0 = x0.clamp(-float(clip_denoised), float(clip_denoised))
        mean = prediction if self.mean == "x_prev" else self.q_posterior(x0, x, t).mean
        return Posterior(mean, variance, log_variance, x0)

    def condition_mean(self, p: Posterior, gradient: Tensor) -> Posterior:
        """Classifier guidance of an ancestral step: the mean moves by variance * gradient (ADM algorithm 1)."""
        return p._replace(mean=p.mean.float() + p.variance * gradient.float())

    def condition_score(self, p: Posterior, gradient: Tensor, x: Tensor, t: Tensor) -> Posterior:
        """Classifier guidance of DDIM: eps moves by -sqrt(1 - abar) * gradient (ADM algorithm 2)."""
        noise = (1 - self.at("alphas_cumprod", t, x)).sqrt()
        x0 = self.x0_from_eps(x, t, self.eps_from_x0(x, t, p.x0) - noise * gradient)
        return p._replace(x0=x0, mean=self.q_posterior(x0, x, t).mean)

    def p_sample(self, p: Posterior, t: Tensor, noise: Tensor | None) -> Tensor:
        """One ancestral step; nothing is added at t = 0. noise None: the mean."""
        if noise is None:
            return p.mean
        return p.mean + expand(t != 0, noise) * torch.exp(0.5 * p.log_variance) * noise

    def ddim_sample(self, p: Posterior, x: Tensor, t: Tensor, eta: float = 0.0, noise: Tensor | None = None) -> Tensor:
        """One DDIM step, DDIM eq. 12; eta = 1 has the DDPM variance. noise None: only right for eta = 0 or t = 0."""
        eps = self.eps_from_x0(x, t, p.x0)  # derived again: x0 may have been clipped or guided
        now, before = self.at("alphas_cumprod", t, x), self.at("alphas_cumprod_prev", t, x)
        sigma = eta * torch.sqrt((1 - before) / (1 - now)) * torch.sqrt(1 - now / before)
        mean = p.x0 * torch.sqrt(before) + torch.sqrt(1 - before - sigma**2) * eps
        if noise is None:
            return mean
        return mean + expand(t != 0, x) * sigma * noise

    def ddim_reverse_sample(self, p: Posterior, x: Tensor, t: Tensor) -> Tensor:
        """x_{t+1} by the reversed deterministic DDIM step (data to noise)."""
        later = self.at("alphas_cumprod_next", t, x)
        return p.x0 * torch.sqrt(later) + torch.sqrt(1 - later) * self.eps_from_x0(x, t, p.x0)

    def sample_loop(
        self,
        model: Network,
        x: Tensor,
        noise: Callable[[], Tensor],
        sampler: Literal["ddpm", "ddim"] = "ddpm",
        eta: float = 0.0,
        clip_denoised: bool | float = False,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Network | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Walk from pure noise x (B, ...) to data; yields (x_{t-1}, x0) after every step, the last pair at the end.

        noise(): the next draw, like x; called once per step that uses it. cond_fn(x, t): gradient of log p(y | x_t).
        """
        if sampler not in ("ddpm", "ddim"):
            raise unknown("sampler", sampler, ("ddpm", "ddim"))
        indices = torch.arange(self.steps, device=x.device)
        for i in reversed(range(self.steps)):
            t = indices[i].expand(len(x))
            timesteps = self.model_timesteps(t)
            p = self.p_mean_variance(model(x, timesteps), x, t, clip_denoised, denoised_fn)
            x0 = p.x0
            if sampler == "ddpm":
                if cond_fn is not None:
                    p = self.condition_mean(p, cond_fn(x, timesteps))
                x = self.p_sample(p, t, noise() if i else None)
            else:
                if cond_fn is not None:
                    p = self.condition_score(p, cond_fn(x, timesteps), x, t)
                    x0 = p.x0
                x = self.ddim_sample(p, x, t, eta, noise() if i and eta else None)
            yield x, x0

    def ddim_reverse_loop(
        self,
        model: Network,
        x0: Tensor,
        clip_denoised: bool | float = False,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Network | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Encode data x0 (B, ...) to noise; yields (x_{t+1}, predicted x0) after every step."""
        x, indices = x0, torch.arange(self.steps, device=x0.device)
        for i in range(self.steps):
            t = indices[i].expand(len(x))
            timesteps = self.model_timesteps(t)
            p = self.p_mean_variance(model(x, timesteps), x, t, clip_denoised, denoised_fn)
            if cond_fn is not None:
                p = self.condition_score(p, cond_fn(x, timesteps), x, t)
            x = self.ddim_reverse_sample(p, x, t)
            yield x, p.x0

    # training and likelihood

    def vb_terms(
        self, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, clip_denoised: bool | float = False
    ) -> tuple[Tensor, Tensor]:
        """One term of the variational bound in bits per dimension (see bound_term): (B,), and the predicted x0."""
        true = self.q_posterior(x0, x_t, t)
        p = self.p_mean_variance(output, x_t, t, clip_denoised)
        return bound_term(x0, t, true.mean, true.log_variance, p.mean, p.log_variance), p.x0

    def losses(self, model: Network, x0: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Per-sample terms (B,): "loss", and where they exist "mse" and "vb" (bits per dimension).

        x0, noise: (B, C, ...). t: (B,) int64 in [0, steps). With a learned variance the mse losses add the bound, in
        which the mean is detached: it trains the variance channels only (L_hybrid, IDDPM eq. 16).
        """
        x_t = self.q_sample(x0, t, noise)
        output = model(x_t, self.model_timesteps(t))
        if self.loss in ("kl", "rescaled_kl"):
            bound, _ = self.vb_terms(output, x0, x_t, t)
            return {"loss": bound * self.steps if self.loss == "rescaled_kl" else bound}
        prediction, values = self.split(output, x_t)
        terms: dict[str, Tensor] = {}
        if values is not None:
            terms["vb"], _ = self.vb_terms(torch.cat([prediction.detach(), values], dim=1), x0, x_t, t)
            if self.loss == "rescaled_mse":
                terms["vb"] = terms["vb"] * (self.steps / 1000.0)
        if self.mean == "eps":
            target = noise
        else:
            target = x0 if self.mean == "x0" else self.q_posterior(x0, x_t, t).mean
        terms["mse"] = mean_flat((target - prediction) ** 2)
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    def prior_bpd(self, x0: Tensor) -> Tensor:
        """KL(q(x_T | x0) || N(0, 1)) in bits per dimension: (B,)."""
        t = torch.full((len(x0),), self.steps - 1, device=x0.device)
        mean, _, log_variance = self.q_mean_variance(x0, t)
        return mean_flat(normal_kl(mean, log_variance.expand_as(x0), 0.0, 0.0)) / math.log(2.0)

    @torch.no_grad()
    def bpd_loop(
        self, model: Network, x0: Tensor, noise: Callable[[], Tensor], clip_denoised: bool | float = True
    ) -> dict[str, Tensor]:
        """The whole variational bound in bits per dimension, from the last step to the first.

        Gives total_bpd and prior_bpd (B,), and per step, most noisy first: vb, xstart_mse, mse (B, steps).
        """
        rows: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        indices = torch.arange(self.steps, device=x0.device)
        for i in reversed(range(self.steps)):
            t, eps = indices[i].expand(len(x0)), noise()
            x_t = self.q_sample(x0, t, eps)
            bound, predicted = self.vb_terms(model(x_t, self.model_timesteps(t)), x0, x_t, t, clip_denoised)
            rows["vb"].append(bound)
            rows["xstart_mse"].append(mean_flat((predicted - x0) ** 2))
            rows["mse"].append(mean_flat((self.eps_from_x0(x_t, t, predicted) - eps) ** 2))
        out = {k: torch.stack(v, dim=1) for k, v in rows.items()}
        prior = self.prior_bpd(x0)
        return out | {"prior_bpd": prior, "total_bpd": out["vb"].sum(dim=1) + prior}
