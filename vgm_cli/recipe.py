"""Recipes: YAML with `base:`, KEY=VALUE overrides, the origin of every value, validation that names the nearest key.

Precedence, weakest first: host defaults < recipe (base before heir) < environment (VGM_TRAIN__STEPS=10) < command line.
Component nodes (model, codec, objective, sampler, roles) are the component's constructor keywords; the other nodes are
the dataclasses of settings.py. Torch-free until `check_components`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from vgm_cli import limits
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.limits import short
from vgm_cli.overrides import env_assignments, merge, override, rename, start_role, verbs_of
from vgm_cli.ranges import NonNegative, fit, shown
from vgm_cli.registry import bind, load_target, registry, signature
from vgm_cli.settings import (
    CHECKPOINT,
    COMPONENT_NODES,
    NODES,
    PAIRS,
    STARTS,
    TOP,
    TORCH_OPTIMIZERS,
    Optimizer,
    Pairs,
    check_average,
    not_a_mapping,
    typed,
)
from vgm_cli.ui import ui
from vgm_cli.yaml_text import parse_yaml


@dataclass
class Recipe:
    """A resolved recipe. config: plain nested dict; origins: {dotted key: where its value came from}."""

    config: dict[str, Any]
    origins: dict[str, str]
    name: str

    def node(self, name: str) -> Any:
        """The typed host node ("data", "optimizer", "train")."""
        return typed(NODES[name], self.config.get(name) or {}, name)

    def roles(self) -> dict[str, dict[str, Any]]:
        """The nodes of the roles that the recipe has (those set to null are left out)."""
        return {role: node for role, node in (self.config.get("roles") or {}).items() if node}

    def start(self) -> str | None:
        """The trained network that the recipe starts from, a file once it is settled; None where none is given."""
        node = self.roles().get(start_role(self.config)) or {}
        return node.get("run") or node.get("weights")

    def optimizer(self, name: str) -> Optimizer:
        """Settings of one optimizer: `optimizer:` with `optimizers.NAME` on top."""
        own = (self.config.get("optimizers") or {}).get(name) or {}
        made: Optimizer = typed(Optimizer, {**(self.config.get("optimizer") or {}), **own}, f"optimizers.{name}")
        return made

    @property
    def paper(self) -> str:
        return str(self.config.get("paper", ""))

    def dump(self) -> str:
        return yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)


# -- finding ---------------------------------------------------------------------------------------------------------


def shipped() -> dict[str, Path]:
    """{"paper/name": file} of the built-in recipes and those in the `recipes` folder of each plugin's package."""
    found = dict(_built_in())
    for plugin in registry().plugins.values():
        if plugin.builtin or plugin.error or not plugin.papers:
            continue
        module = sys.modules.get(plugin.module.split(":")[0])
        if module is not None and (file := module.__file__):
            for p in sorted((Path(file).parent / "recipes").glob("*.yaml")):
                for paper in plugin.papers:
                    found.setdefault(f"{paper.name}/{p.stem}", p)
    return found


@functools.cache
def _built_in() -> dict[str, Path]:
    root = Path(str(resources.files("vgm_recipes")))
    return {f"{p.parent.name}/{p.stem}": p for p in sorted(root.glob("*/*.yaml"))}


def locate(target: str, recipe: str | None = None) -> tuple[str, Path]:
    """(name, file) of `vgm train TARGET --recipe RECIPE`: a paper, PAPER/NAME, or a YAML file."""
    for given in (recipe, target):
        if given and given.endswith((".yaml", ".yml")):
            path = Path(given)
            if not path.is_file():
                raise VgmError(f"no such recipe file: {given}", "`vgm ls recipes` shows the shipped ones", USAGE)
            if given == target and recipe is not None:
                raise VgmError(f"{target} is a recipe, so --recipe {recipe} is one too many", code=USAGE)
            return path.stem, path
    files = shipped()
    if "/" in target and recipe is None:
        name = target
    else:
        papers = sorted({f.split("/")[0] for f in files} | set(registry().papers))
        if target not in papers:
            for plugin in registry().plugins.values():
                if plugin.error and target in (plugin.name, plugin.name.replace("-", "_")):
                    raise VgmError(f"plugin '{target}' could not be loaded: {plugin.error}", "see `vgm plugins`", USAGE)
            raise unknown("paper", target, papers)
        name = f"{target}/{recipe or 'mnist'}"
        if recipe is None and name not in files:
            own = [f for f in files if f.startswith(target + "/")]
            if len(small := [f for f in own if starter(f)] or own) == 1:
                name = small[0]
            elif own:
                raise VgmError(
                    f"{target} has several recipes: {', '.join(f.partition('/')[2] for f in own)}",
                    f"{next_command(target, paper_verb(target))}; the first lines of `vgm cat {target}/NAME` say what "
                    "a recipe is for and which commands make the runs that it builds on",
                    USAGE,
                )
    if name not in files:
        paper, _, short = name.partition("/")
        own = [f.partition("/")[2] for f in files if f.startswith(paper + "/")]
        if not own and (Path(target).exists() or target.startswith((".", "~", "/"))):
            hint = f"a run goes on with --out {target} --resume; pictures are data.path={target}"
            raise VgmError(f"{target} is a path, where a paper is expected", hint, USAGE)
        if not own:
            raise VgmError(f"'{paper}' has no recipes", "pass --recipe FILE.yaml", USAGE)
        raise unknown("recipe", short, own, where=paper)
    return name, files[name]


