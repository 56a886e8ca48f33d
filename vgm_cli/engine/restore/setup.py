"""What a restoration is asked for: the degradation, the method and the noise, from the words of the command line."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vgm_cli import foreign
from vgm_cli.api import FollowsPictures, RestorationMethod
from vgm_cli.engine.checkpoint import Loaded
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.operators.noise import Noise, noise_class
from vgm_cli.registry import bind, load_target, registry, signature
from vgm_cli.yaml_text import parse_yaml


@dataclass
class Settings:
    """Component nodes of the degradation and of the restoration method, the measurement noise, and the guidance scale
    (None: the method's own)."""

    task: dict[str, Any]
    method: dict[str, Any]
    noise: Noise
    noise_node: dict[str, Any]
    guidance_scale: float | None = None


def methods() -> list[str]:
    """Names of the samplers that restore."""
    return sorted(c.name for c in registry().components.values() if c.kind == "sampler" and "restore" in c.verbs)


def settings_for(task: str, method: str, noise: str, overrides: Sequence[str]) -> Settings:
    """KEY=VALUE words go to whichever of task, noise, method has the keyword; task.KEY, noise.KEY, method.KEY choose.

    VgmError: unknown names or keywords, a keyword that two of them have.
    """
    r = registry()
    if ":" not in method and method not in methods():
        if method in r.names("sampler"):
            known = ", ".join(methods())
            raise VgmError(f"'{method}' samples, it does not restore", f"methods that restore: {known}", USAGE)
        raise unknown("restoration method", method, methods())
    operator, sampler, added = r.find("operator", task), r.find("sampler", method), noise_class(noise)
    targets = {
        "task": load_target(operator.target, task),
        "noise": added,
        "method": load_target(sampler.target, method),
    }
    keys = {where: keywords(target) for where, target in targets.items()}
    keys["method"].append("preset")
    nodes: dict[str, dict[str, Any]] = {"task": {"name": task}, "noise": {}, "method": {"name": method}}
    for text in overrides:
        key, eq, value = text.partition("=")
        if not eq:
            raise VgmError(f"'{text}' is not KEY=VALUE", "example: scale=4", USAGE)
        where, dot, rest = key.partition(".")
        if dot and where in keys:
            owners, key = [where], rest
        else:
            owners = [w for w, known in keys.items() if key in known]
        if len(owners) > 1:
            hint = f"say which: {' or '.join(f'{w}.{key}' for w in owners)}"
            raise VgmError(f"both {' and '.join(owners)} have a '{key}'", hint, USAGE)
        if not owners or key not in keys[owners[0]]:
            raise unknown(
                "key", key, [k for w in (owners or keys) for k in keys[w]], f"{task}, {noise} noise or {method}"
            )
        nodes[owners[0]][key] = parse_yaml(value, text)
    built = added(**bind(added, nodes["noise"], {}, f"{noise} noise"))
    return Settings(nodes["task"], nodes["method"], built, {"name": noise, **nodes["noise"]})


def is_blind(method: str) -> bool:
    """Whether a method follows degraded pictures without asking how they came about (`offers.FollowsPictures`)."""
    try:
        return isinstance(registry().build("sampler", {"name": method}), FollowsPictures)
    except VgmError:  # it needs settings, or there is none of this name
        return False


def keywords(target: Any) -> list[str]:
    if target.__init__ is object.__init__:
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [n for n, p in signature(target).parameters.items() if p.kind in named]


def build_method(loaded: Loaded, node: dict[str, Any], target: str) -> RestorationMethod:
    """The restoration method of a node. VgmError: it does not accept this model, for the reason that it says."""
    method = registry().build("sampler", node, **loaded.roles)
    if not isinstance(method, RestorationMethod):
        raise VgmError(f"{node['name']} does not say which models it accepts", "its class needs `accepts`", USAGE)
    if (reason := method.accepts(loaded.view, loaded.codec)) is not None:
        found = " or ".join(f"--method {name}" for name in accepting(loaded))
        hint = found or "a model trained by dit, sit, adm-unet, … can be a prior; `vgm train dps` makes a small one"
        raise VgmError(f"{node['name']} does not take {target}: {reason}", hint, USAGE)
    return method


def accepting(loaded: Loaded) -> list[str]:
    """The methods that take this model, with the settings they have by themselves."""
    found = []
    for name in methods():
        try:
            method = registry().build("sampler", {"name": name}, **loaded.roles)
        except VgmError:  # it needs settings
            continue
        if isinstance(method, RestorationMethod) and method.accepts(loaded.view, loaded.codec) is None:
            found.append(name)
    return found


def adopt_own_settings(loaded: Loaded, settings: Settings) -> None:
    """Where the method is the sampler of the model's own recipe: what the recipe says of it, and its guidance scale,
    but for what the user said."""
    recipe, node = loaded.header.recipe, settings.method
    own = recipe.get("sampler") or {}
    if "preset" in node or own.get("name") != node["name"]:
        return
    told = {k: v for k, v in own.items() if k not in node}
    foreign.tell_files(told, loaded.path)
    if "guidance_scale" not in node:
        settings.guidance_scale = recipe.get("guidance_scale")
    settings.method = {**told, **node}


def assumed(settings: Settings, degrade: bool) -> str:
    """The noise that is meant where --noise is left out."""
    said = f"{settings.noise_node['name']} noise, sigma={settings.noise.sigma:g}"
    if degrade:
        return f"added to the degraded images: {said} (--noise none, sigma=…)"
    return "the input is taken to be free of noise (--noise gaussian sigma=… says otherwise)"
