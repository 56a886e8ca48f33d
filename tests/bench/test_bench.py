"""Speed against peers from PyPI, as ratios of the same run: `make bench`.

Ours and the peer take turns (A B A B …); the figure is the ratio of their best times, so that whatever else the machine
does falls on both. Same sizes, same precision, same work; then ours with the defaults a user gets.
"""

from __future__ import annotations

import copy
import os
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from vgm_cli import recipe as recipes
from vgm_cli.api import Request, Step, generators
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.environment import bf16_supported
from vgm_cli.engine.processes import keep_memory
from vgm_cli.registry import registry

pytestmark = pytest.mark.bench
ROUNDS = 6
SLACK = 1.05  # "at least as fast", within what two equal programs differ by here


def race(
    ours: Callable[[], Any], peer: Callable[[], Any], rounds: int = ROUNDS, warm: bool = True
) -> tuple[float, float]:
    """Best seconds of each, taking turns. warm: run each once before."""
    keep_memory()
    best = [float("inf"), float("inf")]
    for run in (ours, peer) if warm else ():
        run()
    for _ in range(rounds):
        for i, run in enumerate((ours, peer)):
            began = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - began)
    return best[0], best[1]


def report(what: str, ours: float, peer: float, name: str) -> float:
    """Print one line; gives the speed-up over the peer."""
    print(f"\n{what:<58} ours {ours * 1e3:8.1f} ms   {name} {peer * 1e3:8.1f} ms   {peer / ours:5.2f} times as fast")
    return peer / ours


def training(model: torch.nn.Module, loss: Callable[[], torch.Tensor], bf16: bool, fused: bool) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


DIT = {
    "depth": 6,
    "hidden_size": 384,
    "num_heads": 6,
    "patch_size": 2,
    "input_size": 16,
    "in_channels": 4,
    "num_classes": 10,
}
DIGITS = {
    "depth": 4,
    "hidden_size": 128,
    "num_heads": 4,
    "patch_size": 1,
    "input_size": 7,
    "in_channels": 4,
    "num_classes": 10,
}


def has(kind: str, name: str) -> bool:
    return (kind, name) in registry().components


def our_dit() -> torch.nn.Module:
    torch.manual_seed(0)
    return registry().build("model", {"name": "dit", **DIT, "learn_sigma": False})


def their_dit() -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=DIT["num_heads"],
        attention_head_dim=DIT["hidden_size"] // DIT["num_heads"],
        in_channels=4,
        out_channels=4,
        num_layers=DIT["depth"],
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=10,
    )


