"""Recipes: YAML with `base:`, KEY=VALUE overrides, the origin of every value, validation that names the nearest key.

Precedence, weakest first: host defaults < recipe (base before heir) < environment (VGM_TRAIN__STEPS=10) < command line.
Component nodes (model, codec, objective, sampler, roles) are the component's constructor keywords; the other nodes are
the dataclasses below. Torch-free until `validate_components`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Le

from vgm_cli import limits, renamed
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.limits import short
from vgm_cli.ranges import Count, Decay, NonNegative, Positive, Seed, Side, Steps, Text, Whole, fit, shown
from vgm_cli.registry import registry
from vgm_cli.ui import ui

COMPONENT_NODES = ("model", "codec", "objective", "sampler")
Precision = Literal["auto", "fp32", "bf16", "fp16"]
AverageKey = Literal["decay", "warmup", "every", "half_life", "ramp", "sigma_rel"]
TORCH_OPTIMIZERS = ("adamw", "adam", "sgd", "rmsprop", "adagrad", "adamax", "radam")


@dataclass
class Data:
    """`data:` where the images come from. size, channels and num_classes are read off the data when it is there."""

    path: str | None = None  # folder, .zip, .tar, .npz or a shipped set (mnist5k, shapes); nothing trains without
    size: Side | None = None  # pixels per side; null: as found
    channels: Literal[1, 3] | None = None  # null: as found
    num_classes: Whole | None = None  # used only where there is no data to count (--plan)
    count: Count | None = None  # images in the set; used only where there is no data to count (--plan)
    crop: Literal["adm", "center", "random", "resize", "none"] = "adm"  # adm: the centre as ADM and DiT cut it
    hflip: bool = False  # random horizontal flips
    labels: bool | None = None  # null: use labels where the data has them
    split: str | None = None  # train | val | test where the set has them; shipped sets: test is every tenth image
    workers: Annotated[int, Ge(0), Le(1024)] = 0  # loader processes for sets that do not fit in memory
    cache_latents: Text | bool = "auto"  # latents of a frozen codec: auto (memory if small), a folder, or false


@dataclass
class Optimizer:
    """`optimizer:` the default of every optimizer; `optimizers: {NAME: {...}}` changes one of them."""

    name: str = "adamw"  # one of TORCH_OPTIMIZERS, or an optimizer component
    lr: NonNegative = 1e-4  # learning rate
    betas: tuple[Decay, Decay] = (0.9, 0.999)  # of Adam and its kin; SGD's momentum is the first
    eps: Positive = 1e-8  # added to Adam's denominator
    weight_decay: NonNegative = 0.0  # decoupled where the optimizer is AdamW
    decay: Literal["all", "matrices", "linear"] = "all"  # what weight_decay touches: see trainer.decay_groups
    warmup: Whole = 0  # steps of linear warm-up
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # decay after the warm-up
    final_lr: NonNegative = 0.0  # where the decay ends


@dataclass
class Train:
    """`train:` length, batch, precision, averaging, saving."""

    steps: Count = 10_000  # optimizer steps
    batch_size: Annotated[int, Ge(1), Le(10**6)] = 64  # images per optimizer step, over all processes and accumulation
    accumulate: Annotated[int, Ge(1), Le(10**6)] = 1  # micro-batches per step
    precision: Precision = "auto"  # auto: bf16 where the hardware has it
    compile: Literal["auto", "off", "on"] | bool = "auto"  # torch.compile; auto: on a GPU, for long runs
    checkpointing: bool = False  # recompute activations in backward
    channels_last: bool | None = None  # null: on where convolutions gain from it
    clip: Positive | None = None  # gradient-norm limit
    ema: list[Decay | dict[AverageKey, NonNegative]] = field(default_factory=lambda: [0.9999])  # several at once
    seed: Seed = 0  # of initial weights, data order and every draw
    log_every: Whole | None = 50  # steps between log lines; 0 or null: only at the end
    save_every: Whole | None = 1000  # steps between checkpoints; 0 or null: only at the end
    keep: Whole = 3  # checkpoints kept, the newest among them; the newest always is
    preview_every: Whole | None = 1000  # steps between previews; 0 or null: none
    preview_n: Annotated[int, Ge(0), Le(10_000)] = 64  # images of a preview; 0: none
    fsdp: bool = False  # shard weights and optimizer over GPUs (FSDP2)


@dataclass
class Pairs:
    """A role of kind `pairs`: noise and the teacher's images for it, made before training and kept for the next run."""

    count: Annotated[int, Ge(1), Le(10**8)] = 2000
    sampler: str = "heun"  # deterministic: an image is a function of its noise
    steps: Steps = 25
    batch_size: Count = 64
    seed: Seed = 0
    cache: str | None = None  # folder; null: $VGM_CACHE or ~/.cache/vgm, below it pairs/


