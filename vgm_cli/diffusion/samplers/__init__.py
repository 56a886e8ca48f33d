"""The samplers that recipes name, for any Denoiser on any path: thin classes around diffusion/solvers/.

Called with (view, request). The path decides where sampling starts (pure noise, or just below where the prediction is
singular) and ends: where sigma(t_min) > 0 the last of the `steps` is the network's estimate of x0. Noise comes from the
request alone, so an image does not depend on its batch. request.guidance_scale guides in one doubled forward within
request.guidance_interval (host times). cfg_channels: leading channels that guidance applies to, None for all.
guidance_rescale: see ClassifierFreeGuidance. `steps` counts grid points; request.info["nfe"] counts evaluations.
"""

from vgm_cli.diffusion.samplers.base import Clip, GaussianSampler, Grid, report, solver_of
from vgm_cli.diffusion.samplers.in_sigma import (
    DPMpp2MSampler,
    DPMpp2MSDESampler,
    DPMpp3MSDESampler,
    EDMAblationSampler,
    EDMSampler,
    EulerAncestralSampler,
    KDiffusionSampler,
)
from vgm_cli.diffusion.samplers.in_time import Dopri5Sampler, EulerSampler, FlowEulerSampler, ODESampler, SDESampler
from vgm_cli.diffusion.samplers.on_grids import AncestralSampler, DDIMSampler, DPMSolverSampler, PCSampler, UniPCSampler

__all__ = [
    "AncestralSampler",
    "Clip",
    "DDIMSampler",
    "DPMSolverSampler",
    "DPMpp2MSDESampler",
    "DPMpp2MSampler",
    "DPMpp3MSDESampler",
    "Dopri5Sampler",
    "EDMAblationSampler",
    "EDMSampler",
    "EulerAncestralSampler",
    "EulerSampler",
    "FlowEulerSampler",
    "GaussianSampler",
    "Grid",
    "KDiffusionSampler",
    "ODESampler",
    "PCSampler",
    "SDESampler",
    "UniPCSampler",
    "report",
    "solver_of",
]
