"""`vgm inspect`: published files are recognised by their tensors, and what is amiss is listed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vgm_cli import limits
from vgm_cli.registry import registry
from vgm_cli.weights import files as weight_files
from vgm_cli.weights import inspect as inspection
from vgm_cli.weights import layout as layouts

sys.path.insert(0, str(Path(__file__).parent))
from test_convert import DIT, TINY, state_of

Call = Callable[..., tuple[int, str, str]]
# chosen by --from: their names are another layout's; a whole file of ControlNet is known by the base, which lies beside
NAMED_ONLY = ("controlnet-whole", "glow-average", "ldm-unet-turbo", "ldm-unet-turbo-diffusers")
ALIKE = {"consistency": "adm-unet", "glow-average": "glow"}


def facts(vgm: Call, *args: object) -> dict[str, Any]:
    code, out, err = vgm("inspect", *args, "--json")
    assert code == 0, err
    return json.loads(out)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", sorted(set(TINY) - set(NAMED_ONLY)))
def test_every_layout_is_recognised(name: str, vgm: Call) -> None:
    """By names alone and then by shapes: a layout that does not fit comes after those that do."""
    c = layouts.find(name)
    _, theirs = state_of(name)
    save_file(theirs, "x.safetensors")
    found = facts(vgm, "x.safetensors")
    fitting = {hit["converter"]: hit for hit in found["looks_like"] if hit["fits"]}
    assert name in fitting, found["looks_like"]
    assert fitting[name]["component"] == c.component and fitting[name]["kind"] == c.kind
    others = {layouts.find(n).component for n in fitting}
    assert len(others - {c.component}) <= 1, "only layouts of the same tensors"
    assert found["fit"]["missing"] == {} and found["fit"]["shapes"] == {}
    assert found["parameters"] == sum(v.numel() for v in theirs.values())
    plugin = registry().plugins[registry().owners["converter", name]]
    if plugin.papers and plugin.papers[0].family:
        assert fitting[name]["family"]
    code, out, _ = vgm("inspect", "x.safetensors")
    assert code == 0 and name in out and "fits" in out


def on_meta(component: str, preset: str, **more: Any) -> dict[str, Tensor]:
    (found,) = [c for (kind, n), c in registry().components.items() if n == component and kind in ("model", "codec")][
        :1
    ]
    return layouts.on_meta(found.kind, component, {**registry().presets(found)[preset], **more})


@pytest.mark.parametrize(
    ("name", "preset", "more"),
    [
        ("dit", "DiT-XL/2", {"input_size": 32}),
        ("dit", "DiT-S/8", {"input_size": 32}),
        ("dit-diffusers-512", "DiT-XL/2", {"input_size": 64}),
        ("sit", "SiT-B/4", {"input_size": 32}),
        ("adm-unet", "64", {}),
        ("adm-unet", "256", {}),
        ("adm-unet", "512-uncond", {}),
        ("adm-unet", "128-512-upsampler", {}),
        ("adm-classifier", "128", {}),
        ("autoencoder-kl", "kl-f8", {}),
        ("vq-autoencoder", "vq-f4", {}),
    ],
)
def test_published_networks_are_named(name: str, preset: str, more: dict[str, Any]) -> None:
    """The preset is told from shapes, and the count is the published network's."""
    c = layouts.find(name)
    state = c.from_ours({k: v.to("meta") for k, v in on_meta(c.component, preset, **more).items()})
    found = layouts.fit(c, state)
    assert found.exact and layouts.presets_of(c.kind, c.component, found.config) == [preset]


def test_presets_that_only_dropout_tells_apart_are_both_named() -> None:
    c = layouts.find("adm-unet")
    found = layouts.fit(c, on_meta("adm-unet", "lsun256"))
    assert layouts.presets_of("model", "adm-unet", found.config) == ["256-uncond", "lsun256", "lsun256-nodropout"]


def test_a_training_checkpoint(vgm: Call) -> None:
    """Its entries, which of them convert takes, and that it is an average."""
    ours, _ = state_of("dit")
    half = {k: v.half() for k, v in ours.items()}
    torch.save({"model": ours, "ema": half, "opt": {"state": {}}}, "x.pt")
    found = facts(vgm, "x.pt")
    assert found["entries"] == {"model": len(ours), "ema": len(ours)}
    assert (found["entry"], found["weights"]) == ("ema", "ema")
    assert found["dtypes"] == {"float16": found["parameters"]}
    assert [hit["converter"] for hit in found["looks_like"]] == ["dit", "sit"]
    assert found["looks_like"][0]["family"] == "diffusion" and found["looks_like"][1]["family"] == "flow"
    code, out, _ = vgm("inspect", "x.pt")
    assert code == 0 and "'ema': 32 tensors, which `vgm convert` takes" in out and "weights     an average" in out
    torch.save({"model": ours}, "x.pt")
    assert facts(vgm, "x.pt")["weights"] == "raw"
    torch.save(ours, "x.pt")
    assert facts(vgm, "x.pt")["weights"] == "released"
    assert "does not say whether averaged" in vgm("inspect", "x.pt")[1]


