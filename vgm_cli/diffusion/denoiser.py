"""One view of any diffusion or flow network, and the conversions between what networks predict.

Gao et al. 2024, "Diffusion meets flow matching": with the same alpha and sigma every prediction is an affine function
of every other. Host convention: t = 0 data, t = 1 noise, z = alpha x0 + sigma eps. Kinds of prediction:
x0 | eps | score = -eps / sigma | v = alpha eps - sigma x0 | velocity u = alpha' x0 + sigma' eps = dz/dt |
F (EDM: x0 = c_skip(s) y + c_out(s) F with y = z / alpha, s = sigma / alpha) | trig = -F (TrigFlow's F: on its own path
the velocity over sigma_data; Lu & Song 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vgm_cli.diffusion.path import DiscreteVPPath, LinearPath, Path, Time, as_time, make_path
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.nn.precision import full_precision
from vgm_cli.nn.shapes import each, expand

Prediction = Literal["x0", "eps", "score", "v", "velocity", "F", "trig"]
KINDS: tuple[str, ...] = get_args(Prediction)
TIMES = ("unit", "reversed", "ladder", "index", "sigma", "log-sigma", "edm", "logsnr")
SCALES = ("none", "edm", "ve", "vp")
OF_UNIT = {"eps": 1.0, "score": 0.5, "x0": 2.0, "velocity": 2.0}  # by which [-1, 1] stretches a prediction on [0, 1]
Network = Callable[..., Tensor]

# -- conversions -----------------------------------------------------------------------------------------------------

Affine = tuple[Tensor, Tensor]  # (a, b): the wanted quantity is a z + b prediction


def x0_from(kind: str, path: Path, t: Tensor, sigma_data: float) -> Affine:
    """(a, b) of x0 = a z + b prediction."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    if kind == "x0":
        return torch.zeros_like(t), torch.ones_like(t)
    if kind == "eps":
        return 1 / alpha, -sigma / alpha
    if kind == "score":
        return 1 / alpha, sigma**2 / alpha
    if kind == "v":
        norm = alpha**2 + sigma**2
        return alpha / norm, -sigma / norm
    if kind == "velocity":
        d_alpha, d_sigma = path.alpha_prime(t), path.sigma_prime(t)
        w = d_alpha * sigma - alpha * d_sigma
        return -d_sigma / w, sigma / w
    if kind in ("F", "trig"):
        # c_skip / alpha and c_out without dividing by alpha, which is 0 where all is noise
        norm = (sigma**2 + (alpha * sigma_data) ** 2).sqrt()
        c_out = sigma * sigma_data / norm
        return alpha * sigma_data**2 / norm**2, c_out if kind == "F" else -c_out
    raise unknown("prediction", kind, KINDS)


