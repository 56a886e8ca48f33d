"""LightningDiT and VA-VAE against hustvl/LightningDiT@2725fed (golden cases), sizes, checkpoints, training."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from official_guidance import doubled
from safetensors.torch import save_file
from torch import Tensor, nn
from vgm_plugins.lightningdit.alignment import AlignedAutoencoder, cosine_loss, distance_matrix_loss
from vgm_plugins.lightningdit.checkpoints import CODEC, CONVERTER
from vgm_plugins.lightningdit.objective import VIEW, VelocityDirection, times_from, velocity_losses
from vgm_plugins.lightningdit.presets import PUBLISHED, TRANSFORMERS
from vgm_plugins.lightningdit.sampler import ShiftedODESampler, grid_of

from vgm_cli.api import Request, Step, generators
from vgm_cli.diffusion import solvers
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.engine.train.ema import EMA
from vgm_cli.errors import VgmError
from vgm_cli.nets.autoencoder_kl import AutoencoderKL
from vgm_cli.nets.discriminators import NLayerDiscriminator
from vgm_cli.nets.dit import SiT, swiglu_width
from vgm_cli.nets.first_stage import DiagonalGaussian, VQModel
from vgm_cli.nets.foundation import DigitFeatures, VisionFeatures
from vgm_cli.registry import registry
from vgm_cli.testing import suites
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, adam_floor, assert_close

golden = GoldenChecks("lightningdit")


def keywords(case: GoldenCase) -> dict[str, Any]:
    """Official keywords of the denoiser -> ours."""
    said = case.config["model"]
    case.ignore("model.use_checkpoint", why="it saves memory")
    return {"learn_sigma": False} | {k.removeprefix("use_"): said[k] for k in said if k != "use_checkpoint"}


def network(case: GoldenCase) -> SiT:
    """The case's network, its weights through the shipped converter, which reads the same keywords off them."""
    config = keywords(case)
    model = SiT(**config)
    model.load_state_dict(CONVERTER.to_ours(case.state))
    off = dict.fromkeys(("swiglu", "rope", "rmsnorm", "qknorm", "wo_shift"), False)
    wanted = {**off, **{k: v for k, v in config.items() if k != "class_dropout_prob"}}
    read = CONVERTER.config({k: v.float() for k, v in case.state.items()})
    if not (wanted["rope"] or wanted["qknorm"]):
        read["num_heads"] = wanted["num_heads"]  # nothing tells
    if config.get("class_dropout_prob") == 0:
        read["num_classes"] += 1  # of the two it is assumed that one row is for no class
    if wanted["swiglu"]:  # several ratios are rounded to one width
        assert swiglu_width(wanted["hidden_size"], read["mlp_ratio"]) == model.blocks[0].mlp.w3.in_features
        read["mlp_ratio"] = wanted["mlp_ratio"]
    assert read == wanted
    assert CONVERTER.recognise(case.state) == any(v for k, v in wanted.items() if k in off and k != "wo_shift")
    return model.eval()


def view_of(model: Any) -> Denoiser:
    return Denoiser.from_config(model, VIEW)


class Drawn(Request):
    """A request whose standard normal draw is given."""

    def __init__(self, z: Tensor, **keywords: Any):
        super().__init__(tuple(z.shape[1:]), generators(range(len(z))), **keywords)
        self.z = z

    def randn(self, shape: tuple[int, ...] | None = None) -> Tensor:
        return self.z


def toy(x: Tensor, t: Tensor, **_: Any) -> Tensor:
    """The velocity that the notes of the toy cases state."""
    t = t.to(x).view(-1, *[1] * (x.ndim - 1))
    return 0.8 * torch.tanh(x) - 0.5 * x * t + 0.1 * torch.sin(3 * t)


# -- golden cases: the denoiser --------------------------------------------------------------------------------------


@golden.check(lambda c: "out/block0" in c)
def forward(case: GoldenCase) -> None:
    case.ignore("model.class_dropout_prob", why="nothing is dropped: eval mode, and the labels are given")
    model, given = network(case), case.inputs
    with torch.no_grad():
        x, c = model.embed(given["x"], given["t"], given["y"])
        assert_close(
            model.blocks[0](x, c, model.feat_rope and model.feat_rope()), case.outputs["block0"], 1e-5, "block0"
        )
        assert_close(model(given["x"], given["t"], given["y"]), case.outputs["out"], 1e-5, "out")
    built = model.state_dict()
    fresh = SiT(**keywords(case))
    for name in ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"):
        if name in built:
            assert_close(fresh.state_dict()[name], built[name], 1e-6, f"the constructor's own {name}")


