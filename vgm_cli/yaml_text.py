"""YAML as recipes and the command line write it: 1e-4 is a number, and no text can exhaust the parser."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import yaml

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.limits import short


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # libyaml's parser, if it is there
    """YAML 1.1 reads 1e-4 as a string; this reads it as the number everybody means."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


YAML_SIZE = 100_000  # characters of one text; a recipe has two thousand, and the parser reads 50,000 in a second
YAML_DEPTH = 50
DEEP = re.compile(r"(?:[\[{]\s*){50}")
YAML_MORE = 10_000  # nodes that anchors may repeat; a node is a value, a list or a mapping


def parse_yaml(text: str, where: str) -> Any:
    """VgmError: not YAML, too long, too deep, or unfolding without end through its anchors."""
    return copy.deepcopy(_parsed(text, short(where)))


@functools.lru_cache(maxsize=512)
def _parsed(text: str, where: str) -> Any:
    """What parse_yaml copies: recipes and their bases are read several times in one command."""
    if len(text) > YAML_SIZE:
        raise VgmError(f"{where} has {len(text):,} characters, more than {YAML_SIZE:,}", code=USAGE)
    if DEEP.search(text):
        raise VgmError(f"{where} is nested too deeply", code=USAGE)  # before the parser looks ahead for every bracket
    try:
        loader = _Loader(text)  # refuses characters that YAML has not
        node = loader.get_single_node()
        if node is None:
            return None
        _unfolded(node, {}, (), where)
        return loader.construct_document(node)
    except RecursionError as e:
        raise VgmError(f"{where} is nested too deeply", code=USAGE) from e
    except (ValueError, OverflowError) as e:  # a date or a number that is none
        raise VgmError(f"{where} is not valid YAML", short(str(e)), USAGE) from e
    except yaml.YAMLError as e:
        line = f" line {e.problem_mark.line + 1}" if isinstance(e, yaml.MarkedYAMLError) and e.problem_mark else ""
        raise VgmError(f"{where}:{line} is not valid YAML", str(getattr(e, "problem", "") or ""), USAGE) from e


def _unfolded(node: yaml.Node, known: dict[int, int], above: tuple[int, ...], where: str) -> int:
    """Nodes below `node`, those of an anchor counted wherever it is named."""
    if id(node) in above:
        raise VgmError(f"{where}: an anchor holds itself", code=USAGE)
    if len(above) > YAML_DEPTH:
        raise VgmError(f"{where} is nested too deeply", code=USAGE)
    if id(node) not in known:
        inside = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [p for pair in inside for p in pair] if isinstance(node, yaml.MappingNode) else inside
        known[id(node)] = 1 + sum(_unfolded(p, known, (*above, id(node)), where) for p in parts)
        if known[id(node)] > YAML_MORE + len(known):
            raise VgmError(f"{where}: its anchors repeat too much", code=USAGE)
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":int") and len(node.value) > 100:
            raise VgmError(f"{where}: a number of {len(node.value)} digits", code=USAGE)
    return known[id(node)]
