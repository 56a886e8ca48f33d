"""SiT against willisma/SiT@947f95b (golden cases), its samplers against closed forms and torchdiffeq."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from official_guidance import doubled
from torch import Tensor
from vgm_plugins.sit.checkpoints import CONVERTER
from vgm_plugins.sit.objective import FlowMatching
from vgm_plugins.sit.ode import METHODS, integrate
from vgm_plugins.sit.presets import PRESETS
from vgm_plugins.sit.sampler import ODESampler, SDESampler, log_likelihood, sample_ode, sample_sde
from vgm_plugins.sit.transport import PATHS, Transport, transport_of

from vgm_cli.api import Request, Step, generators
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.errors import VgmError
from vgm_cli.nets.dit import DiT, SiT
from vgm_cli.registry import registry
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, assert_close

golden = GoldenChecks("sit")

FORMS = {"inccreasing-decreasing": "increasing-decreasing"}  # the official key is misspelt


def transport(case: GoldenCase) -> Transport:
    """create_transport's positional arguments -> ours."""
    return Transport(*case.config["transport"])


def load(case: GoldenCase) -> SiT:
    case.ignore("model.class_dropout_prob", why="nothing is dropped: eval mode, and the labels are given")
    model = SiT(**case.config["model"])
    model.load_state_dict(CONVERTER.to_ours(case.state))
    return model.eval()


def toy(prediction: str, x: Tensor, t: Tensor) -> Tensor:
    """The networks that the toy cases state in their notes."""
    t = t.view(-1, *[1] * (x.ndim - 1))
    if prediction == "velocity":
        return 0.8 * torch.tanh(x) - 0.5 * x * t + 0.1 * torch.sin(3 * t)
    noise = 0.98 * x - 0.1 * t * torch.tanh(x)
    return noise if prediction == "noise" else -noise


def toy_of(plan: Transport) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: toy(plan.prediction, x, t)


class Drawn(Request):
    """A request whose standard normal draws are given."""

    def __init__(self, draws: Iterator[Tensor], n: int, **kwargs: Any):
        super().__init__(generators=generators(range(n)), **kwargs)
        self.draws = draws

    def randn(self, shape: tuple[int, ...] | None = None) -> Tensor:
        return next(self.draws)


def stand_in(model: SiT, objective: FlowMatching) -> SimpleNamespace:
    """What a sampler reads of the host's Denoiser."""
    config = objective.view()
    return SimpleNamespace(**{**config, "network": model, "path": SimpleNamespace(**config["path"])})


# -- golden cases ----------------------------------------------------------------------------------------------------


@golden.check(lambda c: "forms" in c.config)
def path_plans(case: GoldenCase) -> None:
    x, t, x0, f = (case.inputs[k] for k in ("x", "t", "x0", "f"))
    for name in {k.split(".")[0] for k in case.outputs}:
        plan = PATHS[name.lower()]()
        a, b = plan.drift(x, t)
        x_t, u_t = plan.plan(t, x0, x)
        got = {
            "compute_alpha_t": torch.stack(plan.alpha(t)),
            "compute_sigma_t": torch.stack(plan.sigma(t)),
            "d_alpha_alpha_ratio": plan.alpha_ratio(t),
            "drift_mean": a,
            "drift_var": b,
            "xt": x_t,
            "ut": u_t,
            "score_from_velocity": plan.score_from_velocity(f, x, t),
            "noise_from_velocity": plan.noise_from_velocity(f, x, t),
            "velocity_from_score": plan.velocity_from_score(f, x, t),
        }
        for form in case.config["forms"]:
            w = plan.diffusion(x, t, FORMS.get(form, form), case.config["norm"])
            got[f"diffusion.{form}"] = w.flatten()
        wanted = {k.partition(".")[2]: v for k, v in case.outputs.items() if k.startswith(name + ".")}
        assert set(wanted) <= set(got)
        for key, want in wanted.items():
            assert_close(got[key], want, 1e-5, f"{name}.{key}")


