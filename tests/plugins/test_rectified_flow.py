"""Rectified flow against gnobitab/RectifiedFlow@5a1fd4d (golden cases): network, losses, samplers, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from vgm_plugins.rectified_flow.checkpoints import CONVERTER
from vgm_plugins.rectified_flow.flow import euler, flow_losses, rk45, times
from vgm_plugins.rectified_flow.objective import RectifiedFlow, Reflow
from vgm_plugins.rectified_flow.pairs import read_pairs
from vgm_plugins.rectified_flow.sampler import RectifiedFlowSampler

from vgm_cli.api import Request, Step, generators
from vgm_cli.convert_api import unwrap
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.errors import VgmError
from vgm_cli.metrics.straightness import straightness
from vgm_cli.nets.ncsnpp import NCSNpp
from vgm_cli.nets.ncsnpp_presets import PRESETS
from vgm_cli.registry import registry
from vgm_cli.testing import suites
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, assert_close

golden = GoldenChecks("rectified-flow")

NO_EFFECT = ("normalization", "attention_type", "conv_size")  # of NCSN++ in the official code
TIME_SCALE = 999.0


def network(case: GoldenCase) -> NCSNpp:
    """The official config's network."""
    given, data = case.config["model"], case.config["data"]
    assert given["name"] == "ncsnpp" and case.config["training"]["sde"] == "rectified_flow"
    own = {k: given[k] for k in given if k not in (*NO_EFFECT, "name")}

    def without_effect(*keys: str, why: str) -> None:
        case.ignore(*(f"model.{k}" for k in keys), why=why)

    without_effect(*NO_EFFECT, why="the official network reads it and does nothing with it")
    without_effect("init_scale", "fourier_scale", why="of weights that are stored")
    without_effect("dropout", why="evaluated without dropout")
    case.ignore("training.continuous", why="the labels are stored")
    if own["resblock_type"] == "biggan":
        without_effect("resamp_with_conv", why="of blocks that do not change the size themselves")
    if not own["fir"]:
        without_effect("fir_kernel", why="nothing is filtered")
    if own["progressive_input"] == "none":
        without_effect("progressive_combine", why="no image joins the encoder")
    if own["embedding_type"] == "fourier" or not own["scale_by_sigma"]:
        without_effect("sigma_min", "sigma_max", "num_scales", why="of the ladder, which nothing is divided by")
    size = {"image_size": data["image_size"], "in_channels": data["num_channels"], "centered": data["centered"]}
    return NCSNpp(**own, **size)


def toy(x: Tensor, labels: Tensor) -> Tensor:
    """The network that the cases without weights state in their notes."""
    return 0.3 * torch.tanh(x) - 0.2 * x + 0.001 * labels.view(-1, *[1] * (x.ndim - 1)).to(x)


def toy_velocity(x: Tensor, t: Tensor) -> Tensor:
    return toy(x, t * TIME_SCALE)


def toy_distance(a: Tensor, b: Tensor) -> Tensor:
    """What stands for LPIPS in the cases: (B, 1, 1, 1)."""

    def dx(v: Tensor) -> Tensor:
        return v[..., 1:] - v[..., :-1]

    flat = (a - b).abs().flatten(1).mean(1) + 0.1 * (dx(a) - dx(b)).square().flatten(1).mean(1)
    return flat.view(-1, 1, 1, 1)


