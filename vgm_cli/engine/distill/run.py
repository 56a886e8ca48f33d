"""Distillation: a recipe whose teacher is a run or a checkpoint.

The teacher's weights file says what network it is, how samplers look at it, behind which codec and on which data it was
trained; all that goes into the recipe, and from there on a distillation is a training run like any other.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgm_cli import atomic, validation
from vgm_cli import recipe as recipes
from vgm_cli.api import Request, generators, seed_of
from vgm_cli.data import SHIPPED
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine import distributed
from vgm_cli.engine.run import Run
from vgm_cli.engine.sample.loop import class_labels
from vgm_cli.engine.train import loop as trainer
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.recipe import Pairs, Recipe, typed
from vgm_cli.registry import load_target, registry, signature
from vgm_cli.ui import Progress, ui

SHARD = 256  # pairs in one cache file
IMAGES = (
    "path",
    "size",
    "channels",
    "num_classes",
    "crop",
    "hflip",
    "labels",
    "split",
)  # data keys that a teacher tells


def methods() -> list[str]:
    """Objectives that learn from a teacher."""
    return sorted(n for (kind, n), c in registry().components.items() if kind == "objective" and "distill" in c.verbs)


def distilling() -> dict[str, str]:
    """{PAPER/NAME: objective} of the shipped recipes that have a teacher."""
    found, known = {}, methods()
    for name, file in sorted(recipes.shipped().items()):
        config = recipes.load_file(file, name)[0]
        objective = (config.get("objective") or {}).get("name", "")
        if config.get("teacher") is not None and objective in known:
            found[name] = objective
    return found


def locate(method: str, recipe: str | None = None) -> tuple[str, Path]:
    """(name, file) of `vgm distill METHOD --recipe RECIPE`: METHOD is a paper or its objective; without a recipe the
    first of its mnist ones. VgmError: nothing distills by that name."""
    if "/" in method or method.endswith((".yaml", ".yml")) or (recipe or "").endswith((".yaml", ".yml")):
        return recipes.locate(method, recipe)
    known = distilling()
    own = [n for n, objective in known.items() if method in (n.split("/")[0], objective)]
    if not own:
        papers = sorted({n.split("/")[0] for n in known})
        if method in registry().papers:
            hint = f"`{recipes.next_command(method)}`; methods: {', '.join(papers)}"
            raise VgmError(f"{method} does not distill a teacher", hint, USAGE)
        raise unknown("distillation method", method, papers)
    if recipe is not None:
        return recipes.locate(own[0].split("/")[0], recipe)
    name = next((n for n in own if n.split("/")[1].startswith("mnist")), own[0])
    return name, recipes.shipped()[name]


def load(
    method: str,
    recipe: str | None = None,
    assignments: Sequence[str] = (),
    teacher: str | None = None,
    weights: str | None = None,
) -> Recipe:
    """The resolved recipe of `vgm distill METHOD --teacher TEACHER KEY=VALUE…`; without a teacher, with its stand-in.

    VgmError: no such method, a recipe without a teacher, a teacher that is no diffusion or flow network.
    """
    name, file = locate(method, recipe)
    config, origins = recipes.load_file(file, f"recipe {name}")
    objective = (config.get("objective") or {}).get("name")
    if objective not in methods() or config.get("teacher") is None:
        verb = recipes.verb_of(config)
        hint = recipes.next_command(name.split("/")[0], verb)
        raise VgmError(f"{name} does not distill a teacher", hint, USAGE)
    if teacher is not None:
        adopt(config, origins, ckpt.resolve(teacher, weights))
    return recipes.finish(config, origins, name, assignments)


def adopt(config: dict[str, Any], origins: dict[str, str], path: Path) -> None:
    """Write the teacher at `path` into a recipe: network, view, codec, data, guidance."""
    header = ckpt.read_header(path)
    name = header.component["name"]
    if header.is_codec:
        raise VgmError(f"{path} is a codec: it reconstructs, there is nothing to distill", "take a model's run", USAGE)
    view = header.view or config["teacher"].get("view")
    if not is_denoiser(view):
        raise VgmError(
            f"{path} ({name}) is no diffusion or flow network",
            "a converted checkpoint needs its view: teacher.view={path: vp-discrete, prediction: eps, time: index}",
            USAGE,
        )
    guidance = header.recipe.get("guidance_scale")
    node = {"name": name, **header.component.get("kwargs", {}), "view": view, "guidance_scale": guidance}
    replace(config, origins, "teacher", {**node, "weights": str(path.resolve()), "sha256": ckpt.file_hash(path)})
    replace(config, origins, "codec", None)
    if header.codec:
        file = ckpt.codec_path(header.codec, path)
        weights = header.codec.get("asset") or str(file.resolve())
        replace(config, origins, "codec", {"name": ckpt.read_header(file).component["name"], "weights": weights})
    own = {k: v for k, v in (config.get("data") or {}).items() if v is not None}
    seen = {k: v for k, v in (header.recipe.get("data") or {}).items() if v is not None and k in IMAGES}
    if "path" in seen and own.get("path") in SHIPPED:
        del own["path"]  # what the recipe assumes without a teacher
    if "path" not in own and seen.get("path", "mnist5k") not in SHIPPED:
        ui.info(f"data: {seen['path']}, as {path} says")
    for key in seen.keys() - own.keys():
        origins[f"data.{key}"] = "teacher"
    config["data"] = {**seen, **own}
    objective = config["objective"]
    takes = signature(load_target(registry().find("objective", objective["name"]).target)).parameters
    if "guidance_scale" in takes and "guidance_scale" not in objective:
        objective["guidance_scale"] = guidance
        origins["objective.guidance_scale"] = "teacher"


def replace(config: dict[str, Any], origins: dict[str, str], key: str, node: dict[str, Any] | None) -> None:
    """Put a whole node in a recipe, or take it out."""
    for k in [k for k in origins if k == key or k.startswith(key + ".")]:
        del origins[k]
    config.pop(key, None)
    if node is not None:
        config[key] = node
        origins |= {f"{key}.{k}": "teacher" for k in node}


def is_denoiser(view: Mapping[str, Any] | None) -> bool:
    """Does a checkpoint's view show the network as one that removes noise?"""
    if not view or view.get("name") == "codec":
        return False
    return registry().find("view", view.get("name", "denoiser")).denoiser


