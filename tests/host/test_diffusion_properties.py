"""Properties of the Gaussian core: conversions, paths, solvers against closed forms, guidance, likelihood, samplers."""

import inspect
import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vgm_cli.api import Request, Step, generators
from vgm_cli.conditioning import ClassLabel, Conditions, Part
from vgm_cli.diffusion import guidance, likelihood, objectives, solvers, timesteps
from vgm_cli.diffusion.denoiser import KINDS, Denoiser, convert
from vgm_cli.diffusion.manifest import SAMPLERS, host_components
from vgm_cli.diffusion.path import PATHS, DiscreteVPPath, LinearPath, VPPath, make_path
from vgm_cli.errors import VgmError
from vgm_cli.nets.text import WordEncoder
from vgm_cli.registry import load_target

CONFIGS = [
    "linear",
    "cosine",
    "vp",
    "subvp",
    "ve",
    "edm",
    "trig",
    {"name": "trig", "sigma_data": 1.0},
    "vp-discrete",
    {"name": "vp-discrete", "schedule": "cosine", "steps": 50},
    {"name": "vp-discrete", "schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"name": "shifted", "base": "linear", "shift": 3.0},
]
IDS = [json.dumps(c) for c in CONFIGS]
paths = st.sampled_from(CONFIGS).map(make_path)
inside = st.floats(0.02, 0.98)
quick = settings(max_examples=60, deadline=None)


def at(path, fraction):
    """A time at a fraction of the path's interval."""
    return path.t_min + fraction * (path.t_max - path.t_min)


# -- paths -----------------------------------------------------------------------------------------------------------


def test_every_path_is_tested():
    assert {make_path(c).name for c in CONFIGS} == set(PATHS)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_config_rebuilds_the_path(config):
    path = make_path(config)
    again = make_path(json.loads(json.dumps(path.config())))
    t = torch.linspace(path.t_min, path.t_max, 7, dtype=torch.float64)
    assert again == path and torch.equal(again.alpha(t), path.alpha(t)) and torch.equal(again.sigma(t), path.sigma(t))


def test_unknown_names_are_told():
    with pytest.raises(VgmError, match="path"):
        make_path("linaer")
    with pytest.raises(VgmError, match="beta_mn"):
        make_path({"name": "vp", "beta_mn": 0.1})
    with pytest.raises(VgmError, match="prediction"):
        Denoiser(lambda x, t: x, "linear", "epsilon")
    with pytest.raises(VgmError, match="vp-discrete"):
        Denoiser(lambda x, t: x, "linear", "eps", time="index")


@given(paths, inside)
@quick
def test_derivatives_are_those_of_alpha_and_sigma(path, fraction):
    t = torch.tensor(at(path, fraction), dtype=torch.float64)
    if isinstance(path, DiscreteVPPath):  # inside an interval, where its piecewise slope is one
        t = ((t * path.steps).floor() + 0.5) / path.steps
    h = 1e-5 * t
    for f, slope in ((path.alpha, path.alpha_prime), (path.sigma, path.sigma_prime)):
        assert float(slope(t)) == pytest.approx(float((f(t + h) - f(t - h)) / (2 * h)), rel=1e-4, abs=1e-7)
    lambda_slope = (path.logsnr(t + h) - path.logsnr(t - h)) / (2 * h)
    assert float(path.g2(t)) == pytest.approx(float(-(path.sigma(t) ** 2) * lambda_slope), rel=1e-4)


@given(paths, inside)
@quick
def test_logsnr_and_level_invert(path, fraction):
    t = torch.tensor(at(path, fraction), dtype=torch.float64)
    assert float(path.t_of_logsnr(path.logsnr(t))) == pytest.approx(float(t), rel=1e-8)
    assert float(path.t_of_ve_sigma(path.ve_sigma(t))) == pytest.approx(float(t), rel=1e-8)
    assert float(path.logsnr(t)) == pytest.approx(-2 * math.log(float(path.ve_sigma(t))), rel=1e-8, abs=1e-9)


@given(paths)
@quick
def test_logsnr_decreases_and_dtype_is_kept(path):
    t = torch.linspace(at(path, 0.001), at(path, 0.999), 50, dtype=torch.float64)
    assert (path.logsnr(t).diff() < 0).all()
    for f in (path.alpha, path.sigma, path.alpha_prime, path.sigma_prime, path.logsnr, path.t_of_logsnr):
        assert f(t.float()).dtype == torch.float32 and f(0.5).dtype == torch.float64


@pytest.mark.parametrize("schedule", ["linear", "cosine", "scaled_linear"])
def test_discrete_path_is_exact_at_integer_steps(schedule):
    from vgm_cli.diffusion.discrete import named_betas

    path = DiscreteVPPath(schedule, 1000, 1e-4, 0.02)
    bar = torch.from_numpy((1 - named_betas(schedule, 1000, 1e-4, 0.02)).cumprod())
    index = torch.arange(1000)
    for t in (path.t_of_timestep(index), path.t_of_timestep(index).float().double()):
        assert torch.equal(path.timestep(t), index.double())
        torch.testing.assert_close(path.alpha(t) ** 2, bar, rtol=1e-12, atol=0)
        torch.testing.assert_close(path.sigma(t) ** 2, 1 - bar, rtol=1e-10, atol=1e-15)
    assert float(path.alpha(0.0)) == 1 and float(path.sigma(0.0)) == 0


def test_shift_is_sd3s():
    path, base, t = make_path(CONFIGS[-1]), LinearPath(), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    torch.testing.assert_close(path.logsnr(t), base.logsnr(t) - 2 * math.log(3.0))


# -- conversions -----------------------------------------------------------------------------------------------------


@given(paths, inside, st.sampled_from(KINDS), st.sampled_from(KINDS), st.integers(0, 99))
@quick
def test_conversions_round_trip_and_agree(path, fraction, src, dst, seed):
    g = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, 2, 3, 1, 2, generator=g, dtype=torch.float64)
    t = torch.full((2,), at(path, fraction), dtype=torch.float64)
    z = path.add_noise(x0, eps, t)
    known = {k: objectives.target_of(k, path, x0, eps, t, path.sigma_data) for k in KINDS}
    got = convert(known[src], z, t, path, src, dst)
    tolerance = 1e-7 * (1 + float(path.ve_sigma(t[0])) + 1 / float(path.ve_sigma(t[0])))
    torch.testing.assert_close(got, known[dst], rtol=tolerance, atol=tolerance * float(known[dst].abs().max()))
    back = convert(got, z, t, path, dst, src)
    torch.testing.assert_close(back, known[src], rtol=tolerance, atol=tolerance * float(known[src].abs().max()))
    assert convert(known[src].float(), z.float(), t, path, src, dst).dtype == torch.float32


