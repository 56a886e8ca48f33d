"""DiT against facebookresearch/DiT@ed81ce2 (golden cases), published sizes, and both checkpoint layouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from official_guidance import doubled
from torch import Tensor
from vgm_plugins.dit.checkpoints import CONVERTER, DIFFUSERS, DIFFUSERS_512, diffusers_to_ours
from vgm_plugins.dit.presets import PRESETS

from vgm_cli.api import Request, Step, generators
from vgm_cli.conditioning import ClassLabel, Conditions, Part
from vgm_cli.convert_api import unwrap
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.discrete import DiscreteDiffusion, named_betas, space_timesteps
from vgm_cli.diffusion.guidance import Guidance
from vgm_cli.diffusion.iddpm import IDDPM, DDPMSampler
from vgm_cli.diffusion.iddpm_manifest import components
from vgm_cli.errors import VgmError
from vgm_cli.nets.dit import DiT, SiT
from vgm_cli.nets.dit_checkpoints import names
from vgm_cli.registry import load_target, registry
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, adam_floor, assert_close

golden = GoldenChecks("dit")

ROUNDED = 3e-5  # the stored time embeddings are 1.7e-6 away from their float64 values, which adaLN amplifies to 1.3e-5

OPTIONS = {
    "timestep_respacing": "respacing",
    "noise_schedule": "schedule",
    "diffusion_steps": "steps",
}


def process(case: GoldenCase) -> DiscreteDiffusion:
    """create_diffusion's options -> ours."""
    made = DiscreteDiffusion.create(**{OPTIONS.get(k, k): v for k, v in case.config["diffusion"].items()})
    if case.config["diffusion"].get("diffusion_steps", 1000) == 1000:
        same = ("diffusion.rescale_learned_sigmas", "diffusion.rescale_timesteps")
        case.ignore(*same, why="both multiply by steps / 1000, which is 1 here")
    return made


def load(case: GoldenCase) -> DiT:
    """The case's network, its weights through the shipped converter."""
    case.ignore("model.class_dropout_prob", why="nothing is dropped: eval mode, and the labels are given")
    model = DiT(**case.config["model"])
    assert model.y_embedder.embedding_table.num_embeddings == len(case.state["y_embedder.embedding_table.weight"])
    model.load_state_dict(CONVERTER.to_ours(case.state))
    return model.eval()


