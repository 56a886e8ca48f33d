"""Weights of latent diffusion's U-Net: the official layout, whose names are ours, and diffusers' UNet2DConditionModel.

Official files are Lightning pickles or .safetensors with `model.diffusion_model.*` beside first stage and text encoder
(latent diffusion, Stable Diffusion 1 and 2, SDXL). Where there are averages of training, `model_ema.*`, whose names
have no dots, they are taken. diffusers' has transformers, residual blocks and convolutions where the size changes: not
the networks with plain attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vgm_cli.convert_api import Diffusers, Files, Layout, Proof, Published
from vgm_cli.errors import USAGE, VgmError, needs_extra
from vgm_cli.nets.ldm_unet import LDMUNet
from vgm_cli.nets.ldm_unet_presets import BETAS, ENDS, PRESETS
from vgm_cli.nets.unet_blocks import timestep_embedding
from vgm_cli.nets.unet_checkpoints import KINDS, OUTER, RES, blocks_of_levels, indices, layers
from vgm_cli.nn.example import noise
from vgm_cli.nn.meta import on_meta

State = Mapping[str, Tensor]
PREFIX, AVERAGE = "model.diffusion_model.", "model_ema."
OWN = ("time_embed.", "label_emb.", "input_blocks.", "middle_block.", "output_blocks.", "out.", "id_predictor.")
VECTORS = {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
NUMBERS = 6  # beside the text in SDXL's vector
SINUSOIDS = 256

# -- official ----------------------------------------------------------------------------------------------------------


def names_of(names: Iterable[str]) -> dict[str, str]:
    """{layout's name: name in the file} of the U-Net's tensors, below a prefix or bare."""
    found = list(names)
    if not any(n.startswith(PREFIX) for n in found):
        return {PREFIX + n: n for n in found if n.startswith(OWN)}
    there = set(found)
    pairs = {n: AVERAGE + n.removeprefix("model.").replace(".", "") for n in found if n.startswith(PREFIX)}
    return {n: average if average in there else n for n, average in pairs.items()}


def bare(state: State) -> dict[str, Tensor]:
    """The U-Net's own tensors of a file, under our names."""
    return {ours.removeprefix(PREFIX): state[theirs] for ours, theirs in names_of(state).items()}


def recognise(names: Iterable[str]) -> bool:
    """The U-Net of a whole checkpoint, or a bare one with transformers; one without is named as ADM's is."""
    own = {n.removeprefix(PREFIX) for n in names_of(names)}
    needed = {"time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.2.out_layers.3.weight", "out.2.weight"}
    attends = "middle_block.1.proj_in.weight" in own or any(n.startswith(PREFIX) for n in names)
    return attends and needed <= own and "output_blocks.0.0.in_layers.0.weight" in own


def depth_of(own: State, block: str) -> int:
    return len(indices(own, f"{block}.transformer_blocks."))


def decoder_places(counts: Sequence[int]) -> list[tuple[int, int]]:
    """(first output block, number of them) of every level, the first level first."""
    sizes = [n + 1 for n in counts]
    return [(sum(sizes[i + 1 :]), sizes[i]) for i in range(len(sizes))]


def shapes(own: State) -> dict[str, Any]:
    """Keywords that shapes tell."""
    counts = blocks_of_levels(own)
    levels = len(counts)
    starts = [1 + sum(counts[:i]) + i for i in range(levels)]
    first = [f"input_blocks.{start}" for start in starts]
    channels = own["time_embed.0.weight"].shape[1]
    out = len(own["out.2.bias"])
    mult = [len(own[f"{b}.0.out_layers.3.bias"]) / channels for b in first]
    transformers = "middle_block.1.proj_in.weight" in own
    attended = [i for i, b in enumerate(first) if f"{b}.1.norm.weight" in own]
    blocks = [depth_of(own, f"{b}.1") if transformers else 1 for b in first]
    middle = depth_of(own, "middle_block.1") if transformers else 1
    plain = [b or middle for b in blocks]
    config: dict[str, Any] = {
        "in_channels": out,
        "concat_channels": own["input_blocks.0.0.weight"].shape[1] - out,
        "model_channels": channels,
        "num_res_blocks": counts[0] if len(set(counts)) == 1 else tuple(counts),
        "channel_mult": tuple(int(m) if m == int(m) else m for m in mult),
        "attention_resolutions": tuple(2**i for i in reversed(attended)),
        "use_scale_shift_norm": len(own[f"{first[0]}.0.emb_layers.1.bias"]) == 2 * round(mult[0] * channels),
        "use_spatial_transformer": transformers,
        "context_dim": None,
    }
    if levels > 1:
        change = f"input_blocks.{counts[0] + 1}.0"
        config["resblock_updown"] = f"{change}.in_layers.0.weight" in own
        config["conv_resample"] = config["resblock_updown"] or f"{change}.op.weight" in own
    attending = [
        [sum(f"{half}_blocks.{start + j}.1.norm.weight" in own for j in range(n)) for start, n in places]
        for half, places in (("input", list(zip(starts, counts))), ("output", decoder_places(counts)))
    ]
    if any(a and (a, b) not in ((n, n + 1), (n, 0)) for a, b, n in zip(*attending, counts)):
        config["num_attention_blocks"] = tuple(attending[0])
    if transformers:
        block = "middle_block.1.transformer_blocks.0"
        width = own[f"{block}.attn2.to_k.weight"].shape[1]
        config["context_dim"] = width
        config["use_linear_in_transformer"] = own["middle_block.1.proj_in.weight"].ndim == 2
        same = len(set(plain)) == 1 and middle == plain[-1]
        config["transformer_depth"] = plain[0] if same else tuple(b or 1 for b in blocks)

        def alone(block: str) -> bool:
            """Whether its first attention, too, is to the context."""
            seen = own[f"{block}.transformer_blocks.0.attn1.to_k.weight"].shape[1]
            return seen == width != own[f"{block}.proj_out.weight"].shape[1]

        levels_alone = tuple(i in attended and alone(f"{b}.1") for i, b in enumerate(first))
        config |= {"disable_self_attentions": levels_alone} if any(levels_alone) else {}
        config |= {"disable_middle_self_attn": True} if alone("middle_block.1") else {}
    if "label_emb.weight" in own:
        config["num_classes"] = len(own["label_emb.weight"])
    elif "label_emb.0.0.weight" in own:
        config["vector_dim"] = own["label_emb.0.0.weight"].shape[1]
    if "id_predictor.1.weight" in own:
        config["n_embed"] = len(own["id_predictor.1.weight"])
    return config


TOLD = ("in_channels", "concat_channels", "model_channels", "num_res_blocks", "channel_mult", "context_dim",
        "use_scale_shift_norm", "use_spatial_transformer", "resblock_updown", "use_linear_in_transformer",
        "transformer_depth", "vector_dim", "num_classes", "num_attention_blocks",
        "disable_middle_self_attn")  # fmt: skip
DEFAULTS = {"use_spatial_transformer": True, "transformer_depth": 1}


def preset_of(config: Mapping[str, Any]) -> str | None:
    """The name of the published network that has these shapes."""

    def shape(keywords: Mapping[str, Any]) -> list[Any]:
        levels = len(keywords["channel_mult"])
        attended = sorted(f for f in keywords["attention_resolutions"] if f < 2**levels)
        return [attended, *((keywords.get(k, DEFAULTS.get(k)) or 0) for k in TOLD)]

    own = shape({**config, "channel_mult": tuple(config["channel_mult"])})
    return next((name for name, preset in PRESETS.items() if shape(preset) == own), None)


def unet_config(own: State) -> dict[str, Any]:
    """Constructor keywords. Heads are not in the shapes: as in the published network of these, else 64 channels of each
    where transformers project by linear layers, else eight."""
    config = shapes(own)
    preset = preset_of(config)
    if preset is not None:
        return {**config, **PRESETS[preset]}
    if config.get("use_linear_in_transformer"):
        return {**config, "num_head_channels": 64, "legacy": False}
    return {**config, "num_heads": 8, "legacy": False}


def complete(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same. KeyError: a tensor of the network is missing."""
    config = {**shapes(own), "num_heads": 1}
    side = 2 ** (len(config["channel_mult"]) + 1)
    groups = 1  # names do not depend on heads, groups and sides
    with on_meta():
        names = LDMUNet(**config, image_size=side, norm_groups=groups).state_dict()
    for name in names:
        if name not in own:
            raise KeyError(name)
    return own


def header(config: Mapping[str, Any]) -> dict[str, Any]:
    """How the published networks were trained and are sampled: the noise of 1000 steps, even in the square root of
    beta; a network that is none of them is taken for one of Stable Diffusion's kind."""
    start, end = ENDS.get(preset_of(config) or "sd1", BETAS)
    side, channels = config.get("image_size", 64), config.get("in_channels", 4)
    path = {"name": "vp-discrete", "schedule": "scaled_linear", "steps": 1000, "beta_start": start, "beta_end": end}
    scale = {"cin256-v2": 3.0, "txt2img-1p4B": 5.0, "sd1": 7.5, "sd2": 9.0, "sdxl": 5.0}.get(preset_of(config) or "sd1")
    guided = {"guidance_scale": scale} if config.get("context_dim") and scale else {}
    return {
        "view": {"name": "denoiser", "path": path, "prediction": "eps", "time": "index"},
        "recipe": {"paper": "ldm", "sampler": {"name": "ldm", "steps": 50}, **guided},
        "data": {"sample_shape": [channels, side, side], "num_classes": config.get("num_classes") or 0},
    }


def assumes(state: State, config: Mapping[str, Any]) -> dict[str, str]:
    """What no tensor tells, where the network is none of the published ones."""
    if preset_of(config) == "sd2":
        return {"prediction": "prediction=eps; Stable Diffusion 2's files for 768 pixels predict v (prediction=v)"}
    if preset_of(config):
        return {}
    key = "num_head_channels" if config.get("num_head_channels") else "num_heads"
    return {key: f"{key}={config[key]} in every attention", "schedule": "Stable Diffusion's noise"}


STAGE, TOLD_BY = "first_stage_model.", "cond_stage_model."
BESIDE = {
    "codec": {"autoencoder-kl": STAGE, "vq-autoencoder": STAGE},
    "text": {
        "sdxl-text": "",
        "clip-text": TOLD_BY + "transformer.",
        "open-clip-text": TOLD_BY + "model.",
        "bert-text": TOLD_BY,
    },
    "class": {"class-token": TOLD_BY},
}
LDM_UNET = Layout(
    name="ldm-unet",
    component="ldm-unet",
    recognise=recognise,
    to_ours=lambda state: complete(bare(state)),
    from_ours=lambda state: {PREFIX + k: v for k, v in complete(dict(state)).items()},
    config=lambda state: unet_config(bare(state)),
    files=Files(wrapper="state_dict", names=names_of),
    published=Published(header=header, assumes=assumes),
    beside=BESIDE,
    summary="CompVis and Stability U-Nets, alone or in a checkpoint, averaged where an average is there",
)

# -- diffusers ---------------------------------------------------------------------------------------------------------


def plan(config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(ours, theirs, kind) of every block. VgmError: diffusers' network has no such."""
    if not config["use_spatial_transformer"] or config.get("resblock_updown") or not config.get("conv_resample", True):
        message = "diffusers' UNet2DConditionModel has transformers, and convolutions where the size changes"
        raise VgmError(message, "--to ldm-unet holds every network", USAGE)
    uneven = config.get("num_attention_blocks") or config.get("disable_middle_self_attn")
    uneven = uneven or not isinstance(config["num_res_blocks"], int)
    if config.get("n_embed") or config["channel_mult"][0] != 1 or uneven:
        raise VgmError("diffusers' UNet2DConditionModel cannot express this network", "--to ldm-unet can", USAGE)
    levels = len(config["channel_mult"])
    attended = [i for i in range(levels) if 2**i in config["attention_resolutions"]]
    return layers(levels, config["num_res_blocks"], attended, updown=False)


def outer(own: State, ours: bool) -> dict[str, str]:
    """{ours: theirs} of the layers around the blocks."""
    pairs = {f"{a}.{kind}": f"{b}.{kind}" for a, b in {**OUTER, **VECTORS}.items() for kind in KINDS}
    pairs["label_emb.weight"] = "class_embedding.weight"
    return {a: b for a, b in pairs.items() if (a if ours else b) in own}


def transformer_tensors(own: State, block: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{block}."): v for k, v in own.items() if k.startswith(f"{block}.")}


def diffusers_from_ours(state: State) -> dict[str, Tensor]:
    """Ours -> UNet2DConditionModel. VgmError: it cannot express this network."""
    own = complete(dict(state))
    theirs = {b: own[a] for a, b in outer(own, ours=True).items()}
    for a, b, block in plan(shapes(own)):
        if block == "attn":
            theirs |= {f"{b}.{k}": v for k, v in transformer_tensors(own, a).items()}
        elif block == "conv":
            theirs |= {f"{b}.{kind}": own[f"{a}.{kind}"] for kind in KINDS}
        else:
            theirs |= {f"{b}.{y}.{k}": own[f"{a}.{x}.{k}"] for x, y in RES.items() for k in KINDS
                       if f"{a}.{x}.{k}" in own}  # fmt: skip
    return theirs


def diffusers_to_ours(state: State) -> dict[str, Tensor]:
    """UNet2DConditionModel -> ours. KeyError: a tensor is missing."""
    levels, depth = len(indices(state, "down_blocks.")), len(indices(state, "down_blocks.0.resnets."))
    attended = [i for i in range(levels) if f"down_blocks.{i}.attentions.0.proj_in.weight" in state]
    ours = {a: state[b] for a, b in outer(state, ours=False).items()}
    for a, b, block in layers(levels, depth, attended, updown=False):
        if block == "attn":
            ours |= {f"{a}.{k}": v for k, v in transformer_tensors(state, b).items()}
        elif block == "conv":
            ours |= {f"{a}.{kind}": state[f"{b}.{kind}"] for kind in KINDS}
        else:
            ours |= {f"{a}.{x}.{k}": state[f"{b}.{y}.{k}"] for x, y in RES.items() for k in KINDS
                     if f"{b}.{y}.{k}" in state}  # fmt: skip
    return complete(ours)


def heads_of(config: Mapping[str, Any]) -> Any:
    """Attention heads of each level, which diffusers calls attention_head_dim."""
    width = config.get("num_head_channels")
    if not width:
        return config.get("num_heads", 8)
    return [int(m * config["model_channels"]) // width for m in config["channel_mult"]]


def diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor keywords -> config.json of diffusers' UNet2DConditionModel."""
    levels, mult = len(config["channel_mult"]), config["channel_mult"]
    attends = [2**i in config["attention_resolutions"] for i in range(levels)]
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    blocks = config.get("transformer_depth", 1)
    vector = config.get("vector_dim")
    told = {"addition_embed_type": "text_time", "addition_time_embed_dim": SINUSOIDS,
            "projection_class_embeddings_input_dim": vector} if vector else {}  # fmt: skip
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": config.get("image_size", 64),
        "in_channels": config["in_channels"] + config.get("concat_channels", 0),
        "out_channels": config.get("out_channels") or config["in_channels"],
        "block_out_channels": [config["model_channels"] * m for m in mult],
        "layers_per_block": config["num_res_blocks"],
        "down_block_types": [down[not a] for a in attends],
        "up_block_types": [up[not a] for a in reversed(attends)],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "cross_attention_dim": config["context_dim"],
        "attention_head_dim": heads_of(config),
        "transformer_layers_per_block": list(blocks) if isinstance(blocks, list | tuple) else blocks,
        "use_linear_projection": config.get("use_linear_in_transformer", False),
        "num_class_embeds": (config.get("num_classes") or 0) + config.get("null_class", False) or None,
        "resnet_time_scale_shift": "scale_shift" if config.get("use_scale_shift_norm") else "default",
        "only_cross_attention": list(config.get("disable_self_attentions") or [False] * levels),
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "norm_num_groups": config.get("norm_groups", 32),
        "norm_eps": 1e-5,
        "act_fn": "silu",
        **told,
    }


FIXED = {"act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5, "center_input_sample": False,
         "mid_block_scale_factor": 1, "resnet_out_scale_factor": 1, "resnet_skip_time_act": False,
         "time_embedding_type": "positional", "time_embedding_act_fn": None, "timestep_post_act": None}  # fmt: skip


def from_diffusers(json: Mapping[str, Any]) -> dict[str, Any]:
    """config.json -> keywords that shapes do not tell. VgmError: what our network cannot have."""
    for key, value in FIXED.items():  # what no tensor tells
        if json.get(key, value) != value:
            raise VgmError(f"config.json: {key}={json[key]} has no counterpart", f"{key}={value} has", USAGE)
    heads = json.get("num_attention_heads") or json.get("attention_head_dim", 8)
    widths = json.get("block_out_channels") or []
    said: dict[str, Any] = {"image_size": json.get("sample_size") or 64, "norm_groups": json.get("norm_num_groups", 32)}
    if isinstance(heads, int):
        return {**said, "num_heads": heads, "num_head_channels": None, "legacy": False}
    own = {w / h for w, h in zip(widths, heads)}
    if len(own) != 1 or not (width := own.pop()).is_integer():
        raise VgmError(f"attention heads {heads} at widths {widths} have no counterpart", "one width of head", USAGE)
    return {**said, "num_head_channels": int(width), "legacy": False}


def given(config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Our network's example, and the parts of its vector that diffusers is given."""
    own = LDMUNet.example({"num_classes": 0, "vector_dim": None, "concat_channels": 0, "image_size": 64, **config})
    if not config.get("vector_dim"):
        return own, {}
    text, numbers = noise(1, config["vector_dim"] - NUMBERS * SINUSOIDS), torch.arange(1.0, NUMBERS + 1)[None]
    told = timestep_embedding(numbers[0], SINUSOIDS).flatten()[None]
    return {**own, "vector": torch.cat([text, told], dim=1)}, {"text_embeds": text, "time_ids": numbers}


def forward(network: Any, config: Mapping[str, Any]) -> Tensor:
    out: Tensor = network(**given(config)[0])
    return out


def diffusers_forward(state: State, config: Mapping[str, Any]) -> Tensor:
    """One evaluation by diffusers' own UNet2DConditionModel. VgmError: not installed."""
    try:
        from diffusers import UNet2DConditionModel
    except ImportError as e:
        raise needs_extra("this proof", "diffusers", "hf") from e
    network = UNet2DConditionModel.from_config(diffusers_config(config)).eval()
    network.load_state_dict({k: v.float() for k, v in state.items()})
    own, told = given(config)
    x = torch.cat([own["x"], own["concat"]], dim=1) if "concat" in own else own["x"]
    with torch.no_grad():
        found: Tensor = network(
            x, own["t"], own["context"], class_labels=own.get("y"), added_cond_kwargs=told or None
        ).sample
    return found


def diffusers_allows(config: Mapping[str, Any]) -> None:
    """VgmError: diffusers' network has no such."""
    plan({"use_spatial_transformer": True, **config})


LDM_UNET_DIFFUSERS = Layout(
    name="ldm-unet-diffusers",
    component="ldm-unet",
    recognise=lambda names: {"conv_in.weight", "mid_block.attentions.0.proj_in.weight", "conv_norm_out.weight",
                             "up_blocks.0.resnets.0.norm1.weight"} <= set(names),
    to_ours=diffusers_to_ours,
    from_ours=diffusers_from_ours,
    config=lambda state: unet_config(diffusers_to_ours(state)),
    allows=diffusers_allows,
    published=Published(header=header, assumes=assumes),
    diffusers=Diffusers(
        config_json=diffusers_config,
        from_json=lambda json: from_diffusers(json) if "block_out_channels" in json else {},
        matches=lambda json: json.get("_class_name") == "UNet2DConditionModel",
    ),
    proof=Proof(reference=diffusers_forward, forward=forward),
    summary="diffusers UNet2DConditionModel",
)  # fmt: skip
