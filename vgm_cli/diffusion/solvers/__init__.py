"""Samplers as pure functions: from a network's estimate and a grid to data, each short and named after its algorithm.

- k_diffusion, edm: VE coordinates (x / alpha), `denoise(x, sigma) -> x0`
- ddim, dpm_solver: the path's own coordinates, `predict(x, i) -> (x0, eps)` at point i of a grid of alphas and sigmas
- ode, sde: the path's own time, `velocity(x, t) -> dx/dt`, a drift and a score, or a score alone
They are called with tensors and functions alone; common.py says how noise and callbacks are passed.
"""

from vgm_cli.diffusion.solvers.ddim import ddim, ddpm, dynamic_threshold, flow_euler
from vgm_cli.diffusion.solvers.dpm_solver import ALGORITHMS, dpm_adaptive, dpm_fast, dpm_solver, unipc
from vgm_cli.diffusion.solvers.edm import edm_ablation, edm_heun
from vgm_cli.diffusion.solvers.k_diffusion import K_DIFFUSION
from vgm_cli.diffusion.solvers.ode import ODE, dopri5
from vgm_cli.diffusion.solvers.sde import predictor_corrector, reverse_sde

__all__ = [
    "ALGORITHMS",
    "K_DIFFUSION",
    "ODE",
    "ddim",
    "ddpm",
    "dopri5",
    "dpm_adaptive",
    "dpm_fast",
    "dpm_solver",
    "dynamic_threshold",
    "edm_ablation",
    "edm_heun",
    "flow_euler",
    "predictor_corrector",
    "reverse_sde",
    "unipc",
]