@golden.check(lambda c: "ts" in c.config)
def guidance_from_a_time_on(case: GoldenCase) -> None:
    case.ignore("model.class_dropout_prob", why="nothing is dropped: eval mode, and the labels are given")
    model, x, y = network(case), case.inputs["x"], case.inputs["y"]
    for t in case.config["ts"]:
        for name, start in (("interval", case.config["start"]), ("nointerval", 0.0)):
            sampler = ShiftedODESampler(cfg_channels=3, cfg_start=start)
            request = Request(tuple(x.shape[1:]), generators(range(len(x))), cond={"y": y})
            request.guidance_scale = case.config["cfg_scale"]
            guided = sampler.guided(view_of(model), request)
            with torch.no_grad():
                got = guided.raw(x, torch.full((len(x),), 1 - t, dtype=torch.float64), y=y)
                if name == "nointerval":  # the official doubled batch has another half, which samplers leave out
                    whole = doubled(model, y, case.config["cfg_scale"])(torch.cat([x, x]), torch.full((2 * len(x),), t))
                    assert_close(whole, case.outputs[f"{name}_t{t}"], 1e-5, f"both halves at {t}")
            assert_close(got, case.outputs[f"{name}_t{t}"][: len(x)], 1e-5, f"{name} at {t}")


@golden.check(lambda c: "out/samples" in c)
def guided_sampling(case: GoldenCase) -> None:
    case.ignore("model.class_dropout_prob", why="nothing is dropped: eval mode, and the labels are given")
    said, z = case.config, case.inputs["z"]
    sampler = ShiftedODESampler(steps=said["num_steps"], shift=said["shift"], cfg_channels=3, cfg_start=said["start"])
    request = Drawn(z, cond={"y": case.inputs["y"]}, guidance_scale=said["cfg_scale"])
    with torch.no_grad():
        samples = sampler(view_of(network(case)), request)
    assert_close(samples, case.outputs["samples"], 1e-4, "samples")
    times = grid_of(said["num_steps"], said["shift"])[:-1]
    assert request.info["nfe"] == int((1 + (times >= said["start"]).long() * (said["cfg_scale"] > 1)).sum())
    codec = normalising(z.shape[1], case.inputs["latent_mean"], case.inputs["latent_std"], said["mult"])
    assert_close(codec.unscale(samples), case.outputs["denormalised"], 1e-4, "what is decoded")


def normalising(channels: int, mean: Tensor, std: Tensor, multiplier: float) -> AutoencoderKL:
    """A codec that normalises its latents by these statistics."""
    kinds: dict[str, Any] = {"z_channels": channels, "embed_dim": channels, "latent_stats": True}
    codec = AutoencoderKL(ch=8, ch_mult=(1,), num_res_blocks=1, norm_groups=8, scale_factor=multiplier, **kinds)
    codec.latent_mean.copy_(mean.flatten())
    codec.latent_std.copy_(std.flatten())
    return codec


@golden.check(lambda c: "out/trajectory" in c)
def integrators(case: GoldenCase) -> None:
    said, init = dict(case.config), case.inputs["init"]
    grid = grid_of(said["num_steps"], said["shift"])
    want = case.outputs["trajectory"]
    if said["method"] == "dopri5":
        states = [init, *(solvers.dopri5(toy, init, 0.0, float(t), rtol=1e-3, atol=1e-6) for t in grid[1:])]
        assert_close(torch.stack(states), want, 1e-3, "states on the grid")
    else:
        asked: list[float] = []
        states = []
        request = Drawn(init, callback=lambda i, total, x, x0: states.append(x))

        def spied(x: Tensor, t: Tensor, **_: Any) -> Tensor:
            asked.append(float(t[0]))
            return toy(x, t)

        x = ShiftedODESampler(steps=said["num_steps"], shift=said["shift"], method=said["method"])(
            view_of(spied), request
        )
        assert_close(torch.stack([*states, x]), want, 1e-5, "states on the grid")
        assert_close(torch.tensor(asked), case.outputs["t_evaluated"], 1e-6, "times")
    x = ShiftedODESampler(steps=said["num_steps"], shift=said["shift"], method=said["method"])(
        view_of(toy), Drawn(init)
    )
    assert_close(x, want[-1], 1e-3 if said["method"] == "dopri5" else 1e-5, "the sampler's end")


@golden.check(lambda c: not c.state and "out/pred" in c)
def toy_losses(case: GoldenCase) -> None:
    said, given = case.config, case.inputs
    mean = said.get("mu", 0.0) if said.get("shift", False) else 0.0
    t = times_from(given["z"], mean) if said["lognorm"] else given["u"]
    assert_close(t, case.outputs["t"], 1e-6, "t")
    outputs: list[Tensor] = []

    def spied(x: Tensor, t: Tensor) -> Tensor:
        outputs.append(toy(x, t))
        return outputs[-1]

    squared, turned = velocity_losses(spied, given["x1"], given["x0"], t)
    assert_close(outputs[0], case.outputs["pred"], 1e-5, "pred")
    assert_close(squared, case.outputs["loss"], 1e-5, "loss")
    assert said["cosine"] == ("cos_loss" in case.outputs)
    if said["cosine"]:
        assert_close(turned, case.outputs["cos_loss"], 1e-5, "cos_loss")


