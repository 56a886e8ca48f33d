"""Conditions: what a network is told besides x and t. The host applies them, before the objective and before the
sampler, as it does the codec.

    conditions: {class: {dropout: 0.1}, text: {name: words, train: true}, hint: {column: lineart}}

Each entry is a component of the kind `condition` (by its key where it has no `name`), which turns items of one column
of the data, or what the user typed, into keywords of the network. dropout: share of rows that see no condition while
training. train: its weights are trained, as a role. column: another column of the data than its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vgm_cli.api import Batch, Condition, NullCondition, Step
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.ranges import Fraction, Whole, fit
from vgm_cli.recipe import HOST_KEYS
from vgm_cli.registry import load_target, registry, signature

CACHED = 2**30  # bytes of features of a frozen encoder that are kept
OPTIONS = {"label": "--label", "text": "--prompt"}  # on the command line; of all other columns: --hint


def unconditional(network: Any, cond: Mapping[str, Tensor], null: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """The keywords of no condition beside cond, of the same shapes: for guidance's other half, and for dropped rows.

    null: those that the network does not know, of one row or of as many as cond; they go before the network's own.
    VgmError: neither says what no condition is.
    """
    own = network.null_condition(dict(cond)) if isinstance(network, NullCondition) else None
    if own is None and not null:
        raise VgmError("this network has no null class to be guided away from", "guidance_scale=1", USAGE)
    given = {k: v.expand_as(cond[k]) for k, v in (null or {}).items() if k in cond}
    return {**cond, **(own or {}), **given}


class ClassLabel:
    """The class of an image: {"y": (B,) int64}. class_names: what --label may say in place of numbers."""

    column = "label"

    def __init__(self, num_classes: Whole = 0, class_names: list[str] | None = None):
        self.num_classes, self.class_names = num_classes, class_names or []
        self.choices: Sequence[Any] = range(num_classes)

    def parse(self, words: Sequence[str]) -> list[Any]:
        """Numbers, or names of classes -> numbers."""
        return [self.number(w) for w in words]

    def number(self, word: str) -> int:
        if word in self.class_names:
            return self.class_names.index(word)
        if not word.lstrip("-").isdigit():
            raise unknown("class", word, self.class_names)
        if not 0 <= int(word) < self.num_classes:
            raise VgmError(f"label {int(word)} does not exist", f"labels are 0 to {self.num_classes - 1}", USAGE)
        return int(word)

    def encode(self, items: Sequence[Any], device: torch.device) -> dict[str, Tensor]:
        return {"y": torch.as_tensor(items, dtype=torch.long, device=device)}

    def null(self, n: int, device: torch.device) -> dict[str, Tensor]:
        return {}  # whether there is a row for no class, the network says

    def example(self, n: int, device: torch.device) -> dict[str, Tensor]:
        return {"y": torch.zeros(n, dtype=torch.long, device=device)}


# -- those of a recipe or of a checkpoint ------------------------------------------------------------------------------


@dataclass
class Part:
    """One condition by its name. component: its description, for a checkpoint's header."""

    name: str
    condition: Condition
    column: str
    dropout: float = 0.0
    trained: bool = False
    component: Mapping[str, Any] | None = None

    def in_turn(self, places: Iterable[int], items: Sequence[Any] = ()) -> list[Any]:
        """The items (without any, all that there are) one after the other, at these places of an endless row."""
        items = items or self.condition.choices
        if not len(items):
            says = {"text": ("this model draws what a text says", '--prompt "a red circle", or --prompts FILE')}
            raise VgmError(*says.get(self.condition.column, ("this model follows a picture", "--hint IMAGE")), USAGE)
        return [items[i % len(items)] for i in places]

    @property
    def option(self) -> str:
        """How the command line asks for it."""
        return OPTIONS.get(self.condition.column, "--hint")


