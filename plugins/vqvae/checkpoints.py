"""VQ-VAE weights of others: sonnet's example, zalando's notebook, pythae's autoencoder and its PixelCNN.

There are no official weights. Sonnet's variables (google-deepmind/sonnet@26b0518 examples/vqvae_example.ipynb, as .npz)
have kernels HWIO, transposed ones HWOI, and codebooks [D, K]; the averages that begin at zero are "hidden" there, the
debiased ones "average". zalandoresearch/pytorch-vq-vae@b98fde9 and clementchadebec/benchmark_VAE@6419e21 (pythae) are
torch's. Commitment weight and the decay of averages are in no tensor, but sonnet's, whose averages tell the decay.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from vgm_cli.convert_api import Files, Layout, Published
from vgm_cli.errors import USAGE, VgmError

State = Mapping[str, Tensor]


def layers_of(names: Iterable[str], pattern: str) -> int:
    """How many residual layers there are."""
    return 1 + max((int(m[1]) for n in names if (m := re.fullmatch(pattern, n))), default=-1)


def complete(state: State, names: Mapping[str, str]) -> dict[str, Tensor]:
    """{ours: tensor} for {ours: theirs}. KeyError: one is missing."""
    return {ours: state[theirs] for ours, theirs in names.items()}


def refuse(config: Mapping[str, Any], layout: str, flavour: str) -> None:
    """VgmError: a network that files of this layout cannot hold."""
    wanted = {"layout": layout, "groups": 1, "likelihood": "gaussian", "latent_stats": False}
    if config.get("quantizer", "ema") == "ema":
        wanted["flavour"] = flavour
    defaults = {"layout": "sonnet", "groups": 1, "likelihood": "gaussian", "latent_stats": False, "flavour": "sonnet"}
    for key, value in wanted.items():
        if (found := config.get(key, defaults[key])) != value:
            raise VgmError(f"{key}={found} has no file of this layout", f"it holds {key}={value} only", USAGE)


def assumed(state: State, config: Mapping[str, Any]) -> dict[str, str]:
    found = {"beta": "beta=0.25, the weight of the commitment (beta=B tells otherwise; it matters for training alone)"}
    if config["quantizer"] == "ema" and "ema_decay" not in config:
        found["ema_decay"] = "ema_decay=0.99 (ema_decay=D tells otherwise; it matters for training alone)"
    return found


# -- zalando -----------------------------------------------------------------------------------------------------------

ZALANDO_STACK = r"_encoder\._residual_stack\._layers\.(\d+)\._block\.1\.weight"
ZALANDO_CONVS = {
    "encoder.conv_in": "_encoder._conv_1",
    "encoder.conv_down": "_encoder._conv_2",
    "encoder.conv_mid": "_encoder._conv_3",
    "quant_conv": "_pre_vq_conv",
    "decoder.conv_in": "_decoder._conv_1",
    "decoder.conv_up": "_decoder._conv_trans_1",
    "decoder.conv_out": "_decoder._conv_trans_2",
}
ZALANDO_BOOK = {"embedding.weight": "_embedding.weight"}
ZALANDO_AVERAGES = {"embedding.cluster_size": "_ema_cluster_size", "embedding.embed_avg": "_ema_w"}


def zalando_names(layers: int, averages: bool) -> dict[str, str]:
    """{ours: theirs}."""
    names = {f"{a}.{p}": f"{b}.{p}" for a, b in ZALANDO_CONVS.items() for p in ("weight", "bias")}
    for side in ("encoder", "decoder"):
        for i in range(layers):
            theirs = f"_{side}._residual_stack._layers.{i}._block"
            names |= {f"{side}.stack.{i}.conv3.weight": f"{theirs}.1.weight"}
            names |= {f"{side}.stack.{i}.conv1.weight": f"{theirs}.3.weight"}
    book = ZALANDO_BOOK | (ZALANDO_AVERAGES if averages else {})
    return names | {f"quantize.{a}": f"_vq_vae.{b}" for a, b in book.items()}


def zalando_to_ours(state: State) -> dict[str, Tensor]:
    return complete(state, zalando_names(layers_of(state, ZALANDO_STACK), "_vq_vae._ema_w" in state))


def zalando_from_ours(state: State) -> dict[str, Tensor]:
    layers = layers_of(state, r"encoder\.stack\.(\d+)\.conv3\.weight")
    names = zalando_names(layers, "quantize.embedding.embed_avg" in state)
    return {theirs: state[ours] for ours, theirs in names.items()}


def zalando_config(state: State) -> dict[str, Any]:
    n_embed, dim = state["_vq_vae._embedding.weight"].shape
    channels, layers = state["_encoder._conv_2.weight"].shape[0], layers_of(state, ZALANDO_STACK)
    first = "_encoder._residual_stack._layers.0._block.1.weight"
    return {
        "layout": "zalando",
        "image_channels": state["_encoder._conv_1.weight"].shape[1],
        "channels": channels,
        "residual_layers": layers,
        "residual_channels": state[first].shape[0] if layers else 1,
        "embed_dim": dim,
        "n_embed": n_embed,
        **({"quantizer": "ema", "flavour": "zalando"} if "_vq_vae._ema_w" in state else {"quantizer": "loss"}),
    }


ZALANDO = Layout(
    name="vqvae-zalando",
    component="vqvae",
    kind="codec",
    recognise=lambda names: {"_pre_vq_conv.weight", "_vq_vae._embedding.weight"} <= set(names),
    to_ours=zalando_to_ours,
    from_ours=zalando_from_ours,
    config=zalando_config,
    allows=lambda config: refuse(config, "zalando", "zalando"),
    published=Published(assumes=assumed),
    summary="zalandoresearch's notebook, codebook by averages or by its loss",
)

# -- sonnet ------------------------------------------------------------------------------------------------------------

SONNET_STACK = r"encoder/residual_stack/res3x3_(\d+)/w"
SONNET_CONVS = {
    "encoder.conv_in": "encoder/enc_1",
    "encoder.conv_down": "encoder/enc_2",
    "encoder.conv_mid": "encoder/enc_3",
    "quant_conv": "to_vq",
    "decoder.conv_in": "decoder/dec_1",
    "decoder.conv_up": "decoder/dec_2",
    "decoder.conv_out": "decoder/dec_3",
}
SONNET_AVERAGES = {
    "cluster_size": "ema_cluster_size/hidden",
    "cluster_size_debiased": "ema_cluster_size/average",
    "counter": "ema_cluster_size/counter",
    "embed_avg": "ema_dw/hidden",
    "embed_avg_debiased": "ema_dw/average",
}
PLAIN, AVERAGED = "vector_quantizer/", "vector_quantizer_ema/"
SECOND_COUNTER = AVERAGED + "ema_dw/counter"


def sonnet_convs(layers: int) -> dict[str, str]:
    """{ours: theirs} of convolutions."""
    names = dict(SONNET_CONVS)
    for side in ("encoder", "decoder"):
        for i in range(layers):
            names[f"{side}.stack.{i}.conv3"] = f"{side}/residual_stack/res3x3_{i}"
            names[f"{side}.stack.{i}.conv1"] = f"{side}/residual_stack/res1x1_{i}"
    return names


def sonnet_book(averages: bool) -> dict[str, str]:
    """{name in our Averages or Embedding: theirs} of the codebook's tensors."""
    if not averages:
        return {"weight": PLAIN + "embeddings"}
    return {"weight": AVERAGED + "embeddings", **{a: AVERAGED + b for a, b in SONNET_AVERAGES.items()}}


