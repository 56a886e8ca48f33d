"""From a recipe to live objects: data facts, codec, networks by role, objective. Shared by train, plan and validate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.budget import building
from vgm_cli.engine.tokens import TokenCodec, as_output
from vgm_cli.errors import MISSING_ASSET, USAGE, VgmError
from vgm_cli.recipe import HOST_KEYS, Data, Recipe, load
from vgm_cli.registry import load_target, registry, signature


@dataclass
class Facts:
    """What the model is built for. image_*: pixels; size/channels: as the model sees x, after the codec.

    vocab_size, grid: of a codec's tokens, 0 and () where the model sees none; then size is the grid's last side.
    """

    image_size: int
    image_channels: int
    num_classes: int
    size: int
    channels: int
    class_names: list[str] = field(default_factory=list)
    vocab_size: int = 0
    grid: tuple[int, ...] = ()

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.grid or (self.channels, self.size, self.size)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.image_channels, self.image_size, self.image_size)

    def after(self, codec: Any) -> Facts:
        """The same data behind a codec."""
        shape = tuple(codec.latent_shape(self.image_shape))
        mine = (self.image_size, self.image_channels, self.num_classes)
        if isinstance(codec, TokenCodec):
            return Facts(*mine, shape[-1], 1, self.class_names, codec.vocab_size, shape)
        return Facts(*mine, shape[1], shape[0], self.class_names)


def declared_facts(data: Data) -> Facts:
    """Facts from the recipe alone, for --plan without data."""
    if data.path == "mnist5k" and data.size is None:
        return Facts(28, 1, 10, 28, 1)  # the shipped set
    missing = [k for k in ("size", "channels") if getattr(data, k) is None]
    if missing:
        raise VgmError(
            f"without the data, {' and '.join('data.' + m for m in missing)} must be given",
            "example: data.size=256 data.channels=3 data.num_classes=1000",
            USAGE,
        )
    assert data.size and data.channels
    return Facts(data.size, data.channels, data.num_classes or 0, data.size, data.channels)


def facts_of(dataset: Any, labelled: bool) -> Facts:
    f = dataset.facts
    return Facts(
        f.size, f.channels, (f.num_classes or 0) if labelled else 0, f.size, f.channels, list(f.class_names or [])
    )


def component_node(kind: str, node: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    """A recipe node -> {"kind", "name", "kwargs"} with preset expanded and open keywords filled from the data."""
    own = {k: v for k, v in node.items() if k not in HOST_KEYS.get(kind, ()) and k != "kind"}
    component, kwargs = registry().config(kind, own)
    params = signature(load_target(component.target, component.name)).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in params.values())
    for keyword, fact in component.from_data.items():
        if kwargs.get(keyword) is None and (keyword in params or takes_any):
            kwargs[keyword] = getattr(facts, fact)
    return {"kind": kind, "name": component.name, "kwargs": kwargs}


def build_component(kind: str, node: Mapping[str, Any], facts: Facts, **roles: Any) -> tuple[Any, dict[str, Any]]:
    described = component_node(kind, node, facts)
    with building(f"{kind} '{described['name']}'"):
        return registry().build(kind, {"name": described["name"], **described["kwargs"]}, **roles), described


def facts_behind(facts: Facts, codec: Any, dataset: Any = None) -> Facts:
    """The data behind a codec. A set of latents tells, or its codec does, what images they come from."""
    if hasattr(dataset, "image_shape_for"):
        channels, size, _ = dataset.image_shape_for(codec)
        facts = Facts(size, channels, facts.num_classes, size, channels, facts.class_names)
    return facts.after(codec)


# -- codec -----------------------------------------------------------------------------------------------------------


def meta_codec(node: Mapping[str, Any], facts: Facts) -> Any:
    """The codec on the meta device: only its shapes are wanted."""
    weights = node.get("weights")
    with torch.device("meta"):
        if weights:
            header = ckpt.read_header(ckpt.resolve(weights))
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
    """What `find_codec` will come to, without training anything; from shapes alone where there is no data to try."""
    node = recipe.config["codec"]
    if node.get("fallback") and not hasattr(dataset, "image_shape_for"):
        if not (node.get("weights") and carries(node, facts, dataset)):
            own = codec_recipe(node["fallback"], recipe)
            with torch.device("meta"):
                codec = as_output(
                    build_component("codec", strip(own.config["model"], "model"), facts)[0], node.get("output")
                )
            return PlannedCodec(codec, facts.after(codec), own)
    codec = meta_codec(node, facts)
    return PlannedCodec(codec, facts_behind(facts, codec, dataset))


def carries(node: Mapping[str, Any], facts: Facts, dataset: Any = None) -> bool:
    """Can the codec whose weights a node names carry these images? See `fits`."""
    if dataset is None:
        try:
            meta_codec(node, facts).latent_shape(facts.image_shape)
        except VgmError:
            return False
        return True
    images = dataset.pixels(range(min(64, len(dataset))))
    return fits(ckpt.read_codec(ckpt.resolve(node["weights"]), output=node.get("output")), facts, images)


def codec_recipe(name: str, recipe: Recipe) -> Recipe:
    """The fallback recipe of a codec, on the data of the recipe that needs one."""
    data = recipe.node("data")
    assignments = [f"train.seed={recipe.node('train').seed}"]
    for key in ("path", "size", "channels", "crop", "hflip"):
        value = getattr(data, key)
        if value is not None:
            assignments.append(f"data.{key}={json.dumps(value)}")
    return load(name, None, assignments)


def strip(node: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {k: v for k, v in node.items() if k not in HOST_KEYS.get(kind, ())}


def fits(codec: Any, facts: Facts, images: torch.Tensor, min_psnr: float = 20.0) -> bool:
    """Can this codec carry these images? Shapes must agree and a batch must come back at `min_psnr` dB or better.

    images: (B, C, H, W) in [-1, 1].
    """
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
        if not node.get("fallback") or fits(ckpt.read_codec(path, output=node.get("output")), facts, images):
            return path
    if not node.get("fallback"):
        raise missing_codec(node)
    return None


# -- networks and objective ------------------------------------------------------------------------------------------


@dataclass
class Built:
    """Live training objects. components: what each trained role is, for its checkpoint header."""

    objective: Any
    networks: dict[str, nn.Module]
    components: dict[str, dict[str, Any]]


def build_objective(recipe: Recipe, facts: Facts, extra: Mapping[str, Any] | None = None) -> Built:
    """Networks by role ("model" and the `roles:` node), then the objective around them.

    extra: further roles made by the caller (a teacher, a reward).
    """
    components: dict[str, dict[str, Any]] = {}
    roles: dict[str, Any] = dict(extra or {})
    model, components["model"] = build_component("model", recipe.config["model"], facts)
    roles["model"] = initialise(model, recipe.config["model"])
    for role, node in (recipe.config.get("roles") or {}).items():
        if node is None:
            continue
        network, components[role] = build_component(node.get("kind", "model"), strip(node, "roles"), facts)
        roles[role] = initialise(network, node) if isinstance(network, nn.Module) else network
    if recipe.config.get("codec") and "codec" not in roles:  # no data, no weights: its shapes
        roles["codec"] = meta_codec(recipe.config["codec"], facts)
    if recipe.config.get("teacher") and "teacher" not in roles:
        roles["teacher"] = build_teacher(recipe.config["teacher"], facts)
    objective = registry().build("objective", recipe.config["objective"], **roles)
    return Built(objective, dict(objective.networks), components)


def build_teacher(node: Mapping[str, Any], facts: Facts) -> Any:
    """The frozen view of the `teacher:` node: its component with its weights, looked at as its `view:` says."""
    network, _ = build_component("model", strip(node, "teacher"), facts)
    initialise(network, node).eval().requires_grad_(False)
    return ckpt.build_view(network, {"name": "denoiser", **(node.get("view") or {})})


def initialise(network: nn.Module, node: Mapping[str, Any]) -> nn.Module:
    """Start from the weights the node names (`weights: RUN|FILE`), strictly. VgmError: they are another network's."""
    weights = node.get("weights")
    if not weights or next((p.is_meta for p in network.parameters()), False):
        return network
    path = ckpt.resolve(weights)
    tensors, metadata = ckpt.read_tensors(path)
    name = str(node.get("name", type(network).__name__))
    if "vgm.component" in metadata:
        refuse_other(ckpt.Header.parse(metadata, path), name, path)
    state = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    ckpt.check_fit(network, state, path, name, USAGE)
    ckpt.refuse_non_finite(state, path)
    network.load_state_dict(state)
    return network


def refuse_other(header: ckpt.Header, name: str, path: Path) -> None:
    """VgmError: the file says that its weights are another component's."""
    if (held := header.component["name"]) != name:
        raise VgmError(f"{path} holds {article(held)}, not {article(name)}", f"`vgm inspect {path}` says more", USAGE)


def article(name: str) -> str:
    return f"{'an' if name[:1] in 'aeiou' else 'a'} {name}"
