"""Glow against openai/glow@91b2c57 and rosinality/glow-pytorch@97081ff (golden cases), sizes, invertibility,
likelihood."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vgm_plugins.glow.checkpoints import (
    CONVERTER,
    CONVERTER_AVERAGE,
    FLATC,
    PORT,
    PORT_PLAIN,
    port_step,
    port_zero_conv,
)
from vgm_plugins.glow.layers import PORT as PORT_STYLE
from vgm_plugins.glow.layers import (
    ActNorm,
    AffineCoupling,
    InvConv,
    InvConvLU,
    ZeroConv,
    channel_map,
    gaussian_log_prob,
)
from vgm_plugins.glow.model import Block, Encoding, Glow, dequantise, to_images, to_pixels
from vgm_plugins.glow.objective import GlowObjective, bits_per_dim, flow_loss
from vgm_plugins.glow.optim import GlowAdamax
from vgm_plugins.glow.presets import PRESETS
from vgm_plugins.glow.sampler import (
    AttributeSampler,
    GlowSampler,
    InterpolationSampler,
    attribute_direction,
    codes,
    interpolate,
)

from vgm_cli.api import Request, Step, generators
from vgm_cli.convert_api import Layout, unwrap
from vgm_cli.errors import VgmError
from vgm_cli.images import to_uint8
from vgm_cli.recipe import load
from vgm_cli.registry import registry
from vgm_cli.testing import suites
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, adam_floor, assert_close

golden = GoldenChecks("glow")


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def build(converter: Layout, case: GoldenCase, **known: Any) -> Glow:
    """The case's network through the shipped converter; `known` is what no tensor tells."""
    model = Glow(**{**converter.config(case.state), **known})
    model.load_state_dict(converter.to_ours(case.state))
    again = converter.from_ours(model.state_dict())
    assert all(torch.equal(again[k], v) for k, v in case.state.items()), "the layout does not survive a round trip"
    return model.eval()


# -- golden: the official code ---------------------------------------------------------------------------------------


def official(case: GoldenCase) -> bool:
    return "openai/glow" in case.source


def official_model(case: GoldenCase) -> Glow:
    config = case.config
    assert case.inputs["image"].shape[1] == config["image_size"]
    case.ignore("_eps_std", why="the stored latents are multiplied by it already")
    if not config["ycond"]:
        case.ignore("n_y", "weight_y", why="nothing is told of labels, and nothing classifies")
    model = build(CONVERTER, case, n_bits=config["n_bits_x"], size=config["image_size"])
    stated = {
        "levels": config["n_levels"], "depth": config["depth"], "width": config["width"],
        "permutation": ("reverse", "shuffle", "invconv")[config["flow_permutation"]],
        "coupling": ("additive", "affine")[config["flow_coupling"]],
        "num_classes": config["n_y"] if config["ycond"] else 0, "learn_top": config["learntop"],
        "classifier": bool(config["ycond"] and config["weight_y"] > 0),
    }  # fmt: skip
    read = CONVERTER.config(case.state)
    assert {k: read[k] for k in stated} == stated
    return model


def official_input(case: GoldenCase, model: Glow, prefix: str = "") -> tuple[Tensor, Tensor]:
    images, u, y = (case.inputs[prefix + k] for k in ("image", "u", "y"))
    return dequantise(nchw(images), nchw(u), model.n_bits), y.long()


@golden.check(lambda c: official(c) and "out/top_eps" in c)
@torch.no_grad()
def official_encoding(case: GoldenCase) -> None:
    model, out = official_model(case), case.outputs
    x, y = official_input(case, model)
    assert_close(x, nchw(out["x"]), 1e-6, "x")
    encoding = model(x, y)
    for i, eps in enumerate(encoding.eps[:-1]):
        assert_close(eps, nchw(out[f"eps_{i}"]), 1e-5, f"eps of level {i}")
    assert_close(encoding.eps[-1], nchw(out["top_eps"]), 1e-5, "top eps")
    assert_close(encoding.z[-1], nchw(out["top_z"]), 1e-5, "top z")
    assert_close(encoding.log_priors[-1], out["top_logp"], 1e-5, "top log-prior")
    rest = torch.stack([encoding.logdet, *encoding.log_priors[:-1]]).sum(0)
    assert_close(rest, out["logdet_plus_split_logp"], 1e-5, "the rest of the log-likelihood")
    assert_close(model.decode(encoding.eps, y), nchw(out["recon"]), 1e-4, "reconstruction")


