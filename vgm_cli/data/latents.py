"""Latents instead of images: a cache of what a frozen codec makes of a set, and folders of latents made elsewhere.

A cache is a folder of safetensors shards (`moments`, `moments_flip` of the mirrored images, `labels`, `beside.NAME` of
the columns that were read; captions in the header) and latents.json, written last: without it the cache is half built
and never taken for whole. It is tied to the codec by hash and to the images by fingerprint. LightningDiT's layout
(hustvl/LightningDiT@2725fed, datasets/img_latent_dataset.py) is read too: shards of `latents`, `latents_flip`,
`labels`, the latents already drawn from the posterior.

Shards are memory-mapped: a batch reads its own rows and nothing else, whatever the size of the cache.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vgm_cli import atomic
from vgm_cli.data import fingerprint
from vgm_cli.data.dataset import Contents
from vgm_cli.data.source import class_indices
from vgm_cli.errors import FAILED, USAGE, VgmError

OTHER = "choose another folder, or build it again: `vgm data encode … --overwrite`"
INDEX = "latents.json"
FORMAT, VERSION = "vgm-latents", 1
BESIDE = "beside."  # of a tensor's name: the pictures of the column that follows
PROBE = 512  # pixels per side of an image that any codec takes
SAMPLE = 10_000  # latents whose statistics speak for a foreign folder, as LightningDiT takes them
NARROW = -30.0  # log-variance of a posterior without width: where codecs clamp


class MemoryLatents:
    """Latents held in memory, drawn by `Batches` like a data set.

    moments: (N, …) of any dtype; flipped: those of the mirrored images; labels: (N,); captions: N texts; beside: uint8
    (N, C, H, W) pictures of every column. Any but the first may be None.
    """

    crop = "none"

    def __init__(
        self,
        moments: Tensor,
        flipped: Tensor | None = None,
        labels: np.ndarray | None = None,
        captions: list[str] | None = None,
        beside: Mapping[str, Tensor] | None = None,
    ) -> None:
        own = (("mirrored latents", flipped), ("labels", labels), ("captions", captions))
        for what, found in (*own, *(beside or {}).items()):
            if found is not None and len(found) != len(moments):
                raise VgmError(f"{len(moments)} latents but {len(found)} {what}", code=FAILED)
        self.memory: Tensor | None = moments
        self.flipped, self.captions, self.mirrored = flipped, captions, flipped is not None
        classes = 0 if labels is None else int(labels.max(initial=-1)) + 1
        names = [str(i) for i in range(classes)]
        size, channels = sides(tuple(moments.shape[1:]))
        self.beside = dict(beside or {})
        self.facts = Contents(
            size, channels, classes, names, len(moments), "latent-cache", "memory", captions is not None, labels=labels
        )
        self.facts.columns = {name: pictures.shape[1] for name, pictures in self.beside.items()}

    def __len__(self) -> int:
        return self.facts.count

    def labels(self) -> np.ndarray | None:
        return self.facts.labels

    def rows(self, index: Tensor, mirror: bool = False) -> Tensor:
        """(B, …) as stored; mirror: those of the mirrored images."""
        source = self.flipped if mirror else self.memory
        assert source is not None
        return source[index]

    def pictures(self, column: str, index: Tensor) -> Tensor:
        """uint8 (B, C, H, W) of a column."""
        return self.beside[column][index]

    def gather(
        self, index: Iterable[int], flip: Any = None, seeds: Sequence[int] | None = None, labels: bool = True
    ) -> dict[str, Any]:
        """Items as one batch: "moments" (B, …) as stored, "label" int64 (B,) if labelled, "text" if captioned, and
        every column's pictures uint8 (B, C, H, W) under its name.

        flip: bool (B,), which to take mirrored. seeds are for crops; there are none here.
        """
        at = index if isinstance(index, Tensor) else torch.tensor(list(index), dtype=torch.long)
        batch: dict[str, Any] = {"moments": self.rows(at)}
        batch |= {column: self.pictures(column, at) for column in self.facts.columns}
        if flip is not None and bool(np.asarray(flip).any()):
            mask = torch.as_tensor(np.asarray(flip))
            batch["moments"][mask] = self.rows(at[mask], mirror=True)
            for column in self.facts.columns:
                batch[column][mask] = batch[column][mask].flip(-1)
        if labels and self.facts.labels is not None:
            batch["label"] = torch.from_numpy(self.facts.labels[at.numpy()].astype(np.int64))
        if self.captions is not None:
            batch["text"] = [self.captions[i] for i in at.tolist()]
        return batch


def to_model(codec: Any, moments: Tensor, noise: Tensor | None = None, drawn: bool = False) -> Tensor:
    """What is stored -> model space (B, c, …). noise: standard normal for the posterior, None for its mode.

    drawn: `moments` are latents drawn from a posterior; to a codec that expects moments they are one without width.
    """
    if moments.is_floating_point():
        moments = moments.float()
    if drawn and takes_moments(codec, moments):
        moments = torch.cat([moments, torch.full_like(moments, NARROW)], 1)
    latents: Tensor = codec.latents(moments, noise)
    return latents


def takes_moments(codec: Any, z: Tensor) -> bool:
    """Whether `codec.latents` expects mean and log-variance, (B, 2c, ...), for latents z of c channels."""
    try:
        return bool(codec.latents(z[:1]).shape[1:] != z.shape[1:])
    except (RuntimeError, ValueError, VgmError):
        return True


def sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """(size, channels) of latents: (C, H, W); tokens (H, W) or (L,) have one channel."""
    return (shape[-1] if shape else 1), (shape[0] if len(shape) > 2 else 1)


@dataclass
class Sums:
    """Mean and deviation per channel (dimension 1), merged batch by batch (Chan, Golub, LeVeque 1979), in float64."""

    n: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    m2: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, z: Tensor) -> None:
        """z: (B, c, …); integers (tokens) have no statistics and are passed over."""
        if z.is_floating_point() and z.ndim > 1:
            flat = z.detach().double().cpu().transpose(0, 1).flatten(1)
            mean = flat.mean(1)
            self.merge(Sums(flat.shape[1], mean, (flat - mean[:, None]).square().sum(1)))

    def merge(self, other: Sums) -> None:
        if other.n:
            n, delta = self.n + other.n, other.mean - self.mean
            self.mean = self.mean + delta * (other.n / n)
            self.m2 = self.m2 + other.m2 + delta.square() * (self.n * other.n / n)
            self.n = n

    def result(self) -> dict[str, Any] | None:
        return {"mean": self.mean.tolist(), "std": (self.m2 / self.n).sqrt().tolist()} if self.n else None

    def dump(self) -> str:
        return atomic.dump_json([self.n, self.mean.tolist(), self.m2.tolist()])

    @classmethod
    def load(cls, text: str) -> Sums:
        n, mean, m2 = json.loads(text)
        return cls(n, torch.tensor(mean, dtype=torch.float64), torch.tensor(m2, dtype=torch.float64))


# -- shards on disk --------------------------------------------------------------------------------------------------


@dataclass
class Shard:
    """What a shard's header says. shapes: tensor name -> shape; metadata: its strings."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


