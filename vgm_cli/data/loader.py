"""Training batches in an order that depends on the seed alone.

Item k of the endless stream is item perm_e[k mod n] of epoch e = k div n; global batch g holds items g*B*world and on,
rank r its rows r*B to (r+1)*B. Flips and random crops are functions of (seed, k). So any step can be reached directly
(resume), and neither the number of processes nor of workers changes what is drawn.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgm_cli.api import Batch, seed_of
from vgm_cli.data.dataset import to_float
from vgm_cli.errors import USAGE, VgmError


def coin(seed: int, counters: np.ndarray) -> np.ndarray:
    """One fair bit per counter: splitmix64 (Steele, Lea, Flood 2014) of seed + counter, vectorised."""
    z = np.asarray(counters).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) >> np.uint64(63) == 1


class Batches:
    """Endless batches for one process, from batch `start` on.

    A batch is {"x": float32 (B, C, H, W) in [-1, 1]} of a set of images or {"moments": (B, …)} of a set of latents, and
    has "index": int64 (B,), "label": int64 (B,) where the set has labels, "text": list of B where it has captions, and
    every column that is read with the images, like x.
    """

    def __init__(
        self,
        dataset: Any,  # a Dataset, or a set of latents
        batch_size: int,  # rows per process
        *,
        seed: int,  # of the order
        rank: int = 0,  # number of this process
        world: int = 1,  # number of processes
        start: int = 0,  # batches that an interrupted run has had already
        hflip: bool = False,  # rows are mirrored with probability 1/2
        labels: bool = True,  # give "label" where the set has labels
        drop_last: bool = True,  # batches run on into the next epoch; False: each epoch ends with a short one
        workers: int = 0,  # loader processes; sets held in memory need none and ignore it
        device: torch.device | str | None = None,  # where tensors go, as uint8 until they are there; None: the CPU
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world:
            raise VgmError(f"batch_size={batch_size}, rank {rank} of {world}: not possible", code=USAGE)
        if hflip and getattr(dataset, "mirrored", True) is False:
            raise VgmError("these latents hold no mirrored images", "data.hflip=false, or build the cache again", USAGE)
        self.dataset, self.batch_size, self.seed, self.start = dataset, batch_size, seed, start
        self.rank, self.world, self.hflip, self.labels, self.drop_last = rank, world, hflip, labels, drop_last
        self.workers = 0 if dataset.memory is not None else workers
        self.device = torch.device(device) if device is not None else torch.device("cpu")
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.flip_seed, self.crop_seed = seed_of(seed, "flip"), seed_of(seed, "crop")
        self.orders: dict[int, Tensor] = {}

    def order(self, epoch: int) -> Tensor:
        """perm_e: (n,) int64."""
        if epoch not in self.orders:
            while len(self.orders) > 1:
                del self.orders[min(self.orders)]
            g = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
            self.orders[epoch] = torch.randperm(len(self.dataset), generator=g)
        return self.orders[epoch]

    def counters(self, step: int) -> range:
        """Positions in the endless stream of this process's rows of batch `step`."""
        n, size = len(self.dataset), self.batch_size
        if self.drop_last:
            first = (step * self.world + self.rank) * size
            return range(first, first + size)
        epoch, step = divmod(step, -(-n // (size * self.world)))
        first = min((step * self.world + self.rank) * size, n)
        return range(epoch * n + first, epoch * n + min(first + size, n))

    def fetch(self, step: int) -> Batch:
        """Batch `step`, on the CPU, pixels still uint8."""
        n, k = len(self.dataset), self.counters(step)
        parts, at = [], k.start
        while at < k.stop:
            epoch, first = divmod(at, n)
            last = min(n, first + k.stop - at)
            parts.append(self.order(epoch)[first:last])
            at += last - first
        index = torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
        flip = coin(self.flip_seed, np.array(k, np.int64)) if self.hflip else None
        seeds = [seed_of(self.crop_seed, c) for c in k] if self.dataset.crop == "random" else None
        return {**self.dataset.gather(index, flip, seeds, self.labels), "index": index}

    def finish(self, batch: Batch) -> Batch:
        """To the device, pixels to floats."""
        if self.stream is None:
            out = {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        else:
            out = self.travel(batch, self.stream)
        for key in ("x", *self.dataset.facts.columns):
            if key in out and out[key].dtype == torch.uint8:
                out[key] = to_float(out[key])
        return out

    def travel(self, batch: Batch, stream: torch.cuda.Stream) -> Batch:
        """Copy a batch to the GPU while it computes. Neither side waits for the copy; only what uses the batch does."""
        now = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(stream):
            out = {
                k: v.pin_memory().to(self.device, non_blocking=True) if isinstance(v, Tensor) else v
                for k, v in batch.items()
            }
        now.wait_stream(stream)
        for v in out.values():
            if isinstance(v, Tensor):
                v.record_stream(now)
        return out

    def __iter__(self) -> Iterator[Batch]:
        if not self.workers:
            for step in itertools.count(self.start):
                yield self.finish(self.fetch(step))
        loader: Any = torch.utils.data.DataLoader(
            _Fetch(self),
            batch_size=None,
            sampler=itertools.count(self.start),  # type: ignore[arg-type]  # an endless sampler: one step per "item"
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )
        for batch, skipped in loader:
            if isinstance(batch, VgmError):
                raise batch
            for name in skipped:
                self.dataset.skip(name)
            yield self.finish(batch)


class _Fetch(torch.utils.data.Dataset):
    """Batches as a map-style set. A VgmError comes back as a value: the loader would bury its sentence in a trace."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, step: int) -> tuple[Batch | VgmError, list[str]]:
        known = self.batches.dataset.facts.skipped
        before = len(known)
        try:
            return self.batches.fetch(step), known[before:]
        except VgmError as e:
            return e, []