def resumed(out: Path) -> tuple[str, str]:
    """(teacher's file, its hash) that the run in `out` was started with."""
    file = out / "config.yaml"
    node = (recipes.parse_yaml(file.read_text(), str(file)) or {}).get("teacher") if file.is_file() else None
    if not node or "weights" not in node:
        raise VgmError(
            f"{out} is no distillation to go on with", "`vgm distill METHOD --teacher RUN` starts one", USAGE
        )
    return node["weights"], node.get("sha256", "")


def run(
    recipe: Recipe,
    out: Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop_after: int | None = None,
    track: str = "jsonl",
    device: str | None = None,
) -> trainer.Outcome:
    """Make the pairs that the recipe asks for, then train."""
    node = recipe.config.get("teacher") or {}
    if "weights" not in node:
        raise VgmError("distillation needs a teacher", f"vgm distill {recipe.paper} --teacher RUN", USAGE)
    if resume and out is not None and Run(out).last() is not None and resumed(out)[1] != node.get("sha256"):
        raise VgmError(f"{out} was distilled from another teacher", "resume with the same one", USAGE)
    roles: dict[str, Any] = {}
    if recipe.config.get("pairs"):
        validation.before_start(recipe, int(os.environ.get("WORLD_SIZE", "1")))  # pairs take minutes
        roles["pairs"] = shared_pairs(recipe)
    return trainer.train(
        recipe,
        out,
        resume=resume,
        overwrite=overwrite,
        stop_after=stop_after,
        track=track,
        roles=roles,
        device=device,
    )