def test_velocity_networks_are_read_at_pure_noise():
    z, v = torch.randn(2, 2, 1, 2, 2)
    x0 = convert(v, z, 1.0, LinearPath(), "velocity", "x0")
    torch.testing.assert_close(x0, z - v)
    torch.testing.assert_close(convert(v, z, 0.0, LinearPath(), "velocity", "x0"), z)


# -- solvers against closed forms ------------------------------------------------------------------------------------


def gaussian(path, std=0.5, mean=0.3):
    """The exact denoiser of data N(mean, std^2), and its flow from t to s in closed form."""

    def x0(z, t):
        a, s = path.alpha(t), path.sigma(t)
        shape = [-1] + [1] * (z.ndim - 1)
        a, s = a.reshape(shape), s.reshape(shape)
        return mean + a * std**2 / ((a * std) ** 2 + s**2) * (z - a * mean)

    def flow(z, t, s):
        spread = lambda t: ((path.alpha(t) * std) ** 2 + path.sigma(t) ** 2).sqrt()
        return path.alpha(s) * mean + spread(s) / spread(t) * (z - path.alpha(t) * mean)

    return x0, flow


def orders_of(error, ns=(20, 40, 80)):
    errors = [error(n) for n in ns]
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


@pytest.mark.parametrize(
    "method, order", [("euler", 1), ("midpoint", 2), ("heun", 2), ("heun3", 3), ("rk4", 4), ("rk38", 4)]
)
@pytest.mark.parametrize("config", ["linear", "cosine", "vp"])
def test_ode_solvers_have_their_order(method, order, config):
    path = make_path(config)
    x0, flow = gaussian(path)
    z = torch.linspace(-2, 2, 5, dtype=torch.float64).view(5, 1)
    high, low = (torch.tensor(t, dtype=torch.float64) for t in (0.9, 0.1))

    def error(n):
        times = timesteps.time_grid(path, n, low=0.1, high=0.9)
        velocity = lambda x, t: convert(x0(x, t), x, t, path, "x0", "velocity")
        return float((solvers.ODE[method][0](velocity, z, times) - flow(z, high, low)).abs().max())

    assert orders_of(error)[-1] > order - 0.35


@pytest.mark.parametrize(
    "name, order",
    [("euler", 1), ("heun", 2), ("dpm_2", 2), ("lms", 2), ("dpmpp_2m", 2), ("dpmpp_2m_sde", 2), ("dpmpp_3m_sde", 2)],
)
def test_k_diffusion_solvers_have_their_order(name, order):
    # one first-order step starts every multistep solver: the whole is of order 2
    path = make_path("edm")
    x0, flow = gaussian(path)
    z = torch.linspace(-9, 9, 5, dtype=torch.float64).view(5, 1)
    keywords = {"eta": 0.0} if "sde" in name else {}

    def error(n):
        sigmas = timesteps.exponential(n + 1, 0.1, 5.0, dtype=torch.float64)[:-1]
        got = solvers.K_DIFFUSION[name](x0, z, sigmas, **keywords)
        return float((got - flow(z, sigmas[0], sigmas[-1])).abs().max())

    assert orders_of(error, (40, 80, 160))[-1] > order - 0.4


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver", "unipc"])
def test_multistep_solvers_have_their_order(algorithm, order):
    path = VPPath()
    x0, flow = gaussian(path)
    z = torch.linspace(-2, 2, 5, dtype=torch.float64).view(5, 1)
    high, low = (torch.tensor(t, dtype=torch.float64) for t in (0.9, 0.1))

    def error(n):
        times = timesteps.time_grid(path, n, "logsnr", low=0.1, high=0.9)
        alphas, sigmas = path.alpha(times), path.sigma(times)
        both = lambda x, i: (x0(x, times[i]), convert(x0(x, times[i]), x, times[i], path, "x0", "eps"))
        if algorithm == "unipc":
            got = solvers.unipc(both, z, alphas, sigmas, order=order, lower_order_final=False)
        else:
            keywords = {"order": order, "algorithm": algorithm, "lower_order_final": False}
            got = solvers.dpm_solver(both, z, alphas, sigmas, **keywords)
        return float((got - flow(z, high, low)).abs().max())

    # a first-order step starts them all: the whole is of order 2 at most
    assert orders_of(error, (40, 80, 160))[-1] > min(order, 2) - 0.4