@golden.check(lambda c: "gradkeys" in c.config)
def loss_and_gradients(case: GoldenCase) -> None:
    case.ignore("model.class_dropout_prob", why="nothing is dropped: eval mode, and the labels are given")
    model, given, said = network(case), case.inputs, case.config
    t = times_from(given["z"]) if said["lognorm"] else given["u"]
    assert_close(t, case.outputs["t"], 1e-6, "t")
    squared, turned = velocity_losses(lambda x, s: model(x, s, given["y"]), given["x1"], given["x0"], t)
    assert_close(squared, case.outputs["loss"], 1e-5, "loss")
    total = squared.mean()
    if said["cosine"]:
        assert_close(turned, case.outputs["cos_loss"], 1e-5, "cos_loss")
        total = total + turned.mean()
    assert_close(total, case.outputs["total"], 1e-5, "total")
    total.backward()
    gradients = {k: p.grad for k, p in model.named_parameters()}
    for name in said["gradkeys"]:
        assert_close(gradients[name], case.outputs[f"grad.{name}"], 1e-4, name)


@golden.check(lambda c: c.kind == "lightningdit_train_steps")
def train_steps(case: GoldenCase) -> None:
    model, given, run = network(case).train(), case.inputs, case.config["run"]
    assert given["y"].shape == (run["steps"], run["batch"])
    codec = normalising(model.in_channels, given["mean"], given["std"], run["latent_multiplier"])
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], run["lr"], (0.9, run["beta2"]), weight_decay=0.0
    )
    average = EMA(model, {"decay": run["ema_decay"]})
    flips, drops = given["flip_u"] > 0.5, given["drop_u"] < case.config["model"]["class_dropout_prob"]
    for i in range(run["steps"]):
        x = codec.scale(torch.where(flips[i].view(-1, 1, 1, 1), given["latents"][i], given["latents_flip"][i]))
        if f"out/step{i}.x" in case:
            assert_close(x, case.outputs[f"step{i}.x"], 1e-5, "x")
        y = torch.where(drops[i], model.num_classes, given["y"][i])
        t = times_from(given["z"][i]) if run.get("lognorm", True) else given["u"][i]
        squared, turned = velocity_losses(lambda z, t, y=y: model(z, t, y), x, given["x0"][i], t)
        loss = squared.mean() + (turned.mean() if run["cosine"] else 0.0)
        assert_close(squared.mean(), case.outputs[f"step{i}.mse"], 1e-4, f"mse {i}")
        assert_close(loss, case.outputs[f"step{i}.loss"], 1e-4, f"loss {i}")
        optimizer.zero_grad()
        loss.backward()
        assert (run["max_grad_norm"] is not None) == (f"out/step{i}.grad_norm" in case)
        if run["max_grad_norm"] is not None:
            norm = nn.utils.clip_grad_norm_(model.parameters(), run["max_grad_norm"])
            assert_close(norm, case.outputs[f"step{i}.grad_norm"], 1e-4, f"gradient norm {i}")
        optimizer.step()
        average.update()
    for prefix, state in (("final.", model.state_dict()), ("ema.", average.state_dict())):
        for name in (k for k in case.outputs if k.startswith(prefix)):
            own = state[name.removeprefix(prefix)]
            assert_close(own, case.outputs[name], 1e-4, name, adam_floor(run["lr"], run["steps"]))


# -- golden cases: the tokenizer -------------------------------------------------------------------------------------


@golden.check(lambda c: c.kind == "vavae_foundation_features")
def foundation_features(case: GoldenCase) -> None:
    said = case.config
    case.ignore("init_values", why="the stored scales of the branches have it")
    case.ignore("timm", why="it says in words how the network was built")
    assert said["img_size"] // said["patch_size"] == round((case.state["pos_embed"].shape[1] - 1) ** 0.5)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vit.safetensors"
        save_file({k: v.contiguous() for k, v in case.state.items()}, file)
        size = {"dinov2": 224, "mae": None}[said["type"]]
        features = VisionFeatures(str(file), size=size, heads=said["num_heads"])
    net = features.vit
    assert (net.side, net.dim, len(net.blocks)) == (said["patch_size"], said["embed_dim"], said["depth"])
    assert net.blocks[0].fc1.out_features == said["mlp_ratio"] * said["embed_dim"]
    assert_close(features(case.inputs["x"].float()), case.outputs["features"], 1e-4, "features")


