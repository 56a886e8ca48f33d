"""A latent cache: every image through a frozen codec once, shard by shard, and its opening. Layout: latents.py."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgm_cli import atomic
from vgm_cli.data import fingerprint
from vgm_cli.data.dataset import to_float
from vgm_cli.data.latents import (
    BESIDE,
    FORMAT,
    INDEX,
    OTHER,
    VERSION,
    Latents,
    Sums,
    half_built,
    open_latents,
    other_codec,
    read_index,
    read_shard,
    shard_files,
)
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ui import Progress, ui

SHARD = 2**28  # bytes
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def build_cache(
    dataset: Any,
    codec: Any,
    folder: str | Path,
    codec_hash: str,
    *,
    hflip: bool = False,
    device: torch.device | str = "cpu",
    dtype: str | None = None,
    keeps_images: bool = False,
    batch: int = 64,
    shard_bytes: int = SHARD,
    overwrite: bool = False,
    share: tuple[int, int] | None = None,
) -> Latents | None:
    """Encode every image (with hflip its mirror image too) into a cache; what is there already is kept.

    share: (rank, world) of one of several processes. It writes every world-th shard alone and gives None; once all have
    done so, a call without it makes the cache whole.

    dtype: a name of DTYPES to store floating-point moments in, None as the codec gives them. A build that was cut off
    goes on at its first missing shard. keeps_images: the images themselves are stored too, as the column `image`.
    overwrite: a cache in the folder, whole or not, is removed first.

    Raises VgmError when the folder holds another codec's cache, other images', one of another dtype or without mirrored
    images, or none.
    """
    folder = Path(folder)
    fingerprint = dataset.fingerprint()
    index = None if overwrite else read_index(folder)
    if index is not None:
        check(folder, index, codec_hash, fingerprint)
        latents = open_latents(folder)
        if dtype is not None and index["dtype"] != dtype and latents.floats:
            raise VgmError(f"the latent cache {folder} holds {index['dtype']}, not {dtype}", OTHER, USAGE)
        if hflip and not latents.mirrored:
            hint = f"{OTHER}; or data.hflip=false"
            raise VgmError(f"the latent cache {folder} holds no mirrored images", hint, USAGE)
        check_columns(latents, dataset.columns, keeps_images)
        return latents
    if dataset.crop == "random":
        hint = "data.cache_latents=false, or data.crop=adm"
        raise VgmError("random crops differ each time: their latents cannot be cached", hint, USAGE)
    if shard_files(folder) or (folder / INDEX).exists():
        if overwrite:
            remove_cache(folder)
    elif folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir()):
        raise VgmError(f"{folder} holds other files", "name a new or empty folder for the latent cache", USAGE)
    build = _Build(dataset, codec, torch.device(device), hflip, DTYPES[dtype] if dtype else None, batch, keeps_images)
    return build.run(folder, codec_hash, fingerprint, shard_bytes, share)


def remove_cache(folder: Path) -> None:
    """Take a cache out of its folder, the index first, so that no moment leaves a whole one of missing shards."""
    for path in (folder / INDEX, *folder.glob("latents-?????-of-?????.safetensors")):
        path.unlink(missing_ok=True)


class _Build:
    def __init__(
        self,
        dataset: Any,
        codec: Any,
        device: torch.device,
        hflip: bool,
        dtype: torch.dtype | None,
        batch: int,
        keeps_images: bool,
    ) -> None:
        self.dataset, self.codec, self.device = dataset, codec, device
        self.hflip, self.dtype, self.batch, self.keeps_images = hflip, dtype, batch, keeps_images

    def run(
        self, folder: Path, codec_hash: str, fingerprint: str, shard_bytes: int, share: tuple[int, int] | None
    ) -> Latents | None:
        n = len(self.dataset)
        one = self.encode(to_float(self.dataset.gather([0])["x"]).to(self.device))
        per_shard = max(1, shard_bytes // max(1, one.numel() * one.element_size() * (1 + self.hflip)))
        total = -(-n // per_shard)
        identity = {
            "codec": codec_hash,
            "fingerprint": fingerprint,
            "dtype": str(one.dtype).removeprefix("torch."),
            "mirrored": self.hflip,
            "rows": per_shard,
        }
        columns = [*self.dataset.columns, *["image"] * self.keeps_images]
        identity |= {"columns": columns} if columns else {}
        names = [f"latents-{i:05d}-of-{total:05d}.safetensors" for i in range(total)]
        for path in shard_files(folder):
            if path.name not in names or json.loads(read_shard(path).metadata.get("identity", "{}")) != identity:
                hint = OTHER
                raise VgmError(f"{folder} holds a half-built latent cache of another kind ({path.name})", hint, USAGE)
        rank, world = share or (0, 1)
        with Progress("encoding", n) as progress:
            for i, name in list(enumerate(names))[rank::world]:
                span = range(i * per_shard, min((i + 1) * per_shard, n))
                if not (folder / name).is_file():
                    self.write(folder / name, span, identity, i)
                progress.update(span.stop)
                progress.line(f"encoding {span.stop}/{n}")
        if share is not None:
            return None
        sums = Sums()
        for name in names:
            sums.merge(Sums.load(read_shard(folder / name).metadata["sums"]))
        f = self.dataset.facts
        image = (f.channels, f.size, f.size)
        atomic.write_json(
            folder / INDEX,
            {
                "format": FORMAT,
                "version": VERSION,
                **{k: identity[k] for k in ("codec", "dtype", "mirrored")},
                "shape": list(one.shape[1:]),
                "latent_shape": list(self.codec.latent_shape(image)),
                "statistics": sums.result(),
                "shards": names,
                "data": {
                    **self.dataset.describe(),
                    "fingerprint": fingerprint,
                    "num_classes": f.num_classes,
                    "class_names": f.class_names,
                    "skipped": f.skipped,
                },
            },
        )
        return open_latents(folder)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) in [-1, 1] on the device -> moments, in the dtype they are stored in."""
        moments: Tensor = self.codec.encode(x)
        return moments.to(self.dtype) if self.dtype and moments.is_floating_point() else moments

    def read(self, span: range) -> Iterator[dict[str, Any]]:
        """Batches of images in order, decoded ahead on a few threads."""
        parts = [range(a, min(a + self.batch, span.stop)) for a in range(span.start, span.stop, self.batch)]
        threads = min(8, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as pool:
            ahead = [pool.submit(self.dataset.gather, p) for p in parts[: threads + 1]]
            for part in parts[threads + 1 :] + [None] * len(ahead):
                yield ahead.pop(0).result()
                if part is not None:
                    ahead.append(pool.submit(self.dataset.gather, part))

    @torch.no_grad()
    def write(self, path: Path, span: range, identity: dict[str, Any], number: int) -> None:
        found: dict[str, list[Tensor]] = {}
        texts: list[str] = []
        sums = Sums()
        g = torch.Generator().manual_seed(number)
        for images in self.read(span):
            x = to_float(images["x"]).to(self.device)
            moments = self.encode(x)
            found.setdefault("moments", []).append(moments.cpu())
            if self.hflip:
                found.setdefault("moments_flip", []).append(self.encode(x.flip(-1)).cpu())
            for column in self.dataset.columns:
                found.setdefault(BESIDE + column, []).append(images[column])
            if self.keeps_images:
                found.setdefault(f"{BESIDE}image", []).append(images["x"])
            if "label" in images:
                found.setdefault("labels", []).append(images["label"])
            texts += images.get("text", [])
            if moments.is_floating_point():
                shape = (len(x), *self.codec.latent_shape(tuple(x.shape[1:])))
                sums.add(self.codec.latents(moments.float(), torch.randn(shape, generator=g).to(self.device)))
        metadata = {"format": "pt", "identity": atomic.dump_json(identity), "sums": sums.dump()}
        if self.dataset.facts.captions:
            metadata["captions"] = atomic.dump_json(texts)
        atomic.save_safetensors({k: torch.cat(v).contiguous() for k, v in found.items()}, path, metadata)


def check_columns(latents: Latents, columns: Iterable[str], images: bool) -> None:
    """VgmError: a cache lacks a column that is wanted, or the images themselves."""
    missing = [c for c in (*columns, *["image"] * images) if c not in latents.facts.columns]
    if missing:
        message = f"the latent cache {latents.folder} was built without '{missing[0]}'"
        raise VgmError(message, f"{OTHER}; or data.cache_latents=false", USAGE)


def open_cache(folder: str | Path, codec_hash: str, wanted: str) -> Latents:
    """The cache of these images made by this codec. Raises VgmError when it is another's, or half built."""
    folder = Path(folder)
    if read_index(folder) is None:
        if not shard_files(folder):
            raise VgmError(f"no latent cache in {folder}", "`vgm data encode` builds one", USAGE)
        raise half_built(folder)
    latents = open_latents(folder)
    check(folder, latents.index, codec_hash, wanted)
    return latents


def check(folder: Path, index: dict[str, Any], codec_hash: str, wanted: str) -> None:
    if index["codec"] != codec_hash:
        raise other_codec(folder, index["codec"], codec_hash)
    same = fingerprint.same(index["data"]["fingerprint"], wanted)
    if same is None and index["data"]["fingerprint"].partition("-")[0] == wanted.partition(":")[2].partition("-")[0]:
        ui.warn(f"the latent cache {folder} is of an older version: that it was made of these images is not checked")
    elif not same:
        raise VgmError(
            f"the latent cache {folder} was made from other images, or from these cropped otherwise", OTHER, USAGE
        )
