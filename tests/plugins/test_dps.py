"""DPS against DPS2022/diffusion-posterior-sampling@effbde7 (golden cases); the others against closed forms."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vgm_plugins.dps import conditioning, linear, official
from vgm_plugins.dps.prior import prior_of
from vgm_plugins.dps.sampler import DPS, MCG

from vgm_cli import recipe as recipes
from vgm_cli.api import Request, generators
from vgm_cli.diffusion.denoiser import Denoiser, convert
from vgm_cli.diffusion.discrete import Mean
from vgm_cli.errors import VgmError
from vgm_cli.operators.base import Operator
from vgm_cli.operators.inpainting import Inpainting, box_mask, random_mask
from vgm_cli.operators.motion import MotionDeblurring
from vgm_cli.operators.noise import Clean, Gaussian, Poisson
from vgm_cli.operators.phase import PhaseRetrieval
from vgm_cli.operators.resize import matrix, output_size, taps
from vgm_cli.operators.separable import Denoising, GaussianDeblurring, SuperResolution, apply
from vgm_cli.registry import registry
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, assert_close
from vgm_cli.validation import check

golden = GoldenChecks("dps")

KERNEL_NAMES = {"None": "cubic"}
MEANS: dict[str, Mean] = {"epsilon": "eps", "start_x": "x0", "previous_x": "x_prev"}


def bound(operator: Operator, shape: Any, mask: Tensor | None = None) -> Any:
    """For one image of shape (..., C, H, W), with a given mask."""
    made: Any = operator.bind(tuple(shape)[-3:], generators([0]))
    if mask is not None:
        made.masks = mask
    return made


# -- golden cases: operators ------------------------------------------------------------------------------------------


def operator_of(case: GoldenCase) -> Any:
    shape, config = case.inputs["x"].shape, case.config
    if "scale_factor" in config:
        assert tuple(config["in_shape"]) == tuple(shape)
        return bound(SuperResolution(config["scale_factor"]), shape)
    if "oversample" in config:
        return bound(PhaseRetrieval(config["oversample"]), shape)
    if "mask" in case.inputs:
        return bound(Inpainting(), shape, case.inputs["mask"])
    if "kernel" in case.inputs:
        assert case.inputs["kernel"].shape == (config["kernel_size"],) * 2
        case.ignore("intensity", "np_seed", why="the kernel is stored: what draws it depends on the release of Pillow")
        made = bound(MotionDeblurring(config["kernel_size"], config["intensity"]), shape)
        made.use(case.inputs["kernel"][None, None])
        return made
    return bound(GaussianDeblurring(config["kernel_size"], config["intensity"]), shape)


@golden.check(lambda c: "out/A" in c)
def operators(case: GoldenCase) -> None:
    operator, x = operator_of(case), case.inputs["x"]
    y = operator(x) if "scale_factor" in case.config else x  # a measurement, for what takes one
    z = case.inputs.get("z")
    got: dict[str, Callable[[], Tensor]] = {
        "A": lambda: operator(x),
        "transpose": lambda: official.transpose(operator, y),
        "ortho_project": lambda: official.ortho_project(operator, x),
        "project": lambda: official.project(operator, z, y),
        "kernel": lambda: operator.kernel()[None, None],
        "pad": lambda: torch.tensor(operator.pad),
        "weights0": lambda: torch.from_numpy(first_taps(case)[0].T),
        "fov0": lambda: torch.from_numpy(first_taps(case)[1].T),
    }
    for key, want in case.outputs.items():
        if key.startswith("mask_"):
            got[key] = lambda key=key, like=want: mask_of(case, key.removeprefix("mask_")).expand_as(like)
        assert_close(got[key](), want, 0 if key in ("fov0", "pad") or key.startswith("mask_") else 1e-5, key)


def first_taps(case: GoldenCase) -> tuple[np.ndarray, np.ndarray]:
    n, scale = case.config["in_shape"][2], 1 / case.config["scale_factor"]
    return taps(n, output_size(n, scale), scale)


def mask_of(case: GoldenCase, kind: str) -> Tensor:
    n, rng = case.config["image_size"], np.random.RandomState(case.config["np_seed"])
    if kind == "random":
        return random_mask(n, n, tuple(case.config["random"]), rng)
    margin = tuple(case.config["margin"])
    mask = box_mask(n, n, tuple(case.config[kind]), margin, rng)
    return 1 - mask if kind == "extreme" else mask


@golden.check(
    lambda c: (
        bool(c.outputs)
        and all(re.fullmatch(r"\w+?(_noaa)?_[\d.]+", k) and not k.startswith("poisson") for k in c.outputs)
    )
)
def resizer(case: GoldenCase) -> None:
    x = case.inputs["x"]
    for key, want in case.outputs.items():
        name, antialias, scale = re.fullmatch(r"(\w+?)(_noaa)?_([\d.]+)", key).groups()  # type: ignore[union-attr]
        rows, columns = (
            torch.from_numpy(
                matrix(n, output_size(n, float(scale)), float(scale), KERNEL_NAMES.get(name, name), not antialias)
            )
            for n in x.shape[-2:]
        )
        assert_close(apply(x, (None, rows, columns))[..., : want.shape[2], : want.shape[3]], want, 1e-5, key)


@golden.check(lambda c: any(k.startswith("poisson_rate") for k in c.outputs))
def poisson_noise(case: GoldenCase) -> None:
    for key, want in case.outputs.items():
        if not key.startswith("poisson_rate"):
            continue
        noise = Poisson(float(key.removeprefix("poisson_rate").replace("_", ".")))
        got = noise.draw(case.inputs["x"], np.random.RandomState(case.config["np_seed"]))
        assert got.dtype == want.dtype
        assert_close(got, want, 0, key)


# -- golden cases: conditioning ---------------------------------------------------------------------------------------


def projection_of(operator: Operator) -> conditioning.Project:
    return lambda x, y: official.project(operator, x, y)


@golden.check(lambda c: "in/x_prev" in c)
def conditioning_steps(case: GoldenCase) -> None:
    i, config = case.inputs, case.config
    a, b = (float(v) for v in re.search(r"tanh\(([\d.]+)\*x_prev\) - ([\d.]+)\*x_prev", case.notes).groups())  # type: ignore[union-attr]
    operators = {
        "inp": lambda: bound(Inpainting(), i["x_t"].shape, i["mask"]),
        "sr": lambda: bound(SuperResolution(config["sr"]), i["x_t"].shape),
        "blur": lambda: bound(GaussianDeblurring(*config["blur"]), i["x_t"].shape),
        "noise": lambda: bound(Denoising(), i["x_t"].shape),
    }
    for key, want in case.outputs.items():
        if key.startswith("norm_"):
            continue
        method, name, noise = key.split("_")
        operator = operators[name]()
        low = "_lr" if name == "sr" else ""
        x_prev = i["x_prev"].clone().requires_grad_(True)
        x0 = torch.tanh(a * x_prev) - b * x_prev
        y, y_t, zeta = i["y" + low], i["ny" + low], config["scale"]
        project = projection_of(operator)
        if method == "vanilla":
            got, norm = i["x_t"], None
        elif method == "projection":
            got, norm = project(i["x_t"], y_t), None
        elif method == "ps+":
            draws = next(v for v in i.values() if v.shape[1:] == x0.shape)
            got, norm = conditioning.posterior_sampling_plus(operator, x_prev, i["x_t"], x0, y, zeta, list(draws))
        elif method == "mcg":
            got, norm = conditioning.manifold_constrained(operator, x_prev, i["x_t"], x0, y, y_t, zeta, noise, project)
        else:
            assert method == "ps"
            got, norm = conditioning.posterior_sampling(operator, x_prev, i["x_t"], x0, y, zeta, noise)
        assert_close(got, want, 1e-5, key)
        if norm is not None:
            assert_close(norm[0], case.outputs[f"norm_{key}"], 1e-5, f"norm of {key}")


def toy_of(case: GoldenCase, learned: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The network that the notes state: eps(x,t)=…, or what else it predicts, and variance channels …"""
    stated = dict(re.findall(r"(\w+)\(x, ?t\) ?= ?(\S+?)[,;.]?(?=\s|$)", case.notes))
    names = {"start_x": ("x0", "x_0", "xstart", "x_start", "start_x", "pred_xstart"), "epsilon": ("eps", "epsilon")}
    own = [stated[k] for k in names.get(case.config["model_mean_type"], ()) if k in stated]
    mean = own[0] if own else next(iter(stated.values()))
    variance = re.search(r"variance channels ([^\s;]+)", case.notes)[1] if learned else ""  # type: ignore[index]
    functions = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "sin": torch.sin, "cos": torch.cos, "__builtins__": {}}

    def network(x: Tensor, t: Tensor) -> Tensor:
        names = {**functions, "x": x, "t": t.to(x.dtype).view(-1, 1, 1, 1)}
        prediction = eval(mean, names)
        return torch.cat([prediction, eval(variance, names)], dim=1) if learned else prediction

    return network