@golden.check(lambda c: "vae" in c.config)
def autoencoder(case: GoldenCase) -> None:
    said = case.config["vae"]
    read = {**CODEC.config(case.state), "resolution": said["resolution"], "attn_resolutions": tuple(said["attn"])}
    wanted = {
        "ch": said["ch"],
        "ch_mult": tuple(said["ch_mult"]),
        "z_channels": said["z"],
        "num_res_blocks": said["nrb"],
    }
    assert {k: read[k] for k in wanted} == wanted
    model = AutoencoderKL(**read).eval()
    model.load_state_dict(CODEC.to_ours(case.state))
    with torch.no_grad():
        posterior = DiagonalGaussian(model.encode(case.inputs["x"]))
        assert_close(posterior.mean, case.outputs["mean"], 1e-5, "mean")
        assert_close(posterior.logvar, case.outputs["logvar"], 1e-5, "logvar")
        assert_close(posterior.kl(), case.outputs["kl"], 1e-5, "kl")
        z = model.latents(model.encode(case.inputs["x"]), case.inputs["eps"])
        assert_close(z, case.outputs["z"], 1e-5, "z")
        decoded = model.decode(z)
    assert_close(decoded, case.outputs["decoded"], 1e-5, "decoded")
    pixels = (127.5 * decoded + 128).clamp(0, 255).permute(0, 2, 3, 1).floor()
    assert (pixels - case.outputs["uint8"].float()).abs().max() <= 1, "a rounding away from the border of two values"


