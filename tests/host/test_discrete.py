"""The discrete process: closed forms, exact samplers on a Gaussian, resampling, and the objective's bookkeeping."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vgm_cli.api import Request, Step, generators
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.discrete import (
    SCHEDULES,
    DiscreteDiffusion,
    discretized_gaussian_log_likelihood,
    named_betas,
    normal_kl,
    space_timesteps,
)
from vgm_cli.diffusion.guidance import Guidance, classifier_gradient
from vgm_cli.diffusion.iddpm import IDDPM, DDIMSampler
from vgm_cli.diffusion.resample import LossSecondMomentResampler, UniformResampler, build_resampler, draw
from vgm_cli.errors import VgmError

# -- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [10, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule(schedule: str, steps: int) -> None:
    betas = named_betas(schedule, steps, *((1e-4, 0.02) if schedule == "linear" else ()))
    assert betas.shape == (steps,) and betas.dtype == np.float64 and (betas > 0).all() and (betas <= 1).all()
    assert schedule == "const" or (np.diff(betas) >= 0).all()


def test_linear_is_scaled_to_its_length() -> None:
    assert named_betas("linear", 1000)[[0, -1]] == pytest.approx([1e-4, 0.02])
    assert named_betas("linear", 250)[[0, -1]] == pytest.approx([4e-4, 0.08])
    assert named_betas("linear", 250, 1e-4, 0.02)[[0, -1]] == pytest.approx([1e-4, 0.02])
    assert named_betas("scaled_linear", 1000, 0.00085, 0.012)[[0, -1]] == pytest.approx([0.00085, 0.012])


def test_unknown_names_are_refused() -> None:
    with pytest.raises(VgmError, match="beta schedule"):
        named_betas("cosinus", 10)
    for bad in ({"mean": "epsilon"}, {"variance": "small"}, {"loss": "l2"}):
        with pytest.raises(VgmError, match="unknown"):
            DiscreteDiffusion([0.1, 0.2], **bad)
    with pytest.raises(VgmError, match="betas"):
        DiscreteDiffusion([0.0, 0.2])


# -- respacing -------------------------------------------------------------------------------------------------------


def test_spacing_rules() -> None:
    assert space_timesteps(1000, 4) == space_timesteps(1000, "4") == [0, 333, 666, 999]
    assert space_timesteps(1000, "ddim4") == [0, 250, 500, 750]
    assert space_timesteps(300, [10, 15, 20])[-1] == 299 and len(space_timesteps(300, "10,15,20")) == 45
    assert space_timesteps(10, 1) == [0]
    assert space_timesteps(6, 3) == [0, 2, 5]  # 2.5 rounds to even
    for steps, sections in ((1000, "ddim999"), (10, 11), (10, "0")):
        with pytest.raises(VgmError):
            space_timesteps(steps, sections)


def test_respacing_keeps_the_noise_levels() -> None:
    whole = DiscreteDiffusion.create("cosine")
    spaced = DiscreteDiffusion.create("cosine", respacing="25")
    assert spaced.steps == 25 and spaced.original_steps == 1000
    kept = whole.tables["alphas_cumprod"][spaced.timestep_map]
    np.testing.assert_allclose(spaced.tables["alphas_cumprod"], kept, rtol=1e-9)
    same = DiscreteDiffusion.create("cosine", respacing="1000")
    np.testing.assert_allclose(same.betas, whole.betas, rtol=1e-9)


def test_rescaled_timesteps_run_to_a_thousand() -> None:
    d = DiscreteDiffusion.create(steps=4000, respacing="5", rescale_timesteps=True)
    told = d.model_timesteps(torch.arange(5))
    assert told.dtype == torch.float32 and told.tolist() == [0.25 * i for i in d.timestep_map]
    assert DiscreteDiffusion.create(respacing="5").model_timesteps(torch.arange(5)).tolist() == [0, 250, 500, 749, 999]


# -- the algebra -----------------------------------------------------------------------------------------------------


def test_conversions_are_inverse() -> None:
    d = DiscreteDiffusion.create(learn_sigma=False)
    x0, eps = torch.randn(6, 3, 4, 4), torch.randn(6, 3, 4, 4)
    t = torch.tensor([0, 1, 100, 500, 900, 999])
    x = d.q_sample(x0, t, eps)
    torch.testing.assert_close(d.x0_from_eps(x, t, eps)[:5], x0[:5], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(d.eps_from_x0(x, t, x0)[1:], eps[1:], rtol=1e-3, atol=1e-3)
    x_prev = d.q_posterior(x0, x, t).mean
    torch.testing.assert_close(d.x0_from_x_prev(x, t, x_prev)[:4], x0[:4], rtol=1e-2, atol=1e-2)


def test_posterior_is_bayes() -> None:
    """q(x_{t-1} | x_t, x0) from Gaussian products agrees with the tables."""
    d, t = DiscreteDiffusion.create(), 300
    beta, before = d.betas[t], d.tables["alphas_cumprod_prev"][t]
    precision = (1 - beta) / beta + 1 / (1 - before)
    assert d.tables["posterior_variance"][t] == pytest.approx(1 / precision, rel=1e-9)
    x0, x = 0.3, -1.2
    mean = (math.sqrt(1 - beta) * x / beta + math.sqrt(before) * x0 / (1 - before)) / precision
    got = d.q_posterior(torch.full((1, 1), x0), torch.full((1, 1), x), torch.tensor([t])).mean
    assert float(got) == pytest.approx(mean, rel=1e-5)


def test_learned_range_reaches_both_ends() -> None:
    d = DiscreteDiffusion.create()
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([10, 700])
    for value, variance in ((-1.0, "posterior_variance"), (1.0, None)):
        output = torch.cat([torch.randn_like(x), torch.full_like(x, value)], dim=1)
        got = d.p_mean_variance(output, x, t).variance[:, 0, 0, 0]
        table = d.betas if variance is None else d.tables[variance]
        torch.testing.assert_close(got, torch.from_numpy(table[t.numpy()]).float())


def test_channels_must_fit_the_variance() -> None:
    x, t = torch.zeros(1, 3, 2, 2), torch.zeros(1, dtype=torch.long)
    with pytest.raises(VgmError, match="3 channels where 'learned_range' variance needs 6"):
        DiscreteDiffusion.create().p_mean_variance(x, x, t)
    with pytest.raises(VgmError, match="6 channels"):
        DiscreteDiffusion.create(learn_sigma=False).p_mean_variance(torch.zeros(1, 6, 2, 2), x, t)


def test_normal_kl_against_torch() -> None:
    m1, v1, m2, v2 = (torch.randn(20) for _ in range(4))
    a, b = (torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in ((m1, v1), (m2, v2)))
    torch.testing.assert_close(normal_kl(m1, v1, m2, v2), torch.distributions.kl_divergence(a, b), rtol=1e-4, atol=1e-5)


def test_bins_of_the_decoder_sum_to_one() -> None:
    values = torch.linspace(-1, 1, 256)
    means, scales = torch.full((256,), 0.2), torch.full((256,), -1.5)
    assert float(discretized_gaussian_log_likelihood(values, means, scales).exp().sum()) == pytest.approx(1, abs=1e-4)


# -- losses ----------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """A network with a gradient: eps and variance channels scale with two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([self.a * x, self.b * torch.cos(x)], dim=1)


