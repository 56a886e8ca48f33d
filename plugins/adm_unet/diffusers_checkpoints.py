"""ADM weights in the layout of diffusers' UNet2DModel, with its config.json.

diffusers (0.35) can express networks with one width of head everywhere, a first multiplier of 1, and convolutions or
residual blocks where the size changes: the 64 and 256 pixel models, LSUN, and the trunk of the 128->512 upsampler; not
those with 4 heads (128, 64->256), nor 512, nor conv_resample=false. It stores q, k and v apart, so the order of
attention that ours has must be known: it names the layout. config.json tells the width of a head and of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from vgm_cli.convert_api import Diffusers, Layout, Proof, Published
from vgm_cli.errors import USAGE, VgmError, needs_extra
from vgm_cli.nets.unet_checkpoints import KINDS, OUTER, RES, indices, layers

from .checkpoints import State, config_from, header
from .model import UNetModel


def split_qkv(qkv: Tensor, heads: int, new_order: bool) -> tuple[Tensor, ...]:
    """Our 3C rows -> q, k, v of C rows each."""
    return qkv.chunk(3) if new_order else tuple(p.flatten(0, 1) for p in qkv.unflatten(0, (heads, 3, -1)).unbind(1))


def join_qkv(parts: list[Tensor], heads: int, new_order: bool) -> Tensor:
    if new_order:
        return torch.cat(parts)
    return torch.stack([p.unflatten(0, (heads, -1)) for p in parts], dim=1).flatten(0, 2)


def diffusers_to_ours(state: State, new_order: bool, head_channels: int) -> dict[str, Tensor]:
    """UNet2DModel -> ours. KeyError: a tensor is missing."""
    levels, depth = len(indices(state, "down_blocks.")), len(indices(state, "down_blocks.0.resnets."))
    attention = [i for i in range(levels) if f"down_blocks.{i}.attentions.0.to_q.weight" in state]
    updown = levels == 1 or "down_blocks.0.downsamplers.0.norm1.weight" in state
    ours = {f"{a}.{kind}": state[f"{b}.{kind}"] for a, b in OUTER.items() for kind in KINDS}
    if "class_embedding.weight" in state:
        ours["label_emb.weight"] = state["class_embedding.weight"]
    for a, b, block in layers(levels, depth, attention, updown):
        for kind in KINDS:
            if block == "conv":
                ours[f"{a}.{kind}"] = state[f"{b}.{kind}"]
            elif block == "res":
                for x, y in RES.items():
                    if y != "conv_shortcut" or f"{b}.{y}.{kind}" in state:
                        ours[f"{a}.{x}.{kind}"] = state[f"{b}.{y}.{kind}"]
            else:
                parts = [state[f"{b}.to_{x}.{kind}"] for x in "qkv"]
                qkv = join_qkv(parts, len(parts[0]) // head_channels, new_order)
                out = state[f"{b}.to_out.0.{kind}"]
                width_one = kind == "weight"  # ours are convolutions of width 1
                ours[f"{a}.norm.{kind}"] = state[f"{b}.group_norm.{kind}"]
                ours[f"{a}.qkv.{kind}"] = qkv[..., None] if width_one else qkv
                ours[f"{a}.proj_out.{kind}"] = out[..., None] if width_one else out
    return ours


def diffusers_from_ours(state: State, new_order: bool, head_channels: int) -> dict[str, Tensor]:
    """Ours -> UNet2DModel. VgmError: diffusers cannot express this network. KeyError: a tensor is missing."""
    config = config_from(state)
    if config["channel_mult"][0] != 1 or not config["conv_resample"]:
        raise VgmError(
            "diffusers' UNet2DModel cannot express this network",
            "it needs channel_mult[0]=1, and convolutions or residual blocks where the size changes",
            USAGE,
        )
    attention = [f.bit_length() - 1 for f in config["attention_resolutions"]]
    theirs = {f"{b}.{kind}": state[f"{a}.{kind}"] for a, b in OUTER.items() for kind in KINDS}
    if "label_emb.weight" in state:
        theirs["class_embedding.weight"] = state["label_emb.weight"]
    levels, updown = len(config["channel_mult"]), config["resblock_updown"]
    for a, b, block in layers(levels, config["num_res_blocks"], attention, updown):
        for kind in KINDS:
            if block == "conv":
                theirs[f"{b}.{kind}"] = state[f"{a}.{kind}"]
            elif block == "res":
                for x, y in RES.items():
                    if x != "skip_connection" or f"{a}.{x}.{kind}" in state:
                        theirs[f"{b}.{y}.{kind}"] = state[f"{a}.{x}.{kind}"]
            else:
                qkv, out = (state[f"{a}.{x}.{kind}"] for x in ("qkv", "proj_out"))
                if kind == "weight":
                    qkv, out = qkv[..., 0], out[..., 0]
                parts = split_qkv(qkv, len(qkv) // (3 * head_channels), new_order)
                theirs |= {f"{b}.to_{x}.{kind}": part for x, part in zip("qkv", parts)}
                theirs |= {f"{b}.to_out.0.{kind}": out, f"{b}.group_norm.{kind}": state[f"{a}.norm.{kind}"]}
    return theirs


def diffusers_config(config: Mapping[str, Any], head_channels: int) -> dict[str, Any]:
    """Our constructor keywords -> config.json of diffusers' UNet2DModel."""
    levels = len(config["channel_mult"])
    attends = [2**i in config["attention_resolutions"] for i in range(levels)]
    channels = config.get("in_channels", 3)
    updown = config.get("resblock_updown", True)
    change, plain = "resnet" if updown else "conv", ("DownBlock2D", "UpBlock2D")
    if updown:
        plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    return {
        "_class_name": "UNet2DModel",
        "sample_size": config["image_size"],
        "in_channels": channels * (2 if config.get("super_res") else 1),
        "out_channels": config.get("out_channels") or channels * (2 if config.get("learn_sigma", True) else 1),
        "num_class_embeds": (config.get("num_classes") or 0) + config.get("null_class", False) or None,
        "layers_per_block": config["num_res_blocks"],
        "block_out_channels": [config["model_channels"] * m for m in config["channel_mult"]],
        "down_block_types": ["AttnDownBlock2D" if a else plain[0] for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else plain[1] for a in reversed(attends)],
        "downsample_type": change,
        "upsample_type": change,
        "attention_head_dim": head_channels,
        "resnet_time_scale_shift": "scale_shift" if config.get("use_scale_shift_norm", True) else "default",
        "freq_shift": 0,
        "flip_sin_to_cos": True,
        "time_embedding_type": "positional",
        "norm_num_groups": config.get("norm_groups", 32),
        "attn_norm_num_groups": config.get("norm_groups", 32),
        "norm_eps": 1e-5,
    }


