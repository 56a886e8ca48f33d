"""Our training and sampling steps against the official code, in turns in one process: `make race CHECKOUTS=FOLDER`.

FOLDER holds checkouts of the repositories by their names (DiT, SiT, guided-diffusion, LlamaGen, glow-pytorch,
stylegan2-ada-pytorch, score_sde_pytorch, VAR, mar); rows whose checkout is missing are left out. Both networks have the
same sizes and the same work; a row gives the ratio of best times in fp32, the ratio with the defaults that a user of vgm
gets on this machine (bf16 where it has bf16 arithmetic, channels last for convolutions), and the roofline: which share
of this machine's measured rate of fp32 matrix products our fp32 step reaches. ROUNDS=5 is the number of turns.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vgm_cli.api import Request, Step, generators
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.environment import bf16_supported
from vgm_cli.engine.processes import keep_memory
from vgm_cli.engine.train.plan import Unfollowed
from vgm_cli.registry import registry

ROUNDS = int(os.environ.get("ROUNDS", "5"))
Work = Callable[[], Any]
OWN = ("diffusion", "models", "model", "utils", "training", "torch_utils", "dnnlib", "transport", "dist", "op", "sde_lib",
       "losses", "autoregressive", "guided_diffusion")  # fmt: skip


# -- what the official code imports and a CPU does not need -----------------------------------------------------------


class PatchEmbed(nn.Module):
    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.patch_size, self.num_patches = (patch_size, patch_size), (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False, **_: Any) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = num_heads, nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class Mlp(nn.Module):
    def __init__(self, in_features: int, hidden_features: int, act_layer: Any = nn.GELU, **_: Any) -> None:
        super().__init__()
        self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, norm_layer: Any, **_: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)
        self.attn, self.mlp = Attention(dim, num_heads, qkv_bias), Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def stand_in(name: str, **content: Any) -> None:
    """A module where none is installed. timm would bring torchvision, the others are not called."""
    try:
        importlib.import_module(name)
    except ImportError:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(content)


def stand_ins() -> None:
    stand_in("timm")
    stand_in("timm.models")
    stand_in("timm.models.vision_transformer", PatchEmbed=PatchEmbed, Attention=Attention, Mlp=Mlp, Block=Block)
    stand_in("mpi4py", MPI=None)
    stand_in("blobfile")
    stand_in("torchdiffeq", odeint=None)


def official(folder: Path, *names: str) -> list[Any]:
    """Import modules from a checkout, forgetting those of another that are called the same."""
    for k in [k for k in sys.modules if k.split(".")[0] in OWN]:
        del sys.modules[k]
    sys.path.insert(0, str(folder))
    try:
        return [importlib.import_module(n) for n in names]
    finally:
        sys.path.remove(str(folder))


@contextlib.contextmanager
def without_gpu() -> Iterator[None]:
    """`.cuda()` in the official code does nothing."""
    before = Tensor.cuda
    Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.cuda = before  # type: ignore[method-assign]


# -- timing ------------------------------------------------------------------------------------------------------------


def best_of(*works: Work, rounds: int = ROUNDS) -> list[float]:
    """Best seconds of each, taking turns after a first time."""
    for work in works:
        work()
    best = [float("inf")] * len(works)
    for _ in range(rounds):
        for i, work in enumerate(works):
            began = time.perf_counter()
            work()
            best[i] = min(best[i], time.perf_counter() - began)
    return best


def peak(n: int = 1024) -> float:
    """FLOP/s of fp32 matrix products of this size, the best of a few."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    return 2 * n**3 / best_of(lambda: a @ b, rounds=10)[0]


def training(net: nn.Module, loss: Callable[[], Tensor], bf16: bool = False, fused: bool = False) -> Work:
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-5, fused=fused)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def half(work: Work) -> Work:
    """In bf16 where this machine computes in it."""

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16) if bf16_supported() else contextlib.nullcontext():
            work()

    return run


def no_grad(work: Work) -> Work:
    return torch.no_grad()(work)


