"""From a recipe's data node to training batches: the data set, its frozen codec, and what the model sees of both.

With a codec, small sets are encoded once into memory, larger ones into a latent cache (data.cache_latents=FOLDER) or on
the fly. Posterior noise is drawn at every step, so caching moments changes nothing that training sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgm_cli.api import Batch, Step
from vgm_cli.conditioning import Conditions
from vgm_cli.data.dataset import Dataset, to_float
from vgm_cli.data.latent_cache import build_cache, open_cache
from vgm_cli.data.latents import Latents, MemoryLatents, to_model
from vgm_cli.data.loader import Batches
from vgm_cli.engine import build
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.conditions import OfData, columns_of
from vgm_cli.engine.facts import Facts, facts_for, facts_of, labelled
from vgm_cli.engine.run import Run
from vgm_cli.engine.train.codec_stage import train_codec
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.recipe import Recipe, start_role
from vgm_cli.settings import NO_DATA_HINT, Data
from vgm_cli.ui import some, ui

IN_MEMORY = 20_000  # images whose moments are kept in memory


@dataclass
class Feed:
    """Batches for one process, as the model sees them."""

    data: Data  # the recipe's data node
    dataset: Any  # images (data.Dataset) or latents (data.latents.Latents)
    facts: Facts  # of the data as the model sees it
    labelled: bool  # batches have "y": (B,) int64
    seed: int  # of the order, flips and crops
    rank: int  # number of this process
    world: int  # number of processes
    size: int  # rows of a micro-batch, B
    device: torch.device
    keeps_images: bool = False  # batches have the images as "image", too, for conditions that are made of them
    codec: Any = None  # frozen; None: the model sees pixels
    codec_ref: ckpt.Reference | None = None  # which file the codec is, for checkpoints
    cache: Any = None  # moments (N, 2c, h, w) or tokens (N, *grid), read instead of the images

    @property
    def count(self) -> int:
        """Number of items in the data set."""
        return len(self.dataset)

    @property
    def drawn(self) -> bool:
        """Whether the data set holds latents that were drawn from a posterior once, instead of its mean and
        variance."""
        return isinstance(self.dataset, Latents) and self.dataset.drawn

    def describe(self) -> dict[str, Any]:
        return {
            **self.dataset.describe(),
            "fingerprint": self.dataset.fingerprint(),
            "sample_shape": list(self.facts.sample_shape),
            "labelled": self.labelled,
            **({"words": self.facts.words} if self.facts.words else {}),
        }

    def batches(self, start: int = 0, size: int | None = None, shared: bool = False) -> Iterator[Batch]:
        """Batches from number `start` of the run's fixed order. shared: every process receives the same rows instead of
        its own."""
        return iter(
            Batches(
                self.cache if self.cache is not None else self.dataset,
                size or self.size,
                seed=self.seed,
                rank=0 if shared else self.rank,
                world=1 if shared else self.world,
                start=start,
                hflip=self.data.hflip,
                labels=self.labelled,
                workers=self.data.workers,
                device=self.device,
            )
        )

    def items(self, conditions: Conditions, n: int) -> dict[str, Sequence[Any]]:
        """{condition: n items spread over the data}, of conditions that have none by themselves."""
        source = self.dataset if self.cache is None or isinstance(self.dataset, Dataset) else self.cache
        rows = [i * self.count // n for i in range(n)]
        return {name: OfData(source, p, rows) for name, p in conditions.parts.items() if not len(p.items)}

    def first(self, n: int, shared: int | None = None) -> Batch:
        """The first n rows of this process, or with `shared`, the first so many rows of the whole order on every
        process."""
        return next(self.batches(0, shared or n, shared=shared is not None))

    def to_model(self, batch: Batch, step: Step) -> Batch:
        """A batch as the objective receives it, on the device.

        "x": (B, C, H, W) in [-1, 1], or "moments", become latents "x": (B, c, h, w), drawn from the posterior with this
        step's noise, or "tokens": (B, *grid) int64. Without a codec, the batch stays as it is. What conditions read
        stays in pixels.
        """
        out = {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        if self.keeps_images and "x" in out:
            out["image"] = out["x"]
        if self.codec is None:
            return out
        with torch.no_grad():
            moments = out.pop("moments", None)
            if moments is None:
                moments = self.codec.encode(out["x"])
            if self.facts.vocab_size:
                out.pop("x", None)
                out["tokens"] = to_model(self.codec, moments)
            else:
                noise = step.randn((moments.shape[0], *self.facts.sample_shape), "codec posterior")
                out["x"] = to_model(self.codec, moments, noise, self.drawn)
        return out


def open_images(recipe: Recipe) -> tuple[Any, bool]:
    """(the recipe's data set, whether it is trained with labels). Assumptions are told.

    VgmError: the recipe names no data, nothing is there, or labels are wanted and missing.
    """
    data = recipe.node("data")
    if not data.path:
        raise VgmError(f"{recipe.name} names no data", NO_DATA_HINT, USAGE)
    dataset = build.open_images(recipe)
    wanted = labelled(recipe, dataset)
    if wanted and not dataset.facts.num_classes:
        raise VgmError(
            f"{data.path} has no labels", "class sub-folders give labels; data.labels=false trains without", USAGE
        )
    count = dataset.facts.num_classes if wanted else 0
    if data.num_classes and data.num_classes != count:
        ui.warn(f"the recipe says {data.num_classes} classes, the data has {count or 'none'}: the data counts")
    if (start := recipe.start()) is not None and wanted:
        known = ckpt.read_header(ckpt.resolve(start)).data
        compare_classes(facts_of(dataset, True), known, f"the {start_role(recipe.config)}")
    if data.channels == 1 and isinstance(dataset, Dataset) and not dataset.source.header(0)[2]:
        ui.warn(f"data.channels=1: the colours of {data.path} are left out")
    return dataset, wanted


def open_feed(
    recipe: Recipe,
    run: Run,
    accelerator: Any,
    micro_size: int,
    dataset: Any = None,
    train: Callable[..., Any] | None = None,
) -> Feed:
    """Settle the codec of the data (training the fallback one when the shipped does not fit), encode small sets.

    dataset: the recipe's, where it is open already. train: loop.train, for a codec that has to be trained first.
    """
    data = recipe.node("data")
    if dataset is None:
        dataset, _ = open_images(recipe)
    feed = Feed(
        data=data,
        dataset=dataset,
        facts=facts_for(recipe, dataset),
        labelled=labelled(recipe, dataset),
        seed=recipe.node("train").seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        size=micro_size,
        device=accelerator.device,
        keeps_images="image" in columns_of(recipe.config.get("conditions")),
    )
    node = recipe.config.get("codec")
    if isinstance(dataset, Latents):
        use_latents(feed, node, run)
    elif node:
        add_codec(feed, node, recipe, run, accelerator, train)
    return feed


def compare_classes(facts: Facts, known: Mapping[str, Any], whose: str) -> None:
    """Compare the data's classes with those that another network was trained on. known: the `data` part of its header;
    whose: how to call it in a message. A warning where only names differ. VgmError: another number of classes."""
    theirs, names = known.get("num_classes") or 0, list(known.get("class_names") or [])
    if not facts.num_classes or not theirs:
        return
    if facts.num_classes != theirs:
        hint = f"its classes: {some(names, 10)}" if names else "name the data that it was trained on"
        message = f"the data has {facts.num_classes} classes, {whose} was trained on {theirs}"
        raise VgmError(message, f"{hint}; data.labels=false trains without", USAGE)
    if names and facts.class_names and names != facts.class_names:
        first = next(i for i, (a, b) in enumerate(zip(facts.class_names, names)) if a != b)
        ours = facts.class_names[first]
        ui.warn(f"the data's class {first} is {ours}, that of {whose} {names[first]}: labels stand for other things")


def not_for_pixels(latents: Latents) -> VgmError:
    hint = "take a recipe with a codec, or the images themselves"
    return VgmError(f"{latents.facts.root} holds latents, but this recipe trains on pixels", hint, USAGE)


def use_latents(feed: Feed, node: dict[str, Any] | None, run: Run) -> None:
    """Prepare a feed whose data set holds latents already: the codec is only needed for scaling them and for decoding
    samples."""
    latents = feed.dataset
    if not node:
        raise not_for_pixels(latents)
    if not node.get("weights"):
        raise build.missing_codec(node)
    path = ckpt.resolve(node["weights"])
    feed.codec = ckpt.read_codec(path, feed.device, node.get("output"))
    feed.codec_ref = ckpt.refer_codec(path, run.path, node.get("output"))
    latents.refuse_other(feed.codec_ref.cache_key)
    feed.facts = build.facts_behind(feed.facts, feed.codec, latents)
    feed.cache = latents


def add_codec(
    feed: Feed,
    node: dict[str, Any],
    recipe: Recipe,
    run: Run,
    accelerator: Any,
    train: Callable[..., Any] | None,
) -> None:
    """Prepare a feed of images behind a codec: find the codec (or train its fallback recipe), then cache its output for
    a small set."""
    sample = next(iter(Batches(feed.dataset, min(64, feed.count), seed=0, labels=False)))["x"]
    own = run.path / "codec"
    path = build.find_codec(node, feed.facts, sample, None)
    if path is None:
        if accelerator.is_main_process:
            run.clear()
        accelerator.wait_for_everyone()
        codec = build.codec_recipe(node["fallback"], recipe, feed.facts)
        if Run(own).last() is None:
            tell_codec(codec, feed.facts)
        if train is None:
            raise build.missing_codec(node)
        path = train_codec(train, codec, own, accelerator.device.type)
        accelerator.wait_for_everyone()
    feed.codec = ckpt.read_codec(path, feed.device, node.get("output"))
    feed.codec_ref = ckpt.refer_codec(path, run.path, node.get("output"))
    feed.facts = feed.facts.after(feed.codec)
    key = feed.codec_ref.cache_key
    wish = feed.data.cache_latents
    if wish is False or (wish == "auto" and (feed.count > IN_MEMORY or feed.dataset.crop == "random")):
        return
    folder = None if wish in ("auto", True) else Path(str(wish))
    fingerprint = feed.dataset.fingerprint()
    if folder is not None and accelerator.is_main_process:
        how: dict[str, Any] = {"hflip": feed.data.hflip, "keeps_images": feed.keeps_images, "device": feed.device}
        build_cache(feed.dataset, feed.codec, folder, key, **how)
    accelerator.wait_for_everyone()
    if folder is not None:
        feed.cache = open_cache(folder, key, fingerprint)
    else:
        feed.cache = encode_in_memory(feed)


def tell_codec(codec: Recipe, facts: Facts) -> None:
    """Say that a codec is trained first, and from what."""
    what = f"{facts.image_size}×{facts.image_size}×{facts.image_channels} images"
    steps, start = codec.node("train").steps, codec.config["model"].get("weights")
    if start:
        ui.info(f"the codec for {what} is the shipped {start}, tuned on them first: {steps} steps ({codec.name})")
    else:
        ui.info(f"no shipped codec fits {what}: training one first ({steps} steps of recipe {codec.name})")


def encode_in_memory(feed: Feed) -> MemoryLatents:
    """Encode every image of a small set, and with data.hflip every mirror image, and keep the moments in memory."""
    batch = 256
    parts: dict[str, list[Any]] = {"moments": [], "flipped": [], "label": [], "text": []}
    beside: dict[str, list[Tensor]] = {c: [] for c in (*feed.dataset.columns, *["image"] * feed.keeps_images)}
    with torch.no_grad():
        for first in range(0, feed.count, batch):
            images = feed.dataset.gather(range(first, min(first + batch, feed.count)))
            x = to_float(images["x"]).to(feed.device)
            parts["moments"].append(feed.codec.encode(x).cpu())
            if feed.data.hflip:
                parts["flipped"].append(feed.codec.encode(x.flip(-1)).cpu())
            for column, pictures in beside.items():
                pictures.append(images["x" if column == "image" else column])
            parts["text"] += images.get("text", [])
            parts["label"] += [images["label"]] if "label" in images else []
    return MemoryLatents(
        torch.cat(parts["moments"]),
        torch.cat(parts["flipped"]) if parts["flipped"] else None,
        torch.cat(parts["label"]).numpy() if parts["label"] else None,
        parts["text"] or None,
        {column: torch.cat(pictures) for column, pictures in beside.items()},
    )