class Toy(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return toy(x, t)


class Drawn(Request):
    """A request whose standard normal draws are given."""

    def __init__(self, draws: Iterator[Tensor], like: Tensor):
        super().__init__(shape=tuple(like.shape[1:]), generators=generators(range(len(like))))
        self.draws = draws

    def randn(self, shape: tuple[int, ...] | None = None) -> Tensor:
        return next(self.draws)


# -- golden cases ----------------------------------------------------------------------------------------------------


@golden.check(lambda c: "model" in c.config and bool(c.state))
@torch.no_grad()
def forward(case: GoldenCase) -> None:
    model = network(case).eval()
    model.load_state_dict(CONVERTER.to_ours(case.state))
    x, labels, want = case.inputs["x"], case.inputs["labels"], case.outputs["v"]
    assert_close(model(x, labels), want, 1e-5, "velocity")
    assert_close(model.to(memory_format=torch.channels_last)(x, labels), want, 1e-5, "channels last")
    told = CONVERTER.config(case.state)
    for key in (
        "nf",
        "ch_mult",
        "num_res_blocks",
        "embedding_type",
        "resblock_type",
        "progressive",
        "progressive_input",
    ):
        assert told[key] == case.config["model"][key], key


@golden.check(lambda c: "reflow_loss" in c.config)
def losses(case: GoldenCase) -> None:
    config, i = case.config, case.inputs
    first = config["reflow_t_schedule"] is None
    if "z0_unit" not in i:
        case.ignore("noise_scale", why="z0 is stored with its scale")
    if config["reflow_t_schedule"] == "t1":
        case.ignore("eps", why="t is 1, wherever it starts")
    z0 = i["z0_unit"] * config["noise_scale"] if "z0_unit" in i else i["z0"]
    draw = i.get("u", i.get("j", torch.zeros(len(z0))))
    t = times(draw, "uniform" if first else config["reflow_t_schedule"], config["eps"])
    kind = config["reflow_loss"] or "l2"
    got, plain = flow_losses(toy_velocity, z0, i["data"], t, kind, config["reduce_mean"], toy_distance)
    assert_close(got.mean(), case.outputs["loss"], 1e-6, "loss")
    assert_close(flow_losses(toy_velocity, z0, i["data"], t)[0], plain, 1e-6, "plain")


@golden.check(lambda c: "sample_N" in c.config)
def sampling(case: GoldenCase) -> None:
    """The pure functions, and the shipped sampler on the shipped view."""
    config, z = case.config, case.inputs["draws_randn"][0]
    draws = case.inputs.get("draws_randn_like", torch.zeros(0))
    scale, var, eps = config["noise_scale"], config.get("sigma_var", 0.0), config["eps"]
    adaptive = {"rk45": True, "euler": False}[config["sampler"]]
    if adaptive:
        case.ignore("ode_tol", why="the end is compared within 1e-3, which any small tolerance reaches")
        case.ignore("sigma_var", "sample_N", why="an adaptive ODE solver has no noise, and steps of its own")
    else:
        case.ignore("ode_tol", why="Euler's steps have no tolerance")
    if adaptive:
        x, nfe = rk45(toy_velocity, z * scale, tol=config["ode_tol"], eps=eps, joint=True)
        assert abs(nfe - int(case.outputs["nfe"])) <= 12  # solvers differ a little between scipy's versions
    else:
        steps = iter(draws)
        x = euler(
            toy_velocity,
            z * scale,
            config["sample_N"],
            eps=eps,
            sigma_var=var,
            noise_scale=scale,
            noise=lambda: next(steps),
        )
    assert config["inverse_scaler"] == "(x+1)/2"
    tolerance = 1e-3 if adaptive else 1e-5
    assert_close((x + 1) / 2, case.outputs["x"], tolerance, "samples")

    objective = RectifiedFlow(Toy(), noise_scale=scale, eps=eps)
    view = Denoiser.from_config(Toy(), objective.view())
    tol = {"ode_tol": config["ode_tol"]} if adaptive else {}
    sampler = RectifiedFlowSampler(method=config["sampler"], steps=config["sample_N"] or 1, sigma_var=var, **tol)
    request = Drawn(iter([z, *draws]), z)
    assert_close((sampler(view, request) + 1) / 2, case.outputs["x"], tolerance, "the shipped sampler")
    assert adaptive or request.info["nfe"] == int(case.outputs["nfe"])


@golden.check(lambda c: c.config.get("which") in ("ode", "euler_ode"))
def making_pairs(case: GoldenCase) -> None:
    config, x, want = case.config, case.inputs["x"], case.outputs["x"]
    if config["which"] == "euler_ode":
        assert_close(euler(toy_velocity, x, config["N"], eps=config.get("eps", 1e-3)), want, 1e-5, "euler")
        case.ignore("reverse", why="the official Euler pairs go forward whatever it says")
        return
    for joint in (True, False):
        ends = {"tol": config.get("ode_tol", 1e-5), "eps": config.get("eps", 1e-3)}
        got, _ = rk45(toy_velocity, x, reverse=config.get("reverse", False), joint=joint, **ends)
        assert_close(got, want, 1e-3, "rk45")


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


# -- networks and checkpoints ----------------------------------------------------------------------------------------

SIZES = {  # the official code's
    "ddpm-cifar10": 35_218_947,
    "ddpm-cifar10-ve": 35_218_947,
    "ddpm-256": 111_569_923,
    "ddpmpp-cifar10": 61_804_419,
    "ddpmpp-cifar10-deep": 106_632_579,
    "ncsnpp-cifar10": 62_758_915,
    "ncsnpp-cifar10-deep": 107_587_075,
    "ncsnpp-cifar10-discrete": 62_693_251,
    "ncsnpp-cifar10-vp": 62_693_251,
    "ncsnpp-cifar10-vp-deep": 107_521_411,
    "ncsnpp-celeba64": 62_693_251,
    "ncsnpp-bedroom256": 65_574_549,
    "ncsnpp-church256": 65_574_549,
    "ncsnpp-celebahq256": 65_574_549,
    "ncsnpp-ffhq256": 65_574_549,
    "ncsnpp-1024": 105_785_896,
    "rf-cifar10": 61_804_419,
    "rf-256": 65_574_549,
    "rf-lsun256": 65_574_549,
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_size_and_configuration_from_shapes(name: str) -> None:
    with torch.device("meta"):
        model = registry().build("model", {"name": "ncsnpp", "preset": name})
    state = model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]
    assert CONVERTER.recognise(state) and CONVERTER.component == "ncsnpp"
    told = CONVERTER.config(state)
    positional = told["embedding_type"] == "positional"  # then shapes do not tell what happens to the output
    assert {k: v for k, v in told.items() if PRESETS[name].get(k, v) != v and not (positional and "sigma" in k)} == {}


SMALL: dict[str, Any] = {"image_size": 8, "nf": 16, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)}


