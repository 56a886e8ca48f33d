"""Paths by name, and the one that is another path in shifted time."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor

from vgm_cli.diffusion.path.base import Path, Time, as_time
from vgm_cli.diffusion.path.continuous import CosinePath, EDMPath, LinearPath, SubVPPath, TrigPath, VEPath, VPPath
from vgm_cli.diffusion.path.discrete import DiscreteVPPath
from vgm_cli.errors import USAGE, VgmError, unknown


class ShiftedPath(Path):
    """Another path read at t' = shift t / (1 + (shift - 1) t): SD3's time shift, noisier at equal t for shift > 1."""

    name = "shifted"

    def __init__(self, base: str | Mapping[str, Any] | Path = "linear", shift: float = 3.0):
        self.base, self.shift = make_path(base), shift
        if (self.base.t_max, shift > 0) != (1.0, True):
            raise VgmError("a time shift needs a path on [0, 1] and shift above 0", code=USAGE)
        self.t_min = float(unshift_time(self.base.t_min, shift))
        self.sigma_data = self.base.sigma_data

    def options(self) -> dict[str, Any]:
        return {"base": self.base.config(), "shift": self.shift}

    def _slope(self, t: Time) -> Tensor:
        return self.shift / (1 + (self.shift - 1) * as_time(t)) ** 2

    def alpha(self, t: Time) -> Tensor:
        return self.base.alpha(shift_time(t, self.shift))

    def sigma(self, t: Time) -> Tensor:
        return self.base.sigma(shift_time(t, self.shift))

    def alpha_prime(self, t: Time) -> Tensor:
        return self.base.alpha_prime(shift_time(t, self.shift)) * self._slope(t)

    def sigma_prime(self, t: Time) -> Tensor:
        return self.base.sigma_prime(shift_time(t, self.shift)) * self._slope(t)

    def logsnr(self, t: Time) -> Tensor:
        return self.base.logsnr(shift_time(t, self.shift))

    def t_of_logsnr(self, l: Time) -> Tensor:
        return unshift_time(self.base.t_of_logsnr(l), self.shift)


def shift_time(t: Time, shift: float) -> Tensor:
    """t' = shift t / (1 + (shift - 1) t): sigma / alpha of the linear path times shift (SD3 eq. 23)."""
    t = as_time(t)
    return shift * t / (1 + (shift - 1) * t)


def unshift_time(t: Time, shift: float) -> Tensor:
    """The inverse of shift_time."""
    return shift_time(t, 1 / shift)


PATHS: dict[str, type[Path]] = {
    c.name: c
    for c in (LinearPath, CosinePath, TrigPath, VPPath, SubVPPath, VEPath, EDMPath, DiscreteVPPath, ShiftedPath)
}


def make_path(config: str | Mapping[str, Any] | Path) -> Path:
    """A path from its name, its config ({"name": "vp-discrete", "schedule": "cosine"}) or itself.

    VgmError: unknown name or option.
    """
    if isinstance(config, Path):
        return config
    options = {"name": config} if isinstance(config, str) else dict(config)
    name = options.pop("name", "")
    if name not in PATHS:
        raise unknown("path", name, PATHS)
    known = _options_of(name)
    for key in options:
        if key not in known:
            raise unknown("option", key, known, f"path '{name}'")
    return PATHS[name](**options)


@lru_cache
def _options_of(name: str) -> tuple[str, ...]:
    if PATHS[name].__init__ is object.__init__:
        return ()
    return tuple(p for p in inspect.signature(PATHS[name].__init__).parameters if p != "self")