def toy(diffusion: DiscreteDiffusion) -> Callable[[Tensor, Tensor], Tensor]:
    """The denoiser that the toy cases state in their notes."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        t = t.float().view(-1, *[1] * (x.ndim - 1))
        eps = 0.3 * torch.tanh(x) + 0.001 * t
        return torch.cat([eps, 0.5 * torch.cos(x) - 0.0004 * t], dim=1) if diffusion.learned else eps

    return model


class Drawn(Request):
    """A request whose standard normal draws are given."""

    def __init__(self, draws: Iterator[Tensor], n: int, **kwargs: Any):
        super().__init__(generators=generators(range(n)), **kwargs)
        self.draws = draws

    def randn(self, shape: tuple[int, ...] | None = None) -> Tensor:
        return next(self.draws)


# -- golden cases ----------------------------------------------------------------------------------------------------


@golden.check(lambda c: "in/x" in c and "out/out" in c and "cfg_scale" not in c.config)
def forward(case: GoldenCase) -> None:
    model, x, t, y = load(case), case.inputs["x"], case.inputs["t"], case.inputs["y"]
    with torch.no_grad():
        assert_close(model(x, t, y), case.outputs["out"], ROUNDED, "out")
        tokens = model.x_embedder(x) + model.pos_embed
        parts = {"t_emb": model.t_embedder(t), "y_emb": model.y_embedder(y), "tokens_in": tokens}
        parts["block0"] = model.blocks[0](tokens, parts["t_emb"] + parts["y_emb"])
    for name, got in parts.items():
        if name in case.outputs:
            assert_close(got, case.outputs[name], ROUNDED, name)
    built = DiT(**case.config["model"]).pos_embed
    assert_close(built, case.state["pos_embed"], 1e-6, "the constructor's own position table")


@golden.check(lambda c: "in/x" in c and "out/out" in c and "cfg_scale" in c.config)
def forward_with_cfg(case: GoldenCase) -> None:
    model, (y, null) = load(case), case.inputs["y"].chunk(2)
    assert bool((null == model.num_classes).all())
    with torch.no_grad():
        out = doubled(model, y, case.config["cfg_scale"])(case.inputs["x"], case.inputs["t"])
    assert_close(out, case.outputs["out"], ROUNDED, "out")


@golden.check(lambda c: "out/grad_norm_all" in c)
def loss_and_gradients(case: GoldenCase) -> None:
    model, diffusion = load(case), process(case)
    y, drop = case.inputs["y"], case.inputs.get("drop")
    terms = diffusion.losses(
        lambda x, t: model(x, t, y if drop is None else torch.where(drop.bool(), model.num_classes, y)),
        case.inputs["x0"],
        case.inputs["t"],
        case.inputs["noise"],
    )
    for name in ("loss", "mse", "vb"):
        if name in case.outputs:
            assert_close(terms[name], case.outputs[name], 1e-5, name)
    terms["loss"].mean().backward()
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    for name, want in case.outputs.items():
        if name.startswith("grad."):
            assert_close(gradients[name.removeprefix("grad.")], want, 1e-4, name)
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert_close(norm, case.outputs["grad_norm_all"], 1e-4, "gradient norm")


@golden.check(lambda c: "out/losses" in c)
def train_steps(case: GoldenCase) -> None:
    model, diffusion = load(case), process(case)
    average = {k: v.clone() for k, v in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=case.config["lr"],
        weight_decay=case.config.get("wd", 0.0),
    )
    losses = []
    for x0, t, y, noise in zip(*(case.inputs[k] for k in ("x0", "t", "y", "noise"))):
        loss = diffusion.losses(lambda x, s, y=y: model(x, s, y), x0, t, noise)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        for k, p in model.named_parameters():
            average[k] = case.config["ema"] * average[k] + (1 - case.config["ema"]) * p.detach()
    assert len(losses) == case.config["steps"]
    assert_close(torch.stack(losses), case.outputs["losses"], 1e-4, "losses")
    state = model.state_dict()
    for name, want in case.outputs.items():
        kind, _, key = name.partition(".")
        if kind in ("model", "ema"):
            floor = adam_floor(case.config["lr"], case.config["steps"])
            assert_close((state if kind == "model" else average)[key], want, 1e-4, name, floor)


@golden.check(lambda c: "out/samples" in c)
def guided_sampling(case: GoldenCase) -> None:
    """The official doubled batch, and the shipped sampler on its conditional half."""
    model, scale, steps = load(case), case.config["cfg_scale"], case.inputs["step_noise"]
    diffusion = process(case)
    z, y = case.inputs["z"], case.inputs["y"]
    draws = iter(steps)
    with torch.no_grad():
        *_, (x, _) = diffusion.sample_loop(doubled(model, y, scale), torch.cat([z, z]), lambda: next(draws))
    assert_close(x[: len(z)], case.outputs["samples"], 1e-4, "conditional half")
    if "samples_null_half" in case.outputs:
        assert_close(x[len(z) :], case.outputs["samples_null_half"], 1e-4, "null half")

    theirs = {"noise_schedule": "schedule", "diffusion_steps": "steps", "learn_sigma": "learn_sigma"}
    options = {ours: case.config["diffusion"][k] for k, ours in theirs.items() if k in case.config["diffusion"]}
    view = Denoiser.from_config(model, IDDPM(model, **options).view())
    request = Drawn(
        iter([z, *steps[:, : len(z)]]), len(z), shape=tuple(z.shape[1:]), cond={"y": y}, guidance_scale=scale
    )
    respacing = case.config["diffusion"]["timestep_respacing"]
    with torch.no_grad():
        samples = DDPMSampler(steps=respacing, cfg_channels=3)(view, request)
    assert_close(samples, case.outputs["samples"], 1e-4, "the shipped sampler")
    assert request.info["nfe"] == 2 * len(steps)


@golden.check(lambda c: not c.state and "in/x0" in c)
def toy_losses(case: GoldenCase) -> None:
    diffusion = process(case)
    x0, t, noise = (case.inputs[k] for k in ("x0", "t", "noise"))
    terms = diffusion.losses(toy(diffusion), x0, t, noise)
    assert set(terms) == set(case.outputs) - {"x_t"}
    for name, got in terms.items():
        assert_close(got, case.outputs[name], 1e-5, name)
    assert_close(diffusion.q_sample(x0, t, noise), case.outputs["x_t"], 1e-6, "x_t")


@golden.check(lambda c: "in/xT" in c)
def toy_sampling(case: GoldenCase) -> None:
    config, draws = case.config, iter(case.inputs["step_noise"])
    diffusion = process(case)
    assert diffusion.timestep_map == case.outputs["timestep_map"].tolist()
    steps = diffusion.sample_loop(
        toy(diffusion),
        case.inputs["xT"],
        lambda: next(draws),
        sampler={"p": "ddpm", "ddim": "ddim"}[config["loop"]],
        eta=config.get("eta", 0.0),
        clip_denoised=config["clip_denoised"],
    )
    x, x0 = zip(*steps)
    assert_close(torch.stack(x), case.outputs["trajectory"], 1e-4, "trajectory")
    assert_close(torch.stack(x0), case.outputs["pred_xstart"], 1e-4, "pred_xstart")


@golden.check(lambda c: "respacings" in c.config)
def schedule_tables(case: GoldenCase) -> None:
    schedule, steps = case.config["noise_schedule"], case.config["steps"]
    whole = DiscreteDiffusion.create(schedule, steps)
    tables = {**whole.tables, "betas": named_betas(schedule, steps)}
    for respacing in case.config["respacings"]:
        spaced = DiscreteDiffusion.create(schedule, steps, respacing)
        tables |= {f"map_{respacing}": np.array(spaced.timestep_map), f"betas_{respacing}": spaced.betas}
    for name, want in case.outputs.items():
        assert_close(torch.from_numpy(tables[name]), want, 0.0 if name.startswith("map_") else 1e-12, name)


@golden.check(lambda c: any(k.startswith("img_") for k in c.inputs))
def centre_crop(case: GoldenCase) -> None:
    from PIL import Image

    from vgm_cli.data.transforms import center_crop_arr

    for name, image in case.inputs.items():
        got = np.asarray(center_crop_arr(Image.fromarray(image.numpy()), case.config["size"]))
        assert np.array_equal(got, case.outputs[name.replace("img_", "crop_")].numpy()), name


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


# -- sizes -----------------------------------------------------------------------------------------------------------

SIZES = {  # total, trainable (without the frozen positions): official code, 256 pixels
    "DiT-S/2": (32_963_360, 32_865_056),
    "DiT-S/4": (32_945_024, 32_920_448),
    "DiT-S/8": (33_148_160, 33_142_016),
    "DiT-B/2": (130_512_416, 130_315_808),
    "DiT-B/4": (130_475_648, 130_426_496),
    "DiT-B/8": (130_881_536, 130_869_248),
    "DiT-L/2": (458_102_816, 457_840_672),
    "DiT-L/4": (458_053_760, 457_988_224),
    "DiT-L/8": (458_594_816, 458_578_432),
    "DiT-XL/2": (675_129_632, 674_834_720),
    "DiT-XL/4": (675_074_432, 675_000_704),
    "DiT-XL/8": (675_683_072, 675_664_640),
}


def count(model: torch.nn.Module) -> tuple[int, int]:
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", SIZES)
def test_preset_size(name: str) -> None:
    with torch.device("meta"):
        model = registry().build("model", {"name": "dit", "preset": name})
    assert count(model) == SIZES[name]
    assert sorted(names(len(model.blocks))) == sorted(model.state_dict())


def test_512_and_every_preset_is_counted() -> None:
    assert set(PRESETS) == set(SIZES)
    with torch.device("meta"):
        assert count(DiT(input_size=64)) == (676_014_368, 674_834_720)


# -- the network -----------------------------------------------------------------------------------------------------

TINY = {"input_size": 8, "hidden_size": 48, "depth": 2, "num_heads": 4, "num_classes": 7}


def filled(**kwargs: Any) -> DiT:
    """A tiny DiT whose zero-initialised layers are filled, so that everything has an effect."""
    torch.manual_seed(0)
    model = DiT(**{**TINY, **kwargs})
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def test_starts_as_the_zero_function() -> None:
    model = DiT(**TINY)
    assert model(torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 2])).abs().max() == 0


def test_no_label_is_the_null_condition() -> None:
    model, x, t, y = filled(), torch.randn(3, 4, 8, 8), torch.tensor([1, 20, 999]), torch.tensor([0, 3, 6])
    null = model(x, t, **model.null_condition({"y": y}))
    assert torch.equal(null, model(x, t))
    assert not torch.allclose(null, model(x, t, y))


def test_without_a_null_class_it_cannot_be_unconditional() -> None:
    model = filled(class_dropout_prob=0.0)
    assert model.y_embedder.embedding_table.num_embeddings == 7
    with pytest.raises(VgmError, match="null class"):
        model(torch.randn(1, 4, 8, 8), torch.zeros(1))
    with pytest.raises(VgmError, match="null class"):
        Conditions([Part("class", ClassLabel(7), "label", 0.1)], model).check()


def test_guidance_of_all_channels_differs_only_in_the_fourth() -> None:
    model, x, t = filled(), torch.randn(2, 4, 8, 8), torch.full((2,), 500)
    cond = {"y": torch.tensor([1, 2])}
    null = model.null_condition(cond)
    three, every = (Guidance(3.0, channels)(model, x, t, cond, null) for channels in (3, None))
    assert torch.equal(three[:, :3], every[:, :3]) and torch.equal(three[:, 4:], every[:, 4:])
    assert not torch.allclose(three[:, 3], every[:, 3])


def test_activation_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for on in (False, True):
        model = filled()
        model.checkpointing = on
        model(torch.ones(1, 4, 8, 8), torch.ones(1), torch.ones(1, dtype=torch.long)).square().sum().backward()
        gradients.append(model.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(*gradients)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(VgmError, match="does not divide"):
        DiT(input_size=9)
    with pytest.raises(VgmError, match="must divide"):
        DiT(hidden_size=100, num_heads=7)
    with pytest.raises(VgmError, match="built for"):
        DiT(**TINY)(torch.zeros(1, 4, 16, 16), torch.zeros(1))


def test_sit_returns_the_first_half() -> None:
    model = filled()
    sit = SiT(**TINY)
    sit.load_state_dict(model.state_dict())
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 5])
    assert torch.equal(sit(x, t, y), model(x, t, y)[:, :4])


# -- objective and sampler -------------------------------------------------------------------------------------------


def test_objective_draws() -> None:
    """The objective's loss is the process's, at the step's own draws."""
    model = filled()
    objective = IDDPM(model)
    batch = {"x": torch.randn(6, 4, 8, 8), "cond": {"y": torch.arange(6)}}
    step = Step(index=5, seed=1)
    loss, logs = objective.loss("main", batch, step)
    t, noise = step.randint(1000, 6, "t"), step.randn((6, 4, 8, 8), "noise")
    want = objective.process.losses(lambda x, s: model(x, s, **batch["cond"]), batch["x"], t, noise)
    torch.testing.assert_close(loss, want["loss"].mean())
    assert set(logs) == {"mse", "vb"}