def built(kind: str, node: dict[str, Any], **roles: Any) -> Any:
    torch.manual_seed(0)
    return registry().build(kind, dict(node), **roles)


def ours(
    model: dict[str, Any], objective: dict[str, Any], batch: dict[str, Any], convolutional: bool = False
) -> list[Work]:
    """Our step in fp32, and with the defaults."""
    works = []
    for defaults in (False, True):
        net = built("model", model).train()
        own = dict(batch)
        if defaults and convolutional:
            net = net.to(memory_format=torch.channels_last)
            own["x"] = own["x"].to(memory_format=torch.channels_last)
        learner, count = built("objective", objective, model=net), iter(range(10**9))
        learner.prepare(own, Step(0))
        loss = lambda o=learner, c=count, b=own: o.loss("main", b, Step(next(c)))[0]
        works.append(training(net, loss, defaults and bf16_supported(), True))
    return works


class Race:
    """Prints a row of the table as soon as it is known."""

    def __init__(self) -> None:
        keep_memory()
        self.peak = peak()
        half_name = "bf16" if bf16_supported() else "fp32: no bf16 arithmetic here"
        print(
            f"{torch.get_num_threads()} threads, torch {torch.__version__}, fp32 products at {self.peak / 1e9:.0f} GFLOP/s"
        )
        print(
            f"\n| step | official | ours, fp32 | | ours, defaults ({half_name}) | | roofline |\n|---|---|---|---|---|---|---|"
        )

    def row(self, what: str, peer: Work, mine: Work, defaults: Work, rounds: int = ROUNDS) -> None:
        theirs, own, quick = best_of(peer, mine, defaults, rounds=rounds)
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = Unfollowed()
        with counter:
            mine()
        share = counter.get_total_flops() / own / self.peak
        print(f"| {what} | {theirs * 1e3:.0f} ms | {own * 1e3:.0f} ms | {theirs / own:.2f}× | {quick * 1e3:.0f} ms | "
              f"{theirs / quick:.2f}× | {100 * share:.0f} % |", flush=True)  # fmt: skip


def same_size(peer: nn.Module, model: dict[str, Any], slack: float = 0.02) -> None:
    a, b = (sum(p.numel() for p in n.parameters() if p.requires_grad) for n in (peer, built("model", model)))
    assert abs(a - b) <= slack * a, f"other sizes: official {a}, ours {b}"


# -- rows --------------------------------------------------------------------------------------------------------------

TRANSFORMER = {"depth": 6, "hidden_size": 384, "num_heads": 6, "patch_size": 2, "input_size": 32, "in_channels": 4,
               "num_classes": 1000}  # fmt: skip


def dit(folder: Path, race: Race) -> None:
    models, diffusion = official(folder / "DiT", "models", "diffusion")
    peer, process = models.DiT(**TRANSFORMER), diffusion.create_diffusion("")
    model = {"name": "dit", **TRANSFORMER}
    same_size(peer, model)
    x, y = torch.randn(8, 4, 32, 32), torch.arange(8)
    loss = lambda: process.training_losses(peer.train(), x, torch.randint(0, 1000, (8,)), {"y": y})["loss"].mean()
    node = {"name": "iddpm", "schedule": "linear"}
    race.row(
        "DiT, training, 8 × 256 tokens × 384", training(peer, loss), *ours(model, node, {"x": x, "cond": {"y": y}})
    )
    net = built("model", model).eval()
    view = ckpt.build_view(net, built("objective", node, model=net).view())
    sampler, short = (
        built("sampler", {"name": "ddpm", "steps": 10, "cfg_channels": 3}),
        diffusion.create_diffusion("10"),
    )
    z, both = torch.randn(4, 4, 32, 32).repeat(2, 1, 1, 1), torch.cat([torch.arange(4), torch.full((4,), 1000)])

    def theirs() -> None:
        short.p_sample_loop(peer.eval().forward_with_cfg, z.shape, z, clip_denoised=False,
                            model_kwargs={"y": both, "cfg_scale": 4.0}, progress=False, device="cpu")  # fmt: skip

    def mine() -> None:
        sampler(view, Request((4, 32, 32), generators(range(4)), cond={"y": torch.arange(4)}, guidance_scale=4.0))

    race.row("DiT, 4 images, 10 guided DDPM steps", *map(no_grad, (theirs, mine, half(mine))))


