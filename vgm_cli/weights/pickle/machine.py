"""An interpreter of pickles that charges every operation to a budget before it carries it out."""

from __future__ import annotations

import pickle
import struct
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any

from vgm_cli import limits
from vgm_cli.weights.budget import Budget, TooMuch
from vgm_cli.weights.pickle.shells import Array, Call, Refused, Shell, encode
from vgm_cli.weights.pickle.table import modern, size_of

HEAP_TYPE = 1 << 9  # of type.__flags__: classes written in Python, whose attributes can be set


class Counted(dict):  # type: ignore[type-arg]
    """The machine's table of instructions; looking one up is paid for."""

    def __init__(self, table: Mapping[int, Any], budget: Budget):
        super().__init__(table)
        self.budget = budget

    def __getitem__(self, key: int) -> Any:
        self.budget.spend(1)
        return super().__getitem__(key)


class Stream:
    """A file whose reads are never longer than what is left of it, as memory is reserved for the length that is
    asked for."""

    def __init__(self, f: Any, size: int):
        self.f, self.size, self.readline = f, size, f.readline

    def read(self, n: int) -> bytes:
        if n > 1 << 16 and n > self.size - self.f.tell():
            raise EOFError("it is cut off")
        return self.f.read(n)  # type: ignore[no-any-return]


MACHINE: Any = pickle._Unpickler  # the one written in Python, whose instructions can be counted


class Machine(MACHINE):  # type: ignore[misc]
    """pickle's machine with a budget, and `find` in place of imports. f: at the start of a pickle, of a file of
    `budget.size` bytes."""

    dispatch: dict[int, Any] = dict(MACHINE.dispatch)

    def __init__(self, f: Any, budget: Budget):
        super().__init__(Stream(f, budget.size), encoding="latin1")
        self.budget, self.names = budget, set[str]()
        self.dispatch = Counted(type(self).dispatch, budget)
        self.weights: dict[int, tuple[Any, int]] = {}  # of tuples: itself, so that its id stays its own, and its parts

    def find_class(self, module: str, name: str) -> Any:
        full = modern(f"{module} {name}")
        self.names.add(full)
        found = self.find(full)
        own = isinstance(found, type) and (issubclass(found, Shell | OrderedDict) or not found.__flags__ & HEAP_TYPE)
        return found if own or not callable(found) else Call(found)

    def find(self, name: str) -> Any:
        """What a file gets for "module.attribute". Refused: it may not name that."""
        raise Refused(limits.short(name, 200))

    def persistent_load(self, pid: Any) -> Any:
        raise Refused(f"a persistent object {limits.short(pid)}")

    # -- what is counted

    def weigh(self, made: Any) -> Any:
        """A new tuple or frozenset, which may hold others many times over. TooMuch: it unfolds without end."""
        weight = 1 + sum(self.weights[id(x)][1] if id(x) in self.weights else 1 for x in made)
        self.budget.spend(len(made))
        if weight > self.budget.OPERATIONS:
            raise TooMuch(f"a {type(made).__name__} of more than {self.budget.OPERATIONS:,} parts")
        self.weights[id(made)] = (made, weight)
        return made

    def keys(self, keys: Any) -> None:
        light = (None, 1)
        if any(
            k.bit_length() > 64 if type(k) is int else self.weights.get(id(k), light)[1] > self.budget.LIGHT
            for k in keys
        ):
            raise TooMuch("keys that take too long to look up")

    def collector(self, kind: Callable[..., Any]) -> Callable[..., Any]:
        """A collection made of other collections."""

        def make(*args: Any) -> Any:
            for a in args[:1] if kind is deque else args:  # the other one is its length
                if not isinstance(a, list | tuple | set | frozenset | dict | deque):
                    raise Refused(f"a {getattr(kind, '__name__', 'size')} of {limits.short(a)}")
                self.budget.spend(len(a))
                if kind not in (list, tuple, deque, size_of):
                    self.keys(a)
                self.keys(p[0] for p in a if kind in (dict, OrderedDict) and isinstance(p, tuple | list) and p)
            made = kind(*args)
            return self.weigh(made) if isinstance(made, tuple | frozenset) else made

        return make

    def paid(self, function: Callable[..., Any], *kinds: type) -> Callable[..., Any]:
        """A function whose texts and bytes are copied. kinds: what its first argument has to be, or a latin-1 text."""

        def make(*args: Any) -> Any:
            self.budget.spend(bytes=sum(len(a) for a in args if isinstance(a, bytes | bytearray | str)))
            if kinds and args and not isinstance(args[0], kinds):
                if not (len(args) == 2 and isinstance(args[0], str)):
                    raise Refused(f"bytes of {limits.short(args[0])}")
                return function(encode(*args))
            return function(*args)

        return make

    def range(self, *args: Any) -> range:
        if not all(type(a) is int and abs(a) <= self.budget.OPERATIONS for a in args):
            raise Refused("a long range")
        return range(*args)

    # -- instructions that make something of what the file says

    def load_tuple(self) -> None:
        items = self.pop_mark()  # which also renews self.append
        self.append(self.weigh(tuple(items)))

    def last(self, n: int) -> None:
        self.stack[-n:] = [self.weigh(tuple(self.stack[-n:]))]

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.keys(items)
        self.append(self.weigh(frozenset(items)))

    def load_setitem(self) -> None:
        self.keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self.keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        self.keys(self.stack[::2])
        super().load_dict()

    def load_additems(self) -> None:
        self.keys(self.stack)
        super().load_additems()

    def load_long(self) -> None:
        text = self.readline()
        if len(text) > 100:
            raise TooMuch("a number of more than 100 digits")
        self.append(int(text.rstrip(b"L\n"), 0))

    def load_long4(self) -> None:
        raise TooMuch("a number of more than 255 bytes")

    def load_bytearray8(self) -> None:
        (n,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(n)))

    def load_build(self) -> None:
        state, made = self.stack[-1], self.stack[-2]
        self.budget.spend(
            sum(len(s) for s in (state, *(state if isinstance(state, tuple) else ())) if isinstance(s, Mapping))
        )
        if isinstance(made, Array):
            self.budget.spend(bytes=sum(len(a) for a in state if isinstance(a, bytes | str)))
        elif isinstance(made, tuple | list | set | frozenset | deque | bytearray):
            raise Refused("a change of a collection")
        super().load_build()

    def arguments(self, *given: Any) -> None:
        if not all(isinstance(a, tuple | dict) for a in given):
            raise Refused("a call with something other than arguments")
        self.budget.spend(sum(map(len, given)))

    def load_reduce(self) -> None:
        self.arguments(self.stack[-1])
        super().load_reduce()

    def load_newobj_ex(self) -> None:
        self.arguments(*self.stack[-2:])
        super().load_newobj_ex()

    def load_newobj(self) -> None:
        self.arguments(self.stack[-1])
        if isinstance(self.stack[-2], Call):
            args, function = self.stack.pop(), self.stack.pop()
            self.append(function(*args))
        else:
            super().load_newobj()

    dispatch |= {
        pickle.TUPLE[0]: load_tuple,
        pickle.TUPLE1[0]: lambda self: self.last(1),
        pickle.TUPLE2[0]: lambda self: self.last(2),
        pickle.TUPLE3[0]: lambda self: self.last(3),
        pickle.FROZENSET[0]: load_frozenset,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.ADDITEMS[0]: load_additems,
        pickle.LONG[0]: load_long,
        pickle.LONG4[0]: load_long4,
        pickle.BYTEARRAY8[0]: load_bytearray8,
        pickle.BUILD[0]: load_build,
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
    }
