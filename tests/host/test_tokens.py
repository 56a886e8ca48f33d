"""Tokens: a pyramid of grids, from a plugin file to pictures; images that a model of tokens completes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vgm_cli.api import PyramidTokenizer, Request, generators
from vgm_cli.ar import pyramid
from vgm_cli.ar.masking import kept_codes
from vgm_cli.data import open_dataset
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.facts import Facts
from vgm_cli.engine.tokens import TokenCodec, as_output
from vgm_cli.errors import VgmError
from vgm_cli.images import to_uint8
from vgm_cli.nn.attention import block_causal, causal_attention
from vgm_cli.nn.kv_cache import KVCache
from vgm_cli.operators.inpainting import half_mask
from vgm_cli.registry import registry
from vgm_cli.testing.suites import randomise

Vgm = Callable[..., tuple[int, str, str]]

# -- a pyramid: a plugin of one file, with a tokenizer, a next-scale model, its objective and its sampler ----------------

PLUGIN = """
from vgm_cli.hookspecs import Component, hookimpl

FACTS = {"scales": "scales", "vocab_size": "vocab_size", "channels": "channels"}


@hookimpl
def vgm_components():
    return [
        Component(kind="codec", name="steps", target="pyramid_parts:Steps"),
        Component(kind="model", name="next-scale", target="pyramid_parts:NextScale", from_data=FACTS),
        Component(kind="objective", name="next-scale", target="pyramid_parts:Objective", verbs=("train",)),
        Component(kind="sampler", name="next-scale", target="pyramid_parts:Sampler"),
    ]
