"""What a checkpoint converter is: one published layout of one component, both ways. Importing it needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vgm_cli.errors import USAGE, VgmError

if TYPE_CHECKING:
    from torch import Tensor

State = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class Converter:
    """One layout of one component's weights, as pure functions on dicts of tensors.

    name: the layout as `vgm convert --from/--to` names it ("dit", "dit-diffusers").
    component: the model (or codec) it feeds, as a recipe names it. kind: that component's kind.
    recognise(keys): does a state with these names have this layout? Wrapped files go through `unwrap` first.
    to_ours(state) / from_ours(state): rename, split and merge tensors. The result of to_ours loads with strict=True
        and to_ours(from_ours(s)) equals s. KeyError when a tensor of the layout is missing.
    config_from(state): constructor keywords read off the shapes of the published tensors; keywords that shapes do not
        tell (the number of heads) follow the published presets.

    What follows is optional; `config` is always constructor keywords.
    header(config): what a converted file says of itself besides its network, where the paper fixes it: "view" (how a
        sampler sees the network), "recipe" (paper, sampler, guidance_scale), "data" (sample_shape, num_classes, …), as
        in engine/checkpoint.Header. With it the file can be sampled from as it is.
    allows(config): VgmError when such a network has no file of this layout.
    wrapper: the entry under which official torch files keep the state; "" is a bare one.
    forgets: regular expressions of tensors of the layout that ours does not keep and from_ours makes anew; their values
        say nothing. Any other tensor that from_ours gives must be the file's own.
    pairs(names): {name in the layout: name in the file} of a network's own tensors, where a file may keep them below
        the names of a larger one, or under older names. What is in no pair is not this network's.
    assumes(state, config): {keyword: sentence} of what config_from (or header: "schedule") takes as published because
        no tensor tells it, for this state.
    config_json(config): the config.json that goes with the weights (diffusers). fits(json): is this its config.json?
    from_json(json): constructor keywords that it tells and shapes do not. told_by(json): this layout for the network of
        such a config.json, where tensors alone do not tell how to read them (the size, the width of a head).
    forward(network, config): one deterministic evaluation of our network, where its forward takes more than images,
        times, labels or ids. reference(state, config): the same by the layout's own code on a state of that layout;
        they agree within `tolerance` of the largest value.
    """

    name: str
    component: str
    recognise: Callable[[Iterable[str]], bool]
    to_ours: Callable[[State], dict[str, Tensor]]
    from_ours: Callable[[State], dict[str, Tensor]]
    config_from: Callable[[State], dict[str, Any]]
    kind: str = "model"
    summary: str = ""
    header: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    allows: Callable[[Mapping[str, Any]], None] | None = None
    wrapper: str = ""
    forgets: tuple[str, ...] = ()
    pairs: Callable[[Iterable[str]], Mapping[str, str]] | None = None
    assumes: Callable[[State, Mapping[str, Any]], Mapping[str, str]] | None = None
    config_json: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    fits: Callable[[Mapping[str, Any]], bool] | None = None
    from_json: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    told_by: Callable[[Mapping[str, Any]], Converter] | None = None
    forward: Callable[[Any, Mapping[str, Any]], Tensor] | None = None
    reference: Callable[[State, Mapping[str, Any]], Tensor] | None = None
    tolerance: float = 1e-4

    def own(self, state: State) -> State:
        """The network's own tensors, under the layout's present names."""
        return state if self.pairs is None else {ours: state[k] for ours, k in self.pairs(state).items()}


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
