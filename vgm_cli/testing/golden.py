"""Golden cases: stored inputs, weights and outputs of reference implementations, and the checks that claim them.

A test module declares `golden = GoldenChecks("dit")`, decorates checks with a predicate over the file's metadata
and tensor names, and has one test taking the `golden_case` fixture; `pytest --golden DIR` adds the files
DIR/<paper>/*.safetensors to the committed cases. A case of a complete paper that no check claims fails,
and so does one whose checks passed without reading every key of its config: they would pass for another value too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map


class Config(dict[str, Any]):
    """A case's config: a dict, nested ones included, that remembers which of its keys were read. Unpacking it with
    `**`, copying it and walking over its items read every key; asking whether a key is there does not."""

    def __init__(self, values: Mapping[str, Any]):
        super().__init__((key, recording(value)) for key, value in values.items())
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default

    def pop(self, key: str, *default: Any) -> Any:
        self.read.add(key)
        return super().pop(key, *default)

    def __iter__(self) -> Iterator[str]:  # its own, so that `**config` and dict(config) come through __getitem__
        return super().__iter__()

    def items(self) -> Any:
        return dict(self).items()

    def values(self) -> Any:
        return dict(self).values()

    def copy(self) -> dict[str, Any]:
        return dict(self)

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    def __ror__(self, other: Any) -> Any:
        return other | dict(self)

    def __eq__(self, other: object) -> bool:
        return dict(self) == other

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        return dict, (dict(self),)

    def leaves(self) -> Iterator[tuple[tuple[str, ...], Any, bool]]:
        """(path, value, was it read) of every key that holds no config of its own, and of each such key inside."""
        for key in list(super().__iter__()):
            value = super().__getitem__(key)
            inner = [(key, value)] if isinstance(value, Config) else []
            if isinstance(value, list):
                inner = [(f"{key}[{i}]", v) for i, v in enumerate(value) if isinstance(v, Config)]
            for name, config in inner:
                for path, leaf, read in config.leaves():
                    yield (name, *path), leaf, read and key in self.read
            if not any(config for _, config in inner):
                yield (key,), value, key in self.read


def recording(value: Any) -> Any:
    """The value with a Config in place of every dict."""
    if isinstance(value, dict):
        return Config(value)
    return [recording(v) for v in value] if isinstance(value, list) else value


def altered(value: Any) -> list[Any]:
    """Other values of a number, a switch, or a list of them, of which a check that honours the key refuses one at
    least: a limit may be moved a little without effect."""
    match value:
        case bool():
            return [not value]
        case int():
            near = value + (1 if -16 < value < 16 else value // 2)
            return [v for v in (near, value // 10, 10 * value + 3, 0, -1, value + 10**6) if v != value]
        case float():
            return [value * 1.25 + 0.01, value * 0.1 - 0.001, value * 10 + 1]
        case [first, *rest]:
            return [[other, *rest] for other in altered(first)]
    return []


class GoldenCase:
    """One golden file. state/inputs/outputs are dicts without their prefix; half-precision state becomes fp32. device:
    where its checks compute. change: other values of config keys, by path, for tests of the checks."""

    def __init__(
        self, path: Path, device: torch.device | str = "cpu", change: Mapping[tuple[str, ...], Any] | None = None
    ):
        self.path, self.device = path, torch.device(device)
        with safe_open(path, framework="pt") as f:
            meta = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys()}
        self.source: str = meta.get("source", "")
        self.notes: str = meta.get("notes", "")
        self.kind: str = meta.get("kind", "")
        config = json.loads(meta.get("config", "{}"))
        for keys, value in (change or {}).items():
            replace(config, keys, value)
        self.config: Any = Config(config)
        self.ignored: dict[str, str] = {}
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

    def ignore(self, *keys: str, why: str) -> None:
        """Nothing that is compared depends on these keys of the config ("seed", "model.dropout"), for this reason."""
        if not why:
            raise ValueError(f"{self}: ignoring {', '.join(keys)} needs a reason")
        self.ignored.update(dict.fromkeys(keys, why))

    def is_ignored(self, path: tuple[str, ...]) -> bool:
        names = [".".join(path[:n]) for n in range(1, len(path) + 1)]
        return any(name in self.ignored or name.partition("[")[0] in self.ignored for name in names)

    def unread(self) -> list[str]:
        """The keys of the config that nothing has read or ignored."""
        return [".".join(path) for path, _, read in self.config.leaves() if not read and not self.is_ignored(path)]

    def __repr__(self) -> str:
        return f"GoldenCase({self.path.parent.name}/{self.path.stem})"


def replace(config: Any, path: tuple[str, ...], value: Any) -> None:
    *outer, last = path
    for key in outer:
        name, _, index = key.partition("[")
        config = config[name] if not index else config[name][int(index[:-1])]
    config[last] = value


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
        """Run every check that claims the case. Unclaimed is a failure; of a complete paper, a key left unread too."""
        checks = self.claims(case)
        if not checks:
            raise AssertionError(f"no check of '{self.paper}' claims {case}: source {case.source!r}")
        for fn in checks:
            if case.device.type == "cpu":
                fn(case)
                continue
            with OnDevice(case.device):
                fn(case)
        if self.partial is None and (unread := case.unread()):
            raise AssertionError(f"the checks of '{self.paper}' never read {', '.join(unread)} of {case}'s config")

    def assumes(self, path: Path, key: tuple[str, ...], value: Any) -> bool:
        """Do the checks pass with every other value of this key of the config, and not say that they ignore it?"""
        for other in altered(value):
            case = GoldenCase(path, change={key: other})
            try:
                self.run(case)
            except Exception:  # whatever the reason: the value was not passed over
                return False
            if case.is_ignored(key):
                return False
        return bool(altered(value))


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


def adam_floor(rate: float, steps: int) -> float:
    """A hundredth of what `steps` steps of Adam can move a parameter: an error that rounding makes where a gradient is
    little more than rounding itself, since Adam divides it by its own size. For assert_close's floor."""
    return 0.01 * rate * steps


def angle_floor(largest: float) -> float:
    """How far a sine of an angle up to `largest` may be off since the angle is rounded, which kernels of other machines
    do otherwise: half a unit in the last place. For assert_close's floor."""
    return 2.0**-24 * largest


def assert_close(got: Tensor, want: Tensor, rtol: float = 1e-5, what: str = "", floor: float = 0.0) -> None:
    """max|got - want| <= rtol * max|want| in float64: the specs' relative tolerance, times OTHER_KERNELS on another
    device than the CPU. rtol=0 asks for equality. floor: an absolute error allowed all the same, see adam_floor and
    angle_floor."""
    rtol *= 1.0 if got.device.type == "cpu" else OTHER_KERNELS
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if not want.numel():
        return
    got64, want64 = got.detach().double().cpu(), want.detach().double().cpu()
    assert torch.equal(torch.isfinite(got64), torch.isfinite(want64)), f"{what}: finite values differ in place"
    finite = torch.isfinite(want64)
    error = (got64 - want64)[finite].abs().max().item() if finite.any() else 0.0
    scale = want64[finite].abs().max().item() if finite.any() else 0.0
    allowed = max(rtol * max(scale, 1e-12), floor)
    assert error <= allowed, f"{what}: max error {error:.3e}, allowed {allowed:.3e}"