def turned(tensor: Tensor) -> Tensor:
    """Kernels (h, w, in, out) <-> (out, in, h, w), of a transposed convolution (h, w, out, in) <-> (in, out, h, w);
    codebooks (D, K) <-> (K, D)."""
    return tensor.T.contiguous() if tensor.ndim == 2 else tensor


def sonnet_to_ours(state: State) -> dict[str, Tensor]:
    """KeyError: a variable is missing."""
    ours = {}
    for own, theirs in sonnet_convs(layers_of(state, SONNET_STACK)).items():
        ours[f"{own}.weight"] = state[f"{theirs}/w"].permute(3, 2, 0, 1).contiguous()
        ours[f"{own}.bias"] = state[f"{theirs}/b"]
    averages = PLAIN + "embeddings" not in state
    ours |= {f"quantize.embedding.{k}": turned(state[v]) for k, v in sonnet_book(averages).items()}
    if averages:
        state[SECOND_COUNTER]  # it says nothing new, and is part of the layout
    return ours


def sonnet_from_ours(state: State) -> dict[str, Tensor]:
    theirs = {}
    for own, name in sonnet_convs(layers_of(state, r"encoder\.stack\.(\d+)\.conv3\.weight")).items():
        theirs[f"{name}/w"] = state[f"{own}.weight"].permute(2, 3, 1, 0).contiguous()
        theirs[f"{name}/b"] = state[f"{own}.bias"]
    averages = "quantize.embedding.embed_avg" in state
    theirs |= {v: turned(state[f"quantize.embedding.{k}"]) for k, v in sonnet_book(averages).items()}
    if averages:
        theirs[SECOND_COUNTER] = state["quantize.embedding.counter"].clone()
    return theirs