@golden.check(lambda c: "in/u" in c and "in/x1" in c and not c.state)
def losses_drifts_scores(case: GoldenCase) -> None:
    u, x0, x1 = (case.inputs[k] for k in ("u", "x0", "x1"))

    def network(x: Tensor, t: Tensor) -> Tensor:
        return toy("velocity", x, t)

    for key, want in case.outputs.items():
        path, prediction, *rest = key.split(".")
        weight = rest[0] if rest[0] in ("velocity", "likelihood") else None
        plan = Transport(path, prediction, weight)
        t0, t1 = plan.interval()
        t = u * (t1 - t0) + t0
        if rest[-1] == "interval":
            got = torch.tensor([t0, t1])
        elif rest[-1] == "loss":
            got = plan.losses(network, x1, x0, t)
        else:
            output = network(x1, t)
            got = plan.velocity(output, x1, t) if rest[-1] == "ode_drift" else plan.score(output, x1, t)
        rtol = 1e-5
        if (path, rest[-1]) == ("VP", "loss") and weight and case.device.type != "cpu":
            # sigma^2 = 1 - exp(...) is 1e-4 near the data: one rounding of the device's own exp is 5e-4 of the weight
            rtol = max(rtol, torch.finfo(torch.float32).eps / plan.plan.sigma(t)[0].square().min().item())
        assert_close(got, want, rtol, key)


@golden.check(lambda c: "num_steps" in c.config and "form" not in c.config and "out/trajectory" in c)
def ode(case: GoldenCase) -> None:
    config, plan = case.config, transport(case)
    options = {k: config[k] for k in ("method", "reverse", "atol", "rtol") if k in config}
    states = sample_ode(toy_of(plan), case.inputs["init"], plan, steps=config["num_steps"], **options)
    got = torch.stack([x for _, x in states])
    assert_close(got, case.outputs["trajectory"], 1e-3 if METHODS[config["method"]].error else 1e-5, "trajectory")


@golden.check(lambda c: "form" in c.config)
def sde(case: GoldenCase) -> None:
    config, plan, draws = case.config, transport(case), iter(case.inputs["w"])
    if config["last_step"] is None:
        case.ignore("last_step_size", why="there is no last step")
    states = sample_sde(
        toy_of(plan),
        case.inputs["init"],
        plan,
        lambda: next(draws),
        config["method"],
        FORMS.get(config["form"], config["form"]),
        config["norm"],
        config["last_step"],
        config["last_step_size"],
        config["num_steps"],
    )
    got = torch.stack([x for _, x in states])
    # SBDM on a path other than VP divides by t, and values reach hundreds
    amplified = config["form"] == "SBDM" and config["transport"][0] != "VP"
    assert_close(got, case.outputs["trajectory"], 1e-3 if amplified else 1e-5, "trajectory")


@golden.check(lambda c: "out/logp" in c)
def likelihood(case: GoldenCase) -> None:
    config, plan, bits = case.config, transport(case), iter(case.inputs["bits"])
    logp, z = log_likelihood(
        toy_of(plan),
        case.inputs["x"],
        plan,
        lambda: next(bits) * 2 - 1,
        config["method"],
        config["num_steps"],
        **{k: config[k] for k in ("atol", "rtol") if k in config},
    )
    rtol = 1e-3 if METHODS[config["method"]].error else 1e-5
    assert_close(logp, case.outputs["logp"], rtol, "logp")
    assert_close(z, case.outputs["z"], rtol, "z")


@golden.check(lambda c: "out/out_cfg" in c)
def forward(case: GoldenCase) -> None:
    model, x, t, y = load(case), case.inputs["x"], case.inputs["t"], case.inputs["y"]
    with torch.no_grad():
        assert_close(model(x, t, y), case.outputs["out"], 1e-5, "out")
        model_cfg = doubled(model, y, case.config["cfg_scale"])
        assert_close(model_cfg(torch.cat([x, x]), torch.cat([t, t])), case.outputs["out_cfg"], 1e-5, "out_cfg")


@golden.check(lambda c: "in/z" in c)
def guided_sampling(case: GoldenCase) -> None:
    """The official doubled batch, and the shipped samplers on its conditional half."""
    model, plan, scale, steps = load(case), transport(case), case.config["cfg_scale"], case.config["num_steps"]
    z, y, w = (case.inputs[k] for k in ("z", "y", "w"))
    network = doubled(model, y, scale)
    draws = iter(w)
    objective = FlowMatching(model, plan.path.lower(), plan.prediction)
    view = stand_in(model, objective)
    ask = {"shape": tuple(z.shape[1:]), "cond": {"y": y}, "guidance_scale": scale}
    with torch.no_grad():
        *_, (_, x) = sample_ode(network, torch.cat([z, z]), plan, "euler", steps)
        assert_close(x, case.outputs["ode_euler"], 1e-5, "ODE")
        *_, (_, x) = sample_sde(network, torch.cat([z, z]), plan, lambda: next(draws), steps=steps)
        assert_close(x, case.outputs["sde_euler"], 1e-5, "SDE")
        request = Drawn(iter([z]), len(z), **ask)
        x = ODESampler("euler", steps, cfg_channels=3)(view, request)
        assert_close(x, case.outputs["ode_euler"][: len(z)], 1e-5, "the shipped ODE sampler")
        assert request.info["nfe"] == 2 * (steps - 1)
        request = Drawn(iter([z, *w[:, : len(z)]]), len(z), **ask)
        x = SDESampler(steps=steps, cfg_channels=3)(view, request)
        assert_close(x, case.outputs["sde_euler"][: len(z)], 1e-5, "the shipped SDE sampler")
        assert request.info["nfe"] == 2 * steps


