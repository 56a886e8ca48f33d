"""What several processes and millions of images add to a plan: bytes that travel in a step, and a latent cache."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from vgm_cli.api import Phase, Repeats
from vgm_cli.engine.train import optim
from vgm_cli.nn.meta import with_zeros

LINK = 25e9  # bytes per second that a plan assumes of the slowest link: 200 Gbit/s, one InfiniBand HDR port
ENCODE_SECONDS = 1.0  # a codec that would take longer for two images at best is not timed on a CPU


@dataclass
class Traffic:
    """What one process sends in a training step, and as much receives. pattern: the collective operations that are
    assumed. seconds: at LINK, unless computation hides them."""

    bytes_per_step: int
    pattern: str
    seconds: float


def traffic(
    networks: Mapping[str, torch.nn.Module], phases: Sequence[Phase], world: int, accumulate: int, fsdp: bool
) -> Traffic:
    """Of `world` processes in a ring, by the usual model (Patarasuk and Yuan 2009): an all-reduce of S bytes sends
    2 S (n - 1) / n from each process, an all-gather or a reduce-scatter half of that. Weights and gradients travel in
    fp32.

    DDP reduces the gradients of what a phase trains once in a step. FSDP2 gathers the weights for the forward and for
    the backward pass of every micro-batch and scatters the gradients once.
    """
    parts = optim.trained(networks, phases)
    share, total = (world - 1) / world, 0.0
    for phase in phases:
        trained = optim.members(phase.optimizer, [phase], parts)
        gradients = 4 * sum(p.numel() for p in {id(p): p for p in trained.values()}.values())
        if fsdp:
            weights = 4 * sum(p.numel() for role in phase.roles for p in networks[role].parameters())
            total += share * (2 * accumulate * weights + gradients) / phase.every
        else:
            total += 2 * share * gradients / phase.every
    name = "FSDP2: gather twice, scatter once" if fsdp else "DDP: ring all-reduce of the gradients"
    return Traffic(round(total), name, total / LINK)


@dataclass
class LatentCache:
    """What `vgm data encode` of the whole set costs. bytes: on disk, of both mirrored forms where the run mirrors.
    seconds: of one process, None where that was not timed; how: in words."""

    images: int
    bytes: int
    flops: float | None
    seconds: float | None
    how: str


@torch.no_grad()
def latent_cache(
    codec: Any, image: tuple[int, int, int], count: int, mirrored: bool, device: torch.device, rate: float
) -> LatentCache:
    """Encode two images of shape (C, H, W) on the meta device for their bytes and FLOPs, and on `device` for the time.
    rate: FLOPs per second of a matrix product there, the estimate of where timing would take minutes."""
    forms = 1 + mirrored
    x = torch.empty(2, *image, device="meta")
    try:
        with FlopCounterMode(display=False) as counter:
            moments = codec.encode(x)
        flops: float | None = counter.get_total_flops() / 2
    except RuntimeError:  # an encoder that looks at values
        moments, flops = None, None
    if moments is None:
        return LatentCache(count, 0, None, None, "this codec's encoder cannot be planned without weights")
    size = math.prod(moments.shape[1:]) * moments.element_size() * forms * count
    if flops is None or (device.type == "cpu" and 2 * flops > ENCODE_SECONDS * rate):
        seconds = None if flops is None else flops * forms * count / (rate / 2)
        return LatentCache(count, size, flops, seconds, "estimated at half the rate of a matrix product here")
    real: Any = with_zeros(codec, device)
    images = torch.zeros(8 if device.type == "cuda" else 2, *image, device=device)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        real.encode(images)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    seconds = min(times) / len(images) * forms * count
    return LatentCache(count, size, flops, seconds, f"timed on this machine ({device.type}) with {len(images)} images")


def tokens_of(network: Any, component: Mapping[str, Any], vocabulary: int, shape: Sequence[int]) -> int | None:
    """The length of the sequence that a network makes of one image: its codes, or its patches; None where it is no
    sequence. component: the network's, as checkpoints describe it. shape: of what it sees."""
    if vocabulary:
        return math.prod(shape)
    patch = component.get("kwargs", {}).get("patch_size")
    sequence = isinstance(network, Repeats) and isinstance(patch, int) and len(shape) == 3
    return math.prod(shape[1:]) // patch**2 if sequence else None