# what a role is besides a component: PAIRS, made before training; a checkpoint, `{run: RUN|FILE}`
PAIRS = "pairs"
CHECKPOINT = ("run", "sha256", "view")  # keys of a role that is a checkpoint
STARTS = {"distill": "teacher", "finetune-rl": "reference"}  # verb -> the role that its trained network takes
SHORT = {**dict.fromkeys((*COMPONENT_NODES, "optimizer"), "name"), "data": "path"}  # KEY=WORD means KEY.FIRST=WORD
NODES: dict[str, type] = {"data": Data, "optimizer": Optimizer, "train": Train}
TOP = (
    "paper",
    "base",
    *COMPONENT_NODES,
    "roles",
    "optimizers",
    "guidance_scale",
    "expect",
    "evaluate",
    *NODES,
)


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
        return typed(Optimizer, {**(self.config.get("optimizer") or {}), **own}, f"optimizers.{name}")

    @property
    def paper(self) -> str:
        return str(self.config.get("paper", ""))

    def dump(self) -> str:
        return yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)


def typed(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """A dataclass from YAML values: unknown keys refused with the nearest names, values coerced by annotation."""
    if not isinstance(values, Mapping):
        raise not_a_mapping(where, values)
    known = keys_of(cls)
    for key in values:
        if key not in known:
            if hint := ELSEWHERE.get(key):
                raise VgmError(f"unknown key '{key}' in {where}", hint, USAGE)
            raise unknown("key", key, known, where)
    return cls(**{k: fit(v, known[k], f"{where}.{k}") for k, v in values.items()})


@cache
def keys_of(cls: type) -> dict[str, Any]:
    """{key: type with its range} of a node's dataclass."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def check_average(config: float | Mapping[str, float]) -> dict[str, float]:
    """One of `train.ema` as a mapping. VgmError: not exactly one of decay, half_life and sigma_rel, or out of range."""
    own = dict(config) if isinstance(config, Mapping) else {"decay": float(config)}
    wrong = set(own) - set(typing.get_args(AverageKey))
    if wrong or sum(k in own for k in ("decay", "half_life", "sigma_rel")) != 1:
        raise VgmError(
            f"train.ema: {shown(config)} is no average",
            "a decay, or a mapping with decay [, warmup, every], half_life [, ramp] or sigma_rel",
            USAGE,
        )
    for key, fits, wanted in (
        ("decay", 0 <= own.get("decay", 0) < 1, "in [0, 1)"),
        ("half_life", own.get("half_life", 1) > 0, "above 0"),
        ("sigma_rel", 0 < own.get("sigma_rel", 0.1) < 0.28, "in (0, 0.28)"),
        ("every", own.get("every", 1) >= 1, "at least 1"),
        ("ramp", own.get("ramp", 1) > 0, "above 0"),
    ):
        if not fits:
            raise VgmError(f"train.ema: {key}={own[key]:g} must be {wanted}", code=USAGE)
    return own


def not_a_mapping(where: str, value: Any) -> VgmError:
    return VgmError(f"{where}={shown(value)} is not a mapping of keys to values", f"example: {where}.KEY=VALUE", USAGE)


# words of other programs, and what is meant here
ELSEWHERE = {
    "device": "--device cuda:0 (cpu, mps); a GPU is used where there is one",
    "gpus": "--nproc N trains on N GPUs of this machine",
    "epochs": "train.steps counts: epochs × images / train.batch_size",
    "max_steps": "did you mean train.steps?",
    "learning_rate": "did you mean optimizer.lr?",
    "grad_clip": "did you mean train.clip?",
    "gradient_accumulation_steps": "did you mean train.accumulate?",
    "mixed_precision": "did you mean train.precision?",
    "num_workers": "did you mean data.workers?",
    "root": "did you mean data.path?",
    "resolution": "did you mean data.size?",
    "image_size": "did you mean data.size?",
}


# -- finding ---------------------------------------------------------------------------------------------------------


def shipped() -> dict[str, Path]:
    """{"paper/name": file} of the built-in recipes and those in the `recipes` folder of each plugin's package."""
    root = Path(str(resources.files("vgm_recipes")))
    found = {f"{p.parent.name}/{p.stem}": p for p in sorted(root.glob("*/*.yaml"))}
    for plugin in registry().plugins.values():
        if plugin.builtin or plugin.error or not plugin.papers:
            continue
        spec = __import__("sys").modules.get(plugin.module.split(":")[0])
        file = getattr(spec, "__file__", None)
        if file:
            for p in sorted((Path(file).parent / "recipes").glob("*.yaml")):
                for paper in plugin.papers:
                    found.setdefault(f"{paper.name}/{p.stem}", p)
    return found


def locate(target: str, recipe: str | None = None) -> tuple[str, Path]:
    """(name, file) of `vgm train TARGET --recipe RECIPE`: a paper, PAPER/NAME, or a YAML file."""
    for given in (recipe, target):
        if given and given.endswith((".yaml", ".yml")):
            path = Path(given)
            if not path.is_file():
                raise VgmError(f"no such recipe file: {given}", "`vgm ls recipes` shows the shipped ones", USAGE)
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
            if len(own) == 1:
                name = own[0]
            elif own:
                raise VgmError(
                    f"{target} has several recipes: {', '.join(f.partition('/')[2] for f in own)}",
                    next_command(target, paper_verb(target)),
                    USAGE,
                )
    if name not in files:
        paper, _, short = name.partition("/")
        own = [f.partition("/")[2] for f in files if f.startswith(paper + "/")]
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


def verbs_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The verbs that offer a recipe's objective."""
    node = config.get("objective")
    name = node.get("name", "") if isinstance(node, dict) else ""
    component = registry().components.get(("objective", name)) if isinstance(name, str) else None
    return component.verbs if component is not None else ()


def has_teacher(config: Mapping[str, Any]) -> bool:
    """Does the recipe name a teacher, were it only a stand-in?"""
    return (config.get("roles") or {}).get(STARTS["distill"]) is not None


def start_role(config: Mapping[str, Any]) -> str:
    """The role that a trained network takes in this recipe: teacher, or reference where a reward is learned from."""
    return STARTS["finetune-rl" if "finetune-rl" in verbs_of(config) else "distill"]


def starter(name: str) -> bool:
    """Is PAPER/NAME one of the recipes that run in minutes?"""
    return name.partition("/")[2].startswith("mnist")


def next_command(paper: str, verb: str | None = None) -> str:
    """A command that works with what a paper brings, its small recipe first; "" for a paper without recipes."""
    verb = verb or paper_verb(paper)
    own = [n for n, f in shipped().items() if n.startswith(f"{paper}/") and verb_of(load_file(f, n)[0]) == verb]
    own.sort(key=lambda n: (n != f"{paper}/mnist", not starter(n), n))
    if not own:
        return ""
    short = own[0].partition("/")[2]
    implied = short == "mnist" or len(own) == 1 or (verb == "distill" and starter(own[0]))
    needs = {"distill": " --teacher RUN", "finetune-rl": " --model RUN"}.get(verb, "")
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


NO_DATA_HINT = "data.path=FOLDER, or data.path=mnist5k for the digits that come with this package"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as a string; this reads it as the number everybody means."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


YAML_SIZE = 100_000  # characters of one text; a recipe has two thousand, and the parser reads 50,000 in a second
YAML_DEPTH = 50
DEEP = re.compile(r"(?:[\[{]\s*){50}")
YAML_MORE = 10_000  # nodes that anchors may repeat; a node is a value, a list or a mapping


def parse_yaml(text: str, where: str) -> Any:
    """VgmError: not YAML, too long, too deep, or unfolding without end through its anchors."""
    where = short(where)
    if len(text) > YAML_SIZE:
        raise VgmError(f"{where} has {len(text):,} characters, more than {YAML_SIZE:,}", code=USAGE)
    if DEEP.search(text):
        raise VgmError(f"{where} is nested too deeply", code=USAGE)  # before the parser looks ahead for every bracket
    try:
        loader = _Loader(text)  # refuses characters that YAML has not
        node = loader.get_single_node()
        if node is None:
            return None
        _unfolded(node, {}, (), where)
        return loader.construct_document(node)
    except RecursionError as e:
        raise VgmError(f"{where} is nested too deeply", code=USAGE) from e
    except (ValueError, OverflowError) as e:  # a date or a number that is none
        raise VgmError(f"{where} is not valid YAML", short(str(e)), USAGE) from e
    except yaml.YAMLError as e:
        line = f" line {e.problem_mark.line + 1}" if isinstance(e, yaml.MarkedYAMLError) and e.problem_mark else ""
        raise VgmError(f"{where}:{line} is not valid YAML", str(getattr(e, "problem", "") or ""), USAGE) from e


def _unfolded(node: yaml.Node, known: dict[int, int], above: tuple[int, ...], where: str) -> int:
    """Nodes below `node`, those of an anchor counted wherever it is named."""
    if id(node) in above:
        raise VgmError(f"{where}: an anchor holds itself", code=USAGE)
    if len(above) > YAML_DEPTH:
        raise VgmError(f"{where} is nested too deeply", code=USAGE)
    if id(node) not in known:
        inside = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [p for pair in inside for p in pair] if isinstance(node, yaml.MappingNode) else inside
        known[id(node)] = 1 + sum(_unfolded(p, known, (*above, id(node)), where) for p in parts)
        if known[id(node)] > YAML_MORE + len(known):
            raise VgmError(f"{where}: its anchors repeat too much", code=USAGE)
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":int") and len(node.value) > 100:
            raise VgmError(f"{where}: a number of {len(node.value)} digits", code=USAGE)
    return known[id(node)]


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