@pytest.mark.parametrize(
    ("predicts", "stated"),
    [("start_x", "x0(x,t)=0.8*tanh(x)-0.0001*t"), ("start_x", "eps(x,t)=0.3*x, or x0(x, t) = 0.8*tanh(x)-0.0001*t")],
)
def test_a_toy_network_is_the_one_that_the_notes_state(predicts: str, stated: str) -> None:
    notes = f"toy model returns {stated} concatenated with variance channels 0.5*sin(x); t is the ORIGINAL index."
    case: Any = SimpleNamespace(notes=notes, config={"model_mean_type": predicts})
    x, t = torch.linspace(-1, 1, 3).view(1, 3, 1, 1), torch.tensor([40])
    want = 0.8 * torch.tanh(x) - 0.004
    assert_close(toy_of(case, False)(x, t), want, 1e-6)
    assert_close(toy_of(case, True)(x, t), torch.cat([want, 0.5 * x.sin()], 1), 1e-6)


class Drawn(Request):
    """A request whose standard normal draws are given."""

    def __init__(self, draws: Iterator[Tensor], n: int, **keywords: Any):
        super().__init__(generators=generators(range(n)), **keywords)
        self.draws = draws

    def randn(self, shape: tuple[int, ...] | None = None) -> Tensor:
        return next(self.draws)


