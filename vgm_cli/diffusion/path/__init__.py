"""Gaussian paths x_t = alpha(t) x0 + sigma(t) eps: the schedule half of every diffusion and flow model.

t runs from data to noise: [0, 1] unless a path says otherwise (EDM: t is sigma). Sources: Song et al. 2021 (VP, sub-VP,
VE; 2011.13456), Karras et al. 2022 (EDM; 2206.00364), Lipman et al. 2023 (linear; 2210.02747), Nichol & Dhariwal 2021
and Salimans & Ho 2022 (cosine), Ho et al. 2020 (discrete steps), Esser et al. 2024 (time shift; 2403.03206).
Every function takes t as a tensor of any shape or a number, and gives a tensor of that shape: t's dtype, float64 for
a number.
"""

from vgm_cli.diffusion.path.base import Path, Time, as_time
from vgm_cli.diffusion.path.continuous import CosinePath, EDMPath, LinearPath, SubVPPath, TrigPath, VEPath, VPPath
from vgm_cli.diffusion.path.discrete import DiscreteVPPath
from vgm_cli.diffusion.path.named import PATHS, ShiftedPath, make_path, shift_time, unshift_time

__all__ = [
    "PATHS",
    "CosinePath",
    "DiscreteVPPath",
    "EDMPath",
    "LinearPath",
    "Path",
    "ShiftedPath",
    "SubVPPath",
    "Time",
    "TrigPath",
    "VEPath",
    "VPPath",
    "as_time",
    "make_path",
    "shift_time",
    "unshift_time",
]