def official_checkpoint(model: NCSNpp) -> tuple[dict[str, Any], list[Tensor]]:
    """{optimizer, model, ema, step} as score_sde saves it: DataParallel's prefix, an average that is a list."""
    state = {f"module.{k}": v for k, v in CONVERTER.from_ours(model.state_dict()).items()}
    shadow = [p.detach() + 1 for p in model.parameters() if p.requires_grad]
    ema = {"decay": 0.999999, "num_updates": 10, "shadow_params": shadow}
    return {"optimizer": {"state": {}, "param_groups": []}, "model": state, "ema": ema, "step": 7}, shadow


@pytest.mark.parametrize("embedding", ["positional", "fourier"])
def test_official_checkpoint(embedding: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = NCSNpp(
        **SMALL, embedding_type=embedding, progressive_input="input_skip", progressive="output_skip", fir=True
    )
    saved, shadow = official_checkpoint(model)
    assert saved["model"]["module.sigmas"].dtype == torch.float64
    torch.save(saved, tmp_path / "checkpoint_8.pth")
    loaded = torch.load(tmp_path / "checkpoint_8.pth", weights_only=True)
    averaged, raw = unwrap(loaded), unwrap(loaded, "model")
    assert CONVERTER.recognise(averaged)
    other = NCSNpp(**{**CONVERTER.config(averaged), "image_size": 8, "attn_resolutions": (4,)})
    other.load_state_dict(CONVERTER.to_ours(averaged))
    fixed = {"all_modules.0.W"} if embedding == "fourier" else set()
    names = [k for k, p in model.named_parameters() if p.requires_grad]
    assert len(names) == len(shadow) and not fixed & set(names)
    for k, value in other.state_dict().items():
        want = model.state_dict()[k] + (1 if k in names else 0)
        assert torch.equal(value, want), k
    other.load_state_dict(CONVERTER.to_ours(raw))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())
    again = CONVERTER.to_ours(CONVERTER.from_ours(model.state_dict()))
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(v, again[k]) for k, v in model.state_dict().items())
    with pytest.raises(VgmError, match="do not fit"):
        unwrap({**saved, "ema": {"shadow_params": [*shadow, torch.zeros(3)]}})