@golden.check(lambda c: "out/trajectory" in c)
def trajectories(case: GoldenCase) -> None:
    """The shipped samplers on a view of the toy network, every draw given."""
    config, i = case.config, case.inputs
    learned = config["model_var_type"].startswith("learned")
    path = {"name": "vp-discrete", "schedule": config["noise_schedule"], "steps": config["steps"]}
    scale = 1000 / config["steps"] if config["rescale_timesteps"] else 1.0
    if config["steps"] == 1000:
        case.ignore("rescale_timesteps", why="it multiplies by 1000 / steps, which is 1 here")
    mean = MEANS[config["model_mean_type"]]
    view = Denoiser(toy_of(case, learned), path, mean, time="index", time_scale=scale, learned_sigma=learned)
    shape = i["x_start"].shape
    size, std = re.search(r"gaussian (\d+)x\d+ std ([\d.]+)", case.notes).groups()  # type: ignore[union-attr]
    factor = re.search(r"factor (\d+)", case.notes)[1]  # type: ignore[index]
    operator = {
        "inp": lambda: bound(Inpainting(), shape, i["mask"]),
        "sr": lambda: bound(SuperResolution(int(factor)), shape),
        "blur": lambda: bound(GaussianDeblurring(int(size), float(std)), shape),
        "noise": lambda: bound(Denoising(), shape),
    }[config["operator"]]()
    operator.noise = {"gaussian": Gaussian(), "poisson": Poisson()}[config["noise"]]
    keywords = {
        "steps": config["timestep_respacing"],
        "zeta": config["scale"],
        "sampler": {"ddpm": "ddpm", "ddim": "ddim"}[config["sampler"]],
        "eta": config.get("eta", 0.0),
        "clip": config["clip_denoised"],
        "dynamic_threshold": config["dynamic_threshold"],
        "variance": config["model_var_type"],
    }
    sampler = {"ps": DPS, "mcg": lambda **k: MCG(**k, projection="official")}[config["method"]](**keywords)
    draws = [i["x_start"]]
    for k, p in enumerate(i["noise_p"]):
        draws += [p, i["noise_q"][k]] if config["method"] == "mcg" else [p]
    x: list[Tensor] = []
    request = Drawn(
        iter(draws),
        1,
        shape=tuple(shape[1:]),
        operator=operator,
        measurement=i["y"],
        callback=lambda k, total, x_t, x0: x.append(x_t),
    )
    prior = sampler.prior(view, request, operator)
    assert_close(torch.from_numpy(prior.process.betas), case.outputs["betas"], 1e-9, "betas")
    assert prior.process.timestep_map == case.outputs["timestep_map"].tolist()
    final = sampler(view, request)
    assert_close(torch.stack(x[:: config["trajectory_every"]]), case.outputs["trajectory"], 1e-4, "trajectory")
    assert_close(final, case.outputs["x"], 1e-4, "x")
    assert_close(torch.cat(request.info["residual"]), case.outputs["distance"], 1e-4, "distance")
    assert request.info["nfe"] == len(x) == len(prior.process.timestep_map)


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


