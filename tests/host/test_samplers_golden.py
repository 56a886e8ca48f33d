"""Golden checks of the samplers: k-diffusion, EDM, and diffusers' schedulers, on the files' toy networks."""

import inspect
import itertools

import diffusers_grids as grids
import numpy as np
import pytest
import torch

from vgm_cli.api import Step
from vgm_cli.diffusion import objectives, solvers, timesteps
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.solvers.common import ancestral_step as ancestral_level
from vgm_cli.diffusion.solvers.edm import iddpm_levels
from vgm_cli.testing.golden import GoldenChecks, assert_close

golden = GoldenChecks("samplers")
RTOL = 1e-5


def source(*names):
    return lambda case: case.source.replace("/", " ").split()[-1] in names


def draws(case):
    """The file's draws in their order; running out of them fails."""
    key = next((k for k in case.inputs if k.startswith("draws")), None)
    return iter(case.inputs[key]) if key else iter(())


def toy_denoiser(x, sigma):
    s = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return x * 0.25 / (s**2 + 0.25) + 0.3 * torch.tanh(x) * s / (s + 1)


def options(function, config, *, skip=()):
    """The entries of a config that are the function's own keywords."""
    known = inspect.signature(function).parameters
    return {k: config[k] for k in config if k in known and k not in skip}


# -- k-diffusion -----------------------------------------------------------------------------------------------------


@golden.check(lambda case: case.source.startswith("crowsonkb/k-diffusion") and "fn" in case.config)
def k_diffusion(case):
    config = dict(case.config)
    name, n = config.pop("fn").removeprefix("sample_"), config.pop("n")
    schedule, low, high = config.pop("schedule"), config.pop("sigma_min"), config.pop("sigma_max")
    shape = {k: config.pop(k) for k in ("rho", "beta_d", "beta_min", "eps_s") if k in config}
    noise, seen = draws(case), []
    keywords = {"callback": lambda i, x, x0: seen.append(x)}
    if name not in ("dpmpp_2m", "lms"):
        keywords["noise"] = lambda: next(noise)
    x = case.inputs["x_T"] * high
    if name in ("dpm_fast", "dpm_adaptive"):
        case.ignore("schedule", why="it places its steps itself, between the two ends")
    if name == "dpm_adaptive":
        case.ignore("n", why="the error decides how many steps there are")
    if name == "dpm_fast":
        got = solvers.dpm_fast(toy_denoiser, x, low, high, n, **config, **keywords)
    elif name == "dpm_adaptive":
        got = solvers.dpm_adaptive(toy_denoiser, x, low, high, **config, **keywords)
    else:
        make = getattr(timesteps, schedule)
        sigmas = make(n, **shape) if schedule == "vp" else make(n, low, high, **shape)
        assert_close(sigmas, case.outputs["sigmas"], RTOL, "sigmas")
        got = solvers.K_DIFFUSION[name](toy_denoiser, x, sigmas, **config, **keywords)
    rtol = 1e-4 if name in ("lms", "dpm_adaptive") else RTOL  # the spec's: quadrature and step control
    assert_close(torch.stack(seen), case.outputs["trajectory"], rtol, "trajectory")
    assert_close(got, case.outputs["x"], rtol, "x")


@golden.check(source("get_ancestral_step"))
def ancestral_step(case):
    pairs = [ancestral_level(a, b, case.config.get("eta", 1.0)) for a, b in zip(case.inputs["frm"], case.inputs["to"])]
    for name, got in zip(("down", "up"), zip(*pairs)):
        assert_close(torch.stack(got), case.outputs[name], RTOL, name)


@golden.check(lambda case: case.source.startswith("crowsonkb/k-diffusion") and "out/karras" in case)
def schedules(case):
    c = case.config
    n, ends = c["n"], (c["sigma_min"], c["sigma_max"])
    got = {
        "karras": timesteps.karras(n, *ends, rho=c.get("rho", 7.0)),
        "exponential": timesteps.exponential(n, *ends),
        "polyexponential": timesteps.polyexponential(n, *ends, rho=c.get("poly_rho", 1.0)),
        "vp": timesteps.vp(n, **c.get("vp", {})),
    }
    assert set(case.outputs) <= set(got)
    for name, want in case.outputs.items():
        assert_close(got[name], want, RTOL, name)