@golden.check(lambda c: official(c) and "out/bits_x" in c)
def official_loss(case: GoldenCase) -> None:
    model, out = official_model(case), case.outputs
    x, y = official_input(case, model)
    losses, parts = flow_loss(model, x, y, case.config["weight_y"])
    got = {**{k: v.mean() for k, v in parts.items()}, "loss": losses.mean()}
    for name in ("loss", "bits_x", *(("bits_y",) if "bits_y" in parts else ())):
        assert_close(got[name][None], out[name], 1e-5, name)
    if "error" in parts:
        assert_close(parts["error"].mean()[None], out["pred_error"], 0.0, "classification error")


@golden.check(lambda c: official(c) and "out/sample" in c)
@torch.no_grad()
def official_samples(case: GoldenCase) -> None:
    """Samples, and interpolation in eps space."""
    model, out = official_model(case), case.outputs
    below = [case.inputs[f"sample_eps_{i}"] for i in range(model.levels - 1)]
    eps = [nchw(e) for e in (*below, case.inputs["sample_top"])]
    sample = model.decode(eps, case.inputs["sample_y"].long())
    assert_close(sample, nchw(out["sample"]), 1e-4, "sample")
    x, y = official_input(case, model)
    eps, first = model(x, y).eps, y[:1]
    for a in case.config["_alphas"]:
        mixed = interpolate([e[:1] for e in eps], [e[1:2] for e in eps], torch.tensor([a]))
        assert_close(model.decode(mixed, first), nchw(out[f"mix_{a}"]), 1e-4, f"interpolation at {a}")


@golden.check(lambda c: official(c) and any(k.startswith("init/") for k in c.outputs))
def official_initialisation(case: GoldenCase) -> None:
    """Data-dependent values. After initialisation the case's zeros were moved by 0.02 and its channel mixing by 0.05,
    so only the first actnorm is exact; the others, behind those layers, are where the perturbation leaves them."""
    model, out = official_model(case), case.outputs
    x, _ = official_input(case, model, "init_")
    model.initialise(x)
    theirs = CONVERTER.from_ours(model.state_dict())
    for name in (k for k in out if k.startswith("init/")):
        got, first = theirs[name.removeprefix("init/")], name.startswith("init/model/0/0/actnorm")
        if first:
            assert_close(got, out[name], 1e-5, name)
        else:
            assert float((got - out[name]).abs().max()) < 0.15, name
    assert int(model.initialised) == 1


@golden.check(lambda c: official(c) and "out/train_loss_0" in c)
def official_training(case: GoldenCase) -> None:
    config, out = case.config, case.outputs
    model = official_model(case).train()
    x, y = official_input(case, model)
    optimizer = GlowAdamax(model.parameters(), config["_lr"], betas=(0.9, 1 - 1 / config.get("_train_its", 10)))

    def loss() -> Tensor:
        return flow_loss(model, x, y, config["weight_y"])[0].mean()

    for i in range(config["_train_steps"]):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        assert_close(value[None], out[f"train_loss_{i}"], 1e-4, f"loss of step {i}")
        optimizer.step()
    assert_close(loss()[None], out["loss_after"], 1e-4, "loss afterwards")
    theirs = CONVERTER.from_ours(model.state_dict())
    watched = [k for k in out if k.startswith("after/")]
    for scope in config["_watch"]:
        assert any(k.startswith(f"after/{scope}") for k in watched), scope
    assert all(k.removeprefix("after/").startswith(tuple(config["_watch"])) for k in watched)
    for name in watched:
        floor = adam_floor(config["_lr"], config["_train_steps"])
        assert_close(theirs[name.removeprefix("after/")], out[name], 1e-4, name, floor)


# -- golden: the port ------------------------------------------------------------------------------------------------


def port(case: GoldenCase) -> bool:
    return "rosinality" in case.source and "n_flow" in case.config


def port_model(case: GoldenCase) -> Glow:
    config = case.config
    size = case.inputs["u" if "u" in case.inputs else "x_0"].shape[-1]
    model = build(PORT, case, n_bits=config["_n_bits"], size=size)
    read = PORT.config(case.state)
    assert (read["levels"], read["depth"], read["in_channels"], read["width"]) == (
        config["n_block"], config["n_flow"], config["in_channel"], config["_filter_size"],
    )  # fmt: skip
    assert read["coupling"] == ("affine" if config["affine"] else "additive")
    assert (read["top_permutation"] or read["permutation"]) == "lu"  # the port's quirk
    assert read["permutation"] == ("lu" if config["conv_lu"] or config["n_block"] == 1 else "invconv")
    return model


