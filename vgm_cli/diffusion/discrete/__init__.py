"""Discrete diffusion as DDPM, IDDPM, ADM and DiT have it: betas, the process, and its likelihood."""

from vgm_cli.diffusion.discrete.betas import SCHEDULES, betas_for_alpha_bar, named_betas, space_timesteps
from vgm_cli.diffusion.discrete.likelihood import (
    approx_standard_normal_cdf,
    discretized_gaussian_log_likelihood,
    mean_flat,
    normal_kl,
)
from vgm_cli.diffusion.discrete.process import DiscreteDiffusion, Loss, Mean, Network, Posterior, Variance

__all__ = [
    "SCHEDULES",
    "DiscreteDiffusion",
    "Loss",
    "Mean",
    "Network",
    "Posterior",
    "Variance",
    "approx_standard_normal_cdf",
    "betas_for_alpha_bar",
    "discretized_gaussian_log_likelihood",
    "mean_flat",
    "named_betas",
    "normal_kl",
    "space_timesteps",
]
