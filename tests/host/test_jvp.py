"""Derivatives along a direction, for every network that takes (x, t)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from vgm_cli.api import HasClasses, ObjectiveBase, Step
from vgm_cli.conditioning import Conditions
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.jvp import total_derivative
from vgm_cli.engine.train.setup import Root
from vgm_cli.nn.sdpa import sdpa
from vgm_cli.registry import registry

TRANSFORMER = yaml.safe_load(
    "{input_size: 8, patch_size: 4, in_channels: 2, hidden_size: 32, depth: 2, num_heads: 2, num_classes: 3}"
)
NETWORKS = {
    "dit": TRANSFORMER,
    "sit": TRANSFORMER,
    "lightningdit": TRANSFORMER | {"preset": "LightningDiT", "qknorm": True},
    "meanflow": TRANSFORMER,
    "meanflow-unet": yaml.safe_load(
        "{img_resolution: 8, in_channels: 2, model_channels: 16, channel_mult: [1, 2], num_blocks: 1, attn_resolutions: [4]}"
    ),
    "song-unet": yaml.safe_load(
        "{img_resolution: 8, in_channels: 2, model_channels: 16, channel_mult: [1, 2], num_blocks: 1, num_classes: 3, "
        "attn_resolutions: [4], modulation: double-norm}"
    ),
    "edm2": yaml.safe_load(
        "{img_resolution: 8, in_channels: 2, model_channels: 16, channel_mult: [1, 2], num_blocks: 1, num_classes: 3, "
        "attn_resolutions: [4], channels_per_head: 8, time_embedding: positional, modulation: double-norm}"
    ),
    "scm-unet": yaml.safe_load("{in_channels: 2, base_dim: 16, dim_mults: [2], time_embedding_dim: 32}"),
    "vdm": yaml.safe_load("{in_channels: 2, n_embd: 32, n_layer: 1, norm_groups: 8, fourier: false}"),
    "adm-unet": yaml.safe_load(
        "{image_size: 8, in_channels: 2, model_channels: 32, num_res_blocks: 1, channel_mult: [1, 2], num_classes: 3, "
        "attention_resolutions: [4], num_head_channels: 16, use_scale_shift_norm: true}"
    ),
    "ncsnpp": yaml.safe_load(
        "{image_size: 8, in_channels: 2, nf: 16, ch_mult: [1, 2], num_res_blocks: 1, attn_resolutions: [4], num_classes: 3}"
    ),
    "ldm-unet": yaml.safe_load(
        "{image_size: 8, in_channels: 2, model_channels: 32, num_res_blocks: 1, channel_mult: [1, 2], num_classes: 3, "
        "attention_resolutions: [2], num_heads: 2, context_dim: null}"
    ),
    "edm-unet": yaml.safe_load(
        "{img_resolution: 8, in_channels: 2, out_channels: 2, model_channels: 16, channel_mult: [1, 2], num_blocks: 1, "
        "attn_resolutions: [4], num_classes: 3}"
    ),
}


def network(name: str, dropout: float = 0.0) -> nn.Module:
    """A small network whose output is not zero."""
    torch.manual_seed(0)
    keywords = dict(NETWORKS[name], **({"dropout": dropout} if dropout else {}))
    model = registry().build("model", {"name": name, **keywords})
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return model.train(bool(dropout))


def direction() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x, v = torch.randn(2, 2, 2, 8, 8, generator=generator)
    return x, torch.tensor([0.3, 0.7]), v, torch.ones(2)


def labelled(model: nn.Module):
    cond = {"y": torch.tensor([0, 2])} if isinstance(model, HasClasses) and model.num_classes else {}
    return lambda x, t: model(x, t, **cond)


def test_every_denoising_network_is_tested():
    denoisers = {c.name for (kind, _), c in registry().components.items() if kind == "model" and c.denoiser}
    assert denoisers == set(NETWORKS)


@pytest.mark.parametrize("name", NETWORKS)
def test_forward_mode_is_the_finite_difference(name):
    x, t, v, dt = direction()
    f = labelled(network(name))
    with torch.no_grad():
        value, derivative = total_derivative(f, (x, t), (v, dt))
        torch.testing.assert_close(value, f(x, t), rtol=1e-4, atol=1e-5)
        _, slow = total_derivative(f, (x, t), (v, dt), step=1e-3)
    # the networks embed time in float32, at frequencies up to 16 * 2 pi: differences are coarse
    torch.testing.assert_close(derivative, slow, rtol=2e-2, atol=2e-2 * float(derivative.abs().max()))
    assert float(derivative.abs().max()) > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_the_derivative_in_x_alone_is_exact(name):
    x, t, v, _ = direction()
    f = labelled(network(name))
    with torch.no_grad():
        along = (x, t), (v, torch.zeros(2))
        _, fast = total_derivative(f, *along)
        _, slow = total_derivative(f, *along, step=3e-3)
    torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-3 * float(fast.abs().max()))


@pytest.mark.parametrize("name", NETWORKS)
def test_autocast_does_not_reach_it_and_gradients_flow(name):
    x, t, v, dt = direction()
    model = network(name)
    plain = total_derivative(labelled(model), (x, t), (v, dt))
    with torch.autocast("cpu", torch.bfloat16):
        value, derivative = total_derivative(labelled(model), (x.bfloat16(), t), (v, dt))
        assert value.dtype == derivative.dtype == torch.float32
        exact = total_derivative(labelled(model), (x, t), (v, dt))
    for a, b in zip(plain, exact):
        torch.testing.assert_close(a, b)
    value.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("step", [None, 1e-2])
def test_dropout_masks_are_the_same_in_value_and_derivative(step):
    """f = dropout(w x): along v the derivative is dropout(w v) with the very same mask."""
    x, v = torch.ones(1, 4000), torch.ones(1, 4000)
    torch.manual_seed(3)
    value, derivative = total_derivative(lambda x: F.dropout(2 * x, 0.5), (x,), (v,), step=step)
    torch.testing.assert_close(value, derivative, rtol=1e-3, atol=1e-3)
    assert 0.4 < float((value == 0).float().mean()) < 0.6


def test_attention_has_a_forward_mode_here():
    q, k, v, dq = torch.randn(4, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    f = lambda q: sdpa(q, k, v)
    _, fast = total_derivative(f, (q,), (dq,))
    _, slow = total_derivative(f, (q,), (dq,), step=1e-5)
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-8)


class MeanFlow(ObjectiveBase):
    """|v - t du/dt - u|^2, the target without gradient: what a loss with a derivative inside looks like."""

    def __init__(self, model: nn.Module):
        self.model, self.networks = model, {"model": model}

    def loss(self, phase, batch, step):
        x, t, v, dt = batch["x"], batch["t"], batch["v"], torch.ones(len(batch["x"]))
        u, derivative = total_derivative(lambda x, t: labelled(self.model)(x, t)[:, :2], (x, t), (v, dt))
        target = (v - t.view(-1, 1, 1, 1) * derivative).detach()
        return (u - target).square().mean(), {}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """torch.distributed with a world of one: DDP's hooks and buckets without a second process."""
    store = tmp_path_factory.mktemp("ddp") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", NETWORKS)
