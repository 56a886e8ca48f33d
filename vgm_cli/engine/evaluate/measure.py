"""Pictures through feature networks: each network sees each picture once, whatever number of metrics use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgm_cli import __version__
from vgm_cli.engine import processes
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.metrics.base import OF_NETWORK, Measured
from vgm_cli.metrics.features import FeatureNet
from vgm_cli.metrics.moments import Moments
from vgm_cli.metrics.pictures import DataPictures, Pictures, items_of, small, texts_of
from vgm_cli.metrics.statistics import Statistics, write_statistics
from vgm_cli.ui import counted, ui

GATHERED = 2**31  # bytes of features up to which they are kept, and moments made of them in order
CACHED = 4  # references whose measurements this process keeps

Progress = Callable[[int], None]
Wants = Mapping[Any, tuple[FeatureNet | None, set[str]]]  # by any key: a network and the needs (base.NEEDS) of it


def measure(
    pictures: Pictures,
    wants: Wants,
    batch_size: int = 100,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[Any, Measured]:
    """Compute every requested feature, moment and thumbnail in one pass over the pictures: {key: Measured}.

    wants says, by any key, which network to run and which fields of Measured to fill from it. With several processes
    each takes a share of the batches; the first process receives the complete result, the others only counts and
    labels. Batches are the same whoever computes them and are put together in their order, so the number of processes
    changes nothing. Only moments of more than GATHERED bytes of features are merged process by process, which is equal
    up to rounding.
    """
    n = len(pictures)
    refuse_few(n)
    jobs = {key: Job(net, needs, n) for key, (net, needs) in wants.items()}
    shared = {need for _, needs in wants.values() for need in needs}
    parts: dict[int, dict[Any, Any]] = {}
    spans = [(i, min(i + batch_size, n)) for i in range(0, n, batch_size)]
    for i, (first, last) in processes.mine(spans):
        images = pictures.batch(first, last)
        parts[i] = {key: job.take(images, device) for key, job in jobs.items()}
        if "images" in shared:
            parts[i]["images"] = torch.from_numpy(np.ascontiguousarray(images))
        if "pixels" in shared:
            parts[i]["pixels"] = small(images)
        if progress is not None:
            progress(last)
    merged = {key: {o: m.gather() for o, m in job.streamed.items()} for key, job in jobs.items()}
    ordered = processes.in_order(parts)
    items = items_of(pictures)
    if shared & {"images"} and processes.joined():  # each process knows which of its own could not be read
        lost = processes.shares(range(processes.rank_world()[1]), lambda _: items.lost)
        items = replace(items, lost=frozenset().union(*lost))
    sides = {}
    for key, (_, needs) in wants.items():
        sides[key] = Measured(n, labels=pictures.labels, items=items)
        if ordered:
            fill(sides[key], needs, [p[key] for p in ordered], merged[key])
            if "images" in needs:
                sides[key].images = torch.cat([p["images"] for p in ordered]).numpy()
            if "texts" in needs:
                sides[key].texts = texts_of(pictures)
            if "pixels" in needs:
                sides[key].pixels = torch.cat([p["pixels"] for p in ordered])
    return sides


def refuse_few(n: int) -> None:
    if n < 2:
        raise VgmError(f"{counted(n, 'image')} cannot be measured", "at least 2 are needed", USAGE)


class Job:
    """The work of one feature network during `measure`: which outputs to keep for every picture, and which to reduce to
    running moments (`streamed`) because keeping them would take too much memory."""

    def __init__(self, net: FeatureNet | None, needs: set[str], n: int):
        outputs = {OF_NETWORK[k] for k in needs if k in OF_NETWORK}
        large = net is not None and n * net.dim * 4 > GATHERED
        whole = {"moments": "pool", "spatial": "spatial"} if large else {}
        self.streamed = {o: Moments.empty(0) for need, o in whole.items() if need in needs}
        self.kept = {o for o in outputs if o not in self.streamed} | ({"pool"} & needs)
        self.net = net if outputs else None

    def take(self, images: np.ndarray, device: torch.device | str) -> dict[str, Tensor]:
        """Run the network on a batch, uint8 (B, H, W, C); returns the outputs to keep, and adds the others to their
        moments."""
        if self.net is None:
            return {}
        found = self.net(images, device)
        for k, total in self.streamed.items():
            part = Moments.of(found[k])
            self.streamed[k] = total.merge(part) if total.n else part
        return {k: found[k] for k in self.kept}


def fill(side: Measured, needs: set[str], parts: list[dict[str, Tensor]], merged: dict[str, Moments]) -> None:
    """Fill the fields `needs` of a Measured from the batches of features (`parts`) and the running moments
    (`merged`)."""
    for need, output in (("moments", "pool"), ("spatial", "spatial")):
        if need in needs:
            setattr(side, need, merged.get(output) or moments_of([p[output] for p in parts]))
    for need in ("pool", "logits"):
        if need in needs:
            setattr(side, need, torch.cat([p[need] for p in parts]))


def moments_of(batches: list[Tensor]) -> Moments:
    """Mean and covariance of features that come as batches (B, D)."""
    total = Moments.of(batches[0])
    for part in batches[1:]:
        total.update(part)
    return total


# -- references ------------------------------------------------------------------------------------------------------

_cache: dict[tuple[Any, ...], Measured] = {}


def measure_reference(
    reference: Pictures | Statistics | None,
    needs: set[str],
    net: FeatureNet | None,
    batch_size: int = 100,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Measured:
    """The reference's side: read from statistics as far as they go, measured from pictures once per process.

    Raises VgmError when a statistics file was made with another network, or lacks something (exit code 2).
    """
    if reference is None or not needs:
        return Measured(None)
    if isinstance(reference, Statistics):
        return _from_statistics(reference, needs, net, batch_size, device)
    fingerprint = reference.facts.get("reference_fingerprint")
    key = (
        fingerprint,
        reference.facts.get("reference"),
        len(reference),
        reference.shape(),
        frozenset(needs),
        net and (net.sha256, net.resize),
    )
    if fingerprint and key in _cache:
        return _cache[key]
    side = measure(reference, {None: (net, needs)}, batch_size, device, progress)[None]
    if fingerprint:
        while len(_cache) >= CACHED:
            _cache.pop(next(iter(_cache)))
        _cache[key] = side
    return side


def _from_statistics(
    stats: Statistics, needs: set[str], net: FeatureNet | None, batch_size: int, device: torch.device | str
) -> Measured:
    own = stats.facts.get("features_sha256")
    if net is not None and own and own != net.sha256:
        raise VgmError(
            f"{stats.path} was made with {stats.facts.get('features')}, the samples would go through {net.name}",
            "give the same weights with --features, or make the statistics again",
            USAGE,
        )
    if net is not None and stats.facts.get("resize", net.resize) != net.resize:
        raise VgmError(
            f"{stats.path} was resized by another rule: {stats.facts['resize']}", f"here it is {net.resize}", USAGE
        )
    side = Measured(stats.n, stats.moments, stats.spatial, stats.pool)
    missing = {k for k in needs if getattr(side, k) is None}
    if missing and stats.images is not None:  # an ADM batch: its pictures stand in for what its numbers lack
        from vgm_cli.data import open_dataset

        data = open_dataset(stats.images)
        more = measure_reference(DataPictures(data), missing, net, batch_size, device)
        for k in missing:
            setattr(side, k, getattr(more, k))
    elif missing:
        what = {"pool": "features of every image", "spatial": "spatial features"}.get(min(missing), min(missing))
        raise VgmError(
            f"{stats.path} holds no {what}, which this metric compares with", "give the images instead", USAGE
        )
    if net is not None and own is None and needs & set(OF_NETWORK):
        ui.warn(f"{stats.path} does not say which network it was made with: {net.name} is assumed")
    dim = side.moments.dim if side.moments is not None else side.pool.shape[1] if side.pool is not None else None
    if net is not None and dim is not None and dim != net.dim:
        raise VgmError(
            f"{stats.path} is of {dim} features, {net.name} has {net.dim}",
            "choose the network it was made with: --features FILE",
            USAGE,
        )
    return side


def save_statistics(
    reference: Pictures | Statistics,
    net: FeatureNet,
    path: Path,
    batch_size: int = 100,
    device: torch.device | str = "cpu",
    keep_features: bool = False,
) -> dict[str, Any]:
    """Write a reference's moments to `path` and return the facts that the file states about itself.

    Spatial moments are written where the network has them; keep_features adds every picture's pooled feature, which KID
    and precision need.
    """
    needs = {"moments"} | ({"spatial"} & net.outputs) | ({"pool"} if keep_features else set())
    if isinstance(reference, Statistics) and reference.spatial is None:
        needs.discard("spatial")
    side = measure_reference(reference, needs, net, batch_size, device)
    facts = {**net.describe(), **source_facts(reference), "vgm": __version__}
    if not isinstance(reference, Statistics):
        facts["reference_shape"] = list(reference.shape())
    if processes.rank_world()[0] == 0:
        assert side.moments is not None
        write_statistics(path, side.moments, side.spatial, facts, side.pool)
    return {**facts, "n": side.n, "dim": net.dim, "out": str(path)}


def source_facts(reference: Pictures | Statistics | None) -> dict[str, Any]:
    """The keys of a result's protocol that say which reference was used: path, fingerprint, and what its file
    states."""
    if reference is None:
        return {}
    if isinstance(reference, Statistics):
        own = {k: v for k, v in reference.facts.items() if k.startswith("reference")}
        return {"reference": str(reference.path), "reference_fingerprint": reference.fingerprint(), **own}
    return dict(reference.facts)