def paper_verb(paper: str) -> str:
    """The verb that a paper's own recipes are for: train, distill or finetune-rl."""
    files = {n: f for n, f in shipped().items() if n.startswith(f"{paper}/")}
    verbs = [verb_of(load_file(f, n)[0]) for n, f in sorted(files.items(), key=lambda i: not starter(i[0]))]
    return "train" if "train" in verbs or not verbs else verbs[0]


def verb_of(config: Mapping[str, Any]) -> str:
    """The verb that a recipe is for, as its objective says: one that can do without a teacher is trained where the
    recipe names none."""
    verbs = verbs_of(config)
    if "train" in verbs and not has_teacher(config):
        return "train"
    return next((v for v in STARTS if v in verbs), "train")


def has_teacher(config: Mapping[str, Any]) -> bool:
    """Does the recipe name a teacher, were it only a stand-in?"""
    return (config.get("roles") or {}).get(STARTS["distill"]) is not None


def starter(name: str) -> bool:
    """Is PAPER/NAME one of the recipes that run in minutes?"""
    return name.partition("/")[2].startswith(("mnist", "openmoji"))


def next_command(paper: str, verb: str | None = None) -> str:
    """A command that works with what a paper brings, its small recipe first; "" for a paper without recipes."""
    verb = verb or paper_verb(paper)
    own = [n for n, f in shipped().items() if n.startswith(f"{paper}/") and verb_of(load_file(f, n)[0]) == verb]
    if not own:
        return ""
    based = {n: "base" in (load_file(shipped()[n], n)[0].get("roles") or {}) for n in own}  # on a run of another recipe
    own.sort(key=lambda n: (n != f"{paper}/mnist", not starter(n), based[n], n))
    short = own[0].partition("/")[2]
    implied = short == "mnist" or len(own) == 1 or (verb == "distill" and starter(own[0]))
    needs = {"distill": " --teacher RUN", "finetune-rl": " --model RUN"}.get(
        verb, " --base RUN" if based[own[0]] else ""
    )
    return f"vgm {verb} {paper}{'' if implied else f' --recipe {short}'}{needs}"


def stored(run: Path, assignments: Iterable[str] = ()) -> Recipe:
    """The recipe that a run directory holds, for `--resume` without naming it again."""
    file = run / "config.yaml"
    if not file.is_file():
        raise VgmError(f"{run} holds no run to go on with", "a run has a config.yaml; `vgm runs ls` lists them", USAGE)
    config, origins = load_file(file, f"run {run}")
    for key in ("model", "objective"):
        if key not in config:
            raise VgmError(f"{file} is no recipe: it has no `{key}:`", code=USAGE)
    return finish(config, origins, str(config.get("paper") or run.name), assignments)


# -- loading ---------------------------------------------------------------------------------------------------------


