"""ODE pairs: noise and what the teacher's flow makes of it, in model space, made once and kept for the next run.

Pair i is a function of (seed, i). Files of SHARD pairs, named by the teacher's hash and the settings, are written as
they are made, so that an interrupted run goes on and a larger count adds to what is there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgm_cli import atomic
from vgm_cli import recipe as recipes
from vgm_cli.api import Request, generators, seed_of
from vgm_cli.conditioning import Conditions, words_of
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.engine import build, processes
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.conditions import give_of_data
from vgm_cli.recipe import Recipe
from vgm_cli.registry import registry
from vgm_cli.settings import Pairs
from vgm_cli.ui import Progress, ui

SHARD = 256  # pairs in one cache file


def shared(recipe: Recipe, node: Mapping[str, Any]) -> dict[str, Tensor]:
    """ODE pairs for every process; the first one makes them. See `pairs_of`."""
    if not processes.launched():
        return pairs_of(recipe, node)
    from accelerate import PartialState

    with PartialState(cpu=not torch.cuda.is_available()).main_process_first():
        return pairs_of(recipe, node)


def pairs_of(recipe: Recipe, node: Mapping[str, Any]) -> dict[str, Tensor]:
    """z, x: (count, C, H, W), the noise and the teacher's image of it; and the keywords that it was made with, such
    as y: (count,).

    node: the role of kind `pairs`, see recipe.Pairs.
    """
    settings = recipes.pairs_of(node, "pairs")
    teacher = recipe.roles()[recipes.STARTS["distill"]]
    guidance = recipe.config["objective"].get("guidance_scale") or 1.0
    made = {"teacher": teacher["sha256"], "view": teacher["view"], "sampler": settings.sampler, "steps": settings.steps}
    made |= {"guidance_scale": guidance, "seed": settings.seed}
    nodes = {k: n for k, n in (recipe.config.get("conditions") or {}).items() if n and n.get("name", k) != "class"}
    data = build.open_images(recipe) if any(not n.get("items") for n in nodes.values()) else None
    if nodes:
        made["items"] = {name: n.get("items") or data.fingerprint() for name, n in nodes.items()}  # type: ignore[union-attr]
    key = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder(settings.cache) / key
    files = [folder / f"{first:08d}.safetensors" for first in range(0, settings.count, SHARD)]
    missing = [f for f in files if not f.is_file()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_json(folder / "settings.json", made)
        ui.info(f"{len(missing) * SHARD} pairs of the teacher into {folder}")
        loaded = ckpt.load(teacher["run"], device=processes.pick_device())
        ask_for(loaded.conditions, nodes, data, settings.seed)
        view = ckpt.build_view(loaded.model, {"name": "denoiser", **teacher["view"]})
        with Progress("pairs", len(missing) * SHARD) as progress:
            for done, file in enumerate(missing):
                tensors = make_pairs(view, loaded, settings, guidance, int(file.stem))
                atomic.save_safetensors(tensors, file, {"format": "pt"})
                progress.update((done + 1) * SHARD)
    shards = [ckpt.read_tensors(f)[0] for f in files]
    return {k: torch.cat([s[k] for s in shards])[: settings.count] for k in shards[0]}


def ask_for(conditions: Conditions, nodes: Mapping[str, Any], data: Any, seed: int) -> None:
    """What the teacher is told of each pair: the recipe's `items` in turn, else those of the data in an order of its
    own, so that few pairs are of many kinds."""
    for name, part in conditions.parts.items():
        if items := nodes.get(name, {}).get("items"):
            part.given = part.condition.parse(words_of(items, name))
    if data is not None:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed_of("items", seed)))
        give_of_data(conditions, data, order.tolist())


@torch.no_grad()
def make_pairs(view: Denoiser, loaded: ckpt.Loaded, settings: Pairs, guidance: float, first: int) -> dict[str, Tensor]:
    """Make the pairs number first to first + SHARD."""
    shape = tuple(loaded.header.data.get("sample_shape") or view.network.sample_shape)  # type: ignore[attr-defined]
    conditions = loaded.conditions
    device = next(view.network.parameters()).device  # type: ignore[attr-defined]
    sampler = registry().build("sampler", {"name": settings.sampler})
    batches: dict[str, list[Tensor]] = {"z": [], "x": []}
    for start in range(first, first + SHARD, settings.batch_size):
        items = range(start, min(start + settings.batch_size, first + SHARD))
        seeds = [seed_of("pairs", settings.seed, i) for i in items]
        cond = conditions.encode({name: part.in_turn(items) for name, part in conditions.parts.items()}, device)
        request = Request(
            shape=shape,
            generators=generators(seeds),
            cond=cond,
            null=conditions.null(device),
            steps=settings.steps,
            guidance_scale=guidance if cond else None,
            device=device,
        )
        batches["x"].append(sampler(view, request).float().cpu())
        batches["z"].append(Request(shape=shape, generators=generators(seeds)).randn())
        for k, v in cond.items():
            batches.setdefault(k, []).append(v.cpu())
    return {k: torch.cat(v) for k, v in batches.items()}


def cache_folder(given: str | None) -> Path:
    """The folder in which pairs are kept: the one that the recipe names, else `pairs` in vgm's cache."""
    root = os.environ.get("VGM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vgm"
    return Path(given) if given else Path(root) / "pairs"