def test_dopri5_agrees_with_torchdiffeq_and_stays_inside():
    odeint = pytest.importorskip("torchdiffeq").odeint
    torch.manual_seed(0)
    matrix = torch.randn(4, 4, dtype=torch.float64)
    field = lambda x, t: torch.tanh(x @ matrix) * (1 + torch.sin(5 * t)).reshape(-1, 1) - 0.3 * x
    x, seen, info = torch.randn(3, 4, dtype=torch.float64), [], {}

    def watched(x, t):
        seen.append((float(t.min()), float(t.max())))
        return field(x, t)

    got = solvers.dopri5(watched, x, 1.0, 0.0, rtol=1e-9, atol=1e-9, info=info)
    want = odeint(lambda t, x: field(x, t), x, torch.tensor([1.0, 0.0]).double(), rtol=1e-11, atol=1e-11)[-1]
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)
    assert info["nfe"] == len(seen) and min(s[0] for s in seen) == 0.0 and max(s[1] for s in seen) == 1.0


def test_dopri5_gives_each_item_its_own_steps():
    field = lambda x, t: -x * torch.tensor([1.0, 30.0]).double()[: len(x)].view(-1, 1) if len(x) == 2 else None
    rates = torch.tensor([1.0, 30.0], dtype=torch.float64)
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    both = solvers.dopri5(field, x, 0.0, 1.0, rtol=1e-4, atol=1e-6)
    for i in range(2):
        alone = solvers.dopri5(lambda y, t, i=i: -y * rates[i], x[i : i + 1], 0.0, 1.0, rtol=1e-4, atol=1e-6)
        assert torch.equal(both[i : i + 1], alone)


@given(st.lists(inside, min_size=3, max_size=8, unique=True), st.integers(0, 99))
@quick
def test_ddim_is_the_flows_euler(times, seed):
    path = LinearPath()
    t = torch.tensor([*sorted(times, reverse=True), 0.0], dtype=torch.float64)
    x0, _ = gaussian(path)
    z = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    velocity = lambda x, t: convert(x0(x, t), x, t, path, "x0", "velocity")
    both = lambda x, i: (x0(x, t[i]), convert(x0(x, t[i]), x, t[i], path, "x0", "eps"))
    flow = solvers.ODE["euler"][0](velocity, z, t)
    torch.testing.assert_close(solvers.ddim(both, z, path.alpha(t), path.sigma(t)), flow)
    # in VE coordinates it is k-diffusion's Euler
    start = z / path.alpha(t[0])
    levels = path.ve_sigma(t)
    ve = solvers.K_DIFFUSION["euler"](
        lambda x, s: x0(x * path.alpha(path.t_of_ve_sigma(s))[:, None], path.t_of_ve_sigma(s)), start, levels
    )
    torch.testing.assert_close(ve, flow)


POINT = torch.tensor([[0.3, -0.7], [0.1, 0.9]], dtype=torch.float64)  # all data there is: x0 is known at any x


def ends() -> tuple[torch.Tensor, torch.Tensor]:
    """alphas and sigmas of a cosine path from noise to data, as solvers on grids take them."""
    angle = torch.linspace(1.5, 0.0, 13, dtype=torch.float64)
    return angle.cos(), angle.sin()


def draw() -> torch.Tensor:
    return torch.randn(2, 2, dtype=torch.float64)


def on_grid(x, i):
    alphas, sigmas = ends()
    return POINT, (x - alphas[i] * POINT) / sigmas[i]