class ToyStage(nn.Module):
    """The autoencoder that the notes of the loss's case state."""

    embed_dim, feature_dim, reverse_proj = 4, 6, True

    def __init__(self, enc: Tensor, dec: Tensor, projection: Tensor):
        super().__init__()
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.conv_out, self.decoder.conv_out = nn.Module(), nn.Module()
        self.encoder.conv_out.weight, self.decoder.conv_out.weight = nn.Parameter(enc), nn.Parameter(dec)
        self.projection = projection
        self.last_layer = self.decoder.conv_out.weight

    def latent_shape(self, image: tuple[int, ...]) -> tuple[int, ...]:
        return self.embed_dim, image[1] // 4, image[2] // 4

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        moments = F.conv2d(x, self.encoder.conv_out.weight, stride=4)
        z = DiagonalGaussian(moments).sample(noise)
        return F.conv_transpose2d(z, self.decoder.conv_out.weight, stride=4), moments

    def compared(self, z: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        return F.conv2d(z, self.projection), features


class Given(nn.Module):
    """A network whose output is given."""

    def __init__(self, output: Tensor):
        super().__init__()
        self.output = output

    def forward(self, *_: Tensor) -> Tensor:
        return self.output


class SquaredDistance(nn.Module):
    """What stands for LPIPS in the loss's case."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean(dim=(1, 2, 3), keepdim=True)


UNLIKE_OURS = ("pp_style", "logvar_init", "pixelloss_weight", "disc_num_layers", "disc_in_channels", "use_actnorm",
               "disc_conditional")  # fmt: skip


@golden.check(lambda c: "out/term_distmat" in c)
def vision_foundation_loss(case: GoldenCase) -> None:
    said, given, state = case.config["loss"], case.inputs, case.state
    case.ignore("loss.pixelloss_weight", why="the official loss keeps it and does nothing with it")
    case.ignore("loss.logvar_init", "loss.disc_num_layers", "loss.disc_in_channels", why="the stored weights have them")
    assert not said.get("disc_conditional")
    mean = said.get("pp_style", False)  # losses of a value, not of an image; the KL divergence, too, without its half

    class GivenStep(Step):
        def randn(self, shape: Any, name: str) -> Tensor:
            return given["eps"]

    discriminator = NLayerDiscriminator(
        3, case.config["ndf"], case.config["disc_layers"], said.get("use_actnorm", False)
    ).eval()
    discriminator.load_state_dict({k.removeprefix("disc."): v for k, v in state.items() if k.startswith("disc.")})
    for index in case.config["steps"]:
        model = ToyStage(state["enc_w"].clone(), state["dec_w"].clone(), state["proj_w"])
        own = {"kl_weight": 1.0, "disc_weight": 1.0, "vf_weight": 100.0, "adaptive_vf": False}  # the official defaults
        own |= {"cos_margin": 0.0, "distmat_margin": 0.0} | {k: said[k] for k in said if k not in UNLIKE_OURS}
        values = given["eps"][0].numel() / 2 if mean else 1
        own["kl_weight"] *= given["x"][0].numel() / values if mean else 1
        objective = AlignedAutoencoder(
            model, Given(given["aux"]), discriminator, SquaredDistance(), reduction="mean" if mean else "sum",
            logvar=0.0 if mean else float(state["logvar"]), **own,
        )  # fmt: skip
        out = {k.partition(".")[2]: v for k, v in case.outputs.items() if k.startswith(f"s{index}.")}
        step = GivenStep(index)
        loss, logs = objective.loss("autoencoder", {"x": given["x"]}, step)
        assert_close(loss, out["total_loss"], 1e-5, "total")
        for name in ("rec_loss", "nll_loss", "vf_loss", "vf_weight"):
            assert_close(logs[name], out[name], 1e-5, name)
        assert_close(logs["kl_loss"] / values, out["kl_loss"], 1e-5, "kl_loss")
        recon, moments = model(given["x"], given["eps"])
        assert_close(recon, case.outputs["reconstruction"], 1e-5, "reconstruction")
        z = DiagonalGaussian(moments).sample(given["eps"])
        projected, features = model.compared(z, given["aux"])
        assert_close(projected, case.outputs["z_projected"], 1e-5, "projection")
        for fn, margin, name in (
            (distance_matrix_loss, own["distmat_margin"], "term_distmat"),
            (cosine_loss, own["cos_margin"], "term_marginal_cos"),
        ):
            assert_close(fn(projected, features, margin), case.outputs[name], 1e-5, name)
        started = index >= said["disc_start"] and said.get("disc_factor", 1.0) > 0
        assert started == bool(out["disc_factor"]) and ("g_loss" in logs) == started
        loss.backward()
        assert_close(model.encoder.conv_out.weight.grad, out["grad_enc"], 1e-4, "encoder")
        assert_close(model.decoder.conv_out.weight.grad, out["grad_dec"], 1e-4, "decoder")
        if started:
            assert_close(logs["g_loss"], out["g_loss"], 1e-5, "g_loss")
            assert_close(logs["d_weight"], out["d_weight"], 1e-4, "d_weight")
        adversarial, _ = objective.loss("discriminator", {"x": given["x"]}, step)
        assert_close(adversarial, out["disc_loss"], 1e-5, "discriminator")


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


# -- networks, presets, checkpoints ----------------------------------------------------------------------------------

COUNTS = {
    "LightningDiT-B/1": 130_556_192,
    "LightningDiT-B/2": 130_556_288,
    "LightningDiT-L/2": 458_153_056,
    "LightningDiT-XL/1": 675_256_736,
    "LightningDiT-XL/2": 675_256_832,
    "LightningDiT-1p0B/1": 1_029_401_120,
    "LightningDiT-1p0B/2": 1_029_401_216,
    "LightningDiT-1p6B/1": 1_631_767_120,
    "LightningDiT-1p6B/2": 1_631_767_216,
}
TRAINED = {"LightningDiT-B/1": 130_359_584, "LightningDiT-XL/1": 674_961_824}


@pytest.mark.parametrize("preset", COUNTS)
def test_presets_have_the_published_counts(preset: str) -> None:
    with torch.device("meta"):
        model = registry().build(
            "model", {"name": "lightningdit", "preset": preset, "in_channels": 32, "input_size": 16}
        )
    sizes = {p: p.numel() for p in model.parameters()}
    assert sum(sizes.values()) == COUNTS[preset]
    assert sum(n for p, n in sizes.items() if p.requires_grad) == TRAINED.get(preset, sum(
        n for p, n in sizes.items() if p is not model.pos_embed
    ))  # fmt: skip
    assert len(COUNTS) == len(PUBLISHED) == len(TRANSFORMERS) - 1


def test_the_codec_has_the_published_count() -> None:
    """Without the projection, which only training uses."""
    with torch.device("meta"):
        model = registry().build("codec", {"name": "va-vae", "preset": "f16d32"})
    assert sum(p.numel() for n, p in model.named_parameters() if not n.startswith("linear_proj")) == 69_836_067
    assert model.linear_proj.weight.shape == (1024, 32, 1, 1) and model.linear_proj.bias is None
    assert model.latent_shape((3, 256, 256)) == (32, 16, 16)


class TestNetwork(suites.ModelSuite):
    model = {
        "name": "lightningdit", "preset": "LightningDiT", "input_size": 8, "patch_size": 2, "in_channels": 2,
        "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 3, "qknorm": True, "wo_shift": True,
    }  # fmt: skip
    shape = (2, 8, 8)


def test_options_that_do_not_fit() -> None:
    with pytest.raises(VgmError, match="divides by 4"):
        SiT(8, 2, 2, 24, 1, 4, rope=True)
    from vgm_plugins.dit.checkpoints import CONVERTER as DIT

    for option in ("swiglu", "rope", "rmsnorm", "qknorm", "wo_shift"):
        with pytest.raises(VgmError, match=f"without {option}"):
            DIT.allows({option: True})
    state = TestNetwork().build().state_dict()
    assert not DIT.recognise(state) and CONVERTER.recognise(state)
    plain = SiT(8, 2, 2, 32, 1, 2).state_dict()
    assert DIT.recognise(plain) and not CONVERTER.recognise(plain)
    assert not CONVERTER.recognise({**state, "r_embedder.mlp.0.weight": state["pos_embed"]})


@torch.no_grad()
def test_rotations_see_differences_of_places_alone() -> None:
    """A score depends on where the key is from the query's place, along rows and along columns."""
    from vgm_cli.nets.dit import Rotations
    from vgm_cli.nn.embed import apply_rope

    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=g)
    table = Rotations(4, 16)()
    turned = [apply_rope(v.expand(1, 16, 1, 16), table)[0, :, 0] for v in (q, k)]
    scores = turned[0] @ turned[1].T  # (16, 16)
    torch.testing.assert_close(scores[0, 5], scores[5, 10])  # one row and one column on
    torch.testing.assert_close(scores[2, 1], scores[15, 14])
    assert not torch.isclose(scores[0, 1], scores[0, 4]), "a row is not a column"


