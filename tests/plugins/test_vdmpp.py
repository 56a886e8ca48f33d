"""VDM++ and VDM: golden cases of google-research/vdm@dc27b98a and of the paper's formulas, and what they promise."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vgm_plugins.vdmpp import densities
from vgm_plugins.vdmpp.checkpoints import CONVERTER
from vgm_plugins.vdmpp.densities import FIXED, Adaptive, make_density
from vgm_plugins.vdmpp.gamma import Linear, Monotone, Scalar
from vgm_plugins.vdmpp.model import VDM
from vgm_plugins.vdmpp.objective import VariationalBound, WeightedELBO, weighted_losses
from vgm_plugins.vdmpp.presets import PRESETS
from vgm_plugins.vdmpp.process import GammaPath, VDMDenoiser, VDMSampler
from vgm_plugins.vdmpp.weightings import MONOTONE, WEIGHTINGS, edm_peak, elbo_density, make_weight, shift_of

from vgm_cli.api import Request, Step, generators
from vgm_cli.diffusion.denoiser import Denoiser, affine
from vgm_cli.diffusion.objectives import GaussianObjective, weight_of
from vgm_cli.errors import VgmError
from vgm_cli.testing import suites
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, assert_close

golden = GoldenChecks("vdmpp")
GRID = torch.linspace(-14, 14, 2801, dtype=torch.float64)


def nchw(x: Tensor) -> Tensor:
    return x.movedim(-1, -3)


def load(case: GoldenCase) -> VDM:
    """The network of a case through the shipped converter; its state may be the score network alone."""
    config = case.config
    state = case.state
    if not any(k.startswith("score_model") for k in state):
        state = {f"score_model/{k}": v for k, v in state.items()}
        case.ignore("gamma_type", "sm_n_timesteps", "antithetic_time_sampling", why="the score network alone")
        case.ignore("vocab_size", "sample_softmax", why="the score network alone")
        found = CONVERTER.config(CONVERTER.own(state))
    else:
        found = CONVERTER.config(CONVERTER.own(state))
        assert found["gamma"] == config["gamma_type"]
    case.ignore("sm_pdrop", why="nothing is dropped in eval mode")
    told = {"n_embd": config["sm_n_embd"], "n_layer": config["sm_n_layer"], "attention": config["with_attention"]}
    told["fourier"] = config["with_fourier_features"]
    assert told == {k: found[k] for k in told}
    own = {"gamma_min": config["gamma_min"], "gamma_max": config["gamma_max"]}
    model = VDM(**found, **own, levels=256 if case.is_ignored(("vocab_size",)) else config["vocab_size"])
    model.load_state_dict(CONVERTER.to_ours(CONVERTER.own(state)))
    return model.eval()


# -- golden cases ----------------------------------------------------------------------------------------------------


@golden.check(lambda c: "out/edm_argmax" in c)
def weightings(case: GoldenCase) -> None:
    config, l = case.config, case.inputs["lambda"]
    options = {
        "sigmoid": {"bias": config["sigmoid_bias"]},
        "p2": {"gamma": config["p2_gamma"]},
        "min-snr": {"gamma": config["min_snr_gamma"]},
        "edm": {"sigma_data": config["sigma_data"]},
        "edm-monotonic": {"sigma_data": config["sigma_data"]},
    }
    for name in WEIGHTINGS:
        weight = make_weight({"name": name, **options.get(name, {})})
        assert_close(weight(l), case.outputs[name.replace("-", "_")], 1e-10, name)
    where, most = edm_peak(config["sigma_data"])
    assert abs(where - float(case.outputs["edm_argmax"])) < 1e-9
    assert_close(torch.tensor([most], dtype=torch.float64), case.outputs["edm_max"], 1e-10, "maximum")
    whole = (-math.inf, math.inf)
    for name, key in (("cosine", "p_cosine"), ("flow", "p_flow"), ("edm", "p_edm_train")):
        assert_close(FIXED[name](*whole).density(l), case.outputs[key], 1e-10, key)
    for name in ("cosine", "flow"):
        assert_close(FIXED[name](*whole).draw(case.inputs["t"])[0], case.outputs[f"lambda_of_t_{name}"], 1e-10, name)


@golden.check(lambda c: "out/mse_eps_v" in c)
def weighted(case: GoldenCase) -> None:
    name = {"v": "v-cosine", "eps": "eps-cosine"}.get(case.config["weighting"], case.config["weighting"])
    name = name.replace("_", "-")
    options = list(inspect.signature(WEIGHTINGS[name]).parameters)[1:]
    case.ignore(*({"bias", "gamma"} - set(options)), why="of other weightings")
    weight = make_weight({"name": name, **{k: case.config[k] for k in options if k in case.config}})
    sigma_data = case.config.get("sigma_data", 0.5)
    mean, std = re.fullmatch(r"N\(([-\d.]+),\s*([-\d.]+)\^2\)", case.config["importance"]).groups()  # type: ignore[union-attr]
    l, x, noise = (case.inputs[k] for k in ("lam", "x0", "eps"))
    p = densities.normal_density(l, float(mean), float(std))

    def toy(z: Tensor, t: Tensor) -> Tensor:
        assert_close(z, case.outputs["z"], 1e-10, "z")
        return 0.3 * torch.tanh(z) + 0.01 * l[:, None, None, None]

    for kind in ("eps", "v", "x", "F"):
        view = Denoiser(toy, "cosine", "x0" if kind == "x" else kind, input_scale="none", sigma_data=sigma_data)
        losses, errors = weighted_losses(view, x, l, p, noise, weight)
        assert_close(errors, case.outputs[f"mse_eps_{kind}"], 1e-10, f"error of eps from {kind}")
        assert_close(losses, case.outputs[f"loss_{kind}"], 1e-10, f"loss from {kind}")


@golden.check(lambda c: "out/hist" in c)
def adaptive(case: GoldenCase) -> None:
    config = case.config
    density = Adaptive(config["lambda_min"], config["lambda_max"], config["bins"], config["ema_decay"])
    for i, u in enumerate(case.inputs["u"]):
        l, p = density.draw(u)
        assert_close(l, case.outputs["lambda"][i], 1e-10, f"log-SNRs of step {i}")
        assert_close(p, case.outputs["density"][i], 1e-10, f"density of step {i}")
        assert_close(density.density(l), p, 1e-10, "density at what was drawn")
        density.update(l, torch.sigmoid(2 - l) * case.inputs["noise_mse"][i] * torch.sigmoid(l / 2))
    assert_close(density.histogram, case.outputs["hist"], 1e-10, "histogram")


@golden.check(lambda c: "out/eps_hat" in c)
@torch.no_grad()
def score_network(case: GoldenCase) -> None:
    out = load(case)(nchw(case.inputs["z"]), -case.inputs["g_t"], case.inputs["conditioning"])
    assert_close(out.movedim(1, -1), case.outputs["eps_hat"], 1e-4, "eps_hat")


@golden.check(lambda c: "out/loss_diff" in c)
@torch.no_grad()
def bound(case: GoldenCase) -> None:
    model, inputs, config = load(case), case.inputs, case.config
    case.ignore("sample_softmax", why="nothing is sampled")
    x = nchw(inputs["images"]).float() * (2 / (config["vocab_size"] - 1)) - 1
    n, u = len(x), inputs["u"]
    if config["antithetic_time_sampling"]:
        u = (u + torch.arange(n) / n) % 1
    objective = VariationalBound(model, timesteps=config["sm_n_timesteps"])
    draws = nchw(inputs["eps"]), nchw(inputs["eps_0"])
    found = objective.parts(x, u, *draws, conditioning=inputs["conditioning"])
    for part, name in zip(found, ("diff", "klz", "recon")):
        assert_close(part, case.outputs[f"loss_{name}"], 1e-3, name)
    bits = sum(found).mean() / (x[0].numel() * math.log(2))  # type: ignore[union-attr]
    assert_close(bits[None], case.outputs["bpd"], 1e-3, "bits per dimension")
    ends = torch.sigmoid(model.gamma(torch.tensor([0.0, 1.0]))[0])
    assert_close(ends, torch.cat([case.outputs["var_0"], case.outputs["var_1"]]), 1e-5, "variances at the ends")


@golden.check(lambda c: "out/trajectory" in c)
@torch.no_grad()
def ancestral(case: GoldenCase) -> None:
    """The network is shown the official states: the features sin(2 pi 128 z) of random weights make 100 times of an error
    in every step, so that one rounding of the first is the size of the state after four."""
    model, config = load(case), case.config
    case.ignore("sm_n_timesteps", "antithetic_time_sampling", why="nothing is trained")
    draws = iter([case.inputs["z_init"], *case.inputs["eps_steps"]])
    shape = nchw(case.inputs["z_init"]).shape
    states: list[Tensor] = []

    class Drawn(Request):
        def randn(self, shape: tuple[int, ...] | None = None) -> Tensor:
            return nchw(next(draws))

    truth = iter([case.inputs["z_init"], *case.outputs["trajectory"]])

    class Shown(VDMDenoiser):
        def raw(self, x_t: Tensor, t: Any, **cond: Any) -> Tensor:
            return super().raw(nchw(next(truth)), t, **cond)

    request = Drawn(tuple(shape[1:]), generators(range(shape[0])), callback=lambda i, n, x, x0: states.append(x))
    x = VDMSampler(steps=config["T"])(Shown(model), request)
    assert request.info["nfe"] == config["T"] == len(states) and next(draws, None) is None
    for got, want in zip(states[1:], case.outputs["trajectory"]):
        assert_close(got.movedim(1, -1), want, 1e-4, "state")
    if not config["sample_softmax"]:  # else the official code draws the pixels itself
        want = case.outputs["x"].double() * (2 / (config["vocab_size"] - 1)) - 1
        assert_close(x.movedim(1, -1), want, 1e-6, "pixels")


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


# -- weightings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_monotone_weight_is_an_expectation_of_elbos(name: str) -> None:
    """L_w = sum of elbo_density times the ELBO of data noised to each log-SNR, for any error (here a made-up one)."""
    weight = make_weight(name)
    w = weight(GRID)
    assert (w > 0).all() and (name in MONOTONE) == bool((w.diff() <= 1e-12 * w[0]).all())
    if name not in MONOTONE:
        with pytest.raises(VgmError, match="no ELBO"):
            elbo_density(weight, GRID)
        return
    density = elbo_density(weight, GRID)
    assert (density >= 0).all() and float(density.sum()) == pytest.approx(1)
    errors = torch.sigmoid(GRID[:-1]) * (1.3 + torch.sin(GRID[:-1]))  # of the interval to the right of each log-SNR
    elbos = (0.5 * errors * GRID.diff()).cumsum(0)  # from the noisiest level up to each
    direct = (0.5 * w[:-1] * errors * GRID.diff()).sum() / w[0]
    mixed = (density[:-1] * elbos).sum() + density[-1] * elbos[-1]
    assert float(mixed) == pytest.approx(float(direct), rel=1e-9)


def test_weights_move_with_the_resolution() -> None:
    assert shift_of(None) == shift_of(64) == 0 and shift_of(128) == pytest.approx(-2 * math.log(2))
    moved = make_weight("edm-monotonic", shift_of(256))
    torch.testing.assert_close(moved(GRID + shift_of(256)), make_weight("edm-monotonic")(GRID))
    low, high = FIXED["cosine"](-15, 15, shift_of(256)), FIXED["cosine"](-15, 15)
    u = torch.tensor([0.5], dtype=torch.float64)
    assert float(low.draw(u)[0] - high.draw(u)[0]) == pytest.approx(shift_of(256), abs=0.01)


@pytest.mark.parametrize("config", ["p3", {"name": "sigmoid", "k": 2}, {"name": "sigmoid", "bias": "two"}])
def test_weightings_that_are_none(config: Any) -> None:
    with pytest.raises(VgmError) as e:
        make_weight(config)
    assert e.value.code == 2


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "F", "velocity", "score"])
def test_the_weight_is_on_eps_whatever_the_network_predicts(prediction: str) -> None:
    """Min-SNR of one denoiser is one number, though it is often divided by the wrong thing for v."""
    g = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(5, 2, 3, 3, generator=g, dtype=torch.float64) for _ in range(2))
    l = torch.linspace(-6, 7, 5, dtype=torch.float64)
    source = Denoiser(lambda z, t: torch.tanh(z), "cosine", "eps")

    def network(z: Tensor, t: Tensor) -> Tensor:
        return source.predict(z, source.path.t_of_logsnr(l), prediction)

    view = Denoiser(network, "cosine", prediction, input_scale="none")
    weight, p = make_weight("min-snr"), torch.ones_like(l)
    want, _ = weighted_losses(source, x, l, p, noise, weight)
    got, _ = weighted_losses(view, x, l, p, noise, weight)
    torch.testing.assert_close(got, want)
    snr = l.exp()
    error = source.predict(source.path.add_noise(x, noise, source.path.t_of_logsnr(l)), source.path.t_of_logsnr(l)) - x
    hang = error.square().flatten(1).sum(1) * snr.clamp(max=5) / (2 * torch.cosh(l / 2))  # the paper's, on x0
    torch.testing.assert_close(want / hang, (want / hang)[:1].expand(5))


ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "edm": ({"path": "edm", "prediction": "F", "weighting": "edm", "time_sampling": "edm-lognormal"}, "edm", "edm"),
    "v-cosine": ({"path": "cosine", "prediction": "v"}, "cosine", "v-cosine"),
    "eps-cosine": ({"path": "cosine", "prediction": "eps"}, "cosine", "eps-cosine"),
    "flow": ({"path": "linear", "prediction": "velocity"}, "flow", "fm-ot"),
    "indi": ({"path": "linear", "prediction": "x0"}, "flow", "indi"),
    "min-snr": ({"path": "cosine", "prediction": "v", "weighting": "min-snr-5"}, "cosine", "min-snr"),
}


@pytest.mark.parametrize("row", ROWS)
def test_other_objectives_of_the_house_are_rows_of_the_table(row: str) -> None:
    """w is the density that an objective draws from times its factor on the error of eps."""
    node, density, name = ROWS[row]
    objective = GaussianObjective(nn.Identity(), **node)
    l = torch.linspace(-7, 7, 15, dtype=torch.float64)
    view, t = objective.denoiser, objective.path.t_of_logsnr(l)
    factor = weight_of(objective.weighting, view, t)
    own = 1 if factor is None else factor
    own = own / affine(view.prediction, "eps", view.path, t, view.sigma_data)[1] ** 2
    ratio = FIXED[density](-math.inf, math.inf).density(l) * own / make_weight(name)(l)
    torch.testing.assert_close(ratio, ratio[:1].expand(15))


# -- schedules -------------------------------------------------------------------------------------------------------


def learned(low: float, high: float) -> Any:
    network = Monotone(-high, -low, learn_ends=False)
    suites.randomise(network, scale=2.0)
    return make_density("learned", low, high, 0.0, 1, 0.0, network)


def histogram(low: float, high: float) -> Adaptive:
    density = Adaptive(low, high, bins=17)
    density.histogram = 0.2 + torch.rand(17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return density


@pytest.mark.parametrize("name", [*FIXED, "adaptive", "learned"])
@torch.no_grad()
def test_a_schedule_changes_no_loss(name: str) -> None:
    """E_p[f / p] is the integral of f for every density; draws lie between the ends, which are reached."""
    low, high = -9.0, 11.0
    makers: dict[str, Callable[..., Any]] = {"adaptive": histogram, "learned": learned, **FIXED}
    density = makers[name](low, high)
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    l, p = density.draw(u)
    assert (l.diff() < 0).all() and l.min() >= low and l.max() <= high, "falls from the upper end"
    ends = density.draw(torch.tensor([0.0, 1 - 1e-12], dtype=torch.float64))[0]
    torch.testing.assert_close(ends, torch.tensor([high, low], dtype=torch.float64), rtol=0, atol=1e-3)
    value = torch.exp(-((l - 2) ** 2) / 8)
    assert float((value / p).mean()) == pytest.approx(math.sqrt(8 * math.pi), rel=5e-3)
    torch.testing.assert_close(density.density(l[::100]), p[::100])


def test_the_adaptive_schedule_evens_out_the_loss() -> None:
    density = Adaptive(-10, 10, bins=40, decay=0.9)
    assert float(density.density(GRID[:1])) == pytest.approx(1 / 20), "uniform at first"
    for i in range(200):
        u = (torch.rand((), generator=torch.Generator().manual_seed(i)) + torch.arange(64) / 64) % 1
        l, _ = density.draw(u)
        density.update(l, 0.1 + torch.exp(-((l - 1) ** 2)))
    l, p = density.draw(torch.rand(4000, generator=torch.Generator().manual_seed(0)))
    adapted, flat = (0.1 + torch.exp(-((l - 1) ** 2))) / p, torch.rand(4000) * 20 - 10
    uniform = 0.1 + torch.exp(-((flat.double() - 1) ** 2))
    ratio = (uniform.std() / uniform.mean()) / (adapted.std() / adapted.mean())
    assert ratio**2 > 10


class Shrunk(nn.Module):
    """Predicts eps as a share of z: its error depends strongly on the noise level."""

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.share * x


def test_a_learned_schedule_minimises_the_variance() -> None:
    """The share of the variance that the schedule makes falls; the mean loss and the ends stay."""
    torch.manual_seed(0)
    objective = WeightedELBO(Shrunk(), "sigmoid", "eps", "learned", -10, 10)
    x = torch.randn(32, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(objective.networks["schedule"].parameters(), 0.05)

    def measured(first: int) -> tuple[float, float]:
        found = [objective.loss("main", {"x": x}, Step(first + i)) for i in range(10)]
        return (
            sum(float(loss.detach()) for loss, _ in found) / 10,
            sum(float(logs["variance"]) for _, logs in found) / 10,
        )

    before = measured(1000)
    for i in range(80):
        optimizer.zero_grad()
        objective.loss("main", {"x": x}, Step(i))[0].backward()
        optimizer.step()
    after = measured(2000)
    assert after[1] < 0.5 * before[1] and after[0] == pytest.approx(before[0], rel=0.1)
    l, _ = objective.density.draw(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(l, torch.tensor([10.0, -10.0], dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pinned", [True, False])
def test_ends_of_the_learned_schedule(pinned: bool) -> None:
    """Pinned, gamma(0) = b and gamma(1) = b + |w| whatever the network is; the official one moves them."""
    gamma = Monotone(-13.3, 5.0, pinned=pinned)
    suites.randomise(gamma, scale=3.0)
    b, w = gamma.l1.bias.detach(), gamma.l1.weight.detach()[0]
    ends = gamma(torch.tensor([0.0, 1.0]))[0].detach()
    assert torch.allclose(ends, torch.cat([b, b + w.abs()])) == pinned
    t = torch.linspace(0, 1, 51, dtype=torch.float64, requires_grad=True)
    value, slope = gamma(t)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), t)[0], slope)
    assert (slope > 0).all()
    torch.testing.assert_close(gamma.inverse(value.detach()), t.detach(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("gamma", [Linear(-13.3, 5.0), Scalar(-9.0, 4.0), Monotone(-13.3, 5.0)], ids=repr)
def test_the_path_of_a_schedule(gamma: Any) -> None:
    path, h = GammaPath(gamma, 0.9), 1e-5
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    for value, slope in ((path.alpha, path.alpha_prime), (path.sigma, path.sigma_prime)):
        torch.testing.assert_close(slope(t), (value(t + h) - value(t - h)) / (2 * h), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(path.logsnr(t), 2 * (path.alpha(t) / path.sigma(t)).log())
    torch.testing.assert_close(path.t_of_logsnr(path.logsnr(t)), t, rtol=0, atol=1e-7)


# -- VDM -------------------------------------------------------------------------------------------------------------

TINY = {"name": "vdm", "in_channels": 1, "n_embd": 8, "n_layer": 1, "norm_groups": 4}
COUNTS = {"cifar10": 30_578_181, "cifar10-aug": 122_140_677, "imagenet32": 122_137_605, "imagenet64": 237_603_845}
COUNTS |= {"cifar10-aug-paper": 139_279_877}


class TestNetwork(suites.ModelSuite):
    model = TINY | {"attention": True}
    shape = (1, 8, 8)


class TestVDM(suites.ObjectiveSuite):
    recipe = "vdmpp/mnist-vdm"
    overrides = ("model.n_embd=8", "model.norm_groups=4", "model.n_layer=1", "model.gamma=learnable_nnet",
                 "objective.minimise=variance", "data.size=8", "data.channels=1")  # fmt: skip


class TestWeighted(suites.ObjectiveSuite):
    recipe = "vdmpp/mnist"
    overrides = ("codec=null", "model={name: sit, patch_size: 7, hidden_size: 32, depth: 1, num_heads: 2}")


class TestSampler(suites.SamplerSuite):
    recipe = "vdmpp/mnist-vdm"
    overrides = (
        "model.n_embd=8",
        "model.norm_groups=4",
        "model.n_layer=1",
        "data.size=8",
        "data.channels=1",
        "sampler.decode=sample",
    )
    steps = 3


@pytest.mark.parametrize("name", PRESETS)
def test_counts(name: str) -> None:
    with torch.device("meta"):
        model = VDM(**PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


def test_the_ends_follow_the_bound_and_the_shape_the_variance() -> None:
    """Gradients of b and w are those of the bound; those of the hidden layer are 2 L times as large, item by item."""
    gradients = {}
    for minimise in ("elbo", "variance"):
        torch.manual_seed(0)
        model = VDM(1, 8, 1, 0.0, gamma="learnable_nnet", norm_groups=4)
        suites.randomise(model)
        objective = VariationalBound(model, minimise=minimise)  # type: ignore[arg-type]
        x = (torch.arange(16.0).view(1, 1, 4, 4) * 8).round() / 127.5 - 1
        loss, logs = objective.loss("main", {"x": x}, Step(0))
        loss.backward()
        gradients[minimise] = {k: p.grad for k, p in model.gamma.named_parameters()}
    for name in ("l1.weight", "l1.bias"):
        torch.testing.assert_close(gradients["variance"][name], gradients["elbo"][name])
    factor = 2 * logs["diffusion"]  # one item in the batch
    for name in ("l2.weight", "l3.weight"):
        assert_close(gradients["variance"][name], factor * gradients["elbo"][name], 1e-3, name)


REFUSED: dict[str, tuple[str, str]] = {
    "ends that a path does not reach": ("objective.path=edm", "reaches log-SNRs"),
    "ends the wrong way round": ("objective.logsnr_max=-11", "is not below"),
    "variance channels": ("model.learn_sigma=true", "no variance channels"),
    "an unknown weighting": ("objective.weighting=snr", "unknown weighting"),
    "VDM's bound of another network": ("objective={name: vdm}", "is for the model vdm"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused(why: str, vgm: Callable[..., tuple[int, str, str]]) -> None:
    key, words = REFUSED[why]
    code, _, err = vgm("validate", "vdmpp/mnist", key)
    assert code == 2 and words in err, err


def test_from_training_to_bits(vgm: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: Any) -> None:
    """A VDM trains, samples whole pixels on its own schedule, and its bound is told in three parts."""
    monkeypatch.chdir(tmp_path)
    small = ("model.n_embd=8", "model.norm_groups=4", "model.n_layer=1", "train.steps=2", "train.batch_size=4")
    small += ("data.size=8", "data.channels=1", "train.preview_every=0")
    code, _, err = vgm("train", "vdmpp", "--recipe", "mnist-vdm", *small, "--out", "run")
    assert code == 0, err
    code, out, err = vgm("evaluate", "run", "--metrics", "bits-per-dim:method=elbo:steps=2", "-n", 4, "--json")
    assert code == 0, err
    values = {row["metric"]: row["value"] for row in json.loads(out)}
    whole = values.pop("bits-per-dim")
    parts = ("diffusion", "prior", "reconstruction")
    assert set(values) == {f"bits-per-dim-{p}" for p in parts} and whole == pytest.approx(sum(values.values()))
    assert vgm("sample", "run", "-n", 2, "--steps", 3, "--out", "x.npz")[0] == 0
    assert vgm("sample", "run", "-n", 2, "--steps", 3, "--sampler", "heun", "--out", "y.npz")[0] == 0
    code, _, err = vgm("sample", "run", "-n", 2, "--steps", 0, "--out", "z.npz")
    assert code == 2


def test_other_networks_are_no_vdm(vgm: Callable[..., tuple[int, str, str]]) -> None:
    request = Request((1, 4, 4), generators([0]))
    with pytest.raises(VgmError, match="is for the model vdm"):
        VDMSampler()(Denoiser(nn.Identity(), "cosine", "eps"), request)
