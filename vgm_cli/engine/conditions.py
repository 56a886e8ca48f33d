"""Conditions at work: the columns of the data that they read, their weights, and items of the data for whoever asks for
none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vgm_cli.api import Companions, HasClasses, ReadsPictures
from vgm_cli.conditioning import Conditions, Part, Picture, build_parts, missing_column
from vgm_cli.data import Dataset
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.facts import Facts
from vgm_cli.errors import MISSING_ASSET, USAGE, VgmError
from vgm_cli.nn.meta import on_meta

ANY = {"image_size": 8, "image_channels": 3, "num_classes": 1}  # facts, where only names are asked for


def columns_of(nodes: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Names of the columns of pictures that a recipe's conditions read; `image` is the image itself."""
    plain = {name: {k: v for k, v in n.items() if k != "items"} for name, n in (nodes or {}).items() if n is not None}
    with on_meta():
        conditions = Conditions(build_parts(plain, ANY))
    reads = [c for p in conditions.of_pictures() if isinstance(p.condition, ReadsPictures) for c in p.condition.reads]
    return tuple(dict.fromkeys(reads))


def beside(nodes: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Those of them that lie beside the images."""
    return tuple(c for c in columns_of(nodes) if c != "image")


def conditions_for(
    nodes: Mapping[str, Any], facts: Facts, model: Any = None, codec: Any = None, drawn: bool = False
) -> Conditions:
    """The conditions of a recipe, for its network; encoders whose weights lie in a file have these. VgmError: a
    condition is to be dropped and nothing says what no condition is, a file is missing or is another encoder's, an
    encoder would stay as it was drawn, unless its file is the user's to name and it is drawn for timing alone."""
    conditions = Conditions(build_parts(nodes, asdict(facts), codec), model)
    if isinstance(model, HasClasses) and not model.num_classes:
        conditions.parts = {n: p for n, p in conditions.parts.items() if p.condition.column != "label"}
    conditions.check()
    for name, part in conditions.parts.items():
        if not isinstance(part.condition, nn.Module):
            continue
        if part.weights:
            read_encoder(part.condition, weights_file(part.weights, name), name)
            part.condition.requires_grad_(part.trained)
        elif not part.trained and any(p.requires_grad for p in part.condition.parameters()):
            if "weights" in nodes[name] and (drawn or any(p.is_meta for p in part.condition.parameters())):
                continue  # a file that the user names, see check_files
            hint = f"conditions.{name}.train=true, or conditions.{name}.weights=RUN|FILE"
            raise VgmError(f"conditions.{name} has weights that nothing trains and no file holds", hint, USAGE)
    return conditions


def check_files(nodes: Mapping[str, Any], recipe: str) -> None:
    """VgmError (code 4): an encoder's weights or its tokenizer is a file of the user's, and none is named."""
    for name, node in nodes.items():
        for key in ("weights", "tokenizer"):
            if node is not None and key in node and node[key] is None:
                where = f"conditions.{name}.{key}"
                hint = f"{where}=FILE; `vgm cat {recipe}` shows the recipe, whose first lines say which"
                raise VgmError(f"this recipe needs a file for {where}", hint, MISSING_ASSET)


def weights_file(weights: str, name: str) -> Path:
    """The file of an encoder's weights: itself, or the one beside a run's network. VgmError: there is none."""
    path = ckpt.resolve(weights)
    file = path if path.stem == name else path.parent / f"{name}.safetensors"
    if not file.is_file():
        raise VgmError(f"conditions.{name}: {weights} has no {file.name}", f"conditions.{name}.weights=FILE", USAGE)
    return file


def read_encoder(encoder: nn.Module, file: Path, name: str) -> None:
    """Weights into an encoder; on the meta device there is nowhere to put them."""
    if any(p.is_meta for p in encoder.parameters()):
        return
    tensors, _ = ckpt.read_tensors(file)
    ckpt.check_fit(encoder, tensors, file, name)
    ckpt.refuse_non_finite(tensors, file)
    encoder.load_state_dict(tensors)


class Numbered:
    """A condition on pictures whose keywords carry a number, for a further network that is told what the first one is
    told, too."""

    def __init__(self, condition: Any, k: int):
        self.own, self.k = condition, k
        self.column, self.choices = condition.column, condition.choices
        self.reads, self.draws = condition.reads, condition.draws

    def numbered(self, keywords: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {f"{name}_{self.k}": value for name, value in keywords.items()}

    def parse(self, words: Sequence[str]) -> list[Any]:
        found: list[Any] = self.own.parse(words)
        return found

    def items_of(self, columns: Mapping[str, torch.Tensor], drawn: Sequence[torch.Generator]) -> torch.Tensor:
        found: torch.Tensor = self.own.items_of(columns, drawn)
        return found

    def encode(self, items: Sequence[Any], device: torch.device) -> dict[str, torch.Tensor]:
        return self.numbered(self.own.encode(items, device))

    def null(self, n: int, device: torch.device) -> dict[str, torch.Tensor]:
        return self.numbered(self.own.null(n, device))

    def example(self, n: int, device: torch.device) -> dict[str, torch.Tensor]:
        return self.numbered(self.own.example(n, device))


def adopt_hints(conditions: Conditions, sampler: Any) -> None:
    """The pictures that a sampler's companions follow become conditions, NAME2 for the second network's NAME."""
    for k, other in enumerate((sampler.also or []) if isinstance(sampler, Companions) else [], 1):
        for part in other.conditions.of_pictures():
            name = f"{part.name}{k + 1}"
            conditions.parts[name] = replace(part, name=name, condition=Numbered(part.condition, k), component=None)


def followed(conditions: Conditions, given: Mapping[str, Sequence[Any]], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The pictures that samples x (N, C, H, W) were to follow, of their size, by condition."""
    rows = {}
    for part in conditions.of_pictures():
        pictures = torch.stack([item.pixels for item in given[part.name]]).float()
        if pictures.shape[1] in (1, x.shape[1]):
            rows[part.name] = F.interpolate(pictures, x.shape[-2:]).expand_as(x)
    return rows


# -- items of the data -------------------------------------------------------------------------------------------------


class OfData(Sequence[Any]):
    """The items that one condition would have of these rows of a data set, read when they are looked at."""

    def __init__(self, dataset: Any, part: Part, rows: Sequence[int]):
        self.dataset, self.part, self.rows = dataset, part, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: Any) -> Any:
        return self.read(self.rows[at]) if isinstance(at, slice) else self.read([self.rows[at]])[0]

    def read(self, rows: Sequence[int]) -> list[Any]:
        items = self.part.of_data(self.dataset.gather(rows), rows)
        if items is None:
            raise missing_column(self.part, self.part.column)
        if isinstance(self.part.condition, ReadsPictures):
            return [Picture(x) for x in items]
        return items.tolist() if isinstance(items, torch.Tensor) else list(items)


def give_of_data(conditions: Conditions, dataset: Any, rows: Sequence[int]) -> None:
    """Let conditions that are no choice of a few ask for what these rows of the data have, where their recipe says
    nothing, and the labels go with them. VgmError: the data lacks a column."""
    open_ones = [p for p in conditions.parts.values() if not len(p.items)]
    for part in open_ones:
        check_column(part, dataset)
        part.given = OfData(dataset, part, rows)
    label = conditions.of_column("label")
    if open_ones and label is not None and dataset.facts.labels is not None:
        label.given = [int(dataset.facts.labels[row]) for row in rows]


def check_column(part: Part, dataset: Any) -> None:
    """VgmError: the data has no column of a condition."""
    f = dataset.facts
    there = {*f.columns, *(["text"] if f.captions else []), *(["label"] if f.labels is not None else [])}
    there |= {"image"} if isinstance(dataset, Dataset) else set()
    reads = part.condition.reads if isinstance(part.condition, ReadsPictures) else (part.column,)
    if missing := [c for c in reads if c not in there]:
        raise missing_column(part, missing[0])