"""
PARTS = '''
import torch
import torch.nn.functional as F
from torch import nn

from vgm_cli.api import ObjectiveBase
from vgm_cli.ar import pyramid
from vgm_cli.ar.sampling import draw
from vgm_cli.nn.attention import block_causal, causal_attention
from vgm_cli.nn.kv_cache import KVCache


class Steps(nn.Module):
    """Brightness and its square at 4x4 places: three grids of residual codes."""

    codebook_size = 16

    def __init__(self, patch: int = 7):
        super().__init__()
        self.patch = patch
        vectors = torch.randn(16, 2, generator=torch.Generator().manual_seed(0)) * 0.7
        self.register_buffer("vectors", torch.cat([torch.zeros(1, 2), vectors[1:]]))

    def scales(self, image_shape):
        _, height, width = image_shape
        return tuple((height // self.patch // d, width // self.patch // d) for d in (4, 2, 1))

    def token_shape(self, image_shape):
        return (sum(h * w for h, w in self.scales(image_shape)),)

    def latent_shape(self, image_shape):
        return (2, *self.scales(image_shape)[-1])

    def code_vectors(self):
        return self.vectors

    def added(self, features, codes, scale):
        return features + F.interpolate(codes, size=features.shape[2:], mode="bicubic") * (1.0 if scale else 0.5)

    def features(self, x):
        light = F.avg_pool2d(x, self.patch)
        return torch.cat([light, light.square()], dim=1)

    def tokens(self, x):
        f = self.features(x)
        scales, hat, ids = self.scales(x.shape[1:]), torch.zeros_like(f), []
        for k, (h, w) in enumerate(scales):
            z = F.interpolate(f - hat, size=(h, w), mode="area").permute(0, 2, 3, 1)
            grid = torch.cdist(z.flatten(0, 2), self.vectors).argmin(1).view(len(x), h, w)
            hat = self.added(hat, pyramid.code_grid(self, grid), k)
            ids.append(grid.flatten(1))
        return torch.cat(ids, dim=1)

    def decode_features(self, features):
        return F.interpolate(features[:, :1], scale_factor=self.patch, mode="nearest").clamp(-1, 1)

    def decode_tokens(self, ids):
        *_, features = pyramid.features_after(self, ids, self.scales((1, 4 * self.patch, 4 * self.patch)))
        return self.decode_features(features)

    def encode(self, x):
        return self.features(x)

    def latents(self, moments, noise=None):
        return moments

    def decode(self, z):
        return self.decode_features(z)


class NextScale(nn.Module):
    def __init__(self, scales: tuple[tuple[int, int], ...], vocab_size: int, channels: int, dim: int = 32):
        super().__init__()
        self.scales, self.heads = scales, 2
        self.sizes = pyramid.sizes(scales)
        self.word = nn.Linear(channels, dim)
        self.places = nn.Parameter(torch.randn(sum(self.sizes), dim) * 0.1)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.head = nn.Linear(dim, vocab_size)

    def cache(self, n, device):
        return KVCache(1, n, self.heads, sum(self.sizes), self.head.in_features // self.heads, device)

    def forward(self, seen, n, cache=None):
        """seen: (n, T, C) of the next T positions, None for the first grid -> logits (n, T, V)."""
        past = cache.filled if cache is not None else 0
        h = seen.new_zeros(n, 0, self.places.shape[1]) if seen is not None else self.places.new_zeros(n, 1, 1)
        if seen is not None:
            start = [] if past else [h.new_zeros(n, self.sizes[0], h.shape[2])]
            h = torch.cat([*start, self.word(seen)], dim=1)
        h = h + self.places[past : past + h.shape[1]]
        mask = block_causal(self.sizes, h.device)[past : past + h.shape[1], : past + h.shape[1]]
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = h + self.out(causal_attention(q, k, v, mask, cache=cache).transpose(1, 2).flatten(2))
        if cache is not None:
            cache.advance(q.shape[2])
        return self.head(h + self.mlp(h))


class Objective(ObjectiveBase):
    def __init__(self, model: nn.Module, codec):
        self.model, self.codec, self.networks = model, codec, {"model": model}

    def loss(self, phase, batch, step):
        ids = batch["tokens"]
        seen = pyramid.teacher_inputs(self.codec, ids, self.model.scales)
        return F.cross_entropy(self.model(seen, len(ids)).flatten(0, 1), ids.flatten()), {}


class Sampler:
    def __call__(self, model, request):
        n, scales, tokenizer = len(request), model.scales, request.codec
        u = request.rand(request.shape).split(model.sizes, dim=1)
        features, cache = pyramid.no_features(tokenizer, n, scales), model.cache(n, request.device)
        seen, ids, self.logits = None, [], []
        for k, scale in enumerate(scales):
            logits = model(seen, n, cache)
            grid = draw(logits.softmax(-1).flatten(0, 1), u[k].flatten()).view(n, *scale)
            features = tokenizer.added(features, pyramid.code_grid(tokenizer, grid), k)
            seen = pyramid.seen_by(features, scales[k + 1]) if k + 1 < len(scales) else None
            ids.append(grid.flatten(1))
            self.logits.append(logits)
        return torch.cat(ids, dim=1)
'''
RECIPE = """
paper: next-scale
model: {name: next-scale}
codec: {name: steps, weights: codec.safetensors, output: tokens}
objective: {name: next-scale}
sampler: {name: next-scale}
data: {path: mnist5k, labels: false}
optimizer: {lr: 3.0e-3}
train: {steps: 60, batch_size: 32, precision: fp32, save_every: 60, preview_n: 4, preview_every: 60, log_every: 1}
"""
SCALES = ((1, 1), (2, 2), (4, 4))


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plugin's file; what it names can be imported, and the weights of its tokenizer lie beside it."""
    (tmp_path / "pyramid_plugin.py").write_text(PLUGIN)
    (tmp_path / "pyramid_parts.py").write_text(PARTS)
    (tmp_path / "next.yaml").write_text(RECIPE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pyramid_parts", raising=False)
    header = ckpt.Header(component={"kind": "codec", "name": "steps", "kwargs": {}})
    ckpt.save_network(tmp_path / "codec.safetensors", steps().state_dict(), header)
    return tmp_path / "pyramid_plugin.py"


def steps(**keywords: Any) -> Any:
    import pyramid_parts

    return pyramid_parts.Steps(**keywords)


def test_a_pyramid_trains_and_samples(vgm: Vgm, plugin: Path, tmp_path: Path) -> None:
    """The host fills the facts from the tokenizer, the loss falls, and pictures do not depend on the batch."""
    code, _, err = vgm("--plugin", plugin, "train", "next.yaml", "--out", "run")
    assert code == 0, err
    header = ckpt.read_header(ckpt.resolve("run"))
    own = header.component["kwargs"]
    assert own["scales"] == [[1, 1], [2, 2], [4, 4]] and (own["vocab_size"], own["channels"]) == (16, 2)
    assert header.data["sample_shape"] == [21] and header.parts["codec"].output == "tokens"
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
              if '"loss"' in line]  # fmt: skip
    assert losses[-1] < 0.8 * losses[0]
    for size in (1, 3):
        args = ("sample", "run", "-n", 3, "--seed", 5, "--batch-size", size, "--out", f"{size}.npz")
        code, _, err = vgm("--plugin", plugin, *args)
        assert code == 0, err
    one, three = (np.load(f"{size}.npz")["arr_0"] for size in (1, 3))
    assert one.shape == (3, 28, 28, 1) and (one == three).all() and not (one[0] == one[1]).all()