def test_the_bound_trains_only_the_variance() -> None:
    d, net = DiscreteDiffusion.create(), Linear()
    terms = d.losses(net, torch.rand(4, 3, 4, 4), torch.tensor([0, 5, 500, 999]), torch.randn(4, 3, 4, 4))
    terms["vb"].mean().backward(retain_graph=True)
    assert net.b.grad.abs() > 0 and net.a.grad == 0
    net.zero_grad()
    terms["mse"].mean().backward()
    assert net.a.grad.abs() > 0 and net.b.grad == 0
    torch.testing.assert_close(terms["loss"], terms["mse"] + terms["vb"])


def test_the_right_answer_costs_nothing() -> None:
    x0, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([3, 400, 999])
    for mean in ("eps", "x0", "x_prev"):
        d = DiscreteDiffusion(named_betas("linear", 1000), mean, "fixed_small")
        x = d.q_sample(x0, t, noise)
        answer = {"eps": noise, "x0": x0, "x_prev": d.q_posterior(x0, x, t).mean}[mean]
        assert float(d.losses(lambda x, t, answer=answer: answer, x0, t, noise)["loss"].max()) < 1e-10


# -- samplers on data that is exactly Gaussian -----------------------------------------------------------------------


def exact(d: DiscreteDiffusion, mean: float, std: float) -> Any:
    """The optimal eps network for data N(mean, std^2)."""
    alpha_bar = torch.from_numpy(np.cumprod(1 - named_betas("linear", 1000))).float()

    def model(x: Tensor, t: Tensor) -> Tensor:
        a = alpha_bar[t].view(-1, 1)
        return torch.sqrt(1 - a) * (x - a.sqrt() * mean) / (a * std**2 + 1 - a)

    return model


