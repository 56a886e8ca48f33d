"""Golden cases: stored inputs, weights and outputs of reference implementations, and the checks that claim them.

A test module declares `golden = GoldenChecks("dit")`, decorates checks with a predicate over the file's metadata
and tensor names, and has one test taking the `golden_case` fixture; `pytest --golden DIR` adds the files
DIR/<paper>/*.safetensors to the committed cases. A case of a complete paper that no check claims fails.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map


class GoldenCase:
    """One golden file. state/inputs/outputs are dicts without their prefix; half-precision state becomes fp32. device:
    where its checks compute."""

    def __init__(self, path: Path, device: torch.device | str = "cpu"):
        self.path, self.device = path, torch.device(device)
        with safe_open(path, framework="pt") as f:
            meta = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys()}
        self.source: str = meta.get("source", "")
        self.notes: str = meta.get("notes", "")
        self.kind: str = meta.get("kind", "")
        self.config: Any = json.loads(meta["config"]) if "config" in meta else {}
        self.draw_order: Any = json.loads(meta["draw_order"]) if "draw_order" in meta else []
        self.metadata: Mapping[str, str] = meta

        def part(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        self.state = {
            k: v.float() if v.dtype in (torch.float16, torch.bfloat16) else v for k, v in part("state/").items()
        }
        self.inputs = part("in/")
        if self.device.type != "cpu":
            self.state = {k: v.to(self.device) for k, v in self.state.items()}
            self.inputs = {k: v.to(self.device) for k, v in self.inputs.items()}
        self.outputs = part("out/")

    def __contains__(self, key: str) -> bool:
        """'in/x', 'out/loss', 'state/pos_embed': is that tensor there?"""
        group, _, name = key.partition("/")
        return name in {"in": self.inputs, "out": self.outputs, "state": self.state}.get(group, {})

    def __repr__(self) -> str:
        return f"GoldenCase({self.path.parent.name}/{self.path.stem})"


Check = Callable[[GoldenCase], None]


class GoldenChecks:
    """The checks of one paper. partial: what of the paper is in; None when all of it is."""

    def __init__(self, paper: str, partial: str | None = None):
        self.paper = paper
        self.partial = partial
        self.checks: list[tuple[Callable[[GoldenCase], bool], Check]] = []

    def check(self, when: Callable[[GoldenCase], bool]) -> Callable[[Check], Check]:
        """Register a check for the cases where `when(case)` holds."""

        def add(fn: Check) -> Check:
            self.checks.append((when, fn))
            return fn

        return add

    def claims(self, case: GoldenCase) -> list[Check]:
        return [fn for when, fn in self.checks if when(case)]

    def run(self, case: GoldenCase) -> None:
        """Run every check that claims the case; unclaimed is a failure."""
        checks = self.claims(case)
        if not checks:
            raise AssertionError(f"no check of '{self.paper}' claims {case}: source {case.source!r}")
        for fn in checks:
            if case.device.type == "cpu":
                fn(case)
                continue
            with OnDevice(case.device):
                fn(case)


class OnDevice(TorchFunctionMode):
    """Checks written for the CPU, on another device: whatever a function of torch takes part in there goes there, what
    is made anew as well. Random numbers are drawn on the CPU, so that they are the ones the case was made with."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("numpy", "__array__"):
            return func(args[0].detach().cpu(), *args[1:], **kwargs)
        if name in ("__get__", "__set__", "cpu", "to", "type", "copy_", "manual_seed", "from_numpy", "set_"):
            return func(*args, **kwargs)
        made = func(*self.there(args), **self.there(kwargs)) if self.mixed((args, kwargs)) else func(*args, **kwargs)
        fresh = isinstance(made, Tensor) and made.device.type == "cpu" and name in CONSTRUCTORS
        return made.to(self.device) if fresh and kwargs.get("device") is None else made

    def mixed(self, value: Any) -> bool:
        tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor)]  # single numbers of the CPU go with all
        found = {t.device.type for t in tensors if t.ndim or t.device.type != "cpu"}
        return len(found) > 1

    def there(self, value: Any) -> Any:
        return tree_map(lambda t: t.to(self.device) if isinstance(t, Tensor) and t.ndim else t, value)


CONSTRUCTORS = (
    *("empty", "zeros", "ones", "full", "eye", "arange", "linspace", "logspace", "tensor", "as_tensor", "asarray"),
    *("rand", "randn", "randint", "randperm", "normal", "tril_indices", "triu_indices", "from_numpy", "hann_window"),
)


# the tolerances are for the kernels that made the numbers; others sum in another order and have their own exp and sin,
# so that both sides are a rounding away from the truth
OTHER_KERNELS = 2.0


def assert_close(got: Tensor, want: Tensor, rtol: float = 1e-5, what: str = "") -> None:
    """max|got - want| <= rtol * max|want| in float64: the specs' relative tolerance, times OTHER_KERNELS on another
    device than the CPU. rtol=0 asks for equality."""
    rtol *= 1.0 if got.device.type == "cpu" else OTHER_KERNELS
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if not want.numel():
        return
    got64, want64 = got.detach().double().cpu(), want.detach().double().cpu()
    assert torch.equal(torch.isfinite(got64), torch.isfinite(want64)), f"{what}: finite values differ in place"
    finite = torch.isfinite(want64)
    error = (got64 - want64)[finite].abs().max().item() if finite.any() else 0.0
    scale = want64[finite].abs().max().item() if finite.any() else 0.0
    assert error <= rtol * max(scale, 1e-12), f"{what}: max error {error:.3e}, allowed {rtol * scale:.3e}"