def test_initialisation_is_the_official_one() -> None:
    """Uniform with variance 1 / mean fan, almost zero where a block or the network ends, no biases."""
    torch.manual_seed(0)
    model = NCSNpp(image_size=8, nf=64, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,))
    block = model.all_modules[3]
    for weight, scale in ((block.Conv_0.weight, 1.0), (block.Dense_0.weight, 1.0), (block.Conv_1.weight, 1e-10)):
        fan = (weight.shape[0] + weight.shape[1]) / 2 * weight[0, 0].numel()
        assert weight.var().item() == pytest.approx(scale / fan, rel=0.1)
        assert weight.abs().max().item() <= (3 * scale / fan) ** 0.5
    assert not block.Conv_0.bias.any() and not block.Dense_0.bias.any()
    x = torch.randn(2, 3, 8, 8)
    assert model.eval()(x, torch.tensor([1.0, 500.0])).abs().max() < 1e-3


class TestNetwork(suites.ModelSuite):
    model = {"name": "ncsnpp", **SMALL, "in_channels": 1, "num_classes": 5, "null_class": True, "patch_size": 1}
    shape = (1, 8, 8)


class TestFourierNetworkInPatches(suites.ModelSuite):
    model = {"name": "ncsnpp", **SMALL, "image_size": 16, "in_channels": 3, "num_classes": 0, "patch_size": 2}
    model |= {"embedding_type": "fourier", "scale_by_sigma": True, "fir": True, "progressive_input": "residual"}
    shape = (3, 16, 16)


@pytest.mark.parametrize("progressive", ["none", "output_skip", "residual"])
@pytest.mark.parametrize(
    "pyramid", [("none", "sum"), ("input_skip", "sum"), ("input_skip", "cat"), ("residual", "sum")]
)
@pytest.mark.parametrize("fir", [False, True])
@pytest.mark.parametrize("block", ["biggan", "ddpm"])
def test_every_combination_runs_and_recomputes(progressive: Any, pyramid: Any, fir: bool, block: Any) -> None:
    torch.manual_seed(0)
    own = {"progressive": progressive, "progressive_input": pyramid[0], "progressive_combine": pyramid[1]}
    model = NCSNpp(**SMALL, **own, fir=fir, resblock_type=block, skip_rescale=False, dropout=0.0, init_scale=1.0)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 900.0])
    grads = []
    for flag in (False, True):
        model.checkpointing = flag
        model.zero_grad()
        model(x, t).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*grads))
    assert all(g.abs().max() > 0 for g in grads[0]), "a parameter is not used"


def test_network_errors() -> None:
    with pytest.raises(VgmError, match="halved"):
        NCSNpp(image_size=28)
    model, x, t = NCSNpp(**SMALL, num_classes=3), torch.randn(1, 3, 8, 8), torch.tensor([1.0])
    with pytest.raises(VgmError, match="needs labels"):
        model(x, t)
    with pytest.raises(VgmError, match="time embedding"):
        NCSNpp(**SMALL, num_classes=3, conditional=False)
    assert not hasattr(model, "null_condition")
    assert NCSNpp(**SMALL, conditional=False)(x, t).shape == x.shape


# -- objective -------------------------------------------------------------------------------------------------------


def tiny(**own: Any) -> NCSNpp:
    torch.manual_seed(0)
    model = NCSNpp(**SMALL, in_channels=1, num_classes=3, null_class=True, dropout=0.0, **own)
    suites.randomise(model)
    return model


BATCH = {"x": torch.linspace(-1, 1, 6 * 64).view(6, 1, 8, 8), "cond": {"y": torch.arange(6) % 3}}


def test_objective_draws() -> None:
    model = tiny()
    objective, step = RectifiedFlow(model, noise_scale=1.5, reduce_mean=False), Step(3)
    loss, logs = objective.loss("main", BATCH, step)
    z0, t = step.randn((6, 1, 8, 8), "noise") * 1.5, step.rand(6, "t") * 0.999 + 1e-3
    s = t.view(-1, 1, 1, 1)
    want = model(s * BATCH["x"] + (1 - s) * z0, 999 * t, **BATCH["cond"]) - (BATCH["x"] - z0)
    assert_close(loss, 0.5 * want.square().flatten(1).sum(1).mean(), 1e-5, "loss")
    assert_close(logs["mse"], want.square().mean(), 1e-5, "mse")


