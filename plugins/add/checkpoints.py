"""Weights of SD-Turbo and SDXL-Turbo, and of StyleGAN-T's discriminator, whose heads ADD takes over. ADD's own was not
released.

Turbo files are, tensor for tensor, those of Stable Diffusion 2.1 and SDXL: nothing in them tells which they are, so
that --from says it. What differs is how the network is sampled. Of discriminators official names are ours, below
heads.; dino.* beside them is the frozen vision transformer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from vgm_cli.convert_api import Files, Layout, Proof
from vgm_cli.nets.ldm_unet_checkpoints import LDM_UNET, LDM_UNET_DIFFUSERS
from vgm_cli.nn.meta import on_meta

from .discriminator import Heads

State = Mapping[str, Tensor]


def heads_config(state: State) -> dict[str, Any]:
    """Keywords of Heads, read off the shapes."""
    count = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("heads."))
    told = state.get("heads.0.cmapper.weight")
    config: dict[str, Any] = {"channels": tuple(len(state[f"heads.{k}.main.0.0.bias"]) for k in range(count))}
    return config if told is None else {**config, "c_dim": told.shape[1], "cmap_dim": told.shape[0]}


def complete(state: State) -> dict[str, Tensor]:
    """The heads' tensors. KeyError: one is missing."""
    with on_meta():
        names = Heads(**heads_config(state)).state_dict()
    return {name: state[name] for name in names}


def own(names: Iterable[str]) -> dict[str, str]:
    return {n: n for n in names if n.startswith("heads.")}


HEADS = Layout(
    name="stylegan-t-discriminator",
    component="add-discriminator",
    recognise=lambda names: (
        {"heads.0.main.0.0.weight_orig", "heads.0.main.1.fn.0.weight_v", "heads.0.cls.bias"} <= set(names)
    ),
    to_ours=complete,
    from_ours=complete,
    config=heads_config,
    files=Files(names=own),
    summary="heads of autonomousvision/stylegan-t's discriminator",
)

# -- SD-Turbo, SDXL-Turbo ----------------------------------------------------------------------------------------------

TIMES = [1.0, 0.9, 0.8, 0.7]  # of the timesteps 999, 899, 799, 699
SIDE = 64  # of the latents of pictures of 512 pixels


def turbo_header(config: Mapping[str, Any]) -> dict[str, Any]:
    """As the base network's, but asked at four times, without guidance, for pictures of 512 pixels."""
    base = LDM_UNET.published.header(config)
    channels, *sides = base["data"]["sample_shape"]
    return {
        "view": {
            "name": "flow-map",
            "denoiser": base["view"],
            "boundary": "none",
            "times": TIMES,
            "guided": True,
        },
        "recipe": {"paper": "add", "sampler": {"name": "turbo"}},
        "data": {**base["data"], "sample_shape": [channels, *(min(side, SIDE) for side in sides)]},
    }


def turbo(base: Layout, name: str, summary: str) -> Layout:
    """A base network's layout, taken where it is named."""
    published = replace(base.published, header=turbo_header)
    own = {"recognise": lambda names: False, "published": published, "proof": Proof()}
    return replace(base, name=name, summary=summary, **own)  # type: ignore[arg-type]


TURBO = turbo(LDM_UNET, "ldm-unet-turbo", "SD-Turbo's and SDXL-Turbo's U-Nets, alone or in their checkpoints")
TURBO_DIFFUSERS = turbo(LDM_UNET_DIFFUSERS, "ldm-unet-turbo-diffusers", "the same in diffusers' UNet2DConditionModel")