def eps_loss(predict: Callable[..., torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The plain loop: draw t and noise, add, predict, compare."""
    betas = torch.linspace(1e-4, 0.02, 1000)
    bar = (1 - betas).cumprod(0)
    t, noise = torch.randint(1000, (len(x),)), torch.randn_like(x)
    a = bar[t].view(-1, 1, 1, 1)
    return F.mse_loss(predict(a.sqrt() * x + (1 - a).sqrt() * noise, t, y), noise)


@pytest.mark.parametrize("mode", ["fp32", "defaults"])
def test_dit_training_step(mode: str) -> None:
    ours, peer = our_dit(), their_dit()
    assert (
        abs(sum(p.numel() for p in ours.parameters()) / 16e6) > 0.3
    )  # the same widths; the peer embeds t in every block
    x, y = torch.randn(16, 4, 16, 16), torch.arange(16) % 10
    objective = registry().build("objective", {"name": "iddpm", "learn_sigma": False}, model=ours)
    bf16 = mode == "defaults" and bf16_supported()
    index = iter(range(10**9))
    a = training(ours, lambda: objective.loss("main", {"x": x, "cond": {"y": y}}, Step(next(index)))[0], bf16, True)
    b = training(peer, lambda: eps_loss(lambda z, t, y: peer(z, t, y).sample, x, y), False, False)
    speed = report(f"DiT training step, 16 x 64 tokens x 384, {'bf16' if bf16 else 'fp32'}", *race(a, b), "diffusers")
    assert speed > (1.5 if bf16 else 1 / SLACK)


@pytest.mark.skipif(not has("model", "lightningdit"), reason="LightningDiT is not in")
def test_lightningdit_training_step() -> None:
    """SwiGLU, RMSNorm, rotary positions and the loss on the direction against SiT's network and loss of equal FLOPs."""
    torch.manual_seed(0)
    sizes = {**DIT, "learn_sigma": False}
    plain = registry().build("model", {"name": "sit", **sizes})
    ours = registry().build("model", {"name": "lightningdit", "preset": "LightningDiT", **DIT})
    counts = [sum(p.numel() for p in net.parameters()) for net in (ours, plain)]
    assert abs(counts[0] - counts[1]) / counts[1] < 0.01, counts
    batch = {"x": torch.randn(16, 4, 16, 16), "cond": {"y": torch.arange(16) % 10}}
    steps = []
    for name, model in (("lightningdit", ours), ("flow-matching", plain)):
        objective, index = registry().build("objective", {"name": name}, model=model), iter(range(10**9))
        steps.append(training(model, lambda o=objective, i=index: o.loss("main", batch, Step(next(i)))[0], False, True))  # type: ignore[misc]
    speed = report("LightningDiT training step, 16 x 64 tokens x 384, fp32", *race(*steps), "DiT's network")
    assert speed > 1 / 1.1


@pytest.mark.parametrize("recipe", ["meanflow/mnist", "scm/mnist", "scm/mnist-scd"])
def test_a_training_step_with_a_derivative(recipe: str) -> None:
    """A step on the digits' network as the recipe has it (MeanFlow guided, sCD's teacher not, which would be evaluated
    once more) costs at most three times a flow-matching step of the same network."""
    node = {**yaml.safe_load(recipes.locate(recipe)[1].read_text())["objective"]}
    keywords = {**DIGITS, "learn_sigma": False}
    torch.manual_seed(0)
    plain = registry().build("model", {"name": "sit", **keywords})
    own = registry().build(
        "model", {"name": "meanflow", **DIGITS} if "meanflow" in recipe else {"name": "sit", **keywords}
    )
    roles: dict[str, Any] = {}
    if "scd" in recipe:
        teacher = registry().build("model", {"name": "sit", **keywords}).requires_grad_(False)
        view = {"path": "linear", "prediction": "velocity", "time": "reversed"}
        roles["teacher"] = ckpt.build_view(teacher, view)
    node |= {"guidance_from": 0.0} if "meanflow" in recipe else {}
    learner = registry().build("objective", node, model=own, **roles)
    flow = registry().build(
        "objective", {"name": "flow-matching", "path": "linear", "prediction": "velocity"}, model=plain
    )
    batch, index = {"x": torch.randn(64, 4, 7, 7), "cond": {"y": torch.arange(64) % 10}}, iter(range(10**9))
    a = training(own, lambda: learner.loss("main", batch, Step(next(index), total=10**9))[0], False, True)
    b = training(plain, lambda: flow.loss("main", batch, Step(next(index)))[0], False, True)
    speed = report(f"{recipe}: training step, 64 x 49 tokens x 128", *race(a, b), "flow matching")
    assert speed > 1 / 3


@pytest.mark.parametrize("mode", ["fp32", "defaults"])
def test_dit_sampling_with_guidance(mode: str) -> None:
    """10 DDIM steps of 8 images, conditional and unconditional in one batch on both sides."""
    diffusers = pytest.importorskip("diffusers")
    ours, peer = our_dit().eval(), their_dit().eval()
    objective = registry().build("objective", {"name": "iddpm", "learn_sigma": False}, model=ours)
    view = ckpt.build_view(ours, objective.view())
    sampler = registry().build("sampler", {"name": "iddpm-ddim", "steps": 10})
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    y = torch.arange(8) % 10
    bf16 = mode == "defaults" and bf16_supported()

    @torch.no_grad()
    def a() -> None:
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            sampler(
                view, Request(shape=(4, 16, 16), generators=generators(range(8)), cond={"y": y}, guidance_scale=2.0)
            )

    @torch.no_grad()
    def b() -> None:
        scheduler.set_timesteps(10)
        x, both = torch.randn(8, 4, 16, 16), torch.cat([y, torch.full_like(y, 10)])
        for t in scheduler.timesteps:
            c, u = peer(torch.cat([x, x]), t.expand(16), both).sample.chunk(2)
            x = scheduler.step(u + 2.0 * (c - u), t, x).prev_sample

    speed = report(f"DiT sampling, guidance, 10 steps, {'bf16' if bf16 else 'fp32'}", *race(a, b), "diffusers")
    assert speed > (1.2 if bf16 else 1 / SLACK)


def our_unet() -> torch.nn.Module:
    torch.manual_seed(0)
    return registry().build("model", {
        "name": "adm-unet", "image_size": 32, "in_channels": 3, "model_channels": 64, "out_channels": 3, "num_res_blocks": 2,
        "attention_resolutions": [2], "channel_mult": [1, 2], "num_head_channels": 64, "use_scale_shift_norm": True,
        "resblock_updown": False, "num_classes": None,
    })  # fmt: skip


def their_unet() -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(64, 128),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=64,
        resnet_time_scale_shift="scale_shift",
        norm_eps=1e-5,
    )


@pytest.mark.parametrize("mode", ["fp32", "defaults"])
def test_unet_training_step(mode: str) -> None:
    ours, peer = our_unet(), their_unet()
    sizes = [sum(p.numel() for p in n.parameters()) for n in (ours, peer)]
    assert abs(sizes[0] - sizes[1]) / sizes[1] < 0.05, sizes
    if mode == "defaults":
        ours = ours.to(memory_format=torch.channels_last)  # what the trainer does with convolutional networks
    x, y = torch.randn(8, 3, 32, 32), None
    objective = registry().build("objective", {"name": "iddpm", "learn_sigma": False}, model=ours)
    bf16 = mode == "defaults" and bf16_supported()
    index = iter(range(10**9))
    a = training(ours, lambda: objective.loss("main", {"x": x}, Step(next(index)))[0], bf16, True)
    b = training(peer, lambda: eps_loss(lambda z, t, _: peer(z, t).sample, x, y), False, False)  # type: ignore[arg-type]
    speed = report(f"ADM U-Net training step, 8 x 3 x 32 x 32, {'bf16' if bf16 else 'fp32'}", *race(a, b), "diffusers")
    assert speed > (1.3 if bf16 else 1 / SLACK)


PEAK = """
import resource, sys, torch
sys.path[:0] = {path!r}
from tests.bench.test_bench import our_dit, their_dit, training, eps_loss
from vgm_cli.api import Step
from vgm_cli.registry import registry
x, y = torch.randn(64, 4, 16, 16), torch.arange(64) % 10
if sys.argv[1] == "ours":
    net = our_dit()
    o = registry().build("objective", {{"name": "iddpm", "learn_sigma": False}}, model=net)
    step = training(net, lambda: o.loss("main", {{"x": x, "cond": {{"y": y}}}}, Step(0))[0], sys.argv[2] == "bf16", True)
else:
    net = their_dit()
    step = training(net, lambda: eps_loss(lambda z, t, y: net(z, t, y).sample, x, y), False, False)
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)
"""


def test_peak_memory_of_a_dit_training_step() -> None:
    """Peak resident memory above the built network, each in a process of its own."""
    pytest.importorskip("diffusers")
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    code = textwrap.dedent(PEAK).format(path=[root])

    def peak(*args: str) -> float:
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=root)
        assert done.returncode == 0, done.stderr
        return float(done.stdout.split()[-1]) / 1024

    half = "bf16" if bf16_supported() else "fp32"
    ours, defaults, peer = peak("ours", "fp32"), peak("ours", half), peak("peer", "fp32")
    print(
        f"\nDiT training step, 64 images, peak memory: ours {ours:.0f} MiB fp32, {defaults:.0f} MiB {half}, diffusers {peer:.0f} MiB"
    )
    assert ours < peer * SLACK and defaults < peer
    assert resource is not None


