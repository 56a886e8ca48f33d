"""Conditions: what a network is told besides x and t. The host applies them, before the objective and before the
sampler, as it does the codec.

    conditions: {class: {dropout: 0.1}, text: {name: words, train: true}, hint: {column: lineart}}

Each entry is a component of the kind `condition` (by its key where it has no `name`), which turns items of one column
of the data, or what the user typed, into keywords of the network. dropout: share of rows that see no condition while
training. train: its weights are trained, as a role. weights: the file that they are read from, a run's or its own.
column: another column of the data than its own. items: what is asked for where there is no data and nobody types,
words as on the command line. guided: whether guidance leads away from it, too; of a picture false unless it is said.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vgm_cli import limits
from vgm_cli.api import Batch, Condition, NullCondition, ReadsPictures, Step, generators, seed_of
from vgm_cli.data.dataset import to_float
from vgm_cli.data.decode import image_files
from vgm_cli.data.texts import decode
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.ranges import Fraction, Whole, fit
from vgm_cli.recipe import HOST_KEYS
from vgm_cli.registry import load_target, registry, signature

CACHED = 2**30  # bytes of features of a frozen encoder that are kept
OPTIONS = {"label": "--label", "text": "--prompt"}  # on the command line; of all other columns: --hint
ASK = {
    "label": ("this network is told a class", "--label 3,7"),
    "text": ("this model draws what a text says", "--prompt TEXT, or --prompts FILE"),
}


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


class Picture:
    """A picture as an item: pixels (C, H, W) of a condition's own range; equal to others of the same pixels."""

    def __init__(self, pixels: Tensor):
        self.pixels = pixels.detach().cpu()
        self.key = hashlib.blake2b(self.pixels.contiguous().numpy().tobytes(), digest_size=16).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Picture) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


class InTurn(Sequence[Any]):
    """Items at these places, one after the other and from the first again, each made when it is looked at."""

    def __init__(self, items: Sequence[Any], places: Iterable[int]):
        self.items, self.places = items, list(places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self.items[p % len(self.items)] for p in self.places[at]]
        return self.items[self.places[at] % len(self.items)]


# -- those of a recipe or of a checkpoint ------------------------------------------------------------------------------


