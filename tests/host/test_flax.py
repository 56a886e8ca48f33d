"""Flax's checkpoints, read without flax: arrays of every kind come out as they went in, broken files in one sentence."""

from __future__ import annotations

import itertools
import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vgm_cli.errors import VgmError
from vgm_cli.weights import files, msgpack, reading

Call = Callable[..., tuple[int, str, str]]


def header(n: int, small: int | None, marks: dict[int, tuple[int, str]], most: int = 15) -> bytes:
    if small is not None and n <= most:
        return bytes([small | n])
    mark, form = next((m, f) for limit, (m, f) in marks.items() if n < limit)
    return struct.pack(f">B{form}", mark, n)


def extension(code: int, payload: bytes) -> bytes:
    fixed = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}.get(len(payload))
    long = {256: (0xC7, "B"), 65536: (0xC8, "H"), 1 << 32: (0xC9, "I")}
    return (bytes([fixed]) if fixed else header(len(payload), None, long)) + struct.pack("b", code) + payload


def array(value: Any) -> bytes:
    """(shape, dtype's name, bytes), as flax packs arrays."""
    if isinstance(value, torch.Tensor):  # bfloat16, which numpy lacks
        return pack([list(value.shape), str(value.dtype)[6:], value.contiguous().view(torch.int16).numpy().tobytes()])
    return pack([list(value.shape), value.dtype.name, value.tobytes()])


def pack(value: Any) -> bytes:
    """msgpack as flax.serialization.msgpack_serialize writes it."""
    if value is None or isinstance(value, bool):
        return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
    if isinstance(value, int):
        return struct.pack(">Bq", 0xD3, value) if value < 0 or value > 127 else bytes([value])
    if isinstance(value, float):
        return struct.pack(">Bd", 0xCB, value)
    if isinstance(value, complex):
        return extension(2, pack([value.real, value.imag]))
    if isinstance(value, str):
        text = value.encode()
        return header(len(text), 0xA0, {256: (0xD9, "B"), 65536: (0xDA, "H")}, 31) + text
    if isinstance(value, bytes):
        return header(len(value), None, {256: (0xC4, "B"), 65536: (0xC5, "H"), 1 << 32: (0xC6, "I")}) + value
    if isinstance(value, list):
        return header(len(value), 0x90, {65536: (0xDC, "H")}) + b"".join(map(pack, value))
    if isinstance(value, dict):
        return header(len(value), 0x80, {65536: (0xDE, "H")}) + b"".join(pack(x) for kv in value.items() for x in kv)
    return extension(
        3 if isinstance(value, np.generic) else 1, array(np.asarray(value) if isinstance(value, np.generic) else value)
    )


def pieces(value: np.ndarray, size: int) -> dict[str, Any]:
    """An array in pieces of `size` values, as flax writes those above 1 GiB."""
    flat = value.reshape(-1)
    chunks = {str(i): flat[at : at + size] for i, at in enumerate(range(0, flat.size, size))}
    return {
        "__msgpack_chunked_array__": True,
        "shape": {str(i): n for i, n in enumerate(value.shape)},
        "chunks": chunks,
    }


def write(name: str, value: Any) -> Path:
    Path(name).write_bytes(value if isinstance(value, bytes) else pack(value))
    return Path(name)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["checkpoint_1000", "x.msgpack"])
def test_a_training_checkpoint(name: str, vgm: Call) -> None:
    """A TrainState as MeanFlow's and MaskGIT's trainings save it: step, raw and averaged weights, the optimizer's."""
    kernel = random(3, 3, 4, 8)
    layer = {"Conv_0": {"kernel": kernel, "bias": random(8)}, "Embed_0": {"embedding": random(300, 2)}}
    half = {"Conv_0": {"kernel": kernel / 2, "bias": random(8)}, "Embed_0": {"embedding": random(300, 2)}}
    state = {
        "step": np.int32(7),
        "params": {"net": layer},
        "ema_params": {"net": half},
        "opt_state": {"0": {"count": 5, "mu": {"net": layer}}, "1": {}, "2": None},
        "lr": 1e-4,
        "name": "x" * 40,
        "z": 1 + 2j,
    }
    path = write(name, state)
    assert reading.kind_of(path) == "flax"
    found = files.read(path).entries[""]
    assert torch.equal(found["params.net.Conv_0.kernel"], torch.from_numpy(kernel))
    assert found["step"].shape == () and found["step"] == 7 and found["step"].dtype == torch.int32
    assert len(found) == 3 * 3 + 1
    code, out, err = vgm("inspect", path, "--json")
    assert code == 0 and "flax checkpoint" in json.loads(out)["kind"], err
    code, _, err = vgm("convert", path, "o.safetensors")
    assert code == 2 and "no published layout that is known here" in err and "Traceback" not in err


def test_networks_of_a_checkpoint_are_found_averages_first() -> None:
    """Names joined by dots: what any layout would be shown."""
    layer = {"a": {"kernel": random(2, 2)}, "b": {"bias": random(2)}}
    path = write("x.msgpack", {"params": {"net": layer}, "ema_params": {"net": layer}})
    known = {"a.kernel", "b.bias"}
    networks = files.read(path).networks(lambda state: ["here"] if known <= set(state) else [])
    assert [n.name for n in networks] == ["ema_params.net", "params.net"]
    bare = files.read(write("y.msgpack", layer)).networks(lambda state: ["here"] if known <= set(state) else [])
    assert [n.name for n in bare] == [""]


