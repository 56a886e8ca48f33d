"""Distillation: a recipe whose teacher is a run or a checkpoint.

The recipe's role `teacher` is that checkpoint. Its file says what network it is, how samplers look at it, behind which
codec and on which data it was trained: codec, data and guidance go into the recipe where it does not say otherwise, and
from there on a distillation is a training run like any other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vgm_cli import recipe as recipes
from vgm_cli import validation
from vgm_cli.data import SHIPPED
from vgm_cli.engine import build
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.distill import pairs
from vgm_cli.engine.train import loop as trainer
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.overrides import leaves
from vgm_cli.recipe import Recipe
from vgm_cli.registry import load_target, registry, signature
from vgm_cli.ui import ui

TEACHER = recipes.STARTS["distill"]
IMAGES = ("path", "size", "channels", "num_classes", "crop", "hflip", "labels", "split")  # of a teacher's data


def methods() -> list[str]:
    """Names of the objectives that learn from a teacher."""
    return sorted(n for (kind, n), c in registry().components.items() if kind == "objective" and "distill" in c.verbs)


def distilling() -> dict[str, str]:
    """{PAPER/NAME: objective} of the shipped recipes that have a teacher."""
    students, known = {}, methods()
    for name, file in sorted(recipes.shipped().items()):
        config = recipes.load_file(file, name)[0]
        objective = (config.get("objective") or {}).get("name", "")
        if recipes.has_teacher(config) and objective in known:
            students[name] = objective
    return students


def locate(method: str, recipe: str | None = None) -> tuple[str, Path]:
    """(name, file) of `vgm distill METHOD --recipe RECIPE`: METHOD is a paper or its objective; without a recipe the
    first of its mnist ones. VgmError: nothing distills by that name."""
    if "/" in method or method.endswith((".yaml", ".yml")) or (recipe or "").endswith((".yaml", ".yml")):
        return recipes.locate(method, recipe)
    known = distilling()
    of_method = [n for n, objective in known.items() if method in (n.split("/")[0], objective)]
    if not of_method:
        papers = sorted({n.split("/")[0] for n in known})
        if method in registry().papers:
            hint = f"`{recipes.next_command(method)}`; methods: {', '.join(papers)}"
            raise VgmError(f"{method} does not distill a teacher", hint, USAGE)
        raise unknown("distillation method", method, papers)
    if recipe is not None:
        return recipes.locate(of_method[0].split("/")[0], recipe)
    name = next((n for n in of_method if n.split("/")[1].startswith("mnist")), of_method[0])
    return name, recipes.shipped()[name]


def suited(name: str, teacher: Path) -> tuple[str, Path]:
    """(name, file) of the recipe that nobody named: `name`, or, where its own data are grey and the teacher's are in
    colour, one beside it for pictures in colour; told."""
    files = recipes.shipped()
    if ckpt.read_header(teacher).data.get("image_channels") != 3:
        return name, files[name]
    paper, _, short = name.partition("/")
    small = [n for n in distilling() if n.startswith(f"{paper}/") and recipes.starter(n)]
    paths = {n: (recipes.load_file(files[n], n)[0].get("data") or {}).get("path") for n in small}
    in_colour = SHIPPED.keys() - {"mnist5k"}
    if paths.get(name) != "mnist5k" or (found := next((n for n in small if paths[n] in in_colour), None)) is None:
        return name, files[name]
    ui.info(f"recipe: {found}, since the teacher's pictures are in colour; --recipe {short} is the one for digits")
    return found, files[found]


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
    path = None if teacher is None else ckpt.resolve(teacher, weights)
    if path is not None and recipe is None and "/" not in method and not method.endswith((".yaml", ".yml")):
        name, file = suited(name, path)
    config, origins = recipes.load_file(file, f"recipe {name}")
    objective = (config.get("objective") or {}).get("name")
    if objective not in methods() or not recipes.has_teacher(config):
        verb = recipes.verb_of(config)
        hint = recipes.next_command(name.split("/")[0], verb)
        raise VgmError(f"{name} does not distill a teacher", hint, USAGE)
    if path is not None:
        start_from(TEACHER, config, origins, path)
    resolved = build.settle(finish(TEACHER, config, origins, name, assignments))
    check_second_time(resolved)
    return resolved


def check_second_time(recipe: Recipe) -> None:
    """VgmError: the student is told a second time, and the teacher's network, which it is a copy of, takes none."""
    node = recipe.config["model"]
    if not node.get("second_time") or node["name"] in recipe.roles():
        return

    def takes(target: str) -> bool:
        return "second_time" in signature(load_target(target)).parameters

    models = {n: c.target for (kind, n), c in registry().components.items() if kind == "model"}
    if node["name"] in models and not takes(models[node["name"]]):
        able = ", ".join(n for n in sorted(models) if takes(models[n]))
        message = f"the student of {recipe.name} is told a second time, which {node['name']} does not take"
        raise VgmError(message, f"a teacher of these networks: {able}", USAGE)


def finish(
    role: str, config: dict[str, Any], origins: dict[str, str], name: str, assignments: Sequence[str] = ()
) -> Recipe:
    """`recipe.finish`, which says so where the data are those of the role's file."""
    resolved = recipes.finish(config, origins, name, assignments)
    path = resolved.config["data"]["path"]
    if origins.get("data.path") == role and path not in SHIPPED:
        ui.info(f"data: {path}, as {config['roles'][role]['run']} says")
    return resolved