@pytest.mark.parametrize("schedule", ["t0", "t1", 3, "uniform"])
def test_distillation_uses_the_pairs(schedule: Any) -> None:
    """The network of a perfect student, which answers x1 - z0, has no loss at any schedule's times."""
    told: list[Tensor] = []

    class Perfect(nn.Module):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            told.append(t)
            return batch["x"] - batch["z0"]

    pairs = {"z": torch.randn(20, 1, 8, 8), "x": torch.randn(20, 1, 8, 8), "y": torch.arange(20) % 3}
    model = Perfect()
    model.num_classes = 3
    objective = Reflow(model, pairs=pairs, t_schedule=schedule, noise_scale=2.0)
    (batch,) = objective.experience(BATCH, Step(1))
    rows = Step(1).randint(20, 6, "pair")
    assert torch.equal(batch["z0"], pairs["z"][rows] * 2) and torch.equal(batch["x"], pairs["x"][rows])
    assert torch.equal(batch["cond"]["y"], pairs["y"][rows])
    loss, _ = objective.loss("main", batch, Step(1))
    assert loss == 0
    allowed = {"t0": [0.999], "t1": [999.0], 3: [0.999 * (1 + j * 1000 / 3 * 0.999) for j in range(3)]}
    for t in told[0].tolist():
        ok = 0.99 <= t <= 999 if schedule == "uniform" else any(abs(t - a) < 0.01 for a in allowed[schedule])
        assert ok, (schedule, t)


def test_online_pairs_are_the_teachers() -> None:
    teacher, step = tiny(), Step(5)
    objective = Reflow(tiny(), teacher=teacher, teacher_steps=4)
    (batch,) = objective.experience(BATCH, step)
    z0 = step.randn((6, 1, 8, 8), "noise")
    assert torch.equal(batch["z0"], z0) and batch["cond"] is BATCH["cond"]
    with torch.no_grad():
        want = euler(lambda x, t: teacher(x, t * 999, **BATCH["cond"]), z0, 4)
    assert_close(batch["x"], want, 1e-5, "pairs")
    guided = Reflow(tiny(), teacher=teacher, teacher_steps=4, guidance_scale=3.0).experience(BATCH, step)
    assert not torch.allclose(guided[0]["x"], want)
    assert not any(p.requires_grad for p in teacher.parameters())
    view = Denoiser.from_config(teacher, objective.view())
    assert_close(
        Reflow(tiny(), teacher=view, teacher_steps=4).experience(BATCH, step)[0]["x"], want, 1e-5, "from a view"
    )