class Conditions:
    """All conditions of a network. network: what says what no condition is, where the conditions do not."""

    def __init__(self, parts: Iterable[Part] = (), network: nn.Module | None = None):
        self.parts = {p.name: p for p in parts}
        self.network = network
        self.features: OrderedDict[tuple[str, Any], dict[str, Tensor]] = OrderedDict()  # of frozen encoders, by item
        self.bytes = 0

    def __bool__(self) -> bool:
        return bool(self.parts)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The encoders that are trained, by role."""
        return {n: p.condition for n, p in self.parts.items() if p.trained and isinstance(p.condition, nn.Module)}

    def components(self) -> dict[str, Any]:
        """{name: node} for a checkpoint's header."""
        return {n: dict(p.component or {}) for n, p in self.parts.items()}

    def to(self, device: torch.device) -> None:
        for part in self.parts.values():
            if isinstance(part.condition, nn.Module):
                part.condition.to(device)

    def of_column(self, *columns: str) -> Part | None:
        """The first condition on a kind of items."""
        return next((p for p in self.parts.values() if p.condition.column in columns), None)

    # -- items to keywords

    def encode(self, items: Mapping[str, Sequence[Any]], device: torch.device) -> dict[str, Tensor]:
        """{name: items} -> keywords of the network, one row for each item."""
        cond: dict[str, Tensor] = {}
        for name, own in items.items():
            cond |= self.encoded(self.parts[name], own, device)
        return cond

    def encoded(self, part: Part, items: Sequence[Any], device: torch.device) -> dict[str, Tensor]:
        """Keywords of one condition; a frozen encoder sees each distinct item once."""
        if part.trained or not isinstance(part.condition, nn.Module):
            return part.condition.encode(items, device)
        rows = {i: self.features.get((part.name, i)) for i in items}
        new = [i for i, found in rows.items() if found is None]
        if new:
            with torch.no_grad():
                made = part.condition.encode(new, device)
            for at, item in enumerate(new):
                rows[item] = {k: v[at] for k, v in made.items()}
                self.keep((part.name, item), {k: v[at].clone() for k, v in made.items()})
        found = [row for i in items if (row := rows[i]) is not None]
        return {k: torch.stack([row[k] for row in found]).to(device) for k in found[0]}

    def keep(self, key: tuple[str, Any], row: dict[str, Tensor]) -> None:
        """Remember an item's features; the oldest go where they are too many."""
        self.features[key] = row
        self.bytes += sum(v.nbytes for v in row.values())
        while self.bytes > CACHED and len(self.features) > 1:
            _, old = self.features.popitem(last=False)
            self.bytes -= sum(v.nbytes for v in old.values())

    def null(self, device: torch.device, instead: Mapping[str, Sequence[Any]] | None = None) -> dict[str, Tensor]:
        """What the conditions themselves know of no condition, one row. instead: {name: an item that takes its place},
        a text to be guided away from."""
        out: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            given = (instead or {}).get(name)
            out |= self.encoded(part, given, device) if given else part.condition.null(1, device)
        return out

    def example(self, n: int, device: torch.device) -> Batch:
        """What `apply` adds to a batch, without items: for counting and timing."""
        cond: dict[str, Tensor] = {}
        for part in self.parts.values():
            cond |= part.condition.example(n, device)
        return {"cond": cond, "null": {}}

    # -- training

    def apply(self, batch: Batch, step: Step, trained: bool = False) -> Batch:
        """The batch with "cond", some rows of it dropped, and "null". trained: only the conditions whose encoders are
        trained, inside the loss that trains them; else only the others. VgmError: the data has no such column."""
        parts = [p for p in self.parts.values() if p.trained == trained]
        out = batch if trained and not parts else {**batch}
        if parts or not trained:
            out["cond"], out["null"] = dict(batch.get("cond", {})), dict(batch.get("null", {}))
        for part in parts:
            if part.column not in batch:
                raise missing_column(part)
            own = self.encoded(part, batch[part.column], step.device)
            null = part.condition.null(1, step.device)
            if part.dropout > 0 and (null or isinstance(self.network, NullCondition)):
                own = self.drop(part, own, null, step)
            out["cond"] |= own
            out["null"] |= null
        return out

    def drop(self, part: Part, own: dict[str, Tensor], null: dict[str, Tensor], step: Step) -> dict[str, Tensor]:
        """Some rows of one condition without it: a function of the step, the same whatever process they are on."""
        other = unconditional(self.network, own, null)
        n = len(next(iter(own.values())))
        where = step.rand(n, f"{part.name} dropout") < part.dropout
        return {k: torch.where(where.view(-1, *[1] * (v.ndim - 1)), other[k].to(v), v) for k, v in own.items()}

    def check(self) -> None:
        """VgmError: a condition is to be dropped and the network was built without a null class."""
        for part in self.parts.values():
            if part.dropout > 0 and isinstance(self.network, NullCondition):
                try:
                    self.network.null_condition(part.condition.example(1, torch.device("meta")))
                except VgmError as e:
                    message = f"conditions.{part.name} cannot be dropped: {e.message}"
                    raise VgmError(message, f"conditions.{part.name}.dropout=0; {e.hint}", USAGE) from e


def missing_column(part: Part) -> VgmError:
    hint = {"text": "captions come from .txt files beside the images, metadata.jsonl, …", "label": "class sub-folders"}
    message = f"conditions.{part.name} reads '{part.column}', which the data does not have"
    return VgmError(message, hint.get(part.column, f"docs/data.md says where {part.column} comes from"), USAGE)


def settings(node: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What the host itself reads of a condition's node. VgmError: a dropout out of its range."""
    return {
        "dropout": fit(node.get("dropout") or 0.0, Fraction, f"{where}.dropout"),
        "trained": fit(node.get("train", False), bool, f"{where}.train"),
    }


def build_parts(nodes: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Part]:
    """The conditions of a recipe's or a header's `conditions:`, open keywords filled from the facts of the data. One on
    labels is left out where there are no classes."""
    parts = []
    for name, node in nodes.items():
        if node is None:
            continue
        own = {k: v for k, v in node.items() if k not in HOST_KEYS["conditions"]}
        component, kwargs = registry().config("condition", {"name": name, **own})
        params = signature(load_target(component.target, component.name)).parameters
        for keyword, fact in component.from_data.items():
            if kwargs.get(keyword) is None and keyword in params and facts.get(fact) is not None:
                kwargs[keyword] = facts[fact]
        condition: Condition = registry().build("condition", {"name": component.name, **kwargs})
        if condition.column == "label" and not facts.get("num_classes"):
            continue
        described = {"name": component.name, **{k: v for k, v in kwargs.items() if k not in component.from_data}}
        described |= {k: node[k] for k in ("train", "column", "weights") if k in node}
        column = node.get("column") or condition.column
        parts.append(Part(name, condition, column, component=described, **settings(node, f"conditions.{name}")))
    return parts
