"""Statistics of latents, published beside a codec, are put into the codec's own file: `vgm convert … stats=FILE`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vgm_cli.data.latents import open_latents
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.weights import layout as layouts
from vgm_cli.weights.source import Conversion
from vgm_cli.weights.state import read_state

WANTED = "a file with tensors mean and std (latents_stats.pt), or a folder of latents as LightningDiT stores them"


def add_statistics(job: Conversion, where: str) -> None:
    """Let the codec of a conversion into our own file normalise its latents, channel by channel.

    where: a file with `mean` and `std`, of as many numbers as the latents have channels, or a folder of latents that
    were stored as they are. VgmError: it holds no such statistics, or the network is no codec that takes them.
    """
    source = job.source
    if job.layout is not None or source.kind != "codec":
        raise VgmError("stats= is for a codec in a file of ours", "leave it away", USAGE)
    config = {**source.config, "latent_stats": True}
    mean, std = read_statistics(where)
    wanted = layouts.on_meta("codec", source.name, config)
    if "latent_mean" not in wanted:
        raise VgmError(f"the codec '{source.name}' keeps no statistics of its latents", "leave stats= away", USAGE)
    channels = wanted["latent_mean"].numel()
    if not mean.numel() == std.numel() == channels or not bool((std > 0).all() and mean.isfinite().all()):
        raise VgmError(f"{where} holds no mean and deviation of {channels} channels", WANTED, USAGE)
    job.ours = job.state = {**job.ours, "latent_mean": mean, "latent_std": std}
    source.header.component = {**source.header.component, "kwargs": config}
    source.remarks = [r for r in source.remarks if "stats=" not in r]  # what it asks for is given


def read_statistics(where: str) -> tuple[Tensor, Tensor]:
    """(mean, std), each (channels,) float32. VgmError: there are none."""
    if Path(where).is_dir():
        latents = open_latents(where)
        if not latents.drawn or latents.statistics is None:
            raise VgmError(f"{where} is a cache: its statistics are those that its codec has already", WANTED, USAGE)
        mean, std = latents.statistics
    else:
        state = read_state(where, WANTED)
        if not {"mean", "std"} <= state.keys():
            raise VgmError(f"{where} holds no mean and std", WANTED, USAGE)
        mean, std = state["mean"], state["std"]
    return mean.flatten().to(torch.float32), std.flatten().to(torch.float32)