@pytest.mark.parametrize("node", [{"name": "ddpm", "steps": 5}, {"name": "iddpm-ddim", "steps": 5, "eta": 0.5}])
def test_samples_do_not_depend_on_the_batch(node: dict[str, Any]) -> None:
    model = filled()
    view = Denoiser.from_config(model, IDDPM(model).view())
    sampler = load_target(next(c.target for c in components() if c.name == node["name"]))(
        **{k: v for k, v in node.items() if k != "name"}
    )
    y = torch.tensor([1, 4, 6])
    seen: list[int] = []

    def ask(rows: slice) -> Tensor:
        with torch.no_grad():
            return sampler(
                view,
                Request(
                    shape=(4, 8, 8),
                    generators=generators(range(3)[rows]),
                    cond={"y": y[rows]},
                    guidance_scale=2.0,
                    callback=lambda i, total, x, x0: seen.append(i),
                ),
            )

    whole = ask(slice(0, 3))
    assert seen == list(range(5)) and math.isfinite(whole.sum())
    torch.testing.assert_close(ask(slice(1, 2)), whole[1:2], rtol=1e-4, atol=1e-4)


# -- checkpoints -----------------------------------------------------------------------------------------------------


def test_official_training_checkpoint() -> None:
    """train.py's dict: the average is taken, names are ours, the configuration is read off the shapes."""
    model, other = filled(), filled(depth=3)
    file = {"model": other.state_dict(), "ema": model.state_dict(), "opt": {"state": {}}, "args": None}
    state = unwrap(file)
    assert CONVERTER.recognise(state) and not CONVERTER.recognise({"pos_embed": 0})
    config = CONVERTER.config(state)
    again = DiT(**{**config, "num_heads": 4})
    again.load_state_dict(CONVERTER.to_ours(state))
    assert {k: config[k] for k in TINY if k != "num_heads"} == {k: v for k, v in TINY.items() if k != "num_heads"}
    assert config["learn_sigma"] and config["patch_size"] == 2 and config["in_channels"] == 4
    assert len(CONVERTER.to_ours(unwrap(file, "model"))) == len(other.state_dict())
    back = CONVERTER.from_ours(again.state_dict())
    assert all(torch.equal(back[k], v) for k, v in model.state_dict().items()) and len(back) == len(state)
    with pytest.raises(KeyError):
        CONVERTER.to_ours({k: v for k, v in state.items() if k != "pos_embed"})
    with pytest.raises(VgmError, match="no 'teacher' weights"):
        unwrap(file, "teacher")