LEVELS = timesteps.karras(12, 0.01, 10.0, dtype=torch.float64)
START = 10 * torch.ones(2, 2, dtype=torch.float64)
LINE = torch.linspace(0.99, 0.0, 13, dtype=torch.float64)
WITH_TENSORS_ALONE = {  # every solver: how it is called, and how near to the data it must end
    **{
        f"k-diffusion {name}": (
            lambda f=f: f(lambda x, s: POINT, START, LEVELS, **({"noise": draw} if "noise" in taken(f) else {})),
            0.35 if name == "lms" else 1e-6,
        )
        for name, f in solvers.K_DIFFUSION.items()
    },
    "dpm_fast": (lambda: solvers.dpm_fast(lambda x, s: POINT, START, 0.01, 10.0, 12, noise=draw), 0.1),
    "dpm_adaptive": (lambda: solvers.dpm_adaptive(lambda x, s: POINT, START, 0.01, 10.0, noise=draw), 0.1),
    "edm_heun": (lambda: solvers.edm_heun(lambda x, s: POINT.float(), START / 10, S_churn=5.0, noise=draw), 1e-6),
    "edm_ablation": (lambda: solvers.edm_ablation(lambda x, s: POINT.float(), START / 10, schedule="vp"), 0.05),
    "ddim": (lambda: solvers.ddim(on_grid, START / 10, *ends(), eta=0.5, noise=draw), 1e-6),
    "ddpm": (lambda: solvers.ddpm(on_grid, START / 10, *ends(), noise=draw), 1e-6),
    "dpm_solver": (lambda: solvers.dpm_solver(on_grid, START / 10, *ends()), 1e-6),
    "unipc": (lambda: solvers.unipc(on_grid, START / 10, *ends()), 1e-6),
    "flow_euler": (lambda: solvers.flow_euler(lambda x, i: (x - POINT) / LINE[i], START / 10, LINE), 1e-6),
    **{
        f"ode {name}": (lambda f=f: f(lambda x, t: (x - POINT) / t, START / 10, LINE + 0.01), 0.03)
        for name, (f, _) in solvers.ODE.items()
    },
    "dopri5": (lambda: solvers.dopri5(lambda x, t: (x - POINT) / t.view(-1, 1), START / 10, 0.99, 1e-4), 1e-3),
    "reverse_sde": (
        lambda: solvers.reverse_sde(
            lambda x, t: ((x - POINT) / t, -(x - (1 - t) * POINT) / t**2), START / 10, LINE, lambda t: t, noise=draw
        ),
        0.02,
    ),
    "predictor_corrector": (
        lambda: solvers.predictor_corrector(
            lambda x, i: (ends()[0][i] * POINT - x) / ends()[1][i] ** 2, START / 10, *ends(),
            predictor="ancestral", noise=draw,
        ),
        0.35,
    ),
}  # fmt: skip


def taken(function):
    return inspect.signature(function).parameters


def test_every_solver_is_called():
    named = {n.split()[-1] for n in WITH_TENSORS_ALONE} | {"K_DIFFUSION", "ODE", "ALGORITHMS", "dynamic_threshold"}
    assert set(solvers.__all__) <= named


@pytest.mark.parametrize("name", WITH_TENSORS_ALONE)
def test_solvers_take_tensors_alone(name):
    """Functions and tensors in, data out: where all data are one point, every solver finds it."""
    solve, near = WITH_TENSORS_ALONE[name]
    assert float((solve() - POINT).abs().max()) <= near


def test_two_guidances_lead_by_two_conditions():
    u, a, c = torch.randn(3, 2, 4).unbind()
    got = guidance.extrapolate((u, a, c), (1.5, 3.0))
    torch.testing.assert_close(got, u + 1.5 * (a - u) + 3 * (c - a))
    torch.testing.assert_close(guidance.Guidance(3.0).combine(c, u), u + 3 * (c - u))  # logits (B, V)


def test_a_scale_may_change_with_time():
    """SUPIR's line in the noise level, an item's own at its own time."""
    network = lambda x, t, y: x + y.view(-1, 1)
    line = guidance.Guidance(lambda t: 1 + 4 * t)
    x, t, y = torch.zeros(2, 3), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])
    got = line(network, x, t, {"y": y}, {"y": torch.zeros(2)})
    torch.testing.assert_close(got, torch.tensor([[1.0], [5.0]]).expand(2, 3))


