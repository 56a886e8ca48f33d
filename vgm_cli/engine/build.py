"""From a recipe to live objects: data facts, codec, networks by role, objective. Shared by train, plan and validate."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vgm_cli.api import Phase
from vgm_cli.conditioning import Conditions
from vgm_cli.data import open_dataset
from vgm_cli.data.latents import Latents
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.budget import building
from vgm_cli.engine.conditions import beside, conditions_for
from vgm_cli.engine.facts import Facts, declared_facts, facts_for
from vgm_cli.engine.initial import initialise
from vgm_cli.engine.parts import freeze, leave_out
from vgm_cli.engine.tokens import as_output
from vgm_cli.errors import MISSING_ASSET, USAGE, VgmError
from vgm_cli.nn.meta import on_meta
from vgm_cli.ranges import shown
from vgm_cli.recipe import CHECKPOINT, HOST_KEYS, PAIRS, Recipe, copy_role, load
from vgm_cli.registry import load_target, registry, signature
from vgm_cli.ui import ui


def component_node(kind: str, node: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    """A recipe node -> {"kind", "name", "kwargs"} with preset expanded and open keywords filled from the data."""
    settings = {k: v for k, v in node.items() if k not in HOST_KEYS.get(kind, ()) and k != "kind"}
    component, kwargs = registry().config(kind, settings)
    params = signature(load_target(component.target, component.name)).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in params.values())
    for keyword, fact in component.from_data.items():
        if kwargs.get(keyword) is None and (keyword in params or takes_any) and "." not in fact:
            kwargs[keyword] = getattr(facts, fact)
    return {"kind": kind, "name": component.name, "kwargs": kwargs}


def build_component(kind: str, node: Mapping[str, Any], facts: Facts, **roles: Any) -> tuple[Any, dict[str, Any]]:
    described = component_node(kind, node, facts)
    with building(f"{kind} '{described['name']}'"):
        return registry().build(kind, {"name": described["name"], **described["kwargs"]}, **roles), described


def facts_behind(facts: Facts, codec: Any, dataset: Any = None) -> Facts:
    """Facts of the data behind a codec; a set of latents knows the size of its images, or its codec does."""
    if isinstance(dataset, Latents):
        channels, size, _ = dataset.image_shape_for(codec)
        known = {k: getattr(facts, k) for k in ("num_classes", "class_names", "columns", "words")}
        facts = Facts.of_pixels(size, channels, **known)
    return facts.after(codec)


# -- codec -----------------------------------------------------------------------------------------------------------


def meta_codec(node: Mapping[str, Any], facts: Facts) -> Any:
    """Build the codec on the meta device, where only its shapes are wanted."""
    weights = node.get("weights")
    with on_meta():
        if weights:
            header = ckpt.read_header(path := ckpt.resolve(weights))
            ckpt.check_codec(header, path)
            stored = {"name": header.component["name"], **header.component.get("kwargs", {})}
            return as_output(registry().build("codec", stored), node.get("output"))
        return as_output(build_component("codec", strip(node, "codec"), facts)[0], node.get("output"))


@dataclass
class PlannedCodec:
    """The codec that a run would use, on the meta device. recipe: what trains it first, None where it is at hand."""

    codec: Any
    facts: Facts
    recipe: Recipe | None = None


def planned_codec(recipe: Recipe, facts: Facts, dataset: Any = None) -> PlannedCodec:
    """Predict which codec `find_codec` will choose, by trying it on the data, or without data from shapes alone."""
    node = recipe.config["codec"]
    if node.get("fallback") and not isinstance(dataset, Latents):
        if not (node.get("weights") and carries(node, facts, dataset)):
            fallback = codec_recipe(node["fallback"], recipe, facts)
            with on_meta():
                codec = as_output(
                    build_component("codec", strip(fallback.config["model"], "model"), facts)[0], node.get("output")
                )
            return PlannedCodec(codec, facts.after(codec), fallback)
    codec = meta_codec(node, facts)
    return PlannedCodec(codec, facts_behind(facts, codec, dataset))


def carries(node: Mapping[str, Any], facts: Facts, dataset: Any = None) -> bool:
    """Can the codec whose weights a node names carry these images? See `reconstructs`."""
    if dataset is None:
        try:
            meta_codec(node, facts).latent_shape(facts.image_shape)
        except VgmError:
            return False
        return True
    images = dataset.pixels(range(min(64, len(dataset))))
    return reconstructs(ckpt.read_codec(ckpt.resolve(node["weights"]), output=node.get("output")), facts, images)


def codec_recipe(names: str | Sequence[str], recipe: Recipe, facts: Facts) -> Recipe:
    """The fallback recipe of a codec, on the data of the recipe that needs one: of several names the first that starts
    from nothing, or from a codec that takes images of these channels and sides."""
    data = recipe.node("data")
    assignments = [f"train.seed={recipe.node('train').seed}"]
    for key in ("path", "size", "channels", "crop", "decode", "hflip", "split"):
        value = getattr(data, key)
        if value is not None:
            assignments.append(f"data.{key}={json.dumps(value)}")
    *first, last = [names] if isinstance(names, str) else names
    for name in first:
        own = load(name, None, assignments)
        start = own.config["model"].get("weights")
        if not start or carries({"weights": start}, facts):
            return own
    return load(last, None, assignments)


def strip(node: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {k: v for k, v in node.items() if k not in HOST_KEYS.get(kind, ())}


def reconstructs(codec: Any, facts: Facts, images: torch.Tensor, min_psnr: float = 20.0) -> bool:
    """Whether this codec can be used for these images (B, C, H, W) in [-1, 1]: shapes must agree, and a batch must be
    reconstructed at `min_psnr` dB or better."""
    try:
        codec.latent_shape(facts.image_shape)
        with torch.no_grad():
            again = codec.decode(codec.latents(codec.encode(images)))
    except (RuntimeError, ValueError, VgmError):
        return False
    if again.shape != images.shape:
        return False
    mse = (again.clamp(-1, 1) - images).square().mean() / 4  # peak of 1 for images in [0, 1]
    return bool(-10 * torch.log10(mse.clamp_min(1e-12)) >= min_psnr)


def missing_codec(node: Mapping[str, Any]) -> VgmError:
    return VgmError(
        f"this recipe trains on latents of '{node.get('name')}', whose weights are not given",
        "codec.weights=RUN|FILE (an official VAE becomes one by `vgm convert`)",
        MISSING_ASSET,
    )


def find_codec(node: Mapping[str, Any], facts: Facts, images: torch.Tensor, trained: Path | None) -> Path | None:
    """The weights file of the recipe's codec, or None when the fallback recipe has to train one first."""
    if trained is not None:
        return trained
    weights = node.get("weights")
    if weights:
        path = ckpt.resolve(weights)
        if not node.get("fallback") or reconstructs(ckpt.read_codec(path, output=node.get("output")), facts, images):
            return path
    if not node.get("fallback"):
        raise missing_codec(node)
    return None