# -- ODE pairs -------------------------------------------------------------------------------------------------------


def shared_pairs(recipe: Recipe) -> dict[str, Tensor]:
    """Pairs for every process, made by the first."""
    if not distributed.launched():
        return pairs_of(recipe)
    from accelerate import PartialState

    with PartialState(cpu=not torch.cuda.is_available()).main_process_first():
        return pairs_of(recipe)


def pairs_of(recipe: Recipe) -> dict[str, Tensor]:
    """z, x: (count, C, H, W), the noise and what the teacher's ODE makes of it, in model space; y: (count,) labels.

    Pair i is a function of (seed, i). Files of SHARD pairs, named by the teacher's hash and the settings, are written
    as they are made, so that an interrupted run goes on and a larger count adds to what is there.
    """
    opts = typed(Pairs, recipe.config["pairs"], "pairs")
    teacher = recipe.config["teacher"]
    guidance = (recipe.config["objective"].get("guidance_scale")) or 1.0
    settings = {"teacher": teacher["sha256"], "view": teacher["view"], "sampler": opts.sampler, "steps": opts.steps}
    settings |= {"guidance_scale": guidance, "seed": opts.seed}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder(opts.cache) / key
    files = [folder / f"{first:08d}.safetensors" for first in range(0, opts.count, SHARD)]
    missing = [f for f in files if not f.is_file()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_json(folder / "settings.json", settings)
        ui.info(f"{len(missing) * SHARD} pairs of the teacher into {folder}")
        loaded = ckpt.load(teacher["weights"], device=distributed.pick_device())
        view = ckpt.build_view(loaded.model, {"name": "denoiser", **teacher["view"]})
        with Progress("pairs", len(missing) * SHARD) as progress:
            for done, file in enumerate(missing):
                tensors = make_pairs(view, loaded.header, opts, guidance, int(file.stem))
                atomic.save_safetensors(tensors, file, {"format": "pt"})
                progress.update((done + 1) * SHARD)
    parts = [ckpt.read_tensors(f)[0] for f in files]
    return {k: torch.cat([p[k] for p in parts])[: opts.count] for k in parts[0]}


@torch.no_grad()
def make_pairs(view: Denoiser, header: ckpt.Header, opts: Pairs, guidance: float, first: int) -> dict[str, Tensor]:
    """Pairs first .. first + SHARD."""
    shape = tuple(header.data.get("sample_shape") or view.network.sample_shape)  # type: ignore[attr-defined]
    classes = header.data.get("num_classes", getattr(view.network, "num_classes", 0)) or 0
    device = next(view.network.parameters()).device  # type: ignore[attr-defined]
    sampler = registry().build("sampler", {"name": opts.sampler})
    parts: dict[str, list[Tensor]] = {"z": [], "x": [], "y": []}
    for start in range(first, first + SHARD, opts.batch_size):
        items = range(start, min(start + opts.batch_size, first + SHARD))
        seeds = [seed_of("pairs", opts.seed, i) for i in items]
        labels = torch.tensor(class_labels(items.stop, classes)[items.start :], dtype=torch.long, device=device)
        request = Request(
            shape=shape,
            generators=generators(seeds),
            cond={"y": labels} if classes else {},
            steps=opts.steps,
            guidance_scale=guidance if classes else None,
            device=device,
        )
        parts["x"].append(sampler(view, request).float().cpu())
        parts["z"].append(Request(shape=shape, generators=generators(seeds)).randn())
        parts["y"] += [labels.cpu()] if classes else []
    return {k: torch.cat(v) for k, v in parts.items() if v}


def cache_folder(given: str | None) -> Path:
    root = os.environ.get("VGM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vgm"
    return Path(given) if given else Path(root) / "pairs"