@golden.check(lambda c: port(c) and "out/bits_per_dim" in c)
@torch.no_grad()
def port_encoding(case: GoldenCase) -> None:
    model, out = port_model(case), case.outputs
    x = dequantise(case.inputs["image_uint8"], case.inputs["u"], model.n_bits)
    assert_close(x, out["x"], 1e-6, "x")
    encoding: Encoding = model(x)
    log_p = torch.stack(encoding.log_priors).sum(0)
    assert_close(log_p, out["log_p"], 1e-5, "log_p")
    assert_close(encoding.logdet, out["logdet"].expand(len(x)), 1e-5, "logdet")
    for i, z in enumerate(encoding.z):
        assert_close(z, out[f"z_{i}"], 1e-5, f"z of block {i}")
    dims = x[0].numel()
    assert_close(bits_per_dim(encoding.log_prob.mean(), dims, model.n_bits), out["bits_per_dim"], 1e-5, "bits per dim")
    for name, value in (("bpd_log_p", log_p), ("bpd_logdet", encoding.logdet)):
        assert_close(value.mean() / (math.log(2) * dims), out[name], 1e-5, name)
    assert_close(model.decode(encoding.z, normalised=False), out["recon"], 1e-4, "from z")
    assert_close(model.decode(encoding.eps), out["recon"], 1e-4, "from eps")
    eps = [case.config["_temp"] * case.inputs[f"eps_{i}"] for i in range(model.levels)]
    assert_close(model.decode(eps), out["sample"], 1e-4, "sample")


@golden.check(lambda c: port(c) and "in/x_0" in c)
def port_training(case: GoldenCase) -> None:
    """Actnorm from x_0, then an Adam step on every further batch; loss_final is that of x_1 after them."""
    model, out = port_model(case).train(), case.outputs
    batches = [case.inputs[f"x_{i}"] for i in range(len(case.inputs))]
    model.initialise(batches[0])
    assert_close(FLATC[1](model.blocks[0].flows[0].actnorm.loc), out["init_loc"], 1e-5, "first loc")
    assert_close(FLATC[1](model.blocks[-1].flows[-1].actnorm.scale), out["init_scale_last"], 1e-5, "last scale")
    optimizer = torch.optim.Adam(model.parameters(), case.config.get("_lr", 1e-3))
    for i, x in enumerate(batches[1:], 1):
        optimizer.zero_grad()
        loss = flow_loss(model, x)[0].mean()
        loss.backward()
        assert_close(loss, out[f"loss_{i}"], 1e-4, f"loss {i}")
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        assert_close(norm, out[f"grad_norm_{i}"], 1e-4, f"gradient norm {i}")
        optimizer.step()
    assert_close(flow_loss(model, batches[1])[0].mean(), out["loss_final"], 1e-4, "loss afterwards")


def loaded(module: torch.nn.Module, names: dict[str, Any], state: dict[str, Tensor]) -> torch.nn.Module:
    module.load_state_dict({ours: shape[0](state[theirs]) for theirs, (ours, shape) in names.items()})
    return module