def test_released_files_are_converted(vgm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As train.py saves the denoiser, and Lightning the tokenizer, whose statistics lie beside it."""
    monkeypatch.chdir(tmp_path)
    codec_config: dict[str, Any] = {"ch": 32, "ch_mult": (1, 1), "num_res_blocks": 1, "attn_resolutions": ()}
    codec = AutoencoderKL(**codec_config, z_channels=2, embed_dim=2, feature_dim=5)
    state = {k: v.clone() for k, v in codec.state_dict().items()}
    more = {"loss.logvar": torch.zeros(()), "foundation_model.model.cls_token": torch.zeros(1, 1, 5)}
    torch.save({"state_dict": {**state, **more}, "epoch": 3}, "vavae.pt")
    mean, std = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 3.0])
    torch.save({"mean": mean.view(1, 2, 1, 1), "std": std.view(1, 2, 1, 1)}, "latents_stats.pt")
    code, out, err = vgm("convert", "vavae.pt", "plain.safetensors", "--verify")
    assert code == 0 and "stats=latents_stats.pt" in err and "va-vae" in out, err
    code, _, err = vgm("convert", "vavae.pt", "vavae.safetensors", "stats=latents_stats.pt")
    assert code == 0 and "stats=" not in err, err
    code, _, err = vgm("convert", "plain.safetensors", "again.safetensors", "stats=latents_stats.pt")
    assert code == 0, err
    from vgm_cli.engine import checkpoint as ckpt

    for file in ("vavae.safetensors", "again.safetensors"):
        read = ckpt.read_codec(Path(file))
        z = torch.randn(3, 2, 4, 4)
        torch.testing.assert_close(read.scale(z), (z - mean.view(2, 1, 1)) / std.view(2, 1, 1))
        assert ckpt.read_header(Path(file)).component["kwargs"]["feature_dim"] == 5
    torch.save({"mean": mean[:1], "std": std[:1]}, "other.pt")
    for words, match in (
        (("vavae.pt", "x.safetensors", "stats=other.pt"), "of 2 channels"),
        (("vavae.pt", "x.safetensors", "stats=vavae.pt"), "no mean and std"),
        (("vavae.safetensors", "x.pt", "stats=latents_stats.pt"), "in a file of ours"),
    ):
        code, _, err = vgm("convert", *words)
        assert code == 2 and match in err and not Path(words[1]).exists(), err
    save_file({"latents": mean.view(1, 2, 1, 1) + std.view(1, 2, 1, 1) * torch.randn(400, 2, 2, 2)}, "s.safetensors")
    Path("shards").mkdir()
    Path("s.safetensors").rename("shards/latents_rank00_shard000.safetensors")
    assert vgm("convert", "vavae.pt", "measured.safetensors", "stats=shards")[0] == 0
    torch.testing.assert_close(ckpt.read_codec(Path("measured.safetensors")).latent_std, std, rtol=0.1, atol=0)

    keywords = {k: v for k, v in TestNetwork.model.items() if k not in ("name", "preset", "wo_shift")}
    model = SiT(**keywords, **TRANSFORMERS["LightningDiT"])
    suites.randomise(model)
    weights = model.state_dict()
    half = {f"module.{k}": v / 2 for k, v in weights.items()}
    torch.save(
        {"model": half, "ema": {f"module.{k}": v for k, v in weights.items()}, "opt": {}, "config": {}}, "net.pt"
    )
    code, _, err = vgm("convert", "net.pt", "net.safetensors", "codec=vavae.safetensors")
    assert code == 0, err
    got, metadata = ckpt.read_tensors(Path("net.safetensors"))
    assert got.keys() == weights.keys() and all(torch.equal(got[k], v) for k, v in weights.items())
    sampler = json.loads(metadata["vgm.recipe"])["sampler"]
    assert (sampler["shift"], sampler["cfg_channels"], sampler["cfg_start"]) == (0.3, 3, 0.1)
    code, _, err = vgm("sample", "net.safetensors", "--steps", 3, "-n", 1, "--out", "x.npz")
    assert code == 0, err


# -- sampler ---------------------------------------------------------------------------------------------------------


def test_the_grid() -> None:
    assert grid_of(250).shape == (250,) and grid_of(3).tolist() == [0, 0.5, 1]
    shifted = grid_of(3, 0.3)
    assert shifted.tolist() == pytest.approx([0, 0.3 * 0.5 / (1 - 0.7 * 0.5), 1])
    with pytest.raises(VgmError, match="grid points"):
        grid_of(1)


def test_the_sampler_asks_for_straight_paths() -> None:
    view = Denoiser.from_config(toy, {"path": "cosine", "prediction": "velocity"})
    with pytest.raises(VgmError, match="straight paths"):
        ShiftedODESampler()(view, Drawn(torch.randn(2, 1, 4, 4)))


SMALL = (
    "model={name: lightningdit, preset: LightningDiT, patch_size: 7, hidden_size: 16, depth: 1, num_heads: 2}",
    "codec=null",
    "train.precision=fp32",
)


class TestSampling(suites.SamplerSuite):
    recipe = "lightningdit/mnist"
    overrides = SMALL
    steps = 4


# -- objectives ------------------------------------------------------------------------------------------------------


class TestTraining(suites.ObjectiveSuite):
    recipe = "lightningdit/mnist"
    overrides = SMALL


class TestTokenizer(suites.ObjectiveSuite):
    recipe = "lightningdit/mnist-vavae"
    test_resume_is_bit_exact = None  # of first stages, see LDM's tests
    overrides = (
        "model={name: va-vae, ch: 8, ch_mult: [1, 1, 1], num_res_blocks: 1, attn_type: none, norm_groups: 4, "
        "z_channels: 2, embed_dim: 2, feature_dim: 64}",
        "roles.discriminator={kind: model, name: patchgan, ndf: 4, n_layers: 1}",
        "objective.disc_start=1",
    )
    rtol = None  # its weights are ratios of gradients over the batch


def tiny_codec(**more: Any) -> AutoencoderKL:
    config: dict[str, Any] = {"ch": 8, "ch_mult": (1, 1, 1), "num_res_blocks": 1, "attn_type": "none", "norm_groups": 4}
    return AutoencoderKL(**{**config, "z_channels": 3, "embed_dim": 3, "in_channels": 1, "feature_dim": 64, **more})


def test_times_become_uniform() -> None:
    model = TestNetwork().build()
    objective = VelocityDirection(model, uniform_from=5)
    early, late = (objective.times(20_000, Step(i)) for i in (4, 5))
    assert early.std() < 0.22 and late.std() == pytest.approx(12**-0.5, abs=5e-3)
    assert torch.logit(early.double()).std() == pytest.approx(1, abs=2e-2)
    assert VelocityDirection(model, time_sampling="uniform").times(20_000, Step(0)).std() > 0.28


def test_the_direction_has_a_loss_of_its_own() -> None:
    """A velocity of the wrong length costs no cosine, one of the wrong direction up to 2."""
    data, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    for factor, want in ((3.0, 0.0), (-1.0, 2.0)):
        squared, turned = velocity_losses(lambda x, t, f=factor: f * (data - noise), data, noise, torch.rand(3))
        torch.testing.assert_close(turned, torch.full((3,), want), atol=1e-5, rtol=0)
        torch.testing.assert_close(squared, (factor - 1) ** 2 * (data - noise).square().flatten(1).mean(1))
    model = TestNetwork().build()
    batch = {"x": torch.randn(4, 2, 8, 8), "cond": {"y": torch.tensor([0, 1, 2, 0])}}
    losses = [VelocityDirection(model, cosine_weight=w).loss("main", batch, Step(0)) for w in (0.0, 2.0)]
    (plain, logs), (both, _) = losses
    torch.testing.assert_close(both, plain + 2 * logs["cosine"])
    torch.testing.assert_close(plain.detach(), logs["mse"])


def test_alignment_is_nothing_for_aligned_latents() -> None:
    """Features themselves and rotations of them have the same similarities; margins forgive what is near."""
    g = torch.Generator().manual_seed(0)
    features = torch.randn(2, 6, 3, 3, generator=g)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=g))[0]
    turned = torch.einsum("ij,bjhw->bihw", rotation, 5 * features)
    assert distance_matrix_loss(turned, features) < 1e-6 < cosine_loss(turned, features)
    assert cosine_loss(5 * features, features) < 1e-6
    other = torch.randn(2, 4, 3, 3, generator=g)
    assert 0 < distance_matrix_loss(other, features, 0.25) < distance_matrix_loss(other, features)
    assert cosine_loss(-features, features, 0.5) == pytest.approx(1.5)


@pytest.mark.parametrize("reverse", [True, False])
def test_latents_learn_the_features(reverse: bool) -> None:
    """Gradients of the alignment reach the encoder and the projection, in either direction."""
    torch.manual_seed(0)
    model = tiny_codec(reverse_proj=reverse)
    objective = AlignedAutoencoder(model, DigitFeatures(), adaptive_vf=False, vf_weight=1.0, cos_margin=0.0)
    x = torch.rand(4, 1, 28, 28) * 2 - 1
    z = model.latents(model.encode(x))
    loss, logs = objective.alignment(z, objective.foundation(x))
    assert {"vf_distance", "vf_cosine", "vf_loss"} == logs.keys()
    loss.backward()
    assert model.linear_proj.weight.grad.abs().sum() > 0 and model.encoder.conv_in.weight.grad.abs().sum() > 0
    assert (model.linear_proj.bias is None) == reverse
    with pytest.raises(VgmError, match="latents are 7x7") as refused:
        objective.alignment(z, torch.zeros(4, 64, 4, 4))
    assert refused.value.hint == f"data.size={4 * model.factor} fits it"
    objective.foundation = VisionFeatures(size=None, width=64, depth=4, patch=2, grid=4)
    with pytest.raises(VgmError, match="latents are 7x7") as refused:
        objective.alignment(z, objective.foundation.vit.grid_features(torch.zeros(4, 3, 8, 8)))
    assert refused.value.hint == "roles.foundation.size=14"
    if reverse:
        with pytest.raises(VgmError, match="64 of 10 channels"):
            objective.alignment(z, torch.zeros(4, 10, 7, 7))
    for other in (tiny_codec(feature_dim=0), VQModel(n_embed=4, ch=8, ch_mult=(1,), num_res_blocks=1, norm_groups=4)):
        with pytest.raises(VgmError, match="no projection"):
            AlignedAutoencoder(other, DigitFeatures())


@torch.no_grad()
def test_foundation_features(tmp_path: Path) -> None:
    """A grid at the place of its patches, in evaluation mode whatever the trainer says; weights are asked for."""
    features = DigitFeatures().train()
    assert not any(m.training for m in features.modules())
    x = torch.rand(2, 3, 40, 40) * 2 - 1
    assert features(x).shape == (2, 64, 7, 7)
    empty = VisionFeatures(width=64, depth=1, patch=8, grid=4, size=32)
    with pytest.raises(VgmError, match="no weights") as caught:
        empty(x)
    assert caught.value.code == 4
    with pytest.raises(VgmError, match="no such file"):
        VisionFeatures(str(tmp_path / "missing.pth"))
    empty.loaded, bright = True, x.clone()
    bright[..., 20:, :20] = 1.0  # the lower left quarter
    change = (empty(bright) - empty(x)).abs().amax(1)[0]
    assert change.shape == (4, 4) and change[2:, :2].min() > change[:2, 2:].max()
    with pytest.raises(VgmError, match="no multiple"):
        VisionFeatures.forward(set_size(empty, 30), x)
    assert VisionFeatures.forward(set_size(empty, None), x[..., :24]).shape == (2, 64, 5, 3)


def set_size(features: VisionFeatures, size: int | None) -> VisionFeatures:
    features.size = size
    return features


def test_from_the_command_line(vgm, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer with alignment, a denoiser of its latents, cached with their mirror images, and samples."""
    monkeypatch.chdir(tmp_path)
    few = (f"data.path={tiny_dataset}", "train.steps=3", "train.batch_size=8", "train.preview_n=0", "train.log_every=1")
    code, _, err = vgm("train", "lightningdit", "--recipe", "mnist-vavae", *TestTokenizer.overrides[:1], *few,
                       "model.latent_stats=true", "--out", "tokenizer")  # fmt: skip
    assert code == 0, err
    record = json.loads(Path("tokenizer/metrics.jsonl").read_text().splitlines()[-1])
    assert {"vf_loss", "vf_distance", "vf_cosine", "vf_weight", "nll_loss", "kl_loss"} <= record.keys()
    assert not Path("tokenizer/checkpoints/last/foundation.safetensors").exists(), "what is frozen is not saved"
    small = "model={name: lightningdit, preset: LightningDiT, patch_size: 7, hidden_size: 16, depth: 1, num_heads: 2}"
    cached = ("data.hflip=true", "data.cache_latents=cache")
    code, _, err = vgm("train", "lightningdit", "--codec", "tokenizer", small, *few, *cached, "--out", "run")
    assert code == 0, err
    record = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert record["loss"] == pytest.approx(record["mse"] + record["cosine"], rel=1e-4)
    assert json.loads(Path("cache/latents.json").read_text())["mirrored"]
    code, _, err = vgm("sample", "run", "-n", 2, "--steps", 3, "--out", "x.npz", "cfg_channels=1", "shift=0.3")
    assert code == 0, err
    start = ("--codec", "tokenizer", small, *few, "model.weights=run", "model.rope=false")
    code, _, err = vgm("train", "lightningdit", *start, "--out", "other")
    assert code == 2 and "2 unexpected" in err and not Path("other/checkpoints").exists()
    code, _, err = vgm("train", "lightningdit", *start, "model.partial=true", "--out", "other")
    assert code == 0 and "2 are left out: feat_rope.freqs_cos, feat_rope.freqs_sin" in err, err


@pytest.mark.slow
def test_it_learns_digits(vgm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe, shortened: the loss falls, and digits come nearer to real ones."""
    monkeypatch.chdir(tmp_path)
    few = ("train.steps=160", "train.log_every=10", "train.preview_n=0", "train.save_every=20",
           "optimizer.warmup=10", "train.ema=[{decay: 0.95, warmup: 1}]")  # fmt: skip
    assert vgm("train", "lightningdit", *few, "--out", "run")[0] == 0
    found = []
    for name in ("run/checkpoints/step-00000020", "run"):
        code, out, err = vgm("evaluate", name, "--reference", "mnist5k", "--metrics", "fid", "-n", 300, "--json")
        assert code == 0, err
        found.append(json.loads(out)["metrics"]["fid"]["value"])
    assert found[1] < 0.8 * found[0], found