# -- priors -----------------------------------------------------------------------------------------------------------

SHAPE = (1, 8, 8)
SPREAD = 0.6  # standard deviation of the Gaussian data of the closed forms


def shrink(alpha: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x_t] = shrink x_t of data N(0, SPREAD^2)."""
    return alpha * SPREAD**2 / ((alpha * SPREAD) ** 2 + sigma**2)


def gaussian_view(path: Any, prediction: str, **keywords: Any) -> Denoiser:
    """The exact network of Gaussian data for any path and prediction."""
    made: Denoiser = Denoiser(lambda x, t, **cond: x, path, prediction, **keywords)

    def network(x: Tensor, told: Tensor, **cond: Any) -> Tensor:
        t = made.path.t_of_timestep(told) if made.time == "index" else told.double()
        alpha, sigma = (v.view(-1, 1, 1, 1) for v in (made.path.alpha(t), made.path.sigma(t)))
        if made.input_scale == "edm":
            x = x * (sigma**2 + made.sigma_data**2).sqrt()
        x0 = shrink(alpha, sigma) * x.double()
        return convert(x0, x.double(), t, made.path, "x0", prediction, made.sigma_data).float()

    made.network = network
    return made


def request_for(operator: Operator, y: Tensor, seeds: Any, **keywords: Any) -> Request:
    return Request(shape=SHAPE, generators=generators(seeds), operator=operator, measurement=y, **keywords)


def measured(name: str, n: int = 3, sigma: float = 0.05, **options: Any) -> tuple[Any, Tensor, Tensor]:
    """(operator, truth, measurement) of n items."""
    truth = SPREAD * torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(9))
    made = registry().build("operator", {"name": name, **options})
    operator = made.bind(SHAPE, generators(range(n)), Gaussian(sigma) if sigma else Clean())
    return operator, truth, operator.noise(operator(truth), generators(range(n)))


DISCRETE = gaussian_view("vp-discrete", "eps", time="index")
EXACT = gaussian_view("vp-discrete", "x0", time="index")  # x0 from eps loses digits at the noisy end
OTHERS = {
    "flow": gaussian_view("linear", "velocity"),
    "vp": gaussian_view({"name": "vp", "beta_max": 20.5, "t_min": 1e-5}, "score"),
    "ve": gaussian_view({"name": "ve", "sigma_min": 0.005, "sigma_max": 170.0}, "x0"),
    "edm": gaussian_view({"name": "edm", "sigma_max": 170.0}, "F", time="sigma"),
    "v": gaussian_view("cosine", "v"),
    "discrete-v": gaussian_view("vp-discrete", "v", time="index"),
}


SAME: dict[str, Any] = {"dps": {"variance": "fixed_small", "zeta": 1.0}}  # what the path would decide


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("method", ["dps", "ddrm", "pigdm", "diffpir"])
def test_every_path_is_the_same_prior(name: str, method: str) -> None:
    """The same data seen by networks of other paths: restored alike, from the same draws."""
    operator, _, y = measured("super-resolution", scale=2)
    sampler = registry().build("sampler", {"name": method, "steps": 12, **SAME.get(method, {})})
    want = sampler(DISCRETE, request_for(operator, y, range(3)))
    got = sampler(OTHERS[name], request_for(operator, y, range(3)))
    assert_close(got, want, 2e-3, f"{method} on {name}")


def test_a_prior_without_much_noise_starts_where_it_can() -> None:
    """EDM's 80 is below DDPM's 157: the chain begins at the last step that the network knows."""
    prior = prior_of(gaussian_view({"name": "edm", "sigma_max": 80.0}, "F", time="sigma"), 10, {})
    assert prior.level(prior.steps - 1) <= 80 and prior.level(0) < 0.02
    assert prior_of(DISCRETE, 10, {}).level(9) > 150
    with pytest.raises(VgmError, match="diffusion or flow network") as e:
        prior_of(torch.nn.Identity(), 10, {})
    assert e.value.code == 2


# -- methods ----------------------------------------------------------------------------------------------------------

METHODS = ("dps", "mcg", "projection", "ddrm", "pigdm", "diffpir")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", ["inpainting", "super-resolution", "motion-deblurring"])
def test_items_do_not_depend_on_their_batch(method: str, task: str) -> None:
    options = (
        {"kernel_size": 5} if task == "motion-deblurring" else {"box": 3, "margin": 1} if task == "inpainting" else {}
    )
    made = registry().build("operator", {"name": task, **options})
    sampler = registry().build("sampler", {"name": method, "steps": 6})

    def run(items: range) -> Tensor:
        operator = made.bind(SHAPE, generators(items), Gaussian(0.05))
        y = operator(torch.stack([SPREAD * torch.randn(SHAPE, generator=g) for g in generators(items)]))
        torch.manual_seed(len(items))
        request = request_for(operator, y, items)
        out = sampler(OTHERS["flow"], request)
        assert len(request.info["residual"]) == 6 and request.info["residual"][0].shape == (len(items),)
        return out

    together = run(range(3))
    assert_close(torch.cat([run(range(1)), run(range(1, 3))]), together, 1e-4, method)


@pytest.mark.parametrize("method", METHODS)
def test_residuals_fall(method: str) -> None:
    """Restoring brings the estimate closer to the measurement than the prior alone is, and near the truth."""
    operator, truth, y = measured("inpainting", 16, mask="random", removed=0.5)
    request = request_for(operator, y, range(16))
    steps = 150 if method in ("dps", "mcg", "projection") else 40
    x = registry().build("sampler", {"name": method, "steps": steps})(DISCRETE, request)
    first, last = request.info["residual"][0].mean(), request.info["residual"][-1].mean()
    assert last < 0.45 * first
    seen = operator.masks.expand_as(x) > 0
    assert (x - truth)[seen].square().mean() < 0.3 * (truth[seen]).square().mean()


def test_ddrm_keeps_the_marginals() -> None:
    """With a network that knows the truth, every coefficient has exactly the noise of its level (the paper's
    proposition 3.1), whether it is measured better, worse or not at all."""
    n = 20_000
    g = torch.Generator().manual_seed(0)
    truth, sigma_y = torch.rand(3, n, generator=g), 0.5
    s = torch.tensor([0.0, 0.4, 2.0])[:, None]  # unmeasured; noise-to-signal 1.25; 0.25
    nsr = torch.tensor([math.inf, 1.25, 0.25])
    ybar = torch.where(s > 0, truth + nsr[:, None].nan_to_num(posinf=0) * torch.randn(3, n, generator=g), 0)
    levels = [3.0, 2.0, 1.0, 0.6, 0.2, 0.1, 0.0]
    xbar = linear.ddrm_start(ybar, s, levels[0], sigma_y, torch.randn(3, n, generator=g))
    known = s[:, 0] > 0
    assert torch.allclose((xbar - truth).std(1)[known], torch.full((2,), levels[0]), rtol=0.03)
    xbar = torch.where(s > 0, xbar, truth + xbar)  # the unmeasured one starts at 0 mean
    for level, later in pairwise(levels):
        z = torch.randn(3, n, generator=g)
        xbar = linear.ddrm_step(xbar, truth, ybar, s, level, later, sigma_y, z)
        spread = (xbar - truth).std(1)
        for i in range(3):
            want = later if later or not (i and nsr[i] == 0) else 0.0
            assert abs(spread[i] - want) < 0.03 * max(want, 0.1), (i, later)


def test_ddrm_without_noise_reproduces_the_measurement() -> None:
    operator, _, y = measured("inpainting", 4, sigma=0.0, box=4, margin=1)
    x = linear.DDRM(steps=10)(DISCRETE, request_for(operator, y, range(4)))
    assert_close(operator(x), y, 1e-5)
    free = x[operator.masks.expand_as(x) == 0]
    assert 0.3 < free.std() < 1.0, "what is missing is drawn from the prior"


def dense(operator: Operator) -> Tensor:
    """A of a single item as a matrix (m, n), float64."""
    basis = torch.eye(math.prod(SHAPE), dtype=torch.float64).view(-1, *SHAPE)
    return operator(basis).flatten(1).T


@pytest.mark.parametrize("task", ["super-resolution", "gaussian-deblurring"])
def test_pigdm_step_against_matrices(task: str) -> None:
    options = {"scale": 2} if task == "super-resolution" else {"kernel_size": 5, "std": 1.0}
    operator, _, y = measured(task, 1, 0.1, **options)
    sampler = linear.PiGDM(steps=10, clip=False)
    z = [torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    request = Drawn(iter(z), 1, shape=SHAPE, operator=operator, measurement=y)
    prior = sampler.prior(EXACT, request, operator)
    got, x0, _ = next(sampler.states(prior, request, operator, y))
    A, top = dense(operator), prior.steps - 1
    a, b = prior.alpha_bar(top), prior.alpha_bar(top - 1)
    c = float(shrink(torch.tensor(a).double().sqrt(), torch.tensor(1 - a).double().sqrt()))
    x = z[0].double().flatten()
    r2, eye = 1 - a, torch.eye(len(A), dtype=torch.float64)
    score = A.T @ torch.linalg.solve(r2 * A @ A.T + 0.1**2 * eye, y.double().flatten() - A @ (c * x)) * c  # J = c I
    eps = (x - a**0.5 * c * x) / (1 - a) ** 0.5
    c1 = ((1 - a / b) * (1 - b) / (1 - a)) ** 0.5
    want = b**0.5 * (c * x + a**0.5 * r2 * score) + c1 * z[1].double().flatten() + (1 - b - c1**2) ** 0.5 * eps
    assert_close(x0.flatten(), c * x, 1e-4)
    assert_close(got.flatten(), want, 1e-4)


def test_diffpir_step_against_matrices() -> None:
    operator, _, y = measured("super-resolution", 1, 0.1, scale=2)
    sampler = linear.DiffPIR(steps=10, clip=False, lam=3.0, zeta=0.3)
    z = [torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    request = Drawn(iter(z), 1, shape=SHAPE, operator=operator, measurement=y)
    prior = prior_of(EXACT, 10, {}, clip=False, space=linear.quadratic_steps)
    got, x0, _ = next(sampler.states(prior, request, operator, y))
    A, top = dense(operator), prior.steps - 1
    a, b = prior.alpha_bar(top), prior.alpha_bar(top - 1)
    x = z[0].double().flatten()
    c = float(shrink(torch.tensor(a).double().sqrt(), torch.tensor(1 - a).double().sqrt()))
    rho = 3.0 * 0.05**2 / ((1 - a) / a)
    solved = torch.linalg.solve(A.T @ A + rho * torch.eye(len(x)), A.T @ y.double().flatten() + rho * c * x)
    assert_close(x0.flatten(), solved, 1e-3)
    eps = (x - a**0.5 * solved) / (1 - a) ** 0.5
    want = b**0.5 * solved + (1 - b) ** 0.5 * (0.7**0.5 * eps + 0.3**0.5 * z[1].double().flatten())
    assert_close(got.flatten(), want, 1e-3)


def test_quadratic_steps_are_denser_near_data() -> None:
    steps = linear.quadratic_steps(1000, 100)
    assert steps[0] == 0 and steps[-1] == 999 and steps == sorted(set(steps))
    assert steps[1] - steps[0] < 10 < steps[-1] - steps[-2]


def test_pigdm_restores_jpeg_and_the_others_say_why_not() -> None:
    operator, _, y = measured("jpeg", 4, 0.0, quality=20)
    x = linear.PiGDM(steps=20)(DISCRETE, request_for(operator, y, range(4)))
    assert torch.isfinite(x).all() and (operator(x) - y).square().mean() < 0.1 * y.square().mean()
    for method in ("ddrm", "diffpir"):
        with pytest.raises(VgmError, match="not linear") as e:
            registry().build("sampler", method)(DISCRETE, request_for(operator, y, range(4)))
        assert e.value.code == 2
    phases, _, amplitudes = measured("phase-retrieval", 2, pad=2)
    for method in ("mcg", "projection", "pigdm"):
        with pytest.raises(VgmError, match="pseudo-inverse"):
            registry().build("sampler", method)(DISCRETE, request_for(phases, amplitudes, range(2)))
    x = DPS(steps=30)(DISCRETE, request_for(phases, amplitudes, range(2)))
    assert torch.isfinite(x).all()


def test_methods_need_a_measurement() -> None:
    for method in METHODS:
        with pytest.raises(VgmError, match="needs a measurement"):
            registry().build("sampler", method)(DISCRETE, Request(shape=SHAPE, generators=generators([0])))


def test_particles_average_perturbed_estimates() -> None:
    """ "ps+" draws from the item's own generator and tends to "ps" as its perturbation does not matter."""
    operator, _, y = measured("super-resolution", 2, scale=2)
    plain = DPS(steps=5)(DISCRETE, request_for(operator, y, range(2)))
    more = [DPS(steps=5, particles=3)(DISCRETE, request_for(operator, y, range(2))) for _ in range(2)]
    assert torch.equal(*more) and not torch.equal(more[0], plain)
    x = torch.randn(2, *SHAPE, requires_grad=True)
    zero = [torch.zeros_like(x)] * 3
    same, a = conditioning.posterior_sampling_plus(operator, x, x, 0.5 * x, y, 1.0, zero)
    want, b = conditioning.posterior_sampling(operator, x, x, 0.5 * x, y, 1.0)
    assert_close(same, want, 1e-5)
    assert_close(a, b, 1e-5)


