"""Flax's checkpoints (flax.serialization.to_bytes: NAME.msgpack, checkpoint_1000), read without flax. Torch-free.

A file is one value of msgpack: dictionaries by name, whose leaves are arrays (extension 1: shape, name of the dtype,
bytes), complex numbers (2), numbers of numpy (3), or arrays above 1 GiB in pieces ({"__msgpack_chunked_array__": True,
"shape": ..., "chunks": ...}). It is data, not a program. Every length is compared with what is left of the file before
anything is made, and how deeply values are nested and how many there are is bounded.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from vgm_cli import limits
from vgm_cli.errors import FAILED, VgmError

if TYPE_CHECKING:
    from torch import Tensor

DEEPEST = 64  # dictionaries in dictionaries; networks have about ten
VALUES = 1_000_000  # an array is about nine
WHOLE = ("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64")
DTYPES = (*WHOLE, "float16", "bfloat16", "float32", "float64", "complex64", "complex128")
CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
NUMBERS = {0xCA: "f", 0xCB: "d", 0xCC: "B", 0xCD: "H", 0xCE: "I", 0xCF: "Q", 0xD0: "b", 0xD1: "h", 0xD2: "i", 0xD3: "q"}
LENGTHS = {  # what a byte begins, and the number that its length is
    **{0xC4: ("raw", "B"), 0xC5: ("raw", "H"), 0xC6: ("raw", "I")},
    **{0xC7: ("extension", "B"), 0xC8: ("extension", "H"), 0xC9: ("extension", "I")},
    **{0xD9: ("text", "B"), 0xDA: ("text", "H"), 0xDB: ("text", "I")},
    **{0xDC: ("items", "H"), 0xDD: ("items", "I"), 0xDE: ("mapping", "H"), 0xDF: ("mapping", "I")},
}
CHUNKED = "__msgpack_chunked_array__"


class Broken(ValueError):
    """The file is not flax's msgpack; the text says why."""


def starts(start: bytes) -> bool:
    """Whether a file begins with a dictionary whose first name is a text."""
    first = start[0] if start else 0
    key = {0xDE: 3, 0xDF: 5}.get(first, 1 if 0x81 <= first <= 0x8F else 64)
    return key < len(start) and (0xA0 <= start[key] <= 0xBF or start[key] in (0xD9, 0xDA, 0xDB))


def read(path: Path) -> dict[str, Tensor]:
    """{names joined by dots: tensor} of every array in the file. VgmError: cut off, damaged, out of all proportion."""
    size = limits.check_regular(path)
    try:
        with open(path, "rb") as f:
            reader = Reader(f, size)
            found = reader.value()
        if reader.left:
            raise Broken(f"{reader.left:,} bytes follow its end")
        state: dict[str, Tensor] = {}
        for name, tensor in leaves(found):
            if name in state:
                raise Broken(f"{limits.short(name)} stands in it twice")
            state[name] = tensor
    except Broken as e:
        raise VgmError(f"{path} is not readable as flax's msgpack: {e}", "it may be cut off", FAILED) from e
    return state


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The arrays of nested dictionaries; numbers, texts and nothing are left out."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{name}.{key}" if name else key)
    elif hasattr(value, "dtype"):
        yield name, value