def test_perceptual_distillation() -> None:
    class Distance(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return toy_distance(a, b)

    model, z = tiny(), torch.randn(6, 1, 8, 8)
    pairs = {"z": z, "x": torch.randn(6, 1, 8, 8), "y": torch.arange(6) % 3}
    losses = {}
    for kind in ("lpips", "lpips+l2", "l2"):
        objective = Reflow(model, perceptual=Distance(), pairs=pairs, t_schedule="t0", loss=kind)
        (batch,) = objective.experience(BATCH, Step(2))
        losses[kind] = objective.loss("main", batch, Step(2))[0]
    assert_close(losses["lpips+l2"], losses["lpips"] + losses["l2"], 1e-5, "sum")
    with pytest.raises(VgmError, match="t_schedule=t0"):
        Reflow(model, perceptual=Distance(), pairs=pairs, loss="lpips")
    with pytest.raises(VgmError, match="perceptual"):
        Reflow(model, pairs=pairs, t_schedule="t0", loss="lpips")
    with pytest.raises(VgmError, match="teacher or its pairs"):
        Reflow(model)
    with pytest.raises(VgmError, match="not a schedule"):
        Reflow(model, pairs=pairs, t_schedule=0)


def write_folder(folder: Path, n: int, labels: bool = False) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(n)
    z0, z1 = (rng.standard_normal((n, 1, 8, 8)).astype(np.float32) for _ in range(2))
    np.save(folder / "z0.npy", z0)
    np.save(folder / "z1.npy", z1)
    if labels:
        np.save(folder / "y.npy", np.arange(n))
    return z0, z1


def test_pairs_stored_by_the_official_code(tmp_path: Path) -> None:
    first, second = write_folder(tmp_path / "pairs" / "0", 5), write_folder(tmp_path / "pairs" / "1", 3)
    pairs = read_pairs(tmp_path / "pairs")
    assert len(pairs) == 8
    z0, z1, cond = pairs.take(torch.tensor([7, 0, 4, 5]))
    assert cond == {}
    for k, got in enumerate((z0, z1)):
        want = np.stack([second[k][2], first[k][0], first[k][4], second[k][0]])
        assert np.array_equal(got.numpy(), want)
    objective = Reflow(tiny(), pair_folder=str(tmp_path / "pairs"))
    (batch,) = objective.experience(BATCH, Step(0))
    assert batch["x"].shape == batch["z0"].shape == (6, 1, 8, 8)
    with pytest.raises(VgmError, match="the data"):
        objective.experience({"x": torch.zeros(2, 1, 4, 4)}, Step(0))
    write_folder(tmp_path / "labelled" / "7", 4, labels=True)
    assert read_pairs(tmp_path / "labelled").take(torch.tensor([3, 1]))[2]["y"].tolist() == [3, 1]
    with pytest.raises(VgmError, match="holds no pairs"):
        read_pairs(tmp_path / "empty")
    np.save(tmp_path / "labelled" / "7" / "z0.npy", np.zeros((2, 1, 8, 8), np.float32))
    with pytest.raises(VgmError, match="belong together"):
        read_pairs(tmp_path / "labelled")
    (tmp_path / "labelled" / "7" / "z0.npy").write_bytes(b"cut")
    with pytest.raises(VgmError, match="cannot be read"):
        read_pairs(tmp_path / "labelled")


def test_reflow_makes_a_flow_straight() -> None:
    """A curved flow of a small network; after training on its pairs the student's is straighter and ends alike."""

    class Curved(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            phase = (t / 999).view(-1, 1, 1, 1).to(x)
            return x * torch.cos(6 * phase) * 2 + 3 * torch.sin(9 * phase)

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            flat = torch.stack([x.flatten(), (t / 999).to(x)], dim=1)
            return self.net(flat).view_as(x)

    torch.manual_seed(0)
    teacher, student = Curved(), Student()
    objective = Reflow(student, teacher=teacher, teacher_steps=50)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    for index in range(400):
        (batch,) = objective.experience({"x": torch.zeros(256, 1, 1, 1)}, Step(index))
        optimizer.zero_grad()
        objective.loss("main", batch, Step(index))[0].backward()
        optimizer.step()
    noise = torch.randn(256, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    views = [Denoiser.from_config(m, objective.view()) for m in (teacher, student)]
    before, after = (straightness(v, noise).mean().item() for v in views)
    assert after < 0.05 * before
    sampler = RectifiedFlowSampler(method="euler", steps=50)
    ends = [sampler(v, Drawn(iter([noise]), noise)) for v in views]
    assert (ends[0] - ends[1]).abs().mean() < 0.1 * ends[0].std()
    one = RectifiedFlowSampler(method="euler", steps=1)(views[1], Drawn(iter([noise]), noise))
    assert (one - ends[1]).abs().mean() < 0.1 * ends[1].std()


ANY_MODEL = [
    {
        "name": "dit",
        "input_size": 8,
        "in_channels": 1,
        "hidden_size": 48,
        "depth": 1,
        "num_heads": 4,
        "learn_sigma": False,
    },
    {"name": "sit", "input_size": 8, "in_channels": 1, "hidden_size": 48, "depth": 1, "num_heads": 4},
    {
        "name": "adm-unet",
        "image_size": 8,
        "in_channels": 1,
        "model_channels": 32,
        "num_res_blocks": 1,
        "null_class": True,
    }
    | {"channel_mult": [1, 1], "attention_resolutions": [2], "learn_sigma": False},
]


@pytest.mark.parametrize("node", ANY_MODEL, ids=lambda n: n["name"])
def test_any_network_of_the_host_learns_a_rectified_flow(node: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = registry().build("model", {**node, "num_classes": 3})
    objective = registry().build("objective", {"name": "rectified-flow"}, model=model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for index in range(30):
        loss, _ = objective.loss(
            "main", {"x": torch.ones(16, 1, 8, 8), "cond": {"y": torch.arange(16) % 3}}, Step(index)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    view = Denoiser.from_config(model.eval(), objective.view())
    request = Request(shape=(1, 8, 8), generators=generators([0]), cond={"y": torch.tensor([1])}, guidance_scale=1.5)
    with torch.no_grad():
        x = RectifiedFlowSampler(method="euler", steps=2)(view, request)
    assert x.shape == (1, 1, 8, 8) and request.info["nfe"] == 4


# -- samplers --------------------------------------------------------------------------------------------------------


def gaussian_velocity(mean: float, std: float, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact velocity E[x1 - z0 | z_t] for data N(mean, std^2) and noise of deviation `scale`."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        s = t.view(-1, *[1] * (x.ndim - 1)).to(x)
        total = (s * std) ** 2 + ((1 - s) * scale) ** 2
        gain = (s * std**2 - (1 - s) * scale**2) / total
        return mean + gain * (x - s * mean)

    return velocity


@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_the_exact_sde_keeps_the_marginals_and_the_official_one_does_not(scale: float) -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(20000, 1, generator=g) * scale
    spread = {}
    for sde in ("exact", "official"):
        x = euler(
            gaussian_velocity(0.3, 0.5, scale),
            z,
            200,
            sigma_var=2.0,
            sde=sde,
            noise_scale=scale,
            noise=lambda: torch.randn(20000, 1, generator=g),
        )
        spread[sde] = (float(x.mean()), float(x.std()))
    assert spread["exact"] == pytest.approx((0.3, 0.5), abs=0.02)
    assert abs(spread["official"][1] - 0.5) > 0.03
    with pytest.raises(VgmError, match="needs noise"):
        euler(toy_velocity, torch.zeros(1, 1), 2, sigma_var=1.0)


def test_inversion_finds_the_noise() -> None:
    view = Denoiser.from_config(Toy(), RectifiedFlow(Toy(), noise_scale=2.0).view())
    z = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    for data_range in ("centered", "unit"):
        sampler = RectifiedFlowSampler(data_range=data_range)
        x = sampler(view, Drawn(iter([z]), z))
        assert_close(sampler.invert(view, x), 2 * z, 1e-3, data_range)


def test_rk45_is_scipys() -> None:
    scipy = pytest.importorskip("scipy.integrate")
    z = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def field(t: float, y: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(y).view_as(z).float()
        return toy_velocity(x, torch.full((2,), t)).double().flatten().numpy()

    want = scipy.solve_ivp(field, (1e-3, 1), z.double().flatten().numpy(), rtol=1e-5, atol=1e-5, method="RK45")
    got, nfe = rk45(toy_velocity, z, joint=True)
    assert nfe == want.nfev
    assert_close(got, torch.from_numpy(want.y[:, -1]).view_as(z).float(), 1e-5, "state")


HOST_SAMPLERS = ["euler", "heun", "dopri5", "sde", "ddim", "dpm-solver", "unipc", "dpmpp-2m", "edm", "flow-euler", "pc"]


@pytest.mark.parametrize("name", HOST_SAMPLERS)
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_host_samplers_take_rectified_flows(name: str, scale: float) -> None:
    """Any of them brings noise to N(0.3, 0.5^2) through the exact network, told 999 t and never at t = 0."""
    velocity = gaussian_velocity(0.3, 0.5, scale)

    class Exact(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            assert bool((t >= 0.998).all()) and bool((t <= 999.01).all())
            return velocity(x, t / 999)

    view = Denoiser.from_config(Exact(), RectifiedFlow(Exact(), noise_scale=scale).view())
    request = Request(shape=(1, 16, 16), generators=generators(range(40)), steps=60)
    x = registry().build("sampler", {"name": name})(view, request)
    assert float(x.mean()) == pytest.approx(0.3, abs=0.05) and float(x.std()) == pytest.approx(0.5, abs=0.06)


def test_who_watches_sees_where_the_flow_goes() -> None:
    """On a straight flow every estimate of the data is its end."""
    z, data = torch.randn(2, 2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    watch = lambda i, x, x0: seen.append(x0)
    end, _ = rk45(lambda x, t: data - z, z, callback=watch)
    again = euler(lambda x, t: data - z, z, 4, callback=watch)
    assert len(seen) > 4
    for x0 in seen:
        torch.testing.assert_close(x0.float(), end, rtol=0, atol=2e-2)
    torch.testing.assert_close(again, end, rtol=0, atol=2e-2)


def test_other_paths_are_refused() -> None:
    view = Denoiser(Toy(), "cosine", "v")
    with pytest.raises(VgmError, match="rectified flows"):
        RectifiedFlowSampler()(view, Request(shape=(1, 4, 4), generators=generators([0])))


def test_straightness_of_known_flows() -> None:
    """Zero for constant velocities; the variance over time for a velocity that depends on time alone."""

    class Timed(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.ones_like(x) * (t / 999).view(-1, 1, 1, 1).to(x)

    class Constant(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.ones_like(x)

    view = RectifiedFlow(Timed()).view()
    noise = torch.randn(4, 1, 2, 2)
    assert straightness(Denoiser.from_config(Constant(), view), noise).abs().max() < 1e-6
    assert_close(straightness(Denoiser.from_config(Timed(), view), noise, 200), torch.full((4,), 1 / 12), 1e-2, "timed")


# -- recipes and the conformance suites ------------------------------------------------------------------------------

SHRUNK = ("model.nf=16", "model.ch_mult=[1,1]", "model.num_res_blocks=1")


class TestTraining(suites.ObjectiveSuite):
    recipe = "rectified-flow/mnist"
    overrides = SHRUNK


class TestEuler(suites.SamplerSuite):
    recipe = "rectified-flow/mnist"
    overrides = SHRUNK
    sampler = {"name": "rectified-flow", "method": "euler", "sigma_var": 0.5, "sde": "exact"}
    steps = 3


class TestRK45(suites.SamplerSuite):
    recipe = "rectified-flow/mnist"
    overrides = SHRUNK
    sampler = {"name": "rectified-flow", "ode_tol": 1e-3}


SHORT = ("train.steps=3", "train.batch_size=8", "train.preview_n=0", "train.precision=fp32", "train.save_every=3")


def test_from_the_command_line(tmp_path: Path, vgm: Any) -> None:
    """Train, sample with the official solvers, measure, reflow and distill, each from the run before."""
    run, straight, one = (tmp_path / name for name in ("run", "straight", "one"))
    code, _, err = vgm("train", "rectified-flow", *SHRUNK, *SHORT, "--out", run)
    assert code == 0, err
    for own in (["steps=2"], ["method=rk45", "ode_tol=1e-2"], ["steps=2", "sigma_var=0.3", "sde=exact"]):
        code, _, err = vgm("sample", run, *own, "-n", 4, "--out", tmp_path / "grid.png", "--overwrite")
        assert code == 0 and (tmp_path / "grid.png").stat().st_size > 0, err
    code, out, err = vgm("evaluate", run, "--metrics", "straightness:steps=5", "-n", 6)
    assert code == 0, err
    assert "straightness" in out
    common = [*SHORT, f"pairs.cache={tmp_path / 'cache'}", "pairs.count=8", "pairs.steps=2"]
    code, _, err = vgm(
        "distill", "rectified-flow", "--recipe", "mnist-reflow", "--teacher", run, *common, "--out", straight
    )
    assert code == 0, err
    assert list((tmp_path / "cache").glob("*/*.safetensors"))
    code, _, err = vgm("distill", "rectified-flow", "--teacher", straight, *common, "--out", one)
    assert code == 0, err
    code, _, err = vgm("sample", one, "-n", 4, "--out", tmp_path / "grid.png", "--overwrite")
    assert code == 0 and "1 NFE" in err, err
    code, _, err = vgm("train", "rectified-flow", "--recipe", "mnist-reflow", *SHORT, "--out", tmp_path / "no")
    assert code != 0 and "teacher" in err
