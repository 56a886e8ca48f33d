"""Flow-GRPO against yifan123/flow_grpo@ac4c86e (golden cases), identities of the policy, the objective's behaviour."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vgm_plugins.flow_grpo.groups import advantages, k_repeat, overall_advantages, worth_training
from vgm_plugins.flow_grpo.objective import FlowGRPO, gather, places
from vgm_plugins.flow_grpo.policy import kl_to, levels, log_prob, policy_loss, roll_out, transition

from vgm_cli import recipe as recipes
from vgm_cli.api import Step
from vgm_cli.conditioning import ClassLabel, Conditions, Part
from vgm_cli.diffusion.denoiser import Denoiser, flow_velocity
from vgm_cli.engine.train.ema import EMA
from vgm_cli.errors import VgmError
from vgm_cli.nn import lora
from vgm_cli.registry import registry
from vgm_cli.rewards.text import text_score
from vgm_cli.testing import suites
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, assert_close

golden = GoldenChecks("flow-grpo")
KINDS = ("grpo", "rwr", "sft", "dpo")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def toy_velocity(x: Tensor, timestep: Tensor | float) -> Tensor:
    """The network that the cases state in their notes."""
    return 0.3 * torch.tanh(x) + 0.0005 * timestep


def kind_of(case: GoldenCase) -> str:
    return "cps" if "coefficients-preserving" in case.notes else case.config.get("sde_type", "sde")


# -- golden cases ----------------------------------------------------------------------------------------------------


@golden.check(lambda c: "step_indices" in c.config)
def one_step(case: GoldenCase) -> None:
    config, kind = case.config, kind_of(case)
    sigmas = levels(config["num_steps"], config["shift"])
    if "out/sigmas" in case:
        assert_close(sigmas, case.outputs["sigmas"], 1e-6, "sigmas")
        assert_close(sigmas[:-1] * 1000, case.outputs["timesteps"], 1e-6, "timesteps")
    index = torch.tensor(config["step_indices"])
    if "out/t_used" in case:
        assert_close(sigmas[index] * 1000, case.outputs["t_used"], 1e-6, "t_used")
    step = transition(case.inputs["x"], case.inputs["v"], sigmas.double(), index, config["noise_level"], kind)
    sampled = step.mean + step.scale * case.inputs["noise"]
    got = {"mean": step.mean, "std_dev_t": step.std, "std": step.std, "prev": sampled, "prev_sampled": sampled}
    got["log_prob"] = log_prob(sampled, step, kind)
    if "prev" in case.inputs:
        got["log_prob_given_prev"] = log_prob(case.inputs["prev"], step, kind)
    for name, want in case.outputs.items():
        if name not in ("sigmas", "timesteps", "t_used"):
            # the grid is float32 as in the official scheduler, also where a formula was evaluated in float64
            assert_close(got[name].to(want.dtype), want, 1e-5, name)


@golden.check(lambda c: "draws_randn" in c.inputs)
def rollout(case: GoldenCase) -> None:
    config, kind = case.config, kind_of(case)
    sigmas, draws = levels(config["num_steps"], config["shift"]), case.inputs["draws_randn"]
    assert_close(sigmas[:-1] * 1000, case.outputs["timesteps"], 1e-6, "timesteps")

    def velocity(x: Tensor, i: int) -> Tensor:
        return toy_velocity(x, sigmas[i] * 1000)

    noisy = range(config["num_steps"])
    run = roll_out(velocity, case.inputs["x_T"], sigmas, config["noise_level"], noisy, lambda i: draws[i], kind)
    assert_close(torch.stack(run.latents), case.outputs["latents"], 1e-4, "latents")
    assert_close(torch.stack([run.log_probs[i] for i in noisy]), case.outputs["log_probs"], 1e-4, "log_probs")
    means, new = [], []
    for i in noisy:
        x, index = run.latents[i], torch.full((len(draws[i]),), i)
        means.append(transition(x, velocity(x, i), sigmas, index, config["noise_level"], kind).mean)
        moved = transition(x, velocity(x, i) + 0.01, sigmas, index, config["noise_level"], kind)
        new.append(log_prob(run.latents[i + 1], moved, kind))
    if "means" in case.outputs:
        assert_close(torch.stack(means), case.outputs["means"], 1e-4, "means")
    assert_close(torch.stack(new), case.outputs["log_probs_new"], 1e-4, "log_probs_new")


@golden.check(lambda c: "prompt_ids" in c.inputs)
def group_advantages(case: GoldenCase) -> None:
    rewards, groups = case.inputs["rewards"], case.inputs["prompt_ids"]
    for name, want in case.outputs.items():
        kind, _, flag = name.partition("_gstd")
        assert kind in KINDS, name
        given = rewards if want.ndim == rewards.ndim else rewards[:, 0]
        got = advantages(given, groups, kind, global_std=flag == "1")  # type: ignore[arg-type]
        assert_close(got, want, 1e-9, name)


@golden.check(lambda c: "clip_range" in c.config)
def loss_and_gradients(case: GoldenCase) -> None:
    config, values = case.config, case.inputs
    j = config["j"]
    log_p, mean = values["log_prob"].clone().requires_grad_(True), values["mean"].clone().requires_grad_(True)
    loss, logs = policy_loss(
        log_p, values["old"][:, j], values["adv"][:, j], config["clip_range"], config["adv_clip_max"]
    )
    got = {"policy_loss": loss, "approx_kl": logs["approx_kl"], "clipfrac": logs["clip_fraction"]}
    got["ratio"] = (log_p - values["old"][:, j]).exp()
    if config["beta"] > 0:
        kl = kl_to(mean, values["mean_ref"], values["std"]).mean()
        loss = loss + config["beta"] * kl
        got["kl_loss"] = kl
    got["loss"] = loss
    wanted = [x for x, name in ((log_p, "dloss_dlogprob"), (mean, "dloss_dmean")) if name in case.outputs]
    got |= dict(
        zip((n for n in ("dloss_dlogprob", "dloss_dmean") if n in case.outputs), torch.autograd.grad(loss, wanted))
    )
    for name, want in case.outputs.items():
        assert_close(got[name], want, 1e-5, name)


@golden.check(lambda c: "num_batches_per_epoch" in c.config)
def zero_advantage_filter(case: GoldenCase) -> None:
    got = worth_training(case.inputs["advantages"], case.config["num_batches_per_epoch"], case.inputs.get("perm"))
    assert torch.equal(got, case.outputs["mask"])


@golden.check(lambda c: "num_replicas" in c.config)
def k_repeat_sampler(case: GoldenCase) -> None:
    config = case.config
    assert {int(name.partition("_epoch")[2]) for name in case.outputs} == set(config["epochs"])
    for name, want in case.outputs.items():
        rank, epoch = (int(part) for part in name.removeprefix("rank").split("_epoch"))
        seed = config["seed"] + epoch
        got = k_repeat(config["dataset_len"], config["batch_size"], config["k"], config["num_replicas"], rank, seed)
        assert torch.equal(got, want), name


@golden.check(lambda c: "update_step_interval" in c.config)
def ema(case: GoldenCase) -> None:
    weights = case.inputs["p"]
    network = nn.Module()
    network.w = nn.Parameter(weights[0].clone())
    config = {"decay": case.config["decay"], "warmup": 0, "every": case.config["update_step_interval"]}
    average = EMA(network, config)
    for given, want in zip(weights, case.outputs["ema"]):
        network.w.data.copy_(given)
        average.update()
        assert_close(average.average["w"], want, 1e-6, "ema")


@golden.check(lambda c: "pairs" in c.config)
def ocr_reward(case: GoldenCase) -> None:
    got = torch.tensor([text_score(wanted, read) for wanted, read in case.config["pairs"]], dtype=torch.float64)
    assert_close(got, case.outputs["reward"], 1e-12, "reward")


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


# -- the policy ------------------------------------------------------------------------------------------------------


def state(seed: int = 0, n: int = 4) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 3, 3, generator=g), torch.randn(n, 2, 3, 3, generator=g)


@pytest.mark.parametrize("kind", ["sde", "cps"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_without_noise_a_step_is_the_odes(kind: Any, shift: float) -> None:
    sigmas = levels(10, shift)
    for i in range(10):
        x, v = state(i)
        step = transition(x, v, sigmas, torch.full((4,), i), 0.0, kind)
        euler = x + (sigmas[i + 1] - sigmas[i]) * v
        torch.testing.assert_close(step.mean, euler, rtol=1e-5, atol=1e-6)
        assert float(step.scale.max()) == 0


def test_a_step_is_the_reverse_sde_of_the_paper() -> None:
    """Equation 9: drift v + sigma_t^2 / (2 t) (x + (1 - t) v), by its score form -(x + (1 - t) v) / t."""
    sigmas = levels(10, 1.0).double()
    x, v = (a.double() for a in state())
    for i in (2, 5, 8):
        s, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
        step = transition(x, v, sigmas, torch.full((4,), i), 0.7)
        score = -(x + (1 - s) * v) / s
        torch.testing.assert_close(step.mean, x + (v - step.std**2 / 2 * score) * dt)
        torch.testing.assert_close(step.std, torch.full_like(step.std, 0.7 * math.sqrt(s / (1 - s))))
        torch.testing.assert_close(step.scale, step.std * torch.sqrt(-dt))


def test_the_sde_keeps_the_marginals() -> None:
    """Exact velocity of a Gaussian: after many noisy steps the samples have its mean and spread, as after the ODE's."""
    mean, spread, n = 0.5, 0.3, 4000
    sigmas = levels(200, 1.0)

    def velocity(x: Tensor, i: int) -> Tensor:
        s = float(sigmas[i])
        variance = (1 - s) ** 2 * spread**2 + s**2
        eps = s * (x - (1 - s) * mean) / variance
        x0 = mean + (1 - s) * spread**2 * (x - (1 - s) * mean) / variance
        return eps - x0

    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, generator=g)
    for noisy in (range(200), range(0)):
        run = roll_out(velocity, x, sigmas, 0.7, noisy, lambda i: torch.randn(n, 1, generator=g))
        assert run.latents[-1].mean().item() == pytest.approx(mean, abs=0.02), noisy
        assert run.latents[-1].std().item() == pytest.approx(spread, abs=0.02), noisy