def test_in_a_loss_that_ddp_wraps(name, one_process):
    """The trainer wraps a whole loss, so that networks inside are bare: gradients are those without DDP, and autocast
    around it changes none of them."""
    x, t, v, _ = direction()
    batch = {"x": x, "t": t, "v": v}
    grads = []
    for wrapped in (False, True):
        objective = MeanFlow(network(name))
        root = Root(objective, objective.networks, Conditions())
        run = nn.parallel.DistributedDataParallel(root) if wrapped else root
        with torch.autocast("cpu", torch.bfloat16, enabled=wrapped):
            loss, _ = run("main", batch, Step(0))
        loss.backward()
        grads.append({k: p.grad for k, p in objective.model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 5
    for k, g in grads[0].items():
        torch.testing.assert_close(grads[1][k], g)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_the_caller_may_be_compiled(name, request):
    """By aot_eager, which needs no compiler of C++ and traces as inductor does."""
    if any(isinstance(m, nn.GroupNorm) for m in network(name).modules()) or name == "edm-unet":
        reason = "torch 2.x cannot trace the forward derivative of group_norm"
        request.applymarker(pytest.mark.xfail(raises=torch._dynamo.exc.TorchRuntimeError, reason=reason, strict=True))
    torch.compiler.reset()
    x, t, v, dt = direction()
    f = labelled(network(name))
    with torch.no_grad():
        derive = torch.compile(lambda x, t, v, dt: total_derivative(f, (x, t), (v, dt)), backend="aot_eager")
        for a, b in zip(derive(x, t, v, dt), total_derivative(f, (x, t), (v, dt))):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_trigflow_network_gives_the_velocity_over_sigma_data():
    F_out = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    view = Denoiser(lambda x, t: F_out, {"name": "trig", "sigma_data": 0.5}, "trig")
    x, t = torch.randn(2, 1, 2, 2), torch.tensor([0.4, 1.5])
    torch.testing.assert_close(view.predict(x, t, "velocity"), 0.5 * F_out)
    at = t.view(-1, 1, 1, 1)
    torch.testing.assert_close(view.predict(x, t, "x0"), at.cos() * x - at.sin() * 0.5 * F_out)
    seen = []
    Denoiser(lambda x, t: seen.append((x, t)) or F_out, view.path, "trig").raw(x, t)
    torch.testing.assert_close(seen[0][0], x / 0.5)
    torch.testing.assert_close(seen[0][1], t)