# -- EDM -------------------------------------------------------------------------------------------------------------


def edm_solver(function):
    def check(case):
        noise = draws(case)
        if case.config.get("S_churn", 0) > (2**0.5 - 1) * case.config.get("num_steps", 18):
            case.ignore("S_churn", why="at its cap of (sqrt(2) - 1) per step")
        got = function(toy_denoiser, case.inputs["latents"], **case.config, noise=lambda: next(noise))
        assert_close(got, case.outputs["x"], RTOL, "x")

    return check


golden.check(source("edm_sampler"))(edm_solver(solvers.edm_heun))
golden.check(source("ablation_sampler"))(edm_solver(solvers.edm_ablation))


@golden.check(source("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"))
def preconditioner(case):
    """EDM's four preconditioners are Denoisers: what the network is fed, told and taken to predict."""
    kind, c = case.source.split()[-1].removesuffix("Precond").lower(), case.config
    sigma, out = case.inputs["sigma"], dict(case.outputs)
    M, rounded, edm = c.get("M", 1000), sigma, {"name": "edm", "sigma_max": 1e6}

    def inner(x, c_noise):
        assert c_noise.shape == (len(x),)
        c_noise = c_noise.view(-1, 1, 1, 1)
        if kind == "iddpm":
            return torch.cat([0.3 * torch.tanh(x) + 0.001 * c_noise, x], dim=1)
        return 0.3 * torch.tanh(x) + 0.05 * c_noise

    if kind in ("edm", "ve") and {"sigma_min", "sigma_max"} & set(c):
        case.ignore("sigma_min", "sigma_max", why="what the network knows: D is the same")
    if kind == "edm":
        net = Denoiser(inner, edm | {"sigma_data": c.get("sigma_data", 0.5)}, "F", time="edm")
    elif kind == "vp":
        b, d = c.get("beta_min", 0.1), c.get("beta_d", 19.9)
        path = {"name": "vp", "beta_min": b, "beta_max": b + d, "t_min": c.get("epsilon_t", 1e-5)}
        net = Denoiser(inner, path, "eps", time_scale=M - 1)
    elif kind == "ve":  # its network predicts -eps and is told ln(sigma / 2)
        net = Denoiser(lambda x, t: -inner(x, t - np.log(2)), edm, "eps", time="log-sigma")
    else:
        u = iddpm_levels(M, c.get("C_1", 0.001), c.get("C_2", 0.008), torch.float32)
        assert_close(u, out.pop("u"), RTOL, "u")
        nearest = lambda s: (s.reshape(-1, 1) - u).abs().argmin(1)
        options = {"time": "sigma", "input_scale": "vp", "learned_sigma": True}
        net = Denoiser(lambda x, s: inner(x, (M - 1 - nearest(s)).float()), edm, "eps", **options)
        rounded = u[nearest(sigma)].reshape(sigma.shape)
    assert_close(net.denoise_ve(case.inputs["x"], sigma.flatten()), out.pop("D"), RTOL, "D")
    if "round_sigma" in out:
        assert_close(rounded, out.pop("round_sigma"), RTOL, "round_sigma")
    assert not out


class Given(Step):
    """A step whose draws are given."""

    def __init__(self, **draws):
        super().__init__(0)
        self.__dict__["draws"] = draws

    def randn(self, shape, name):
        return self.draws[name]

    def rand(self, n, name):
        return self.draws[name]