def rename(config: dict[str, Any], origins: dict[str, str]) -> None:
    """Move what stands under a top key of an older version to where it stands now (see renamed.RECIPE)."""
    start = start_role(config)
    for old in [k for k in renamed.RECIPE if k in config]:
        moved = {renamed.key(k, start): origins.pop(k) for k in list(origins) if k.split(".")[0] == old}
        role = renamed.key(old, start).partition(".")[2]
        merge(config, {"roles": {role: renamed.node(old, config.pop(old))}}, origins, "recipe")
        origins.update({k: v for k, v in moved.items() if k in origins})
    roles = config.get("roles")
    nodes = [config.get("model"), *(roles.values() if isinstance(roles, dict) else [])]
    for node in nodes:  # `name: teacher`, as a copy of the trained network was called whatever it was for
        if isinstance(node, dict) and node.get("name") == STARTS["distill"] and STARTS["distill"] not in (roles or {}):
            node["name"] = start


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


def merge(into: dict[str, Any], new: Mapping[str, Any], origins: dict[str, str], origin: str, prefix: str = "") -> None:
    """Deep merge; a component node whose `name` changes, or which becomes a checkpoint (`run`), is replaced whole:
    its keywords belong to the name.

    A word for a node (`sampler: ddim`, `data: FOLDER`) stands for the node's first key: see SHORT.
    """
    for key, value in new.items():
        dotted = f"{prefix}{key}"
        old = into.get(key)
        if isinstance(value, str) and (first := SHORT.get(dotted)):
            value = {first: value}
        another = (
            isinstance(value, dict)
            and isinstance(old, dict)
            and dotted not in NODES
            and (value.get("name", old.get("name")) != old.get("name") or ("run" in value and "run" not in old))
        )
        if isinstance(value, dict) and isinstance(old, dict) and not another:
            merge(old, value, origins, origin, dotted + ".")
            continue
        for k in [k for k in origins if k == dotted or k.startswith(dotted + ".")]:
            del origins[k]
        into[key] = value
        for leaf in leaves(value, dotted):
            origins[leaf] = origin


