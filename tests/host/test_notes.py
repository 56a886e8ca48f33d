"""The notes of docs/notes: what they say is equal is equal, in the house's own solvers, losses and bounds."""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from vgm_plugins.dmd.losses import discriminator_loss as logistic
from vgm_plugins.dmd.losses import score
from vgm_plugins.flow_grpo.policy import kl_to
from vgm_plugins.llamagen.objective import LlamaGenObjective
from vgm_plugins.score_sde.objective import continuous_losses
from vgm_plugins.score_sde.sde import SDE
from vgm_plugins.sit.transport import Transport
from vgm_plugins.vae.bounds import Terms, estimator_b, log_normal, neg_kl
from vgm_plugins.vdmpp.weightings import make_weight

from vgm_cli.api import Request, Step, generators
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.likelihood import eps_errors
from vgm_cli.diffusion.objectives import gaussian_losses
from vgm_cli.diffusion.path import make_path
from vgm_cli.diffusion.samplers import DDIMSampler, EulerSampler
from vgm_cli.losses.adversarial import discriminator_loss
from vgm_cli.nets.llama import LlamaGen
from vgm_cli.registry import registry

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def notes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plot_notes", ROOT / "docs/plot_notes.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def normal_points() -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (9,), (9,) of standard normal values and their weights (9,), by which means of polynomials of degree 5 in
    either are exact."""
    x, w = np.polynomial.hermite_e.hermegauss(3)
    a, b = (torch.from_numpy(v.ravel()) for v in np.meshgrid(x, x))
    weights = torch.from_numpy(np.outer(w, w).ravel() / w.sum() ** 2)
    return a, b, weights


# -- every objective is a KL divergence --------------------------------------------------------------------------------


def test_the_note_has_a_row_for_every_objective() -> None:
    text = (ROOT / "docs/notes/objectives-are-kl.md").read_text(encoding="utf-8")
    rows = text[text.index("## The table") :].splitlines()
    named = [n for row in rows if row.startswith("| `") for n in re.findall(r"`([\w-]+)`", row.split("|")[1])]
    assert len(named) == len(set(named))
    assert set(named) == set(registry().names("objective"))


def test_the_error_of_eps_adds_up_to_the_kl(notes: ModuleType) -> None:
    l = notes.log_snrs()
    assert notes.half_integral(notes.gap(l), l) == pytest.approx(float(notes.kl(notes.DATA, notes.MODEL)), rel=1e-6)
    at = l.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(notes.kl(notes.noisy(at, notes.DATA), notes.noisy(at, notes.MODEL)).sum(), at)
    torch.testing.assert_close(slope, notes.gap(l) / 2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["elbo", "v-cosine", "sigmoid", "edm-monotonic", "indi"])
def test_a_monotone_weight_averages_kls(notes: ModuleType, name: str) -> None:
    l = notes.log_snrs()
    left = notes.half_integral(make_weight(name)(l) * notes.gap(l), l)
    assert left == pytest.approx(float(notes.average_of_kls(name, l).sum()), rel=1e-5)
    text = (ROOT / "docs/notes/objectives-are-kl.md").read_text(encoding="utf-8")
    row = next(r for r in text.splitlines() if re.match(rf"\| {name}[ :]", r)).split("|")
    assert [float(v) for v in row[2:4]] == pytest.approx([left, left], abs=2e-6)


def perfect(path: str, kind: str, variance: float) -> Denoiser:
    """A denoiser that knows its data to be N(0, variance)."""
    p = make_path(path)

    def network(z: Tensor, t: Tensor) -> Tensor:
        a, s = (c.view(-1, 1) for c in (p.alpha(t.double()), p.sigma(t.double())))
        x0, eps = a * variance * z / (a**2 * variance + s**2), s * z / (a**2 * variance + s**2)
        if kind == "x0":
            return x0
        if kind == "v":
            return a * eps - s * x0
        slopes = [c.view(-1, 1) for c in (p.alpha_prime(t.double()), p.sigma_prime(t.double()))]
        return eps if kind == "eps" else slopes[0] * x0 + slopes[1] * eps

    return Denoiser(network, p, kind)


@pytest.mark.parametrize(
    ("path", "kind", "weighting", "name"),
    [
        ("linear", "velocity", "uniform", "fm-ot"),
        ("cosine", "v", "uniform", "v-cosine"),
        ("linear", "x0", "uniform", "indi"),
        ("cosine", "eps", "uniform", "eps-cosine"),
    ],
)
def test_losses_of_the_house_are_their_rows(notes: ModuleType, path: str, kind: str, weighting: str, name: str) -> None:
    """How much worse a wrong denoiser does by the training loss at uniform times, is the weighted integral over log-SNRs
    times a constant that does not depend on what is wrong."""
    a, b, w = normal_points()
    ratios = []
    for data, model in ((notes.DATA, notes.MODEL), (0.8, 0.3)):
        t = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
        excess = torch.zeros(len(t), dtype=torch.float64)
        for x, noise, weight in zip(a, b, w):
            x0, eps = (torch.full((len(t), 1), float(v), dtype=torch.float64) for v in (x * data**0.5, noise))
            wrong, best = (gaussian_losses(perfect(path, kind, v), x0, t, eps, weighting)[0] for v in (model, data))
            excess += weight * (wrong - best).double()
        l = notes.log_snrs()
        ratios.append(float(excess.mean()) / notes.half_integral(make_weight(name)(l) * notes.gap(l, data, model), l))
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-3)
    if name == "fm-ot":
        assert ratios[0] == pytest.approx(1, rel=1e-3)


def test_sits_loss_and_score_sdes_likelihood_weighting_are_kls(notes: ModuleType) -> None:
    a, b, w = normal_points()
    l = notes.log_snrs()

    def excess(losses, t: Tensor) -> Tensor:
        total = torch.zeros(len(t), dtype=torch.float64)
        for x, noise, weight in zip(a, b, w):
            x0, eps = (torch.full((len(t), 1), float(v), dtype=torch.float64) for v in (x * notes.DATA**0.5, noise))
            total += weight * (losses(x0, eps, t, notes.MODEL) - losses(x0, eps, t, notes.DATA)).double()
        return total

    flow = Transport("linear", "velocity")

    def sit(x0: Tensor, eps: Tensor, t: Tensor, variance: float) -> Tensor:
        u = perfect("linear", "velocity", variance)
        return flow.losses(lambda z, s: -u.predict(z, 1 - s, "velocity"), x0, eps, t)  # SiT's time runs to data

    uniform = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    by_kls = float(notes.average_of_kls("fm-ot", l).sum())
    assert float(excess(sit, uniform).mean()) == pytest.approx(by_kls, rel=1e-3)

    sde = SDE(kind="vp")

    def likelihood(x0: Tensor, eps: Tensor, t: Tensor, variance: float) -> Tensor:
        def network(z: Tensor, labels: Tensor) -> Tensor:
            return perfect("vp", "eps", variance).predict(z, labels.double() / 999, "eps")

        return continuous_losses(sde, network, x0, t, eps, reduce_mean=False, likelihood_weighting=True)

    grid = torch.logspace(-5, 0, 6000, dtype=torch.float64)
    whole = float(torch.trapezoid(excess(likelihood, grid), grid))
    ends = [notes.kl(*(notes.noisy(sde.path.logsnr(t), v) for v in (notes.DATA, notes.MODEL))) for t in grid[[0, -1]]]
    assert whole == pytest.approx(float(ends[0] - ends[1]), rel=1e-3)


def test_the_bound_of_any_prediction_is_of_eps(notes: ModuleType) -> None:
    a, b, w = normal_points()
    l = torch.linspace(-4, 4, 9, dtype=torch.float64)
    for kind in ("eps", "x0", "v"):
        view = perfect("cosine", kind, notes.MODEL)
        for value in l:
            t = view.path.t_of_logsnr(value).expand(len(a))
            error = (w * eps_errors(view, (a * notes.DATA**0.5)[:, None], t, b[:, None])).sum()
            least = torch.sigmoid(value) * notes.DATA / notes.noisy(value, notes.DATA)  # of the best denoiser
            assert float(error - least) == pytest.approx(float(notes.gap(value)), rel=1e-4, abs=1e-7)


def test_next_code_losses_are_likelihoods() -> None:
    """Of every sequence of four codes out of three: probabilities add up to 1, and the loss is KL plus entropy."""
    torch.manual_seed(0)
    net = LlamaGen(vocab_size=3, grid=(2, 2), num_classes=1, dim=16, n_layer=1, n_head=2, multiple_of=8)
    torch.nn.init.normal_(net.output.weight)
    objective, y = LlamaGenObjective(net.eval()), torch.zeros(1, dtype=torch.long)
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))
    nats = torch.stack([
        4 * objective.loss("main", {"tokens": ids.view(1, 2, 2), "cond": {"y": y}}, Step(0))[0].detach() for ids in every
    ]).double()  # fmt: skip
    assert float((-nats).exp().sum()) == pytest.approx(1, abs=1e-5)
    counts = torch.randint(0, 4, (len(every),))
    p = counts / counts.sum()
    data = every.repeat_interleave(counts, 0)
    batch = {"tokens": data.view(-1, 2, 2), "cond": {"y": y.expand(len(data))}}
    loss = 4 * float(objective.loss("main", batch, Step(0))[0].detach())
    there = p > 0
    entropy = -float((p[there] * p[there].log()).sum())
    divergence = float((p[there] * (p[there].log() + nats[there])).sum())
    assert loss - entropy == pytest.approx(divergence, abs=1e-4)


def test_the_bound_of_a_vae_is_the_kl_of_pairs() -> None:
    """Data N(0, 2), z ~ N(0, 1), x | z ~ N(z, 1), an encoder N(0.3 x, 0.6^2)."""
    x, noise, w = normal_points()
    x = (x * 2**0.5)[:, None]
    mu, logvar = 0.3 * x, torch.full_like(x, 2 * math.log(0.6))
    z = mu + 0.6 * noise[:, None]
    log_px = log_normal(x, z)[None]
    bound = estimator_b(Terms(log_px, log_normal(z)[None], log_normal(z, mu, logvar)[None], neg_kl(mu, logvar)))
    entropy = 0.5 * math.log(2 * math.pi * math.e * 2)
    encoder = torch.tensor([[2.0, 0.6], [0.6, 0.3**2 * 2 + 0.6**2]], dtype=torch.float64)  # covariance of (x, z)
    decoder = torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    pairs = [torch.distributions.MultivariateNormal(zero, c) for c in (encoder, decoder)]
    expected = float(torch.distributions.kl_divergence(*pairs))
    assert -float((w * bound).sum()) - entropy == pytest.approx(expected, abs=1e-10)


def test_the_best_discriminator_measures_jensen_and_shannon() -> None:
    real, made = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 2])  # four draws each, of three pictures
    p, q = (torch.bincount(x, minlength=3).double() / 4 for x in (real, made))
    logits = (p.log() - q.log()).clamp(-40, 40)  # where one of them is 0 the discriminator is sure
    mean = (p + q) / 2
    js = sum(0.5 * float((v[v > 0] * (v[v > 0] / mean[v > 0]).log()).sum()) for v in (p, q))
    assert float(logistic(logits[real], logits[made])) == pytest.approx(2 * math.log(2) - 2 * js, abs=1e-9)
    vanilla = float(discriminator_loss("vanilla", logits[real], logits[made]))
    assert vanilla == pytest.approx(math.log(2) - js, abs=1e-9)


def test_dmd_descends_the_reverse_kl() -> None:
    """A student theta + 0.7 z, data N(0.4, 0.5^2), at one noise level."""
    z, noise, w = normal_points()
    path, t, spread, mean, std = make_path("cosine"), torch.tensor(0.4, dtype=torch.float64), 0.7, 0.4, 0.5
    alpha, sigma = path.alpha(t), path.sigma(t)
    theta = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    q, p = alpha**2 * spread**2 + sigma**2, alpha**2 * std**2 + sigma**2
    divergence = 0.5 * (q / p - 1 - (q / p).log() + (alpha * (theta - mean)) ** 2 / p)
    (expected,) = torch.autograd.grad(divergence, theta)
    x_t = (alpha * (theta.detach() + spread * z) + sigma * noise)[:, None]
    a, s = alpha.expand(len(z)), sigma.expand(len(z))
    fake = theta.detach() + alpha * spread**2 / q * (x_t - alpha * theta.detach())  # perfect denoisers
    real = mean + alpha * std**2 / p * (x_t - alpha * mean)
    difference = score(fake, x_t, a, s) - score(real, x_t, a, s)
    assert float(alpha * (w * difference[:, 0]).sum()) == pytest.approx(float(expected), abs=1e-10)


def test_the_price_of_flow_grpo_is_a_kl_of_gaussians() -> None:
    a, b, std = torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.full((3, 1, 1), 0.7)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(a, std), normal(b, std)).flatten(1).mean(1)
    torch.testing.assert_close(kl_to(a, b, std), expected)


# -- DDIM is flow matching's Euler -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["vp", "cosine", "subvp", "linear", "ve"])
@pytest.mark.parametrize("steps", [3, 20])
def test_ddim_is_the_flows_euler(notes: ModuleType, path: str, steps: int) -> None:
    _, alphas, sigmas = notes.levels_of(path, steps)
    x = notes.normal(16, 0) * sigmas[0]
    made = notes.by_ddim(x, alphas, sigmas)
    for other in (notes.by_flow, notes.by_sigma):
        torch.testing.assert_close(other(x, alphas, sigmas), made, rtol=1e-6, atol=1e-6)


def test_so_are_the_samplers_of_the_command_line(notes: ModuleType) -> None:
    view = notes.CLUSTERS.denoiser("linear")
    made = [
        sampler(view, Request((2,), generators(range(6)), steps=12))
        for sampler in (DDIMSampler(steps=12), EulerSampler(steps=12))
    ]
    torch.testing.assert_close(*made, rtol=1e-5, atol=1e-5)


def test_euler_in_the_paths_own_time_is_another_solver(notes: ModuleType) -> None:
    times, alphas, sigmas = notes.levels_of("vp", 16)
    x = notes.normal(200, 0) * sigmas[0]
    end = notes.end_of_flow(x, "vp", times)
    ddim, euler = notes.by_ddim(x, alphas, sigmas), notes.by_time(x, "vp", times)
    assert notes.distance(ddim, euler) > 0.05 > 1e-6
    halves = [notes.by_ddim(x, *notes.levels_of("vp", n)[1:]) for n in (32, 64)]
    first, second = (notes.distance(y, end) for y in halves)
    assert first / second == pytest.approx(2, rel=0.15)  # of first order


# -- one density -------------------------------------------------------------------------------------------------------


def test_the_scores_are_those_of_the_density(notes: ModuleType) -> None:
    path = make_path("vp")
    t = torch.full((5,), 0.3, dtype=torch.float64)
    z = notes.normal(5, 1).requires_grad_(True)
    log_p = notes.CLUSTERS.log_density(z, path.alpha(t), path.sigma(t))
    (gradient,) = torch.autograd.grad(log_p.sum(), z)
    view = notes.CLUSTERS.denoiser(path)
    torch.testing.assert_close(view.predict(z.detach(), t, "score"), gradient, rtol=1e-5, atol=1e-5)


def test_marginals_agree_there_and_back_by_chance_or_not(notes: ModuleType) -> None:
    path, n = make_path(notes.PATH), 3000
    times = notes.time_grid(path, 120)
    noise = notes.normal(n, 3)
    films = {
        "forward": notes.forward(notes.CLUSTERS.draw(n, notes.seeded(5)), times.flip(0), 6)[::-1],
        "reverse": notes.backward(noise, times, 4),
        "ode": notes.backward(noise, times, None),
    }
    means, between = notes.CLUSTERS.means, torch.cov(notes.CLUSTERS.means.T, correction=0)
    for i in (0, 60, 90, 120):
        alpha, sigma = path.alpha(times[i]), path.sigma(times[i])
        cov = alpha**2 * (between + notes.CLUSTERS.std**2 * torch.eye(2)) + sigma**2 * torch.eye(2)
        for name, film in films.items():
            assert len(film) == len(times)
            torch.testing.assert_close(film[i].mean(0), alpha * means.mean(0), rtol=0, atol=0.09, msg=f"{name} {i}")
            torch.testing.assert_close(torch.cov(film[i].T), cov, rtol=0.09, atol=0.09, msg=f"{name} {i}")
    assert notes.distance(films["reverse"][-1], films["ode"][-1]) > 1  # and yet the paths differ


@pytest.mark.parametrize("path", ["linear", "cosine", "vp"])
def test_the_ode_gives_the_exact_likelihood(notes: ModuleType, path: str) -> None:
    points = notes.CLUSTERS.draw(12, notes.seeded(8))
    found, _ = notes.likelihoods(points, path, rtol=1e-8, atol=1e-8)
    p = make_path(path)
    exact = notes.CLUSTERS.log_density(points, p.alpha(p.t_min), p.sigma(p.t_min))
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5 if path != "vp" else 1e-3)  # vp ends near its prior
