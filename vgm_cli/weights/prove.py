"""The proof of a conversion: both round trips bit for bit, and one evaluation of the network before and after.

The network's input is its own `example(config)` (vgm_cli.api.HasExample), which is small and the same every time.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vgm_cli.api import Codec, HasExample
from vgm_cli.convert_api import Layout
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.errors import CHECK_FAILED, VgmError
from vgm_cli.nn.example import images
from vgm_cli.registry import registry
from vgm_cli.weights import files as weight_files
from vgm_cli.weights import layout as layouts
from vgm_cli.weights.compare import differing, distance, rounded, same
from vgm_cli.weights.files import State
from vgm_cli.weights.layout import full_config
from vgm_cli.weights.source import Conversion, Source

LOSS = {None: 1e-5, "fp32": 1e-5, "fp16": 2e-2, "bf16": 2e-1}  # of a forward pass, relative to its largest value


@dataclass
class Findings:
    """The results of `--verify`, one (what was checked, the outcome, whether it passed) per check."""

    checks: list[tuple[str, str, bool]] = field(default_factory=list)

    def add(self, what: str, outcome: str, passed: bool = True) -> None:
        self.checks.append((what, outcome, passed))

    @property
    def passed(self) -> bool:
        return all(ok for *_, ok in self.checks)

    def failure(self, hint: str = "nothing was written") -> VgmError:
        what, outcome, _ = next(c for c in self.checks if not c[2])
        return VgmError(f"the conversion is not proved: {what}: {outcome}", hint, CHECK_FAILED)


def prove(job: Conversion) -> Findings:
    """Check a conversion before it is written: round trips bit for bit, and outputs of the network before and after,
    also by the layouts' own code (diffusers) where that is installed."""
    proof = Findings()
    source = job.source
    bad = ckpt.non_finite(job.ours)
    proof.add(
        "every value is finite",
        f"{len(bad)} of {len(job.ours)} tensors hold NaN or infinities, first {bad[0]}" if bad else "yes",
        not bad,
    )
    if source.layout is not None:
        round_trips(proof, source.layout, source.state, source.theirs)
    if job.layout is not None and job.layout is not source.layout:
        round_trips(proof, job.layout, job.ours)
    elif job.layout is not None and job.cast:
        round_trips(proof, job.layout, job.ours)
    forward_passes(proof, job)
    return proof


def round_trips(proof: Findings, c: Layout, ours: State, theirs: State | None = None) -> None:
    """Check ours -> layout -> ours, and with `theirs`, the state that was read, layout -> ours -> layout on the
    tensors that both have."""
    made = c.from_ours(ours)
    wrong = differing(ours, c.to_ours(made))
    proof.add(
        f"ours -> {c.name} -> ours", f"{len(wrong)} of {len(ours)} tensors differ, first {wrong[0]}" if wrong else
        f"{len(ours)} tensors bit for bit", bool(ours) and not wrong
    )  # fmt: skip
    if theirs is None:
        return
    unused = [re.compile(p) for p in c.files.unused]
    names = [k for k in made if k in theirs and not any(p.search(k) for p in unused)]
    wrong = [k for k in names if not same(theirs[k], made[k]) and not rounded(theirs[k], made[k])]
    proof.add(
        f"{c.name} -> ours -> {c.name}", f"{len(wrong)} of {len(names)} tensors differ, first {wrong[0]}" if wrong else
        f"{len(names)} tensors bit for bit", bool(names) and not wrong
    )  # fmt: skip