@golden.check(lambda c: "out/loss" in c and bool(c.state))
def loss_and_gradients(case: GoldenCase) -> None:
    model, plan, y = load(case), transport(case), case.inputs["y"]
    case.ignore("cfg_scale", why="nothing is guided in training")
    t0, t1 = plan.interval()
    t = case.inputs["u"] * (t1 - t0) + t0
    losses = plan.losses(lambda x, s: model(x, s, y), case.inputs["x1"], case.inputs["x0"], t)
    assert_close(losses, case.outputs["loss"], 1e-5, "loss")
    losses.mean().backward()
    gradients = {k: p.grad for k, p in model.named_parameters()}
    for name, want in case.outputs.items():
        if name.startswith("grad."):
            assert_close(gradients[name.removeprefix("grad.")], want, 1e-4, name)


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


# -- model, presets, checkpoints -------------------------------------------------------------------------------------


def test_presets_are_dit_sized() -> None:
    with torch.device("meta"):
        model = registry().build("model", {"name": "sit", "preset": "SiT-XL/2"})
    assert sum(p.numel() for p in model.parameters()) == 675_129_632
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 674_834_720
    assert len(PRESETS) == 12 and all(name.startswith("SiT-") for name in PRESETS)
    assert CONVERTER.recognise(model.state_dict()) and CONVERTER.component == "sit"


# -- conversions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_conversions_agree_on_a_known_mixture(path: str) -> None:
    """From a known (data, noise) pair every prediction gives the same velocity, score and data."""
    g = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(5, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0.2, 0.4, 0.5, 0.7, 0.9], dtype=torch.float64)
    plan = PATHS[path]()
    x, velocity = plan.plan(t, noise, data)
    sigma = plan.sigma(t)[0].view(-1, 1, 1, 1)
    outputs = {"velocity": velocity, "score": -noise / sigma, "noise": noise}
    for prediction, output in outputs.items():
        tr = Transport(path, prediction)
        torch.testing.assert_close(tr.velocity(output, x, t), velocity)
        torch.testing.assert_close(tr.score(output, x, t), -noise / sigma)
    torch.testing.assert_close(plan.noise_from_velocity(velocity, x, t), noise)
    torch.testing.assert_close(plan.data_from_velocity(velocity, x, t), data)