def open_images(recipe: Recipe) -> Any:
    """The recipe's data set, with the columns that its conditions read."""
    data, columns = recipe.node("data"), beside(recipe.config.get("conditions"))
    how = {k: getattr(data, k) for k in ("size", "channels", "crop", "decode", "split")}
    return open_dataset(data.path, **how, columns=columns)


def plan_facts(recipe: Recipe) -> tuple[Facts, int | None, PlannedCodec | None]:
    """Facts from the data when it is there, else from the recipe, then through the codec's shapes; the number of
    images; the codec."""
    data = recipe.node("data")
    count = data.count
    facts: Facts | None = None
    dataset: Any = None
    try:
        if data.path:
            dataset = open_images(recipe)
            facts, count = facts_for(recipe, dataset), len(dataset)
    except VgmError as e:
        if data.size is None:
            raise
        ui.warn(f"{e.message}; planning from the recipe's own numbers")
    facts = facts or declared_facts(data)
    planned = planned_codec(recipe, facts, dataset) if recipe.config.get("codec") else None
    return (planned.facts if planned else facts), count, planned


def plan_roles(recipe: Recipe, facts: Facts, codec: Any = None) -> dict[str, Any]:
    """Stand-ins for the roles that a verb would make before training: here two empty ODE pairs of a teacher."""
    roles = [role for role, node in recipe.roles().items() if node.get("kind") == PAIRS]
    if not roles:
        return {}
    x = torch.zeros(2, *facts.sample_shape)
    conditions = conditions_for(recipe.config.get("conditions") or {}, facts, None, codec)
    pairs = {"z": x, "x": x, **conditions.example(2, x.device)["cond"]}
    return dict.fromkeys(roles, pairs)


# -- networks and objective ------------------------------------------------------------------------------------------