@golden.check(lambda c: "rosinality" in c.source and "filter_size" in c.config)
@torch.no_grad()
def port_layers(case: GoldenCase) -> None:
    """Every layer alone: y, log-determinant and inverse."""
    config, state, out, x = case.config, case.state, case.outputs, case.inputs["x"]
    channels, width = config["channels"], config["filter_size"]
    positions = x.shape[2] * x.shape[3]

    def same(name: str, y: Tensor, logdet: Tensor | None, back: Tensor, terms: Tensor | None = None) -> None:
        assert_close(y, out[f"{name}/y"], 1e-6, f"{name} y")
        if terms is not None and logdet is not None:  # their sum is zero but for its rounding
            assert (logdet.cpu() - out[f"{name}/logdet"]).abs() <= 1e-7 * positions * terms.abs().sum().cpu(), name
        elif logdet is not None:
            assert_close(logdet.double(), out[f"{name}/logdet"].double().expand(logdet.shape), 1e-5, f"{name} logdet")
        assert_close(back, out[f"{name}/reverse_of_x"], 1e-4, f"{name} reverse")

    norm = ActNorm(channels, log_norm=False)
    norm.fit(x)
    for name in ("loc", "scale"):
        assert_close(FLATC[1](getattr(norm, name)), out[f"actnorm_init/{name}"], 1e-6, f"actnorm {name}")
    norm = loaded(norm, {f"actnorm.{k}": (k, FLATC) for k in ("loc", "scale")}, state)
    same("actnorm", norm(x), positions * norm.log_scales().sum(), norm.reverse(x))

    lu = {f"invconv_lu.{k}": (k, (lambda v: v, None)) for k in ("w_p", "w_l", "w_u", "w_s", "s_sign")}
    for name, layer in (
        ("invconv", loaded(InvConv(channels), {"invconv.weight": ("weight", PORT_PLAIN)}, state)),
        ("invconv_lu", loaded(InvConvLU(channels, row=False), lu, state)),
    ):
        m = layer.matrix()
        logdet = layer.log_det()
        logdet = positions * (torch.linalg.slogdet(m.double())[1] if logdet is None else logdet)
        back = channel_map(x, torch.linalg.inv(m.double()).float())
        same(name, channel_map(x, m), logdet, back, getattr(layer, "w_s", None))
        if f"{name}/weight" in out:
            assert_close(PORT_PLAIN[1](m), out[f"{name}/weight"], 1e-6, "assembled weight")

    for kind in ("affine", "additive"):
        names = {k: v for k, v in port_step("", "", lu=True).items() if "coupling" in k}
        names = {
            f"coupling_{kind}.{k.removeprefix('coupling.')}": (v[0].removeprefix("coupling."), v[1])
            for k, v in names.items()
        }
        coupling = loaded(AffineCoupling(channels, width, kind, PORT_STYLE), names, state)
        y, logdet = coupling(x)
        same(f"coupling_{kind}", y, logdet, coupling.reverse(x))

    zero = loaded(
        ZeroConv(channels, channels, PORT_STYLE),
        {k: (v[0][1:], v[1]) for k, v in port_zero_conv("zeroconv", "").items()},
        state,
    )
    assert_close(zero(x), out["zeroconv/y"], 1e-6, "zero convolution")

    image = case.inputs["img"]
    assert_close(torch.nn.functional.pixel_unshuffle(image, 2), out["squeeze"], 0.0, "squeeze")
    for top in (False, True):
        name = "block_last" if top else "block_split"
        block = Block(config["block_in"], 1, width, "affine", "lu", PORT_STYLE, top)
        flows = port_step(f"{name}.flows.0.", "flows.0.", lu=True)
        prior = port_zero_conv(f"{name}.prior", "prior")
        own = ZeroConv(4 * config["block_in"], 8 * config["block_in"], PORT_STYLE) if top else None
        if own is not None:
            own = loaded(own, {k: (v[0].removeprefix("prior."), v[1]) for k, v in prior.items()}, state)
        block = loaded(block, flows if top else {**flows, **prior}, state)
        h, logdet = block(image)
        kept, new = (h, h) if own is not None else h.chunk(2, dim=1)
        mean, logs = own.of_zeros(h).chunk(2, dim=1) if own is not None else block.prior_of(kept)
        log_p, _ = gaussian_log_prob(new, mean, logs)
        for key, got in (("out", kept), ("z", new), ("log_p", log_p), ("logdet", logdet)):
            assert_close(got, out[f"{name}/{key}"], 1e-5, f"{name} {key}")
        drawn = mean + logs.exp() * 0.7 * new
        for key, latent in (("reverse", new), ("sample", drawn)):
            whole = latent if top else torch.cat([kept, latent], dim=1)
            assert_close(block.reverse(whole), out[f"{name}/{key}"], 1e-4, f"{name} {key}")


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


# -- sizes -----------------------------------------------------------------------------------------------------------

SIZES = {  # counted from the variables of the official graph, and (rosinality) from the instantiated port
    "cifar10": 44_603_604,
    "imagenet32": 66_861_588,
    "imagenet64": 112_377_540,
    "lsun64": 66_861_588,
    "celebahq256": 175_099_620,
    "lsun96": 200_432_868,
    "lsun128": 200_432_868,
    "cifar10-conditional": 38_397_320,
    "imagenet32-conditional": 57_695_876,
    "rosinality": 74_490_832,
    "rosinality-additive": 61_214_032,
}


def variables(size: int, levels: int, depth: int, coupling: str, classes: int = 0, width: int = 512) -> int:
    """Parameters from the shapes of the official variables alone."""
    total, channels = 0, 12
    for level in range(levels):
        half, out = channels // 2, channels if coupling == "affine" else channels // 2
        hidden = 9 * (half + 1) * width + width * width + 4 * width  # two convolutions without bias, their actnorms
        total += depth * (2 * channels + channels**2 + hidden + 9 * (width + 1) * out + 2 * out)
        if level < levels - 1:
            total += 9 * (half + 1) * channels + 2 * channels
            channels *= 2
    total += 9 * (2 * channels + 1) * 2 * channels + 4 * channels
    if classes:
        total += classes * 2 * channels + 4 * channels + channels * classes + 2 * classes
    return total


@pytest.mark.parametrize("name", SIZES)
def test_preset_size(name: str) -> None:
    with torch.device("meta"):
        model = registry().build("model", {"name": "glow", "preset": name})
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]
    p = PRESETS[name]
    if "style" not in p:
        assert variables(p["size"], p["levels"], p["depth"], p["coupling"], p["num_classes"]) == SIZES[name]


def test_every_preset_is_counted() -> None:
    assert set(PRESETS) == set(SIZES)


# -- invertibility and density -----------------------------------------------------------------------------------------