def sonnet_decay(state: State) -> float | None:
    """The decay that made the averages: hidden = average (1 - decay^updates). None before the first update."""
    hidden, average, counter = (state[f"{AVERAGED}ema_cluster_size/{n}"] for n in ("hidden", "average", "counter"))
    if hidden.is_meta or counter.is_meta or not int(counter) > 0 or not float(average.sum()) > 0:
        return None
    left = 1 - float(hidden.double().sum() / average.double().sum())
    return float(f"{left ** (1 / int(counter)):.4g}") if 0 < left < 1 else None


def sonnet_config(state: State) -> dict[str, Any]:
    averages = PLAIN + "embeddings" not in state
    dim, n_embed = state[(AVERAGED if averages else PLAIN) + "embeddings"].shape
    layers = layers_of(state, SONNET_STACK)
    config: dict[str, Any] = {
        "layout": "sonnet",
        "image_channels": state["encoder/enc_1/w"].shape[2],
        "channels": state["encoder/enc_2/w"].shape[3],
        "residual_layers": layers,
        "residual_channels": state["encoder/residual_stack/res3x3_0/w"].shape[3] if layers else 1,
        "embed_dim": dim,
        "n_embed": n_embed,
        **({"quantizer": "ema", "flavour": "sonnet"} if averages else {"quantizer": "loss"}),
    }
    decay = sonnet_decay(state) if averages else None
    return config if decay is None else {**config, "ema_decay": decay}


SONNET = Layout(
    name="vqvae-sonnet",
    component="vqvae",
    kind="codec",
    recognise=lambda names: {"encoder/enc_1/w", "to_vq/w", "decoder/dec_3/w"} <= set(names),
    to_ours=sonnet_to_ours,
    from_ours=sonnet_from_ours,
    config=sonnet_config,
    allows=lambda config: refuse(config, "sonnet", "sonnet"),
    published=Published(assumes=assumed),
    summary="variables of sonnet's example (.npz by name), codebook by averages or by its loss",
)

# -- pythae ------------------------------------------------------------------------------------------------------------

PYTHAE_LAYERS = {
    "encoder.hidden": "encoder.layers.0.0",
    "encoder.out": "encoder.embedding",
    "decoder.hidden": "decoder.layers.0.0",
    "decoder.out": "decoder.layers.1.0",
}
PYTHAE_AVERAGES = {
    "embedding.weight": "embeddings",
    "embedding.cluster_size": "cluster_size",
    "embedding.embed_avg": "ema_embed",
}
PYTHAE_BOOK = {"embedding.weight": "embeddings.weight"}