def read_shard(path: Path) -> Shard:
    """Raises VgmError for a missing, foreign or cut-off file."""
    try:
        with safe_open(path, framework="pt") as f:
            shapes = {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}
            return Shard(path, shapes, dict(f.metadata() or {}))
    except (SafetensorError, OSError, ValueError) as e:
        raise VgmError(f"{path} is not a readable shard of latents: {str(e).splitlines()[0]}", code=FAILED) from e


class Latents(MemoryLatents):
    """Latents in shards. `moments` are a codec's, or drawn latents where `drawn` (facts.kind latents-folder).

    codec: the hash of the codec that made them, "" where unknown. image_shape: (C, H, W) of the images, None where
    unknown. mean, std: (c,) float32 over the channels of model-space latents; of drawn latents, over those as stored.
    """

    def __init__(
        self, folder: Path, shards: list[Shard], key: str, mirror_key: str, index: dict[str, Any] | None = None
    ) -> None:
        self.folder, self.shards, self.index = folder, shards, index or {}
        self.key, self.mirror_key, self.drawn = key, mirror_key, index is None
        first = shards[0]
        self.shape = first.shapes[key][1:]
        self.mirrored = all(mirror_key in s.shapes for s in shards)
        labelled = all("labels" in s.shapes for s in shards)
        for s in shards:
            wanted = [key] + [mirror_key] * self.mirrored
            if any(s.shapes.get(k, ())[1:] != self.shape for k in wanted) or len({s.shapes[k][0] for k in wanted}) > 1:
                raise VgmError(f"{s.path.name} of {folder} does not fit the other shards", f"first: {first.path.name}")
            if labelled and s.shapes["labels"] != (s.shapes[key][0],):
                raise VgmError(f"{s.path.name} of {folder} has {s.shapes['labels']} labels, not one per latent")
        self.starts = np.cumsum([0] + [s.shapes[key][0] for s in shards])
        self.opened: dict[tuple[int, str], Tensor] = {}
        labels = np.concatenate([self.tensor(i, "labels").numpy() for i in range(len(shards))]) if labelled else None
        data = self.index.get("data", {})
        remarks: list[str] = []
        names = list(data.get("class_names") or [])
        if labels is not None:
            labels, _ = class_indices(labels.tolist(), str(folder), None if names else remarks, names)
        texts = [json.loads(s.metadata["captions"]) for s in shards if "captions" in s.metadata]
        self.captions = [t for part in texts for t in part] if len(texts) == len(shards) else None
        self.memory, self.flipped = None, None
        stored = [k.removeprefix(BESIDE) for k in first.shapes if k.startswith(BESIDE)]
        columns = {c: first.shapes[BESIDE + c][1] for c in stored if all(BESIDE + c in s.shapes for s in shards)}
        classes = max(data.get("num_classes", 0), 0 if labels is None else int(labels.max(initial=-1)) + 1)
        size, channels = sides(tuple(self.index.get("latent_shape", self.shape)))
        self.facts = Contents(
            size,
            channels,
            classes,
            names + [str(i) for i in range(len(names), classes)],
            int(self.starts[-1]),
            "latents-folder" if self.drawn else "latent-cache",
            str(folder.absolute()),
            self.captions is not None,
            list(data.get("skipped", [])),
            labels,
            remarks=remarks,
            columns=columns,
        )

    @property
    def floats(self) -> bool:
        """Whether these are latents or moments in floating point, not tokens."""
        return bool(self.tensor(0, self.key).is_floating_point())

    @property
    def codec(self) -> str:
        return str(self.index.get("codec", ""))

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        data = self.index.get("data")
        return (data["image_channels"], data["image_size"], data["image_size"]) if data else None

    def image_shape_for(self, codec: Any) -> tuple[int, int, int]:
        """(C, H, W) of images whose latents these could be. Raises VgmError when the codec's have another shape."""
        if self.image_shape is not None:
            return self.image_shape
        for channels in (3, 1):
            try:
                size = PROBE // codec.latent_shape((channels, PROBE, PROBE))[1] * self.facts.size
                shape = (channels, size, size)
                if tuple(codec.latent_shape(shape)) == self.shape:
                    return shape
            except (VgmError, IndexError):
                continue
        shown = "×".join(map(str, self.shape))
        raise VgmError(f"the codec does not make latents of {shown}, which {self.folder} holds", "another codec", USAGE)

    def refuse_other(self, codec_hash: str) -> None:
        """Raises VgmError when these latents are known to be another codec's."""
        if self.codec and self.codec != codec_hash:
            raise other_codec(self.folder, self.codec, codec_hash)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "opened": {}}  # a loader process maps the shards itself

    def tensor(self, shard: int, key: str) -> Tensor:
        """A whole tensor of a shard, memory-mapped."""
        if (shard, key) not in self.opened:
            path = self.shards[shard].path
            try:
                with safe_open(path, framework="pt") as f:
                    self.opened[shard, key] = f.get_tensor(key)
            except (SafetensorError, OSError, ValueError) as e:
                raise VgmError(f"{path} cannot be read: {str(e).splitlines()[0]}", code=FAILED) from e
        return self.opened[shard, key]

    def rows(self, index: Tensor, mirror: bool = False) -> Tensor:
        return self.of_shards(index, self.mirror_key if mirror else self.key)

    def pictures(self, column: str, index: Tensor) -> Tensor:
        return self.of_shards(index, BESIDE + column)

    def of_shards(self, index: Tensor, key: str) -> Tensor:
        """Rows of a tensor that lies in parts, whatever shards they are in."""
        owner = torch.from_numpy(np.searchsorted(self.starts, index.numpy(), side="right") - 1)
        first = self.tensor(0, key)
        out = torch.empty((len(index), *first.shape[1:]), dtype=first.dtype)
        for shard in owner.unique().tolist():
            mine = owner == shard
            out[mine] = self.tensor(shard, key)[index[mine] - int(self.starts[shard])]
        return out

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor] | None:
        """(mean, std), each (c,); None of tokens."""
        known = self.index.get("statistics")
        if known is None and self.drawn:
            g = torch.Generator().manual_seed(0)
            sums = Sums()
            for part in torch.randperm(len(self), generator=g)[:SAMPLE].sort().values.split(512):
                sums.add(self.rows(part))
            known = sums.result()
        return None if known is None else (torch.tensor(known["mean"]), torch.tensor(known["std"]))

    def fingerprint(self) -> str:
        """Of the latents, and of the codec and the images that they were made from, where known."""
        if not self.index:
            return fingerprint.of_files(len(self), [s.path for s in self.shards])
        made_from = self.index["data"]["fingerprint"], self.codec, self.index["dtype"], self.mirrored
        return fingerprint.of_cache(len(self), *map(str, made_from))

    def describe(self) -> dict[str, Any]:
        """For the run's data.json."""
        f, data = self.facts, self.index.get("data", {})
        shown = {"root": f.root, "kind": f.kind, "count": f.count, "latent_shape": list(self.shape),
                 "captions": f.captions, "codec": self.codec or None, "class_names": f.class_names,
                 "skipped": len(f.skipped)}  # fmt: skip
        return {**shown, **{k: data[k] for k in ("image_size", "image_channels", "crop") if k in data}}