@golden.check(source("EDMLoss", "VPLoss", "VELoss"))
def loss(case):
    """EDM's three losses are configurations of the Gaussian objective."""
    kind, c = case.source.split()[-1].removesuffix("Loss").lower(), case.config
    rnd, options = case.inputs["rnd"].flatten(), {"weighting": "eps"}
    if kind == "edm":
        path = {"name": "edm", "sigma_data": c.get("sigma_data", 0.5)}
        options = {"weighting": "edm", "time_sampling": "edm-lognormal"}
        options |= {"time_mean": c.get("P_mean", -1.2), "time_std": c.get("P_std", 1.2)}
    elif kind == "vp":
        b, rnd = c.get("beta_min", 0.1), 1 - rnd.double()  # 0 is its noisiest
        path = {"name": "vp", "beta_min": b, "beta_max": b + c.get("beta_d", 19.9), "t_min": c.get("epsilon_t", 1e-5)}
    else:
        path = {"name": "ve", "sigma_min": c.get("sigma_min", 0.02), "sigma_max": c.get("sigma_max", 100.0)}
    asked = {"time": "sigma", "input_scale": "ve"}
    objective = objectives.GaussianObjective(toy_denoiser, path, "x0", **asked, **options)
    step, images = Given(t=rnd, noise=case.inputs["noise"]), case.inputs["images"]
    mean, _ = objective.loss("main", {"x": images}, step)
    t = objective.times(len(images), step)
    each, _ = objectives.gaussian_losses(objective.denoiser, images, t, case.inputs["noise"], options["weighting"])
    assert_close(each, case.outputs["loss_map"].flatten(1).mean(1), RTOL, "loss_map, per image")
    assert_close(mean, case.outputs["loss_map"].mean(), RTOL, "loss_map")


# -- diffusers -------------------------------------------------------------------------------------------------------

PREDICTIONS = {
    "epsilon": "eps",
    "sample": "x0",
    "original_sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "flow",
}


class Scheduler:
    """A diffusers configuration: its tables, its toy network, and the states after every step."""

    def __init__(self, case, **defaults):
        self.case = case
        self.defaults = defaults
        self.n, self.step = case.config["num_inference_steps"], case.config["step"]
        self.kind = PREDICTIONS[self.get("prediction_type", "epsilon")]
        self.inputs, self.noise = [], draws(case)
        self.total = self.get("num_train_timesteps", 1000)

    def get(self, key, default=None):
        """As the config says, read now: what no check asks for is reported."""
        value = self.case.config.get(key)
        return self.defaults.get(key, default) if value is None else value

    def alphas_cumprod(self):
        if self.get("trained_betas") is not None:
            betas = torch.tensor(self.get("trained_betas"), dtype=torch.float32)
        else:
            ends = (self.get("beta_start", 1e-4), self.get("beta_end", 0.02))
            betas = grids.betas(self.get("beta_schedule", "linear"), self.total, *ends)
        if self.get("rescale_betas_zero_snr"):
            betas = grids.zero_terminal_snr(betas)
        return torch.cumprod(1 - betas, 0)

    def clip(self):
        if self.get("thresholding"):
            ratio, top = self.get("dynamic_thresholding_ratio", 0.995), self.get("sample_max_value", 1.0)
            return lambda x: solvers.dynamic_threshold(x, ratio, top)
        if self.get("clip_sample", True):
            edge = self.get("clip_sample_range", 1.0)
            return lambda x: x.clamp(-edge, edge)
        return None

    def network(self, x, i):
        """The file's toy network at the i-th call."""
        t = self.times[i]
        return 0.3 * torch.tanh(x) + 0.001 * float(t)

    def both(self, x, i):
        """(x0, eps) of the toy network, read as the configuration says."""
        self.inputs.append(x)
        pred, a, s = self.network(x, i), self.alphas[i], self.sigmas[i]
        if self.kind == "eps":
            return (x - s * pred) / a, pred
        if self.kind == "x0":
            return pred, (x - a * pred) / s
        if self.kind == "v":
            return a * x - s * pred, a * pred + s * x
        return x - s * pred, x + (1 - s) * pred

    def x0(self, pred, x, sigma, raised):
        """Of an output at sigma, read at x in VE coordinates whose level is `raised`."""
        if self.kind == "eps":
            return x - raised * pred
        return pred if self.kind == "x0" else pred * (-sigma / (sigma**2 + 1) ** 0.5) + x / (sigma**2 + 1)

    def grid(self, times, alphas, sigmas):
        self.times, self.alphas, self.sigmas = times, alphas, sigmas
        assert_close(torch.as_tensor(np.asarray(times)).double(), self.case.outputs["timesteps"], 1e-6, "timesteps")

    def check(self, end):
        assert_close(torch.stack([*self.inputs[1:], end]), self.case.outputs["trajectory"], RTOL, "trajectory")