@pytest.mark.parametrize("name", ["DiT-S/2", "DiT-XL/4"])
def test_published_configuration_is_read_off_the_shapes(name: str) -> None:
    with torch.device("meta"):
        state = DiT(**PRESETS[name]).state_dict()
    config = CONVERTER.config(state)
    assert config == {
        **PRESETS[name], "input_size": 32, "in_channels": 4, "mlp_ratio": 4.0, "num_classes": 1000, "learn_sigma": True,
    }  # fmt: skip


def test_diffusers_layout_round_trip() -> None:
    model = filled(input_size=32)
    theirs = DIFFUSERS.from_ours(model.state_dict())
    assert DIFFUSERS.recognise(theirs) and not DIFFUSERS.recognise(model.state_dict())
    assert not CONVERTER.recognise(theirs)
    ours = DIFFUSERS.to_ours(theirs)
    assert set(ours) == set(model.state_dict())
    assert all(torch.equal(ours[k], v) for k, v in model.state_dict().items())
    assert DIFFUSERS.config(theirs)["input_size"] == 32
    assert DIFFUSERS_512.config(theirs)["input_size"] == 64


def test_diffusers_forward_parity() -> None:
    diffusers = pytest.importorskip("diffusers")
    model = filled(input_size=16, learn_sigma=True)
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2, sample_size=16,
        patch_size=2, num_embeds_ada_norm=7, norm_eps=1e-6,  # diffusers' default 1e-5 is not the official LayerNorm
    ).eval()  # fmt: skip
    theirs.load_state_dict(DIFFUSERS.from_ours(model.state_dict()))
    for block in theirs.transformer_blocks:  # diffusers spaces 128 frequencies over 127 intervals, the paper over 128
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    ours = DiT(**{**TINY, "input_size": 16})
    ours.load_state_dict(diffusers_to_ours(theirs.state_dict(), input_size=16))
    x, t, y = torch.randn(2, 4, 16, 16), torch.tensor([7, 950]), torch.tensor([3, 7])
    with torch.no_grad():
        want = theirs(x, timestep=t, class_labels=y).sample
        assert_close(model(x, t, y), want, 1e-5, "ours -> diffusers")
        assert_close(ours.eval()(x, t, y), want, 1e-5, "diffusers -> ours")