# -- other families ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not has("model", "llamagen"), reason="LlamaGen is not in")
def test_llamagen_sampling() -> None:
    """256 tokens, batch of 4 with guidance: ours with its cache, ours recomputing everything, transformers' Llama with its
    cache and the same sampling."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"dim": 256, "n_layer": 4, "n_head": 4, "multiple_of": 64}
    ours = (
        registry()
        .build("model", {"name": "llamagen", "grid": (16, 16), "num_classes": 10, "vocab_size": 1024, **sizes})
        .eval()
    )
    hidden = ours.layers[0].feed_forward.w1.out_features
    config = transformers.LlamaConfig(vocab_size=1035, hidden_size=256, intermediate_size=hidden, num_hidden_layers=4,
                                      num_attention_heads=4, max_position_embeddings=300)  # fmt: skip
    peer = transformers.LlamaForCausalLM(config).eval()
    sampler = registry().build("sampler", {"name": "llamagen", "top_k": 100})
    n, y = 4, torch.arange(4)

    def request() -> Request:
        return Request(shape=(16, 16), generators=generators(range(n)), cond={"y": y}, guidance_scale=2.0)

    @torch.no_grad()
    def cached() -> None:
        sampler(ours, request())

    @torch.no_grad()
    def plain_cached() -> None:
        ids, past = torch.cat([1024 + y, torch.full((n,), 1034)])[:, None], None
        for _ in range(256):
            out = peer(ids, past_key_values=past, use_cache=True)
            past = out.past_key_values
            c, u = out.logits[:, -1].chunk(2)
            logits = u + 2.0 * (c - u)
            logits[logits < logits.topk(100).values[:, -1:]] = -float("inf")
            token = torch.multinomial(logits.softmax(-1), 1)
            ids = torch.cat([token, token])

    sys.path.append(str(Path(__file__).parents[1] / "plugins"))
    from naive_decoding import decode_naively

    def naive() -> None:
        decode_naively(ours, y, sampler.decoding.picker(torch.rand(n, 256)), 2.0)

    speed = report(
        "LlamaGen, 256 tokens with guidance", *race(cached, plain_cached, rounds=3), "transformers, with its cache"
    )
    assert speed > 1 / SLACK
    fast, slow = race(cached, naive, rounds=1, warm=False)  # warm since the race before; the naive loop takes long
    assert report("LlamaGen, 256 tokens with guidance", fast, slow, "without a cache") >= 3


@pytest.mark.skipif(not has("model", "halton-maskgit"), reason="MaskGIT is not in")
@pytest.mark.parametrize(("side", "codes", "images", "least"), [(16, 1024, 1, 3.0), (7, 256, 64, 0.0)])
def test_maskgit_sampling(side: int, codes: int, images: int, least: float) -> None:
    """The same tokens, width and depth, no guidance, as in MaskGIT's paper: 8 passes over all codes against LlamaGen's
    one code at a time. One image waits for 256 passes one after the other; of many images together a cache computes an
    eighth, and only a machine with arithmetic to spare hides that, which two CPU cores do not: the second line is for
    information."""
    torch.manual_seed(0)
    facts = {"grid": (side, side), "vocab_size": codes, "num_classes": 10}
    node = {"name": "halton-maskgit", **facts, "hidden_dim": 256, "depth": 4, "heads": 4}
    ours = registry().build("model", node).eval()
    node = {"name": "llamagen", **facts, "dim": 256, "n_layer": 4, "n_head": 4}
    peer = registry().build("model", node).eval()
    parallel = registry().build("sampler", {"name": "maskgit", "steps": 8})
    serial = registry().build("sampler", {"name": "llamagen"})

    def sampled(sampler: Any, model: Any) -> Callable[[], Any]:
        @torch.no_grad()
        def run() -> None:
            cond = {"y": torch.arange(images) % 10}
            sampler(model, Request((side, side), generators(range(images)), cond=cond, guidance_scale=1.0))

        return run

    times = race(sampled(parallel, ours), sampled(serial, peer), rounds=3)
    speed = report(f"MaskGIT, 8 passes, {images} x {side * side} codes", *times, "LlamaGen, cached")
    assert speed > least


@pytest.mark.skipif(not has("model", "randar"), reason="RandAR is not in")
def test_randar_passes() -> None:
    """256 tokens, batch of 4 with guidance: 88 passes against one for each token."""
    torch.manual_seed(0)
    sizes = {"dim": 256, "n_layer": 4, "n_head": 4, "multiple_of": 64, "grid": (16, 16), "num_classes": 10}
    network = registry().build("model", {"name": "randar", "vocab_size": 1024, **sizes}).eval()
    several, single = (registry().build("sampler", {"name": "randar", "steps": steps}) for steps in (88, None))

    def sampling(sampler: Any) -> Callable[[], None]:
        def run() -> None:
            cond = {"y": torch.arange(4)}
            with torch.no_grad():
                sampler(network, Request((16, 16), generators(range(4)), cond=cond, guidance_scale=2.0))

        return run

    best = race(sampling(several), sampling(single), rounds=3)
    assert report("RandAR, 256 tokens in 88 passes with guidance", *best, "in 256 passes") >= 1.5


@pytest.mark.skipif(not has("model", "glow"), reason="Glow is not in")
def test_glow_training_step() -> None:
    """normflows' Glow of equal size: 2 levels of 8 steps, 128 hidden channels, 3 x 32 x 32."""
    nf = pytest.importorskip("normflows")
    torch.manual_seed(0)
    levels, depth, width, channels = 2, 8, 128, 3
    bases, merges, flows = [], [], []
    for i in range(levels):
        flow = [nf.flows.GlowBlock(channels * 2 ** (levels + 1 - i), width, split_mode="channel", scale=True)
                for _ in range(depth)]  # fmt: skip
        flow += [nf.flows.Squeeze()]
        flows += [flow]
        if i > 0:
            merges += [nf.flows.Merge()]
            shape = (channels * 2 ** (levels - i), 32 // 2 ** (levels - i), 32 // 2 ** (levels - i))
        else:
            shape = (channels * 2 ** (levels + 1), 32 // 2**levels, 32 // 2**levels)
        bases += [nf.distributions.DiagGaussian(shape)]
    peer = nf.MultiscaleFlow(bases, flows, merges)
    ours = registry().build("model", {"name": "glow", "in_channels": channels, "size": 32, "levels": levels, "depth": depth,
                                      "width": width, "permutation": "lu", "learn_top": False})  # fmt: skip
    x = torch.rand(16, channels, 32, 32)
    sizes = [sum(p.numel() for p in net.parameters() if p.requires_grad) for net in (ours, peer)]
    assert abs(sizes[0] - sizes[1]) / sizes[1] < 0.1, sizes
    objective = registry().build("objective", {"name": "glow"}, model=ours)
    index = iter(range(10**9))
    batch = {"x": x * 2 - 1}
    objective.prepare(batch, Step(0))
    a = training(ours, lambda: objective.loss("main", batch, Step(next(index)))[0], False, True)
    b = training(peer, lambda: peer.forward_kld(x), False, False)
    assert report("Glow training step, 16 x 3 x 32 x 32, fp32", *race(a, b, rounds=4), "normflows") > 1 / SLACK


def our_flow() -> torch.nn.Module:
    """The digits' STARFlow, 49 tokens, with the size of outputs that a trained one has."""
    torch.manual_seed(0)
    flow = registry().build("model", {"name": "starflow", "in_channels": 4, "img_size": 7, "channels": 128, "head_dim": 32,
                                      "layers_per_block": [1, 1, 1, 4], "num_classes": 10}).eval()  # fmt: skip
    for block in flow.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.02)
    return flow


def flow_request(batch: int) -> Request:
    cond = {"y": torch.arange(batch) % 10}
    return Request(shape=(4, 7, 7), generators=generators(range(batch)), cond=cond, guidance_scale=2.0)


@pytest.mark.skipif(not has("model", "starflow"), reason="STARFlow is not in")
def test_starflow_sampling_with_a_cache() -> None:
    """49 tokens through four blocks, guided in the top one, against passes over the whole prefix for every token."""
    flow, batch = our_flow(), 64
    sampler = registry().build("sampler", {"name": "starflow", "denoise": "none"})
    made = {}

    @torch.no_grad()
    def cached() -> None:
        made["cached"] = sampler(flow, flow_request(batch))

    @torch.no_grad()
    def naive() -> None:
        request = flow_request(batch)
        y, z = request.cond["y"], flow.patchify(request.randn())
        both = flow.starts((4, 7, 7), 2 * batch, {"y": torch.cat([y, torch.full_like(y, 10)])})
        plain = flow.starts((4, 7, 7), batch, {"y": y})
        for i, block in reversed(list(enumerate(flow.blocks))):
            top, z = i == len(flow.blocks) - 1, block.order(z)
            x = block.first(batch)
            for t in range(z.shape[1]):
                out = block.predict(x.repeat(2, 1, 1) if top else x, both[i] if top else plain[i])[:, -1:]
                mean, scale = block.gaussian(out)
                if top:  # the weight is 1
                    (mean, other), (scale, worse) = mean.chunk(2), scale.chunk(2)
                    s = (scale / worse).clamp(max=1).square()
                    mean, scale = (2 * mean - s * other) / (2 - s), scale / (2 - s).sqrt()
                x = torch.cat([x, mean + scale * z[:, t : t + 1]], dim=1)
            z = block.order(x[:, 1:])
        made["naive"] = flow.unpatchify(z, (4, 7, 7))

    cached()
    fast, slow = race(cached, naive, rounds=1, warm=False)  # the naive loop takes long
    speed = report("STARFlow, 49 tokens, 64 images, guidance", fast, slow, "without a cache")
    torch.testing.assert_close(made["cached"], made["naive"], rtol=1e-3, atol=1e-3)
    assert speed >= 5


@pytest.mark.skipif(not has("model", "starflow"), reason="STARFlow is not in")
@pytest.mark.parametrize("batch", [1, 16])
def test_starflow_sampling_by_jacobi(batch: int) -> None:
    """16 tokens guessed at a time against one after the other, both with their cache."""
    flow = our_flow()
    samplers = [registry().build("sampler", {"name": "starflow", "denoise": "none", "jacobi": n}) for n in (16, 0)]
    with torch.no_grad():
        times = race(*(lambda s=s: s(flow, flow_request(batch)) for s in samplers), rounds=3)  # type: ignore[misc]
        a, b = (s(flow, flow_request(batch)) for s in samplers)
    assert (a - b).square().mean() < 1e-2 * b.square().mean()
    what = f"STARFlow, 49 tokens, {batch} image{'s' * (batch > 1)}, Jacobi"
    assert report(what, *times, "one after the other") > 1 / SLACK


def fir(x: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """Every channel through the filter f, without padding."""
    return F.conv2d(x, f.flip(0, 1).expand(x.shape[1], 1, -1, -1), groups=x.shape[1])


def grouped_conv(
    x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor, f: torch.Tensor | None = None, demodulate: bool = True
) -> torch.Tensor:
    """Every image its own scaled weights, all of them in one grouped convolution. f: filter after doubling."""
    b, c, h, w = x.shape
    weight = weight * styles[:, None, :, None, None]  # (B, out, in, k, k)
    if demodulate:
        weight = weight * (weight.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    x = x.reshape(1, b * c, h, w)
    if f is None:
        return F.conv2d(x, weight.flatten(0, 1), padding=weight.shape[-1] // 2, groups=b).view(b, -1, h, w)
    x = F.conv_transpose2d(x, weight.transpose(1, 2).flatten(0, 1), stride=2, groups=b)
    return fir(F.pad(x.view(b, -1, 2 * h + 1, 2 * w + 1), (1, 1, 1, 1)), 4 * f)


def grouped_synthesis(g: Any, ws: torch.Tensor, noise: list[torch.Tensor]) -> torch.Tensor:
    """StyleGAN2's synthesis network as one writes it with grouped convolutions and no kernels of one's own."""
    f, maps, styles = g.resample_filter, iter(noise), ws.unbind(1)
    x, image, i = g.b4.const.expand(len(ws), -1, -1, -1), None, 0
    for block in g.blocks():
        for layer in block.convs():
            x = grouped_conv(x, layer.weight, layer.affine(styles[i]), f if layer.up else None)
            x = x + next(maps) * layer.noise_strength + layer.bias[:, None, None]
            x, i = F.leaky_relu(x, 0.2) * 2**0.5, i + 1
        if image is not None:
            image = F.pad(image[..., None, :, None], (0, 1, 0, 0, 0, 1)).flatten(-2).flatten(-3, -2)  # zeros between
            image = fir(F.pad(image, (2, 1, 2, 1)), 4 * f)
        scaled = block.torgb.affine(styles[i]) / block.torgb.weight.shape[1] ** 0.5
        rgb = grouped_conv(x, block.torgb.weight, scaled, demodulate=False) + block.torgb.bias[:, None, None]
        image = rgb if image is None else image + rgb
    assert image is not None
    return image


@pytest.mark.skipif(not has("model", "stylegan2"), reason="StyleGAN is not in")
@pytest.mark.parametrize("batch", [1, 8])
def test_stylegan_forward(batch: int) -> None:
    """The generator on 64 x 64 pixels against the same weights in grouped convolutions; the images are equal."""
    torch.manual_seed(0)
    net = registry().build("model", {"name": "stylegan2", "size": 64, "channel_base": 8192, "channel_max": 256}).eval()
    for name, p in net.named_parameters():
        if name.endswith("noise_strength"):
            torch.nn.init.constant_(p, 0.1)
    z, noise = torch.randn(batch, 512), [torch.randn(batch, *shape) for shape in net.noise_shapes]

    @torch.no_grad()
    def ours() -> torch.Tensor:
        return net(z, noise=noise)

    @torch.no_grad()
    def grouped() -> torch.Tensor:
        return grouped_synthesis(net, net.styles(net.map(z)), noise)

    torch.testing.assert_close(ours(), grouped(), rtol=1e-4, atol=1e-4)
    speed = report(f"StyleGAN2 generator, {batch} x 3 x 64 x 64, fp32", *race(ours, grouped), "grouped convolutions")
    assert speed > 1 / SLACK


@pytest.mark.parametrize(("batch", "shape"), [(256, (4, 32, 32)), (1024, (32, 16, 16)), (256, (3, 256, 256))])
def test_the_cost_of_a_draw_is_that_of_its_own_rows(batch: int, shape: tuple[int, ...]) -> None:
    """Of eight processes each draws an eighth; torch's generator draws the global batch in every one of them."""
    step = Step(0, world=8)

    def alone() -> None:
        Step(0).randn((batch, *shape), "noise")

    def eighth() -> None:
        step.randn((batch // 8, *shape), "noise")

    def whole() -> None:
        torch.randn(batch, *shape)

    size = "x".join(map(str, shape))
    report(f"noise for {batch} x {size}, one process", *race(alone, whole, rounds=3), "torch.randn")
    ours, peer = race(eighth, whole, rounds=3)
    report(f"noise for {batch} x {size}, one of 8 processes", ours, peer, "torch.randn of all")
    assert ours < peer


def test_the_race_is_fair() -> None:
    """A program against itself comes out even."""
    x = torch.randn(400, 400)

    def work() -> None:
        for _ in range(20):
            x @ x

    a, b = race(work, copy.copy(work), rounds=10)
    assert 0.7 < a / b < 1.4
