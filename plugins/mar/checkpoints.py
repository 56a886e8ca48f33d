"""MAR weights: the official layout, whose names are ours.

LTH14/mar@fe470ac: checkpoint-last.pth of main_mar.py is a dict with "model" and "model_ema", which is read unless the
other is asked for, and of runs the optimizer, the epoch and the arguments besides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from vgm_cli.convert_api import Files, Layout, Published
from vgm_cli.errors import USAGE, VgmError

from .presets import GUIDANCE

State = Mapping[str, Tensor]
NOISE = "train with model.prediction=eps for a checkpoint that official code reads"
HEADS = {768: 12, 1024: 16, 1280: 16}  # by width, as published
NEEDED = ("fake_latent", "mask_token", "z_proj.weight", "encoder_pos_embed_learned", "decoder_pos_embed_learned",
          "diffusion_pos_embed_learned", "decoder_embed.weight", "diffloss.net.cond_embed.weight")  # fmt: skip


def complete(state: State) -> dict[str, Tensor]:
    """Official names are ours, both ways. KeyError: a tensor is missing."""
    for name in NEEDED:
        if name not in state:
            raise KeyError(name)
    return dict(state)


def count(names: Iterable[str], pattern: str) -> int:
    """One more than the highest number that the pattern's group finds."""
    return 1 + max((int(m[1]) for n in names if (m := re.match(pattern, n))), default=-1)


def heads_of(width: int) -> int:
    """The published number of heads, or that of the largest head up to 64 channels that divides the width."""
    return HEADS.get(width) or next(width // d for d in range(min(64, width), 0, -1) if width % d == 0)


def ratio_of(*weights: Tensor) -> float:
    """The least ratio that gives all of these MLPs, (hidden, width), their hidden width, which is rounded down."""
    ratio = max(hidden / width for hidden, width in (w.shape for w in weights))
    while any(int(width * ratio) < hidden for hidden, width in (w.shape for w in weights)):  # the last bit was lost
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def config_from(state: State) -> dict[str, Any]:
    """Constructor keywords read off the shapes; a token is taken for one place of the latents."""
    encoder, channels = state["z_proj.weight"].shape
    decoder, positions = state["decoder_embed.weight"].shape[0], state["diffusion_pos_embed_learned"].shape[1]
    config: dict[str, Any] = {
        "input_size": round(positions**0.5),
        "patch_size": 1,
        "in_channels": channels,
        "num_classes": len(state["class_emb.weight"]) if "class_emb.weight" in state else 0,
        "mlp_ratio": ratio_of(state["encoder_blocks.0.mlp.fc1.weight"], state["decoder_blocks.0.mlp.fc1.weight"]),
        "buffer_size": state["encoder_pos_embed_learned"].shape[1] - positions,
        "head_depth": count(state, r"diffloss\.net\.res_blocks\.(\d+)\."),
        "head_width": state["diffloss.net.cond_embed.weight"].shape[0],
    }
    for half, width in (("encoder", encoder), ("decoder", decoder)):
        depth = count(state, rf"{half}_blocks\.(\d+)\.")
        config |= {f"{half}_width": width, f"{half}_depth": depth, f"{half}_heads": heads_of(width)}
    return config


def allows(config: Mapping[str, Any]) -> None:
    """VgmError: the head says the token, where the official sampler takes what it says for the noise."""
    if config.get("prediction", "eps") != "eps":
        raise VgmError("official code takes what the head says for noise; this one says the token", NOISE, USAGE)


def header(config: Mapping[str, Any]) -> dict[str, Any]:
    """How the released networks are sampled from (README), and the latents that they write: those of a codec of factor
    16, or of one of factor 8 with patches of 2."""
    size, channels, classes = config["input_size"], config["in_channels"], config["num_classes"]
    data = {"size": size, "channels": channels, "num_classes": classes, "sample_shape": [channels, size, size]}
    pixels = {"image_size": 16 // config["patch_size"] * size, "image_channels": 3}
    if channels in (1, 3):
        pixels = {"image_size": size, "image_channels": channels}
    sampler = {"name": "mar", "preset": "table"}
    recipe: dict[str, Any] = {"paper": "mar", "sampler": sampler}
    if classes:
        recipe["guidance_scale"] = GUIDANCE.get(config["encoder_width"], 3.0)
    return {"recipe": recipe, "data": data | pixels}


def assumes(state: State, config: Mapping[str, Any]) -> dict[str, str]:
    """What no tensor tells: heads, and how a token is cut from the latents."""
    found = {}
    for half in ("encoder", "decoder"):
        width, heads = config[f"{half}_width"], config[f"{half}_heads"]
        if width not in HEADS:
            remark = f"{half}_heads={heads}, heads of {width // heads} channels"
            found[f"{half}_heads"] = f"{remark} ({half}_heads=N tells otherwise)"
    channels = config["in_channels"] * config["patch_size"] ** 2
    if channels != 16 or len(state["fake_latent"][0]) not in HEADS:
        remark = f"a token of {channels} numbers is one place of {channels} channels"
        found["patch_size"] = f"{remark} (patch_size=P in_channels=C input_size=S tell otherwise)"
    return found


CONVERTER = Layout(
    name="mar",
    component="mar",
    summary="official MAR checkpoints (checkpoint-last.pth: model_ema, or model)",
    recognise=lambda names: set(NEEDED) <= set(names),
    to_ours=complete,
    from_ours=complete,
    config=config_from,
    allows=allows,
    files=Files(wrapper="model_ema"),
    published=Published(header=header, assumes=assumes),
)
