"""ControlNet against lllyasviel/ControlNet@ed85cd1 (golden cases), sizes, layouts, steering, annotators, training."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from vgm_plugins.controlnet import annotators
from vgm_plugins.controlnet.checkpoints import CONTROLNET, WHOLE, transfer
from vgm_plugins.controlnet.hed import HED
from vgm_plugins.controlnet.model import ControlNet
from vgm_plugins.controlnet.objective import ControlObjective
from vgm_plugins.controlnet.sampler import ControlSampler

from vgm_cli.api import Request, Step, generators
from vgm_cli.data import open_dataset
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.objectives import gaussian_losses
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.errors import VgmError
from vgm_cli.metrics.edges import edge_f1, near_by
from vgm_cli.nets.ldm_unet import LDMUNet
from vgm_cli.nets.ldm_unet_checkpoints import LDM_UNET
from vgm_cli.registry import registry
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, assert_close

golden = GoldenChecks("controlnet")
UNET, CONTROL = "model.diffusion_model.", "control_model."


# -- golden cases ------------------------------------------------------------------------------------------------------


def by_formula(keys: dict[str, Any]) -> dict[str, Tensor]:
    """Weights that a golden case defines by a formula of their names' order."""
    weights = {}
    for k, name in enumerate(sorted(keys)):
        shape = tuple(keys[name])
        h = (np.arange(math.prod(shape), dtype=np.uint64) * 2654435761 + (k + 1) * 97531) & 0xFFFFFFFF
        h = ((h ^ (h >> 15)) * 2246822519) & 0xFFFFFFFF
        h = ((h ^ (h >> 13)) * 3266489917) & 0xFFFFFFFF
        r = torch.from_numpy((h ^ (h >> 16)).astype(np.float64) / 2**32 - 0.5) * math.sqrt(12)
        if len(shape) >= 2:
            r = 0.8 * r / math.sqrt(math.prod(shape) / shape[0])
        else:
            r = 1 + 0.1 * r if name.endswith("weight") else 0.05 * r
        weights[name] = r.float().view(shape)
    return weights


def keywords(config: dict[str, Any]) -> dict[str, Any]:
    """Keywords of the official UNetModel and ControlNet -> ours."""
    given = {k: v for k, v in config.items() if k not in ("use_checkpoint", "use_fp16", "dims")}
    for name in ("n_embed", "num_attention_blocks", "disable_middle_self_attn", "num_classes"):
        if not given.get(name):
            given.pop(name, None)
    for name in ("num_heads", "num_head_channels", "num_heads_upsample"):
        given[name] = None if given.get(name, -1) == -1 else given[name]
    if given["num_heads"] is None:
        del given["num_heads"]
    if isinstance(given.get("context_dim"), list):  # one number for each block of a transformer
        (given["context_dim"],) = set(given["context_dim"])
    official = {"use_spatial_transformer": False, "context_dim": None, "legacy": True, "channel_mult": (1, 2, 4, 8)}
    return official | given


def without_effect(case: GoldenCase) -> None:
    """Keys of the official networks that no output depends on."""
    for part in ("unet_config", "control_stage_config"):
        case.ignore(f"{part}.image_size", f"{part}.use_checkpoint", f"{part}.dropout", why="evaluated at any size")
        if case.config[part].get("num_head_channels", -1) == -1 and case.config[part].get("use_spatial_transformer"):
            case.ignore(f"{part}.legacy", f"{part}.num_heads_upsample", why="transformers' heads share all channels")


def networks(case: GoldenCase, state: dict[str, Tensor], unlocked: bool = False) -> tuple[LDMUNet, ControlNet]:
    """Base and ControlNet of a case, each by its own layout."""
    without_effect(case)
    assert WHOLE.recognise(state)
    unet, control = (keywords(case.config[k]) for k in ("unet_config", "control_stage_config"))
    base = LDMUNet(**unet).eval()
    base.load_state_dict(LDM_UNET.to_ours(state))
    network = ControlNet(base, unlocked=unlocked, **control).eval()
    if control.get("resblock_updown"):  # the encoder alone does not tell where its levels end
        with pytest.raises(KeyError):
            CONTROLNET.to_ours(state)
        own = {k.removeprefix(CONTROL): v for k, v in state.items() if k.startswith(CONTROL)}
    else:
        own = CONTROLNET.to_ours(state)
    if unlocked:
        own |= {k: v for k, v in base.state_dict().items() if k.startswith(("output_blocks.", "out."))}
    assert not network.load_state_dict(own, strict=False).unexpected_keys
    return base, network