def ddpm_like(s):
    """Grid of DDIM and DDPM, and whether DDPM's convention for the previous step is used."""
    bars = s.alphas_cumprod()
    times = timesteps.spaced_timesteps(s.n, s.total, s.get("timestep_spacing", "leading"), s.get("steps_offset", 0))
    return bars, times


@golden.check(source("DDIMScheduler"))
def ddim(case):
    s = Scheduler(case)
    bars, times = ddpm_like(s)
    final = torch.tensor(1.0) if s.get("set_alpha_to_one", True) else bars[0]
    x, step = case.inputs["x_T"], s.step
    # every step goes down by the same stride, whatever the spacing's rounding
    for t in times:
        before = int(t) - s.total // s.n
        pair = torch.stack([bars[int(t)], bars[before] if before >= 0 else final])
        s.times, s.alphas, s.sigmas = [t], pair.sqrt(), (1 - pair).sqrt()
        x = solvers.ddim(
            s.both,
            x,
            s.alphas,
            s.sigmas,
            eta=step.get("eta", 0.0),
            clip=s.clip(),
            use_clipped_eps=step.get("use_clipped_model_output", False),
            noise=lambda: next(s.noise),
        )
    s.grid(times, s.alphas, s.sigmas)
    s.check(x)


@golden.check(source("DDPMScheduler"))
def ddpm(case):
    s = Scheduler(case)
    bars, times = ddpm_like(s)
    grid = torch.cat([bars[times.copy()], torch.ones(1)])
    s.grid(times, grid.sqrt(), (1 - grid).sqrt())
    end = solvers.ddpm(
        s.both,
        case.inputs["x_T"],
        s.alphas,
        s.sigmas,
        variance=s.get("variance_type", "fixed_small"),
        clip=s.clip(),
        final_noise=bool(times[-1] > 0),
        noise=lambda: next(s.noise),
    )
    s.check(end)


def multistep_grid(s, unipc):
    """Timesteps and sigmas (in VE coordinates, or flow's) of DPM-Solver and UniPC."""
    n, bars = s.n, s.alphas_cumprod()
    if s.get("rescale_betas_zero_snr"):
        bars[-1] = 2**-24
    levels = (((1 - bars) / bars) ** 0.5).numpy()
    log_levels = np.log(levels)
    ends = (s.get("sigma_min") or levels[0].item(), s.get("sigma_max") or levels[-1].item())
    last = float(levels[0]) if s.get("final_sigmas_type", "zero") == "sigma_min" else 0.0
    schedule = next((k for k in ("karras", "exponential", "beta") if s.get(f"use_{k}_sigmas")), None)
    flow, cosine = s.get("use_flow_sigmas", False), s.get("beta_schedule") == "squaredcos_cap_v2"
    if schedule:
        sigmas = grids.respace_sigmas(*ends, n, schedule)
        if flow and unipc and schedule == "karras":
            sigmas = sigmas / (sigmas + 1)
            times = sigmas * s.total
        else:
            times = np.array([grids.timestep_of_sigma(v, log_levels) for v in sigmas])
            if schedule == "karras" and (unipc or not cosine):
                times = times.round()
        last = last if not unipc or last == 0 else sigmas[-1]
    elif s.get("use_lu_lambdas"):
        sigmas = np.exp(np.linspace(log_levels[-1].item(), log_levels[0].item(), n))
        times = np.array([grids.timestep_of_sigma(v, log_levels) for v in sigmas])
        times = times if cosine else times.round()
    elif flow:
        shift = s.get("flow_shift", 1.0)
        if unipc:
            mu = s.get("mu") if s.get("use_dynamic_shifting") else None
            more = (mu, s.get("time_shift_type", "exponential"), s.get("shift_terminal"))
            sigmas = grids.unipc_flow_sigmas(n, s.total, shift, *more)
        else:
            sigmas = grids.dpm_flow_sigmas(n, s.total, shift)
        times = sigmas * s.total
        last = last if not unipc or last == 0 else sigmas[-1]
    else:
        clipped = s.get("lambda_min_clipped", -np.inf)
        below = None
        if not unipc and np.isfinite(clipped):
            below = s.total - int(np.searchsorted(-log_levels[::-1], clipped))
        spacing, offset = s.get("timestep_spacing", "linspace"), s.get("steps_offset", 0)
        times = grids.multistep_timesteps(n, s.total, spacing, offset, below)
        sigmas = np.interp(times, np.arange(len(levels)), levels)
    sigmas = torch.from_numpy(np.append(sigmas, last).astype(np.float32))
    if "out/sigmas" in s.case:
        assert_close(sigmas, s.case.outputs["sigmas"], RTOL, "sigmas")
    alphas = 1 - sigmas if flow else 1 / (sigmas**2 + 1) ** 0.5
    s.grid(times.astype(np.int64), alphas, sigmas if flow else sigmas * alphas)