def test_a_picture_of_tokens_depends_on_its_label_and_number_alone(
    vgm: Vgm, tiny_dataset: Path, tmp_path: Path
) -> None:
    """Whatever other labels are asked for, and however many are sampled at once."""
    small = ("model.dim=32", "model.n_layer=1", "model.n_head=2", "train.steps=6", "train.batch_size=8", "optimizer.lr=0.05", "optimizer.warmup=0",
             "train.preview_n=0", "train.precision=fp32")  # fmt: skip
    codec = {"name": "vqgan", "weights": "mnist-tokenizer", "output": "tokens"}
    data = (f"data.path={tiny_dataset}", f"codec={json.dumps(codec)}")
    code, _, err = vgm("train", "llamagen", *small, *data, "--out", "run")
    assert code == 0, err

    def drawn(*words: object) -> np.ndarray:
        code, _, err = vgm("sample", "run", "-n", 4, "--guidance-scale", 40, *words, "--out", "x.npz", "--overwrite")
        assert code == 0, err
        return np.load("x.npz")["arr_0"].copy()

    both = drawn("--label", "0,1")
    assert (both == drawn("--label", "0,1", "--batch-size", 1)).all()
    assert (both[::2] == drawn("--label", "0")[::2]).all() and (both[1::2] == drawn("--label", "1")[1::2]).all()
    assert not (both[1] == drawn("--label", "0")[1]).all()


@torch.no_grad()
def test_sampling_sees_what_training_saw(vgm: Vgm, plugin: Path) -> None:
    """The cached logits of every grid are those of the whole sequence under the block-causal mask."""
    assert vgm("--plugin", plugin, "ls", "models")[0] == 0
    torch.manual_seed(0)
    facts = {"scales": SCALES, "vocab_size": 16, "channels": 2}
    model, sampler = (
        registry().build("model", {"name": "next-scale", **facts}),
        registry().build("sampler", "next-scale"),
    )
    tokenizer = steps()
    ids = sampler(model, Request(shape=(21,), generators=generators(range(3)), codec=tokenizer))
    logits = model(pyramid.teacher_inputs(tokenizer, ids, SCALES), 3)
    torch.testing.assert_close(torch.cat(sampler.logits, dim=1), logits)
    images = [tokenizer.decode_features(f) for f in pyramid.features_after(tokenizer, ids, SCALES)]
    assert torch.equal(images[-1], tokenizer.decode_tokens(ids)) and not torch.equal(images[0], images[-1])


def test_facts_of_a_pyramid(plugin: Path) -> None:
    tokenizer, images = steps(), Facts.of_pixels(28, 1)
    assert isinstance(tokenizer, PyramidTokenizer)
    facts = images.after(as_output(tokenizer, "tokens"))
    assert (facts.scales, facts.grid, facts.sample_shape) == (SCALES, (21,), (21,))
    assert (facts.size, facts.channels, facts.vocab_size) == (4, 2, 16)
    assert images.after(tokenizer).scales == () and facts.after(tokenizer).scales == ()
    tokenizer.token_shape = lambda image_shape: (20,)
    with pytest.raises(VgmError, match="other positions"):
        images.after(as_output(tokenizer, "tokens"))


def test_blocks_see_themselves_and_what_is_before() -> None:
    mask = block_causal([1, 2, 3])
    assert mask.int().tolist() == [[1, 0, 0, 0, 0, 0], *[[1, 1, 1, 0, 0, 0]] * 2, *[[1] * 6] * 3]
    q, k, v = torch.randn(3, 2, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    whole, cache, parts = causal_attention(q, k, v, mask), KVCache(1, 2, 2, 6, 8), []
    for a, b in ((0, 1), (1, 3), (3, 6)):
        rows = [x[:, :, a:b] for x in (q, k, v)]
        parts.append(causal_attention(*rows, mask[a:b, :b], cache=cache))
        cache.advance(b - a)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole)