def test_reverse_sde_keeps_the_marginals():
    path = VPPath()
    x0, _ = gaussian(path, std=0.5, mean=0.3)
    times = timesteps.time_grid(path, 200, "logsnr", low=0.02, high=1.0)
    start = torch.randn(20000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low = times[-1]
    std = float(((path.alpha(low) * 0.5) ** 2 + path.sigma(low) ** 2).sqrt())
    for scale in (0.0, 1.0, 2.0):
        g = torch.Generator().manual_seed(1)

        def drift_score(x, t):
            mean = x0(x, t)
            score = convert(mean, x, t, path, "x0", "score")
            return convert(mean, x, t, path, "x0", "velocity"), score

        noise = lambda g=g: torch.randn(20000, 1, generator=g, dtype=torch.float64)
        e = lambda t, scale=scale: (scale * path.g2(t)).sqrt()
        x = solvers.reverse_sde(drift_score, start, times, e, noise=noise)
        assert float(x.mean()) == pytest.approx(0.3 * float(path.alpha(low)), abs=0.02)
        assert float(x.std()) == pytest.approx(std, rel=0.04)


# -- denoiser views --------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """The exact network of data N(mean_y, std^2) in any prediction and time argument; class 3 is the null class."""

    means = torch.tensor([0.3, -0.4, 0.6, 0.0])

    def __init__(self, path, prediction="velocity", time="unit", std=0.5):
        super().__init__()
        self.path, self.prediction, self.time, self.std = make_path(path), prediction, time, std
        self.calls = 0

    def host_time(self, t):
        t = t.double()
        if self.time == "reversed":
            return 1 - t
        if self.time == "index":
            return self.path.t_of_timestep(t)
        if self.time == "unit":
            return t
        return self.path.t_of_ve_sigma({"sigma": t, "log-sigma": t.exp(), "edm": (4 * t).exp()}[self.time])

    def forward(self, x, t, y=None):
        self.calls += 1
        t = self.host_time(t)
        y = torch.full((len(x),), 3) if y is None else y
        mean = self.means.double()[y].view(-1, 1, 1, 1)
        z, shape = x.double(), (-1, 1, 1, 1)
        a, s = self.path.alpha(t).view(shape), self.path.sigma(t).view(shape)
        if self.prediction in ("F", "trig"):  # fed c_in z / alpha
            z = z * (s**2 + (a * self.path.sigma_data) ** 2).sqrt()
        gain = (a * self.std) ** 2 + s**2
        # both from the posterior mean, so that nothing is divided by alpha or sigma
        x0 = mean + a * self.std**2 / gain * (z - a * mean)
        eps = s / gain * (z - a * mean)
        if self.prediction == "score":
            return (-(z - a * mean) / gain).float()
        if self.prediction in ("x0", "eps"):
            return (x0 if self.prediction == "x0" else eps).float()
        out = objectives.target_of(self.prediction, self.path, x0, eps, t, self.path.sigma_data)
        return (-out if self.time == "reversed" and self.prediction == "velocity" else out).float()

    def null_condition(self, cond):
        return {"y": torch.full_like(cond["y"], 3)}


VIEWS = [
    ("linear", "velocity", "unit"),
    ("linear", "velocity", "reversed"),
    ("linear", "x0", "unit"),
    ("linear", "eps", "unit"),
    ("cosine", "v", "unit"),
    ("vp", "score", "unit"),
    ("subvp", "eps", "unit"),
    ("ve", "eps", "log-sigma"),
    ("edm", "F", "edm"),
    ("edm", "x0", "sigma"),
    ("trig", "trig", "unit"),
    ("vp-discrete", "eps", "index"),
    ("vp-discrete", "v", "index"),
    ({"name": "shifted", "base": "linear", "shift": 3.0}, "velocity", "unit"),
]


def toy_view(path, prediction, time):
    return Denoiser(Toy(path, prediction, time), path, prediction, time=time)


@pytest.mark.parametrize("path, prediction, time", VIEWS)
def test_every_view_gives_the_same_x0(path, prediction, time):
    view = toy_view(path, prediction, time)
    t = torch.tensor([at(view.path, 0.4), at(view.path, 0.7)], dtype=torch.float64)
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    x0, _ = gaussian(view.path, mean=0.0)
    torch.testing.assert_close(view.predict(x, t), x0(x.double(), t).float(), rtol=1e-3, atol=1e-4)
    a = view.path.alpha(t).view(-1, 1, 1, 1)
    ve = view.denoise_ve((x / a).float(), view.path.ve_sigma(t))
    torch.testing.assert_close(ve, view.predict(x, t), rtol=1e-3, atol=1e-4)
    again = Denoiser.from_config(view.network, json.loads(json.dumps(view.config())))
    torch.testing.assert_close(again.predict(x, t, "eps"), view.predict(x, t, "eps"))


def test_x_prev_networks_are_read():
    from vgm_cli.diffusion.discrete import DiscreteDiffusion, named_betas

    process = DiscreteDiffusion(named_betas("linear", 100), "x_prev", "fixed_large")
    x0, x_t = torch.randn(2, 2, 1, 2, 2, dtype=torch.float64)
    index = torch.tensor([5, 80])
    mean = process.q_posterior(x0, x_t, index).mean.double()
    path = {"name": "vp-discrete", "schedule": "linear", "steps": 100}
    view = Denoiser(lambda x, t: mean, path, "x_prev", time="index")
    torch.testing.assert_close(view.predict(x_t, view.path.t_of_timestep(index)), x0, rtol=1e-5, atol=1e-5)


def test_learned_sigma_is_kept_aside():
    network = lambda x, t: torch.cat([x, 2 * x], dim=1)
    view = Denoiser(network, "linear", "x0", learned_sigma=True, variance="learned_range")
    x = torch.randn(2, 3, 2, 2)
    torch.testing.assert_close(view.predict(x, 0.5), x)
    torch.testing.assert_close(view.learned_variance(view.raw(x, 0.5), x), 2 * x)
    assert Denoiser.from_config(network, view.config()).config() == view.config()


# -- guidance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path, prediction, time", VIEWS)
@pytest.mark.parametrize("kind", KINDS)
def test_guidance_commutes_with_conversions(path, prediction, time, kind):
    view = toy_view(path, prediction, time)
    x, y = torch.randn(3, 1, 2, 2), torch.tensor([0, 1, 2])
    t = at(view.path, 0.5)
    before = view.network.calls
    got = guidance.ClassifierFreeGuidance(view, 2.5).predict(x, t, kind, y=y)
    assert view.network.calls == before + 1, "one forward"
    c, u = view.predict(x, t, kind, y=y), view.predict(x, t, kind, y=torch.full_like(y, 3))
    torch.testing.assert_close(got, u + 2.5 * (c - u), rtol=1e-3, atol=1e-3 * float(c.abs().max() + u.abs().max()))


def test_guidance_interval_channels_and_rescale():
    view = toy_view("linear", "velocity", "unit")
    x, y = torch.randn(2, 1, 4, 4), torch.tensor([0, 1])
    limited = guidance.ClassifierFreeGuidance(view, 3.0, interval=(0.4, 0.6))
    torch.testing.assert_close(limited.predict(x, 0.8, y=y), view.predict(x, 0.8, y=y))
    full = guidance.ClassifierFreeGuidance(view, 3.0)
    t = torch.tensor([0.5, 0.9], dtype=torch.float64)
    mixed = limited.predict(x, t, y=y)
    torch.testing.assert_close(mixed[:1], full.predict(x, 0.5, y=y)[:1])
    torch.testing.assert_close(mixed[1:], view.predict(x, 0.9, y=y)[1:])
    none = guidance.ClassifierFreeGuidance(view, 3.0, channels=0)
    torch.testing.assert_close(none.predict(x, 0.5, y=y), view.predict(x, 0.5, y=y))
    rescaled = guidance.ClassifierFreeGuidance(view, 3.0, rescale=1.0).raw(x, 0.5, y=y)
    torch.testing.assert_close(rescaled.flatten(1).std(1), view.raw(x, 0.5, y=y).flatten(1).std(1))
    with pytest.raises(VgmError, match="null"):
        guidance.ClassifierFreeGuidance(Denoiser(lambda x, t: x, "linear"), 2.0)


def test_a_teacher_is_guided_away_from_what_its_conditions_say_is_none():
    """A network without a null class, as U-Nets that read texts are."""
    teacher = Denoiser(lambda x, t: x, "linear")
    told = Conditions([Part("text", WordEncoder(["red"]), "text")])
    assert isinstance(guidance.guided_teacher(teacher, 2.0, told), guidance.ClassifierFreeGuidance)
    assert guidance.guided_teacher(teacher, 1.0, None) is teacher
    for silent in (None, Conditions(), Conditions([Part("class", ClassLabel(3), "label")])):
        with pytest.raises(VgmError, match="null"):
            guidance.guided_teacher(teacher, 2.0, silent)


@pytest.mark.parametrize("path, prediction, time", VIEWS)
def test_classifier_guidance_shifts_the_score(path, prediction, time):
    view = toy_view(path, prediction, time)
    classifier = lambda x, t: torch.stack([x.flatten(1).sum(1), -x.flatten(1).sum(1)], dim=1)
    x, y, t = 0.1 * torch.randn(2, 1, 2, 2), torch.tensor([0, 1]), at(view.path, 0.5)
    guided = guidance.ClassifierGuidance(view, classifier, y, 1.5).predict(x, t, "score", y=y)
    sums = x.flatten(1).sum(1)
    gradient = torch.where(y == 0, 2 * torch.sigmoid(-2 * sums), -2 * torch.sigmoid(2 * sums)).view(-1, 1, 1, 1)
    want = view.predict(x, t, "score", y=y) + 1.5 * gradient
    torch.testing.assert_close(guided, want.expand_as(guided), rtol=1e-3, atol=1e-3)


def test_autoguidance_extrapolates_from_the_weaker_network():
    strong, weak = toy_view("linear", "velocity", "reversed"), toy_view("linear", "x0", "unit")
    weak.network.std = 0.9
    x, y = torch.randn(2, 1, 2, 2), torch.tensor([0, 1])
    got = guidance.Autoguidance(strong, weak, 2.0).predict(x, 0.5, y=y)
    s, w = strong.predict(x, 0.5, y=y), weak.predict(x, 0.5, y=y)
    torch.testing.assert_close(got, w + 2 * (s - w), rtol=1e-4, atol=1e-4)


# -- likelihood ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path, prediction, time", VIEWS)
def test_likelihood_of_a_gaussian(path, prediction, time):
    view = toy_view(path, prediction, time)
    x = 0.5 * torch.randn(3, 1, 2, 1, generator=torch.Generator().manual_seed(0))
    low = view.t_range()[0]
    variance = float((view.path.alpha(low) * 0.5) ** 2 + view.path.sigma(low) ** 2)
    want = -x.flatten(1).square().sum(1) / (2 * variance) - math.log(2 * math.pi * variance)
    got = likelihood.log_likelihood(view, x)
    torch.testing.assert_close(got.log_prob, want, rtol=2e-2, atol=2e-2)
    probe = likelihood.rademacher(torch.rand(x.shape))
    # the field's Jacobian is diagonal, so that +-1 probes are exact
    torch.testing.assert_close(likelihood.log_likelihood(view, x, probe).log_prob, got.log_prob, rtol=1e-3, atol=1e-3)
    assert got.nfe > 7


def test_bits_per_dim_of_uniform_bytes():
    assert float(likelihood.bits_per_dim(torch.tensor(10 * math.log(0.5)), dim=10)) == pytest.approx(8.0)


# -- samplers --------------------------------------------------------------------------------------------------------

NAMES = sorted(SAMPLERS)
STEPS = {"pc": 100, "sde": 60, "euler": 240, "euler-ancestral": 60}


def sampler(name, **keywords):
    component = next(c for c in host_components() if c.kind == "sampler" and c.name == name)
    return load_target(component.target)(**keywords)


def request(n=4, shape=(1, 2, 2), first=0, **keywords):
    y = torch.arange(first, first + n) % 3
    return Request(shape, generators(range(first, first + n)), cond={"y": y}, **keywords)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path, prediction, time", VIEWS)
def test_every_sampler_samples_every_path(name, path, prediction, time):
    """Who watches sees estimates of the data: at the noisy end the mean of the class, at the other the image itself."""
    view = toy_view(path, prediction, time)
    seen = []
    shape = (1, 8, 8)  # the corrector's step size relies on norms, which vary much in few dimensions
    asked = request(48, shape, steps=STEPS.get(name, 24), callback=lambda i, total, x, x0: seen.append((i, x0)))
    x = sampler(name)(view, asked)
    assert x.shape == (48, *shape) and x.dtype == torch.float32 and torch.isfinite(x).all()
    for y in range(3):
        mine = x[asked.cond["y"] == y]
        assert float(mine.mean()) == pytest.approx(float(Toy.means[y]), abs=0.12)
        assert float(mine.std()) == pytest.approx(0.5, abs=0.12)
    assert asked.info["nfe"] == view.network.calls and seen and seen[0][0] == 0
    means = torch.tensor([float(Toy.means[y]) for y in asked.cond["y"]])
    first, last = seen[0][1], seen[-1][1]
    assert all(x0 is not None and x0.shape == x.shape for _, x0 in seen)
    assert (first.flatten(1).mean(1) - means)[:6].abs().max() < 0.3
    assert (last - x)[:6].abs().mean() < 0.2


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_batch(name):
    view = toy_view("vp-discrete", "eps", "index")
    run = lambda first, n: sampler(name)(view, request(n, first=first, steps=6, guidance_scale=2.0))
    together = run(0, 4)
    torch.testing.assert_close(torch.cat([run(0, 1), run(1, 2), run(3, 1)]), together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_guided_samples_and_their_cost(name):
    view = toy_view("linear", "velocity", "unit")
    steps = STEPS.get(name, 24)
    plain, guided = request(32, steps=steps), request(32, steps=steps, guidance_scale=2.0)
    x, x_guided = sampler(name)(view, plain), sampler(name)(view, guided)
    assert abs(float(x_guided[plain.cond["y"] == 2].mean())) > abs(float(x[plain.cond["y"] == 2].mean())) + 0.2
    if name != "dopri5":
        assert guided.info["nfe"] == 2 * plain.info["nfe"]
    partly = request(32, steps=steps, guidance_scale=2.0, guidance_interval=(0.3, 0.6))
    sampler(name)(view, partly)
    assert plain.info["nfe"] < partly.info["nfe"]


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_few_steps_are_finite(name, steps):
    for view in VIEWS:
        x = sampler(name)(toy_view(*view), request(2, steps=steps))
        assert torch.isfinite(x).all(), view


@pytest.mark.parametrize("solver", [*solvers.K_DIFFUSION, "dpm_fast", "dpm_adaptive"])
def test_k_diffusion_by_name(solver):
    asked = request(64, steps=40)
    x = sampler("k-diffusion", solver=solver)(toy_view("vp-discrete", "eps", "index"), asked)
    assert float(x[asked.cond["y"] == 2].std()) == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("algorithm", solvers.ALGORITHMS)
@pytest.mark.parametrize("grid", ["logsnr", "uniform", "karras", "trailing"])
def test_dpm_solver_algorithms(algorithm, grid):
    asked = request(64, steps=160 if grid == "uniform" else 40)  # an SDE on uniform times converges slowly
    x = sampler("dpm-solver", algorithm=algorithm, grid=grid)(toy_view("vp-discrete", "eps", "index"), asked)
    assert float(x[asked.cond["y"] == 2].std()) == pytest.approx(0.5, abs=0.15)


def test_edm_ablation_is_edm_at_its_defaults():
    asked = [request(8, steps=10) for _ in range(2)]
    a, b = (sampler(name)(toy_view("edm", "F", "edm"), r) for name, r in zip(("edm", "edm-ablation"), asked))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "ancestral"])