def thresholded(s, both):
    if not s.get("thresholding"):
        return both
    clip = s.clip()

    def predict(x, i):
        x0 = clip(both(x, i)[0])
        return x0, (x - s.alphas[i] * x0) / s.sigmas[i]

    return predict


@golden.check(source("DPMSolverMultistepScheduler"))
def dpm_solver(case):
    s = Scheduler(case)
    multistep_grid(s, unipc=False)
    if s.n < 15 and s.get("lower_order_final", True):
        case.ignore("euler_at_final", why="fewer than 15 steps end in first order anyhow")
    end = solvers.dpm_solver(
        thresholded(s, s.both),
        case.inputs["x_T"],
        s.alphas,
        s.sigmas,
        order=s.get("solver_order", 2),
        algorithm=s.get("algorithm_type", "dpmsolver++"),
        solver_type=s.get("solver_type", "midpoint"),
        lower_order_final=s.get("lower_order_final", True),
        euler_at_final=s.get("euler_at_final", False),
        noise=lambda: next(s.noise),
    )
    s.check(end)


@golden.check(source("UniPCMultistepScheduler"))
def unipc(case):
    s = Scheduler(case)
    multistep_grid(s, unipc=True)
    end = solvers.unipc(
        thresholded(s, s.both) if s.get("predict_x0", True) else s.both,
        case.inputs["x_T"],
        s.alphas,
        s.sigmas,
        order=s.get("solver_order", 2),
        solver_type=s.get("solver_type", "bh2"),
        predict_x0=s.get("predict_x0", True),
        lower_order_final=s.get("lower_order_final", True),
        disable_corrector=s.get("disable_corrector", ()),
    )
    s.check(end)


def level_grid(s):
    """Timesteps, sigmas and the first state's scale of Euler and Heun."""
    bars = s.alphas_cumprod()
    if s.get("rescale_betas_zero_snr"):
        bars[-1] = 2**-24
    levels = (((1 - bars) / bars) ** 0.5).numpy()
    spacing = s.get("timestep_spacing", "linspace")
    times = grids.euler_timesteps(s.n, s.total, spacing, s.get("steps_offset", 0))
    if s.get("interpolation_type") == "log_linear":
        ends = np.log(levels[-1]).item(), np.log(levels[0]).item()
        sigmas = torch.linspace(*ends, s.n + 1).exp().numpy()
    else:
        sigmas = np.interp(times, np.arange(len(levels)), levels)
    schedule = next((k for k in ("karras", "exponential", "beta") if s.get(f"use_{k}_sigmas")), None)
    if schedule:
        ends = (s.get("sigma_min") or sigmas[-1].item(), s.get("sigma_max") or sigmas[0].item())
        sigmas = grids.respace_sigmas(*ends, s.n, schedule)
        times = np.array([grids.timestep_of_sigma(v, np.log(levels)) for v in sigmas])
    last = levels[0] if s.get("final_sigmas_type") == "sigma_min" else 0.0
    sigmas = torch.from_numpy(np.append(sigmas, last).astype(np.float32))
    if s.get("timestep_type") == "continuous" and s.kind == "v":
        times = 0.25 * sigmas[:-1].log().numpy()
    top = sigmas.max()
    scale = top if spacing in ("linspace", "trailing") else (top**2 + 1) ** 0.5
    return times.astype(np.float32), sigmas, s.case.inputs["x_T"] * scale