def start_from(role: str, config: dict[str, Any], origins: dict[str, str], path: Path, keep: bool = False) -> None:
    """Make the checkpoint at `path` the role of a recipe that starts from a trained network, and give the recipe the
    codec, data and guidance that the file says, where the recipe says none. keep: conditions that the recipe has
    besides the file's stay. VgmError: it is no such network."""
    header = ckpt.read_header(path)
    name = header.component["name"]
    if header.is_codec:
        raise VgmError(f"{path} is a codec: it reconstructs, there is nothing to start from", "a model's run", USAGE)
    of_role = (config.get("roles") or {}).get(role) or {}
    view = header.view or (of_role.get("view") if not header.recipe else None)  # a run has said it, or has none
    if not is_denoiser(view):
        said = f"roles: {{{role}: {{view: {{path: vp-discrete, prediction: eps, time: index}}}}}}"
        hint = f"a converted checkpoint needs its view in the recipe: {said}"
        hint = "a run that removes noise, such as that of `vgm train sit`" if header.recipe else hint
        raise VgmError(f"{path} ({name}) is no diffusion or flow network", hint, USAGE)
    guidance = header.recipe.get("guidance_scale")
    node = {"run": str(path.resolve()), "sha256": ckpt.file_hash(path), "view": view}
    replace(config, origins, f"roles.{role}", node, role)
    if not keep or "codec" in header.parts or header.recipe.get("data"):  # a converted file says neither
        replace(config, origins, "codec", None, role)
    if (ref := header.parts.get("codec")) is not None:
        file = ckpt.locate(ref, path, "codec")
        weights = ref.asset or str(file.resolve())
        codec = {"name": ckpt.read_header(file).component["name"], "weights": weights}
        replace(config, origins, "codec", codec, role)
    adopt_conditions(role, config, origins, header, path, keep)
    of_recipe = {k: v for k, v in (config.get("data") or {}).items() if v is not None}
    of_file = {k: v for k, v in (header.recipe.get("data") or {}).items() if v is not None and k in IMAGES}
    if "path" in of_file and of_recipe.get("path") in SHIPPED:
        of_recipe.pop("labels", None)  # what the recipe assumes without a teacher
        if of_recipe.pop("path") != of_file["path"]:
            of_recipe.pop("split", None)
    if keep:  # latents and hints are of the size that the network knows
        if of_file:
            seen = {"size": header.data.get("image_size"), "channels": header.data.get("image_channels")}
            of_file = {k: v for k, v in seen.items() if v} | of_file
        of_recipe = {k: v for k, v in of_recipe.items() if k not in of_file}
    origins |= {f"data.{key}": role for key in of_file.keys() - of_recipe.keys()}
    config["data"] = {**of_file, **of_recipe}
    objective = config.get("objective") or {}
    if "name" not in objective:
        return
    parameters = signature(load_target(registry().find("objective", objective["name"]).target)).parameters
    if "guidance_scale" in parameters and "guidance_scale" not in objective:
        objective["guidance_scale"] = guidance
        origins["objective.guidance_scale"] = role


def adopt_conditions(
    role: str,
    config: dict[str, Any],
    origins: dict[str, str],
    header: ckpt.Header,
    path: Path,
    keep: bool = False,
) -> None:
    """Give a recipe the conditions of the network at `path`, where it is told more than classes (or `keep` says so: the
    recipe's others stay); an encoder that was trained with it stays as it is."""
    known = header.conditions or {}
    if not keep and all(node.get("name", name) == "class" for name, node in known.items()):
        return
    said = config.get("conditions") or {}
    nodes = {k: v for k, v in said.items() if keep and k not in known}
    for name, node in known.items():
        own = {k: v for k, v in node.items() if k != "train"}
        own |= {"weights": str((path.parent / f"{name}.safetensors").resolve())} if node.get("train") else {}
        nodes[name] = own | {k: v for k, v in (said.get(name) or {}).items() if v is not None}
    replace(config, origins, "conditions", nodes, role)


def replace(
    config: dict[str, Any], origins: dict[str, str], key: str, node: dict[str, Any] | None, origin: str
) -> None:
    """Put a whole node in a recipe under a dotted key, or take it out (None)."""
    *above, last = key.split(".")
    for name in above:
        config = config.setdefault(name, {})
    config.pop(last, None)
    for k in [k for k in origins if k == key or k.startswith(key + ".")]:
        del origins[k]
    if node is not None:
        config[last] = node
        origins.update(dict.fromkeys(leaves(node, key), origin))


def is_denoiser(view: Mapping[str, Any] | None) -> bool:
    """Does a checkpoint's view show the network as one that removes noise?"""
    if not view or view.get("name") == "codec":
        return False
    return registry().find("view", view.get("name", "denoiser")).denoiser


def teacher_of(out: Path) -> str:
    """The teacher's file of the distillation in `out`. VgmError: there is none to go on with."""
    file = out / "config.yaml"
    config = recipes.load_file(file, str(file))[0] if file.is_file() else {}
    node = (config.get("roles") or {}).get(TEACHER) or {}
    if node.get("run") is None:
        hint = "`vgm distill METHOD --teacher RUN` starts one"
        raise VgmError(f"{out} is no distillation to go on with", hint, USAGE)
    return str(node["run"])


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
    if recipe.start() is None:
        raise VgmError("distillation needs a teacher", f"vgm distill {recipe.paper} --teacher RUN", USAGE)
    build.settle(recipe)
    roles: dict[str, Any] = {}
    for role, node in recipe.roles().items():
        if node.get("kind") == recipes.PAIRS:
            validation.before_start(recipe, int(os.environ.get("WORLD_SIZE", "1")))  # pairs take minutes
            roles[role] = pairs.shared(recipe, node)
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