def test_respaced_timesteps_reach_the_network() -> None:
    told: list[int] = []
    diffusion = DiscreteDiffusion.create(respacing="5", learn_sigma=False)

    def model(x: Tensor, t: Tensor) -> Tensor:
        told.append(int(t[0]))
        return torch.zeros_like(x)

    list(diffusion.sample_loop(model, torch.randn(1, 1, 2, 2), lambda: torch.randn(1, 1, 2, 2)))
    assert told == space_timesteps(1000, 5)[::-1] == [999, 749, 500, 250, 0]


@pytest.mark.parametrize("options", [{}, {"schedule": "cosine", "steps": 4000, "rescale_timesteps": True}])
def test_the_host_reads_the_network_alike(options: dict[str, Any]) -> None:
    """The sampler finds the same process behind the host's Denoiser as behind the objective."""
    model = filled()
    objective = IDDPM(model, **options)
    process = DDPMSampler(steps="25").process(Denoiser.from_config(model, objective.view()))
    np.testing.assert_allclose(
        process.tables["alphas_cumprod"], objective.process.tables["alphas_cumprod"][process.timestep_map]
    )
    assert (process.mean, process.variance) == ("eps", "learned_range")
    last = torch.tensor([24])
    assert float(process.model_timesteps(last)) == float(
        objective.process.model_timesteps(last * 0 + process.timestep_map[24])
    )