@dataclass
class Part:
    """One condition by its name."""

    name: str
    condition: Condition
    column: str
    dropout: float = 0.0
    trained: bool = False
    weights: str | None = None  # the file that its encoder is read from; a checkpoint then keeps it, too
    component: Mapping[str, Any] | None = None  # its description, for a checkpoint's header
    given: Sequence[Any] = ()  # what is asked for where the user asks for nothing; else the condition's choices
    guided: bool = True  # no condition, in guidance's other half, is without this one, too

    @property
    def items(self) -> Sequence[Any]:
        """What is asked for, one after the other, where the user asks for nothing."""
        return self.given if len(self.given) else self.condition.choices

    def in_turn(self, places: Iterable[int], items: Sequence[Any] = ()) -> Sequence[Any]:
        """The items (without any, its own) one after the other, at these places of an endless row. VgmError: there are
        none."""
        items = items if len(items) else self.items
        if not len(items):
            raise VgmError(*ASK.get(self.condition.column, ("this model follows a picture", "--hint IMAGE")), USAGE)
        rows = InTurn(items, places)
        return rows[:] if isinstance(items, list | tuple | range) else rows

    def in_batch(self, batch: Mapping[str, Any], seeds: Callable[[int], Iterable[int]]) -> Any:
        """Its items of a batch of the data's columns. seeds: one for each of n rows. VgmError: a column is missing."""
        condition = self.condition
        if not isinstance(condition, ReadsPictures):
            if self.column not in batch:
                raise missing_column(self, self.column)
            return batch[self.column]
        if missing := [c for c in condition.reads if c not in batch]:
            raise missing_column(self, missing[0])
        n = len(batch[condition.reads[0]])
        drawn = generators(seeds(n) if condition.draws else range(n))
        return condition.items_of({c: batch[c] for c in condition.reads}, drawn)

    def of_data(self, batch: Mapping[str, Any], rows: Iterable[int]) -> Any:
        """Its items of rows of a data set, as `gather` gives them; None where a column is not there."""
        columns = {"image": batch["x"], **batch} if "x" in batch else batch
        reads = self.condition.reads if isinstance(self.condition, ReadsPictures) else (self.column,)
        if any(c not in columns for c in reads):
            return None
        pictures = {k: to_float(v) for k, v in columns.items() if isinstance(v, Tensor) and v.dtype == torch.uint8}
        return self.in_batch({**columns, **pictures}, lambda n: [seed_of("item", self.name, row) for row in rows])

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
        """The encoders that a checkpoint keeps, by role: those that are trained, and those that were read from a
        file."""
        kept = {n: p.condition for n, p in self.parts.items() if p.trained or p.weights}
        return {n: c for n, c in kept.items() if isinstance(c, nn.Module)}

    def components(self) -> dict[str, Any]:
        """{name: node} for a checkpoint's header."""
        return {n: dict(p.component or {}) for n, p in self.parts.items()}

    def to(self, device: torch.device) -> None:
        for part in self.parts.values():
            if isinstance(part.condition, nn.Module):
                part.condition.to(device)

    def of_column(self, column: str) -> Part | None:
        """The first condition on labels, or on texts."""
        return next(iter(self.on(column)), None)

    def on(self, column: str) -> list[Part]:
        """All conditions on labels, or on texts, of which two encoders may read the same."""
        return [p for p in self.parts.values() if p.condition.column == column]

    def of_pictures(self) -> list[Part]:
        """The conditions on pictures."""
        return [p for p in self.parts.values() if isinstance(p.condition, ReadsPictures)]

    def asked(self, items: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
        """{name: items} by column, as a request has them."""
        return {self.parts[name].condition.column: own for name, own in items.items()}

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
        if isinstance(items, Tensor) and items.ndim > 1:
            if isinstance(part.condition, ReadsPictures) and part.condition.draws:  # no picture comes twice
                with torch.no_grad():
                    return part.condition.encode(items, device)
            items = [Picture(row) for row in items]
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

    def null(
        self, device: torch.device, instead: Mapping[str, Sequence[Any]] | None = None, guided: bool = True
    ) -> dict[str, Tensor]:
        """What the conditions themselves know of no condition, one row. instead: {name: an item that takes its place},
        a text to be guided away from. guided: only of those that guidance leads away from."""
        out: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            if given := (instead or {}).get(name):
                out |= self.encoded(part, given, device)
            elif part.guided or not guided:
                out |= part.condition.null(1, device)
        return out

    def example(self, n: int, device: torch.device) -> Batch:
        """What `apply` adds to a batch, without items: for counting and timing."""
        every = list(self.parts.values())
        null = [p for p in every if p.guided and isinstance(p.condition, nn.Module)]
        cond = {k: v for p in every for k, v in p.condition.example(n, device).items()}
        return {"cond": cond, "null": {k: v for p in null for k, v in p.condition.example(1, device).items()}}

    # -- training

    def apply(self, batch: Batch, step: Step, trained: bool = False) -> Batch:
        """The batch with "cond", some rows of it dropped, and "null". trained: only the conditions whose encoders are
        trained, inside the loss that trains them; else only the others. VgmError: the data has no such column."""
        parts = [p for p in self.parts.values() if p.trained == trained]
        out = batch if trained and not parts else {**batch}
        if parts or not trained:
            out["cond"], out["null"] = dict(batch.get("cond", {})), dict(batch.get("null", {}))
        for part in parts:

            def seeds(n: int, name: str = part.name) -> list[int]:
                return [seed_of(step.seed, step.index, f"{name} operator", i) for i in step.rows(n)[0]]

            self.tell(out, part, self.encoded(part, part.in_batch(batch, seeds), step.device), step)
        return out

    def known(self, batch: Batch, cond: Mapping[str, Tensor], step: Step) -> Batch:
        """The batch with keywords that are known already, such as those of a teacher's pairs, as `apply` gives them."""
        out = {**batch, "cond": {}, "null": {}}
        for part in self.parts.values():
            own = {k: cond[k] for k in part.condition.example(1, torch.device("meta")) if k in cond}
            if own:
                self.tell(out, part, own, step)
        return out

    def tell(self, batch: Batch, part: Part, own: dict[str, Tensor], step: Step) -> None:
        """Put one condition's keywords into a batch, some rows dropped, and what stands for none."""
        null = part.condition.null(1, step.device)
        if part.dropout > 0 and (null or isinstance(self.network, NullCondition)):
            own = self.drop(part, own, null, step)
        batch["cond"] |= own
        batch["null"] |= null if part.guided else {}

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


def missing_column(part: Part, column: str) -> VgmError:
    hint = {"text": "captions come from .txt files beside the images, metadata.jsonl, …", "label": "class sub-folders"}
    message = f"conditions.{part.name} reads '{column}', which the data does not have"
    return VgmError(message, hint.get(column, f"docs/data.md says where {column} comes from"), USAGE)


def settings(node: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What the host itself reads of a condition's node. VgmError: a dropout out of its range."""
    return {
        "dropout": fit(node.get("dropout") or 0.0, Fraction, f"{where}.dropout"),
        "trained": fit(node.get("train", False), bool, f"{where}.train"),
        "weights": fit(node.get("weights"), str | None, f"{where}.weights"),
    }


def build_parts(nodes: Mapping[str, Any], facts: Mapping[str, Any], codec: Any = None) -> list[Part]:
    """The conditions of a recipe's or a header's `conditions:`, open keywords filled from the facts of the data. One on
    labels is left out where there are no classes. codec: the frozen one that the model's samples are behind."""
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
        if "column" in params and node.get("column"):
            kwargs["column"] = node["column"]
        if "channels" in params and kwargs.get("channels") is None:
            of_column = (facts.get("columns") or {}).get(node.get("column") or component.name)
            kwargs |= {"channels": found} if (found := of_column or facts.get("image_channels")) else {}
        condition: Condition = registry().build("condition", {"name": component.name, **kwargs}, codec=codec)
        if condition.column == "label" and not facts.get("num_classes"):
            if isinstance(condition, nn.Module):  # the network has a place for what it makes
                hint = f"class sub-folders give labels; conditions.{name}=null, and a network that is told nothing"
                if facts.get("captions") and kwargs.get("width"):
                    words = f"{{name: words, width: {kwargs['width']}, train: true, dropout: 0.1}}"
                    hint = f"told its captions: conditions.{name}=null 'conditions.text={words}'"
                raise VgmError(f"conditions.{name} is of classes, which the data does not have", hint, USAGE)
            continue
        kept = {k: v for k, v in kwargs.items() if k not in component.from_data or own.get(k) is not None}
        described = {"name": component.name, **kept}
        said = settings(node, f"conditions.{name}")
        described |= {"train": True} if said["trained"] or said["weights"] else {}  # its weights lie beside the file
        described |= {k: node[k] for k in ("column", "guided") if node.get(k) is not None}
        guided = fit(node.get("guided"), bool | None, f"conditions.{name}.guided")
        said["guided"] = not isinstance(condition, ReadsPictures) if guided is None else guided
        part = Part(name, condition, node.get("column") or condition.column, component=described, **said)
        part.given = condition.parse(words_of(node["items"], name)) if node.get("items") else ()
        parts.append(part)
    return parts


def words_of(items: Any, name: str) -> list[str]:
    """What a recipe says is asked for: a list, the lines of a .txt file, a picture or a folder of them, or one text."""
    if isinstance(items, str) and items.endswith(".txt"):
        items = lines_of(Path(items), f"conditions.{name}.items")
    elif isinstance(items, str):
        items = list(map(str, image_files(items))) if Path(items).exists() else [items]
    return fit(items, list[str], f"conditions.{name}.items")


def lines_of(file: Path, option: str) -> list[str]:
    """The lines of a text file, in any usual encoding, that are not empty. VgmError: there is none."""
    text = decode(limits.read_bytes(file, code=USAGE), f"{option} {file}")
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise VgmError(f"{option} {file} is empty", "one prompt a line", USAGE)
    return found
