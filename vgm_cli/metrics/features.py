"""Feature networks: which one measures a set of images, and uint8 pictures to features.

Two networks ship: one of digits, the default for small grey images, and one of colour pictures, the default for all
others. Published numbers need weights that the user has: the Inception of FID, DINOv2's ViT or CLIP's image tower,
recognised by what the file holds, never by its name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vgm_cli.errors import FAILED, MISSING_ASSET, USAGE, VgmError
from vgm_cli.nets import colour_features as colours
from vgm_cli.nets import inception, vit
from vgm_cli.nets import mnist_features as digits
from vgm_cli.nets.shipped_features import kind_of_file
from vgm_cli.weights.state import read_state

ASSETS = Path(str(resources.files("vgm_cli"))) / "assets"
DIGITS, COLOURS = ASSETS / "mnist-features.safetensors", ASSETS / "colour-features.safetensors"
VARIABLES = {"inception": "VGM_INCEPTION", "dinov2": "VGM_DINOV2", "clip": "VGM_CLIP"}  # paths of weights files
DIGIT_SIDES = range(digits.SIZE, 33)  # 28, and 32 where the digits are padded


@dataclass(frozen=True)
class FeatureNet:
    """A feature network with its weights.

    kind: mnist, colour, inception, dinov2 or clip. name: for results. resize: its rule of resizing, in words. dim:
    width of "pool". outputs: which of pool (B, dim), spatial (B, 2023) and logits (B, K) a call returns.
    """

    kind: str
    name: str
    sha256: str
    resize: str
    dim: int
    outputs: frozenset[str]
    net: nn.Module
    run: Callable[[Tensor], dict[str, Tensor]]

    @torch.no_grad()
    def __call__(self, images: np.ndarray, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """images: uint8 (B, H, W, C), C in {1, 3} -> {output: float32 on the CPU}."""
        x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)  # (B, C, H, W)
        self.net.to(device)
        cudnn = torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False)  # full fp32
        with cudnn, torch.autocast(torch.device(device).type, enabled=False):
            found = {k: v.float().cpu() for k, v in self.run(x.to(device)).items()}
        if not all(bool(v.isfinite().all()) for v in found.values()):
            raise VgmError(f"{self.name} gives features that are NaN or infinite", "its weights are damaged", FAILED)
        return found

    def describe(self) -> dict[str, Any]:
        """The facts about this network that a result's protocol records."""
        return {
            "features": self.name,
            "features_kind": self.kind,
            "features_sha256": self.sha256,
            "features_dim": self.dim,
            "resize": self.resize,
        }


def file_sha256(path: Path) -> str:
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest()


# -- the networks ----------------------------------------------------------------------------------------------------


@cache
def mnist_features(path: Path = DIGITS) -> FeatureNet:
    """The digit network, `net` being a MnistCNN. VgmError: file missing (exit code 4) or foreign (1)."""
    net = digits.load_mnist_features(path)
    outputs = frozenset({"pool", "logits"})

    def run(x: Tensor) -> dict[str, Tensor]:
        pool, logits = net(digits.to_digits(x))
        return {"pool": pool, "logits": logits}

    return FeatureNet("mnist", digits.KIND, file_sha256(path), digits.RESIZE, net.dim, outputs, net, run)


@cache
def colour_features(path: Path = COLOURS) -> FeatureNet:
    """The colour network, `net` being a ColourCNN; it has no logits, since its classes are those of emojis alone.
    VgmError: file missing (exit code 4) or foreign (1)."""
    net = colours.load_colour_features(path)

    def run(x: Tensor) -> dict[str, Tensor]:
        return {"pool": net(colours.to_small(x))[0]}

    return FeatureNet("colour", colours.KIND, file_sha256(path), colours.RESIZE, net.dim, frozenset({"pool"}), net, run)


SHIPPED = {"mnist": mnist_features, "colour": colour_features}


def inception_features(path: Path, net: nn.Module, resize: str = "own") -> FeatureNet:
    """resize: "own" is the graph's TF1 bilinear, "clean" Pillow's bicubic before it (Parmar et al., arXiv:2104.11222).

    logits are those without the last bias, of which published Inception Scores are made.
    """
    scripted = isinstance(net, torch.jit.ScriptModule)
    names = ("pool", "logits") if scripted else ("pool", "spatial", "logits")

    def run(x: Tensor) -> dict[str, Tensor]:
        if resize == "clean":
            x = clean_resize(x, inception.SIZE)
        x = x.expand(-1, 3, -1, -1)
        if scripted:  # its class output is a softmax: the logarithm is the logits up to a constant per image
            probabilities = net(x, no_output_bias=True)
            return {"pool": net(x, return_features=True), "logits": probabilities.clamp(min=1e-37).log()}
        out = net(x.float())
        return {"pool": out["pool"], "spatial": out["spatial"], "logits": out["logits_unbiased"]}

    rule = {
        "own": f"bilinear without half-pixel centres to {inception.SIZE} (TensorFlow 1)",
        "clean": f"Pillow bicubic per channel in float32 to {inception.SIZE} (clean-fid)",
    }[resize]
    name = "inception-2015-12-05 (NVIDIA TorchScript)" if scripted else "inception-2015-12-05"
    return FeatureNet("inception", name, file_sha256(path), rule, 2048, frozenset(names), net, run)