# -- images that are completed: what a mask keeps stays ------------------------------------------------------------------

LLAMA = {"dim": 16, "n_layer": 1, "n_head": 2, "multiple_of": 8, "vocab_size": 256, "grid": [7, 7], "num_classes": 10}
GPT = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 256, "grid": [7, 7], "num_classes": 10}
PRIORS = {
    "llamagen": ("llamagen", LLAMA, {"name": "llamagen", "top_k": 5}),
    "strict": ("llamagen", {**LLAMA, "null_class": False}, {"name": "llamagen"}),
    "vqgan-prior": ("vqgan-prior", GPT, {"name": "vqgan-prior", "top_k": 100}),
    "randar": ("randar", LLAMA, {"name": "randar", "steps": 9}),
    "z-curve": ("vqgan-prior", {**GPT, "order": "z-curve"}, {"name": "vqgan-prior"}),
}


@pytest.fixture
def prior(tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint of a small network of random weights over the shipped tokenizer's codes."""

    def make(name: str) -> Path:
        component, keywords, sampler = PRIORS[name]
        torch.manual_seed(0)
        network = registry().build("model", {"name": component, **keywords})
        randomise(network)
        codec = ckpt.ASSETS / "mnist-tokenizer.safetensors"
        header = ckpt.Header(
            component={"kind": "model", "name": component, "kwargs": keywords},
            parts={"codec": ckpt.refer(codec, "vqgan", output="tokens")},
            recipe={
                "paper": "small",
                "sampler": sampler,
                "guidance_scale": None if name == "strict" else 2.0,
                "conditions": {"class": {}},
            },
            data={"sample_shape": [7, 7], "num_classes": 10, "vocab_size": 256, "image_size": 28, "image_channels": 1},
        )
        ckpt.save_network(tmp_path / f"{name}.safetensors", network.state_dict(), header)
        return tmp_path / f"{name}.safetensors"

    return make


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """All codes that are turned into pictures."""
    seen: list[torch.Tensor] = []
    real = TokenCodec.decode
    monkeypatch.setattr(TokenCodec, "decode", lambda self, z: seen.append(z.clone()) or real(self, z))
    return seen


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.array(Image.open(p)) for p in sorted(folder.glob("*.png"))])


