"""One deterministic forward pass of any network, to compare it before and after a conversion."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vgm_cli.convert_api import Converter
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.registry import load_target, registry, signature

LATENTS = ("latent_size", "latent_dim", "w_dim")  # what constructors call the length of z
SIDE = 32  # of images for codecs, which take any size that their levels divide


def run(source: Any, state: Mapping[str, Tensor], layout: Converter | None = None) -> Tensor | None:
    """Output of the source's network on made-up inputs, in float32: (n,); None where it is unknown what it takes.

    source: an engine.convert.Source. layout: whose `forward` goes before, if it has one.
    """
    component = source.header.component
    model = ckpt.build_with_weights(component, state, source.path).eval().requires_grad_(False)
    how = next((c.forward for c in (layout, source.layout) if c is not None and c.forward is not None), None)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # networks that draw noise of their own
        if how is not None:
            out: Any = how(model, source.config)
        elif source.kind == "codec" and hasattr(model, "decode"):
            out = reconstruct(model, full_config(component))
        else:
            inputs = inputs_of(model, component, source.header.data)
            out = None if inputs is None else model(**inputs)
    parts = [p.float().flatten() for p in tensors_in(out)]
    return torch.cat(parts) if parts else None


def tensors_in(out: Any) -> Iterator[Tensor]:
    """Every floating-point or integer tensor in tuples, dictionaries and dataclasses."""
    if isinstance(out, Tensor):
        yield out
    elif dataclasses.is_dataclass(out) and not isinstance(out, type):
        for field in dataclasses.fields(out):
            yield from tensors_in(getattr(out, field.name))
    elif isinstance(out, Mapping):
        for value in out.values():
            yield from tensors_in(value)
    elif isinstance(out, list | tuple):
        for value in out:
            yield from tensors_in(value)


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value; infinite where shapes or finiteness differ, or all are NaN."""
    a, b = a.float().flatten(), b.float().flatten()
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    a, b = a[a.isfinite()], b[b.isfinite()]
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) if len(a) else float("inf")


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def full_config(component: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords with the constructor's defaults."""
    found = registry().find(component.get("kind", "model"), component["name"])
    parameters = signature(load_target(found.target, found.name)).parameters
    defaults = {k: p.default for k, p in parameters.items() if p.default is not p.empty}
    return defaults | dict(component.get("kwargs", {}))


def reconstruct(codec: Any, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(latents, image)."""
    channels = next((config[k] for k in ("in_channels", "channels") if config.get(k)), 3)
    fixed = config.get("size")  # networks of one size only
    side = fixed or max(SIDE, 2 ** len(config.get("ch_mult") or ()))
    z = codec.latents(codec.encode(randn(1, channels, side, side)))
    return z, codec.decode(z)


def inputs_of(model: nn.Module, component: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Made-up arguments for `forward`, by their names; None when one is unknown."""
    config = full_config(component)
    found = registry().find(component.get("kind", "model"), component["name"])
    facts = {fact: config.get(keyword) for keyword, fact in found.from_data.items()}
    classes = config.get("num_classes") or 0
    side = next((config[k] for k in ("side",) if config.get(k)), facts.get("size") or facts.get("image_size") or SIDE)
    channels = facts.get("channels") or facts.get("image_channels") or config.get("channels") or 3
    shape = tuple(data.get("sample_shape") or getattr(model, "sample_shape", None) or (channels, side, side))
    vocabulary = config.get("vocab_size") or 1
    label = torch.tensor([min(1, max(classes - 1, 0))])
    known: dict[str, Any] = {
        "x": lambda: randn(1, *shape),
        "a": lambda: randn(1, *shape),
        "b": lambda: randn(1, *shape).flip(-1),
        "z": lambda: randn(1, next(config[k] for k in LATENTS if config.get(k))),
        "t": lambda: torch.tensor([0.625]),
        "y": lambda: label if classes else None,
        "low_res": lambda: randn(1, shape[0], shape[1] // 4, shape[2] // 4) if config.get("super_res") else None,
        "ids": lambda: (torch.arange(8) * 7 % vocabulary)[None],
        "cond": lambda: label if config.get("model_type") != "t2i" else None,
    }
    inputs = {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        value = known[name]() if name in known else None
        if value is not None:
            inputs[name] = value
        elif parameter.default is parameter.empty:
            return None
    return inputs