TINY: dict[str, Any] = {"size": 8, "in_channels": 2, "levels": 2, "depth": 2, "width": 12}
KINDS = [
    {"coupling": c, "permutation": p, "style": s}
    for c in ("affine", "additive")
    for p, s in (
        ("invconv", "openai"),
        ("lu", "openai"),
        ("shuffle", "openai"),
        ("reverse", "openai"),
        ("lu", "rosinality"),
    )
]


def filled(seed: int = 0, scale: float = 0.1, **kwargs: Any) -> Glow:
    torch.manual_seed(seed)
    model = Glow(**{**TINY, **kwargs})
    suites.randomise(model, seed, scale)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(k.values()))
def test_decoding_inverts_encoding(kind: dict[str, Any]) -> None:
    model = filled(**kind).double()
    x = torch.rand(3, 2, 8, 8, dtype=torch.float64) - 0.5
    with torch.no_grad():
        encoding = model(x)
        assert [tuple(e.shape[1:]) for e in encoding.eps] == model.latent_shapes()
        torch.testing.assert_close(model.decode(encoding.eps), x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model.decode(encoding.z, normalised=False), x, rtol=1e-9, atol=1e-9)
        again = model(model.decode(encoding.eps)).eps
    for a, b in zip(again, encoding.eps):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(k.values()))
def test_log_determinant_is_that_of_the_jacobian(kind: dict[str, Any]) -> None:
    """Change of variables from x to eps, against autograd's Jacobian: priors and couplings together."""
    model = filled(**kind, size=4, in_channels=1, levels=2, width=6).double()
    x = torch.rand(1, 1, 4, 4, dtype=torch.float64) - 0.5

    def latents(flat: Tensor) -> Tensor:
        return torch.cat([e.flatten() for e in model(flat.view(1, 1, 4, 4)).eps])

    jacobian = torch.autograd.functional.jacobian(latents, x.flatten())
    eps = latents(x.flatten())
    normal = (-0.5 * (eps.square() + math.log(2 * math.pi))).sum()
    want = normal + torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(model(x).log_prob[0], want.detach(), rtol=1e-9, atol=1e-9)


def test_initialisation_whitens_every_actnorm() -> None:
    model = Glow(**TINY)
    seen: list[Tensor] = []
    x = torch.rand(64, 2, 8, 8) - 0.2
    model.initialise(x)
    for flow in model.blocks[0].flows:
        flow.actnorm.register_forward_hook(lambda m, i, o: seen.append(o))
    h = torch.nn.functional.pixel_unshuffle(x, 2)
    with torch.no_grad():
        for flow in model.blocks[0].flows:
            y = flow.actnorm(h)
            torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(8), atol=1e-4, rtol=0)
            torch.testing.assert_close(y.var((0, 2, 3), unbiased=False), torch.ones(8), atol=1e-3, rtol=0)
            hidden = flow.coupling.net.conv1(flow.mix(h).chunk(2, dim=1)[0])
            torch.testing.assert_close(hidden.mean((0, 2, 3)), torch.zeros(12), atol=1e-4, rtol=0)
            h, _ = flow(h)
    assert len(seen) == 2 and int(model.initialised) == 1


def test_border_is_seen_by_the_learned_top_prior() -> None:
    model = filled(size=16)
    mean, _ = model.prior(torch.zeros(1, 16, 4, 4), None)
    inside, corner = mean[0, :, 1, 1], mean[0, :, 0, 0]
    torch.testing.assert_close(inside, mean[0, :, 2, 2])
    assert not torch.allclose(inside, corner)


def test_activation_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for on in (False, True):
        model = filled().train()
        model.checkpointing = on
        flow_loss(model, torch.linspace(-0.5, 0.4, 256).view(2, 2, 8, 8))[0].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(*gradients)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(VgmError, match="no multiple of 8") as refused:
        Glow(size=28)
    assert "model.pad=true" in refused.value.hint
    with pytest.raises(VgmError, match="labels"):
        Glow(**TINY, num_classes=3)(torch.zeros(1, 2, 8, 8))
    with pytest.raises(VgmError, match="permutation"):
        Glow(**{**TINY, "permutation": "rotation"})
    with pytest.raises(VgmError, match="classifier"):
        GlowObjective(Glow(**TINY, num_classes=2), class_weight=0.1)


# -- pixels, likelihood, samples -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_bits", [8, 5, 1])
def test_pixels_survive_the_way_through_the_model(n_bits: int) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    u = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0)).clamp(0.01, 0.99)
    z = dequantise(pixels, u, n_bits)
    assert z.min() >= -0.5 and z.max() < 0.5
    step = 2 ** (8 - n_bits)
    want = pixels.long() // step * step
    assert torch.equal(to_pixels(z, n_bits).long(), want)
    assert torch.equal(to_uint8(to_images(z, n_bits)).long(), want), "the host's rule changes a level"