def sit(folder: Path, race: Race) -> None:
    models, transport = official(folder / "SiT", "models", "transport")
    peer, plan = models.SiT(**TRANSFORMER), transport.create_transport()
    x, y = torch.randn(8, 4, 32, 32), torch.arange(8)
    loss = lambda: plan.training_losses(peer.train(), x, {"y": y})["loss"].mean()
    node = {"name": "flow-matching", "path": "linear", "prediction": "velocity"}
    model = {"name": "sit", **TRANSFORMER}
    same_size(peer, model)
    race.row(
        "SiT, training, 8 × 256 tokens × 384", training(peer, loss), *ours(model, node, {"x": x, "cond": {"y": y}})
    )


def adm(folder: Path, race: Race) -> None:
    unet, process = official(
        folder / "guided-diffusion", "guided_diffusion.unet", "guided_diffusion.gaussian_diffusion"
    )
    sizes: dict[str, Any] = {"image_size": 64, "in_channels": 3, "model_channels": 64, "out_channels": 6, "num_res_blocks": 2,
                             "attention_resolutions": (2, 4), "channel_mult": (1, 2, 3), "num_classes": 10,
                             "num_head_channels": 64, "use_scale_shift_norm": True, "resblock_updown": True}  # fmt: skip
    peer = unet.UNetModel(**sizes, use_new_attention_order=False)
    diffusion = process.GaussianDiffusion(
        betas=process.get_named_beta_schedule("linear", 1000), model_mean_type=process.ModelMeanType.EPSILON,
        model_var_type=process.ModelVarType.LEARNED_RANGE, loss_type=process.LossType.RESCALED_MSE, rescale_timesteps=False,
    )  # fmt: skip
    model = {"name": "adm-unet", **sizes, "learn_sigma": True}
    same_size(peer, model)
    x, y = torch.randn(4, 3, 64, 64), torch.arange(4)
    loss = lambda: diffusion.training_losses(peer, x, torch.randint(0, 1000, (4,)), {"y": y})["loss"].mean()
    works = ours(model, {"name": "iddpm", "schedule": "linear"}, {"x": x, "cond": {"y": y}}, convolutional=True)
    race.row("ADM U-Net, training, 4 × 3 × 64 × 64", training(peer, loss), *works)


def llamagen(folder: Path, race: Race) -> None:
    gpt, generate = official(folder / "LlamaGen", "autoregressive.models.gpt", "autoregressive.models.generate")
    sizes: dict[str, Any] = {"dim": 384, "n_layer": 6, "n_head": 6, "vocab_size": 1024, "num_classes": 10}
    make = lambda: gpt.Transformer(gpt.ModelArgs(**sizes, block_size=256, cls_token_num=1, model_type="c2i"))
    model = {"name": "llamagen", "grid": (16, 16), **sizes}
    peer = make().train()
    same_size(peer, model)
    codes, y = torch.randint(0, 1024, (8, 256)), torch.arange(8)
    batch = {"tokens": codes.view(8, 16, 16), "cond": {"y": y}}
    loss = lambda: peer(cond_idx=y, idx=codes[:, :-1], targets=codes)[1]
    race.row(
        "LlamaGen, training, 8 × 256 tokens × 384", training(peer, loss), *ours(model, {"name": "llamagen"}, batch)
    )
    sampled, net = make().eval(), built("model", model).eval()
    sampler = built("sampler", {"name": "llamagen", "top_k": 100})

    def theirs() -> None:
        generate.generate(sampled, y, 256, cfg_scale=2.0, temperature=1.0, top_k=100, top_p=1.0, sample_logits=True)

    def mine() -> None:
        sampler(net, Request((16, 16), generators(range(8)), cond={"y": y}, guidance_scale=2.0))

    race.row("LlamaGen, 8 × 256 tokens, guided", *map(no_grad, (theirs, mine, half(mine))), rounds=min(2, ROUNDS))