@golden.check(lambda c: "ControlledUnetModel" in c.source and "out/control_00" in c)
def steering(case: GoldenCase) -> None:
    """The maps, what they do to the output at every strength, and gradients, of which the encoder has none."""
    state = case.state or by_formula(case.config["keys"])
    base, network = networks(case, state, unlocked=True)
    x, t, told, out = case.inputs["x"], case.inputs["t"], {"context": case.inputs["context"]}, case.outputs
    told["hint"] = case.inputs["hint"]
    maps = network.control(x, t, **told)
    assert maps is not None and len(maps) == len(network.downsampling) == len([k for k in out if "control_" in k[:8]])
    for i, m in enumerate(maps):
        assert_close(m, out[f"control_{i:02d}"], 1e-5, f"control_{i:02d}")
        assert m.shape[-1] * network.downsampling[i] == x.shape[-1]

    def steered(**options: Any) -> Tensor:
        """What a sampler's settings make of the network."""
        options.setdefault("only_middle", case.config["only_mid_control"])
        scales = ControlSampler(**options).weights(network, options.get("strength", 1.0), x.device)
        if "guess" in options:  # the official list is of thirteen, of which a smaller network has the first
            scales = scales * 0.825 ** (13 - scales.shape[1])
        return network(x, t, **told, scales=scales.expand(len(x), -1))

    whole = steered()
    with torch.no_grad():
        assert_close(whole, out["eps"], 1e-5, "eps")
        assert_close(steered(only_middle=True), out["eps_only_mid"], 1e-5, "eps_only_mid")
        told_by = [re.fullmatch(r"eps_(guess_)?strength([\d.]+)", name) for name in out]
        found = [m for m in told_by if m is not None]
        assert found, "steered with some strength"
        for name in found:
            strength = float(name[2])
            got = steered(strength=strength, guess=True) if name[1] else steered(strength=strength)
            assert_close(got, out[name[0]], 1e-5, name[0])
        for plain in (network(x, t, told["context"]), steered(strength=0.0), base(x, t, told["context"])):
            assert_close(plain, out["eps_no_control"], 1e-5, "no control")
            assert torch.equal(plain, base(x, t, told["context"]))
    loss = (whole - case.inputs["noise"]).square().mean()
    assert_close(loss, out["train_loss"], 1e-5, "loss")
    loss.backward()
    stored = [k for k in out if k.startswith("grad/")]
    # some are zero but for the rounding of two terms of the largest one's size
    zero = max(1e-8, 2 * torch.finfo(torch.float32).eps * max(float(out[k].abs().max()) for k in stored))
    for name in stored:
        own = name.removeprefix("grad/").removeprefix(CONTROL).removeprefix(UNET)
        gradient = network.get_parameter(own).grad
        assert gradient is not None
        assert_close(gradient, out[name], 1e-5, name, floor=zero)
    assert sum(p.grad is not None for p in base.parameters()) == int(out["n_params_with_grad_encoder"])


@golden.check(lambda c: c.kind == "init_and_train_steps")
def first_steps(case: GoldenCase) -> None:
    """A ControlNet made of its base begins as the base, and every parameter moves as the official ones."""
    config, out = case.config, case.outputs
    without_effect(case)
    state = by_formula(config["keys"])
    unet, control = (keywords(config[k]) for k in ("unet_config", "control_stage_config"))
    base = LDMUNet(**unet).eval()
    base.load_state_dict(LDM_UNET.to_ours(state))
    network = ControlNet(base, unlocked=not config["sd_locked"], **control).eval()
    own = {k: v.clone() for k, v in network.state_dict().items()}
    fresh = {k.removeprefix(CONTROL) for k in config["newly_added"]}
    assert fresh == {k for k in own if not k.startswith("base.") and f"{UNET}{k}" not in state}
    hint = {k: state[CONTROL + k] for k in fresh if k.startswith("input_hint_block.") and ".14." not in k}
    network.load_state_dict(own | hint)
    middle = [0.0] * (len(network.downsampling) - 1) + [1.0]

    def told(i: int) -> dict[str, Tensor]:
        given = {"context": case.inputs["context"][i], "hint": case.inputs["hint"][i]}
        scales = torch.tensor(middle).expand(len(given["hint"]), -1)
        return given | ({"scales": scales} if config["only_mid_control"] else {})

    ends = {"beta_start": config["linear_start"], "beta_end": config["linear_end"]}
    path = {"name": "vp-discrete", "schedule": "scaled_linear", "steps": 1000, **ends}
    seen = Denoiser(base, path, "eps", time="index")
    objective = ControlObjective(network, seen, text_dropout=0)
    assert config["optimizer"] == "AdamW" and objective.denoiser.config() == seen.config()
    trained = [p for p in network.parameters() if p.requires_grad]
    named = {k: config[k] for k in ("lr", "betas", "eps", "weight_decay")}
    optimizer = torch.optim.AdamW(trained, **named)

    def parameter(name: str) -> Tensor:
        own = name.removeprefix(CONTROL).removeprefix(UNET)
        decoder = not config["sd_locked"] and own.startswith(("output_blocks.", "out."))
        return (network if name.startswith(CONTROL) or decoder else base).get_parameter(own)

    start = {n: parameter(n).detach().clone() for n in config["parameter_names"]}
    for i in range(config["steps"]):
        x0, noise, t = (case.inputs[k][i] for k in ("x0", "noise", "t"))
        at = objective.path.t_of_timestep(t)  # type: ignore[attr-defined]
        if i == 0:
            x_t = objective.path.add_noise(x0.double(), noise.double(), at).float()
            with torch.no_grad():
                begun, plain = network(x_t, t, **told(0)), base(x_t, t, told(0)["context"])
            assert torch.equal(begun, plain)
            assert_close(begun, out["eps_before_training"], 1e-5, "eps before training")
            assert_close(plain, out["eps_base_model"], 1e-5, "eps of the base")
        optimizer.zero_grad()
        loss = gaussian_losses(objective.denoiser, x0, at, noise, **told(i))[0].mean()
        loss.backward()
        norms = [0.0 if (g := parameter(n).grad) is None else float(g.norm()) for n in config["parameter_names"]]
        if config["sd_locked"]:  # the official decoder has gradients that no optimizer sees
            norms = [n if k.startswith(CONTROL) else float("nan") for n, k in zip(norms, config["parameter_names"])]
        optimizer.step()
        moved = [float((parameter(n).detach() - start[n]).norm()) for n in config["parameter_names"]]
        assert_close(loss, out["losses"][i], 1e-5, "loss")
        want = torch.where(torch.tensor(norms).isnan(), torch.nan, out["grad_norms"][i])
        keep = ~want.isnan()
        torch.testing.assert_close(torch.tensor(norms)[keep], want[keep], rtol=1e-4, atol=1e-6)
        # Adam divides a gradient that is rounding alone by its own size
        sure = ((out["grad_norms"][: i + 1] == 0) | (out["grad_norms"][: i + 1] > 1e-6)).all(0)
        assert sure.double().mean() > 0.8
        torch.testing.assert_close(torch.tensor(moved)[sure], out["moved_since_start"][i][sure], rtol=1e-3, atol=1e-5)
    certain = {f"after/{n}" for n, known in zip(config["parameter_names"], sure.tolist()) if known}
    for name in [k for k in out if k in certain]:
        torch.testing.assert_close(parameter(name.removeprefix("after/")).detach(), out[name], rtol=1e-4, atol=1e-5)