def clean_resize(x: Tensor, size: int) -> Tensor:
    """Pillow's antialiased bicubic, each channel in float32, clipped to 0..255 but not rounded (clean-fid's resizer).

    x: (B, C, H, W) in 0..255 -> float32 (B, C, size, size).
    """
    planes = x.float().cpu().numpy().reshape(-1, *x.shape[-2:])
    small = [np.asarray(Image.fromarray(p, "F").resize((size, size), Image.Resampling.BICUBIC)) for p in planes]
    return torch.from_numpy(np.stack(small)).clamp(0, 255).reshape(*x.shape[:2], size, size).to(x.device)


def transformer_features(path: Path, state: Mapping[str, Tensor]) -> FeatureNet:
    """DINOv2 at 224 pixels (layer6ai-labs/dgm-eval) or CLIP at its own size with unit-length embeddings (CMMD of
    google-research); both after Pillow's bicubic on 8 bits, as the reference codes do it."""
    kind, net = vit.kind_of(state), vit.build(state, str(path))
    assert kind is not None
    size = 224 // net.side * net.side if kind == "dinov2" else net.grid * net.side
    mean, std = NORMALISATION[kind]

    def run(x: Tensor) -> dict[str, Tensor]:
        x = pillow_resize(x.expand(-1, 3, -1, -1), size).float() / 255
        out = net((x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None])
        return {"pool": out / out.norm(dim=1, keepdim=True) if kind == "clip" else out}

    width = net.patch.weight.shape[0]
    name = f"{kind}-vit-{SIZES.get(width, f'w{width}')}/{net.side}" + (f"-{size}" if kind == "clip" else "")
    rule = f"Pillow bicubic on 8 bits to {size}"
    return FeatureNet(kind, name, file_sha256(path), rule, net.dim, frozenset({"pool"}), net, run)


NORMALISATION = {
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
SIZES = {384: "s", 768: "b", 1024: "l", 1536: "g"}


def pillow_resize(x: Tensor, size: int) -> Tensor:
    """Pillow's antialiased bicubic on 8-bit pictures. x: uint8 (B, 3, H, W) -> uint8 (B, 3, size, size)."""
    if x.shape[-2:] == (size, size):
        return x
    pictures = x.permute(0, 2, 3, 1).cpu().numpy()
    small = [np.asarray(Image.fromarray(p).resize((size, size), Image.Resampling.BICUBIC)) for p in pictures]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).to(x.device)


# -- choosing --------------------------------------------------------------------------------------------------------


def load_features(path: str | Path, resize: str = "own") -> FeatureNet:
    """The network that a local weights file holds. VgmError: missing or of no known kind (exit code 4)."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise inception.missing_weights(
            f"no feature weights at {path}", "--features mnist and --features colour are the shipped networks"
        )
    return _load(path.resolve(), path.stat().st_mtime_ns, resize)


@cache
def _load(path: Path, modified: int, resize: str) -> FeatureNet:
    if path.suffix == ".safetensors":
        kind = kind_of_file(path)
        if kind in (digits.KIND, colours.KIND):
            return mnist_features(path) if kind == digits.KIND else colour_features(path)
    if inception.is_torchscript(path):
        module = inception.load_inception(path)
        state = module.state_dict()
        return transformer_features(path, state) if vit.kind_of(state) else inception_features(path, module, resize)
    if path.suffix in (".pth", ".pt", ".safetensors", ".bin"):
        state = read_state(path)
        if vit.kind_of(state):
            return transformer_features(path, state)
    return inception_features(path, inception.load_inception(path), resize)


def choose(
    features: str | Iterable[str] | None, size: int, channels: int, kind: str | None = None, resize: str = "own"
) -> FeatureNet:
    """The network for images of `size` pixels and `channels`.

    features: "mnist", "colour", "inception" (the file that VGM_INCEPTION names), a weights file, or several of them;
    None: the digit network for small grey images, else VGM_INCEPTION if there is one, else the colour network. kind:
    what a metric insists on (mnist, dinov2, clip), found among `features` or by its variable; None takes the first
    given, of Inception or the shipped ones before others. VgmError: no weights (exit code 4).
    """
    texts = [features] if isinstance(features, str) else list(features or ())
    given = [_named(part.strip(), resize) for text in texts for part in text.split(",") if part.strip()]
    if kind is not None:
        fitting = [net for net in given if net.kind == kind]
        return fitting[0] if fitting else SHIPPED[kind]() if kind in SHIPPED else _by_variable(kind, resize)
    if given:
        return next((net for net in given if net.kind in (*SHIPPED, "inception")), given[0])
    if channels == 1 and size in DIGIT_SIDES:
        return mnist_features()
    if os.environ.get(VARIABLES["inception"]):
        return _by_variable("inception", resize)
    return colour_features()


def _by_variable(kind: str, resize: str) -> FeatureNet:
    """The weights that an environment variable names."""
    variable, path = VARIABLES[kind], os.environ.get(VARIABLES[kind])
    if not path:
        hint = f"add the file to --features, or set {variable}"
        raise VgmError(f"{kind} features need weights", f"{hint}; accepted: {ACCEPTED[kind]}", MISSING_ASSET)
    net = load_features(path, resize)
    if net.kind != kind:
        raise VgmError(f"{variable} names {net.name}, not {kind} weights", code=USAGE)
    return net


ACCEPTED = {"inception": inception.FORMATS, "dinov2": vit.ACCEPTED, "clip": vit.ACCEPTED}


def _named(features: str, resize: str) -> FeatureNet:
    """ "mnist", "colour", a kind that a variable gives the file of, or a file."""
    if features in SHIPPED:
        return SHIPPED[features]()
    if features in VARIABLES and not Path(features).exists():
        return _by_variable(features, resize)
    return load_features(features, resize)