def allows(config: Mapping[str, Any], new_order: bool, head_channels: int, groups: int) -> None:
    """VgmError: not in this architecture; the layout says another order of attention, width of head or of group."""
    if config.get("patch_size", 1) != 1:
        raise VgmError(f"diffusers' UNet2DModel has no patches, here patch_size is {config['patch_size']}", code=USAGE)
    if config.get("use_new_attention_order", False) != new_order:
        other = "adm-unet-diffusers-legacy" if new_order else "adm-unet-diffusers"
        raise VgmError(
            "this layout is of networks with the other order of attention", f"this one's is --to {other}", USAGE
        )
    width = config.get("num_head_channels")
    if width != head_channels:
        raise VgmError(
            f"diffusers' layout is read with {head_channels} channels a head, not {width}",
            "a folder, with its config.json, holds any width" if width else "",
            USAGE,
        )
    if config.get("norm_groups", 32) != groups:
        raise VgmError(
            f"diffusers' layout is read with {groups} groups of channels, not {config['norm_groups']}",
            "a folder, with its config.json, holds any number",
            USAGE,
        )


def diffusers_forward(state: State, config: Mapping[str, Any], head_channels: int) -> Tensor:
    """One evaluation by diffusers' own UNet2DModel. VgmError: not installed."""
    try:
        from diffusers import UNet2DModel
    except ImportError as e:
        raise needs_extra("this proof", "diffusers", "hf") from e
    network = UNet2DModel.from_config(diffusers_config(config, head_channels)).eval()
    network.load_state_dict({k: v.float() for k, v in state.items()})
    given = UNetModel.example(config)
    x = given["x"]
    if "low_res" in given:
        x = torch.cat([x, interpolate(given["low_res"], x.shape[2:], mode="bilinear")], dim=1)
    with torch.no_grad():
        return network(x, given["t"], class_labels=given.get("y")).sample  # type: ignore[no-any-return]


def diffusers(name: str, new_order: bool, head_channels: int = 64, groups: int = 32) -> Layout:
    def to_ours(state: State) -> dict[str, Tensor]:
        return diffusers_to_ours(state, new_order, head_channels)

    def config(state: State) -> dict[str, Any]:
        known = {"num_heads": 1, "num_head_channels": head_channels, "use_new_attention_order": new_order}
        return config_from(to_ours(state)) | known | ({"norm_groups": groups} if groups != 32 else {})

    def adapt(layout: Layout, json: Mapping[str, Any]) -> Layout:
        width, number = json.get("attention_head_dim") or head_channels, json.get("norm_num_groups") or groups
        return diffusers(name, new_order, width, number)

    def recognise(keys: Iterable[str]) -> bool:
        wanted = {"time_embedding.linear_1.weight", "conv_in.weight", "mid_block.attentions.0.group_norm.weight"}
        return wanted | {"mid_block.attentions.0.to_q.weight", "up_blocks.0.resnets.0.norm1.weight"} <= set(keys)

    return Layout(
        name=name,
        component="adm-unet",
        recognise=recognise,
        to_ours=to_ours,
        from_ours=lambda state: diffusers_from_ours(state, new_order, head_channels),
        config=config,
        allows=lambda config: allows(config, new_order, head_channels, groups),
        published=Published(header=header),
        diffusers=Diffusers(
            config_json=lambda config: diffusers_config(config, config.get("num_head_channels") or head_channels),
            from_json=lambda json: {"image_size": json["sample_size"]} if json.get("sample_size") else {},
            adapt=adapt,
        ),
        proof=Proof(reference=lambda state, config: diffusers_forward(state, config, head_channels)),
        summary=f"diffusers UNet2DModel, {head_channels} channels a head, {'new' if new_order else 'legacy'} order",
    )


DIFFUSERS = diffusers("adm-unet-diffusers", new_order=True)
DIFFUSERS_LEGACY = diffusers("adm-unet-diffusers-legacy", new_order=False)
