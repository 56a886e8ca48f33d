"""SUPIR's published weights: the control with its connectors, and the codec's two encoders.

SUPIR-v0Q.ckpt and SUPIR-v0F.ckpt hold `model.control_model.*`, `model.diffusion_model.project_modules.*` and
`first_stage_model.denoise_encoder.*`; the rest is SDXL's (sd_xl_base_1.0_0.9vae.safetensors). `vgm convert SRC DST --on
SDXL` reads the second below the first, and says what came from which. The U-Net that is steered and the text towers are
SDXL's own and have layouts of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vgm_cli.convert_api import Files, Layout, Proof, Published
from vgm_cli.nets.first_stage_checkpoints import SECOND, first_stage_config, is_first_stage, own_names, to_ours
from vgm_cli.nets.ldm_unet_checkpoints import unet_config
from vgm_cli.nets.text_presets import SDXL
from vgm_cli.nets.unet_checkpoints import indices
from vgm_cli.nn.example import noise

from .layers import ZeroSFT

State = Mapping[str, Tensor]
CONTROL, PROJECT = "model.control_model.", "model.diffusion_model.project_modules."
HINT, FIRST = "input_hint_block.0.weight", "0.zero_conv.weight"
PATH = {"name": "vp-discrete", "schedule": "scaled_linear", "steps": 1000, "beta_start": 0.00085, "beta_end": 0.012}


# -- control and connectors --------------------------------------------------------------------------------------------


def names_of(names: Iterable[str]) -> dict[str, str]:
    return {n: n for n in names if n.startswith((CONTROL, PROJECT))}


def control_to_ours(state: State) -> dict[str, Tensor]:
    """Official -> ours. KeyError: one of the two is missing."""
    for name in (CONTROL + HINT, PROJECT + FIRST):
        if name not in state:
            raise KeyError(name)
    ours = {"control." + k.removeprefix(CONTROL): v for k, v in state.items() if k.startswith(CONTROL)}
    return ours | {"project_modules." + k.removeprefix(PROJECT): v for k, v in state.items() if k.startswith(PROJECT)}


def control_from_ours(state: State) -> dict[str, Tensor]:
    theirs = {"control.": CONTROL, "project_modules.": PROJECT}
    return {to + k.removeprefix(own): v for k, v in state.items() for own, to in theirs.items() if k.startswith(own)}


def control_config(state: State) -> dict[str, Any]:
    """Constructor keywords read off the control, a copy of the encoder of the U-Net that it steers."""
    own = {k.removeprefix(CONTROL): v for k, v in state.items() if k.startswith(CONTROL)}
    stages, first = len(indices(own, "input_blocks.")), own["input_blocks.0.0.weight"]
    own |= {f"output_blocks.{i}.0": first for i in range(stages)}  # the decoder has as many stages
    unet = unet_config({**own, "out.2.bias": torch.empty(first.shape[1], device="meta")})
    depth = unet.get("transformer_depth", 1)
    levels = len(unet["channel_mult"])
    return {"unet": unet, "control_depth": tuple(depth) if isinstance(depth, list | tuple) else (depth,) * levels}


def header(config: Mapping[str, Any]) -> dict[str, Any]:
    """How the published networks are sampled, and what they are told."""
    unet = config.get("unet") or {}
    side, channels = unet.get("image_size", 128), unet.get("in_channels", 4)
    text = {"name": "sdxl-text", **SDXL["sdxl"], "train": True}
    return {
        "view": {"name": "denoiser", "path": PATH, "prediction": "eps", "time": "index"},
        "recipe": {"paper": "supir", "sampler": {"name": "supir"}},
        "data": {"sample_shape": [channels, side, side], "num_classes": 0, "image_size": 8 * side, "image_channels": 3},
        "conditions": {"text": text, "control": {"name": "degraded", "size": 8 * side, "channels": 3}},
    }


def control_forward(network: Any, config: Mapping[str, Any]) -> Tensor:
    """The control's maps, and what each connector makes of its map and of noise: without the U-Net that is steered."""
    given = network.example(config)
    told = {k: given[k] for k in ("context", "vector") if k in given}
    maps = network.control(given["control"], given["t"], given["x"], **told)
    found, at = [m.flatten() for m in maps], 0
    for layer in network.project_modules:
        c = maps[at]
        if isinstance(layer, ZeroSFT):
            before = noise(len(c), layer.decoder, *c.shape[2:]) if layer.decoder else None
            found.append(layer(c, noise(len(c), layer.skip, *c.shape[2:]), before).flatten())
            at += 1
        else:  # behind it stands the connector of the same map
            found.append(layer(c, noise(len(c), layer.norm1.num_channels, *c.shape[2:])).flatten())
    return torch.cat(found)


CONTROL_LAYOUT = Layout(
    name="supir",
    component="supir",
    recognise=lambda names: {CONTROL + HINT, PROJECT + FIRST} <= set(names),
    to_ours=control_to_ours,
    from_ours=control_from_ours,
    config=control_config,
    files=Files(wrapper="state_dict", names=names_of),
    published=Published(header=header),
    proof=Proof(forward=control_forward),
    summary="SUPIR's control and connectors (SUPIR-v0Q.ckpt, SUPIR-v0F.ckpt); base=FILE names the U-Net",
)


# -- codec -------------------------------------------------------------------------------------------------------------


def codec_to_ours(state: State) -> dict[str, Tensor]:
    """Official -> ours. KeyError: an encoder or the decoder is missing."""
    own = to_ours(state)
    if SECOND not in own:
        raise KeyError(SECOND)
    return own


def codec_config(state: State) -> dict[str, Any]:
    """Constructor keywords; SDXL's scale where the file says none."""
    return {"scale_factor": 0.13025, **first_stage_config(state)}


def assumes(state: State, config: Mapping[str, Any]) -> dict[str, str]:
    if "scale_factor" in state:
        return {}
    return {"scale_factor": f"scale_factor={config.get('scale_factor', 0.13025)}, SDXL's"}


CODEC_LAYOUT = Layout(
    name="supir-autoencoder",
    component="supir-autoencoder",
    kind="codec",
    recognise=lambda names: is_first_stage(own := own_names(names)) and SECOND in own,
    to_ours=codec_to_ours,
    from_ours=dict,
    config=codec_config,
    files=Files(wrapper="state_dict", names=own_names),
    published=Published(assumes=assumes),
    summary="SDXL's first stage with SUPIR's second encoder (--on SDXL, where a file has the second alone)",
)