def test_a_file_that_almost_fits(vgm: Call) -> None:
    """Missing tensors with the nearest name, unexpected ones, and those of another shape."""
    ours, _ = state_of("dit")
    ours["blocks.0.attn.qkv.weigth"] = ours.pop("blocks.0.attn.qkv.weight")
    ours["extra"] = torch.zeros(3)
    ours["final_layer.adaLN_modulation.1.bias"] = torch.zeros(7)
    save_file(ours, "x.safetensors")
    found = facts(vgm, "x.safetensors")
    assert found["fit"]["layout"] in ("dit", "sit")
    assert found["fit"]["missing"] == {"blocks.0.attn.qkv.weight": "blocks.0.attn.qkv.weigth"}
    assert set(found["fit"]["unexpected"]) == {"blocks.0.attn.qkv.weigth", "extra"}
    assert found["fit"]["shapes"] == {"final_layer.adaLN_modulation.1.bias": {"file": [7], "wanted": [64]}}
    assert not found["looks_like"][0]["fits"]
    code, out, _ = vgm("inspect", "x.safetensors")
    assert code == 0 and f"fits        {len(ours) - 3} of {len(ours) - 1} tensors" in out
    assert "missing     blocks.0.attn.qkv.weight (nearest: blocks.0.attn.qkv.weigth)" in out
    assert "shape       final_layer.adaLN_modulation.1.bias (7,), wanted (64,)" in out and "unexpected  extra" in out


def test_a_file_whose_mark_is_gone(vgm: Call) -> None:
    """No layout recognises it any more: the nearest is named, with the same list."""
    ours, _ = state_of("vae-pythae")
    ours["encoder.log_variance.weight"] = ours.pop("encoder.log_var.weight")
    torch.save(ours, "x.pt")
    found = facts(vgm, "x.pt")
    assert found["looks_like"] == [] and found["nearest"]["converter"] == "vae-pythae"
    assert found["fit"]["missing"] == {"encoder.log_var.weight": "encoder.log_variance.weight"}
    code, out, _ = vgm("inspect", "x.pt")
    assert code == 0 and "nearest     vae-pythae" in out and "nearest: encoder.log_variance.weight" in out


def test_long_lists_are_cut(vgm: Call) -> None:
    ours, _ = state_of("dit")
    save_file({**ours, **{f"more.{i}": torch.zeros(1) for i in range(30)}}, "x.safetensors")
    out = vgm("inspect", "x.safetensors")[1]
    assert out.count("more.") == 10 and "and 20 more; --json lists all" in out
    assert len(facts(vgm, "x.safetensors")["fit"]["unexpected"]) == 30


def test_nothing_known(vgm: Call) -> None:
    save_file({"a": torch.zeros(2, dtype=torch.bfloat16)}, "x.safetensors")
    found = facts(vgm, "x.safetensors")
    assert found["looks_like"] == [] and "nearest" not in found and found["dtypes"] == {"bf16": 2}
    assert "no published layout that is known here" in vgm("inspect", "x.safetensors")[1]


def test_shards_and_folders(vgm: Call) -> None:
    _, theirs = state_of("dit-diffusers")
    Path("t").mkdir()
    files = weight_files.write(Path("t/diffusion_pytorch_model.safetensors"), theirs, {}, limit=100_000)
    for source in ("t", files[0], files[1]):
        found = facts(vgm, source)
        assert found["kind"] == f"safetensors in {len(files) - 1} shards" and found["tensors"] == len(theirs)
        assert found["looks_like"][0]["converter"] == "dit-diffusers"
    (Path("t") / files[1].name).write_bytes(files[1].read_bytes()[:-4])
    code, _, err = vgm("inspect", files[0])
    assert code == 1 and "is cut off" in err


def test_large_tensors_are_not_read(vgm: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = state_of("dit")
    save_file(ours, "x.safetensors")
    monkeypatch.setattr(inspection, "SMALL", 100)
    state = inspection.light([Path("x.safetensors")], limits.safetensors_header(Path("x.safetensors"))[0])
    assert {v.is_meta for v in state.values() if v.numel() > 100} == {True}
    assert {v.is_meta for v in state.values() if v.numel() <= 100} == {False}
    assert facts(vgm, "x.safetensors")["looks_like"][0]["fits"]


def test_ours(vgm: Call) -> None:
    """What a file of ours says, with the name of its network."""
    ours, _ = state_of("dit")
    torch.save(ours, "DiT.pt")
    assert vgm("convert", "DiT.pt", "o.safetensors", "num_heads=2")[0] == 0
    found = facts(vgm, "o.safetensors")
    assert found["component"]["kwargs"]["hidden_size"] == DIT["hidden_size"] and found["presets"] == []
    out = vgm("inspect", "o.safetensors", "--tensors")[1]
    assert "source      DiT.pt (dit)" in out and "x_embedder.proj.weight  f32 (32, 4, 2, 2)" in out


@pytest.mark.parametrize("name", ["x.txt", "x"])
def test_what_cannot_be_looked_into(name: str, vgm: Call) -> None:
    Path(name).write_text("hello")
    code, _, err = vgm("inspect", name)
    assert code == 2 and "not a kind of file that can be looked into" in err
    code, _, err = vgm("inspect", "nowhere.pt")
    assert code == 2 and "nowhere.pt" in err