def test_likelihood_of_labels_and_of_their_mixture() -> None:
    model = filled(num_classes=3, n_bits=5)
    x = torch.randint(0, 256, (4, 2, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 1])
    with torch.no_grad():
        each = torch.stack([model.log_likelihood(x, generators(range(4)), torch.full((4,), k))[0] for k in range(3)])
        given, kind = model.log_likelihood(x, generators(range(4)), y)
        mixed, other = model.log_likelihood(x, generators(range(4)))
        alone, _ = model.log_likelihood(x[2:3], generators([2]))
    torch.testing.assert_close(given, each[y, torch.arange(4)])
    torch.testing.assert_close(mixed, torch.logsumexp(each, 0) - math.log(3))
    torch.testing.assert_close(alone, mixed[2:3], rtol=1e-4, atol=1e-3)
    assert "5 bits" in kind and "class" in kind and "class" not in other
    assert each.std(0).min() > 1e-3, "the class has no effect"


def test_bits_count_the_width_of_a_bin() -> None:
    """A density of one over the unit cube is the uniform distribution over all images: n_bits per dimension."""
    z = torch.zeros(2)
    torch.testing.assert_close(bits_per_dim(z, 10, 8), torch.full((2,), 8.0))
    torch.testing.assert_close(bits_per_dim(z + 10 * math.log(2), 10, 5), torch.full((2,), 4.0))


def test_objective_draws_and_initialises_once() -> None:
    model = Glow(**TINY, num_classes=2, classifier=True)
    objective = GlowObjective(model, class_weight=0.01)
    g = torch.Generator().manual_seed(0)
    batch = {"x": torch.randint(0, 256, (6, 2, 8, 8), generator=g) / 127.5 - 1, "cond": {"y": torch.arange(6) % 2}}
    objective.prepare(batch, Step(0))
    before = model.blocks[0].flows[0].actnorm.b.clone()
    objective.prepare({"x": -batch["x"], "cond": batch["cond"]}, Step(0))
    assert torch.equal(before, model.blocks[0].flows[0].actnorm.b), "loaded weights would be initialised away"
    step = Step(3, seed=1)
    loss, logs = objective.loss("main", batch, step)
    u = step.rand(6 * 128, "dequantisation").view(6, 2, 8, 8)
    z = dequantise((batch["x"] + 1) * 127.5 + 0.25, u, 8)
    torch.testing.assert_close(loss, flow_loss(model, z, batch["cond"]["y"], 0.01)[0].mean())
    torch.testing.assert_close(loss.detach(), logs["bits_x"] + 0.01 * logs["bits_y"])
    assert logs["bits_y"] == 1.0, "a zero-initialised classifier of two classes costs one bit"