@dataclass
class Built:
    """Live training objects."""

    objective: Any
    networks: dict[str, nn.Module]  # by role, as the objective names them
    components: dict[str, dict[str, Any]]  # what each role is, for its checkpoint's header
    parts: dict[str, dict[str, ckpt.Reference]]  # by role: the checkpoints that it is built with, by their roles
    sampled_with: dict[str, Any] = field(default_factory=dict)  # what the recipe's sampler receives by parameter name
    conditions: Conditions = field(default_factory=Conditions)  # trained encoders of theirs are among the networks

    def phases(self) -> list[Phase]:
        """The objective's; encoders of conditions are trained by those that train the network."""
        more = tuple(n for n in self.conditions.networks if self.conditions.parts[n].trained)
        return [replace(p, trains=(*p.trains, *more)) if "model" in p.roles else p for p in self.objective.phases()]

    def check_parts(self) -> None:
        """VgmError: a network was given one that is no checkpoint, so that its own checkpoint could not name it."""
        for role, given in self.parts.items():
            for part, reference in given.items():
                if role in self.networks and not reference.sha256:
                    name = self.components[role]["name"]
                    raise VgmError(
                        f"{name} is given the role '{part}', which is no checkpoint yet",
                        f"{'--base RUN or ' if part == 'base' else ''}roles.{part}={{run: RUN}} names the trained one; "
                        "the recipe's first lines (`vgm cat`) say how it is made",
                        USAGE,
                    )


def build_objective(recipe: Recipe, facts: Facts, given: Mapping[str, Any] | None = None, drawn: bool = False) -> Built:
    """Networks by role ("model" and the `roles:` node), then the objective around them.

    given: further roles made by the caller (the codec, pairs of a teacher). drawn: encoders whose files nobody named
    yet stay as they are drawn, for timing.
    """
    given = dict(given or {})
    if recipe.config.get("codec") and "codec" not in given:  # no data, no weights: its shapes
        given["codec"] = meta_codec(recipe.config["codec"], facts)
    roles = Roles(recipe, facts, given)
    views = {role: roles.view(role) for role in ("model", *recipe.roles()) if role not in given and roles.has(role)}
    model = roles.networks.get("model", given.get("model"))
    conditions = conditions_for(recipe.config.get("conditions") or {}, facts, model, given.get("codec"), drawn)
    given["conditions"] = conditions
    objective = registry().build("objective", recipe.config["objective"], **views, **given)
    wanted = sampler_parameters(recipe) & roles.references.keys()
    roles.parts["model"] |= {role: roles.references[role] for role in wanted}
    sampled_with = {role: views[role] for role in wanted}
    networks = {**objective.networks, **conditions.networks}
    encoders = {n: {"kind": "condition", **dict(conditions.parts[n].component or {})} for n in conditions.networks}
    return Built(objective, networks, roles.components | encoders, roles.parts, sampled_with, conditions)


def sampler_parameters(recipe: Recipe) -> set[str]:
    """Names of the parameters of the recipe's sampler that the recipe leaves open."""
    if not recipe.config.get("sampler"):
        return set()
    component, keywords = registry().config("sampler", recipe.config["sampler"])
    return set(signature(load_target(component.target, component.name)).parameters) - set(keywords)