class Reader:
    """One value after the other. left: bytes of the file that are not read yet. Broken: it is refused."""

    def __init__(self, f: BinaryIO, size: int):
        self.f, self.left, self.values = f, size, 0

    def take(self, n: int) -> bytearray:
        if n > self.left:
            raise Broken("it is cut off")
        self.left -= n
        data = bytearray(n)
        if self.f.readinto(data) != n:  # type: ignore[attr-defined]
            raise Broken("it is cut off")
        return data

    def number(self, form: str) -> Any:
        return struct.unpack(f">{form}", self.take(struct.calcsize(form)))[0]

    def value(self, depth: int = 0) -> Any:
        if depth > DEEPEST:
            raise Broken("it is nested too deeply")
        self.values += 1
        if self.values > VALUES:
            raise Broken(f"it holds more than {VALUES:,} values")
        mark = self.take(1)[0]
        if mark < 0x80 or mark >= 0xE0:
            return mark if mark < 0x80 else mark - 256
        if mark < 0xC0:
            kind = "mapping" if mark < 0x90 else "items" if mark < 0xA0 else "text"
            n = mark & (15 if mark < 0xA0 else 31)
        elif mark in CONSTANTS:
            return CONSTANTS[mark]
        elif mark in NUMBERS:
            return self.number(NUMBERS[mark])
        elif mark in LENGTHS:
            kind, form = LENGTHS[mark]
            n = self.number(form)
        elif 0xD4 <= mark <= 0xD8:
            kind, n = "extension", 1 << (mark - 0xD4)
        else:
            raise Broken(f"the byte {mark:#x} begins no value")
        return getattr(self, kind)(n, depth + 1)

    def raw(self, n: int, depth: int) -> bytearray:
        return self.take(n)

    def text(self, n: int, depth: int) -> str:
        try:
            return self.take(n).decode()
        except UnicodeDecodeError as e:
            raise Broken("a name in it is no text") from e

    def items(self, n: int, depth: int) -> dict[str, Any]:
        """A list: named by position, as flax names tuples."""
        if n > self.left:
            raise Broken("it is cut off")
        return {str(i): self.value(depth) for i in range(n)}

    def mapping(self, n: int, depth: int) -> Any:
        if 2 * n > self.left:
            raise Broken("it is cut off")
        found: dict[str, Any] = {}
        for _ in range(n):
            key = self.value(depth)
            if not isinstance(key, str) or key in found:
                raise Broken(f"a dictionary in it has the name {limits.short(key)}, which is no text or stands twice")
            found[key] = self.value(depth)
        return joined(found) if CHUNKED in found else found

    def extension(self, n: int, depth: int) -> Any:
        code = self.number("b")
        end = self.left - n
        if end < 0:
            raise Broken("it is cut off")
        found = self.value(depth)
        if self.left != end or not isinstance(found, dict):
            raise Broken("an array in it has another length than it says")
        parts = list(found.values())
        if code == 2 and len(parts) == 2:
            return None  # a complex number, which no network has
        if code not in (1, 3) or len(parts) != 3:
            raise Broken(f"it holds an extension {code}, which is not flax's")
        return array(*parts)


def shape_of(value: Any) -> tuple[int, ...]:
    """Broken: no shape that a tensor can have."""
    sides = list(value.values()) if isinstance(value, dict) else None
    if sides is None or len(sides) > limits.DIMENSIONS or not all(type(n) is int and n >= 0 for n in sides):
        raise Broken(f"an array in it has no shape of at most {limits.DIMENSIONS} sides")
    if math.prod(n or 1 for n in sides) >= 1 << 60:
        raise Broken("an array in it has a shape that no memory holds")
    return tuple(sides)


def array(shape: Any, dtype: Any, data: Any) -> Tensor:
    import torch

    sides = shape_of(shape)
    if not isinstance(dtype, str) or dtype not in DTYPES or not isinstance(data, bytearray):
        raise Broken(f"an array in it is of the unknown dtype {limits.short(dtype)}")
    kind: torch.dtype = getattr(torch, dtype)
    if math.prod(sides) * kind.itemsize != len(data):
        raise Broken(f"an array of {len(data):,} bytes in it says that its shape is {sides}")
    return torch.frombuffer(data, dtype=kind).reshape(sides) if data else torch.empty(sides, dtype=kind)


def joined(found: Mapping[str, Any]) -> Tensor:
    """An array that was written in pieces."""
    import torch

    pieces = found.get("chunks")
    if not isinstance(pieces, dict):
        raise Broken("an array in it has no pieces")
    parts = list(pieces.values())
    sides = shape_of(found.get("shape"))
    if not parts or not all(isinstance(p, torch.Tensor) and p.dtype == parts[0].dtype for p in parts):
        raise Broken("an array in it has pieces that are no arrays of one kind")
    if list(pieces) != [str(i) for i in range(len(parts))] or sum(p.numel() for p in parts) != math.prod(sides):
        raise Broken(f"the pieces of an array in it do not make one of shape {sides}")
    return torch.cat([p.flatten() for p in parts]).reshape(sides)