def test_cps_keeps_the_coefficients() -> None:
    """Signal 1 - s' and noise of variance s'^2 in all, whatever the noise level (2509.05952)."""
    x0, eps = state()
    sigmas = levels(10)
    for noise_level in (0.2, 0.8, 1.0):
        for i in (0, 4, 8):
            s, following = sigmas[i], sigmas[i + 1]
            step = transition((1 - s) * x0 + s * eps, eps - x0, sigmas, torch.full((4,), i), noise_level, "cps")
            kept = (following**2 - step.scale**2).sqrt()
            torch.testing.assert_close(step.mean, (1 - following) * x0 + kept * eps, rtol=1e-4, atol=1e-5)
            assert step.scale.max() <= following


def test_log_prob_is_the_mean_of_a_normal_density() -> None:
    x, v = state()
    step = transition(x, v, levels(10), torch.tensor([0, 3, 5, 8]), 0.7)
    normal = torch.distributions.Normal(step.mean, step.scale.expand_as(step.mean))
    torch.testing.assert_close(log_prob(v, step), normal.log_prob(v).mean((1, 2, 3)), rtol=1e-5, atol=1e-5)


def test_half_precision_is_promoted() -> None:
    x, v = state()
    step = transition(x.bfloat16(), v.bfloat16(), levels(10), torch.zeros(4, dtype=torch.long), 0.7)
    assert step.mean.dtype == log_prob(x.bfloat16(), step).dtype == torch.float32


