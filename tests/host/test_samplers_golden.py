"""Golden checks of the samplers: k-diffusion, EDM, and diffusers' schedulers, on the files' toy networks."""

import inspect
import itertools

import numpy as np
import pytest
import torch

from vgm_cli.diffusion import edm, solvers, timesteps
from vgm_cli.diffusion.solvers.common import ancestral_step as ancestral_level
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
    kind = case.source.split()[-1].removesuffix("Precond").lower()

    def inner(x, c_noise):
        assert c_noise.shape == (len(x),)
        c_noise = c_noise.view(-1, 1, 1, 1)
        if kind == "iddpm":
            return torch.cat([0.3 * torch.tanh(x) + 0.001 * c_noise, x], dim=1)
        return 0.3 * torch.tanh(x) + 0.05 * c_noise

    make = edm.PRECONDITIONERS[kind]
    net = make(inner, **options(make, case.config))
    sigma, out = case.inputs["sigma"], dict(case.outputs)
    assert_close(net(case.inputs["x"], sigma), out.pop("D"), RTOL, "D")
    if "round_sigma" in out:
        assert_close(net.round_sigma(sigma), out.pop("round_sigma"), RTOL, "round_sigma")
    if "u" in out:
        assert_close(net.u, out.pop("u"), RTOL, "u")
    assert not out


@golden.check(source("EDMLoss", "VPLoss", "VELoss"))
def loss(case):
    kind = case.source.split()[-1].removesuffix("Loss").lower()
    levels = {"edm": edm.edm_levels, "vp": edm.vp_training_levels, "ve": edm.ve_levels}[kind]
    sigma = levels(case.inputs["rnd"].flatten(), **options(levels, case.config))
    weight = edm.edm_weight(sigma, case.config.get("sigma_data", 0.5)) if kind == "edm" else 1 / sigma**2
    got = edm.denoising_loss(toy_denoiser, case.inputs["images"], sigma, case.inputs["noise"], weight)
    assert_close(got, case.outputs["loss_map"], RTOL, "loss_map")


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
            betas = timesteps.betas(self.get("beta_schedule", "linear"), self.total, *ends)
        if self.get("rescale_betas_zero_snr"):
            betas = timesteps.zero_terminal_snr(betas)
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
        sigmas = timesteps.respace_sigmas(*ends, n, schedule)
        if flow and unipc and schedule == "karras":
            sigmas = sigmas / (sigmas + 1)
            times = sigmas * s.total
        else:
            times = np.array([timesteps.timestep_of_sigma(v, log_levels) for v in sigmas])
            if schedule == "karras" and (unipc or not cosine):
                times = times.round()
        last = last if not unipc or last == 0 else sigmas[-1]
    elif s.get("use_lu_lambdas"):
        sigmas = np.exp(np.linspace(log_levels[-1].item(), log_levels[0].item(), n))
        times = np.array([timesteps.timestep_of_sigma(v, log_levels) for v in sigmas])
        times = times if cosine else times.round()
    elif flow:
        shift = s.get("flow_shift", 1.0)
        if unipc:
            mu = s.get("mu") if s.get("use_dynamic_shifting") else None
            more = (mu, s.get("time_shift_type", "exponential"), s.get("shift_terminal"))
            sigmas = timesteps.unipc_flow_sigmas(n, s.total, shift, *more)
        else:
            sigmas = timesteps.dpm_flow_sigmas(n, s.total, shift)
        times = sigmas * s.total
        last = last if not unipc or last == 0 else sigmas[-1]
    else:
        clipped = s.get("lambda_min_clipped", -np.inf)
        below = None
        if not unipc and np.isfinite(clipped):
            below = s.total - int(np.searchsorted(-log_levels[::-1], clipped))
        spacing, offset = s.get("timestep_spacing", "linspace"), s.get("steps_offset", 0)
        times = timesteps.multistep_timesteps(n, s.total, spacing, offset, below)
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
    times = timesteps.euler_timesteps(s.n, s.total, spacing, s.get("steps_offset", 0))
    if s.get("interpolation_type") == "log_linear":
        ends = np.log(levels[-1]).item(), np.log(levels[0]).item()
        sigmas = torch.linspace(*ends, s.n + 1).exp().numpy()
    else:
        sigmas = np.interp(times, np.arange(len(levels)), levels)
    schedule = next((k for k in ("karras", "exponential", "beta") if s.get(f"use_{k}_sigmas")), None)
    if schedule:
        ends = (s.get("sigma_min") or sigmas[-1].item(), s.get("sigma_max") or sigmas[0].item())
        sigmas = timesteps.respace_sigmas(*ends, s.n, schedule)
        times = np.array([timesteps.timestep_of_sigma(v, np.log(levels)) for v in sigmas])
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

    def output(x, i):
        s.inputs.append(x * (sigmas[i] ** 2 + 1) ** 0.5)
        return s.network(x, i)

    step = options(solvers.euler_discrete, s.step)
    s.check(solvers.euler_discrete(output, x, sigmas, prediction=s.kind, noise=lambda: next(s.noise), **step))


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
        if s.kind == "eps":
            x0 = x - sigma * pred
        else:
            x0 = pred if s.kind == "x0" else pred * (-sigma / (sigma**2 + 1) ** 0.5) + x / (sigma**2 + 1)
        return x0 if clip is None else clip(x0)

    s.check(solvers.K_DIFFUSION["heun"](denoise, x, sigmas))


@golden.check(source("FlowMatchEulerDiscreteScheduler"))
def flow_euler(case):
    s = Scheduler(case)
    mu = s.get("mu") if s.get("use_dynamic_shifting") else None
    sigmas = timesteps.flow_sigmas(s.n, s.total, s.get("shift", 1.0), mu, s.get("time_shift_type", "exponential"))
    if s.get("shift_terminal"):
        sigmas = timesteps.stretch_to_terminal(sigmas, s.get("shift_terminal"))
    schedule = next((k for k in ("karras", "exponential", "beta") if s.get(f"use_{k}_sigmas")), None)
    if schedule:
        sigmas = timesteps.respace_sigmas(sigmas[-1].item(), sigmas[0].item(), s.n, schedule)
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
    assert timesteps.beta_quantile(q, 0.6, 0.6) == pytest.approx(stats.beta.ppf(q, 0.6, 0.6), abs=1e-10)
