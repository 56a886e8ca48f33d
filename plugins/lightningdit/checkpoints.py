"""LightningDiT's and VA-VAE's published layouts (hustvl/LightningDiT@2725fed), whose names are ours.

Denoiser: train.py saves {model, ema, opt, config}, and the released files are bare states or {ema}; names may begin
with "module.". The rotary tables are stored. VA-VAE: a Lightning pickle with "state_dict", which holds the losses and
the foundation model, too; the statistics of its latents lie beside it, in latents_stats.pt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from vgm_cli.convert_api import Files, Layout, Published
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nets.dit import swiglu_width
from vgm_cli.nets.dit_checkpoints import PUBLISHED, assumes, depth_of, heads_of
from vgm_cli.nets.first_stage_checkpoints import PROJECTION, first_stage_config, is_first_stage, own_names, to_ours

from .objective import VIEW

State = Mapping[str, Tensor]
ROPE = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")


# -- denoiser --------------------------------------------------------------------------------------------------------


def recognise(keys: Iterable[str]) -> bool:
    """DiT's names with at least one option that has tensors of its own."""
    keys = set(keys)
    own = {"pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight"}
    own |= {"blocks.0.attn.qkv.bias", "t_embedder.mlp.2.weight", "blocks.0.adaLN_modulation.1.weight"}
    options = {ROPE[0], "blocks.0.norm1.weight", "blocks.0.mlp.w12.weight", "blocks.0.attn.q_norm.weight"}
    return own <= keys and bool(options & keys) and not any(k.startswith("r_embedder") for k in keys)


def options_of(state: State) -> dict[str, bool]:
    """The options of a state, read off names and shapes."""
    width = state["x_embedder.proj.weight"].shape[0]
    return {
        "swiglu": "blocks.0.mlp.w12.weight" in state,
        "rope": ROPE[0] in state,
        "rmsnorm": "blocks.0.norm1.weight" in state,
        "qknorm": "blocks.0.attn.q_norm.weight" in state,
        "wo_shift": state["blocks.0.adaLN_modulation.1.weight"].shape[0] == 4 * width,
    }


def names(depth: int, options: Mapping[str, bool]) -> list[str]:
    """Every tensor of the network."""
    layers = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    bare: list[str] = []  # normalisations by RMS have no bias
    mlp = ("mlp.w12", "mlp.w3") if options["swiglu"] else ("mlp.fc1", "mlp.fc2")
    for i in range(depth):
        layers += [f"blocks.{i}.{p}" for p in ("attn.qkv", "attn.proj", *mlp, "adaLN_modulation.1")]
        bare += [f"blocks.{i}.{p}" for p in ("norm1", "norm2") if options["rmsnorm"]]
        heads = [f"blocks.{i}.attn.{p}" for p in ("q_norm", "k_norm") if options["qknorm"]]
        (bare if options["rmsnorm"] else layers).extend(heads)
    layers += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    bare += ["final_layer.norm_final"] if options["rmsnorm"] else []
    tensors = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    tensors += [f"{layer}.weight" for layer in bare]
    return ["pos_embed", "y_embedder.embedding_table.weight", *(ROPE if options["rope"] else ()), *tensors]


def official(state: State) -> dict[str, Tensor]:
    """Official names are ours, both ways; a missing tensor is a KeyError."""
    for name in names(depth_of(state), options_of(state)):
        if name not in state:
            raise KeyError(name)
    return dict(state)


def head_width(state: State) -> int | None:
    """Channels of a head, where rotary tables or normalisations of heads tell."""
    for name in (ROPE[0], "blocks.0.attn.q_norm.weight"):
        if name in state:
            return state[name].shape[-1]
    return None


def mlp_ratio_of(state: State) -> float:
    """mlp_ratio, of a SwiGLU the roundest that gives its width. KeyError: neither kind of MLP."""
    width = state["x_embedder.proj.weight"].shape[0]
    if "blocks.0.mlp.fc1.weight" in state:
        return state["blocks.0.mlp.fc1.weight"].shape[0] / width
    hidden = state["blocks.0.mlp.w3.weight"].shape[1]
    near = (
        4.0,
        round(1.5 * hidden / width, 1),
        round(1.5 * hidden / width, 2),
        1.5 * hidden / width,
        (1.5 * hidden + 1) / width,
    )
    return next((r for r in near if swiglu_width(width, r) == hidden), near[-1])