def test_limited_steps_end_at_the_measurement() -> None:
    """Polyak's step of a distance that is linear along its gradient lands on 0; a small zeta goes before."""
    operator, truth, y = measured("denoising", 2, 0.0)
    x = torch.randn(2, *SHAPE, requires_grad=True)
    moved, _ = conditioning.posterior_sampling(operator, x, x.detach(), x + 0.0, y, 1e3, limited=True)
    assert_close(moved, truth, 1e-5)
    short, value = conditioning.posterior_sampling(operator, x, x.detach(), x + 0.0, y, 0.1, limited=True)
    assert_close((short - x).flatten(1).norm(dim=1), torch.full((2,), 0.1), 1e-4)
    assert (value > 0.1).all()
    operator, _, y = measured("denoising", 2, 0.2)  # the truth is not nearer to its own measurement than this
    moved, _ = conditioning.posterior_sampling(operator, x, x.detach(), x + 0.0, y, 1e3, limited=True)
    assert_close((moved - y).flatten(1).norm(dim=1), torch.full((2,), 0.2 * y[0].numel() ** 0.5), 1e-4)


def test_projection_is_the_nearest_image_that_measures_y() -> None:
    operator, truth, _ = measured("super-resolution", 2, 0.0, scale=2)
    x = torch.randn_like(truth)
    y = operator(truth)
    projected = conditioning.projection(operator)(x, y)
    assert_close(operator(projected), y, 1e-4)
    assert (projected - x).norm() <= (truth - x).norm()
    with pytest.raises(VgmError, match="whole numbers"):
        official.project(bound(SuperResolution(3), (1, 8, 8)), torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 3, 3))


def test_presets_are_the_released_step_sizes() -> None:
    presets = registry().presets(registry().find("sampler", "dps"))
    assert {k: v["zeta"] for k, v in presets.items()} == {
        "super-resolution": 0.3, "gaussian-deblurring": 0.3, "motion-deblurring": 0.3, "nonlinear-deblurring": 0.3,
        "inpainting": 0.5, "phase-retrieval": 1.0,
    }  # fmt: skip
    assert set(presets) <= set(registry().names("operator"))
    built = registry().build("sampler", {"name": "dps", "preset": "inpainting", "steps": 100})
    assert (built.zeta, built.steps) == (0.5, 100)


def test_the_ffhq_prior_has_the_published_size() -> None:
    numbers, reason = check(recipes.load("dps/ffhq256"))
    assert not reason and numbers["model"] == 93_563_910
