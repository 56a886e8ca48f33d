"""Discovery, index and construction of components. Torch-free until something is built.

Built-in papers are found by listing the `vgm_plugins` package and pass through the very same hook as third
parties, whose packages are found through the entry-point group `vgm`. A broken plugin is reported, never a crash.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
import time
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from types import ModuleType
from typing import Any

import pluggy

from vgm_cli import hookspecs, left_out, limits, renamed
from vgm_cli.errors import MISSING_ASSET, USAGE, VgmError, unknown
from vgm_cli.hookspecs import KINDS, Component, Paper
from vgm_cli.ranges import fit, shown

BUILTIN = "vgm_plugins"
IN_CHECKPOINTS = ("model", "codec", "view", "condition")  # kinds that are built again from a file's header
CODE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")  # "module:attr"
REGISTER = "a plugin registers components: --plugin FILE.py, or `vgm plugin new NAME`"


@dataclass
class PluginInfo:
    """One discovered plugin as `vgm plugins` shows it. error: one line, empty when it works."""

    name: str
    distribution: str
    version: str = ""
    builtin: bool = False
    module: str = ""
    components: list[Component] = field(default_factory=list)
    papers: list[Paper] = field(default_factory=list)
    error: str = ""
    trace: str = ""
    seconds: float = 0.0


class Registry:
    """The index of everything that plugins brought, and what else the user allowed to run.

    Files name registered components. "module:attr" is imported only if it is in `trusted`, where the command line puts
    what was typed on it, and with --trust what a recipe file names. Checkpoints, pictures and archives add nothing.
    """

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager(hookspecs.PROJECT)
        self.manager.add_hookspecs(hookspecs.Hooks)
        self.plugins: dict[str, PluginInfo] = {}
        self.components: dict[tuple[str, str], Component] = {}
        self.owners: dict[tuple[str, str], str] = {}
        self.papers: dict[str, Paper] = {}
        self.trusted: set[str] = set()
        self.trusts_recipes = False
        self.sources: dict[str, tuple[str, str]] = {}  # "module:attr" -> (the file that names it, what helps)
        self.left_out: set[str] = set()  # plugins that are installed and were not wanted

    def add(self, info: PluginInfo, load: Callable[[], ModuleType | object]) -> PluginInfo:
        """Load one plugin, validate it, index what it brings; whatever goes wrong is kept in info.error."""
        start = time.perf_counter()
        if info.name in self.plugins:
            info.error = f"the name '{info.name}' is taken by {self.plugins[info.name].distribution}"
            self.plugins[f"{info.distribution}:{info.name}"] = info
            return info
        self.plugins[info.name] = info
        try:
            module = load()
            required = getattr(module, "requires_api", hookspecs.API_VERSION)
            if required != hookspecs.API_VERSION:
                raise VgmError(f"needs plugin API {required}, this is {hookspecs.API_VERSION}")
            for attr in dir(module):
                if attr.startswith("vgm_") and callable(getattr(module, attr)) and not hasattr(hookspecs.Hooks, attr):
                    hooks = [h for h in dir(hookspecs.Hooks) if h.startswith("vgm_")]
                    raise unknown("hook", attr, hooks)
            self.manager.register(module, name=info.name)
            self.manager.check_pending()
            impl = getattr(module, "vgm_components", None)
            items = list(impl()) if impl is not None else []
            self._index(info, items)
        except Exception as e:
            if self.manager.has_plugin(info.name):
                self.manager.unregister(name=info.name)
            info.error = e.message if isinstance(e, VgmError) else f"{type(e).__name__}: {e}"
            info.trace = traceback.format_exc()
        info.seconds = time.perf_counter() - start
        return info

    def _index(self, info: PluginInfo, items: list[Any]) -> None:
        components: list[Component] = []
        papers: list[Paper] = []
        for item in items:
            if isinstance(item, Paper):
                if item.name in self.papers:
                    raise VgmError(f"duplicate paper '{item.name}'")
                papers.append(item)
                continue
            if not isinstance(item, Component):
                raise VgmError(f"vgm_components returned a {type(item).__name__}, expected Component or Paper")
            if item.kind not in KINDS:
                raise unknown("component kind", item.kind, KINDS)
            key = (item.kind, item.name)
            if key in self.components or any(key == (c.kind, c.name) for c in components):
                who = f"both {self.owners[key]} and {info.name}" if key in self.components else f"{info.name} twice"
                raise VgmError(f"duplicate {item.kind} '{item.name}': brought by {who}")
            components.append(item)
        for c in components:
            self.components[c.kind, c.name] = c
            self.owners[c.kind, c.name] = info.name
        for p in papers:
            self.papers[p.name] = p
        info.components, info.papers = components, papers

    def discover(self, plugins: str | None = None, blocked: tuple[str, ...] = (), files: tuple[str, ...] = ()) -> None:
        """Built-ins first, then the entry-point group, then single files.

        plugins: comma list of third-party plugins to load, "" for none, None for all. blocked: names to leave out.
        """
        from vgm_cli import components as host

        self.add(PluginInfo("vgm", "vgm", builtin=True, module="vgm_cli.components"), lambda: host)
        package = importlib.import_module(BUILTIN)
        for mod in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
            if mod.name in blocked or mod.name.replace("_", "-") in blocked or not mod.ispkg:
                self.left_out.add(mod.name.replace("_", "-"))
                continue
            path = f"{BUILTIN}.{mod.name}"
            self.add(
                PluginInfo(mod.name.replace("_", "-"), "vgm", builtin=True, module=path),
                partial(importlib.import_module, path),
            )
        chosen = None if plugins is None else {p.strip() for p in plugins.split(",") if p.strip()}
        for ep in sorted(importlib.metadata.entry_points(group=hookspecs.PROJECT), key=lambda e: e.name):
            if ep.name in blocked or (chosen is not None and ep.name not in chosen):
                self.left_out.add(ep.name)
                continue
            dist = ep.dist
            self.add(
                PluginInfo(ep.name, dist.name if dist else "?", dist.version if dist else "", module=ep.value), ep.load
            )
        for name in blocked:
            if name.replace("_", "-") not in self.left_out and name not in self.left_out:
                known = [p.name for p in self.plugins.values() if p.name != "vgm"]
                raise unknown("plugin", name, known, where="-p no:NAME")
        for file in files:
            name = os.path.splitext(os.path.basename(file))[0]
            self.add(PluginInfo(name, file, module=file), partial(_load_file, file, name))

    # -- look-up ------------------------------------------------------------------------------------------------

    def names(self, kind: str) -> list[str]:
        return sorted(n for k, n in self.components if k == kind)

    def find(self, kind: str, name: str) -> Component:
        """The component, or an error naming the nearest ones. "module:attr" is the registered component that lies
        there, else what the user allowed to run by that name."""
        if not isinstance(name, str):
            raise VgmError(f"the name of a {kind} is text, not {name!r}", f"`vgm ls {kind}s` shows them", USAGE)
        name = renamed.COMPONENTS.get((kind, name), {}).get("name", name)
        if (kind, name) in self.components:
            return self.components[kind, name]
        if ":" in name:
            here = next((c for (k, _), c in self.components.items() if k == kind and c.target == name), None)
            if here is None and kind in IN_CHECKPOINTS and name in self.trusted:
                raise VgmError(f"a checkpoint names registered {kind}s only, and '{name}' is none", REGISTER, USAGE)
            return here or Component(kind=kind, name=name, target=self.allowed(name))
        broken = [p for p in self.plugins.values() if p.error and name in (p.name, p.module)]
        if broken:
            raise VgmError(f"plugin '{name}' could not be loaded: {broken[0].error}", "see `vgm plugins`", USAGE)
        raise left_out.error(kind, name, self.left_out, BUILTIN) or unknown(kind, name, self.names(kind))

    # -- code that is not registered ------------------------------------------------------------------------------

    def begin(self) -> None:
        """A new command: nothing is trusted yet."""
        self.trusted.clear()
        self.sources.clear()
        self.trusts_recipes = False

    def trust(self, typed: Any) -> list[str]:
        """Allow every "module:attr" in a value to be imported, and tell which there are."""
        found = sorted({s for s in strings(typed) if CODE.fullmatch(s)})
        self.trusted.update(found)
        return found

    def note(self, value: Any, source: str, hint: str = REGISTER) -> None:
        """Remember which file names what code, so that a refusal can say it."""
        for s in strings(value):
            if ":" in s:
                self.sources.setdefault(s, (source, hint))

    def allowed(self, name: str) -> str:
        """The name itself. VgmError: it is code that nobody who sits here asked for."""
        if name in self.trusted:
            return name
        source, hint = self.sources.get(name, ("a file", REGISTER))
        raise VgmError(f"{source} wants to run '{name}'; files name registered components only", hint, USAGE)

    def presets(self, component: Component) -> Mapping[str, Mapping[str, Any]]:
        """{preset: constructor keywords}; a "module:attr" string is imported (torch-free by contract)."""
        return load_target(component.presets) if isinstance(component.presets, str) else component.presets

    def config(self, kind: str, node: Mapping[str, Any]) -> tuple[Component, dict[str, Any]]:
        """A recipe node -> (component, constructor keywords): preset expanded, own keys on top."""
        if not isinstance(node, Mapping):
            raise VgmError(f"the {kind} node is {node!r}, not a mapping with a name", f"{kind}.name=…", USAGE)
        node = dict(node)
        name = node.pop("name", None)
        if name is None:
            raise VgmError(f"the {kind} node has no name", f"known: {', '.join(self.names(kind))}", USAGE)
        if not isinstance(name, str):
            raise VgmError(f"{kind} {shown(name)} is no name", f"known: {', '.join(self.names(kind))}", USAGE)
        component = self.find(kind, name)
        node |= {k: v for k, v in renamed.COMPONENTS.get((kind, name), {}).items() if k != "name"}
        preset = node.pop("preset", None)
        kwargs: dict[str, Any] = {}
        if preset is not None:
            presets = self.presets(component)
            preset = str(preset) if isinstance(preset, int) else preset  # preset: 64
            if not isinstance(preset, str) or preset not in presets:
                raise unknown(f"{kind} preset", shown(preset).strip("'"), presets, where=name)
            kwargs.update(presets[preset])
        kwargs.update(node)
        return component, kwargs

    def build(self, kind: str, node: Mapping[str, Any] | str, **roles: Any) -> Any:
        """Construct a component from its recipe node.

        roles are injected by parameter name where the constructor asks for them and are ignored otherwise;
        values are coerced by annotation; unknown keys are refused with the nearest names (exit code 2). A bare
        objective, sampler or metric gets the contract's defaults here, once: nobody asks it later what it has.
        """
        component, kwargs = self.config(kind, {"name": node} if isinstance(node, str) else node)
        limits.check_numbers(kwargs, f"{kind} '{component.name}'")
        target = load_target(component.target, component.name)
        where = f"{kind} '{component.name}'"
        bound = bind(target, kwargs, roles, where=where)
        try:
            return completed(kind, target(**bound))
        except (ArithmeticError, AssertionError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as e:
            if isinstance(e, RuntimeError) and type(e) is not RuntimeError:  # out of GPU memory, not implemented
                raise
            said = str(e).splitlines()[0] if str(e) else type(e).__name__
            given = ", ".join(f"{k}={shown(v)}" for k, v in kwargs.items())
            raise VgmError(f"{where} cannot be built: {said}", f"it was given {given or 'nothing'}", USAGE) from e


def completed(kind: str, made: Any) -> Any:
    """An objective, a sampler or a metric with the contract's defaults for what its author left out; others as they
    are."""
    if kind not in ("objective", "sampler", "metric"):
        return made
    from vgm_cli import api, offers

    bases = {"objective": api.ObjectiveBase, "sampler": api.SamplerBase, "metric": offers.MetricBase}
    return api.complete(made, bases[kind])


def strings(value: Any) -> Iterator[str]:
    """Every text within a value of mappings and lists, keys included; what is shared or circular is visited once."""
    stack, seen = [value], set()
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            stack += [*item, *item.values()] if isinstance(item, Mapping) else item


def load_target(target: str, name: str = "") -> Any:
    """Import what a registered component declares, or else code that the user allowed."""
    r = registry()
    owner = next((r.owners[key] for key, c in r.components.items() if target in (c.target, c.presets)), None)
    if owner is None:
        return load_code(target, name)
    plugin = r.plugins[owner]
    return import_target(target, name, beside=plugin.module.endswith(".py"))


def load_code(target: str, name: str = "") -> Any:
    """Import "module:attr" that a keyword names. VgmError: the user neither typed it nor trusts the recipe."""
    if not CODE.fullmatch(target):
        raise VgmError(f"'{target}' names no {name or 'code'}", "module:attr", USAGE)
    return import_target(registry().allowed(target), name, beside=True)


def import_target(target: str, name: str = "", beside: bool = False) -> Any:
    """Import "module:attr". beside: modules of the working folder are found too, after all others, so that none of them
    stands in for another. A missing third-party module becomes a one-line error with exit code 4."""
    module, _, attr = target.partition(":")
    top = module.partition(".")[0]
    try:
        missing = beside and top not in sys.modules and importlib.util.find_spec(top) is None
        if missing and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # an installed command does not look here by itself
        obj: Any = importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name and e.name.split(".")[0] in (module.split(".")[0], "vgm_cli"):
            raise VgmError(f"cannot import '{target}': {e}", "check the module path", USAGE) from e
        raise VgmError(
            f"'{name or target}' needs the package '{e.name}', which is not installed",
            f"{sys.executable} -m pip install {e.name}",
            MISSING_ASSET,
        ) from e
    for part in attr.split("."):
        try:
            obj = getattr(obj, part)
        except AttributeError as e:
            raise VgmError(f"module '{module}' has no '{attr}'", "check the component's target", USAGE) from e
    return obj


def signature(target: Any) -> inspect.Signature:
    """The constructor's signature with annotations evaluated, without self. A dataclass may inherit fields whose
    annotations only the module of the base class understands."""
    try:
        return inspect.signature(target, eval_str=True)
    except (NameError, TypeError):
        found = inspect.signature(target)
    if not dataclasses.is_dataclass(target):
        return found
    hints = typing.get_type_hints(target, include_extras=True)
    return found.replace(
        parameters=[p.replace(annotation=hints.get(n, p.annotation)) for n, p in found.parameters.items()]
    )


def bind(target: Any, kwargs: Mapping[str, Any], roles: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Match YAML keywords and injected roles to a signature, coerced by annotation."""
    params = signature(target).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in params.values())
    named = {n: p for n, p in params.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    bound: dict[str, Any] = {}
    for key, value in kwargs.items():
        if key not in named and not takes_any:
            raise unknown("key", key, [n for n in named if n not in roles], where)
        bound[key] = coerce(value, named[key], where) if key in named else value
    for role, value in roles.items():
        if role in named and role not in bound:
            bound[role] = value
    missing = [n for n, p in named.items() if p.default is p.empty and n not in bound]
    if missing:
        raise VgmError(f"{where} needs {', '.join(missing)}", f"set it in the recipe or with {missing[0]}=…", USAGE)
    return bound


def coerce(value: Any, param: inspect.Parameter, where: str) -> Any:
    """Coerce a YAML value by annotation ('1e-4' -> float, [1, 2] -> tuple); see ranges.fit."""
    if param.annotation is param.empty or isinstance(param.annotation, str):
        return value
    return fit(value, param.annotation, f"{where}: {param.name}")


def _load_file(file: str, name: str) -> ModuleType:
    if not os.path.isfile(file):
        raise VgmError(f"no such plugin file: {file}", code=USAGE)
    spec = importlib.util.spec_from_file_location(f"vgm_local_{name}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_blocked: tuple[str, ...] = ()
_files: tuple[str, ...] = ()


def configure(blocked: tuple[str, ...] = (), files: tuple[str, ...] = ()) -> None:
    """Set by the CLI's `-p no:NAME` and `--plugin FILE` before anything is looked up."""
    global _blocked, _files
    _blocked, _files = blocked, files
    registry.cache_clear()


@cache
def registry() -> Registry:
    """The process-wide registry, discovered on first use. VGM_PLUGINS=a,b limits third parties ("" = none)."""
    r = Registry()
    r.discover(os.environ.get("VGM_PLUGINS"), _blocked, _files)
    return r