def config_from(state: State) -> dict[str, Any]:
    """Constructor keywords of an official state. A null class is assumed."""
    hidden, in_channels, patch, _ = state["x_embedder.proj.weight"].shape
    out_channels = state["final_layer.linear.weight"].shape[0] // patch**2
    head = head_width(state)
    return {
        "input_size": round(state["pos_embed"].shape[1] ** 0.5) * patch,
        "patch_size": patch,
        "in_channels": in_channels,
        "hidden_size": hidden,
        "depth": depth_of(state),
        "num_heads": heads_of(hidden) if head is None else hidden // head,
        "mlp_ratio": mlp_ratio_of(state),
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "learn_sigma": out_channels == 2 * in_channels,
        **options_of(state),
    }


def header(config: Mapping[str, Any]) -> dict[str, Any]:
    """The released networks: told t, sampled as recipes/lightningdit/imagenet256-64ep.yaml; the 800-epoch one wants
    guidance_scale=6.7 sampler.cfg_start=0.125. Latents are VA-VAE's, of factor 16."""
    size, channels, classes = config["input_size"], config["in_channels"], config["num_classes"]
    data = {"image_size": 16 * size, "image_channels": 3, "num_classes": classes, "size": size, "channels": channels}
    sampler = {"name": "lightningdit", "method": "euler", "steps": 250, "shift": 0.3}
    sampler |= {"cfg_channels": 3, "cfg_start": 0.10}
    return {
        "view": dict(VIEW),
        "recipe": {"paper": "lightningdit", "sampler": sampler, "guidance_scale": 10.0},
        "data": {**data, "sample_shape": [channels, size, size]},
    }


def remarks(state: State, config: Mapping[str, Any]) -> dict[str, str]:
    """What no tensor tells: the heads where no table does, the null class, and which of the released networks it is."""
    found = dict(assumes(state, config))
    if head_width(state) is not None:
        found.pop("num_heads", None)
    if config["hidden_size"] in PUBLISHED and config["num_classes"] == 1000:
        found["guidance_scale"] = (
            "guidance_scale=10 sampler.cfg_start=0.1, of the 64-epoch network "
            "(of the 800-epoch one guidance_scale=6.7 sampler.cfg_start=0.125)"
        )
    return found


def allows(config: Mapping[str, Any]) -> None:
    """VgmError: the network is told two times or a text, as none of this layout is."""
    if config.get("second_time") or config.get("context_dim"):
        hint = "a .safetensors file keeps both"
        raise VgmError("this layout is of networks that are told one time and a class", hint, USAGE)


CONVERTER = Layout(
    name="lightningdit",
    component="lightningdit",
    summary="hustvl/LightningDiT (bare state, or train.py's model/ema)",
    recognise=recognise,
    to_ours=official,
    from_ours=official,
    config=config_from,
    allows=allows,
    published=Published(header=header, assumes=remarks),
)


# -- VA-VAE ----------------------------------------------------------------------------------------------------------


def recognise_codec(keys: Iterable[str]) -> bool:
    """A first stage with the projection of its training."""
    own = own_names(keys)
    return is_first_stage(own) and PROJECTION in own and "quantize.embedding.weight" not in own


def remarks_codec(state: State, config: Mapping[str, Any]) -> dict[str, str]:
    found = {"resolution": "resolution=256, so attention at 16"} if config["attn_resolutions"] else {}
    if not config.get("latent_stats"):
        found["stats"] = "latents are not normalised (stats=latents_stats.pt adds their statistics)"
    return found


CODEC = Layout(
    name="va-vae",
    component="va-vae",
    kind="codec",
    summary="VA-VAE (hustvl: vavae-imagenet256-f16d32-dinov2.pt, Lightning .ckpt)",
    recognise=recognise_codec,
    to_ours=to_ours,
    from_ours=dict,
    config=first_stage_config,
    files=Files(wrapper="state_dict", names=own_names),
    published=Published(assumes=remarks_codec),
)