@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)])
def test_samplers_reach_a_gaussian(sampler: Any, eta: float) -> None:
    d = DiscreteDiffusion.create(respacing="100", learn_sigma=False, sigma_small=True)
    g = torch.Generator().manual_seed(0)
    steps = d.sample_loop(
        exact(d, 0.5, 0.3), torch.randn(5000, 1, generator=g), lambda: torch.randn(5000, 1, generator=g), sampler, eta
    )
    *_, (x, _) = steps
    assert abs(float(x.mean()) - 0.5) < 0.03 and abs(float(x.std()) - 0.3) < 0.03


def test_ddim_reverse_undoes_ddim() -> None:
    d = DiscreteDiffusion.create(respacing="500", learn_sigma=False)
    x0, model = torch.linspace(-0.5, 1.5, 9).view(-1, 1), exact(d, 0.5, 0.3)
    *_, (noise, _) = d.ddim_reverse_loop(model, x0)
    *_, (again, _) = d.sample_loop(model, noise, lambda: torch.zeros_like(x0), "ddim")
    torch.testing.assert_close(again, x0, rtol=0.02, atol=0.02)


def test_guidance_moves_towards_the_classifier() -> None:
    d = DiscreteDiffusion.create(respacing="50", learn_sigma=False)
    push = lambda x, t: torch.full_like(x, 2.0)
    for sampler in ("ddpm", "ddim"):
        ends = []
        for cond_fn in (None, push):
            g = torch.Generator().manual_seed(0)
            x = torch.randn(500, 1, generator=g)
            *_, (x, _) = d.sample_loop(
                exact(d, 0.0, 0.5), x, lambda g=g: torch.randn(500, 1, generator=g), sampler, cond_fn=cond_fn
            )
            ends.append(float(x.mean()))
        assert ends[1] > ends[0] + 0.1, sampler


def test_one_step_is_allowed() -> None:
    for variance in ("fixed_small", "fixed_large", "learned_range"):
        d = DiscreteDiffusion(named_betas("linear", 1000), "x0", variance, keep=[999])
        answer = torch.full((1, 2 if d.learned else 1, 2, 2), 0.25)
        ((x, _),) = d.sample_loop(lambda x, t, answer=answer: answer, torch.randn(1, 1, 2, 2), list)
        torch.testing.assert_close(x, torch.full((1, 1, 2, 2), 0.25))


def test_bound_is_finite_and_sums() -> None:
    d = DiscreteDiffusion.create("cosine", steps=12)
    g = torch.Generator().manual_seed(0)
    out = d.bpd_loop(Linear(), torch.rand(2, 1, 4, 4) * 2 - 1, lambda: torch.randn(2, 1, 4, 4, generator=g))
    assert out["vb"].shape == out["mse"].shape == out["xstart_mse"].shape == (2, 12)
    torch.testing.assert_close(out["total_bpd"], out["vb"].sum(1) + out["prior_bpd"])
    assert torch.isfinite(out["total_bpd"]).all() and (out["total_bpd"] > 0).all()


def test_given_images_are_encoded_and_come_back() -> None:
    """The sampler's own noise is that of the reversed steps; item i starts from image i of those given."""
    d = DiscreteDiffusion.create(learn_sigma=False)
    view = Denoiser(exact(d, 0.1, 0.5), {"name": "vp-discrete", "steps": 1000}, "eps", time="index")
    images = torch.rand(3, 4) * 2 - 1
    request = Request((4,), generators(range(2)), images=images, index=[1, 2])
    sampler = DDIMSampler(steps=500)
    torch.testing.assert_close(sampler(view, request), images[1:], rtol=2e-2, atol=2e-2)
    assert request.info["nfe"] == 1000
    drawn = sampler(view, Request((4,), generators(range(2))))
    assert (drawn - images[1:]).abs().max() > 0.5


# -- guidance --------------------------------------------------------------------------------------------------------


class Conditional(nn.Module):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x * 0 + y.view(-1, 1, 1, 1), x * 0 + 10 * y.view(-1, 1, 1, 1)], dim=1)

    def null_condition(self, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**cond, "y": torch.zeros_like(cond["y"])}