def glow(folder: Path, race: Race) -> None:
    (module,) = official(folder / "glow-pytorch", "model")
    peer = module.Glow(3, 16, 3, affine=True, conv_lu=True)
    model = {"name": "glow", "in_channels": 3, "size": 32, "levels": 3, "depth": 16, "style": "rosinality"}
    same_size(peer, model)
    x = torch.rand(8, 3, 32, 32)
    with torch.no_grad():
        peer(x - 0.5)

    def loss() -> Tensor:
        log_p, log_det, _ = peer(x - 0.5 + torch.rand_like(x) / 256)
        return -(log_p + log_det).mean()

    works = ours(model, {"name": "glow"}, {"x": x * 2 - 1})
    race.row("Glow, training, 8 × 3 × 32 × 32, 3 × 16 steps", training(peer, loss), *works)


def stylegan2(folder: Path, race: Race) -> None:
    (networks,) = official(folder / "stylegan2-ada-pytorch", "training.networks")
    sizes = {"channel_base": 8192, "channel_max": 256}
    peer = networks.Generator(z_dim=512, c_dim=0, w_dim=512, img_resolution=64, img_channels=3, mapping_kwargs={},
                              synthesis_kwargs=sizes).eval()  # fmt: skip
    model = {"name": "stylegan2", "size": 64, **sizes}
    same_size(peer, model)
    net, z = built("model", model).eval(), torch.randn(8, 512)
    noise = [torch.randn(8, *shape) for shape in net.noise_shapes]
    mine = lambda: net(z, noise=noise)
    race.row(
        "StyleGAN2, generator, 8 × 3 × 64 × 64",
        *map(no_grad, (lambda: peer(z, None, noise_mode="const"), mine, half(mine))),
    )


def var(folder: Path, race: Race) -> None:
    (models,) = official(folder / "VAR", "models")
    scales = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    codec = models.VQVAE(vocab_size=512, z_channels=32, ch=32, test_mode=True, share_quant_resi=4, v_patch_nums=scales)
    peer = models.VAR(codec, num_classes=10, depth=6, embed_dim=384, num_heads=6, norm_eps=1e-6, attn_l2_norm=True,
                      patch_nums=scales, flash_if_available=False, fused_if_available=False)  # fmt: skip
    sizes = {"depth": 6, "embed_dim": 384, "num_heads": 6, "num_classes": 10, "vocab_size": 512, "channels": 32}
    net = built("model", {"name": "var", "scales": [[s, s] for s in scales], **sizes})
    a, b = (sum(p.numel() for p in n.parameters() if p.requires_grad) for n in (peer, net))
    assert abs(a - b) <= 0.02 * a, f"other sizes: official {a}, ours {b}"
    tokens, y = torch.randint(512, (4, 680)), torch.arange(4)
    inputs = torch.randn(4, 679, 32)
    works = []
    for network, bf16 in ((peer, False), (net, False), (built("model", {"name": "var", "scales": [[s, s] for s in scales],
                                                                         **sizes}), bf16_supported())):  # fmt: skip
        call = (lambda n=network: n(y, inputs)) if network is peer else (lambda n=network: n(inputs, y))
        loss = lambda c=call: F.cross_entropy(c().flatten(0, 1).float(), tokens.flatten())
        works.append(training(network.train(), loss, bf16, network is not peer))
    race.row("VAR, training, 4 × 680 tokens × 384", *works)