class Roles:
    """Builds what a recipe's `model` and `roles` nodes name, each when it is first asked for: a constructor with a
    parameter named like a role receives that role's network, which is therefore built before."""

    def __init__(self, recipe: Recipe, facts: Facts, given: Mapping[str, Any]):
        self.facts, self.given = facts, given
        self.nodes: dict[str, dict[str, Any]] = {"model": recipe.config["model"], **recipe.roles()}
        self.components: dict[str, dict[str, Any]] = {}
        self.parts: dict[str, dict[str, ckpt.Reference]] = {}
        self.networks: dict[str, Any] = {}
        self.views: dict[str, Any] = {}
        self.references: dict[str, ckpt.Reference] = {}
        self.under_way: list[str] = []

    def has(self, role: str) -> bool:
        """Whether this role is built from the recipe. ODE pairs are not: the verb that asks for them makes them."""
        return self.nodes[role].get("kind") != PAIRS

    def view(self, role: str) -> Any:
        """A role as objectives and samplers receive it: what samplers see of a network, where its node or its file says
        how it is looked at, else what was built."""
        built = self.network(role)
        return self.views.get(role, built)

    def network(self, role: str) -> Any:
        """A role as networks receive it. VgmError: it cannot be built, or two roles need each other."""
        if role in self.networks:
            return self.networks[role]
        if role in self.under_way:
            raise VgmError(f"roles that need each other: {', '.join(self.under_way)}", code=USAGE)
        self.under_way.append(role)
        node = self.nodes[role]
        make = self.component if node.get("run") is None else self.stored
        self.networks[role] = make(role, node)
        self.under_way.remove(role)
        return self.networks[role]

    def component(self, role: str, node: Mapping[str, Any]) -> Any:
        kind = node.get("kind", "model") if role != "model" else "model"
        settings = strip(node, "roles" if role != "model" else "model")
        component, keywords = registry().config(kind, settings)
        parameters = signature(load_target(component.target, component.name)).parameters
        wanted = [r for r in parameters if r in self.nodes and r not in ("model", role, *keywords) and self.has(r)]
        given = {r: self.given[r] if r in self.given else self.network(r) for r in wanted}
        if "codec" in parameters and "codec" not in keywords and self.given.get("codec") is not None:
            given["codec"] = self.given["codec"]
        for keyword, fact in component.from_data.items():
            of, dot, key = fact.partition(".")
            if dot and keyword not in keywords and key in (own := self.keywords_of(of)):
                settings[keyword] = own[key]
        built, self.components[role] = build_component(kind, settings, self.facts, **given)
        self.parts[role] = {r: self.references.get(r, ckpt.Reference()) for r in wanted}
        if not isinstance(built, nn.Module):
            return built
        leave_out(built, given)
        initialise(built, node)
        if "view" in node and role != "model":
            self.views[role] = ckpt.build_view(freeze(built), {"name": "denoiser", **(node["view"] or {})})
        return built

    def keywords_of(self, role: str) -> Mapping[str, Any]:
        """What a network that was built as a role was told."""
        kwargs: Mapping[str, Any] = self.components.get(role, {}).get("kwargs", {})
        return kwargs

    def stored(self, role: str, node: Mapping[str, Any]) -> Any:
        """The frozen network of a checkpoint; on the meta device its shapes alone. VgmError: its file has changed."""
        path = run_file(role, node)
        header = ckpt.read_header(path)
        self.components[role] = header.component
        self.references[role] = ckpt.Reference(str(path), str(node.get("sha256", "")), header.component["name"])
        if torch.get_default_device().type == "meta":
            network, view = ckpt.outline(path)
        else:
            if ckpt.file_hash(path) != node.get("sha256"):
                hint = f"put the old file back, or begin a new run with roles.{role}={{run: {node['run']}}}"
                raise VgmError(f"roles.{role}: {path} has other bytes than when the run began", hint, USAGE)
            loaded = ckpt.load(path)
            network, view = loaded.model, loaded.view
        freeze(network)
        if node.get("view"):
            view = ckpt.build_view(network, {"name": "denoiser", **node["view"]})
        if view is not network:
            self.views[role] = view
        return network


def run_file(role: str, node: Mapping[str, Any]) -> Path:
    """The weights file of a role that is a checkpoint. VgmError: there is none."""
    run = node["run"]
    if not isinstance(run, str) or not run:
        raise VgmError(f"roles.{role}.run={shown(run)} is no run", f"roles.{role}.run=RUN|FILE", USAGE)
    try:
        return ckpt.resolve(run).resolve()
    except VgmError as e:
        hint = f"roles.{role}.run=RUN|FILE says where it lies now"
        raise VgmError(f"the {role} is missing: {e.message}", hint, e.code) from e


def settle(recipe: Recipe) -> Recipe:
    """The recipe itself, its roles that are checkpoints read: `run` is the file, with its hash and its view beside it,
    and networks that copy such a role are written out. Nothing happens to a recipe that is settled already.

    VgmError: no such file, a role that is a checkpoint and something else.
    """
    for role, node in recipe.roles().items():
        if node.get("run") is None:
            continue
        if other := sorted(k for k in node if k not in (*CHECKPOINT, "kind")):
            hint = "its file says what network it is"
            raise VgmError(f"roles.{role} is a checkpoint, it takes no '{other[0]}'", hint, USAGE)
        path = run_file(role, node)
        header = ckpt.read_header(path)
        node["run"] = str(path)
        node.setdefault("sha256", ckpt.file_hash(path))
        node.setdefault("view", header.view)
        for key in CHECKPOINT:
            recipe.origins.setdefault(f"roles.{role}.{key}", role)
        source = {"name": header.component["name"], **header.component.get("kwargs", {}), "weights": str(path)}
        copy_role(recipe.config, recipe.origins, role, source)
    return recipe