def leaves(value: Any, dotted: str) -> Iterable[str]:
    """Dotted keys of everything in a value that is no mapping, or an empty one."""
    if isinstance(value, dict) and value:
        for k, v in value.items():
            yield from leaves(v, f"{dotted}.{k}")
    else:
        yield dotted


def override(config: dict[str, Any], origins: dict[str, str], assignments: Iterable[str], origin: str) -> None:
    """Apply KEY=VALUE (dotted key, YAML value, split at the first '=') and ~KEY (delete)."""
    start = start_role(config)
    for text in assignments:
        if text.startswith("~"):
            key = renamed.key(text[1:], start)
            parent, last = _descend(config, key, text, create=False)
            parent.pop(last, None)
            for k in [k for k in origins if k == key or k.startswith(key + ".")]:
                del origins[k]
            continue
        key, eq, value = text.partition("=")
        if isinstance(config.get("roles"), dict | None):
            key = renamed.key(key, start)
        if not eq or not all(key.split(".")):
            raise VgmError(f"{shown(text)} is not KEY=VALUE", "example: train.steps=100", USAGE)
        if key in ("data", "data.path") and not value.strip():
            raise VgmError(f"{key}= is empty", NO_DATA_HINT, USAGE)
        head = key.split(".")[0]
        if head not in TOP:
            inside = [f"{n}.{f.name}" for n, cls in NODES.items() for f in dataclasses.fields(cls)]
            hits = [i for i in inside if i.endswith("." + key)]
            if head in ELSEWHERE:
                raise VgmError(f"unknown key '{key}'", ELSEWHERE[head], USAGE)
            raise (
                VgmError(f"unknown key '{key}'", f"did you mean {hits[0]}?", USAGE)
                if hits
                else unknown("key", head, TOP)
            )
        node: Any = parse_yaml(value, text)
        if key == "codec" and isinstance(node, str) and ":" not in node and node not in registry().names("codec"):
            node = {"weights": node, "fallback": None}  # a trained one, as for --codec
        for part in reversed(key.split(".")):
            node = {part: node}
        merge(config, node, origins, origin)


