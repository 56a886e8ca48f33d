"""Foreign pickles: networks come out as tensors, code stays unread, hostile payloads are refused."""

from __future__ import annotations

import pickle
import sys
import types
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vgm_cli.errors import VgmError
from vgm_cli.weights.contents import contents
from vgm_cli.weights.files import read as read_weights
from vgm_cli.weights.pickle.shells import Shell
from vgm_cli.weights.reading import read as load

REFUSED = "refused|not readable|more than tensors"


@pytest.fixture
def foreign() -> Iterator[types.SimpleNamespace]:
    """Packages such as NVlabs' publish with: dnnlib.tflib.network.Network, torch_utils.persistence."""
    made: dict[str, types.ModuleType] = {}

    def module(name: str) -> types.ModuleType:
        made[name] = sys.modules[name] = types.ModuleType(name)
        return made[name]

    for name in (
        "dnnlib",
        "dnnlib.util",
        "dnnlib.tflib",
        "dnnlib.tflib.network",
        "torch_utils",
        "torch_utils.persistence",
    ):
        module(name)

    class Network:
        def __init__(self, state: dict[str, Any]):
            self.own = state

        def __getstate__(self) -> dict[str, Any]:
            return self.own

    class EasyDict(dict):  # type: ignore[type-arg]
        pass

    def _reconstruct_persistent_obj(meta: Any) -> Any:
        exec(meta["module_src"])  # what the real one does

    class Persistent:
        def __init__(self, name: str, source: str, state: dict[str, Any]):
            self.meta = EasyDict(type="class", version=6, module_src=source, class_name=name, state=state)

        def __reduce__(self) -> Any:
            return _reconstruct_persistent_obj, (self.meta,), None

    Network.__module__, Network.__qualname__ = "dnnlib.tflib.network", "Network"
    made["dnnlib.tflib.network"].Network = Network  # type: ignore[attr-defined]
    EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"
    made["dnnlib.util"].EasyDict = EasyDict  # type: ignore[attr-defined]
    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    made["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    yield types.SimpleNamespace(Network=Network, Persistent=Persistent, EasyDict=EasyDict)
    for name in made:
        sys.modules.pop(name, None)


def write(path: Path, value: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


def module_state(foreign: Any, source: str, w: torch.Tensor) -> Any:
    inner = foreign.Persistent("Layer", source, {
        "_parameters": OrderedDict(weight=torch.nn.Parameter(w), bias=None),
        "_buffers": OrderedDict(f=torch.ones(2, 2)),
        "_modules": OrderedDict(), "_non_persistent_buffers_set": set(), "training": False,
    })  # fmt: skip
    return foreign.Persistent("Net", source, {
        "_parameters": OrderedDict(), "_buffers": OrderedDict(average=torch.arange(3.0)),
        "_modules": OrderedDict(fc0=inner),
        "_init_kwargs": foreign.EasyDict(size=4), "training": False,
    })  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_persistent_modules_are_read_and_their_source_is_not_run(foreign: Any, tmp_path: Path, protocol: int) -> None:
    w, trace = torch.randn(4, 3), tmp_path / "ran"
    source = f"open({str(trace)!r}, 'w').write('x')"
    data = {
        "G_ema": module_state(foreign, source, w),
        "augment_pipe": None,
        "training_set_kwargs": foreign.EasyDict(a=1),
    }
    loaded = load(write(tmp_path / "net.pkl", data, protocol))
    found = read_weights(tmp_path / "net.pkl").entries
    assert list(found) == ["G_ema"] and list(found["G_ema"]) == ["average", "fc0.weight", "fc0.f"]
    assert torch.equal(found["G_ema"]["fc0.weight"], w) and not found["G_ema"]["fc0.weight"].requires_grad
    assert isinstance(loaded["G_ema"], Shell) and loaded["G_ema"].path.endswith(".Net")
    assert loaded["G_ema"].state["_init_kwargs"]["size"] == 4
    assert not trace.exists()


def test_tensorflow_networks_are_read(foreign: Any, tmp_path: Path) -> None:
    def network(name: str, variables: Any, **components: Any) -> Any:
        code = {"build_module_src": "raise SystemExit", "build_func_name": "G"}
        facts = {"version": 3, "name": name, "static_kwargs": {"resolution": 32}, "components": components}
        return foreign.Network({**facts, **code, "variables": variables})

    mapping = network("G_mapping", [("Dense0/weight", np.ones((2, 3), np.float32))])
    pair = (network("G", [("lod", np.float32(0))], mapping=mapping), network("D", [("lod", np.float32(1))]))
    found = contents(load(write(tmp_path / "net.pkl", pair)))
    assert {k: list(v) for k, v in found.items()} == {"G": ["lod", "mapping/Dense0/weight"], "D": ["lod"]}
    assert found["G"]["mapping/Dense0/weight"].shape == (2, 3) and float(found["D"]["lod"]) == 1


def test_files_of_torch_save_with_objects_in_them(foreign: Any, tmp_path: Path) -> None:
    torch.save({"ema": module_state(foreign, "raise SystemExit", torch.eye(2)), "epoch": 3}, tmp_path / "a.pt")
    assert torch.equal(read_weights(tmp_path / "a.pt").entries["ema"]["fc0.weight"], torch.eye(2))
    write(tmp_path / "plain.pkl", {"w": torch.ones(3), "n": 1})
    assert list(read_weights(tmp_path / "plain.pkl").entries[""]) == ["w"]


class Payload:
    """Runs `call(*args)` in an ordinary unpickler."""

    def __init__(self, call: Any, *args: Any):
        self.call, self.args = call, args

    def __reduce__(self) -> Any:
        return self.call, self.args


def payloads(trace: Path) -> dict[str, Any]:
    import os
    import subprocess

    command = f"touch {trace}"
    return {
        "os": Payload(os.system, command),
        "subprocess": Payload(subprocess.check_output, ["touch", str(trace)]),
        "eval": Payload(eval, f"open({str(trace)!r}, 'w')"),
        "open": Payload(open, str(trace), "w"),
        "getattr": Payload(getattr, "x", "upper"),
        "torch.load": Payload(torch.load, str(trace)),
        "nested": {"G_ema": OrderedDict(weight=[1, Payload(os.system, command)])},
        "in an array": np.array([Payload(os.system, command)], dtype=object),
    }


@pytest.mark.parametrize("kind", ["os", "subprocess", "eval", "open", "getattr", "torch.load", "nested", "in an array"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_hostile_payloads_are_refused(kind: str, protocol: int, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    path = write(tmp_path / "evil.pkl", payloads(trace)[kind], protocol)
    with pytest.raises(VgmError, match=REFUSED):
        load(path)
    assert not trace.exists()
    if kind == "os" and protocol == 4:
        pickle.loads(path.read_bytes())
        assert trace.exists(), "the payload is harmless: this test proves nothing"


def test_payloads_inside_torch_files_are_refused(tmp_path: Path) -> None:
    import io
    import os

    trace, inner = tmp_path / "trace", io.BytesIO()
    torch.save(Payload(os.system, f"touch {trace}"), inner, _use_new_zipfile_serialization=False)
    write(tmp_path / "evil.pkl", Payload(torch.storage._load_from_bytes, inner.getvalue()))
    torch.save({"w": torch.ones(1), "x": Payload(os.system, f"touch {trace}")}, tmp_path / "evil.pt")
    for name in ("evil.pkl", "evil.pt"):
        with pytest.raises(VgmError, match=REFUSED):
            load(tmp_path / name)
    assert not trace.exists()


def test_functions_that_may_be_called_cannot_be_changed(tmp_path: Path) -> None:
    """BUILD on an allowed function would set its attributes for the whole process."""
    from torch._utils import _rebuild_tensor_v2

    before = _rebuild_tensor_v2.__defaults__
    for name in (b"torch._utils\n_rebuild_tensor_v2", b"collections\nCounter", b"_codecs\nencode"):
        (tmp_path / "evil.pkl").write_bytes(b"\x80\x02c" + name + b"\nN}U\x0c__defaults__)s\x86b.")
        with pytest.raises(VgmError, match=REFUSED):
            load(tmp_path / "evil.pkl")
    assert _rebuild_tensor_v2.__defaults__ == before and not hasattr(Counter, "__defaults__")


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04nonsense")
    for name in ("a.pkl", "none.pkl"):
        with pytest.raises(VgmError):
            load(tmp_path / name)