def test_dynamic_clipping_bounds_the_samples(name):
    view = toy_view("vp-discrete", "eps", "index")
    loose, held = (sampler(name, clip=clip)(view, request(64, steps=20)) for clip in (False, "dynamic"))
    assert float(loose.abs().max()) > 1 and float(held.abs().max()) <= 1 + 1e-5


def test_sampler_options_are_checked():
    with pytest.raises(VgmError, match="solver"):
        sampler("k-diffusion", solver="dpmpp_4m")
    with pytest.raises(VgmError, match="eta"):
        sampler("k-diffusion", solver="dpmpp_2m", eta=1.0)
    with pytest.raises(VgmError, match="order"):
        sampler("dpm-solver", algorithm="sde-dpmsolver++", order=3)
    with pytest.raises(VgmError, match="continuous"):
        sampler("ddim", grid="leading")(toy_view("linear", "velocity", "unit"), request())
    with pytest.raises(VgmError, match="diffusion"):
        sampler("heun")(nn.Identity(), request())


# -- objective -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path, prediction, time", VIEWS)
def test_the_exact_network_minimises_every_weighting(path, prediction, time):
    torch.manual_seed(0)
    view = toy_view(path, prediction, time)
    x0, noise = 0.5 * torch.randn(512, 1, 2, 2), torch.randn(512, 1, 2, 2)
    low, high = view.t_range()
    t = low + (high - low) * torch.rand(512, dtype=torch.float64).clamp(0.05, 0.95)
    y = torch.full((512,), 3)
    for weighting in ("uniform", "x0", "eps", "v", "velocity", "snr", "min-snr-5", "edm", "sigmoid"):
        losses, plain = objectives.gaussian_losses(view, x0, t, noise, weighting, y=y)
        assert losses.shape == plain.shape == (512,) and torch.isfinite(losses).all()
        view.network.std = 1.5
        worse, _ = objectives.gaussian_losses(view, x0, t, noise, weighting, y=y)
        view.network.std = 0.5
        assert float(worse.mean()) > float(losses.mean())


