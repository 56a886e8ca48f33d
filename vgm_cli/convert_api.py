"""What a converter is: a `Layout`, one published form of one component's weights, both ways. Torch-free at import.

A plugin declares `Component(kind="converter", name=..., target="...:LAYOUT")`, whose target is a Layout. Its parts are
pure functions on dicts of tensors: state is {name: tensor}, config the keywords of the component's constructor, json
the config.json of a diffusers folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vgm_cli.errors import USAGE, VgmError

if TYPE_CHECKING:
    from torch import Tensor

State = Mapping[str, "Tensor"]
Config = Mapping[str, Any]


def anything(config: Config) -> None:
    """Every network has such a file."""


def nothing(*args: Any) -> dict[str, Any]:
    return {}


def same_names(names: Iterable[str]) -> dict[str, str]:
    return {name: name for name in names}


@dataclass(frozen=True, kw_only=True)
class Files:
    """How published files hold the tensors of a layout.

    wrapper: the entry of an official torch file that keeps the state, such as "model"; "" where the state is bare.
    names(names): {name in the layout: name in the file} of this network's own tensors, for files that hold a larger
        network around it (a first stage inside a diffusion model) or use older names. What is in no pair is not ours.
    unused: regular expressions of tensors that say nothing (masks, caches, optimizer slots): they are not kept, and
        from_ours makes them anew. Every other tensor that from_ours makes must equal the file's.
    """

    wrapper: str = ""
    names: Callable[[Iterable[str]], Mapping[str, str]] = same_names
    unused: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a paper fixes and no tensor of its checkpoints says.

    header(config): parts of engine/checkpoint.Header: "view" (how a sampler sees the network), "recipe" (paper,
    sampler, guidance_scale), "data" (sample_shape, num_classes, ...), "conditions" (what the network is told, by name).
    With them a converted file can be sampled from.
    assumes(state, config): {keyword: sentence}, a remark for every keyword that `config` or `header` takes from the
    paper for this state. If the user gives the keyword, the remark is left out.
    """

    header: Callable[[Config], Mapping[str, Any]] = nothing
    assumes: Callable[[State, Config], Mapping[str, str]] = nothing


@dataclass(frozen=True, kw_only=True)
class Diffusers:
    """The config.json of a diffusers folder.

    config_json(config): what is written beside the weights.
    from_json(json): constructor keywords that config.json tells and shapes do not.
    matches(json): whether a config.json belongs to this layout, where tensors fit several.
    adapt(layout, json): the layout for this config.json, where tensors are read differently by what it says (the width
        of a head).
    words: keywords that adapt reads beside config.json, from the command line.
    """

    config_json: Callable[[Config], dict[str, Any]]
    from_json: Callable[[Mapping[str, Any]], dict[str, Any]] = nothing
    matches: Callable[[Mapping[str, Any]], bool] = lambda json: False
    adapt: Callable[[Layout, Mapping[str, Any]], Layout] = lambda layout, json: layout
    words: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What `vgm convert --verify` compares besides our own network before and after, on its `example(config)`.

    reference(state, config): outputs of the layout's own code (diffusers) for a state in the layout, which have to
    equal ours. VgmError: that code is not installed. forward(network, config): the same outputs of our network; None:
    its output for `example(config)`. tolerance: the largest difference, relative to the largest value.
    """

    reference: Callable[[State, Config], Tensor] | None = None
    forward: Callable[[Any, Config], Tensor] | None = None
    tolerance: float = 1e-4


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One published form of one component's weights.

    name: as `vgm convert --from/--to` names it ("dit", "dit-diffusers").
    component, kind: the model or codec that it feeds, as a recipe names it.
    recognise(names): whether a state with these names has this layout.
    to_ours(state), from_ours(state): rename, split and merge tensors. The result of to_ours loads with strict=True, and
        to_ours(from_ours(s)) equals s. KeyError: a tensor of the layout is missing.
    config(state): constructor keywords read off the shapes of the published tensors; those that shapes do not tell (the
        number of heads) follow the published networks.
    allows(config): VgmError: such a network has no file of this layout.
    transfer(state, base, other): the state of a network that was trained on the file `base`, as if it had been trained
        on the file `other`, all in this layout; None: its networks stand on no other.
    beside: {role: {layout: prefix of its names}} of what whole checkpoints hold besides this network: `codec`, and
        conditions by name. `vgm convert` reads and writes them with it.
    """

    name: str
    component: str
    kind: str = "model"
    summary: str = ""
    recognise: Callable[[Iterable[str]], bool]
    to_ours: Callable[[State], dict[str, Tensor]]
    from_ours: Callable[[State], dict[str, Tensor]]
    config: Callable[[State], dict[str, Any]]
    allows: Callable[[Config], None] = anything
    transfer: Callable[[State, State, State], dict[str, Tensor]] | None = None
    files: Files = Files()
    published: Published = Published()
    diffusers: Diffusers | None = None
    proof: Proof = Proof()
    beside: Mapping[str, Mapping[str, str]] = field(default_factory=dict, hash=False)

    def own(self, state: State) -> State:
        """The network's own tensors of a file, under the layout's present names."""
        return {ours: state[theirs] for ours, theirs in self.files.names(state).items()}