def load_file(path: Path, origin: str, _seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """A recipe file with its bases merged below it."""
    path = path.resolve()
    if path in _seen:
        raise VgmError(f"{path.name}: `base:` goes round in a circle", code=USAGE)
    try:
        config = parse_yaml(limits.read_text(path, code=USAGE), path.name) or {}
    except UnicodeDecodeError as e:
        raise VgmError(f"{path} is not a text file in UTF-8", code=USAGE) from e
    except OSError as e:
        raise VgmError(f"cannot read {path}: {e.strerror or e}", code=USAGE) from e
    if not isinstance(config, dict):
        raise VgmError(f"{path.name} is not a mapping of keys to values", code=USAGE)
    allow_recipe(config, path.name)
    base = config.pop("base", None)
    if base is not None and not (isinstance(base, str) and base.isprintable() and len(base) < 500):
        raise VgmError(f"{path.name}: `base:` is {short(base)}, not the name of a recipe", code=USAGE)
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if base is not None:
        if not isinstance(base, str) or not 0 < len(base) < 1000 or "\0" in base:
            raise VgmError(f"{path.name}: base={shown(base)} names no recipe", "example: base: dit/mnist", USAGE)
        near = path.parent / (base if str(base).endswith((".yaml", ".yml")) else f"{base}.yaml")
        if near.is_file():
            file, name = near, f"{near.parent.name}/{near.stem}"
        else:
            name, file = locate(str(base))
        merged, origins = load_file(file, f"recipe {name}", (*_seen, path))
    merge(merged, config, origins, origin)
    rename(merged, origins)
    return merged, origins


def allow_recipe(config: Mapping[str, Any], name: str) -> None:
    """With --trust, the code that a recipe file names may run, and is told; else it is remembered who named it."""
    registry().note(config, name, "--trust runs it: look at the recipe and at that code first")
    if registry().trusts_recipes and (found := registry().trust(config)):
        ui.warn(f"--trust: {name} may run {', '.join(found)}")


def allow_typed(words: Iterable[str | None], trust_recipes: bool = False) -> None:
    """What the user typed (NAME, KEY=VALUE, NAME=WEIGHT) and the environment may name code as "module:attr"."""
    registry().trusts_recipes = trust_recipes
    for word in (*words, *env_assignments()):
        key, eq, value = (word or "").partition("=")
        registry().trust(key)
        if eq:
            with contextlib.suppress(VgmError):  # told where the word is used
                registry().trust(parse_yaml(value, key))


def load(target: str, recipe: str | None = None, assignments: Iterable[str] = ()) -> Recipe:
    """The resolved recipe of `vgm train TARGET --recipe RECIPE KEY=VALUE…`, host nodes validated."""
    name, path = locate(target, recipe)
    config, origins = load_file(path, f"recipe {name}")
    return finish(config, origins, name, assignments)


def finish(config: dict[str, Any], origins: dict[str, str], name: str, assignments: Iterable[str] = ()) -> Recipe:
    """Overrides on top, unknown keys refused, host nodes typed with their defaults filled in."""
    before = dict(config.get("data") or {}), origins.get("data.split")
    override(config, origins, env_assignments(), "environment")
    override(config, origins, assignments, "command line")
    data = config.get("data")
    if isinstance(data, dict) and data.get("path") != before[0].get("path") and origins.get("data.split") == before[1]:
        data.pop("split", None)  # it was a part of the data set that the recipe names, not of this one
        origins.pop("data.split", None)
    check_shape(config, name)
    rename(config, origins)
    copy_roles(config, origins)
    r = Recipe(config, origins, name)
    for node, cls in NODES.items():
        values = dataclasses.asdict(r.node(node))
        given = config.get(node) or {}
        config[node] = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        for f in dataclasses.fields(cls):
            if f.name not in given:
                origins[f"{node}.{f.name}"] = "default"
    for key in ("log_every", "save_every", "preview_every"):
        config["train"][key] = config["train"][key] or 0
    averages = [check_average(a) for a in config["train"]["ema"]]
    if any(a in averages[:i] for i, a in enumerate(averages)):
        raise VgmError(f"train.ema={shown(config['train']['ema'])} names the same average twice", code=USAGE)
    r.node("train").skip_rule()
    if "guidance_scale" in config:
        config["guidance_scale"] = fit(config["guidance_scale"], NonNegative | None, "guidance_scale")
    for role, own in r.roles().items():
        if role == PAIRS and "name" not in own:
            own.setdefault("kind", PAIRS)
        if own.get("kind") == PAIRS:
            config["roles"][role] = {"kind": PAIRS, **dataclasses.asdict(pairs_of(own, f"roles.{role}"))}
    for opt in ("", *(config.get("optimizers") or {})):
        setting = r.optimizer(opt)
        setting.check(f"optimizers.{opt}" if opt else "optimizer")
        chosen = setting.name
        if chosen not in TORCH_OPTIMIZERS and ":" not in chosen and chosen not in registry().names("optimizer"):
            raise unknown("optimizer", chosen, [*TORCH_OPTIMIZERS, *registry().names("optimizer")])
    if "weights" in (config.get("codec") or {}) and "name" not in config["codec"]:
        raise VgmError(f"{name} trains on pixels, it takes no codec", "leave the codec out", USAGE)
    for required in ("model", "objective"):
        if not config.get(required):
            raise VgmError(f"recipe {name} has no `{required}:` node", "see `vgm cat dit/mnist`", USAGE)
    return r


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved recipe as an older version wrote it, with the keys that its host nodes have got since."""
    out = dict(config)
    for node, cls in NODES.items():
        if isinstance(out.get(node), Mapping):
            out[node] = {**dataclasses.asdict(cls()), **out[node]}
    return out


def check_shape(config: Mapping[str, Any], name: str) -> None:
    """Known keys, and mappings where the rest of the program expects mappings with words for keys."""
    for key, value in config.items():
        if key not in TOP:
            raise unknown("key", key, TOP, where=f"recipe {name}")
        if key in ("paper", "guidance_scale") or value is None:
            continue
        nodes = {key: value}
        if key in ("conditions", "roles", "optimizers") and isinstance(value, dict):
            nodes |= {f"{key}.{k}": v for k, v in value.items() if v is not None}
        for where, node in nodes.items():
            if not isinstance(node, dict):
                raise not_a_mapping(where, node)
            if odd := [k for k in node if not isinstance(k, str) or not k]:
                raise VgmError(f"{where}: the key {shown(odd[0])} is not a word", code=USAGE)
            component = where in COMPONENT_NODES or where.startswith(("roles.", "conditions."))
            if component and not isinstance(node.get("name"), str | None):
                raise VgmError(f"{where}.name={shown(node['name'])} is not a name", code=USAGE)
    if not isinstance(config.get("paper", ""), str):
        raise VgmError(f"paper={shown(config['paper'])} is not a name", code=USAGE)


def pairs_of(node: Mapping[str, Any], where: str) -> Pairs:
    """The settings of a role of kind `pairs`."""
    made: Pairs = typed(Pairs, {k: v for k, v in node.items() if k != "kind"}, where)
    return made


def copy_roles(config: dict[str, Any], origins: dict[str, str]) -> None:
    """A network node whose `name` is that of a role is a copy of it, see copy_role. Roles that are checkpoints are
    copied when their files are read (engine.build.settle)."""
    for role, node in (config.get("roles") or {}).items():
        if node and "name" in node and node.get("kind", "model") == "model":
            copy_role(config, origins, role, {k: v for k, v in node.items() if k == "weights" or k not in ROLE_KEYS})


def copy_role(config: dict[str, Any], origins: dict[str, str], role: str, source: Mapping[str, Any]) -> None:
    """Write `source`, the component node of a role, into the model node and the roles that say `name: ROLE`; what such
    a node says besides goes on top. A registered network of that name is no copy."""
    if ("model", role) in registry().components:
        return

    def resolved(node: Any, where: str) -> Any:
        if not isinstance(node, dict) or node.get("name") != role or where == f"roles.{role}":
            return node
        own = {k: v for k, v in node.items() if k != "name"}
        origins.update({f"{where}.{k}": origins.get(f"roles.{role}.{k}", role) for k in source.keys() - own.keys()})
        return {**source, **own}

    config["model"] = resolved(config.get("model"), "model")
    if config.get("roles"):
        config["roles"] = {other: resolved(node, f"roles.{other}") for other, node in config["roles"].items()}


def check_components(recipe: Recipe) -> None:
    """Bind every component node to its signature without building anything (imports torch)."""
    roles = recipe.roles()
    injected = {"model": None, "codec": None, **dict.fromkeys(recipe.config.get("roles") or {})}
    nodes = [(n, n, recipe.config.get(n)) for n in COMPONENT_NODES]
    nodes += [(n.get("kind", "model"), f"roles.{r}", n) for r, n in roles.items()]
    conditions = recipe.config.get("conditions") or {}
    nodes += [("condition", f"conditions.{k}", {"name": k, **n}) for k, n in conditions.items() if n is not None]
    for kind, where, node in nodes:
        if not node or kind == PAIRS or node.get("run") is not None:
            continue
        node = {k: v for k, v in node.items() if k not in HOST_KEYS.get(where.split(".")[0], ())}
        component, kwargs = registry().config(kind, node)
        target = load_target(component.target, component.name)
        params = signature(target).parameters
        filled = (*component.from_data, *(("channels",) if kind == "condition" else ()))
        facts = {k: 1 for k in filled if k in params and k not in kwargs}
        bind(target, kwargs, {**injected, **facts}, where=f"{where} '{component.name}'")


# keys of component nodes that the host consumes itself
ROLE_KEYS = ("kind", "weights", "partial", *CHECKPOINT)
HOST_KEYS: dict[str, tuple[str, ...]] = {
    "codec": ("weights", "fallback", "output"),
    "conditions": ("dropout", "train", "column", "weights", "items", "guided"),
    "roles": ROLE_KEYS,
    "model": ("weights", "partial"),
}