def test_weightings_measure_the_same_error():
    """The loss in a named space does not depend on what the network predicts."""
    x0, noise, y = torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2, 2), torch.full((4,), 3)
    t = torch.linspace(0.2, 0.8, 4, dtype=torch.float64)
    for weighting in ("x0", "eps", "v", "velocity", "snr", "min-snr-5", "edm", "sigmoid"):
        losses = [
            objectives.gaussian_losses(toy_view("vp", kind, "unit"), x0, t, noise, weighting, y=y)[0]
            for kind in ("eps", "x0", "v", "velocity", "score")
        ]
        for other in losses[1:]:
            torch.testing.assert_close(other, losses[0], rtol=2e-3, atol=1e-5)


def test_edm_is_a_configuration():
    view = toy_view("edm", "F", "edm")
    x0, noise, y = torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2, 2), torch.full((4,), 3)
    sigma = torch.tensor([0.1, 0.5, 2.0, 20.0])
    losses, _ = objectives.gaussian_losses(view, x0, sigma, noise, "edm", y=y)
    s = sigma.view(-1, 1, 1, 1)
    official = (s**2 + 0.25) / (0.5 * s) ** 2 * (view.denoise_ve(x0 + s * noise, sigma, y=y) - x0) ** 2
    torch.testing.assert_close(losses, official.flatten(1).mean(1), rtol=1e-4, atol=1e-5)