def eps_from(kind: str, path: Path, t: Tensor, sigma_data: float) -> Affine:
    """(a, b) of eps = a z + b prediction."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    if kind == "eps":
        return torch.zeros_like(t), torch.ones_like(t)
    if kind == "score":
        return torch.zeros_like(t), -sigma
    if kind == "v":
        norm = alpha**2 + sigma**2
        return sigma / norm, alpha / norm
    if kind == "velocity":
        d_alpha, d_sigma = path.alpha_prime(t), path.sigma_prime(t)
        w = d_alpha * sigma - alpha * d_sigma
        return d_alpha / w, -alpha / w
    a, b = x0_from(kind, path, t, sigma_data)
    return (1 - alpha * a) / sigma, -alpha * b / sigma


def affine(src: str, dst: str, path: Path, t: Tensor, sigma_data: float) -> Affine:
    """(a, b), float64 and shaped like t, with dst = a z + b src."""
    if dst not in KINDS:
        raise unknown("prediction", dst, KINDS)
    if dst == "x0":
        return x0_from(src, path, t, sigma_data)
    if dst in ("eps", "score"):
        a, b = eps_from(src, path, t, sigma_data)
        return (a, b) if dst == "eps" else (-a / path.sigma(t), -b / path.sigma(t))
    xa, xb = x0_from(src, path, t, sigma_data)
    if dst in ("F", "trig"):
        skip, out = x0_from(dst, path, t, sigma_data)
        return (xa - skip) / out, xb / out
    ea, eb = eps_from(src, path, t, sigma_data)
    if dst == "v":
        cx, ce = -path.sigma(t), path.alpha(t)
    else:
        cx, ce = path.alpha_prime(t), path.sigma_prime(t)
    return cx * xa + ce * ea, cx * xb + ce * eb


def convert(
    pred: Tensor, z: Tensor, t: Time, path: Path, src: str, dst: str, sigma_data: float | None = None
) -> Tensor:
    """Re-express a prediction of kind `src` at z (B, ...) and t ((B,) or a number) as kind `dst`; pred's dtype.

    Computed in float64. Infinite where it must be: x0 from eps at alpha = 0, eps from x0 at sigma = 0. sigma_data: for
    "F"; None is the path's. VgmError: unknown kind.
    """
    if src == dst and src in KINDS:
        return pred
    t = as_time(t).to(z.device).double()
    a, b = affine(src, dst, path, t, path.sigma_data if sigma_data is None else sigma_data)
    return (expand(a, z) * z.double() + expand(b, z) * pred.double()).to(pred.dtype)


# -- the view --------------------------------------------------------------------------------------------------------


def no_denoiser(view: Any) -> str | None:
    """Why this cannot remove noise at every level, as a restoration method says it; None where it can."""
    return None if isinstance(view, Denoiser) else "it is no diffusion or flow network"


class Denoiser:
    """What samplers, guidance, distillation and restoration see of a network(x, t, **cond).

    The attribute nfe counts evaluations of one image. VgmError: unknown names, time "index" without a discrete path.
    """

    def __init__(
        self,
        network: Network,  # (x (B, C, ...), t (B,), **cond) -> (B, C, ...), or (B, 2C, ...) with learned_sigma
        path: str | Mapping[str, Any] | Path,  # alpha and sigma
        prediction: str = "velocity",  # one of KINDS; "x_prev": the mean of x_{t-1}, on discrete paths only
        *,
        time: str = "unit",  # how the network is told the time, see below
        time_scale: float = 1.0,  # factor on what it is told
        input_scale: str | None = None,  # what it is fed, see below; None: "edm" for F and trig, else "none"
        learned_sigma: bool = False,  # it gives a second half of channels about the variance, see `split`
        variance: str | None = None,  # how that half is to be read, by samplers that use it
        sigma_data: float | None = None,  # deviation of the data in "F" and "trig"; None: the path's
        data_range: str = "centered",  # "unit": the network works on images in [0, 1], see below
    ):
        # time: "unit" host t | "reversed" 1 - t, and a velocity is the derivative in that time, -u | "ladder" the
        # nearest entry, 0 being the noisiest, of time_scale + 1 levels, (1 - t) time_scale rounded | "index" of a
        # discrete path, 0..steps - 1 | "logsnr" | of s = sigma / alpha: "sigma" s, "log-sigma" ln s, "edm" ln(s) / 4
        # input_scale: "none" z | "ve" z / alpha | "vp" z / sqrt(alpha^2 + sigma^2) | "edm" c_in z / alpha
        # data_range: the path is that of images in [-1, 1]; the network is fed (z + alpha) / 2, whose noise is half as
        # large, is told half of s, and its prediction is of that
        self.network, self.path = network, make_path(path)
        if prediction not in (*KINDS, "x_prev"):
            raise unknown("prediction", prediction, (*KINDS, "x_prev"))
        if time not in TIMES:
            raise unknown("time argument", time, TIMES)
        if (time == "index" or prediction == "x_prev") and not isinstance(self.path, DiscreteVPPath):
            raise VgmError(f"time={time}, prediction={prediction} needs the path vp-discrete", code=USAGE)
        if input_scale is not None and input_scale not in SCALES:
            raise unknown("input scale", input_scale, SCALES)
        self.prediction, self.time, self.time_scale = prediction, time, time_scale
        self.input_scale = input_scale or ("edm" if prediction in ("F", "trig") else "none")
        self.learned_sigma, self.variance = learned_sigma, variance
        self.sigma_data = self.path.sigma_data if sigma_data is None else sigma_data
        if data_range not in ("centered", "unit"):
            raise unknown("data range", data_range, ("centered", "unit"))
        self.data_range = data_range
        plain = prediction in OF_UNIT and self.input_scale == "none" and not isinstance(self.path, DiscreteVPPath)
        if data_range == "unit" and not plain:
            text = "data_range=unit is for networks of continuous paths that predict eps, score, x0 or velocity"
            raise VgmError(text, "data_range=centered", USAGE)
        self.nfe = 0
        self.asked_at: Tensor | None = None  # times (B,) of the latest evaluation

    @classmethod
    def from_config(cls, network: Network, config: Mapping[str, Any]) -> Denoiser:
        """The inverse of config(). VgmError: unknown key."""
        options = {k: v for k, v in config.items() if k not in ("name", "path", "prediction")}
        known = ("time", "time_scale", "input_scale", "learned_sigma", "variance", "sigma_data", "data_range")
        for key in options:
            if key not in known:
                raise unknown("key", key, known, "denoiser")
        return cls(network, config["path"], config.get("prediction", "velocity"), **options)

    def config(self) -> dict[str, Any]:
        """JSON-able description, stored in checkpoints: everything but the network."""
        config: dict[str, Any] = {"name": "denoiser", "path": self.path.config(), "prediction": self.prediction}
        config["time"] = self.time
        optional = {
            "time_scale": (self.time_scale, 1.0),
            "input_scale": (self.input_scale, "edm" if self.prediction in ("F", "trig") else "none"),
            "learned_sigma": (self.learned_sigma, False),
            "variance": (self.variance, None),
            "sigma_data": (self.sigma_data, self.path.sigma_data),
            "data_range": (self.data_range, "centered"),
        }
        return config | {k: value for k, (value, default) in optional.items() if value != default}

    def options(self) -> dict[str, Any]:
        """Constructor keywords beside network, path and prediction."""
        return {
            "time": self.time,
            "time_scale": self.time_scale,
            "input_scale": self.input_scale,
            "learned_sigma": self.learned_sigma,
            "variance": self.variance,
            "sigma_data": self.sigma_data,
            "data_range": self.data_range,
        }

    # the network's side

    def time_argument(self, t: Tensor) -> Tensor:
        """What the network is told at host time t: float32, shaped like t."""
        t = t.double()
        if self.time == "unit":
            own = t
        elif self.time == "reversed":
            own = 1 - t
        elif self.time == "ladder":
            return ((1 - t) * self.time_scale).round().float()
        elif self.time == "index":
            assert isinstance(self.path, DiscreteVPPath)
            own = self.path.timestep(t)
        elif self.time == "logsnr":
            own = self.path.logsnr(t)
        else:
            own = self.path.ve_sigma(t) / (2 if self.data_range == "unit" else 1)
            if self.time != "sigma":
                own = own.log() / (4 if self.time == "edm" else 1)
        return (own * self.time_scale).float()

    def input_of(self, x_t: Tensor, t: Tensor) -> Tensor:
        """What the network is fed at x_t (B, ...), t (B,) float64."""
        if self.input_scale == "none":
            return self.in_range(x_t, t)
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        if self.input_scale == "ve":
            scale = 1 / alpha
        elif self.input_scale == "vp":
            scale = 1 / (alpha**2 + sigma**2).sqrt()
        else:
            scale = 1 / (sigma**2 + (alpha * self.sigma_data) ** 2).sqrt()
        return (expand(scale, x_t) * x_t).to(x_t.dtype)

    def in_range(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x_t (B, ...) in the range of the network's images, t (B,) float64."""
        return x_t if self.data_range == "centered" else (x_t + expand(self.path.alpha(t), x_t).to(x_t.dtype)) / 2

    def from_range(self, pred: Tensor, t: Tensor) -> Tensor:
        """A prediction (B, ...) of the network's, as one on images in [-1, 1]; t (B,) float64."""
        return pred if self.data_range == "centered" else pred * OF_UNIT[self.prediction] + self._offset(pred, t)

    def to_range(self, pred: Tensor, t: Tensor) -> Tensor:
        """The inverse of from_range."""
        return pred if self.data_range == "centered" else (pred - self._offset(pred, t)) / OF_UNIT[self.prediction]

    def _offset(self, pred: Tensor, t: Tensor) -> Tensor | float:
        if self.prediction == "velocity":
            return -expand(self.path.alpha_prime(t), pred).to(pred.dtype)
        return -1.0 if self.prediction == "x0" else 0.0

    def batch_time(self, x: Tensor, t: Time) -> Tensor:
        """t as a float64 tensor (B,) beside x (B, ...)."""
        if not isinstance(t, Tensor):
            return each(x, t)
        return t.to(x.device).double().expand(len(x)) if t.ndim == 0 else t.to(x.device).double()

    def raw(self, x_t: Tensor, t: Time, **cond: Any) -> Tensor:
        """The network's own output at x_t (B, C, ...), t (B,) or a number: (B, C, ...), or (B, 2C, ...)."""
        t = self.batch_time(x_t, t)
        self.nfe += 1
        self.asked_at = t
        return self.network(self.input_of(x_t, t), self.time_argument(t), **cond)

    def split(self, output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prediction, and the variance channels that a learned sigma adds."""
        if not self.learned_sigma:
            return output, None
        channels = x_t.shape[1]
        return output[:, :channels], output[:, channels:]

    def precision(self, device: torch.device) -> AbstractContextManager[Any]:
        """Where to ask for x0: without half precision if eps or the score is predicted, since x0 is off by sigma /
        alpha times the rounding."""
        return full_precision(device) if self.prediction in ("eps", "score") else nullcontext()

    # the host's side

    def interpret(self, output: Tensor, x_t: Tensor, t: Time, to: str = "x0") -> Tensor:
        """A raw output, as quantity `to`: (B, C, ...)."""
        t = self.batch_time(x_t, t)
        pred, _ = self.split(output, x_t)
        pred = pred.to(torch.promote_types(pred.dtype, x_t.dtype))  # half-precision networks keep a float32 state
        kind = self.prediction
        if kind == "velocity" and self.time == "reversed":
            pred = -pred
        elif kind == "x_prev":
            pred, kind = self._x0_from_x_prev(pred, x_t, t), "x0"
        pred = self.from_range(pred, t)
        return convert(pred, x_t, t, self.path, kind, to, self.sigma_data)

    def predict(self, x_t: Tensor, t: Time, to: str = "x0", **cond: Any) -> Tensor:
        """Quantity `to` (x0, eps, score, v, velocity, F, trig) at x_t (B, C, ...), host time t: (B, C, ...)."""
        return self.interpret(self.raw(x_t, t, **cond), x_t, t, to)

    def predict_both(self, x_t: Tensor, t: Time, **cond: Any) -> tuple[Tensor, Tensor]:
        """(x0, eps) from one evaluation."""
        output = self.raw(x_t, t, **cond)
        return self.interpret(output, x_t, t, "x0"), self.interpret(output, x_t, t, "eps")

    def denoise_ve(self, x_ve: Tensor, sigma: Time, **cond: Any) -> Tensor:
        """k-diffusion's interface: x0 at x_ve = x0 + sigma noise (B, ...), sigma (B,) or a number, for any path."""
        t = self.path.t_of_ve_sigma(self.batch_time(x_ve, sigma)).clamp(max=self.path.t_max)
        x_t = (expand(self.path.alpha(t), x_ve) * x_ve).to(x_ve.dtype)
        return self.predict(x_t, t, "x0", **cond)

    def predict_beside(self, path: Path, x_t: Tensor, t: Time, to: str = "x0", **cond: Any) -> Tensor:
        """Quantity `to` at x_t (B, ...), t of another path: this network is asked at the same noise level of its own,
        at most the highest it knows. (B, ...)."""
        t = self.batch_time(x_t, t)
        if path == self.path:
            return self.predict(x_t, t, to, **cond)
        own = self.path.t_of_ve_sigma(path.ve_sigma(t)).clamp(max=self.t_range()[1])
        z = (x_t * expand(self.path.sigma(own) / path.sigma(t), x_t)).to(x_t.dtype)
        return convert(self.predict(z, own, "x0", **cond), x_t, t, path, "x0", to)

    def learned_variance(self, output: Tensor, x_t: Tensor) -> Tensor | None:
        """The variance channels of a raw output, or None."""
        return self.split(output, x_t)[1]

    def t_range(self) -> tuple[float, float]:
        """The times between which velocity, x0 and eps are all finite for this path and prediction."""
        low, high, gap = self.path.t_min, self.path.t_max, 1e-3
        if self.prediction in ("x0", "score", "F", "trig") and float(self.path.sigma(low)) == 0:
            low = low + gap
        if self.prediction in ("eps", "score", "F") and float(self.path.alpha(high)) == 0:
            high = high - gap
        return low, high

    def _x0_from_x_prev(self, mean: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Invert the posterior mean of q(x_{t-1} | x_t, x0) (Ho et al. 2020, eq. 7)."""
        assert isinstance(self.path, DiscreteVPPath)
        before = (t - 1 / self.path.steps).clamp(min=0)
        ratio = self.path.alpha(t) / self.path.alpha(before)
        beta = 1 - ratio**2
        of_x0, of_x = self.path.alpha(before) * beta, ratio * self.path.sigma(before) ** 2
        sigma2 = self.path.sigma(t) ** 2
        x0 = (expand(sigma2, x_t) * mean.double() - expand(of_x, x_t) * x_t.double()) / expand(of_x0, x_t)
        return x0.to(mean.dtype)


def flow_velocity(model: Denoiser, x: Tensor, s: Time, max_level: float = 20.0, **cond: Any) -> Tensor:
    """Velocity eps - x0 of the flow (1 - s) x0 + s eps at x (B, ...), s (B,) or a number in (0, 1], of any Denoiser.

    Networks of other paths are asked at equal noise level, at most the highest they know. Those that predict noise are
    asked at sigma / alpha = max_level at most: where all but noise is gone, their x0 is an error over nearly nothing.
    """
    path, high = model.path, model.t_range()[1]
    if path == LinearPath() and high == 1:
        return model.predict(x, s, "velocity", **cond)
    s, top = model.batch_time(x, s), float(path.ve_sigma(high))
    top = min(top, max_level) if model.prediction in ("eps", "score", "x_prev") else top
    own = path.t_of_ve_sigma((s / (1 - s)).clamp(max=top)).clamp(max=high)
    z = (x * expand(path.sigma(own) / s, x)).to(x.dtype)
    x0 = model.predict(z, own, "x0", **cond)
    return ((x - x0) / expand(s, x)).to(x0.dtype)