class Toy(nn.Module):
    """The toy of the ddim_hacked cases. It is shown the official states, by timestep: sines of states of a hundred,
    nine times apart, make more of a rounding than any tolerance leaves."""

    def __init__(self, states: dict[int, Tensor]):
        super().__init__()
        self.states = states

    def forward(self, x: Tensor, t: Tensor, txt: Tensor, hint: Tensor, scales: Tensor) -> Tensor:
        known = self.states[int(t[0])]
        known = known.repeat(len(x) // len(known), 1, 1, 1)
        assert_close(x, known, 1e-5, "state")
        x = known
        txt, t = (v.view(-1, 1, 1, 1).to(x) for v in (txt, t))
        on = (scales[:, 0] > 0).view(-1, 1, 1, 1)
        return 0.3 * x.tanh() + 0.001 * t + txt * x.sin() + 0.2 * hint * x.cos() * on


class Given(Request):
    """A request whose draws are those of a case."""

    def __init__(self, x: Tensor, draws: list[Tensor], **given: Any):
        super().__init__(shape=tuple(x.shape[1:]), generators=generators(range(len(x))), **given)
        self.draws = iter(draws)

    def randn(self, shape: tuple[int, ...] | None = None) -> Tensor:
        return next(self.draws)


@golden.check(lambda c: c.source.endswith("ddim_hacked.py"))
def guided_ddim(case: GoldenCase) -> None:
    config, x = case.config, case.inputs["x_T"]
    ends = {"beta_start": config["linear_start"], "beta_end": config["linear_end"]}
    path = {"name": "vp-discrete", "schedule": "scaled_linear", "steps": 1000, **ends}
    states = dict(zip(case.outputs["timesteps"].flip(0).tolist(), case.outputs["trajectory"]))
    view = Denoiser(Toy(states), path, config["parameterization"], time="index")
    seen: list[tuple[Tensor, Tensor]] = []
    solver = {"name": "ldm", "eta": config["eta"]}
    sampler = ControlSampler(steps=config["S"], guess=config["guess_mode"], solver=solver)
    request = Given(
        x,
        [x, *case.inputs["noise"]],
        cond={"txt": case.inputs["txt"], "hint": case.inputs["hint"]},
        null={"txt": case.inputs["ntxt"]},
        guidance_scale=config["scale"],
        callback=lambda i, total, x, x0: seen.append((x, x0)),
    )
    got = sampler(view, request)
    passes = 1 if config["scale"] == 1 else 2
    assert request.info["nfe"] == passes * len(case.outputs["timesteps"]) and len(seen) == len(
        case.outputs["timesteps"]
    )
    found = torch.stack([s for s, _ in seen])
    assert_close(found, case.outputs["trajectory"][: len(seen)], 1e-5, "trajectory")
    assert_close(torch.stack([x0 for _, x0 in seen]), case.outputs["pred_x0"][1:], 1e-5, "pred_x0")
    assert_close(got, case.outputs["x"], 1e-5, "x")


@golden.check(lambda c: c.kind == "transfer")
def transferred(case: GoldenCase) -> None:
    files = {k: {n.removeprefix(f"{k}/"): v for n, v in case.inputs.items() if n.startswith(f"{k}/")}
             for k in ("control", "sd15", "other")}  # fmt: skip
    missing = case.config["missing_in_other"]
    assert not set(missing) & files["other"].keys()
    got = transfer(files["control"], files["sd15"], files["other"])
    want = {k.removeprefix("final/"): v for k, v in case.outputs.items()}
    assert got.keys() == want.keys()
    for name in want:
        assert_close(got[name], want[name], 1e-6, name)


@golden.check(lambda c: c.kind == "annotators")
def condition_pictures(case: GoldenCase) -> None:
    config, given, out = case.config, {k: v.numpy() for k, v in case.inputs.items()}, case.outputs
    resized = annotators.resize_image(annotators.hwc3(given["image"]), config["resolution"])
    case.ignore("cv2", why="the version that drew the pictures")
    flatness = math.prod(math.pi if f == "pi" else float(f) for f in str(config["a"]).split("*"))
    soft, depth, (threshold, sigma) = given["soft_edges"], given["depth"], config["nms"]
    found = {
        "hwc3_gray": annotators.hwc3(given["gray"]),
        "hwc3_rgba": annotators.hwc3(given["rgba"]),
        "resized": resized,
        "canny": np.where(annotators.canny(resized[None], *config["canny"])[0], 255, 0).astype(np.uint8),
        "scribble": annotators.scribble(resized),
        "nms": annotators.nms(soft, threshold, sigma),
        "fake_scribble": annotators.fake_scribble(soft, threshold, sigma),
        "depth_image": annotators.depth_picture(depth),
        "normal_image": annotators.normals(depth, config["bg_threshold"], flatness),
    }
    assert found.keys() == out.keys()
    for name, want in out.items():
        got = torch.from_numpy(found[name])
        assert got.shape == want.shape and got.dtype == want.dtype, name
        gap = (got.int() - want.int()).abs()
        if name in ("canny", "nms", "fake_scribble"):
            assert (gap > 0).double().mean() <= 0.01, name
        else:
            assert int(gap.max()) <= (name in ("resized", "normal_image")), name


@golden.check(lambda c: c.kind == "hed_network")
@torch.no_grad()
def soft_edges(case: GoldenCase) -> None:
    state = by_formula(case.config["keys"])
    state["norm"] = torch.tensor(case.config["norm"], dtype=torch.float32).view(1, 3, 1, 1)
    network = HED().eval()
    network.load_state_dict(state)
    assert sum(p.numel() for p in network.parameters()) == case.config["params"]
    x = case.inputs["image"].permute(2, 0, 1)[None].float()
    for i, side in enumerate(network.sides(x)):
        assert_close(side[0, 0], case.outputs[f"side_{i}"], 1e-4, f"side {i}")
    assert_close(network(x)[0, 0], case.outputs["mean_logit"], 1e-4, "mean_logit")


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "unet", "own", "decoder"),
    [("v1.5", "sd1", 361_279_120, 510_808_004), ("v2.1", "sd2", 364_228_240, 514_248_644)],
)
def test_published_sizes(preset: str, unet: str, own: int, decoder: int) -> None:
    with torch.device("meta"):
        base = registry().build("model", {"name": "ldm-unet", "preset": unet})
        alone = registry().build("model", {"name": "controlnet", "preset": preset})
        unlocked = registry().build("model", {"name": "controlnet", "preset": preset, "unlocked": True}, base=base)

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    assert count(alone) == own and count(unlocked) == own + decoder
    assert count(alone.input_hint_block) == 1_086_480
    assert count(alone.zero_convs) + count(alone.middle_block_out) == 11_479_680
    assert len(alone.downsampling) == 13