# -- opening ---------------------------------------------------------------------------------------------------------


def shard_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("."))


def is_latents(folder: Path) -> bool:
    """Whether a folder holds latents: a cache (whole or not), or safetensors shards with a tensor `latents`."""
    if (folder / INDEX).is_file():
        return True
    for path in shard_files(folder)[:1]:
        try:
            return bool({"moments", "latents"} & set(read_shard(path).shapes))
        except VgmError:
            return False
    return False


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of a whole cache, else None."""
    file = folder / INDEX
    if not file.is_file():
        return None
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise VgmError(f"{file} cannot be read: {e}", code=FAILED) from e
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise VgmError(f"{file} is not the index of a latent cache", code=FAILED)
    if index.get("version") != VERSION:
        raise VgmError(f"{folder} is a latent cache of version {index.get('version')}, not {VERSION}", code=FAILED)
    return index


def open_latents(folder: str | Path) -> Latents:
    """A whole cache, or a folder in LightningDiT's layout. Raises VgmError when it is half built or damaged."""
    folder = Path(folder)
    index = read_index(folder)
    if index is not None:
        shards = [read_shard(folder / name) for name in index["shards"]]
        latents = Latents(folder, shards, "moments", "moments_flip", index)
        if len(latents) != index["data"]["count"]:
            raise VgmError(f"{folder} has {len(latents)} latents, its index says {index['data']['count']}", code=FAILED)
        return latents
    files = shard_files(folder)
    if not files:
        raise VgmError(f"{folder} holds no latents", "shards are .safetensors files with `latents` or `moments`", USAGE)
    shards = [read_shard(p) for p in files]
    if any("moments" in s.shapes for s in shards):
        raise half_built(folder)
    foreign = next((s.path.name for s in shards if "latents" not in s.shapes), None)
    if foreign:
        raise VgmError(f"{foreign} of {folder} has no tensor `latents`", "one folder, one set of shards", FAILED)
    return Latents(folder, shards, "latents", "latents_flip")


def half_built(folder: Path) -> VgmError:
    return VgmError(f"the latent cache {folder} is half built", "the command that began it continues it", FAILED)


def other_codec(folder: Path, made: str, wanted: str) -> VgmError:
    return VgmError(f"the latents in {folder} were made by another codec ({made}, not {wanted})", OTHER, USAGE)
