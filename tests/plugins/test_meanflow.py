"""MeanFlow against Gsunshine/meanflow@d70cb55, Gsunshine/py-meanflow@1f6d72d and zhuyu-cs/MeanFlow@04d183c."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from vgm_plugins.meanflow.augment import AugmentPipe
from vgm_plugins.meanflow.checkpoints import FLAX, TORCH, UNET, flax
from vgm_plugins.meanflow.losses import adaptive, average_velocity, guided_velocity, pairs_of_times, summed, target_of
from vgm_plugins.meanflow.model import MeanFlowDiT, MeanFlowUNet
from vgm_plugins.meanflow.objective import MeanFlow
from vgm_plugins.meanflow.presets import TRANSFORMERS
from vgm_plugins.meanflow.sampler import MeanFlowSampler

from vgm_cli.api import Request, Step, generators
from vgm_cli.diffusion.flow_map import FlowMap
from vgm_cli.diffusion.jvp import total_derivative
from vgm_cli.engine.train.ema import EMA
from vgm_cli.errors import VgmError
from vgm_cli.nets.dit import SiT
from vgm_cli.registry import registry
from vgm_cli.testing import suites
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, assert_close

golden = GoldenChecks("meanflow")
FLOW = {"path": "linear", "prediction": "velocity"}


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


WITHOUT_EFFECT = (
    "class_dropout_prob",
    "path_type",
    "use_cfg",
    "decoder_hidden_size",
    "z_dims",
    "projector_dim",
)
WITHOUT_EFFECT = (*WITHOUT_EFFECT, "fused_attn", "learn_sigma")  # of the networks, as they are published


def sizes(case: GoldenCase) -> dict[str, Any]:
    """The official keywords that ours has, too."""
    given = case.config["model"]
    assert not given.get("learn_sigma")
    case.ignore(
        *(f"model.{k}" for k in WITHOUT_EFFECT), why="labels are dropped outside, and the rest is of other works"
    )
    return {k.replace("qk_norm", "qknorm"): given[k] for k in given if k not in WITHOUT_EFFECT}


def torch_network(case: GoldenCase) -> MeanFlowDiT:
    model = MeanFlowDiT(**sizes(case))
    model.load_state_dict(TORCH.to_ours(case.state))
    return model.eval()


def flax_network(case: GoldenCase) -> MeanFlowDiT:
    """Through the layout of this size of images; the file's names are joined by dots, as the reader of msgpack does."""
    layout = flax("here", case.config["model"]["input_size"])
    state = {k.replace("/", "."): v for k, v in case.state.items()}
    assert FLAX.recognise(state) and not TORCH.recognise(state)
    model = MeanFlowDiT(**sizes(case))
    model.load_state_dict(layout.to_ours(state))
    again = layout.from_ours(model.state_dict())
    assert again.keys() == state.keys() and all(torch.equal(again[k], v) for k, v in state.items())
    return model.eval()


def by_formula(rank: int, name: str, shape: list[int]) -> Tensor:
    """The weights that the notes of the U-Net's cases state."""
    n = int(np.prod(shape))
    i = np.arange(n, dtype=np.uint64)
    h = (i * 2654435761 + (rank + 1) * 97531) & 0xFFFFFFFF
    h = ((h ^ (h >> np.uint64(15))) * np.uint64(2246822519)) & np.uint64(0xFFFFFFFF)
    h = ((h ^ (h >> np.uint64(13))) * np.uint64(3266489917)) & np.uint64(0xFFFFFFFF)
    h = h ^ (h >> np.uint64(16))
    r = (h.astype(np.float64) / 2**32 - 0.5) * 12**0.5
    if len(shape) >= 2:
        r = 0.8 * r / (n / shape[0]) ** 0.5
    else:
        r = 1 + 0.1 * r if name.endswith("weight") else 0.05 * r
    return torch.from_numpy(r.reshape(shape)).float()


OFFICIAL_UNET = {"channel_mult": [1, 2, 2, 2], "channel_mult_noise": 1, "resample_filter": [1, 1]}  # its other defaults
UNTRAINED = {"label_dim": 0, "label_dropout": 0, "embedding_type": "positional", "encoder_type": "standard"}
UNTRAINED |= {"decoder_type": "standard"}