WRAPPERS = ("ema", "model_ema", "state_dict", "model", "module")


def unwrap(checkpoint: Mapping[str, Any], weights: str | None = None) -> dict[str, Any]:
    """The state dict inside a training checkpoint ({"model": ..., "ema": ..., "opt": ...}); a bare one is returned.

    weights: the entry to take; None takes the average where there is one. DDP's leading "module." is dropped. An
    average kept as a list ({"ema": {"shadow_params": [...]}}, score_sde and its forks) gets its names from "model".
    """
    state: Mapping[str, Any] = checkpoint
    ema = checkpoint.get("ema")
    if weights in (None, "ema") and isinstance(ema, Mapping) and "shadow_params" in ema:
        checkpoint = {**checkpoint, "ema": named_shadow(checkpoint.get("model") or {}, ema["shadow_params"])}
    if weights is not None:
        if not isinstance(checkpoint.get(weights), Mapping):
            have = ", ".join(k for k, v in checkpoint.items() if isinstance(v, Mapping))
            raise VgmError(f"the checkpoint holds no '{weights}' weights", f"it holds {have or 'a bare state'}", USAGE)
        state = checkpoint[weights]
    else:
        for key in WRAPPERS:
            inner = checkpoint.get(key)
            if isinstance(inner, Mapping) and inner and all(hasattr(v, "shape") for v in inner.values()):
                state = inner
                break
    if state and all(k.startswith("module.") for k in state):
        state = {k.removeprefix("module."): v for k, v in state.items()}
    return dict(state)


UNTRAINED = ("running_mean", "running_var", "num_batches_tracked")  # buffers of normalisation layers


def named_shadow(model: Mapping[str, Any], shadow: Sequence[Any]) -> dict[str, Any]:
    """The model's state with its trained tensors replaced by their averages, a list in the model's own order.

    Buffers and tensors that are not trained (fixed Fourier frequencies) are in `model` and not in the list; they are
    told by their shape. VgmError: the list is not that of this model, or fits it in several ways.
    """
    names = [k for k in model if not k.endswith(UNTRAINED)] if len(shadow) < len(model) else list(model)
    first = in_order(names, model, shadow)
    last = in_order(names[::-1], model, shadow[::-1])
    if first is None or last is None:
        raise VgmError(f"the average holds {len(shadow)} tensors that do not fit the model's {len(model)}", code=USAGE)
    if first != last[::-1]:
        raise VgmError("the average's tensors have no names, and fit the model's in several ways", code=USAGE)
    return {**model, **dict(zip(first, shadow))}


def in_order(names: Sequence[str], model: Mapping[str, Any], shadow: Sequence[Any]) -> list[str] | None:
    """The first names whose tensors have the shapes of a list, in its order; None where there are too few."""
    found: list[str] = []
    for name in names:
        if len(found) < len(shadow) and tuple(model[name].shape) == tuple(shadow[len(found)].shape):
            found.append(name)
    return found if len(found) == len(shadow) else None