@golden.check(source("EulerDiscreteScheduler"))
def euler_discrete(case):
    s = Scheduler(case)
    times, sigmas, x = level_grid(s)
    if "out/sigmas" in case:
        assert_close(sigmas, case.outputs["sigmas"], RTOL, "sigmas")
    s.grid(times, None, sigmas)

    s_min, s_max, s_noise = s.step.get("s_tmin", 0.0), s.step.get("s_tmax", float("inf")), s.step.get("s_noise", 1.0)
    drawn = []

    def noise():
        """k-diffusion draws at every step, diffusers where the noise is used."""
        used = s_min <= sigmas[len(s.inputs)] <= s_max
        drawn.append(next(s.noise) if used else torch.zeros_like(x))
        return drawn[-1]

    def denoise(raised, sigma_hat):
        """diffusers' network sees x before the churn's noise."""
        i, sigma_hat = len(s.inputs), sigma_hat[0]
        added = drawn.pop() * s_noise * (sigma_hat**2 - sigmas[i] ** 2) ** 0.5 if drawn else 0.0
        s.inputs.append(raised - added)
        pred = s.network(s.inputs[-1] / (sigmas[i] ** 2 + 1) ** 0.5, i)
        return s.x0(pred, raised, sigmas[i], sigma_hat)

    keywords = options(solvers.K_DIFFUSION["euler"], s.step)
    s.check(solvers.K_DIFFUSION["euler"](denoise, x, sigmas, noise=noise, **keywords))


@golden.check(source("HeunDiscreteScheduler"))
def heun_discrete(case):
    s = Scheduler(case, beta_start=0.00085, beta_end=0.012, clip_sample=False)
    times, sigmas, x = level_grid(s)
    # the file lists both evaluations of a step
    if "out/sigmas" in case:
        twice = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
        assert_close(twice, case.outputs["sigmas"], RTOL, "sigmas")
    s.grid(np.concatenate([times[:1], times[1:].repeat(2)]), None, None)
    calls, clip = itertools.count(), s.clip()

    def denoise(x, sigma):
        s.inputs.append(x)
        sigma = sigma[0]
        pred = s.network(x / (sigma**2 + 1) ** 0.5, next(calls))
        x0 = s.x0(pred, x, sigma, sigma)
        return x0 if clip is None else clip(x0)

    s.check(solvers.K_DIFFUSION["heun"](denoise, x, sigmas))


@golden.check(source("FlowMatchEulerDiscreteScheduler"))
def flow_euler(case):
    s = Scheduler(case)
    mu = s.get("mu") if s.get("use_dynamic_shifting") else None
    sigmas = timesteps.flow_sigmas(s.n, s.total, s.get("shift", 1.0), mu, s.get("time_shift_type", "exponential"))
    if s.get("shift_terminal"):
        sigmas = grids.stretch_to_terminal(sigmas, s.get("shift_terminal"))
    schedule = next((k for k in ("karras", "exponential", "beta") if s.get(f"use_{k}_sigmas")), None)
    if schedule:
        sigmas = grids.respace_sigmas(sigmas[-1].item(), sigmas[0].item(), s.n, schedule)
    sigmas = torch.from_numpy(sigmas).float()
    end = torch.zeros(1)
    if s.get("invert_sigmas"):
        sigmas, end = 1 - sigmas, torch.ones(1)
    times, sigmas = sigmas * s.total, torch.cat([sigmas, end])
    if "out/sigmas" in case:
        assert_close(sigmas, case.outputs["sigmas"], RTOL, "sigmas")
    s.grid(times, None, sigmas)

    def velocity(x, i):
        s.inputs.append(x)
        return s.network(x, i)

    stochastic = s.get("stochastic_sampling", False)
    noise = lambda: next(s.noise)
    s.check(solvers.flow_euler(velocity, case.inputs["x_T"], sigmas, stochastic=stochastic, noise=noise))


def test_golden(golden_case):
    golden.run(golden_case)


@pytest.mark.parametrize("q", [0.0, 0.01, 0.3, 0.5, 0.77, 0.999, 1.0])
def test_beta_quantile_is_scipys(q):
    stats = pytest.importorskip("scipy.stats")
    assert grids.beta_quantile(q, 0.6, 0.6) == pytest.approx(stats.beta.ppf(q, 0.6, 0.6), abs=1e-10)