def unet(case: GoldenCase) -> MeanFlowUNet:
    case.ignore("net.dropout", why="eval mode")
    config, keys = {**OFFICIAL_UNET, **case.config["net"]}, dict(case.config["keys"])
    assert {k: config[k] for k in UNTRAINED if config.pop(k, UNTRAINED[k]) != UNTRAINED[k]} == {}, (
        "left out, see the docs"
    )
    model = MeanFlowUNet(**config)
    state = model.state_dict()
    assert keys.keys() == {k for k in state if "resample_filter" not in k}
    state |= {k: by_formula(i, k, keys[k]) for i, k in enumerate(sorted(keys))}
    assert UNET.recognise(state)
    read = UNET.config(state)
    told = {k for k in config if k != "dropout" and not (k == "resample_filter" and len(config["channel_mult"]) == 1)}
    assert {k: config[k] for k in told if read[k] != config[k]} == {}  # one level has no filter
    model.load_state_dict(UNET.to_ours(state))
    return model.eval()


def flow_of(model: nn.Module, guided: bool = False) -> FlowMap:
    return FlowMap(model, FLOW, second_time="difference", guided=guided)


class Drawn(Request):
    """A request whose standard normal draw is given."""

    def __init__(self, z: Tensor, **keywords: Any):
        super().__init__(tuple(z.shape[1:]), generators(range(len(z))), **keywords)
        self.z = z

    def randn(self, shape: tuple[int, ...] | None = None) -> Tensor:
        return self.z


# -- golden cases ----------------------------------------------------------------------------------------------------


@golden.check(lambda c: "out/out" in c)
def forward(case: GoldenCase) -> None:
    given = case.inputs
    with torch.no_grad():
        if "in/h" in case:
            got = flax_network(case)(nchw(given["x"]), given["t"], given["y"].long(), s=given["h"])
            assert_close(got, nchw(case.outputs["out"]), 1e-5, "out")
        else:
            got = torch_network(case)(given["x"], given["t"], given["y"], s=given["t"] - given["r"])
            assert_close(got, case.outputs["out"], 1e-5, "out")