def pythae_names(averages: bool) -> dict[str, str]:
    """{ours: theirs}."""
    names = {f"{a}.{p}": f"{b}.{p}" for a, b in PYTHAE_LAYERS.items() for p in ("weight", "bias")}
    book = PYTHAE_AVERAGES if averages else PYTHAE_BOOK
    return names | {f"quantize.{a}": f"quantizer.{b}" for a, b in book.items()}


def pythae_to_ours(state: State) -> dict[str, Tensor]:
    return complete(state, pythae_names("quantizer.ema_embed" in state))


def pythae_from_ours(state: State) -> dict[str, Tensor]:
    names = pythae_names("quantize.embedding.embed_avg" in state)
    return {theirs: state[ours] for ours, theirs in names.items()}


def pythae_config(state: State) -> dict[str, Any]:
    """Images are taken for grey squares, else for colour ones."""
    values, averages = state["encoder.layers.0.0.weight"].shape[1], "quantizer.ema_embed" in state
    grey = math.isqrt(values) ** 2 == values
    n_embed, dim = state["quantizer.embeddings" if averages else "quantizer.embeddings.weight"].shape
    return {
        "layout": "pythae",
        "image_channels": 1 if grey else 3,
        "image_size": math.isqrt(values if grey else values // 3),
        "channels": state["encoder.layers.0.0.weight"].shape[0],
        "embed_dim": dim,
        "n_embed": n_embed,
        "reduction": "sum",
        **({"quantizer": "ema", "flavour": "pythae"} if averages else {"quantizer": "loss"}),
    }


def pythae_assumes(state: State, config: Mapping[str, Any]) -> dict[str, str]:
    side, channels = config["image_size"], config["image_channels"]
    kind = "grey" if channels == 1 else "colour"
    return assumed(state, config) | {"image_size": f"{kind} images of {side}x{side} pixels, as so many values allow"}


PYTHAE = Layout(
    name="vqvae-pythae",
    component="vqvae",
    kind="codec",
    recognise=lambda names: (
        {"encoder.embedding.weight", "decoder.layers.1.0.weight"} <= (own := set(names))
        and bool({"quantizer.embeddings", "quantizer.embeddings.weight"} & own)
    ),
    to_ours=pythae_to_ours,
    from_ours=pythae_from_ours,
    config=pythae_config,
    allows=lambda config: refuse(config, "pythae", "pythae"),
    files=Files(wrapper="model_state_dict"),
    published=Published(assumes=pythae_assumes),
    summary="pythae's VQVAE with its default perceptrons, one code an image",
)


def pixelcnn_to_ours(state: State) -> dict[str, Tensor]:
    """Names are ours. KeyError: a tensor is missing."""
    layers = layers_of(state, r"net\.(\d+)\.0\.weight")
    block = ("0.weight", "0.bias", "0.mask", "1.weight", "1.bias", "1.running_mean", "1.running_var")
    names = [f"net.{i}.{n}" for i in range(layers) for n in (*block, "1.num_batches_tracked")]
    return {n: state[n] for n in (*names, f"net.{layers}.weight", f"net.{layers}.bias")}


def pixelcnn_config(state: State) -> dict[str, Any]:
    layers = layers_of(state, r"net\.(\d+)\.0\.weight")
    channels, planes, kernel_size, _ = state["net.0.0.weight"].shape
    return {
        "vocab_size": state[f"net.{layers}.weight"].shape[0] // planes,
        "grid": (8, 8),
        "n_layer": layers,
        "kernel_size": kernel_size,
        "channels": channels,
        "planes": planes,
    }


PIXELCNN = Layout(
    name="vqvae-pixelcnn-pythae",
    component="vqvae-pixelcnn",
    recognise=lambda names: {"net.0.0.mask", "net.0.1.running_mean"} <= set(names),
    to_ours=pixelcnn_to_ours,
    from_ours=dict,
    config=pixelcnn_config,
    files=Files(wrapper="model_state_dict"),
    published=Published(
        assumes=lambda state, config: {"grid": "a grid of 8x8 codes (grid=[H,W] tells otherwise; weights do not)"}
    ),
    summary="pythae's PixelCNN over codes",
)