def forward_passes(proof: Findings, job: Conversion) -> None:
    """Compare outputs before and after, up to what the asked precision loses. A check whose package is not installed
    is reported as not made."""
    source = job.source
    registry().find(source.kind, source.name)  # a name that is not registered is refused, not left unproved
    what = "forward pass before and after"
    try:
        before = evaluate(source, source.state, job.layout)
    except VgmError as e:
        proof.add(what, f"not made: {e.message}")
        return
    except (RuntimeError, ValueError, TypeError, IndexError, StopIteration) as e:
        proof.add(what, f"not made: the network refuses its example ({layouts.reason_of(e)})")
        return
    after = evaluate(source, job.ours if job.layout is None else job.layout.to_ours(job.state), job.layout)
    gap = distance(after, before)
    proof.add(what, f"differs by {gap:.1e}", gap <= LOSS[job.cast])
    sides = {c.name: (c, state, job.cast) for c, state in ((job.layout, job.state),) if c is not None}
    if source.layout is not None:
        sides[source.layout.name] = (source.layout, source.theirs, None)
    for c, state, precision in sides.values():
        if c.proof.reference is None:
            continue
        what = f"forward pass of {c.name}'s own code"
        try:
            gap = distance(c.proof.reference(state, full_config(source.header.component)), before)
        except VgmError as e:
            proof.add(what, f"not made: {e.message}")
            continue
        except layouts.UNFIT as e:
            proof.add(what, f"it refuses these weights: {layouts.reason_of(e)}", False)
            continue
        proof.add(what, f"differs from ours by {gap:.1e}", gap <= max(c.proof.tolerance, LOSS[precision]))


def prove_written(job: Conversion, first: Path, proof: Findings) -> None:
    """Check that the written file, read back, holds the same bits."""
    state = next(iter(weight_files.read(first).entries.values()))
    wrong = differing(job.state, state)
    proof.add(
        f"{first.name} read back", f"{len(wrong)} tensors differ, first {wrong[0]}" if wrong else
        f"{len(state)} tensors bit for bit", bool(state) and not wrong
    )  # fmt: skip


# -- one evaluation ----------------------------------------------------------------------------------------------------


def evaluate(source: Source, state: Mapping[str, Tensor], layout: Layout | None = None) -> Tensor:
    """All outputs of the source's network for its example, flattened: (n,) float32.

    state: the weights to use. layout: the target's; if it has its own `proof.forward`, that is used instead of the
    source's. VgmError: the network has no example and takes something else than images, times and labels.
    """
    component = source.header.component
    network = ckpt.build_with_weights(component, state, source.path).eval().requires_grad_(False)
    config = full_config(component)
    layouts_ = [c for c in (layout, source.layout) if c is not None]
    forward = next((c.proof.forward for c in layouts_ if c.proof.forward is not None), None)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # networks that draw noise of their own
        if forward is not None:
            out: Any = forward(network, config)
        else:
            given = example_of(network, config, component, source.header.data)
            codec = source.kind == "codec" and isinstance(network, Codec)
            out = reconstruct(network, **given) if codec else network(**given)
    return torch.cat([t.float().flatten() for t in tensors_in(out)])


def example_of(
    network: nn.Module, config: Mapping[str, Any], component: Mapping[str, Any], data: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Inputs for a network: its own example, or images, times and labels of the size that the file or the
    constructor's data facts say. VgmError: the network takes something else and has no example."""
    if isinstance(network, HasExample):
        return network.example(config)
    kind = component.get("kind", "model")
    facts = {fact: config.get(k) for k, fact in registry().find(kind, component["name"]).from_data.items()}
    shape: Any = data.get("sample_shape") or [facts.get("channels"), facts.get("size")]
    entry: Any = network.encode if kind == "codec" else network.forward
    taken = inspect.signature(entry).parameters
    known = images(int(shape[0]), int(shape[-1]), int(config.get("num_classes") or 0)) if all(shape) else {}
    lacking = [k for k, p in taken.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD and k not in known]
    if lacking:
        raise VgmError(
            f"{component['name']} has no `example(config)` that says what its forward takes",
            "see vgm_cli.api.HasExample",
        )
    return {k: v for k, v in known.items() if k in taken}


def reconstruct(codec: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(latents, image) of a codec for images x."""
    z = codec.latents(codec.encode(x))
    return z, codec.decode(z)


def tensors_in(out: Any) -> Iterator[Tensor]:
    """All tensors inside nested tuples, dictionaries and dataclasses."""
    if isinstance(out, Tensor):
        yield out
    elif dataclasses.is_dataclass(out) and not isinstance(out, type):
        for field_ in dataclasses.fields(out):
            yield from tensors_in(getattr(out, field_.name))
    elif isinstance(out, Mapping):
        for value in out.values():
            yield from tensors_in(value)
    elif isinstance(out, list | tuple):
        for value in out:
            yield from tensors_in(value)