def test_the_surrogate_stops_at_the_clip() -> None:
    """No gradient where the ratio has left the range on the favoured side, full gradient elsewhere."""
    log_p = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.0]).requires_grad_(True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    loss, logs = policy_loss(log_p, torch.zeros(5), advantage, 0.2)
    (gradient,) = torch.autograd.grad(loss, log_p)
    assert gradient[0] == 0 and gradient[3] == 0
    torch.testing.assert_close(gradient[[1, 2, 4]], -(advantage * log_p.exp())[[1, 2, 4]].detach() / 5)
    assert logs["clip_fraction"] == pytest.approx(0.8)


# -- groups ----------------------------------------------------------------------------------------------------------


def test_advantages_are_normalised_within_groups() -> None:
    g = torch.Generator().manual_seed(1)
    groups = torch.arange(4).repeat(12)
    rewards = torch.randn(48, generator=g, dtype=torch.float64) * (1 + groups) + 10 * groups
    for global_std in (False, True):
        got = advantages(rewards, groups, "grpo", global_std)
        for group in range(4):
            own = got[groups == group]
            assert abs(own.mean().item()) < 1e-9
            if not global_std:
                assert own.std(correction=0).item() == pytest.approx(1, abs=1e-3)
        order = rewards[groups == 2].argsort()
        assert torch.equal(order, got[groups == 2].argsort())
    shifted = advantages(rewards + 5.0, groups)
    torch.testing.assert_close(shifted, advantages(rewards, groups))
    assert overall_advantages(rewards).std(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_best_and_worst_of_a_group() -> None:
    rewards, groups = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 5.0]), torch.tensor([0, 0, 0, 1, 1, 1])
    assert advantages(rewards, groups, "dpo").tolist() == [-1, 1, 0, -1, 1, 0]
    assert advantages(rewards, groups, "sft").tolist() == [0, 1, 0, 1, 1, 1]
    assert torch.equal(advantages(rewards, groups, "rwr"), rewards.double())


