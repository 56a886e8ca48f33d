"""A budget for what one file may make this program build: a number of objects, and bytes in proportion to its size.
Torch-free."""

from __future__ import annotations

from vgm_cli import limits


class TooMuch(Exception):
    """A file would build more than there is room or time for; the text says what."""


class Budget:
    """The rest of a file's budget. size: bytes of the file. TooMuch: the budget is used up."""

    OPERATIONS = 4_000_000  # of the pickle's program, and elements of collections; a second or two
    LIGHT = 64  # parts of a tuple that may be a key: hashing walks through it

    def __init__(self, size: int):
        self.operations, self.bytes, self.size = self.OPERATIONS, 4 * size + limits.SPARE, size

    def spend(self, operations: int = 0, bytes: int = 0) -> None:
        self.operations -= operations
        self.bytes -= bytes
        if self.operations < 0:
            raise TooMuch(f"more than {self.OPERATIONS:,} objects")
        if self.bytes < 0:
            raise TooMuch(f"more than {4 * self.size + limits.SPARE:,} bytes out of {self.size:,}")