@torch.no_grad()
@pytest.mark.parametrize("size", [6, 5, 8])
def test_a_border_makes_any_size_fit(size: int) -> None:
    """Images are coded with it and come without it; its bits are the image's, per pixel of the image."""
    model = filled(pad=True, size=size, n_bits=5)
    shape = (2, size, size)
    assert model.sample_shape == shape and model.latent_shapes() == filled().latent_shapes()
    pixels = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.cropped(model.padded(pixels)), pixels)
    before = (8 - size) // 2
    inside = model.padded(pixels)[..., before : before + size, before : before + size]
    assert torch.equal(inside, pixels), "the image is not in the middle"
    assert model.padded(pixels).sum() == pixels.sum(), "the border is not black"
    loss, _ = GlowObjective(model).loss("main", {"x": pixels / 127.5 - 1}, Step(0, seed=1))
    z = dequantise(model.padded(pixels), Step(0, seed=1).rand(3 * 128, "dequantisation").view(3, 2, 8, 8), 5)
    nats = model(z).log_prob - z[0].numel() * 5 * math.log(2)
    torch.testing.assert_close(loss, -nats.mean() / (pixels[0].numel() * math.log(2)))
    found, kind = model.log_likelihood(pixels, generators(range(3)))
    u = torch.stack([torch.rand(2, 8, 8, generator=g) for g in generators(range(3))])
    want = model(dequantise(model.padded(pixels), u, 5)).log_prob - 128 * 5 * math.log(2)
    torch.testing.assert_close(found, want)
    assert ("border" in kind) == (size < 8)
    ends = InterpolationSampler(points=2)(model, request(4, shape=shape, images=pixels / 127.5 - 1))
    assert (to_uint8(ends[1]).int() // 8 - pixels[1].int() // 8).abs().max() <= 1
    assert GlowSampler()(model, request(2, shape=shape)).shape[1:] == shape


def request(n: int, items: range | None = None, shape: tuple[int, int, int] = (2, 8, 8), **kwargs: Any) -> Request:
    items = items or range(n)
    return Request(shape=shape, generators=generators(items), index=list(items), **kwargs)


@torch.no_grad()
def test_temperature_scales_every_level() -> None:
    model = filled()
    mode = GlowSampler(temperature=0)(model, request(3))
    torch.testing.assert_close(mode[0], mode[2])
    eps = [0.7 * request(1).randn(s) for s in model.latent_shapes()[:1]]
    rest = request(1)
    eps = [0.7 * rest.randn(s) for s in model.latent_shapes()]
    torch.testing.assert_close(GlowSampler()(model, request(1)), to_images(model.decode(eps), 8))
    spread = [GlowSampler(t)(model, request(16)).std(0).mean() for t in (0.1, 1.0)]
    assert spread[0] < spread[1]


@torch.no_grad()
def test_interpolation_between_images_and_between_draws() -> None:
    model, sampler = filled(), InterpolationSampler(points=4)
    images = torch.randint(0, 256, (4, 2, 8, 8), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    strips = sampler(model, request(8, images=images))
    for item, image in ((0, 0), (3, 1), (4, 2), (7, 3)):
        assert (to_uint8(strips[item]).int() - to_uint8(images[image]).int()).abs().max() <= 1
    torch.testing.assert_close(sampler(model, request(2, range(5, 7), images=images)), strips[5:7], atol=0.01, rtol=0)
    draws = sampler(model, request(8))
    torch.testing.assert_close(sampler(model, request(3, range(2, 5))), draws[2:5], atol=0.01, rtol=0)
    ends = (draws[0] - draws[3]).abs().mean()
    assert (draws[0] - draws[1]).abs().mean() < ends and not torch.allclose(draws[0], draws[4])
    with pytest.raises(VgmError, match="two images"):
        sampler(model, request(2, images=images[:1]))


@torch.no_grad()
def test_attributes_are_directions_of_eps() -> None:
    """Points of a strip lie on one line in eps space; its middle is the image itself; rows do not know their batch."""
    model = filled()
    images = torch.rand(5, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sampler = AttributeSampler(positive=2, points=3, amount=0.5)
    strip = sampler(model, request(6, images=images))
    torch.testing.assert_close(strip[[1, 4]], images[:2], atol=0.02, rtol=0)
    assert (strip[0] - strip[2]).abs().max() > 0.05 and strip.shape == (6, 2, 8, 8)
    torch.testing.assert_close(sampler(model, request(2, range(4, 6), images=images)), strip[4:], atol=0.01, rtol=0)
    shared = request(15, images=images)
    eps = codes(model, shared.drawn_by(generators(range(5))), images, None)
    direction = attribute_direction([e[:2] for e in eps], [e[2:] for e in eps])
    assert all(torch.allclose(d, e[:2].mean(0) - e[2:].mean(0), atol=1e-6) for d, e in zip(direction, eps))
    with pytest.raises(VgmError, match="images that have it and images that lack it"):
        AttributeSampler(positive=5)(model, request(2, images=images))


# -- optimizer and checkpoints ---------------------------------------------------------------------------------------


def test_adamax_is_its_formula_and_resumes() -> None:
    p, w = torch.nn.Parameter(torch.tensor([1.0, -2.0])), [1.0, -2.0]
    optimizer = GlowAdamax([p], lr=0.1, betas=(0.8, 0.9), weight_decay=0.01)
    m, u = [0.0, 0.0], [0.0, 0.0]
    for t in (1, 2, 3):
        if t == 3:  # continue in another optimizer
            state, optimizer = optimizer.state_dict(), GlowAdamax([p], lr=0.1, betas=(0.8, 0.9), weight_decay=0.01)
            optimizer.load_state_dict(state)
        grads = [math.sin(3 * v) for v in w]
        p.grad = torch.tensor(grads)
        optimizer.step()
        for i, g in enumerate(grads):
            m[i], u[i] = 0.8 * m[i] + 0.2 * g, max(0.9 * u[i], abs(g))
            w[i] = 0.99 * w[i] - 0.1 * (1 - 0.9**t) ** 0.5 / (1 - 0.8**t) * m[i] / (u[i] + 1e-8)
        torch.testing.assert_close(p.detach(), torch.tensor(w))


@pytest.mark.parametrize(
    "kind",
    [
        {"permutation": "lu"},
        {"permutation": "shuffle", "learn_top": False},
        {"num_classes": 3, "classifier": True},
        {"permutation": "reverse"},
    ],
    ids=str,
)
def test_official_layout_round_trip(kind: dict[str, Any]) -> None:
    model = filled(**kind)
    model.initialised.fill_(1)
    theirs = CONVERTER.from_ours(model.state_dict())
    assert CONVERTER.recognise(theirs) and not PORT.recognise(theirs)
    slots = {f"{k}_adam_m1": torch.zeros_like(v) for k, v in theirs.items()}
    config = CONVERTER.config({**theirs, **slots})
    other = Glow(**{**config, "size": 8})
    other.load_state_dict(CONVERTER.to_ours({**theirs, **slots}))
    x, y = torch.rand(2, 2, 8, 8) - 0.5, torch.tensor([0, 1])
    with torch.no_grad():
        torch.testing.assert_close(other(x, y).log_prob, model(x, y).log_prob)
    with pytest.raises(KeyError):
        CONVERTER.to_ours({k: v for k, v in theirs.items() if not k.endswith("l_last/b")})
    if kind.get("permutation") == "lu":  # rows: y = x W
        p, lower, upper, sign, logs = (theirs[f"model/0/0/invconv/{k}"] for k in ("P", "L", "U", "sign_S", "log_S"))
        w = p @ (lower.tril(-1) + torch.eye(8)) @ (upper.triu(1) + torch.diag(sign * logs.exp()))
        torch.testing.assert_close(model.blocks[0].flows[0].permutation.matrix(), w.T)


def test_polyak_averages_are_found() -> None:
    live, average = filled(0), filled(1)
    theirs = CONVERTER.from_ours(live.state_dict())
    shadow = {f"model/{k}/ExponentialMovingAverage": v for k, v in CONVERTER.from_ours(average.state_dict()).items()}
    ours = CONVERTER_AVERAGE.to_ours({**theirs, **shadow})
    assert all(torch.equal(ours[k], v) for k, v in average.state_dict().items() if k != "initialised")


def test_port_layout_round_trip() -> None:
    model = filled(style="rosinality", permutation="invconv", top_permutation="lu")
    theirs = {f"module.{k}": v for k, v in PORT.from_ours(model.state_dict()).items()}
    state = unwrap(theirs)
    assert PORT.recognise(state) and not CONVERTER.recognise(state)
    other = Glow(**{**PORT.config(state), "size": 8})
    other.load_state_dict(PORT.to_ours(state))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())
    with pytest.raises(KeyError):
        PORT.to_ours({k: v for k, v in state.items() if not k.endswith("prior.scale")})


# -- through the engine ----------------------------------------------------------------------------------------------

SMALL = ("model.depth=2", "model.width=8", "train.ema=[0.9]")


class TestTraining(suites.ObjectiveSuite):
    recipe = "glow/mnist"
    overrides = SMALL


class TestSampling(suites.SamplerSuite):
    recipe = "glow/mnist"
    overrides = SMALL


class TestInterpolation(suites.SamplerSuite):
    recipe = "glow/mnist"
    overrides = SMALL
    sampler = {"name": "glow-interpolate", "points": 3}

    def test_an_item_does_not_depend_on_its_batch(self) -> None:
        """Its number in the job decides (test_interpolation_between_images_and_between_draws)."""


@pytest.mark.parametrize(
    "name", [p.stem for p in sorted((Path(__file__).parents[2] / "recipes" / "glow").glob("*.yaml"))]
)
def test_recipes(name: str) -> None:
    suite = suites.RecipeSuite()
    suite.recipe = f"glow/{name}"
    suite.test_validates_and_builds()
    suite.test_opens_with_what_it_is()
    assert load("glow", name).paper == "glow"


def test_train_sample_and_interpolate(vgm: Any, tiny_dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    short = ("train.steps=4", "train.batch_size=8", "train.preview_n=4", "train.save_every=4", "train.compile=off")
    code, _, err = vgm("train", "glow", "--out", run, f"data.path={tiny_dataset}", *SMALL, *short)
    assert code == 0, err
    code, _, err = vgm("sample", run, "-n", 4, "--out", tmp_path / "a.png", "--steps", 3, "temperature=0.5")
    assert code == 0 and "--steps has no effect on the sampler glow" in err
    code, out, err = vgm("evaluate", run, "--metrics", "bits-per-dim", "-n", 8, "--json")
    assert code == 0, err
    (bits,) = json.loads(out)
    kind = bits["protocol"]["options"]["likelihood"]
    assert kind == "exact, uniform dequantisation, 5 bits, with the border, given the class" and 0 < bits["value"] < 20
    code, _, err = vgm("sample", run, "-n", 6, "--sampler", "glow-interpolate", "points=3", "--input", tiny_dataset,
                       "--label", "disc", "--out", tmp_path / "b.png")  # fmt: skip
    assert code == 0, err
    assert (tmp_path / "a.png").is_file() and (tmp_path / "b.png").is_file()