class Tiny(nn.Module):
    num_classes = 3

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.1))
        self.labels = nn.Embedding(4, 1)

    def forward(self, x, t, y=None):
        assert t.dtype == torch.float32 and torch.isfinite(t).all()
        y = torch.full((len(x),), 3) if y is None else y
        return self.scale * x + self.labels(y).view(-1, 1, 1, 1) * t.view(-1, 1, 1, 1)

    def null_condition(self, cond):
        return {"y": torch.full_like(cond["y"], 3)}


@pytest.mark.parametrize("path", CONFIGS, ids=IDS)
@pytest.mark.parametrize("time_sampling", ["uniform", "logit-normal", "edm-lognormal", "cosine", "logsnr"])
def test_objective_trains_and_describes_its_view(path, time_sampling):
    prediction = "F" if path == "edm" else "v"
    objective = objectives.GaussianObjective(Tiny(), path=path, prediction=prediction, time_sampling=time_sampling)
    batch = {"x": torch.randn(8, 1, 2, 2), "cond": {"y": torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])}}
    loss, logs = objective.loss("main", batch, Step(0))
    again, _ = objective.loss("main", batch, Step(0))
    other, _ = objective.loss("main", batch, Step(1))
    assert torch.equal(loss, again) and not torch.equal(loss, other) and not logs["mse"].requires_grad
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in objective.model.parameters())
    view = Denoiser.from_config(objective.model, json.loads(json.dumps(objective.view())))
    assert torch.isfinite(sampler("heun")(view, request(2, steps=3))).all()
    t = objective.times(4096, Step(0))
    low, high = view.t_range()
    if path != "edm":
        assert float(t.min()) >= low and float(t.max()) <= high
    if isinstance(view.path, DiscreteVPPath) and time_sampling == "uniform":
        index = view.path.timestep(t)
        assert torch.equal(index, index.round())


def test_presets_build():
    objective = next(c for c in host_components() if c.kind == "objective")
    for keywords in objective.presets.values():
        loss, _ = load_target(objective.target)(Tiny(), **keywords).loss(
            "main", {"x": torch.randn(4, 1, 2, 2)}, Step(0)
        )
        assert torch.isfinite(loss)