@pytest.mark.parametrize("world", [1, 2, 4])
def test_groups_are_whole_over_all_processes(world: int) -> None:
    parts = [k_repeat(10, 24 // world, 6, world, rank, seed=3) for rank in range(world)]
    whole = torch.cat(parts)
    assert torch.equal(whole, k_repeat(10, 24, 6, 1, 0, seed=3))
    assert whole.unique(return_counts=True)[1].tolist() == [6] * 4


def test_more_groups_than_classes() -> None:
    assert k_repeat(1, 12, 4, 1, 0, 0).tolist() == [0] * 12
    counts = k_repeat(3, 40, 4, 1, 0, 0).unique(return_counts=True)[1]
    assert sorted(counts.tolist()) == [12, 12, 16]
    with pytest.raises(VgmError, match="do not divide"):
        k_repeat(10, 10, 4, 1, 0, 0)


def test_filter_keeps_what_teaches() -> None:
    keep = worth_training(torch.tensor([0.0, 1.0, 0.0, -1.0, 2.0, 0.0]), 2)
    assert keep.tolist() == [True, True, False, True, True, False]
    assert not worth_training(torch.zeros(6), 2).any()
    assert worth_training(torch.ones(5), 2).all()


def test_windows() -> None:
    assert places(10, 0.99, None, None, "sde") == [range(9)]
    assert places(10, 0.99, 2, (0, 5), "cps") == [range(0, 2), range(1, 3), range(2, 4), range(3, 5)]
    assert places(10, 0.99, 3, None, "sde")[-1] == range(2, 5)
    for bad in ({"window": 4, "within": (0, 3)}, {"window": 0, "within": None}, {"window": 3, "within": (8, 20)}):
        with pytest.raises(VgmError, match="no steps"):
            places(10, 0.99, kind="sde", **bad)  # type: ignore[arg-type]
    with pytest.raises(VgmError, match="cps"):
        places(10, 1.0, None, None, "cps")


# -- velocities of any policy ----------------------------------------------------------------------------------------


PATHS = [
    ("linear", "velocity"),
    ("vp-discrete", "eps"),
    ("cosine", "v"),
    ("vp", "score"),
    ("edm", "F"),
    ("linear", "eps"),
]


@pytest.mark.parametrize(("path", "prediction"), PATHS)
def test_flow_velocity_of_any_network(path: str, prediction: str) -> None:
    """A perfect network of a Gaussian, trained on any path, has the flow's velocity at equal noise level."""
    mean, spread = 0.4, 0.6
    view: dict[str, Denoiser] = {}

    def network(z: Tensor, t: Tensor) -> Tensor:
        model = view["it"]
        host = model.path.t_of_timestep(t) if model.time == "index" else t
        host = host.double()
        alpha, sigma = (f(host).view(-1, 1) for f in (model.path.alpha, model.path.sigma))
        variance = alpha**2 * spread**2 + sigma**2
        x0 = mean + alpha * spread**2 * (z - alpha * mean) / variance
        from vgm_cli.diffusion.denoiser import convert

        return convert(x0, z, host, model.path, "x0", model.prediction, model.sigma_data).to(z.dtype)

    time = {"vp-discrete": "index", "edm": "sigma"}.get(path, "unit")
    model = view["it"] = Denoiser(network, path, prediction, time=time, input_scale="none")
    s = torch.tensor([0.05, 0.3, 0.6, 0.9], dtype=torch.float64)
    x = torch.randn(4, 1, generator=torch.Generator().manual_seed(0)).double()
    variance = (1 - s) ** 2 * spread**2 + s**2
    centre = x[:, 0] - (1 - s) * mean
    want = s * centre / variance - mean - (1 - s) * spread**2 * centre / variance
    torch.testing.assert_close(flow_velocity(model, x, s)[:, 0], want, rtol=2e-3, atol=2e-3)


def test_noise_predicting_networks_are_not_asked_where_all_is_noise() -> None:
    """A network that is wrong about the noise by 1 % starts a flow well, also on a path that ends at alpha = 5e-5."""

    def network(z: Tensor, t: Tensor) -> Tensor:
        return 1.01 * z

    path = {"name": "vp-discrete", "schedule": "cosine"}
    model = Denoiser(network, path, "eps", time="index")
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    assert flow_velocity(model, x, 1.0).abs().max() < 2 * x.abs().max()
    assert flow_velocity(model, x, 1.0, max_level=1e9).abs().max() > 50 * x.abs().max()
    whole = Denoiser(lambda z, t: z, path, "v", time="index")  # x0 of a v-network is never divided by alpha
    torch.testing.assert_close(flow_velocity(whole, x, 1.0), flow_velocity(whole, x, 1.0, max_level=1.0))


# -- the objective ---------------------------------------------------------------------------------------------------


TINY = {
    "name": "sit",
    "input_size": 8,
    "in_channels": 1,
    "patch_size": 2,
    "hidden_size": 32,
    "depth": 1,
    "num_heads": 2,
}
FLOW = {"path": "linear", "prediction": "velocity", "time": "reversed"}


def bright(images: Tensor, batch: Any) -> Tensor:
    return images.flatten(1).mean(1)


def policy(reward: Any = bright, classes: int = 4, labelled: bool = True, **options: Any) -> FlowGRPO:
    """A small network, its frozen copy, and the objective on them."""
    node = {**TINY, "num_classes": classes, "learn_sigma": False}
    torch.manual_seed(0)
    model, frozen = registry().build("model", node), registry().build("model", node)
    suites.randomise(model, scale=0.1)
    frozen.load_state_dict(model.state_dict())
    frozen.eval().requires_grad_(False)
    usual = {"group_size": 4, "steps": 4, "shift": 1.0, "clip_range": 0.05, "beta": 0.1}
    told = Conditions([Part("class", ClassLabel(classes), "label")] if classes and labelled else [], model)
    return FlowGRPO(model, Denoiser.from_config(frozen, FLOW), reward, conditions=told, **{**usual, **options})


def images(n: int = 16) -> dict[str, Tensor]:
    return {"x": torch.zeros(n, 1, 8, 8), "index": torch.arange(n), "label": torch.zeros(n, dtype=torch.long)}


VARIANTS: dict[str, dict[str, Any]] = {
    "sde": {},
    "guided": {"guidance_scale": 2.0},
    "cps window": {"sde": "cps", "noise_level": 0.8, "window": 2, "window_range": (0, 3)},
    "same latent": {"same_latent": True, "window": 1, "window_range": (0, 2)},
    "lora": {"lora": {"rank": 2, "targets": ["qkv", "proj"]}},
    "chunks": {"chunk": 5},
    "epochs": {"epochs": 2, "updates": 3},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_it_starts_at_ratio_one_and_no_divergence(name: str) -> None:
    objective = policy(**VARIANTS[name])
    parts = objective.experience(images(), Step(0))
    assert len(parts) == objective.updates * objective.epochs
    trained = objective.windows[0]
    for part in parts:
        assert set(part["index"].tolist()) <= {i for w in objective.windows for i in w}
        assert len(part["x"]) == len(part["group"]) == len(part["old"]) and len(part["x"]) % len(trained) == 0
        loss, logs = objective.loss("policy", part, Step(0))
        assert logs["ratio"].item() == pytest.approx(1, abs=1e-4)
        assert logs["kl"].item() == pytest.approx(0, abs=1e-8)
        assert logs["clip_fraction"] == 0 and torch.isfinite(loss)
        loss.backward()
    reached = [p.grad.abs().sum() for p in objective.model.parameters() if p.requires_grad and p.grad is not None]
    assert reached and sum(reached) > 0


def test_noise_only_inside_the_window() -> None:
    """Outside it, a trajectory follows the ODE: images of a group that share their noise part only there."""
    objective = policy(same_latent=True, window=1, window_range=(2, 3), steps=4)
    parts = objective.experience(images(), Step(0))
    x, y = torch.cat([p["x"] for p in parts]), torch.cat([p["group"] for p in parts])
    assert (torch.cat([p["index"] for p in parts]) == 2).all()
    for label in y.unique():
        same = x[y == label]
        torch.testing.assert_close(same, same[:1].expand_as(same))
    following = torch.cat([p["next"] for p in parts])
    assert following[y == y[0]].std(0).max() > 0.01


def test_no_gradient_through_the_unconditional_half() -> None:
    objective = policy(guidance_scale=3.0, beta=0.0)
    null = objective.model.y_embedder.embedding_table.weight
    part = objective.experience(images(), Step(0))[0]
    objective.loss("policy", part, Step(0))[0].backward()
    assert null.grad is not None and null.grad[-1].abs().max() == 0 and null.grad[:-1].abs().max() > 0


def test_chunks_change_no_gradient() -> None:
    gradients = []
    for chunk in (None, 3):
        objective = policy(chunk=chunk)
        part = objective.experience(images(), Step(0))[0]
        with torch.no_grad():
            next(iter(objective.model.parameters())).add_(0.01)  # away from the start, so that the KL has a gradient
        objective.loss("policy", part, Step(0))[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in objective.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


def test_the_policy_moves_towards_the_reward_until_it_collapses() -> None:
    """Brighter and brighter: white in the end, which is a collapse; the KL to the start tells how far it went."""
    objective = policy(beta=0.0, clip_range=0.2)
    optimizer = torch.optim.Adam(objective.model.parameters(), lr=5e-3)
    means = []
    with pytest.raises(VgmError, match="collapsed") as e:
        for index in range(100):
            for part in objective.experience(images(32), Step(index)):
                optimizer.zero_grad()
                objective.loss("policy", part, Step(index))[0].backward()
                optimizer.step()
            means.append(objective.report["reward"].item())
    assert e.value.code == 5
    assert means[-1] > means[0] + 0.5, means
    kept = policy(beta=1.0)
    kept.model.load_state_dict(objective.model.state_dict())
    part = kept.experience(images(), Step(0))[0]
    assert kept.loss("policy", part, Step(0))[1]["kl"] > 1e-2


def test_reference_of_adapters_is_the_network_without_them() -> None:
    objective = policy(lora={"rank": 2})
    assert "reference" not in objective.networks
    assert all("lora_" in n for n, p in objective.model.named_parameters() if p.requires_grad)
    with torch.no_grad():
        for name, p in objective.model.named_parameters():
            if name.endswith(lora.B):
                p.normal_(std=0.1)
    part = objective.experience(images(), Step(0))[0]
    assert objective.loss("policy", part, Step(0))[1]["kl"] > 0
    x, y = part["x"][:3], part["group"][:3]
    plain = policy()
    index = torch.tensor([0, 1, 2])
    torch.testing.assert_close(objective.reference_mean(x, index, y), plain.reference_mean(x, index, y))


def test_unlabelled_policies_are_one_group() -> None:
    objective = policy(classes=4, labelled=False)
    parts = objective.experience(images(), Step(0))
    assert "group" not in parts[0]
    assert torch.isfinite(objective.loss("policy", parts[0], Step(0))[0])


def test_images_without_advantage_are_left_out() -> None:
    """Two of four classes have a reward: half of the images teach nothing."""

    def some(images: Tensor, batch: Any) -> Tensor:
        return torch.where(batch["label"] < 2, images.flatten(1).mean(1), 0.0)

    objective = policy(reward=some)
    parts = objective.experience(images(), Step(0))
    assert set(torch.cat([p["group"] for p in parts]).tolist()) <= {0, 1}
    assert objective.report["kept"].item() == pytest.approx(0.5)
    assert objective.report["equal_groups"].item() == pytest.approx(0.5)


def test_collapse_stops_the_run() -> None:
    objective = policy()
    objective.experience(images(), Step(0))
    objective.first[2] *= 100  # as if images had differed a hundred times as much at first
    with pytest.raises(VgmError, match="collapsed") as e:
        objective.experience(images(), Step(1))
    assert e.value.code == 5
    flat = policy(reward=lambda images, batch: torch.zeros(len(images)))
    with pytest.raises(VgmError, match="no images of a class apart") as e:
        for index in range(100):
            flat.experience(images(), Step(index))
    assert e.value.code == 5 and index == 19


def test_state_survives() -> None:
    objective = policy()
    assert objective.state_dict() == {}
    objective.experience(images(), Step(0))
    other = policy()
    other.load_state_dict(objective.state_dict())
    objective.experience(images(), Step(1))
    other.experience(images(), Step(1))
    assert other.report["reward_gain"] == objective.report["reward_gain"] != 0


def test_gather_of_one_process_is_itself() -> None:
    x = torch.arange(3.0)
    assert gather(x) is x


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 5}, "do not divide"),
        ({"noise_level": 0.0}, "above 0"),
        ({"steps": 0}, "above 0"),
        ({"lora": {"rank": 2, "ranks": 3}}, "unknown key 'ranks'"),
        ({"lora": {"rank": 2, "targets": ["nothing"]}}, "no layer"),
    ],
)
def test_mistakes_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(VgmError, match=message) as e:
        policy(**options).experience(images(), Step(0))
    assert e.value.code == 2


