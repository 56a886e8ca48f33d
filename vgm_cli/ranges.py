"""What settings may be: ranges as annotations, and the one function that fits a value to an annotation.

A component's constructor writes `dropout: Fraction = 0.0` and whatever lies outside is refused before anything is
built, with the setting's name. Torch-free, and pydantic is imported when the first value is fitted.
"""

from __future__ import annotations

import types
import typing
from functools import lru_cache
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt, MinLen

from vgm_cli.errors import USAGE, VgmError

Count = Annotated[int, Ge(1), Le(10**9)]  # of things: at least one
Whole = Annotated[int, Ge(0), Le(10**9)]  # none is possible, too
Steps = Annotated[int, Ge(1), Le(10**6)]  # of a sampler, of a noise schedule
Depth = Annotated[int, Ge(1), Le(1000)]  # layers, blocks, heads: what a constructor loops over
Blocks = Annotated[int, Ge(0), Le(1000)]  # the same where none is possible
Few = Depth  # columns, intervals: other small numbers
Width = Annotated[int, Ge(1), Le(2**16)]  # channels, features
Images = Annotated[int, Ge(1), Le(10**8)]  # to make
Vocabulary = Annotated[int, Ge(1), Le(2**24)]  # codes, tokens
Side = Annotated[int, Ge(1), Le(2**16)]  # pixels
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]
Percent = Annotated[int, Ge(1), Le(100)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
Decay = Annotated[float, Ge(0), Lt(1)]  # of an average; 1 would never move
Rate = Annotated[float, Ge(0), Lt(1)]  # of dropout; 1 would leave nothing
MAY_BE_INFINITE = "may be infinite"
Unbounded = Annotated[float, Ge(0), MAY_BE_INFINITE]
Text = Annotated[str, MinLen(1)]
LARGEST = 2**63 - 1  # no library below takes a longer integer


def fit(value: Any, annotation: Any, name: str) -> Any:
    """The value as the annotation wants it ("1e-4" becomes a number, a list a tuple).

    Raises VgmError (exit code 2), which names the setting: another type, out of range, not finite where nothing says
    it may be, a yes or no where a number is wanted.
    """
    from pydantic import ValidationError

    adapter, hint = _adapter(annotation), ""
    if adapter is None:
        return value
    if (said := _misfit(value, annotation)) is None:
        try:
            return adapter.validate_python(value)
        except ValidationError as e:
            said = e.errors()[0]["msg"].lower()
            if e.errors()[0]["type"] == "list_type" and not isinstance(value, dict):
                hint = f"one of them: {name}=[{shown(value)}]"
        except RecursionError:
            said = "it is nested too deeply"
    raise VgmError(f"{name}={shown(value)} does not fit: {said}", hint, USAGE)


def ordered(low: float | None, high: float | None, names: str) -> None:
    """VgmError: both are given and the first is not below the second. names: "sigma_min, sigma_max"."""
    if low is not None and high is not None and not low < high:
        raise VgmError(f"{names}: {low:g} is not below {high:g}", code=USAGE)


def shown(value: Any) -> str:
    """A value as an error message shows it: its repr, shortened."""
    import reprlib

    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    return short.repr(value)


def _misfit(value: Any, annotation: Any) -> str | None:
    """What pydantic would let pass: True as 1, and integers that no tensor library takes."""
    found = list(_scalars(value))
    if any(isinstance(v, bool) for v in found) and not _takes_bool(annotation):
        return "a number or a word is wanted, not yes or no"
    if any(isinstance(v, int) and abs(v) > LARGEST for v in found):
        return f"numbers end at {LARGEST}"
    return None


def _scalars(value: Any, depth: int = 0) -> typing.Iterator[Any]:
    if isinstance(value, list | tuple | dict) and depth < 20:
        for v in value.values() if isinstance(value, dict) else value:
            yield from _scalars(v, depth + 1)
    else:
        yield value


def _takes_bool(annotation: Any) -> bool:
    if annotation in (bool, Any, object):
        return True
    if typing.get_origin(annotation) is typing.Literal:
        return any(isinstance(a, bool) for a in typing.get_args(annotation))
    return any(_takes_bool(a) for a in typing.get_args(annotation))


def _parts(annotation: Any) -> typing.Iterator[Any]:
    yield annotation
    for a in typing.get_args(annotation):
        yield from _parts(a)


@lru_cache(maxsize=4096)
def _cached(annotation: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter
    from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

    infinite = any(p == MAY_BE_INFINITE for p in _parts(annotation) if isinstance(p, str))
    try:
        return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=infinite))
    except PydanticUserError:
        return TypeAdapter(annotation)
    except PydanticSchemaGenerationError:
        return None


def _adapter(annotation: Any) -> Any:
    try:
        return _cached(annotation)
    except TypeError:  # not hashable
        return _cached.__wrapped__(annotation)


def explain(annotation: Any) -> str:
    """A type in words, for lists of settings: "int, 1 to 1000"."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        low = next((a for a in args[1:] if isinstance(a, Ge | Gt)), None)
        high = next((a for a in args[1:] if isinstance(a, Le | Lt)), None)
        text = explain(args[0])
        if isinstance(low, Ge):
            text += f" >= {low.ge}"
        elif isinstance(low, Gt):
            text += f" > {low.gt}"
        if isinstance(high, Lt):
            text += f", < {high.lt}"
        elif isinstance(high, Le) and typing.cast(float, high.le) <= 1:
            text += f", <= {high.le}"
        return text
    if origin is typing.Literal:
        return " | ".join(str(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(explain(a) for a in args)
    if annotation is type(None):
        return "null"
    return str(annotation).replace("typing.", "").replace("<class '", "").replace("'>", "")