def mar(folder: Path, race: Race) -> None:
    (module,) = official(folder / "mar", "models.mar")
    peer = module.MAR(img_size=128, vae_stride=16, patch_size=1, encoder_embed_dim=384, encoder_depth=4, encoder_num_heads=6,
                      decoder_embed_dim=384, decoder_depth=4, decoder_num_heads=6, class_num=10, diffloss_d=3,
                      diffloss_w=384, buffer_size=64, diffusion_batch_mul=4, attn_dropout=0.0, proj_dropout=0.0)  # fmt: skip
    model = {"name": "mar", "input_size": 8, "in_channels": 16, "num_classes": 10, "encoder_width": 384, "encoder_depth": 4,
             "encoder_heads": 6, "decoder_width": 384, "decoder_depth": 4, "decoder_heads": 6, "head_depth": 3,
             "head_width": 384, "attn_dropout": 0.0, "proj_dropout": 0.0}  # fmt: skip
    same_size(peer, model)
    x, y = torch.randn(8, 16, 8, 8), torch.arange(8)
    with without_gpu():
        node = {"name": "masked-diffusion", "copies": 4}
        race.row("MAR, training, 8 × 64 tokens × 384", training(peer.train(), lambda: peer(x, y)),
                 *ours(model, node, {"x": x, "cond": {"y": y}}))  # fmt: skip


def score_sde(folder: Path, race: Race) -> None:
    for k in [k for k in sys.modules if k.split(".")[0] in OWN]:
        del sys.modules[k]
    sys.modules["op"] = types.ModuleType("op")  # filters of the VE networks, which compile CUDA when imported
    sys.modules["op"].__dict__.update(upfirdn2d=None)
    sys.path.insert(0, str(folder / "score_sde_pytorch"))
    try:
        ncsnpp, losses, sde_lib = (importlib.import_module(n) for n in ("models.ncsnpp", "losses", "sde_lib"))
    finally:
        sys.path.remove(str(folder / "score_sde_pytorch"))
    own: dict[str, Any] = {
        "nf": 64, "ch_mult": (1, 2, 2), "num_res_blocks": 2, "attn_resolutions": (16,), "dropout": 0.1,
        "resamp_with_conv": True, "conditional": True, "fir": False, "fir_kernel": (1, 3, 3, 1), "skip_rescale": True,
        "resblock_type": "biggan", "progressive": "none", "progressive_input": "none", "progressive_combine": "sum",
        "embedding_type": "positional", "init_scale": 0.0, "nonlinearity": "swish", "sigma_min": 0.01, "sigma_max": 50.0,
        "num_scales": 1000,
    }  # fmt: skip
    config = types.SimpleNamespace(
        model=types.SimpleNamespace(**own, scale_by_sigma=False, fourier_scale=16.0),
        data=types.SimpleNamespace(image_size=32, num_channels=3, centered=True),
        training=types.SimpleNamespace(continuous=True),
    )
    peer = ncsnpp.NCSNpp(config).train()
    model = {"name": "ncsnpp", "image_size": 32, **own}
    same_size(peer, model)
    loss_of = losses.get_sde_loss_fn(sde_lib.VPSDE(0.1, 20.0, 1000), True, reduce_mean=True, continuous=True)
    x = torch.randn(8, 3, 32, 32).clamp(-1, 1)
    works = ours(model, {"name": "score-matching", "preset": "vp", "reduce_mean": True}, {"x": x}, convolutional=True)
    race.row("Score-SDE DDPM++, training, 8 × 3 × 32 × 32", training(peer, lambda: loss_of(peer, x)), *works)


ROWS: dict[str, Callable[[Path, Race], None]] = {
    "DiT": dit,
    "SiT": sit,
    "guided-diffusion": adm,
    "LlamaGen": llamagen,
    "glow-pytorch": glow,
    "stylegan2-ada-pytorch": stylegan2,
    "score_sde_pytorch": score_sde,
    "VAR": var,
    "mar": mar,
}


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
    wanted = sys.argv[2].split(",") if len(sys.argv) > 2 else list(ROWS)
    there = [name for name in wanted if name in ROWS and (folder / name).is_dir()]
    if not there:
        print(f"usage: race.py FOLDER [{','.join(ROWS)}]; FOLDER has none of these checkouts", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")  # of the official code
    stand_ins()
    race, failed = Race(), 0
    for name in there:
        try:
            ROWS[name](folder, race)
        except Exception as e:
            failed += 1
            print(f"{name}: {type(e).__name__}: {e}", file=sys.stderr, flush=True)
    missing = [name for name in wanted if name not in there]
    if missing:
        print(f"\nnot raced, no checkout: {', '.join(missing)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