@pytest.mark.parametrize("name", ["llamagen", "vqgan-prior", "z-curve", "randar"])
def test_what_a_mask_keeps_stays(
    vgm: Vgm, prior: Callable[[str], Path], decoded: list[torch.Tensor], tmp_path: Path, name: str
) -> None:
    """The codes under pixels that are all kept are the image's own, bit for bit; the others are drawn."""
    method, file = PRIORS[name][0], prior(name)
    args = ("restore", "--model", file, "--method", method, "--input", "mnist5k", "-n", 3, "--label", "data")
    code, _, err = vgm(*args, "--mask", "lower", "--out", "lower")
    assert code == 0, err
    tokenizer = ckpt.read_codec(ckpt.ASSETS / "mnist-tokenizer.safetensors", output="tokens")
    own = tokenizer.encode(open_dataset("mnist5k").pixels([0, 5000 // 3, 2 * 5000 // 3]))
    made = decoded[-1]
    assert torch.equal(made[:, :3], own[:, :3]), "14 of 28 rows are kept: three whole rows of codes"
    assert not torch.equal(made[:, 3:], own[:, 3:])
    found = json.loads((tmp_path / "lower/results.json").read_text())
    assert found["task"] == {"name": "inpainting", "mask": "lower"} and found["noise"] == {"name": "none"}
    assert found["nfe"] == PRIORS[name][2].get("steps", 49)
    assert found["guidance_scale"] == 2.0 and found["labels"] == [0, 3, 6]
    assert found["method"] == PRIORS[name][2], "the settings of its recipe"
    # whatever the batch, and the same in the picture
    code, _, err = vgm(*args, "--mask", "lower", "--batch-size", 1, "--out", "single")
    assert code == 0, err
    assert torch.equal(torch.cat(decoded[-3:]), made)
    assert (pixels(tmp_path / "lower/restored") == pixels(tmp_path / "single/restored")).all()
    # everything, then nothing, then a hole and pixels of single codes
    for text, grid in {"all": np.ones((28, 28)), "none": np.zeros((28, 28)), "hole": hole()}.items():
        Image.fromarray((grid * 255).astype(np.uint8)).save(f"{text}.png")
        code, _, err = vgm(*args, "--mask", f"{text}.png", "--out", text)
        assert code == 0, err
        kept = torch.from_numpy(grid.reshape(7, 4, 7, 4).min((1, 3)) > 0).expand(3, 7, 7)
        assert torch.equal(decoded[-1][kept], own[kept]), text
        assert kept.all() or not torch.equal(decoded[-1][~kept], own[~kept])
    assert (pixels(tmp_path / "all/restored") == to_uint8(tokenizer.decode(own))[:, 0].numpy()).all()


def hole() -> np.ndarray:
    """Pixels that are kept: not those of a box, and not one under another code."""
    mask = np.ones((28, 28))
    mask[8:17, 4:12] = 0
    mask[21, 25] = 0
    return mask


def test_without_a_label_images_are_completed_without_a_class(vgm: Vgm, prior: Callable[[str], Path]) -> None:
    args = ("--mask", "left", "--input", "mnist5k", "-n", 2, "--out")
    code, _, err = vgm("restore", "--model", prior("llamagen"), "--method", "llamagen", *args, "a")
    assert code == 0, err
    assert json.loads(Path("a/results.json").read_text())["labels"] is None
    code, _, err = vgm("restore", "--model", prior("strict"), "--method", "llamagen", *args, "b")
    assert code == 0, err
    assert json.loads(Path("b/results.json").read_text())["labels"] == [0, 5], "it has no null class"


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--method", "llamagen"], "it cannot undo super-resolution"),
        (["--method", "llamagen", "--task", "inpainting"], "removes no noise"),
        (["--method", "llamagen", "--mask", "lower", "--task", "denoising"], "not for denoising"),
        (["--method", "llamagen", "--mask", "below"], "lower, left"),
        (["--method", "llamagen", "--mask", "lower", "top_q=3"], "top_k"),
        (["--mask", "lower"], "no diffusion or flow network"),
        (["--method", "vqgan-prior", "--mask", "lower"], "--method llamagen"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_refusals(vgm: Vgm, prior: Callable[[str], Path], args: list[str], text: str) -> None:
    code, _, err = vgm("restore", "--model", prior("llamagen"), "--input", "mnist5k", "-n", 1, *args, "--out", "x")
    assert code == 2 and text in err and "Traceback" not in err, err
    assert not Path("x").exists()


def test_steps_have_no_effect(vgm: Vgm, prior: Callable[[str], Path]) -> None:
    args = ("--method", "llamagen", "--mask", "upper", "--input", "mnist5k", "-n", 1, "--steps", 3, "--out", "x")
    code, _, err = vgm("restore", "--model", prior("llamagen"), *args)
    assert code == 0 and "--steps has no effect on llamagen" in err


def test_a_margin_is_lost_around_what_is_lost() -> None:
    mask = torch.ones(1, 1, 28, 28, dtype=torch.bool)
    mask[..., 13, 13] = False
    assert (~kept_codes(mask, (7, 7))).nonzero().tolist() == [[0, 3, 3]]
    assert int((~kept_codes(mask, (7, 7), margin=1)).sum()) == 9
    assert int((~kept_codes(mask, (6, 6))).sum()) == 1, "codes that do not divide the pixels"


@pytest.mark.parametrize("side", [6, 7])
@pytest.mark.parametrize("missing", ["upper", "lower", "left", "right"])
def test_halves(side: int, missing: str) -> None:
    """Half of the pixels is known, of an odd side without the middle."""
    known = half_mask(missing, side, side)
    assert int(known.sum()) == side * (side // 2)
    row, column = {"upper": (0, 3), "lower": (-1, 3), "left": (3, 0), "right": (3, -1)}[missing]
    assert known[row, column] == 0 and known[-1 - row, -1 - column] == 1
