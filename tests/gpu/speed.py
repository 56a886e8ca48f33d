"""How fast: the trainer and the samplers against plain PyTorch loops of the same networks, and against the card's peak.

Model FLOPs are counted by torch on meta tensors (no recomputation counts); MFU is their rate over the rate of a large
bf16 matrix product measured on the same card minutes before. "plain" is what one would write by hand: the same network,
bf16 autocast, fused AdamW, noise drawn on the device, a batch that is already there, an average of the weights.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jobs import Job, digits, free, load, sentence
from torch import Tensor, nn

from vgm_cli.api import NullCondition, Step

PEAK_FILE = "peak.json"


def sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(step: Callable[[], Any], count: int, rounds: int = 3) -> float:
    """Median over rounds of the seconds of one step, `count` steps a round, the device's work waited for."""
    found = []
    for _ in range(rounds):
        sync()
        began = time.perf_counter()
        for _ in range(count):
            step()
        sync()
        found.append((time.perf_counter() - began) / count)
    return sorted(found)[len(found) // 2]


def gib() -> float:
    """Peak of what tensors took since the last call."""
    if not torch.cuda.is_available():
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


# -- the ceilings -----------------------------------------------------------------------------------------------------


def peak_path() -> Path:
    return Path(os.environ.get("VGM_CACHE", "/tmp")) / PEAK_FILE


def measure_peak(device: torch.device, dry: bool = False) -> dict[str, float]:
    """TFLOP/s of a bf16 matrix product of random numbers, TB/s of a copy (bytes read and written)."""
    n = 256 if dry else 8192
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    for _ in range(3):
        a @ b
    seconds = timed(lambda: a @ b, 2 if dry else 20)
    source = torch.empty(2**16 if dry else 2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = timed(lambda: target.copy_(source), 2 if dry else 10)
    return {"bf16_tflops": 2 * n**3 / seconds / 1e12, "copy_tbs": 2 * source.numel() / copying / 1e12}


def peak(job: Job) -> None:
    found = measure_peak(job.device, job.dry)
    peak_path().parent.mkdir(parents=True, exist_ok=True)
    peak_path().write_text(json.dumps(found))
    job.row("bf16 8192 x 8192 x 8192, copy", tflops=found["bf16_tflops"], copy_tb_per_s=found["copy_tbs"])


def ceilings(job: Job) -> dict[str, float]:
    """Measured by `peak` before, or now."""
    if not peak_path().exists():
        found = measure_peak(job.device, job.dry)
        peak_path().parent.mkdir(parents=True, exist_ok=True)
        peak_path().write_text(json.dumps(found))
    return dict(json.loads(peak_path().read_text()))


# -- our trainer ------------------------------------------------------------------------------------------------------


@contextmanager
def built_on(device: torch.device) -> Iterator[None]:
    """Weights are drawn on the card: drawing 700 M of them on the CPU would take longer than the measurement. Drawn
    ones do for networks that a user trains before or reads from a file, too: they are as fast as any."""
    from vgm_cli.engine import build
    from vgm_cli.nets.foundation import VisionFeatures

    original, check = build.build_component, build.Built.check_parts

    def made(kind: str, *args: Any, **kwargs: Any) -> Any:
        with torch.device(device) if kind == "model" else nullcontext():
            found = original(kind, *args, **kwargs)
        if isinstance(found[0], VisionFeatures):
            found[0].loaded = True
        return found

    build.build_component, build.Built.check_parts = made, lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        build.build_component, build.Built.check_parts = original, check  # type: ignore[method-assign]


WORDS = ("red", "green", "blue", "circle", "square", "triangle")


def latents_of(
    shape: tuple[int, ...], classes: int, vocab: int = 0, n: int = 512, columns: Sequence[str] = (), side: int = 0
) -> Any:
    """Synthetic latents (or tokens) in memory, as a cache of a codec's output holds them, with captions of WORDS and
    coloured pictures of this side in every column."""
    from vgm_cli.data.latents import MemoryLatents

    class Synthetic(MemoryLatents):
        drawn = False

        def describe(self) -> dict[str, Any]:
            return {"source": "synthetic"}

        def fingerprint(self, full: bool = False) -> str:
            return "synthetic"

    g = torch.Generator().manual_seed(0)
    moments = torch.randint(vocab, (n, *shape), generator=g) if vocab else torch.randn(n, *shape, generator=g)
    labels = (torch.arange(n) % max(classes, 1)).numpy()
    captions = [f"{WORDS[i % 3]} {WORDS[3 + i // 3 % 3]}" for i in range(n)]
    beside = {c: torch.randint(256, (n, 3, side, side), generator=g, dtype=torch.uint8) for c in columns}
    return Synthetic(moments, moments.flip(-1), labels, captions, beside)


def moments_of(codec_node: dict[str, Any], image: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of what a codec makes of one image, from its outline."""
    from vgm_cli.registry import registry

    with torch.device("meta"), torch.no_grad():
        return tuple(registry().build("codec", codec_node).encode(torch.empty(1, *image)).shape[1:])


def feed_of(codec_node: dict[str, Any], output: str | None, classes: int = 1000) -> Callable[..., Any]:
    """What the trainer eats in place of a data set: latents behind a real, untrained codec of the published size."""

    def open_feed(recipe: Any, run: Any, accelerator: Any, micro_size: int) -> Any:
        from vgm_cli.engine import build
        from vgm_cli.engine.conditions import columns_of
        from vgm_cli.engine.tokens import as_output
        from vgm_cli.engine.train import data_feed
        from vgm_cli.registry import registry

        with torch.device(accelerator.device):
            codec = registry().build("codec", codec_node)
        codec = as_output(codec.eval().requires_grad_(False), output)
        data = recipe.node("data")
        labelled = data.labels is not False
        columns = columns_of(recipe.config.get("conditions"))
        told = {"num_classes": classes if labelled else 0, "columns": dict.fromkeys(columns, 3)}
        facts = build.Facts.of_pixels(data.size or 256, 3, **told).after(codec)
        shape = facts.grid if facts.vocab_size else moments_of(codec_node, facts.image_shape)
        count = 2 * micro_size if columns else 512
        latents = latents_of(shape, classes, facts.vocab_size, count, columns, facts.image_size)
        return data_feed.Feed(
            data=data,
            dataset=latents,
            facts=facts,
            labelled=labelled,
            seed=0,
            rank=0,
            world=1,
            size=micro_size,
            device=accelerator.device,
            codec=codec,
            cache=latents,
        )

    return open_feed


def trainer_of(recipe: Any, open_feed: Any = None, roles: Any = None) -> Any:
    """A trainer ready to step."""
    from vgm_cli.engine.train import data_feed, setup

    accelerator = setup.make_accelerator(recipe, "none")
    run = setup.open_run(recipe, Path(tempfile.mkdtemp(dir=Path.cwd())) / "run", False, True, accelerator)
    return setup.Trainer(recipe, run, accelerator, roles or {}, "none", open_feed or data_feed.open_feed)


def stepping(made: Any) -> Callable[[], Any]:
    """One step of the trainer's loop at each call, with what its loop does besides."""
    from vgm_cli.engine.train.loop import update

    batches = made.feed.batches(0)
    count = iter(range(10**9))
    return lambda: update(made, next(count), batches)


def waits(step: Callable[[], Any]) -> tuple[Counter[str], dict[str, Any]]:
    """Where one step makes the CPU wait for the device, by line of code; and what the profiler counts in two, without
    the one wait that ends the measurement."""
    import traceback

    found: Counter[str] = Counter()
    root = str(Path(__file__).resolve().parents[2])

    def note(message: Any, *args: Any, **kwargs: Any) -> None:
        if "called a synchronizing" not in str(message):  # the mode itself warns too
            return
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(root) or "vgm_" in f.filename]
        frames = [f for f in frames if "tests/gpu" not in f.filename]
        at = frames[-1] if frames else traceback.extract_stack()[-3]
        found[f"{'/'.join(Path(at.filename).parts[-3:])}:{at.lineno}"] += 1

    sync()
    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = before
    sync()
    steps = 2
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as prof:
        began = time.perf_counter()
        for _ in range(steps):
            step()
        done = torch.cuda.Event()
        done.record()
        while not done.query():  # waiting as such would be counted
            time.sleep(1e-4)
        wall = time.perf_counter() - began
    counts: Counter[str] = Counter()
    busy = 0.0
    for event in prof.events():
        if event.name in ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"):
            counts[event.name] += 1
        if "Memcpy DtoH" in event.name or "Memcpy HtoD" in event.name:
            counts[event.name] += 1
        kernel = str(getattr(event, "device_type", "")).endswith("CUDA")
        if kernel and not getattr(event, "is_user_annotation", False):
            busy += event.time_range.elapsed_us()
    counts["cudaDeviceSynchronize"] -= 1  # the profiler's own, at its end
    return found, {"busy": busy / 1e6 / wall, **{k: v / steps for k, v in counts.items() if v > 0}}


# -- plain loops ------------------------------------------------------------------------------------------------------


def plain_training(
    network: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    device: torch.device,
    ema: bool = True,
    clip: float | None = None,
) -> Callable[[], None]:
    params = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)
    average = [p.detach().clone() for p in params] if ema else []

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            value = loss(network)
        value.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average:
            torch._foreach_lerp_(average, [p.detach() for p in params], 1e-4)

    return step


def denoising(batch: dict[str, Tensor], channels: int) -> Callable[[nn.Module], Tensor]:
    """DDPM's simple loss: noise the batch, predict the noise."""
    betas = torch.linspace(1e-4, 0.02, 1000, device=batch["x"].device)
    bar = (1 - betas).cumprod(0)
    x, y = batch["x"], batch["label"]

    def loss(network: nn.Module) -> Tensor:
        t, noise = torch.randint(1000, (len(x),), device=x.device), torch.randn_like(x)
        a = bar[t].view(-1, 1, 1, 1)
        out = network(a.sqrt() * x + (1 - a).sqrt() * noise, t, dropped(network, y))
        return F.mse_loss(out[:, :channels].float(), noise)

    return loss


def dropped(network: nn.Module, y: Tensor) -> Tensor:
    """The labels, one in ten of them the null class."""
    if not isinstance(network, NullCondition):
        return y
    return torch.where(torch.rand(len(y), device=y.device) < 0.1, network.null_condition({"y": y})["y"], y)


def flowing(batch: dict[str, Tensor]) -> Callable[[nn.Module], Tensor]:
    """Flow matching on the straight path."""
    x, y = batch["x"], batch["label"]

    def loss(network: nn.Module) -> Tensor:
        t, noise = torch.rand(len(x), device=x.device), torch.randn_like(x)
        s = t.view(-1, 1, 1, 1)
        return F.mse_loss(network(s * x + (1 - s) * noise, t, dropped(network, y)).float(), x - noise)

    return loss


class DeviceStep(Step):
    """A plain loop's randomness for an objective's loss: the device's own stream, whatever the draw is called."""

    def randn(self, shape: Iterable[int], name: str) -> Tensor:
        return torch.randn(*shape, device=self.device)

    def rand(self, n: int | Iterable[int], name: str) -> Tensor:
        return torch.rand(n, device=self.device)

    def randint(self, high: int, n: int, name: str) -> Tensor:
        return torch.randint(high, (n,), device=self.device)


def plain_objective(made: Any, batch: dict[str, Tensor], bf16: bool, clip: float | None) -> Callable[[], None]:
    """The objective's losses, backward, fused optimizers, averages: the trainer's work without the trainer. made: a
    trainer, whose networks are taken over."""
    from vgm_cli.engine.train import optim

    device, objective, phases, conditions = made.device, made.objective, made.phases, made.conditions
    optimizers, members = {}, {}
    for name in dict.fromkeys(p.optimizer for p in phases):
        members[name] = list(optim.members(name, phases, made.parts).values())
        optimizers[name] = torch.optim.AdamW(members[name], lr=1e-6, fused=True)
    everything = {id(q): q for part in made.parts.values() for q in part.values()}
    average = [(q.detach().clone(), q) for q in made.parts.get("model", {}).values()] if made.averages else []
    count = iter(range(10**9))

    def step() -> None:
        index = next(count)
        s = DeviceStep(index, total=10**6, device=device)
        for phase in phases:
            if index % phase.every:
                continue
            mine = {id(q) for name in phase.trains for q in made.parts[name].values()}
            if len(phases) > 1:
                for key, q in everything.items():
                    q.requires_grad_(key in mine)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, _ = objective.loss(phase.name, conditions.apply(conditions.apply(batch, s), s, trained=True), s)
            (loss * phase.gain).backward()
            limit = phase.clip if phase.clip is not None else clip
            if limit is not None:
                torch.nn.utils.clip_grad_norm_(members[phase.optimizer], limit)
            optimizers[phase.optimizer].step()
            optimizers[phase.optimizer].zero_grad(set_to_none=True)
        objective.after_step(s)
        if average:
            torch._foreach_lerp_([a for a, _ in average], [q.detach() for _, q in average], 1e-3)

    return step


# -- training ---------------------------------------------------------------------------------------------------------


def flops(recipe: Any, facts: Any) -> float:
    """Of a training step, forward and backward, for one image."""
    from vgm_cli.engine import build
    from vgm_cli.engine.train import plan

    with torch.device("meta"):
        made = build.build_objective(recipe, facts)
    return plan.count_flops(made, facts)[1] or float("nan")


def training(
    job: Job,
    what: str,
    recipe: Any,
    open_feed: Any = None,
    plain: Callable[[dict[str, Tensor]], Callable[[nn.Module], Tensor]] | None = None,
    steps: int = 8,
    warm: int = 3,
    cycle: int = 1,
    profile: bool = True,
) -> None:
    """Ours, then the plain loop, then what waits; one row each. plain: a batch -> the plain loop's loss of the network;
    without it the plain loop calls the objective. cycle: steps after which phases repeat."""
    ceiling = ceilings(job)["bf16_tflops"]
    opts = recipe.node("train")
    steps, warm = (cycle, cycle) if job.dry else (max(steps, cycle), max(warm, cycle))
    gib()
    began = time.time()
    with built_on(job.device):
        made = trainer_of(recipe, open_feed)
    step = stepping(made)
    for _ in range(warm):
        step()
    sync()
    ready = time.time() - began
    ours = timed(step, steps, 1 if job.dry else 2)
    peak_memory = gib()
    images = opts.batch_size
    try:
        per_image = flops(recipe, made.facts)
    except Exception as e:
        print("FLOPs:", sentence(e))
        per_image = float("nan")
    tflops = per_image * images / ours / 1e12
    compiled = any(n._compiled_call_impl is not None for n in made.networks.values())
    own = {"batch": images, "compiled": compiled, "checkpointing": bool(opts.checkpointing)}
    job.row(f"{what}: ours", ms=ours * 1e3, images_per_s=images / ours, mfu=tflops / ceiling, gib=peak_memory,
            ready_s=ready, tflop_per_image=per_image / 1e12, **own)  # fmt: skip
    if profile and job.device.type == "cuda":
        try:
            found, counts = waits(step)
            job.row(f"{what}: waits in a step", at=dict(found) or "none", **counts)
        except Exception as e:
            job.row(f"{what}: waits in a step", error=sentence(e))
    batch = made.feed.to_model(next(made.feed.batches(0)), made.step(0))
    bf16 = made.acc.mixed_precision == "bf16"
    if plain is None:
        made.optimizers.clear()
        other = plain_objective(made, batch, bf16, opts.clip)
    else:
        ema = bool(made.averages)
        network = made.networks["model"]  # as it is: compiled, its blocks recomputed, channels last
        del made, step
        free()
        other = plain_training(network, plain(batch), job.device, ema, opts.clip)
    gib()
    for _ in range(warm):
        other()
    theirs = timed(other, steps, 1 if job.dry else 2)
    job.row(f"{what}: plain", ms=theirs * 1e3, images_per_s=images / theirs,
            mfu=per_image * images / theirs / 1e12 / ceiling, gib=gib(), ours_over_plain=theirs / ours)  # fmt: skip
    if ours > 1.05 * theirs and not job.dry:
        job.fail(f"{what}: ours takes {ours / theirs:.2f} times as long as the plain loop")


def large(job: Job, name: str, *more: str, batch: int, small: tuple[str, ...] = ()) -> Any:
    """A published recipe cut to its steps; in a dry run, `small` makes it one for a CPU."""
    own = ["train.steps=1000000", f"train.batch_size={4 if job.dry else batch}", "train.preview_n=0"]
    if job.dry:
        return load(name, *own, *more, *small, "train.precision=fp32", "train.compile=off")
    return load(name, *own, *more)


KL = {"name": "autoencoder-kl", "preset": "kl-f8"}
SMALL_KL = {"name": "autoencoder-kl", "ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}
SMALL_DIT = ("model.preset=null", "model.hidden_size=32", "model.depth=1", "model.num_heads=2")
BATCH = 128


def dit_recipe(job: Job, *more: str, batch: int = BATCH) -> Any:
    return large(job, "dit/imagenet256", "train.compile=on", *more, batch=batch, small=SMALL_DIT)


def sit_recipe(job: Job, *more: str) -> Any:
    return large(job, "sit/imagenet256", "train.compile=on", *more, batch=BATCH, small=SMALL_DIT)


def llama_recipe(job: Job) -> Any:
    small = ("model.preset=null", "model.n_layer=1", "model.n_head=2", "model.dim=64")
    sizes = () if job.dry else ("model.preset=GPT-XL",)
    return large(job, "llamagen/imagenet256", "train.compile=on", *sizes, batch=64, small=small)


def kl_feed(job: Job) -> Callable[..., Any]:
    return feed_of(SMALL_KL if job.dry else KL, None)


def token_feed(job: Job) -> Callable[..., Any]:
    return feed_of({"name": "llamagen-tokenizer", "preset": "VQ-16"}, "tokens")


def warm(job: Job, part: str) -> None:
    """Compile what is timed later; the compiler keeps it in its cache."""
    recipes = (dit_recipe, kl_feed), (sit_recipe, kl_feed), (llama_recipe, token_feed)
    what = ("DiT-XL/2", "SiT-XL/2", "LlamaGen-XL")[int(part)]
    recipe, feed = recipes[int(part)]
    began = time.time()
    with built_on(job.device):
        made = trainer_of(recipe(job), feed(job))
    step = stepping(made)
    step()
    step()
    sync()
    job.row(f"{what} compiled", seconds=time.time() - began, gib=gib())


def dit(job: Job) -> None:
    training(job, "DiT-XL/2 256", dit_recipe(job), kl_feed(job), lambda b: denoising(b, 4))


def checkpointing(job: Job) -> None:
    recipe = dit_recipe(job, "train.compile=off", "train.checkpointing=true", batch=2 * BATCH)
    training(job, "DiT-XL/2 256 checkpointed", recipe, kl_feed(job), lambda b: denoising(b, 4), steps=3, profile=False)


def sit(job: Job) -> None:
    training(job, "SiT-XL/2 256", sit_recipe(job), kl_feed(job), flowing, steps=6)


def llamagen(job: Job) -> None:
    def loss_of(batch: dict[str, Tensor]) -> Callable[[nn.Module], Tensor]:
        ids, y = batch["tokens"].flatten(1), batch["label"]

        def loss(network: nn.Module) -> Tensor:
            return F.cross_entropy(network(ids[:, :-1], y).flatten(0, 1).float(), ids.flatten())

        return loss

    training(job, "LlamaGen-XL 256", llama_recipe(job), token_feed(job), loss_of, steps=6)


def images(side: int, n: int, classes: int) -> Path:
    """Random pictures as a data set."""
    import numpy as np

    path = Path.cwd() / f"images-{side}.npz"
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    np.savez(path, images=pictures, **({"labels": np.arange(n) % classes} if classes else {}))
    return path


def adm(job: Job) -> None:
    side = 32 if job.dry else 256
    small = ("model.preset=null", "model.model_channels=32", "model.num_res_blocks=1", "model.channel_mult=[1,1]",
             "model.attention_resolutions=[2]", "model.num_head_channels=32")  # fmt: skip
    data = (f"data.path={images(side, 64, 10)}", f"data.size={side}", "data.workers=0", "data.crop=center")
    recipe = large(job, "adm-unet/imagenet256", "train.compile=off", *data, batch=16, small=small)
    training(job, "ADM-256", recipe, None, lambda b: denoising(b, 3), steps=4, warm=2)


def stylegan2(job: Job) -> None:
    side = 32 if job.dry else 256
    small = (
        "model.preset=auto",
        "roles.discriminator.preset=auto",
        "model.size=32",
        "roles.discriminator.size=32",
        "model.channel_max=16",
        "roles.discriminator.channel_max=16",
    )
    data = (f"data.path={images(side, 128, 0)}", f"data.size={side}", "data.workers=0")
    recipe = large(job, "stylegan/stylegan2-ada-256", "train.compile=off", *data, batch=32, small=small)
    training(job, "StyleGAN2-256", recipe, steps=16, cycle=4 if job.dry else 16)


def glow(job: Job) -> None:
    side = 32 if job.dry else 64
    small = ("model.preset=null", "model.levels=2", "model.depth=2", "model.width=16")
    data = (f"data.path={images(side, 128, 10)}", f"data.size={side}", "data.workers=0", "data.count=null")
    small = (*small, "objective.prepare_size=4")
    recipe = large(job, "glow/imagenet64", "train.compile=off", *data, batch=64, small=small)
    training(job, "Glow 64 (L 4, K 48)", recipe, steps=3, warm=2)


def dmd(job: Job) -> None:
    if job.dry:
        return training(job, "DMD2 digits", load("dmd/mnist", "train.batch_size=4", "train.precision=fp32",
                        "train.compile=off", f"data.path={digits(Path.cwd())}"), cycle=2)  # fmt: skip
    data = (f"data.path={images(64, 128, 10)}", "data.size=64", "data.workers=0")
    recipe = large(job, "dmd/imagenet64", "train.compile=off", *data, batch=32)
    training(job, "DMD2 64 (EDM UNet)", recipe, steps=10, cycle=5)


# -- sampling ---------------------------------------------------------------------------------------------------------


def dit_sampling(job: Job) -> None:
    """64 images, 50 DDPM steps, guided, bf16: `vgm sample`'s work without the decoder, against the bare loop."""
    from vgm_cli.api import Request, generators
    from vgm_cli.engine import checkpoint as ckpt
    from vgm_cli.engine.sample import loop as generate
    from vgm_cli.registry import registry

    n, steps, side = (2, 2, 32) if job.dry else (64, 50, 32)
    size = {"depth": 1, "hidden_size": 32, "num_heads": 2} if job.dry else {"preset": "DiT-XL/2"}
    with torch.device(job.device):
        network = registry().build("model", {"name": "dit", **size}).eval().requires_grad_(False)
    objective = registry().build("objective", {"name": "iddpm", "schedule": "linear"}, model=network)
    view = ckpt.build_view(network, objective.view())
    sampler = registry().build("sampler", {"name": "ddpm", "steps": steps, "cfg_channels": 3})
    y = torch.arange(n, device=job.device) % 1000

    def ours() -> Tensor:
        request = Request(
            shape=(4, side, side), generators=generators(range(n)), cond={"y": y}, guidance_scale=1.5, device=job.device
        )
        with torch.no_grad(), generate.autocast("bf16", job.device):
            return sampler(view, request)

    betas = torch.linspace(1e-4, 0.02, 1000, device=job.device)
    bar = (1 - betas).cumprod(0)
    times = torch.linspace(999, 0, steps, device=job.device).long()
    both = torch.cat([y, torch.full_like(y, 1000)])

    @torch.no_grad()
    def plain() -> Tensor:
        x = torch.randn(n, 4, side, side, device=job.device)
        for i in range(steps):
            t = times[i]
            with torch.autocast(job.device.type, torch.bfloat16):
                out = network(torch.cat([x, x]), t.expand(2 * n), both)
            cond, null = out[:, :4].float().chunk(2)
            eps = null + 1.5 * (cond - null)
            a, b = bar[t], bar[times[i + 1]] if i + 1 < steps else torch.ones((), device=x.device)
            x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
            sigma = ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
            x = b.sqrt() * x0 + (1 - b - sigma**2).clamp_min(0).sqrt() * eps + sigma * torch.randn_like(x)
        return x

    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        meta = registry().build("model", {"name": "dit", **size})
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            meta(torch.empty(2, 4, side, side), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    per_image = counter.get_total_flops() / 2 * 2 * steps
    gib()
    ours()
    a = timed(ours, 1, 1 if job.dry else 2)
    memory = gib()
    plain()
    b = timed(plain, 1, 1 if job.dry else 2)
    rate = per_image * n / a / 1e12 / ceilings(job)["bf16_tflops"]
    job.row(
        f"DiT-XL/2, {n} images, {steps} guided steps", ours_s=a, plain_s=b, ours_over_plain=b / a, mfu=rate, gib=memory
    )
    if job.device.type == "cuda":
        sampler.steps = 4  # what every step does, seen in four
        found, counts = waits(ours)
        job.row("waits in a sampling of 4 steps", at=dict(found.most_common(6)) or "none", **counts)
    if a > 1.05 * b and not job.dry:
        job.fail(f"sampling takes {a / b:.2f} times as long as the plain loop")


def llamagen_sampling(job: Job) -> None:
    """LlamaGen-XL with its cache, guided, against the same network without one's help: a bare loop of its decoder."""
    from vgm_cli.api import Request, generators
    from vgm_cli.engine.sample import loop as generate
    from vgm_cli.nets.llama import Decoder
    from vgm_cli.registry import registry

    n = 2 if job.dry else 32
    size: dict[str, Any] = {"n_layer": 1, "n_head": 2, "dim": 64, "grid": [4, 4]} if job.dry else {"preset": "GPT-XL"}
    facts = {"vocab_size": 16384, "num_classes": 1000}
    with torch.device(job.device):
        network = registry().build("model", {"name": "llamagen", **size, **facts}).eval().requires_grad_(False)
    y = torch.arange(n, device=job.device) % 1000
    sampler = registry().build("sampler", {"name": "llamagen"})
    tokens = network.block_size

    def ours() -> Tensor:
        request = Request(
            shape=network.grid, generators=generators(range(n)), cond={"y": y}, guidance_scale=2.0, device=job.device
        )
        with torch.no_grad(), generate.autocast("bf16", job.device):
            return sampler(network, request)

    half = copy.deepcopy(network).bfloat16()

    @torch.no_grad()
    def plain() -> Tensor:
        decoder = Decoder(half, torch.cat([y, torch.full_like(y, network.num_classes)]))
        logits, ids = decoder.first(), []
        for i in range(tokens):
            cond, null = logits.float().chunk(2)
            ids.append(torch.multinomial((null + 2.0 * (cond - null)).softmax(-1), 1)[:, 0])
            if i + 1 < tokens:
                logits = decoder.step(ids[-1].repeat(2))
        return torch.stack(ids, 1)

    gib()
    ours()
    a = timed(ours, 1, 1)
    memory = gib()
    plain()
    b = timed(plain, 1, 1)
    weights = sum(p.numel() * 2 for p in half.parameters())
    floor = tokens * weights / (ceilings(job)["copy_tbs"] / 2 * 1e12 * 2)
    job.row(f"LlamaGen-XL, {n} images of {tokens} tokens, guided", ours_s=a, plain_s=b, ours_over_plain=b / a,
            tokens_per_s=n * tokens / a, weights_floor_s=floor, gib=memory)  # fmt: skip
    if a > 1.05 * b and not job.dry:
        job.fail(f"sampling takes {a / b:.2f} times as long as the plain loop")


CHECKS: dict[str, Callable[..., None]] = {
    "peak": peak,
    "warm": warm,
    "dit": dit,
    "checkpointing": checkpointing,
    "sit": sit,
    "llamagen": llamagen,
    "adm": adm,
    "stylegan2": stylegan2,
    "glow": glow,
    "dmd": dmd,
    "dit-sampling": dit_sampling,
    "llamagen-sampling": llamagen_sampling,
}