@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int8", "int16", "int64", "uint32", "float16", "float64", "complex64"]
)
def test_arrays_of_every_kind(dtype: str) -> None:
    values = {
        "a": np.arange(-3, 3).astype(dtype).reshape(2, 3),
        "empty": np.zeros((0, 4), dtype),
        "s": np.ones((), dtype),
    }
    found = msgpack.read(write("x", values))
    assert all(np.array_equal(found[k].numpy(), v) and found[k].shape == v.shape for k, v in values.items())


def test_arrays_in_pieces_and_of_half_precision() -> None:
    whole, low = random(5, 7), torch.randn(3, 5, dtype=torch.bfloat16)
    found = msgpack.read(write("x", {"a": {"b": pieces(whole, 8)}, "low": low}))
    assert torch.equal(found["a.b"], torch.from_numpy(whole)) and torch.equal(found["low"], low)


GOOD = pack({"params": {"a": random(4, 4), "b": pieces(random(3, 3), 4)}, "step": np.int64(1), "n": [1, 2, "x"]})


def test_a_file_that_is_cut_off_anywhere() -> None:
    assert len(msgpack.read(write("x", GOOD))) == 3
    for end in range(1, len(GOOD), 3):
        with pytest.raises(VgmError, match="not readable as flax's msgpack") as e:
            msgpack.read(write("x", GOOD[:end]))
        assert e.value.code == 1 and "\n" not in e.value.message


def test_a_file_with_wrong_bytes_is_read_or_refused() -> None:
    for at, byte in itertools.product(range(0, len(GOOD), 5), (0x00, 0x9F, 0xC1, 0xDF, 0xFF)):
        try:
            msgpack.read(write("x", GOOD[:at] + bytes([byte]) + GOOD[at + 1 :]))
        except VgmError as e:
            assert e.code == 1 and "not readable as flax's msgpack" in e.message


BOMBS = {
    "many names": b"\xdf\xff\xff\xff\xff\xa1a",
    "a long list": b"\x81\xa1a\xdd\xff\xff\xff\xff",
    "a long text": b"\x81\xa1a\xdb\xff\xff\xff\xff",
    "long bytes": b"\x81\xa1a\xc6\xff\xff\xff\xff",
    "a long extension": b"\x81\xa1a\xc9\xff\xff\xff\xff\x01",
    "deep lists": b"\x81\xa1a" + b"\x91" * 100_000,
    "deep dictionaries": b"\x81\xa1a" * 100_000,
    "many nothings": b"\x81\xa1a\xdd" + struct.pack(">I", 6_000_000) + b"\xc0" * 6_000_000,
    "another shape": pack({"a": 1})[:-1] + extension(1, pack([[1 << 40, 1 << 40], "float32", b"abcd"])),
    "a negative side": pack({"a": 1})[:-1] + extension(1, pack([[-1, -1], "float32", b"abcd"])),
    "too many sides": pack({"a": 1})[:-1] + extension(1, pack([[1] * 40, "float32", b"abcd"])),
    "an unknown dtype": pack({"a": 1})[:-1] + extension(1, pack([[1], "object", b"abcdefgh"])),
    "an unknown extension": pack({"a": 1})[:-1] + extension(9, pack([[1], "float32", b"abcd"])),
    "another length": pack({"a": 1})[:-1] + extension(1, pack([[1], "float32", b"abcd"]) + b"\x00"),
    "no bytes": pack({"a": 1})[:-1] + extension(1, pack([[1], "float32", "abcd"])),
    "a name twice": b"\x82" + 2 * (pack("a") + pack(1)),
    "two paths of one name": pack({"a": {"b": random(1)}, "a.b": random(1)}),
    "a number as a name": b"\x82" + pack("a") + pack(1) + pack(2) + pack(1),
    "lost pieces": pack({"a": pieces(random(3, 3), 4) | {"chunks": {"0": random(4)}}}),
    "pieces of two kinds": pack({"a": pieces(random(2), 1) | {"chunks": {"0": random(1), "1": random(1) > 0}}}),
    "more behind it": pack({"a": random(1)}) + b"\x00",
    "no text": b"\x81\xa2\xff\xfe\x00",
}


@pytest.mark.parametrize("what", BOMBS)
def test_bombs_are_refused_in_one_sentence(what: str, vgm: Call) -> None:
    path = write("x.msgpack", BOMBS[what])
    start = time.process_time()
    code, _, err = vgm("inspect", path)
    assert code == 1 and "not readable as flax's msgpack" in err, err
    assert "Traceback" not in err and len(err) < 500 and time.process_time() - start < 8


def test_arrays_that_others_wrote() -> None:
    """The bytes of msgpack's specification and of flax's packer, written out: {"w": float32 [1, 2]}."""
    payload = b"\x93" + b"\x91\x02" + b"\xa7float32" + b"\xc4\x08" + struct.pack("<2f", 1.0, 2.0)
    path = write("x", b"\x81" + b"\xa1w" + b"\xc7" + bytes([len(payload), 1]) + payload)
    assert torch.equal(msgpack.read(path)["w"], torch.tensor([1.0, 2.0]))