# -- layouts -----------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"model_channels": 8, "num_res_blocks": 1, "channel_mult": (1, 2), "num_heads": 2,
                         "attention_resolutions": (2,), "context_dim": 8, "norm_groups": 4, "image_size": 8}  # fmt: skip
HINT: dict[str, Any] = {"hint_size": 16, "hint_widths": (4, 4), "hint_channels": 3}


def small(seed: int = 0, **options: Any) -> tuple[LDMUNet, ControlNet]:
    """A base whose every layer does something, and its ControlNet, which does nothing yet."""
    torch.manual_seed(seed)
    base = LDMUNet(**SMALL).eval()
    with torch.no_grad():
        for p in base.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return base, ControlNet(base, **{**SMALL, **HINT, **options}).eval()


def example(network: ControlNet) -> dict[str, Tensor]:
    return network.example(
        {"num_classes": 0, "vector_dim": None, "concat_channels": 0, "in_channels": 4, **SMALL, **HINT}
    )


def test_whole_files_and_those_of_a_control_alone() -> None:
    """Of a whole checkpoint the control is read, by another layout; an unlocked decoder goes into a file that has no
    base, and back."""
    base, network = small()
    own = {k: v for k, v in network.state_dict().items() if not k.startswith("base.")}
    alone = CONTROLNET.from_ours(own)
    assert all(k.startswith(CONTROL) for k in alone)
    whole = alone | LDM_UNET.from_ours(base.state_dict()) | {"betas": torch.ones(3)}
    for file in (alone, whole, {k.removeprefix(CONTROL): v for k, v in alone.items()}):
        assert CONTROLNET.recognise(file) != WHOLE.recognise(file) and WHOLE.recognise(whole)
        read = CONTROLNET.to_ours(file)
        assert read.keys() == own.keys() and all(torch.equal(read[k], own[k]) for k in own)
    assert not CONTROLNET.recognise(LDM_UNET.from_ours(base.state_dict()))
    _, free = small(unlocked=True)
    own = {k: v for k, v in free.state_dict().items() if not k.startswith("base.")}
    file = CONTROLNET.from_ours(own)
    assert f"{UNET}out.2.weight" in file and CONTROLNET.config(file)["unlocked"]
    read = CONTROLNET.to_ours(file)
    assert read.keys() == own.keys()
    config = CONTROLNET.config(alone)
    assert {k: config[k] for k in ("hint_widths", "hint_channels")} == {
        k: HINT[k] for k in ("hint_widths", "hint_channels")
    }
    with pytest.raises(KeyError):
        CONTROLNET.to_ours({k: v for k, v in alone.items() if "zero_convs.2" not in k})


def test_what_does_not_fit_is_said() -> None:
    base, network = small()
    given = example(network)
    for options, said in (
        ({"hint_size": 24}, "not 1, 2, 4"),
        ({"hint_size": 64}, "at most 1 times"),
        ({"model_channels": 16}, "cannot start"),
    ):
        with pytest.raises(VgmError, match=said):
            ControlNet(base, **{**SMALL, **HINT, **options})
    with pytest.raises(VgmError, match="not on Linear"):
        ControlNet(nn.Linear(2, 2), **SMALL, **HINT)
    with pytest.raises(VgmError, match="the hint is"):
        network(**{**given, "hint": given["hint"][..., :-1]})
    with pytest.raises(VgmError, match="no base"):
        ControlNet(None, **SMALL, **HINT)(**given)
    with pytest.raises(VgmError, match="needs a context"):
        network(**{**given, "context": None})
    scales = {"scales": (1.0, 2.0)}
    with pytest.raises(VgmError, match="connections"):
        ControlSampler(**scales).weights(network, 1.0, torch.device("cpu"))
    with pytest.raises(VgmError, match="weights of its own"):
        ControlSampler(guess=True, resolution_weighting=True)