@golden.check(lambda c: "in/udrop" in c)
def official_loss(case: GoldenCase) -> None:
    """The value alone says nothing where norm_p is 1: the plain error and the gradients do."""
    model, said, given = flax_network(case), case.config["method"], case.inputs
    assert said["num_classes"] == model.num_classes
    guided = said["guidance_eq"] == "cfg"
    if not guided:
        keys = ("omega", "kappa", "t_start", "t_end")
        case.ignore(*(f"method.{k}" for k in keys), why="guidance_eq: nothing is guided")
    objective = MeanFlow(
        model,
        times=said["noise_dist"].replace("_", "-"),
        P_mean=said["P_mean"],
        P_std=said["P_std"],
        equal=said["data_proportion"],
        dropped=said["class_dropout_prob"],
        omega=said["omega"] if guided else 1.0,
        kappa=said["kappa"] if guided else 0.0,
        guidance_interval=(said["t_start"], said["t_end"]),
        norm_p=said["norm_p"],
        norm_eps=said["norm_eps"],
    )
    n = len(given["labels"])
    equal, dropped = objective.first(torch.arange(n), n, int((given["udrop"] < objective.dropped).sum()))
    t, r = objective.times(given["nt"].flatten(), given["nr"].flatten(), equal)
    cond = {"y": given["labels"].long()}
    u, target, _, v = objective.terms(nchw(given["x"]), nchw(given["e"]), t, r, r < t, cond, dropped)
    raw = summed(u - target)
    assert_close(raw.mean(), case.outputs["raw_loss_p0"], 1e-4, "raw")
    assert_close(summed(u - v), case.outputs["v_loss"], 1e-4, "v_loss")
    loss = adaptive(raw, objective.norm_p, objective.norm_eps).mean()
    assert_close(loss, case.outputs["loss"], 1e-4, "loss")
    loss.backward()
    layout = flax("here", case.config["model"]["input_size"])
    gradients = layout.from_ours({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    for name in case.config["gradkeys"]:
        assert_close(gradients[name.replace("/", ".")], case.outputs[f"grad.{name}"], 1e-4, name)


@golden.check(lambda c: "in/u_equal" in c)
def other_loss(case: GoldenCase) -> None:
    model, said, given = torch_network(case), case.config["loss"], case.inputs
    weighted = said["weighting"] == "adaptive"
    if not weighted:
        case.ignore("loss.adaptive_p", why="weighting: there is none")
    if said["time_sampler"] == "uniform":
        case.ignore("loss.time_mu", "loss.time_sigma", why="time_sampler: nothing is normal")
    if said["cfg_omega"] == 1 and said["cfg_kappa"] == 0:
        case.ignore("loss.cfg_min_t", "loss.cfg_max_t", why="nothing is guided")
    objective = MeanFlow(
        model,
        path=said["path_type"],
        times=said["time_sampler"].replace("_", "-"),
        P_mean=said["time_mu"],
        P_std=said["time_sigma"],
        equal=1 - said["ratio_r_not_equal_t"],
        rows="coin",
        dropped=said["label_dropout_prob"],
        omega=said["cfg_omega"],
        kappa=said["cfg_kappa"],
        guidance_interval=(said["cfg_min_t"], said["cfg_max_t"]),
        norm_p=said["adaptive_p"] if weighted else 0.0,
        norm_eps=1e-3,
        squared=weighted,
    )
    dropped = given["u_drop"] < objective.dropped
    t, r = objective.times(*given["time"].unbind(1), given["u_equal"] < objective.equal)
    assert_close(t, case.outputs["t"], 1e-6, "t")
    assert_close(r, case.outputs["r"], 1e-6, "r")
    u, target, _, _ = objective.terms(given["x"], given["noise"], t, r, r < t, {"y": given["y"]}, dropped)
    raw = summed(u - target)
    assert_close(raw, case.outputs["raw_loss_uniform"], 1e-4, "raw")
    assert_close((u - target).square().mean(), case.outputs["mse_mean"], 1e-4, "mse")
    losses = adaptive(raw, objective.norm_p, objective.norm_eps, objective.squared)
    assert_close(losses, case.outputs["loss"], 1e-4, "loss")
    losses.mean().backward()
    gradients = {k: p.grad for k, p in model.named_parameters()}
    for name in case.config["gradkeys"]:
        assert_close(gradients[name], case.outputs[f"grad.{name}"], 1e-4, name)


@golden.check(lambda c: "out/samples" in c)
def guided_samples(case: GoldenCase) -> None:
    flow, steps = flow_of(torch_network(case)), case.config["num_steps"]
    request = Drawn(
        case.inputs["z"], cond={"y": case.inputs["y"]}, steps=steps, guidance_scale=case.config["cfg_scale"]
    )
    with torch.no_grad():
        assert_close(MeanFlowSampler()(flow, request), case.outputs["samples"], 1e-4, "samples")
    assert request.info["nfe"] == steps * (1 if case.config["cfg_scale"] <= 1 else 2)


@golden.check(lambda c: "out/trajectory" in c)
def official_samples(case: GoldenCase) -> None:
    model, (*times, end), states = flax_network(case), case.config["timesteps"], []
    assert case.config["method"]["num_classes"] == model.num_classes and end == 0
    request = Drawn(nchw(case.inputs["z"]), cond={"y": case.inputs["labels"].long()})
    request.callback = lambda i, total, z, x0: states.append(z)
    with torch.no_grad():
        x = MeanFlowSampler(times=tuple(times))(flow_of(model, guided=True), request)
    assert_close(torch.stack([*states[1:], x]), case.outputs["trajectory"].permute(0, 1, 4, 2, 3), 1e-4, "trajectory")


@golden.check(lambda c: c.kind == "cifar_unet_forward_jvp")
def unet_and_its_derivative(case: GoldenCase) -> None:
    model, given = unet(case), case.inputs
    z, t, r = given["z"], given["t"], given["r"]
    cond = {"augment": given["aug_cond"]} if "in/aug_cond" in case else {}
    with torch.no_grad():
        u, du = total_derivative(
            lambda z, t, r: model(z, t, s=t - r, **cond),
            (z, t, r),
            (given["v"], torch.ones_like(t), torch.zeros_like(r)),
        )
        assert_close(u, case.outputs["u"], 1e-5, "u")
        assert_close(du, case.outputs["dudt"], 1e-4, "du/dt")
        assert_close(model(z, t, s=t - r), case.outputs["u_without_aug"], 1e-5, "without labels")


@golden.check(lambda c: c.kind == "cifar_loss")
def unet_loss(case: GoldenCase) -> None:
    model, said, given = unet(case), case.config["args"], case.inputs
    case.ignore("args.ema_decay", "args.ema_decays", why="nothing is averaged in a loss")
    objective = MeanFlow(
        model,
        P_mean=said["P_mean_t"],
        P_std=said["P_std_t"],
        r_mean=said["P_mean_r"],
        r_std=said["P_std_r"],
        order={"v0": "sort", "v1": "cap"}[said["tr_sampler"]],
        equal=1 - said["ratio"],
        rows="coin",
        dropped=0.0,
        norm_p=said["norm_p"],
        norm_eps=said["norm_eps"],
    )
    t, r = objective.times(given["normal_t"], given["normal_r"], given["uniform"] < objective.equal)
    assert_close(t, case.outputs["t"], 1e-6, "t")
    assert_close(r, case.outputs["r"], 1e-6, "r")
    told = {"augment": given["aug_cond"]} if "in/aug_cond" in case else {}
    none = torch.zeros(len(t), dtype=torch.bool)
    u, target, du, _ = objective.terms(given["x"], given["e"], t, r, r < t, {}, none, told=told)
    apart = r < t  # where r is t the derivative is not taken: it counts for nothing
    assert_close(du[apart], case.outputs["dudt"][apart], 1e-4, "du/dt")
    raw = summed(u - target)
    assert_close(raw, case.outputs["raw_sum_per_sample"], 1e-4, "raw")
    loss = adaptive(raw, objective.norm_p, objective.norm_eps).mean()
    assert_close(loss, case.outputs["loss"], 1e-4, "loss")
    loss.backward()
    gradients = {k: p.grad for k, p in model.named_parameters()}
    for name, want in case.outputs.items():
        if name.startswith("grad."):
            assert_close(gradients[name.removeprefix("grad.")], want, 1e-4, name)


@golden.check(lambda c: c.kind == "cifar_sample")
def unet_samples(case: GoldenCase) -> None:
    with torch.no_grad():
        x = MeanFlowSampler()(flow_of(unet(case)), Drawn(case.inputs["z"]))
    assert_close(x, case.outputs["x"], 1e-5, "x")
    pixels = (x / 2 + 0.5).clamp(0, 1).mul(255).floor()
    assert (pixels - case.outputs["uint8"].float()).abs().max() <= 1, "a rounding away from the border of two values"


@golden.check(lambda c: c.kind == "augment")
def augmentation(case: GoldenCase) -> None:
    draws, order, pipe = dict(case.inputs), iter(case.draw_order), case.config["pipe"]
    n = len(case.inputs["x"])
    for flip in ("xflip", "yflip"):
        if pipe.get(flip, 0) * pipe.get("p", 0) > 1e3:
            case.ignore(f"pipe.{flip}", why="a probability is at most 1: any factor so large gives the same images")

    def draw(kind: str, name: str, k: int) -> Tensor:
        value = draws.pop(next(order))
        return value.T if value.shape[-1:] == (n,) and value.ndim == 2 else value.reshape(n, k)

    x, told = AugmentPipe(**pipe)(case.inputs["x"], draw)
    assert draws.keys() == {"x"}, "every draw is used"
    assert_close(told, case.outputs["labels"], 1e-5, "labels")
    assert_close(x, case.outputs["images"], 1e-5, "images")


@golden.check(lambda c: c.kind == "cifar_ema")
def averages(case: GoldenCase) -> None:
    period, decays = case.config["period"], case.config["decays"]
    network = nn.Module()
    network.w, network.b = (nn.Parameter(case.inputs[k].clone()) for k in ("w0", "b0"))
    emas = [EMA(network, {"decay": d**period, "every": period}) for d in decays]
    trace = []
    for w, b in zip(case.inputs["w"], case.inputs["b"]):
        with torch.no_grad():
            network.w.copy_(w)
            network.b.copy_(b)
        for ema in emas:
            ema.update()
        trace.append(torch.cat([ema.average["w"] for ema in emas]))
    assert_close(torch.stack(trace), case.outputs["trace_w"], 1e-5, "trace")
    names = ["net_ema", *(f"net_ema{i}" for i in range(1, len(decays)))]
    for ema, name in zip(emas, names):
        for k in "wb":
            assert_close(ema.average[k], case.outputs[f"{name.removeprefix('net_')}_{k}"], 1e-5, name)
    assert emas[0].updates == case.outputs["num_updates"]
    assert {f"{m}.{k}" for m in ["net", *names] for k in "wb"} | {"num_updates"} == set(case.config["state_keys"])


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


# -- networks, presets, checkpoints ----------------------------------------------------------------------------------

COUNTS = {  # all parameters, and the trained ones
    "MF-B/4": (131_214_400, 131_165_248),
    "MF-B/2": (131_288_080, 131_091_472),
    "MF-M/2": (None, 308_019_216),
    "MF-L/2": (459_399_184, 459_137_040),
    "MF-XL/2": (676_735_504, 676_440_592),
}


@pytest.mark.parametrize("preset", COUNTS)
def test_presets_have_the_published_counts(preset: str) -> None:
    with torch.device("meta"):
        model = registry().build("model", {"name": "meanflow", "preset": preset})
    total, trained = COUNTS[preset]
    sizes = {p: p.numel() for p in model.parameters()}
    assert total in (None, sum(sizes.values()))
    assert sum(n for p, n in sizes.items() if p.requires_grad) == trained
    assert len(TRANSFORMERS) == 15


def test_the_unet_has_the_published_counts() -> None:
    with torch.device("meta"):
        model = registry().build("model", {"name": "meanflow-unet", "preset": "cifar10"})
        bare = registry().build("model", {"name": "meanflow-unet", "preset": "cifar10", "augment_dim": 0})
    assert sum(p.numel() for p in model.parameters()) == 55_932_419
    assert sum(p.numel() for p in bare.parameters()) == 55_929_347
    assert len(model.state_dict()) == 425


class TestTransformer(suites.ModelSuite):
    model = {
        "name": "meanflow", "input_size": 8, "patch_size": 4, "in_channels": 2, "hidden_size": 32, "depth": 2,
        "num_heads": 2, "num_classes": 3,
    }  # fmt: skip
    shape = (2, 8, 8)


class TestUNet(suites.ModelSuite):
    model = {
        "name": "meanflow-unet", "img_resolution": 8, "in_channels": 2, "model_channels": 16, "channel_mult": [1, 2],
        "num_blocks": 1, "attn_resolutions": [4], "augment_dim": 6,
    }  # fmt: skip
    shape = (2, 8, 8)


@torch.no_grad()
def test_the_second_time_matters_and_is_zero_where_it_is_not_told() -> None:
    for suite in (TestTransformer(), TestUNet()):
        network = suite.build()
        x, t, cond = suite.inputs(network)
        assert torch.equal(network(x, t, **cond), network(x, t, **cond, s=torch.zeros_like(t)))
        assert not torch.equal(network(x, t, **cond), network(x, t, **cond, s=0.5 * t))
    with pytest.raises(VgmError, match="one time"):
        SiT(8, 4, 2, 32, 1, 2)(x, t, s=t)


def test_queries_and_keys_may_be_normalised() -> None:
    """The layout of PyTorch has it and tells the width of a head; Flax's has not. Derivatives go through."""
    model = network(qknorm=True, num_heads=4)
    suites.randomise(model)
    state = model.state_dict()
    assert TORCH.recognise(state) and not TORCH.recognise({**state, "blocks.0.norm1.weight": state["pos_embed"]})
    read = TORCH.config(state)
    assert read["qknorm"] and read["num_heads"] == 4 and "qknorm" not in TORCH.config(network().state_dict())
    again = MeanFlowDiT(**read)
    again.load_state_dict(TORCH.to_ours(state))
    x, t, cond = TestTransformer().inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(again(x, t, **cond), model(x, t, **cond))
    with pytest.raises(VgmError, match="not normalised"):
        FLAX.allows({**read, "input_size": 32})
    loss, logs = MeanFlow(model, equal=0.0).loss("main", {"x": x, "cond": cond}, Step(0))
    loss.backward()
    assert logs["du_dt"] > 0 and model.blocks[0].attn.q_norm.weight.grad.abs().sum() > 0


def packed(value: Any) -> bytes:
    """msgpack of dictionaries and arrays, as flax writes them."""
    if isinstance(value, Mapping):
        return b"\xde" + struct.pack(">H", len(value)) + b"".join(packed(k) + packed(v) for k, v in value.items())
    if isinstance(value, str):
        return b"\xda" + struct.pack(">H", len(value)) + value.encode()
    shape = b"\xdc" + struct.pack(">H", value.ndim) + b"".join(b"\xce" + struct.pack(">I", n) for n in value.shape)
    data = value.contiguous().numpy().tobytes()
    payload = b"\x93" + shape + packed("float32") + b"\xc6" + struct.pack(">I", len(data)) + data
    return b"\xc9" + struct.pack(">Ib", len(payload), 1) + payload


def nested(state: Mapping[str, Tensor]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, tensor in state.items():
        *above, last = name.split(".")
        at = out
        for word in above:
            at = at.setdefault(word, {})
        at[last] = tensor
    return out


def tiny_flax() -> tuple[MeanFlowDiT, dict[str, Tensor]]:
    model = MeanFlowDiT(32, 8, 4, 16, 2, 1, num_classes=3)
    positions = model.pos_embed.detach().clone()
    suites.randomise(model)
    model.pos_embed.data.copy_(positions)  # Flax computes them
    return model, FLAX.from_ours(model.state_dict())


def test_checkpoints_are_converted_both_ways(vgm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the three as its training saves it, the average taken, and back."""
    monkeypatch.chdir(tmp_path)
    model, theirs = tiny_flax()
    half = {k: v / 2 for k, v in theirs.items()}
    Path("checkpoint_5").write_bytes(packed({"params": {"net": nested(half)}, "ema_params": {"net": nested(theirs)}}))
    own = {k: v.clone() for k, v in model.state_dict().items()}
    torch.save({"model": {k: v / 2 for k, v in own.items()}, "ema": own, "steps": 3}, "torch.pt")
    net = TestUNet().build()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    parts = {"net": 1.0, "net_ema": 2.0, "net_ema1": 3.0, "net_ema2": 4.0}
    nets = {f"{p}.{k}": v if "filter" in k else v * f for p, f in parts.items() for k, v in state.items()}
    torch.save({"model": {**nets, "num_updates": torch.tensor(3)}, "epoch": 1}, "unet.pt")
    from vgm_cli.engine import checkpoint as ckpt

    for file, words, want in (
        ("checkpoint_5", [], own),
        ("torch.pt", [], own),
        ("unet.pt", ["--weights", "net_ema1"], {k: v if "filter" in k else v * 3 for k, v in state.items()}),
    ):
        code, _, err = vgm("convert", file, "ours.safetensors", *words, "--overwrite")
        assert code == 0, err
        got, metadata = ckpt.read_tensors(Path("ours.safetensors"))
        assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want), file
        assert json.loads(metadata["vgm.view"])["second_time"] == "difference"
        assert vgm("sample", "ours.safetensors", "-n", 1, "--out", "x.npz", "--overwrite")[0] == 0 or "codec" in err
    code, _, err = vgm("convert", "torch.pt", "flax.safetensors", "--to", "meanflow-flax", "--overwrite")
    assert code == 0, err


def test_layouts_of_one_time_are_not_taken_for_it() -> None:
    model, _ = tiny_flax()
    from vgm_plugins.dit.checkpoints import CONVERTER

    assert not CONVERTER.recognise(model.state_dict()) and TORCH.recognise(model.state_dict())
    with pytest.raises(VgmError, match="told one time"):
        CONVERTER.allows({"second_time": True})
    plain = SiT(8, 4, 2, 32, 1, 2)
    assert not TORCH.recognise(plain.state_dict())
    state = TestUNet().build().state_dict()
    state["map_layer0.weight"] = state["map_layer0.weight"][:, :16]
    with pytest.raises(VgmError, match="one time"):
        UNET.config(state)


# -- the loss --------------------------------------------------------------------------------------------------------


def toy(z: Tensor, t: Tensor, r: Tensor, y: Tensor | None = None) -> Tensor:
    """u = t z^2 / 2 - r z + y: its derivative is easy."""
    t, r = t.view(-1, 1), r.view(-1, 1)
    return t * z.square() / 2 - r * z + (0 if y is None else y)


@pytest.mark.parametrize("joint", [True, False])
def test_the_derivative_is_the_total_one(joint: bool) -> None:
    """d/dt u(z_t, r, t) = (t z - r) v + z^2 / 2, and 0 in rows with r = t; in the order of the batch."""
    z, v = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    t, r = torch.tensor([0.9, 0.5, 0.7, 0.3]), torch.tensor([0.9, 0.1, 0.7, 0.0])
    y = torch.arange(4.0).view(4, 1)
    u, du = average_velocity(toy, z, t, r, v, r < t, {"y": y}, joint)
    torch.testing.assert_close(u, toy(z, t, r, y))
    want = (t.view(-1, 1) * z - r.view(-1, 1)) * v + z.square() / 2
    torch.testing.assert_close(du, torch.where((r < t).view(-1, 1), want, 0.0))
    torch.testing.assert_close(target_of(v, du, t, r), v - (t - r).view(-1, 1) * want)
    for wrong in (torch.zeros_like(v), -v):  # other tangents, another derivative
        assert not torch.allclose(average_velocity(toy, z, t, r, wrong, r < t, {"y": y})[1][1], want[1])


def test_the_identity_holds_for_the_true_average_velocity() -> None:
    """Of the flow dz/dt = z, from t to r: u = z (1 - e^(r - t)) / (t - r); the target is u itself."""
    z = torch.randn(5, 2, dtype=torch.float64)
    t, r = torch.linspace(0.3, 1, 5, dtype=torch.float64), torch.linspace(0, 0.8, 5, dtype=torch.float64)

    def true(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return z * (-torch.expm1(r - t) / (t - r)).view(-1, 1)

    u, du = average_velocity(true, z, t, r, z, torch.ones(5, dtype=torch.bool), {})
    torch.testing.assert_close(target_of(z, du, t, r), u)


def test_guidance_in_the_target() -> None:
    z, v = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.1, 0.5, 0.9])
    cond, null = {"y": torch.ones(3, 1)}, {"y": torch.zeros(3, 1)}
    at = toy(z, t, t, null["y"])
    inside = (t >= 0.3).view(-1, 1)
    got = guided_velocity(toy, z, t, v, cond, null, 0.2, 0.7, (0.3, 1.0))
    torch.testing.assert_close(got, torch.where(inside, 0.2 * v + 0.7 * (at + 1) + 0.1 * at, v))
    got = guided_velocity(toy, z, t, v, cond, null, 3.0, 0.0)
    torch.testing.assert_close(got, at + 3 * (v - at))


def test_orders_of_two_times() -> None:
    a, b = torch.tensor([0.2, 0.9, 0.4]), torch.tensor([0.6, 0.3, 0.8])
    equal = torch.tensor([False, False, True])
    t, r = pairs_of_times(a, b, equal)
    assert torch.equal(t, torch.tensor([0.6, 0.9, 0.8])) and torch.equal(r, torch.tensor([0.2, 0.3, 0.8]))
    t, r = pairs_of_times(a, b, equal, "cap")
    assert torch.equal(t, a) and torch.equal(r, torch.tensor([0.2, 0.3, 0.4]))


def network(**more: Any) -> nn.Module:
    return registry().build("model", {**TestTransformer.model, **more})


def test_the_first_rows_are_equal_and_dropped() -> None:
    """As many as officially, whoever computes them; by a coin only about as many."""
    objective = MeanFlow(network(), equal=0.75, dropped=0.3)
    equal, dropped = objective.drawn(64, Step(1))
    assert equal.sum() == 48 and equal[:48].all() and 5 < dropped.sum() < 40
    assert dropped[: int(dropped.sum())].all(), "dropped rows are the first, which are equal ones"
    parts = [objective.drawn(16, Step(1, rank=i, world=4)) for i in range(4)]
    for whole, own in zip((equal, dropped), zip(*parts)):
        assert torch.equal(torch.cat(own), whole)
    counts = {int(MeanFlow(network(), rows="coin").drawn(64, Step(i))[0].sum()) for i in range(8)}
    assert len(counts) > 2 and all(30 < n < 62 for n in counts)


def test_the_adaptive_weight_has_no_gradient() -> None:
    raw = torch.tensor([4.0, 9.0], requires_grad=True)
    for p, eps, squared, want in ((1.0, 0.0, False, 1 / raw), (0.5, 0.0, False, raw**-0.5), (1.0, 0.0, True, 2 / raw)):
        (gradient,) = torch.autograd.grad(adaptive(raw, p, eps, squared).sum(), raw)
        torch.testing.assert_close(gradient, want.detach())


def test_it_starts_as_its_teacher() -> None:
    """A SiT with a second embedder gives the teacher's velocity at t, whatever r is; the host reads both alike."""
    config = {k: v for k, v in TestTransformer.model.items() if k != "name"}
    teacher = SiT(**config)
    suites.randomise(teacher)
    from vgm_cli.diffusion.denoiser import Denoiser

    view = Denoiser.from_config(teacher, {**FLOW, "time": "reversed"})
    torch.manual_seed(1)
    student = SiT(**config, second_time=True)
    objective = MeanFlow(student, view)
    x, t, cond = TestTransformer().inputs(student)
    with torch.no_grad():
        got = objective.velocity(x, t, 0.3 * t, **cond)
        torch.testing.assert_close(got, view.predict(x, t, "velocity", **cond))
    loss, _ = objective.loss("main", {"x": x, "cond": cond}, Step(0))
    loss.backward()
    assert student.r_embedder.mlp[2].weight.grad.abs().sum() > 0
    with pytest.raises(VgmError, match="not the teacher's"):
        MeanFlow(SiT(**{**config, "depth": 1}, second_time=True), view)
    with pytest.raises(VgmError, match="predict velocities"):
        MeanFlow(student, Denoiser.from_config(teacher, {**FLOW, "prediction": "x0"}))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: MeanFlow(SiT(8, 4, 2, 32, 1, 2)), "two times"),
        (lambda: MeanFlow(network(), kappa=1.0), "infinite"),
        (lambda: MeanFlow(network(), augment={"p": 1, "xflip": 1}), "gives 1 labels"),
        (lambda: MeanFlow(network(), augment={"zoom": 1}), "zoom"),
    ],
)
def test_what_does_not_go_together(build: Any, match: str) -> None:
    with pytest.raises(VgmError, match=match):
        build()


def test_nothing_is_augmented_with_probability_zero() -> None:
    pipe = AugmentPipe(p=0.0, xflip=1, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)
    step, x = Step(0), torch.rand(2, 3, 16, 16)
    from vgm_plugins.meanflow.objective import drawn_by

    same, told = pipe(x, lambda kind, name, k: drawn_by(step, kind, name, 2, k))
    assert told.shape == (2, pipe.labels) == (2, 9) and not told.any()
    torch.testing.assert_close(same[..., 4:-4, 4:-4], x[..., 4:-4, 4:-4], rtol=0, atol=0.05)


# -- sampling, training ----------------------------------------------------------------------------------------------


def test_the_sampler_refuses() -> None:
    model = network()
    z = torch.randn(2, 2, 8, 8)
    for flow, keywords, sampler, match in (
        (flow_of(model, guided=True), {"guidance_scale": 2.0}, MeanFlowSampler(), "in this network's weights"),
        (FlowMap(model, FLOW), {}, MeanFlowSampler(), "average velocities"),
        (flow_of(model), {}, MeanFlowSampler(times=(0.5, 0.7)), "do not descend"),
        (flow_of(model), {}, MeanFlowSampler(times=(1.0, 0.0)), "do not descend"),
    ):
        with pytest.raises(VgmError, match=match):
            sampler(flow, Drawn(z, cond={"y": torch.tensor([0, 1])}, **keywords))


SMALL = (
    "model={name: meanflow, patch_size: 7, hidden_size: 16, depth: 1, num_heads: 2}",
    "codec=null",
    "train.precision=fp32",
    "objective.rows=first",
)


class TestTraining(suites.ObjectiveSuite):
    recipe = "meanflow/mnist"
    overrides = (*SMALL, "objective.kappa=0.5", "objective.guidance_from=0")


class TestUnconditional(suites.ObjectiveSuite):
    recipe = "meanflow/cifar10"
    overrides = (
        "model={name: meanflow-unet, model_channels: 16, channel_mult: [1, 1], num_blocks: 1, augment_dim: 6, "
        "attn_resolutions: [4], img_resolution: 8, dropout: 0}",
        "data.size=8",
        "data.hflip=false",
        "objective.derivative=alone",
    )
    test_resume_is_bit_exact = None  # of digits, see TestTraining


class TestSampling(suites.SamplerSuite):
    recipe = "meanflow/mnist"
    overrides = SMALL
    steps = 3


def test_from_the_command_line(vgm, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From scratch and from a trained flow; few steps; guidance that is in the weights is refused at sampling."""
    monkeypatch.chdir(tmp_path)
    net = "patch_size: 7, hidden_size: 16, depth: 1, num_heads: 2"
    few = (f"data.path={tiny_dataset}", "codec=null", "train.steps=2", "train.batch_size=8", "train.preview_n=0")
    assert vgm("train", "sit", f"model={{name: sit, {net}, learn_sigma: false}}", *few, "--out", "flow")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr("vgm_plugins.meanflow.objective.STEEP", -1.0)
        own = (f"model={{name: meanflow, {net}}}", "train.log_every=1")
        code, _, err = vgm("train", "meanflow", *own, *few, "--out", "scratch")
    assert code == 0 and err.count("about to diverge") == 1, err
    record = json.loads(Path("scratch/metrics.jsonl").read_text().splitlines()[-1])
    assert {"raw", "raw_same", "raw_apart", "du_dt"} <= record.keys()
    code, _, err = vgm("distill", "meanflow", "--teacher", "flow", *few[2:], "objective.omega=1", "--out", "tuned")
    assert code == 0, err
    for run, steps in (("scratch", 1), ("tuned", 3)):
        code, _, err = vgm("sample", run, "--steps", steps, "-n", 2, "--out", f"{run}.npz")
        assert code == 0, err
    code, _, err = vgm("sample", "scratch", "--guidance-scale", 2, "-n", 1, "--out", "x.npz")
    assert code == 2 and "in this network's weights" in err and not Path("x.npz").exists()
    assert vgm("sample", "tuned", "--guidance-scale", 2, "-n", 1, "--out", "x.npz")[0] == 0
    assert vgm("sample", "scratch", "--sampler", "few-step", "renoise=none", "-n", 2, "--out", "jumps.npz")[0] == 0
    with np.load("scratch.npz") as a, np.load("jumps.npz") as b:
        assert np.abs(a["arr_0"].astype(int) - b["arr_0"].astype(int)).max() <= 1, "the host's sampler jumps alike"


def losses(run: Path, key: str) -> Iterator[float]:
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if key in record:
            yield record[key]


@pytest.mark.slow
def test_it_learns_digits(vgm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe, shortened: the plain error falls, and digits made in one step come nearer to real ones."""
    monkeypatch.chdir(tmp_path)
    few = ("train.steps=160", "train.log_every=10", "train.preview_n=0", "objective.omega=1", "train.save_every=20",
           "optimizer.warmup=10", "train.ema=[{decay: 0.95, warmup: 1}]")  # fmt: skip
    assert vgm("train", "meanflow", *few, "--out", "run")[0] == 0
    same = list(losses(Path("run"), "raw_same"))
    assert sum(same[-4:]) < 0.8 * sum(same[:2]) * 2, same
    found = []
    for name in ("run/checkpoints/step-00000020", "run"):
        code, out, err = vgm("evaluate", name, "--reference", "mnist5k", "--metrics", "fid", "-n", 300, "--json")
        assert code == 0, err
        found.append(json.loads(out)["metrics"]["fid"])
    assert found[1]["value"] < 0.8 * found[0]["value"], found