def test_guided_channels() -> None:
    x, t, y = torch.zeros(2, 4, 1, 1), torch.zeros(2), torch.tensor([1.0, 2.0])
    network, cond = Conditional(), {"y": y}
    null = network.null_condition(cond)
    every = Guidance(3.0)(network, x, t, cond, null)[:, :, 0, 0]
    assert every.tolist() == [[3.0] * 4 + [10.0] * 4, [6.0] * 4 + [20.0] * 4]
    three = Guidance(3.0, channels=3)(network, x, t, cond, null)[:, :, 0, 0]
    assert three[0].tolist() == [3.0] * 3 + [1.0] + [10.0] * 4


def test_classifier_gradient_is_that_of_the_chosen_class() -> None:
    weight = torch.randn(3, 4)
    gradient = classifier_gradient(lambda x, t: x.flatten(1) @ weight.T, torch.tensor([2, 0]), scale=2.0)
    x = torch.randn(2, 1, 2, 2)
    p = torch.softmax(x.flatten(1) @ weight.T, dim=1)
    want = 2.0 * (weight[[2, 0]] - p @ weight)
    with torch.no_grad():
        torch.testing.assert_close(gradient(x, torch.zeros(2)).flatten(1), want)


# -- resampling ------------------------------------------------------------------------------------------------------


def test_draws_follow_the_weights_and_keep_the_mean() -> None:
    weights = torch.tensor([1.0, 0.0, 3.0, 4.0], dtype=torch.float64)
    t, w = draw(weights, torch.rand(20000, generator=torch.Generator().manual_seed(0)))
    share = torch.bincount(t, minlength=4) / 20000
    torch.testing.assert_close(share.double(), weights / 8, atol=0.01, rtol=0)
    torch.testing.assert_close(w, 8 / (4 * weights[t]).float())
    assert t.max() <= 3 and draw(weights, torch.tensor([0.0, 1 - 1e-7]))[0].tolist() == [0, 3]


def test_second_moments_need_a_full_history() -> None:
    r = LossSecondMomentResampler(3, history_per_term=2, uniform_prob=0.0)
    r.update(torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([9.0, 3.0, 4.0, 1.0, 1.0, 2.0]))
    assert r.weights().tolist() == [1, 1, 1] and not r.warmed_up
    r.update(torch.tensor([2]), torch.tensor([2.0]))
    want = torch.tensor([math.sqrt(12.5), 1.0, 2.0], dtype=torch.float64)  # the 9 has left
    torch.testing.assert_close(r.weights(), want / want.sum())
    other = LossSecondMomentResampler(3, 2, 0.0)
    other.load_state_dict({k: v.clone() for k, v in r.state_dict().items()})
    assert torch.equal(other.weights(), r.weights())


def test_resamplers_by_name() -> None:
    assert isinstance(build_resampler("uniform", 10), UniformResampler)
    with pytest.raises(VgmError, match="unknown resampler"):
        build_resampler("importance", 10)


# -- the objective ---------------------------------------------------------------------------------------------------


def test_objective_learns_which_timesteps_matter() -> None:
    objective = IDDPM(Linear(), "cosine", steps=4, resampler="loss-second-moment")
    for index in range(40):
        step = Step(index=index)
        objective.loss("main", {"x": torch.rand(16, 1, 2, 2)}, step)
        objective.after_step(step)
    weights = objective.resampler.weights()
    assert objective.resampler.warmed_up and weights.std() > 0
    fresh = IDDPM(Linear(), "cosine", steps=4, resampler="loss-second-moment")
    fresh.load_state_dict(objective.state_dict())
    batch, step = {"x": torch.rand(16, 1, 2, 2)}, Step(index=99)
    torch.testing.assert_close(fresh.loss("main", batch, step)[0], objective.loss("main", batch, step)[0])


def test_micro_batches_reach_the_resampler_in_order() -> None:
    whole, parts = (IDDPM(Linear(), "cosine", steps=5, resampler="loss-second-moment") for _ in range(2))
    x = torch.rand(8, 1, 2, 2)
    whole.loss("main", {"x": x}, Step(index=0))
    for micro in range(2):
        parts.loss("main", {"x": x[4 * micro : 4 * micro + 4]}, Step(index=0, micro=micro, micros=2))
    for objective in (whole, parts):
        objective.after_step(Step(index=0))
    torch.testing.assert_close(parts.resampler.history, whole.resampler.history)
    assert int(parts.resampler.counts.sum()) == 8


def test_contradictions_are_refused() -> None:
    model = Linear()
    model.learn_sigma = False
    with pytest.raises(VgmError, match="learn_sigma"):
        IDDPM(model)
    with pytest.raises(VgmError, match="contradicts"):
        IDDPM(Linear(), variance="fixed_small")