def test_accumulation_is_refused() -> None:
    with pytest.raises(VgmError, match="accumulated"):
        policy().experience(images(), Step(0, micros=2))


# -- conformance -----------------------------------------------------------------------------------------------------


class TestTraining(suites.ObjectiveSuite):
    recipe = "flow-grpo/mnist"
    overrides = (
        "codec=null", "teacher.patch_size=7", "teacher.hidden_size=32", "teacher.depth=1", "teacher.num_heads=2",
        "roles.reward.terms={ink: 1.0}", "objective.group_size=4", "objective.steps=3", "objective.window=2",
        "objective.window_range=[0, 2]", "objective.chunk=4",
    )  # fmt: skip


class TestAdapters(TestTraining):
    overrides = (*TestTraining.overrides, "objective.lora={rank: 2}")


class TestMnist(suites.RecipeSuite):
    recipe = "flow-grpo/mnist"


@pytest.mark.parametrize("name", [n for n in recipes.shipped() if n.startswith("flow-grpo/")])
def test_every_recipe_validates(name: str) -> None:
    from vgm_cli.validation import check

    numbers, reason = check(recipes.load(name))
    assert numbers, reason
    text = Path(recipes.shipped()[name]).read_text()
    assert text.startswith("# ") and "vgm finetune-rl flow-grpo" in text