def test_features_are_those_of_the_steered_base() -> None:
    _, network = small()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1)
    given = example(network)
    kept: dict[str, Tensor] = {}
    assert network.base is not None
    hook = network.base.output_blocks[2].register_forward_hook(lambda m, a, out: kept.update(out=out))
    with torch.no_grad():
        network(**given)
        found = network.features(layers=["middle_block", "output_blocks.2", "input_blocks.0"], **given)
    hook.remove()
    assert torch.equal(found[1], kept["out"]) and found[0].shape[-1] * 2 == found[2].shape[-1]


def test_hints_of_pictures(tmp_path: Path) -> None:
    """Every annotator through the condition, in the range and the shape that a network is told."""
    x = open_dataset("openmoji").pixels([0, 7, 40])
    shades = {"canny": 2, "scribble": 2, "nms": 2, "fake-scribble": 2}
    for name in ("canny", "scribble", "nms", "fake-scribble", "depth", "normal", None):
        node = {"name": "annotated", "annotator": name, "size": 32, "channels": 3}
        hint = registry().build("condition", node)
        cond = hint.encode(hint.items_of({"image": x}, []), torch.device("cpu"))["hint"]
        assert cond.shape == (3, 3, 32, 32) and 0 <= cond.min() and cond.max() <= 1
        assert len(cond.unique()) == shades.get(str(name), len(cond.unique())), name
    want = torch.from_numpy(annotators.canny(((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()))
    canny = registry().build("condition", {"name": "annotated", "size": 32, "channels": 3})
    assert torch.equal(canny.items_of({"image": x}, [])[:, 0] > 0, want)
    Image.fromarray(((x[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()).save(tmp_path / "x.png")
    assert torch.equal(canny.parse([str(tmp_path / "x.png")])[0].pixels[0] > 0, want[0])
    for scribbles in (False, True):
        soft = registry().build("condition", {"name": "hed", "size": 32, "channels": 3, "scribbles": scribbles})
        cond = soft.encode(x, torch.device("cpu"))["hint"]
        assert cond.shape == (3, 3, 32, 32) and cond.shape == soft.example(3, torch.device("cpu"))["hint"].shape


def test_edges_agree_as_counted_by_hand() -> None:
    a, b = np.zeros((4, 9, 9), bool), np.zeros((4, 9, 9), bool)
    a[0, 4], b[0, 5] = True, True  # a line and its neighbour
    a[1, 4], b[1, 8] = True, True  # too far
    a[2, 4], b[2, 4, :3] = True, True  # a third of it: precision 4/9 within a pixel, recall 1
    assert np.allclose(edge_f1(a, b, tolerance=1), [1, 0, 2 * (4 / 9) / (4 / 9 + 1), 1])
    assert np.allclose(edge_f1(a, b, tolerance=0)[:2], 0)
    assert [near_by(side, side) for side in (32, 64, 512)] == [0, 0, 5]


# -- steering ----------------------------------------------------------------------------------------------------------


def request(network: ControlNet, n: int = 2, **options: Any) -> Request:
    given = example(network)
    cond = {k: given[k].expand(n, *given[k].shape[1:]) for k in ("context", "hint")}
    null = {"context": torch.zeros_like(given["context"])}
    shape = tuple(given["x"].shape[1:])
    return Request(shape=shape, generators=generators(range(n)), cond=cond, null=null, guidance_scale=3.0, **options)


def trained_a_little(network: ControlNet, seed: int = 0) -> ControlNet:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (*network.zero_convs.parameters(), *network.middle_block_out.parameters(),
                  *network.input_hint_block.parameters()):  # fmt: skip
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    return network


STABLE = {"name": "vp-discrete", "schedule": "scaled_linear", "steps": 1000, "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize("solver", [{"name": "ddim"}, {"name": "ldm", "eta": 1.0}, {"name": "dpmpp-2m"}], ids=str)
def test_strength_0_is_the_base_bit_for_bit(solver: dict[str, Any]) -> None:
    base, network = small()
    trained_a_little(network)
    view, plain = (Denoiser(n, STABLE, "eps", time="index") for n in (network, base))
    without = request(network)
    del without.cond["hint"]
    with torch.no_grad():
        want = registry().build("sampler", {**solver, "steps": 4})(plain, without)
        for options in ({"strength": 0.0}, {"interval": (2.0, 3.0)}, {"scales": (0.0,) * 5}):
            got = ControlSampler(steps=4, solver=solver, **options)(view, request(network))
            assert torch.equal(got, want), options
        one = ControlSampler(steps=4, solver=solver)(view, request(network))
        assert not torch.equal(one, want)
        assert torch.equal(one, ControlSampler(steps=4, solver=solver, interval=(0, 1), scales=(1,) * 5)(
            view, request(network)))  # fmt: skip


class Loaded:
    """What the host makes of `also=RUN`."""

    def __init__(self, model: nn.Module):
        self.model = model


def test_controls_are_summed() -> None:
    """Two of half strength are one; a second of strength 0 changes nothing; the order does not count."""
    _, network = small()
    trained_a_little(network)
    other = trained_a_little(small()[1], seed=1)
    view = Denoiser(network, STABLE, "eps", time="index")

    def sampled(*also: ControlNet, **options: Any) -> Tensor:
        asked = request(network)
        for k in range(len(also)):
            asked.cond[f"hint_{k + 1}"] = asked.cond["hint"]
        with torch.no_grad():
            return ControlSampler(steps=2, also=[Loaded(a) for a in also], **options)(view, asked)

    alone = sampled()
    assert torch.allclose(sampled(network, strength=0.5, also_strength=0.5), alone, atol=1e-5)
    assert torch.equal(sampled(other, also_strength=0.0), alone)
    both = sampled(other)
    assert not torch.allclose(both, alone, atol=1e-4)
    assert torch.allclose(sampled(other, network, strength=0.0, also_strength=(1.0, 1.0)), both, atol=1e-5)
    with pytest.raises(VgmError, match="also_strength has 2"):
        sampled(other, also_strength=(1.0, 1.0))
    for wrong, said in (
        (ControlNet(None, **{**SMALL, **HINT, "model_channels": 16}), "of another U-Net"),
        (small(unlocked=True)[1], "a decoder of its own"),
        (LDMUNet(**SMALL), "no ControlNet"),
    ):
        with pytest.raises(VgmError, match=said):
            sampled(wrong)  # type: ignore[arg-type]


def test_weights_of_the_connections() -> None:
    _, network = small()

    def weights(**options: Any) -> list[float]:
        found = ControlSampler(**options).weights(network, options.get("strength", 1.0), torch.device("cpu"))
        return [round(w, 6) for w in found[0].tolist()]

    assert weights(resolution_weighting=True) == [1, 1, 2, 2, 2]
    assert weights(guess=True, strength=2.0) == [round(2 * 0.825**k, 6) for k in (4, 3, 2, 1, 0)]
    assert weights(only_middle=True, scales=(1, 2, 3, 4, 5)) == [0, 0, 0, 0, 5]


def test_half_of_the_prompts_are_left_out_and_no_hint() -> None:
    _, network = small()
    seen = Denoiser(network, STABLE, "v", time="index")
    objective = ControlObjective(network, seen, text_dropout=0.5)
    assert objective.view() == seen.config() and objective.view()["prediction"] == "v"
    n = 256
    batch = {"x": torch.zeros(n, 4, 8, 8), "cond": {"context": torch.ones(n, 7, 8), "hint": torch.ones(n, 3, 16, 16)},
             "null": {"context": torch.zeros(1, 7, 8)}}  # fmt: skip
    told = objective.dropped(batch, Step(index=3, seed=1))
    away = (told["context"] == 0).flatten(1).all(1)
    assert 0.4 < away.double().mean() < 0.6 and (told["context"][~away] == 1).all() and (told["hint"] == 1).all()
    assert torch.equal(objective.dropped(batch, Step(index=3, seed=1))["context"], told["context"])
    assert objective.dropped({**batch, "null": {}}, Step(index=0)) is batch["cond"]


@pytest.mark.slow
def test_hints_are_learned() -> None:
    """Beside a base that knows nothing, in some hundred steps: the error with another's hint is larger."""
    base, network = small()
    objective = ControlObjective(network, Denoiser(base, STABLE, "eps", time="index"))
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=3e-3)
    g = torch.Generator().manual_seed(0)

    def batch(n: int) -> dict[str, Any]:
        side = torch.rand(n, 1, 1, 1, generator=g) < 0.5
        hint = ((torch.arange(16).view(1, 1, 1, 16) < 8) == side).float().expand(n, 3, 16, 16)
        x = nn.functional.avg_pool2d(hint[:, :1] * 2 - 1, 2).expand(n, 4, 8, 8)
        cond = {"hint": hint, "context": torch.zeros(n, 7, 8)}
        return {"x": x, "cond": cond, "null": {"context": torch.zeros(1, 7, 8)}}

    for i in range(200):
        loss, _ = objective.loss("main", batch(16), Step(index=i))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = batch(64)
    wrong = {**right, "cond": {**right["cond"], "hint": 1 - right["cond"]["hint"]}}
    with torch.no_grad():
        own, other = (float(objective.loss("main", b, Step(index=999))[0]) for b in (right, wrong))
    assert own < 0.95 * other


def test_the_frozen_encoder_holds_no_graph() -> None:
    base, network = small()
    given = example(network)
    out = network(**given)
    out.square().mean().backward()
    assert not [n for n, p in base.named_parameters() if p.grad is not None or p.requires_grad]
    assert [n for n, p in network.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0] == [
        n for n, _ in network.named_parameters() if n.startswith(("zero_convs.", "middle_block_out."))
    ]
    x = given["x"].clone().requires_grad_()  # guidance by a measurement wants the whole gradient
    (want,) = torch.autograd.grad(base(x, given["t"], given["context"]).square().sum(), x)
    (got,) = torch.autograd.grad(network(**{**given, "x": x}).square().sum(), x)
    assert torch.allclose(got, want, atol=1e-5)


# -- from the base to pictures -----------------------------------------------------------------------------------------

Vgm = Callable[..., tuple[int, str, str]]
BASE = """
paper: base
model: {name: ldm-unet, model_channels: 8, num_res_blocks: 1, channel_mult: [1, 2], attention_resolutions: [2],
        num_heads: 2, context_dim: 8, norm_groups: 4}
conditions: {text: {name: words, words: [green, heart, red, circle], width: 8, length: 6, train: true, dropout: 0.1}}
objective: {name: ldm}
sampler: {name: ldm, steps: 2}
data: {path: openmoji}
optimizer: {lr: 1.0e-2}
train: {steps: 2, batch_size: 4, precision: fp32, save_every: 2, preview_n: 0, ema: []}
"""
TINY = ("train.steps=2", "train.batch_size=4", "train.precision=fp32", "train.save_every=2", "train.preview_n=0",
        "train.ema=[]", "model.hint_widths=[4,4]", "sampler.steps=2")  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny base, two ControlNets of it, and a picture of lines."""
    from vgm_cli.__main__ import run

    folder = tmp_path_factory.mktemp("controlnet")
    (folder / "base.yaml").write_text(BASE)
    lines = np.full((32, 32), 255, np.uint8)
    lines[8:24, 8] = lines[8:24, 24] = lines[8, 8:24] = lines[24, 8:25] = 0
    Image.fromarray(lines).save(folder / "lines.png")
    made = {"lines": folder / "lines.png"}
    control = ("train", "controlnet", "--base", str(folder / "base"), "data.path=openmoji", *TINY)
    edges = ("model.hint_channels=3", "conditions.hint={name: annotated, column: image}")
    for name, words in (
        ("base", ("train", str(folder / "base.yaml"))),
        ("control", control),
        ("canny", (*control, *edges, "train.seed=1")),
    ):
        made[name] = folder / name
        assert run([*words, "--out", str(made[name])]) == 0
    return made


def array(vgm: Vgm, run: Path, *words: object) -> np.ndarray:
    code, _, err = vgm("sample", run, "-n", 2, "--steps", 2, *words, "--out", "x.npz", "--overwrite")
    assert code == 0, err
    return np.load("x.npz")["arr_0"].astype(int)


def test_from_lines_to_pictures(runs: dict[str, Path], vgm: Vgm) -> None:
    """The base stays outside of the file; strength 0 is the base; a picture remembers how it was steered."""
    header = ckpt.read_header(ckpt.resolve(runs["control"]))
    assert header.parts["base"].component == "ldm-unet" and set(header.conditions or {}) == {"text", "hint"}
    assert header.component["kwargs"]["model_channels"] == 8 and header.component["kwargs"]["context_dim"] == 8
    state = ckpt.read_tensors(ckpt.resolve(runs["control"]))[0]
    assert not [k for k in state if k.startswith("base.")]
    prompt, hint = ("--prompt", "green heart"), ("--hint", runs["lines"])
    base = array(vgm, runs["base"], *prompt, "--sampler", "ddim", "--guidance-scale", 3)
    assert (array(vgm, runs["control"], *prompt, *hint, "solver={name: ddim}", "strength=0") == base).all()
    code, _, err = vgm("sample", runs["control"], "-n", 1, *prompt, *hint, "guess=true", "--out", "g.png")
    assert code == 0, err
    code, _, err = vgm("rerun", "g.png", "--out", "again.png")
    assert code == 0, err
    code, _, err = vgm("sample", runs["control"], "-n", 1, *prompt, "--out", "w.png")
    assert code == 2 and "follows a picture" in err


def test_two_controls_and_their_hints(runs: dict[str, Path], vgm: Vgm) -> None:
    words = ("--prompt", "red circle", "--hint", f"hint={runs['lines']}", "--hint", f"hint2={runs['lines']}")
    code, _, err = vgm("sample", runs["control"], "-n", 1, *words, f"also={runs['canny']}", "--out", "b.png")
    assert code == 0, err
    code, _, err = vgm("rerun", "b.png", "--out", "again.png")
    assert code == 0, err
    code, _, err = vgm("sample", runs["control"], "-n", 1, *words[:4], "also=nowhere", "--out", "c.png")
    assert code == 2 and "nowhere" in err


def test_edges_are_measured(runs: dict[str, Path], vgm: Vgm) -> None:
    given = np.load(str(resources.files("vgm_cli") / "data/assets/openmoji32.npz"))
    few = {k: given[k][:300:50] for k in ("images", "lineart", "captions")}
    np.savez("few.npz", **few)
    words = ("--metrics", "edge-f1", "--reference", "few.npz", "-n", 4, "--steps", 1, "--json")
    code, out, err = vgm("evaluate", runs["control"], *words)
    assert code == 0, err
    found = {r["metric"]: r for r in json.loads(out)}
    assert set(found) == {"edge-f1", "edge-f1-other"} and all(0 <= r["value"] <= 1 for r in found.values())
    code, _, err = vgm("evaluate", runs["control"], *words[:-1], "--assert", "edge-f1>2")
    assert code == 3, err


def test_files_convert_and_stand_on_a_base(runs: dict[str, Path], vgm: Vgm) -> None:
    """Official file and back, given its base anew; moved to another base and back; diffusers' hint is eight times."""
    code, _, err = vgm("convert", runs["control"], "control.pt")
    assert code == 0, err
    keys = ("num_heads=2", "norm_groups=4", "image_size=32", "hint_size=32", "in_channels=3")
    code, _, err = vgm("convert", "control.pt", "own.safetensors", *keys, f"base={runs['base']}")
    assert code == 0, err
    header = ckpt.read_header(Path("own.safetensors"))
    assert header.parts["base"].sha256 == ckpt.file_hash(ckpt.resolve(runs["base"]))
    code, out, err = vgm("convert", "control.pt", "alone.safetensors", *keys, "--json")
    assert code == 0 and json.loads(out)["needs_base"] and not json.loads(out)["samplable"], err
    code, _, err = vgm("sample", "alone.safetensors", "-n", 1, "--hint", runs["lines"], "--guidance-scale", 1)
    assert code == 2 and "no base to steer" in err
    code, _, err = vgm("convert", "control.pt", "x.safetensors", *keys[1:], "base=nowhere")
    assert code == 2 and "nowhere" in err
    code, _, err = vgm("convert", runs["base"], "base.pt")
    assert code == 0, err
    code, _, err = vgm("convert", "base.pt", "unet.safetensors", "num_heads=2", "norm_groups=4", "image_size=32")
    assert code == 0, err
    code, out, err = vgm(
        "train", "controlnet", "--recipe", "sd15", "--base", "unet.safetensors", "--print-config", "--json"
    )
    config = json.loads(out)["config"]
    assert code == 0 and config["codec"]["name"] == "autoencoder-kl" and set(config["conditions"]) == {"text", "hint"}
    unet = torch.load("base.pt", weights_only=True)["state_dict"]
    torch.save({"state_dict": {k: v + 0.25 for k, v in unet.items()}}, "other.pt")
    code, _, err = vgm("convert", "control.pt", "moved.pt", "base=base.pt", "transfer=other.pt")
    assert code == 0, err
    before, after = (torch.load(f, weights_only=True)["state_dict"] for f in ("control.pt", "moved.pt"))
    for name, value in before.items():
        shift = 0.25 if UNET + name.removeprefix(CONTROL) in unet else 0.0
        assert torch.allclose(after[name], value + shift, atol=1e-6), name
    code, _, err = vgm("convert", "control.pt", "y.pt", "transfer=other.pt")
    assert code == 2 and "base=OLD" in err
    code, _, err = vgm("convert", runs["control"], "folder", "--to", "controlnet-diffusers")
    assert code == 2 and "times smaller" in err


def test_one_file_holds_the_base_too(runs: dict[str, Path], vgm: Vgm) -> None:
    """As the published files do; read back, it becomes a network and the base beside it."""
    code, out, err = vgm("convert", runs["control"], "whole.pt", "--to", "controlnet-whole", "--json")
    assert code == 0, err
    assert any("the text words, for which" in remark for remark in json.loads(out)["remarks"])
    state = torch.load("whole.pt", weights_only=True)["state_dict"]
    base, own = (ckpt.read_tensors(ckpt.resolve(runs[k]))[0] for k in ("base", "control"))
    assert {k for k in state if k.startswith(UNET)} == {UNET + k for k in base}
    assert {k for k in state if k.startswith(CONTROL)} == {CONTROL + k for k in own}
    keys = ("num_heads=2", "norm_groups=4", "image_size=32", "in_channels=3")
    code, out, err = vgm("convert", "whole.pt", "all.safetensors", "hint_size=32", *keys, *(f"base.{k}" for k in keys[:3]),
                         "--json")  # fmt: skip
    assert code == 0 and not json.loads(out)["needs_base"], err
    header = ckpt.read_header(Path("all.safetensors"))
    assert set(header.conditions or {}) == {"hint"} and header.parts["base"].component == "ldm-unet"
    for file, before in (("all.safetensors", own), ("all.base.safetensors", base)):
        after = ckpt.read_tensors(Path(file))[0]
        assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert ckpt.load("all.safetensors").model.base is not None
    code, _, err = vgm("convert", "all.safetensors", "again.pt", "--to", "controlnet-whole")
    assert code == 0 and torch.load("again.pt", weights_only=True)["state_dict"].keys() == state.keys(), err
    code, _, err = vgm("convert", "whole.pt", "x.safetensors", "hint_size=32", *keys, f"base={runs['base']}")
    assert code == 0 and not Path("x.base.safetensors").exists(), err


def test_a_paper_without_a_base_takes_none(vgm: Vgm, runs: dict[str, Path]) -> None:
    code, _, err = vgm("train", "dit", "--base", runs["base"])
    assert code == 2 and "built on no other" in err
    code, _, err = vgm("train", "controlnet", "--recipe", "openmoji", "--out", "x")
    assert code == 2 and "roles.base={run: RUN}" in err


def test_pictures_are_of_the_size_that_the_base_saw(vgm: Vgm, runs: dict[str, Path]) -> None:
    """The base's own size and its data, which are told of only where the command line names no others."""
    base = Path(f"{runs['base']}-of-files")
    Image.new("RGB", (16, 16)).save("0.png")
    Path("0.txt").write_text("red circle")
    code, _, err = vgm("train", runs["base"].parent / "base.yaml", "data.path=.", "--out", base)
    assert code == 0, err
    words = ("train", "controlnet", "--base", base, "--print-config")
    data = json.loads(vgm(*words, "--json")[1])["config"]["data"]
    assert (data["path"], data["size"], data["channels"]) == (".", 16, 3) and "data: ., as" in vgm(*words)[2]
    other = (*words, "data.path=openmoji", "data.size=32")
    data = json.loads(vgm(*other, "--json")[1])["config"]["data"]
    assert (data["path"], data["size"]) == ("openmoji", 32) and "data: ., as" not in vgm(*other)[2]


def test_pairs_as_fill50k_has_them(tmp_path: Path) -> None:
    rows = []
    for i in range(3):
        for folder in ("source", "target"):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (10 * i, 0, 200 * (folder == "target"))).save(tmp_path / folder / f"{i}.png")
        rows.append({"source": f"source/{i}.png", "target": f"target/{i}.png", "prompt": f"circle {i}"})
    (tmp_path / "prompt.json").write_text("\n".join(map(json.dumps, rows)))
    data = open_dataset(str(tmp_path), columns=["source"], quiet=True)
    batch = data.gather(range(3), flip=[False] * 3)
    assert len(data) == 3 and (batch["x"][:, 2] == 200).all() and (batch["source"][:, 2] == 0).all()
    assert torch.equal(batch["x"][:, 0], batch["source"][:, 0])
    assert batch["text"] == [f"circle {i}" for i in (batch["x"][:, 0, 0, 0] // 10).tolist()]