def _descend(config: dict[str, Any], key: str, text: str, create: bool) -> tuple[dict[str, Any], str]:
    *parents, last = key.split(".")
    for p in parents:
        config = config.get(p)  # type: ignore[assignment]
        if not isinstance(config, dict):
            raise VgmError(f"'{text}': there is no '{key}' to delete", code=USAGE)
    if last not in config:
        raise VgmError(f"'{text}': there is no '{key}' to delete", code=USAGE)
    return config, last


def env_assignments() -> list[str]:
    """VGM_TRAIN__STEPS=10 -> train.steps=10 (double underscore between levels)."""
    out = []
    for name, value in sorted(os.environ.items()):
        if name.startswith("VGM_") and "__" in name:
            out.append(f"{name[4:].lower().replace('__', '.')}={value}")
    return out


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
    if "guidance_scale" in config:
        config["guidance_scale"] = fit(config["guidance_scale"], NonNegative | None, "guidance_scale")
    for role, own in r.roles().items():
        if role == PAIRS and "name" not in own:
            own.setdefault("kind", PAIRS)
        if own.get("kind") == PAIRS:
            config["roles"][role] = {"kind": PAIRS, **dataclasses.asdict(pairs_of(own, f"roles.{role}"))}
    for opt in ("", *(config.get("optimizers") or {})):
        chosen = r.optimizer(opt).name
        if chosen not in TORCH_OPTIMIZERS and ":" not in chosen and chosen not in registry().names("optimizer"):
            raise unknown("optimizer", chosen, [*TORCH_OPTIMIZERS, *registry().names("optimizer")])
    if "weights" in (config.get("codec") or {}) and "name" not in config["codec"]:
        raise VgmError(f"{name} trains on pixels, it takes no codec", "leave the codec out", USAGE)
    for required in ("model", "objective"):
        if not config.get(required):
            raise VgmError(f"recipe {name} has no `{required}:` node", "see `vgm cat dit/mnist`", USAGE)
    return r


def check_shape(config: Mapping[str, Any], name: str) -> None:
    """Known keys, and mappings where the rest of the program expects mappings with words for keys."""
    for key, value in config.items():
        if key not in TOP:
            raise unknown("key", key, TOP, where=f"recipe {name}")
        if key in ("paper", "guidance_scale") or value is None:
            continue
        nodes = {key: value}
        if key in ("roles", "optimizers") and isinstance(value, dict):
            nodes |= {f"{key}.{k}": v for k, v in value.items() if v is not None}
        for where, node in nodes.items():
            if not isinstance(node, dict):
                raise not_a_mapping(where, node)
            if odd := [k for k in node if not isinstance(k, str) or not k]:
                raise VgmError(f"{where}: the key {shown(odd[0])} is not a word", code=USAGE)
            component = where in COMPONENT_NODES or where.startswith("roles.")
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
    from vgm_cli.registry import bind, load_target, signature

    roles = recipe.roles()
    injected = {"model": None, "codec": None, **dict.fromkeys(recipe.config.get("roles") or {})}
    nodes = [(n, n, recipe.config.get(n)) for n in COMPONENT_NODES]
    nodes += [(n.get("kind", "model"), f"roles.{r}", n) for r, n in roles.items()]
    for kind, where, node in nodes:
        if not node or kind == PAIRS or node.get("run") is not None:
            continue
        node = {k: v for k, v in node.items() if k not in HOST_KEYS.get(where.split(".")[0], ())}
        component, kwargs = registry().config(kind, node)
        target = load_target(component.target, component.name)
        params = signature(target).parameters
        facts = {k: 1 for k in component.from_data if k in params and k not in kwargs}
        bind(target, kwargs, {**injected, **facts}, where=f"{where} '{component.name}'")


# keys of component nodes that the host consumes itself
ROLE_KEYS = ("kind", "weights", *CHECKPOINT)
HOST_KEYS: dict[str, tuple[str, ...]] = {
    "codec": ("weights", "fallback", "output"),
    "roles": ROLE_KEYS,
    "model": ("weights",),
}