@pytest.mark.parametrize("prediction", ["velocity", "score", "noise"])
@pytest.mark.parametrize("path", PATHS)
def test_the_host_reads_the_network_alike(path: str, prediction: str) -> None:
    """The host's Denoiser, whose time runs from data to noise, finds the same data behind x_t."""
    from vgm_cli.diffusion.denoiser import Denoiser

    g = torch.Generator().manual_seed(1)
    data, noise = (torch.randn(4, 3, 4, 4, generator=g) for _ in range(2))
    t = torch.tensor([0.3, 0.5, 0.7, 0.9])
    plan = PATHS[path]()
    x, velocity = plan.plan(t, noise, data)
    sigma = plan.sigma(t)[0].view(-1, 1, 1, 1)
    output = {"velocity": velocity, "score": -noise / sigma, "noise": noise}[prediction]
    told: list[Tensor] = []

    class Known(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            told.append(t)
            return output

    view = Denoiser.from_config(Known(), FlowMatching(Known(), path, prediction).view())
    x0 = view.predict(x, 1 - t)
    torch.testing.assert_close(told[-1], t)
    torch.testing.assert_close(x0, data, rtol=1e-3, atol=1e-3)
    again = transport_of(view)
    assert (again.path, again.prediction) == (path, prediction)


def test_other_networks_are_refused() -> None:
    view = SimpleNamespace(path=SimpleNamespace(name="linear"), prediction="velocity", time="continuous")
    with pytest.raises(VgmError, match="trained by flow-matching"):
        transport_of(view)


def test_intervals() -> None:
    assert Transport("linear").interval() == (0, 1)
    assert Transport("gvp", "score").interval() == (1e-3, 1 - 1e-3)
    assert Transport("vp").interval() == (0, 1 - 1e-5)
    assert Transport("vp").interval(train=False) == (0, 1 - 1e-3)
    assert Transport("linear").interval(train=False, sde=True, form="sigma", last_step_size=0.04) == (0, 0.96)
    assert Transport("linear", "noise", train_eps=0.1).interval(train=False) == (1e-3, 1 - 1e-3)


def test_unknown_names_are_refused() -> None:
    for make in (
        lambda: Transport("bezier"),
        lambda: Transport("linear", "v"),
        lambda: Transport("linear", "score", "huge"),
        lambda: ODESampler("dopri6"),
        lambda: next(sample_sde(toy_of(Transport()), torch.zeros(1, 1), Transport(), lambda: torch.zeros(1), "RK")),
        lambda: next(
            sample_sde(toy_of(Transport()), torch.zeros(1, 1), Transport(), lambda: torch.zeros(1), form="SBDM")
        ),
        lambda: next(sample_ode(toy_of(Transport()), torch.zeros(1, 1), Transport(), steps=1)),
    ):
        with pytest.raises(VgmError):
            make()


# -- integration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_methods_against_torchdiffeq(method: str) -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    y0, grid = torch.tensor([[1.0, -0.5], [0.3, 2.0]]).double(), torch.linspace(0, 1.5, 6).double()

    def f(t: float | Tensor, y: Tensor) -> Tensor:
        return torch.sin(3 * y) * t - 0.3 * y**2 + t

    for points in (grid, grid.flip(0)):
        want = torchdiffeq.odeint(f, y0, points, method=method, atol=[1e-6], rtol=[1e-3])
        states = integrate(lambda t, y: (f(t, y[0]),), (y0,), points, method, 1e-6, 1e-3)
        got = torch.stack([y for _, (y,) in states])
        # the same steps are taken, so adaptive methods agree far better than their tolerance
        assert_close(got, want, 1e-9, method)


@pytest.mark.parametrize("method", METHODS)
def test_methods_converge_at_their_order(method: str) -> None:
    tableau = METHODS[method]
    if tableau.error:
        *_, (_, (y,)) = integrate(lambda t, y: (-y[0] * t,), (torch.ones(1, dtype=torch.float64),), torch.linspace(0, 2, 2).double(), method, 1e-8, 1e-8)  # fmt: skip
        assert abs(float(y) - math.exp(-2)) < 1e-6
        return
    errors = []
    for n in (9, 17):
        grid = torch.linspace(0, 2, n, dtype=torch.float64)
        *_, (_, (y,)) = integrate(lambda t, y: (-y[0] * t,), (torch.ones(1, dtype=torch.float64),), grid, method)
        errors.append(abs(float(y) - math.exp(-2)))
    assert errors[0] / errors[1] > 0.8 * 2**tableau.order


def test_noise_prediction_on_vp_with_dopri5_ends() -> None:
    """The official solver steps beyond the data end, where VP's sigma is not a number, and stops with an error."""
    plan = Transport("vp", "noise")
    *_, (t, x) = sample_ode(toy_of(plan), torch.randn(2, 3, 4, 4), plan, "dopri5", 5)
    assert t == pytest.approx(1 - 1e-3) and torch.isfinite(x).all()


def gaussian(plan: Transport, mean: float, std: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact network for data N(mean, std^2)."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (v[0].view(-1, *[1] * (x.ndim - 1)) for v in (plan.plan.alpha(t), plan.plan.sigma(t)))
        score = -(x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        if plan.prediction == "score":
            return score
        return -sigma * score if plan.prediction == "noise" else plan.plan.velocity_from_score(score, x, t)

    return network


@pytest.mark.parametrize("form", ["constant", "sigma", "linear", "decreasing", "increasing-decreasing", "SBDM"])
@pytest.mark.parametrize("method", ["Euler", "Heun"])
def test_every_diffusion_form_reaches_the_data(method: str, form: str) -> None:
    plan = Transport("vp", "score")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 1, generator=g)
    network = gaussian(plan, 0.7, 0.5)
    draw = lambda: torch.randn(4000, 1, generator=g)
    *_, (_, x) = sample_sde(network, x, plan, draw, method, form, last_step_size=0.005, steps=120)
    assert abs(float(x.mean()) - 0.7) < 0.05 and abs(float(x.std()) - 0.5) < 0.05


@pytest.mark.parametrize("last_step", ["Mean", "Tweedie", "Euler", None])
def test_every_last_step_reaches_the_data(last_step: str | None) -> None:
    plan = Transport("gvp", "noise")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 1, generator=g)
    network = gaussian(plan, -0.4, 0.8)
    *_, (_, x) = sample_sde(network, x, plan, lambda: torch.randn(4000, 1, generator=g), last_step=last_step, steps=80)
    assert abs(float(x.mean()) + 0.4) < 0.05 and abs(float(x.std()) - 0.8) < 0.05


def test_likelihood_of_a_gaussian() -> None:
    plan = Transport("vp")
    x = 0.7 + 0.5 * torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    logp, _ = log_likelihood(gaussian(plan, 0.7, 0.5), x, plan, lambda: torch.ones(64, 3), "dopri5", 2, rtol=1e-5)
    want = torch.distributions.Normal(0.7, 0.5).log_prob(x).sum(1)
    torch.testing.assert_close(logp, want, rtol=0.01, atol=0.03)  # 1e-3 of time is left out at the data end


# -- objective and samplers ------------------------------------------------------------------------------------------

TINY = {"input_size": 8, "hidden_size": 48, "depth": 2, "num_heads": 4, "num_classes": 7}


@pytest.mark.parametrize("time_sampling", ["uniform", "logit-normal"])
def test_objective_draws(time_sampling: str) -> None:
    model = SiT(**TINY)
    objective = FlowMatching(model, "gvp", "noise", time_sampling=time_sampling, time_mean=-0.5)
    step = Step(index=3)
    batch = {"x": torch.randn(6, 4, 8, 8), "cond": {"y": torch.arange(6)}}
    loss, _ = objective.loss("main", batch, step)
    noise = step.randn((6, 4, 8, 8), "noise")
    torch.testing.assert_close(loss, noise.square().mean())  # a fresh network predicts zero
    u = step.rand(6, "t") if time_sampling == "uniform" else torch.sigmoid(step.randn((6,), "t") - 0.5)
    torch.testing.assert_close(objective.times(6, step), u * (1 - 2e-3) + 1e-3)


def test_variance_channels_are_refused_with_the_way_out() -> None:
    with pytest.raises(VgmError) as e:
        FlowMatching(DiT(**TINY)).loss(
            "main", {"x": torch.zeros(1, 4, 8, 8), "cond": {"y": torch.zeros(1).long()}}, Step(0)
        )
    assert "learn_sigma=false" in e.value.hint


@pytest.mark.parametrize(
    "node",
    [
        {"name": "sit-sde", "steps": 5},
        {"name": "sit-ode", "steps": 4},
        {"name": "sit-sde", "method": "Heun", "steps": 4},
    ],
)
def test_samples_do_not_depend_on_the_batch(node: dict[str, Any]) -> None:
    model = SiT(**TINY)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=generator))
    view = Denoiser.from_config(model, FlowMatching(model).view())
    sampler = registry().build("sampler", node)
    y, calls, estimates = torch.tensor([1, 4, 6]), [], []

    def watch(i: int, total: int, x: Tensor, x0: Tensor) -> None:
        calls.append(i)
        estimates.append((x0 - x).abs().max())

    def ask(rows: slice, **more: Any) -> tuple[Tensor, int]:
        request = Request(
            shape=(4, 8, 8),
            generators=generators(range(3)[rows]),
            cond={"y": y[rows]},
            callback=watch,
            **more,
        )
        with torch.no_grad():
            return sampler(view, request), request.info["nfe"]

    whole, nfe = ask(slice(0, 3), guidance_scale=2.0)
    assert calls == list(range(node["steps"])) and estimates[0] > 0.1 and estimates[-1] == 0
    one, _ = ask(slice(1, 2), guidance_scale=2.0)
    torch.testing.assert_close(one, whole[1:2], rtol=1e-4, atol=1e-4)
    plain, half = ask(slice(0, 3))
    assert nfe == 2 * half and not torch.allclose(plain, whole)
    partly, between = ask(slice(0, 3), guidance_scale=2.0, guidance_interval=(0.3, 1.0))
    assert half < between < nfe and not torch.allclose(partly, whole)
