"""Published layouts of StyleGAN weights, both ways.

stylegan: variables of NVlabs/stylegan@1e0d5c7 (TensorFlow), out of its pickles. stylegan2:
modules of NVlabs/stylegan2-ada-pytorch@d72cc7d. stylegan2-tf: variables of NVlabs/stylegan2 and stylegan2-ada.
stylegan-rosinality: rosinality/style-based-gan-pytorch@07fa60b. The discriminators' have "-discriminator" at the end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vgm_cli.convert_api import Files, Layout, Published
from vgm_cli.errors import FAILED, USAGE, VgmError

from .port import FUSED_FROM, WIDTHS
from .stylegan2 import setup_filter

State = Mapping[str, Tensor]
FUSED_SIDE = 128  # from here on TensorFlow doubles by a transposed convolution, which turns its kernel round


def need(state: State, key: str) -> Tensor:
    if key not in state:
        raise KeyError(key)
    return state[key]


def tf_to_torch(v: Tensor) -> Tensor:
    """Convolutions (h, w, in, out) -> (out, in, h, w), dense (in, out) -> (out, in)."""
    return v.permute(3, 2, 0, 1).contiguous() if v.ndim == 4 else v.T.contiguous()


def torch_to_tf(v: Tensor) -> Tensor:
    return v.permute(2, 3, 1, 0).contiguous() if v.ndim == 4 else v.T.contiguous()


def base_and_limit(widths: Mapping[int, int]) -> tuple[int, int]:
    """{side: channels} -> (channels * side where the limit is not reached, limit)."""
    limit = max(widths.values())
    free = [s * c for s, c in widths.items() if c < limit]
    return (free[0] if free else limit * max(widths)), limit


# -- StyleGAN, TensorFlow --------------------------------------------------------------------------------------------


def plain(state: State) -> dict[str, Tensor]:
    """The state with the names of networks (G/, Gs/, D/, G_synthesis/, G_mapping/) removed from its tensors' names."""
    return {ours: state[theirs] for ours, theirs in plain_pairs(state).items()}


def plain_pairs(names: Iterable[str]) -> dict[str, str]:
    """{tensor's name without its network's name: its name in the file}."""
    return {re.sub(r"^(Gs?|D)/", "", k).replace("G_synthesis/", "synthesis/").replace("G_mapping/", "mapping/"): k
            for k in names}  # fmt: skip


def tf_sides(keys: Iterable[str]) -> list[int]:
    return sorted({int(m[1]) for k in keys if (m := re.search(r"(?:^|/)(\d+)x\1/", k))})


def layer_names(count: int, first: tuple[str, str] = ("Const", "Conv")) -> list[str]:
    """TensorFlow's scopes of the layers: two for every side."""
    rest = [f"{4 << i}x{4 << i}/{kind}" for i in range(1, count) for kind in ("Conv0_up", "Conv1")]
    return [f"4x4/{first[0]}", f"4x4/{first[1]}", *rest]


def turned(scope: str, weight: Tensor) -> Tensor:
    side = int(scope.partition("x")[0])
    return weight.flip(2, 3) if scope.endswith("Conv0_up") and side >= FUSED_SIDE else weight


def generator_to_ours(state: State) -> dict[str, Tensor]:
    state = plain(state)
    count = len(tf_sides(state))
    lod = state.get("lod", torch.zeros(()))
    out = {"lod": lod.reshape(()), "w_avg": need(state, "dlatent_avg")}
    if "mapping/LabelConcat/weight" in state:
        out["mapping.label"] = state["mapping/LabelConcat/weight"]
    for i in range(sum(bool(re.fullmatch(r"mapping/Dense\d+/weight", k)) for k in state)):
        out[f"mapping.layers.{i}.weight"] = tf_to_torch(need(state, f"mapping/Dense{i}/weight"))
        out[f"mapping.layers.{i}.bias"] = need(state, f"mapping/Dense{i}/bias")
    out["const"] = need(state, "synthesis/4x4/Const/const")
    for i, scope in enumerate(layer_names(count)):
        at, ours = f"synthesis/{scope}", f"layers.{i}"
        if i:
            out[f"{ours}.conv.weight"] = turned(scope, tf_to_torch(need(state, f"{at}/weight")))
        out[f"{ours}.bias"] = need(state, f"{at}/bias")
        out[f"{ours}.noise_strength"] = need(state, f"{at}/Noise/weight")
        out[f"{ours}.noise"] = need(state, f"synthesis/noise{i}")[0, 0]
        out[f"{ours}.style.weight"] = tf_to_torch(need(state, f"{at}/StyleMod/weight"))
        out[f"{ours}.style.bias"] = need(state, f"{at}/StyleMod/bias")
    for i in range(count):
        at = f"synthesis/ToRGB_lod{count - 1 - i}"
        out[f"to_rgb.{i}.weight"] = tf_to_torch(need(state, f"{at}/weight"))
        out[f"to_rgb.{i}.bias"] = need(state, f"{at}/bias")
    return out


def generator_from_ours(state: State) -> dict[str, Tensor]:
    count = sum(k.startswith("to_rgb.") for k in state) // 2
    lod = need(state, "lod")
    out = {"lod": lod, "synthesis/lod": lod, "dlatent_avg": need(state, "w_avg")}
    if "mapping.label" in state:
        out["mapping/LabelConcat/weight"] = state["mapping.label"]
    for i in range(sum(bool(re.fullmatch(r"mapping\.layers\.\d+\.bias", k)) for k in state)):
        out[f"mapping/Dense{i}/weight"] = torch_to_tf(need(state, f"mapping.layers.{i}.weight"))
        out[f"mapping/Dense{i}/bias"] = need(state, f"mapping.layers.{i}.bias")
    out["synthesis/4x4/Const/const"] = need(state, "const")
    for i, scope in enumerate(layer_names(count)):
        at, ours = f"synthesis/{scope}", f"layers.{i}"
        if i:
            out[f"{at}/weight"] = torch_to_tf(turned(scope, need(state, f"{ours}.conv.weight")))
        out[f"{at}/bias"] = need(state, f"{ours}.bias")
        out[f"{at}/Noise/weight"] = need(state, f"{ours}.noise_strength")
        out[f"synthesis/noise{i}"] = need(state, f"{ours}.noise")[None, None]
        out[f"{at}/StyleMod/weight"] = torch_to_tf(need(state, f"{ours}.style.weight"))
        out[f"{at}/StyleMod/bias"] = need(state, f"{ours}.style.bias")
    for i in range(count):
        at = f"synthesis/ToRGB_lod{count - 1 - i}"
        out[f"{at}/weight"] = torch_to_tf(need(state, f"to_rgb.{i}.weight"))
        out[f"{at}/bias"] = need(state, f"to_rgb.{i}.bias")
    return out


def generator_config(state: State) -> dict[str, Any]:
    state = plain(state)
    own = tf_sides(state)
    widths = {s: len(need(state, f"synthesis/{name}/bias")) for s, name in zip(own, layer_names(len(own))[1::2])}
    base, limit = base_and_limit(widths)
    dense = sorted((k for k in state if re.fullmatch(r"mapping/Dense\d+/weight", k)), key=lambda k: int(k[13:-7]))
    first, last = need(state, dense[0]), need(state, dense[-1])
    label = state.get("mapping/LabelConcat/weight")
    return {
        "size": own[-1],
        "in_channels": len(need(state, "synthesis/ToRGB_lod0/bias")),
        "num_classes": 0 if label is None else len(label),
        "latent_size": first.shape[0] if label is None else label.shape[1],
        "w_dim": last.shape[1],
        "mapping_layers": len(dense),
        "mapping_width": first.shape[1],
        "fmap_base": base // 2,
        "fmap_max": limit,
    }


def discriminator_to_ours(state: State) -> dict[str, Tensor]:
    state = plain(state)
    return {"lod": state.get("lod", torch.zeros(())).reshape(())} | {
        ours: need(state, theirs) if ours.endswith("bias") else tf_to_torch(need(state, theirs))
        for theirs, ours in discriminator_names(len(tf_sides(state)))
    }


def discriminator_from_ours(state: State) -> dict[str, Tensor]:
    count = sum(k.startswith("from_rgb.") for k in state) // 2
    return {"lod": need(state, "lod")} | {
        theirs: need(state, ours) if ours.endswith("bias") else torch_to_tf(need(state, ours))
        for theirs, ours in discriminator_names(count)
    }


def discriminator_names(count: int) -> list[tuple[str, str]]:
    scopes = [(f"FromRGB_lod{count - 1 - i}", f"from_rgb.{i}") for i in range(count)]
    for i in range(1, count):
        scopes += [
            (f"{4 << i}x{4 << i}/{k}", f"blocks.{i - 1}.{o}") for k, o in (("Conv0", "conv0"), ("Conv1_down", "conv1"))
        ]
    scopes += [("4x4/Conv", "conv"), ("4x4/Dense0", "dense"), ("4x4/Dense1", "out")]
    return [(f"{t}/{part}", f"{o}.{part}") for t, o in scopes for part in ("weight", "bias")]


def discriminator_config(state: State) -> dict[str, Any]:
    state = plain(state)
    own = tf_sides(state)
    widths = {s: len(need(state, f"FromRGB_lod{len(own) - 1 - i}/bias")) for i, s in enumerate(own)}
    base, limit = base_and_limit({**widths, 2: len(need(state, "4x4/Dense0/bias"))})
    classes = len(need(state, "4x4/Dense1/bias"))
    extra = need(state, "4x4/Conv/weight").shape[2] - widths[4]
    return {
        "size": own[-1],
        "in_channels": need(state, "FromRGB_lod0/weight").shape[2],
        "num_classes": classes if classes > 1 else 0,
        "fmap_base": base // 2,
        "fmap_max": limit,
        "group_size": 4 if extra else 1,
        "group_features": extra or 1,
    }


def is_tf_generator(keys: Iterable[str]) -> bool:
    own = set(plain(dict.fromkeys(keys)))  # type: ignore[arg-type]
    return {"synthesis/4x4/Const/const", "synthesis/4x4/Conv/StyleMod/weight"} <= own


def is_tf_discriminator(keys: Iterable[str]) -> bool:
    return {"FromRGB_lod0/weight", "4x4/Dense1/weight"} <= set(plain(dict.fromkeys(keys)))  # type: ignore[arg-type]


# -- StyleGAN2-ADA, PyTorch ------------------------------------------------------------------------------------------

FILTER = "resample_filter"


def stylegan2_to_ours(state: State) -> dict[str, Tensor]:
    """Convert the generator or the discriminator: names stay; the resampling filter is stored once instead of in
    every layer."""
    if not is_stylegan2(state) and not is_stylegan2_discriminator(state):
        raise KeyError("synthesis.b4.const")
    out = {k.removeprefix("synthesis.").replace("mapping.w_avg", "w_avg"): v
           for k, v in state.items() if not k.endswith(FILTER)}  # fmt: skip
    return {**out, FILTER: resampling(state)}


def resampling(state: State) -> Tensor:
    """The filter of everything that doubles or halves: (n, n), or (n,) separable. Official convolutions that do neither
    store one too, always (1, 3, 3, 1), and use none. VgmError: layers with different filters."""
    layers = ("conv0", "skip") if is_stylegan2(state) else ("conv1", "skip")
    used = rf"(synthesis\.)?b\d+\.(({'|'.join(layers)})\.)?{FILTER}"
    kernels = [v for k, v in state.items() if re.fullmatch(used, k)]
    if any(not torch.equal(v, kernels[0]) for v in kernels):
        raise VgmError("the layers resample with different filters, which a network here cannot", code=FAILED)
    return kernels[0] if kernels else setup_filter((1, 3, 3, 1))


def taps_of(state: State) -> list[float]:
    f = resampling(state)
    return (f.sum(0) if f.ndim == 2 else f).tolist()  # type: ignore[no-any-return]


def stylegan2_from_ours(state: State) -> dict[str, Tensor]:
    f, plain = need(state, FILTER), setup_filter((1, 3, 3, 1))
    names = [k for k in state if k not in (FILTER, "w_avg")]
    generator = "w_avg" in state
    out = {k if not generator or k.startswith("mapping.") else f"synthesis.{k}": state[k] for k in names}
    if generator:
        out["mapping.w_avg"] = state["w_avg"]
    for module in {
        k.rpartition(".")[0] for k in names if re.fullmatch(r"b\d+\.(conv0|conv1|conv|skip|fromrgb)\.weight", k)
    }:
        block, _, layer = module.partition(".")
        own = f if layer in (("conv0", "skip") if generator else ("conv1", "skip")) else plain
        prefix = "synthesis." if generator else ""
        out[f"{prefix}{module}.{FILTER}"] = own
        if layer == "conv1":
            out[f"{prefix}{block}.{FILTER}"] = f
    return out


def stylegan2_config(state: State) -> dict[str, Any]:
    own = sorted({int(m[1]) for k in state if (m := re.match(r"synthesis\.b(\d+)\.", k))})
    at = {s: f"synthesis.b{s}" for s in own}
    base, limit = base_and_limit({4 << i: len(need(state, f"{at[s]}.conv1.bias")) for i, s in enumerate(own)})
    top = at[own[-1]]
    mapping = mapping_config(state)
    skip, resnet = f"{at[own[0]]}.torgb.weight" in state, f"{top}.skip.weight" in state
    return {
        "size": own[-1],
        "in_channels": len(need(state, f"{top}.torgb.bias")),
        "latent_size": mapping.pop("fan_in"),
        "w_dim": mapping.pop("out"),
        **mapping,
        "channel_base": base,
        "channel_max": limit,
        "architecture": "skip" if skip else "resnet" if resnet else "orig",
        "use_noise": f"{top}.conv1.noise_const" in state,
        "clamp": 256.0,
        "taps": taps_of(state),
    }


def mapping_config(state: State) -> dict[str, Any]:
    """Keywords of the mapping network, read off mapping.fc<i> and mapping.embed."""
    count = sum(bool(re.fullmatch(r"mapping\.fc\d+\.bias", k)) for k in state)
    label = state.get("mapping.embed.weight")
    embed = 0 if label is None else label.shape[0]
    if not count:
        return {"fan_in": 0, "out": embed, "mapping_layers": 0, "num_classes": 0 if label is None else label.shape[1]}
    width, fan_in = need(state, "mapping.fc0.weight").shape
    return {
        "fan_in": fan_in - embed,
        "out": len(need(state, f"mapping.fc{count - 1}.bias")),
        "mapping_layers": count,
        "mapping_width": width,
        "embed": embed or None,
        "num_classes": 0 if label is None else label.shape[1],
    }


def stylegan2_discriminator_config(state: State) -> dict[str, Any]:
    own = sorted({int(m[1]) for k in state if (m := re.match(r"b(\d+)\.", k))})
    widths = {own[0]: len(need(state, f"b{own[0]}.conv.bias"))}
    widths |= {s: len(need(state, f"b{s}.conv0.bias")) for s in own[1:]}
    base, limit = base_and_limit({4 << i: widths[s] for i, s in enumerate(own)})
    mapping = mapping_config(state)
    mapping.pop("fan_in")
    cmap = mapping.pop("out")
    skip, resnet = f"b{own[0]}.fromrgb.weight" in state, f"b{own[-1]}.skip.weight" in state
    return {
        "size": own[-1],
        "in_channels": need(state, f"b{own[-1]}.fromrgb.weight").shape[1],
        **(mapping if mapping["num_classes"] else {"num_classes": 0}),
        "cmap_dim": cmap or None,
        "channel_base": base,
        "channel_max": limit,
        "architecture": "skip" if skip else "resnet" if resnet else "orig",
        "group_features": need(state, f"b{own[0]}.conv.weight").shape[1] - widths[own[0]],
        "clamp": 256.0,
        "taps": taps_of(state),
    }


def is_stylegan2(keys: Iterable[str]) -> bool:
    own = set(keys)
    return any(re.fullmatch(r"synthesis\.b\d+\.const", k) for k in own) and "mapping.fc0.weight" in own


def is_stylegan2_discriminator(keys: Iterable[str]) -> bool:
    own = set(keys)
    return any(re.fullmatch(r"b\d+\.out\.weight", k) for k in own) and any(k.endswith(f".conv1.{FILTER}") for k in own)


# -- StyleGAN2, TensorFlow -------------------------------------------------------------------------------------------


def tf2_generator_names(count: int, has: Callable[[str], bool]) -> list[tuple[str, str, str]]:
    """(theirs, ours, kind of change) of the synthesis network."""
    rows = [("synthesis/4x4/Const/const", "b4.const", "first")]
    scopes = layer_names(count)[1:]
    for i, scope in enumerate(scopes):
        side = scope.partition("x")[0]
        ours = f"b{side}.conv{0 if scope.endswith('_up') else 1}"
        at = f"synthesis/{scope}"
        rows += [
            (f"{at}/weight", f"{ours}.weight", "turn" if scope.endswith("_up") else "matrix"),
            (f"{at}/bias", f"{ours}.bias", ""), (f"{at}/mod_weight", f"{ours}.affine.weight", "matrix"),
            (f"{at}/mod_bias", f"{ours}.affine.bias", "one"),
            (f"{at}/noise_strength", f"{ours}.noise_strength", "scalar"),
            (f"synthesis/noise{i}", f"{ours}.noise_const", "first2"),
        ]  # fmt: skip
    for i in range(count):
        at, ours = f"synthesis/{4 << i}x{4 << i}", f"b{4 << i}"
        if has(f"{at}/ToRGB/weight") or has(f"{ours}.torgb.weight"):
            rows += [(f"{at}/ToRGB/weight", f"{ours}.torgb.weight", "matrix"),
                     (f"{at}/ToRGB/bias", f"{ours}.torgb.bias", ""),
                     (f"{at}/ToRGB/mod_weight", f"{ours}.torgb.affine.weight", "matrix"),
                     (f"{at}/ToRGB/mod_bias", f"{ours}.torgb.affine.bias", "one")]  # fmt: skip
        if has(f"{at}/Skip/weight") or has(f"{ours}.skip.weight"):
            rows.append((f"{at}/Skip/weight", f"{ours}.skip.weight", "turn"))
    return rows


def tf2_mapping_names(count: int, labelled: bool) -> list[tuple[str, str, str]]:
    rows = [
        ("mapping/LabelEmbed/weight", "mapping.embed.weight", "matrix"),
        ("mapping/LabelEmbed/bias", "mapping.embed.bias", ""),
    ]
    out = rows if labelled else []
    for i in range(count):
        out += [
            (f"mapping/Dense{i}/weight", f"mapping.fc{i}.weight", "matrix"),
            (f"mapping/Dense{i}/bias", f"mapping.fc{i}.bias", ""),
        ]
    return out


def change(v: Tensor, kind: str, forward: bool) -> Tensor:
    if kind == "matrix":
        return tf_to_torch(v) if forward else torch_to_tf(v)
    if kind == "turn":
        return tf_to_torch(v).flip(2, 3) if forward else torch_to_tf(v.flip(2, 3))
    if kind == "one":
        return v + 1 if forward else v - 1
    if kind == "first":
        return v[0] if forward else v[None]
    if kind == "first2":
        return v[0, 0] if forward else v[None, None]
    if kind == "scalar":
        return v.reshape(())
    return v


def tf2_to_ours(state: State) -> dict[str, Tensor]:
    state = plain(state)
    depth = sum(bool(re.fullmatch(r"mapping/Dense\d+/bias", k)) for k in state)
    rows = tf2_mapping_names(depth, "mapping/LabelEmbed/weight" in state)
    rows += tf2_generator_names(len(tf_sides(state)), lambda k: k in state)
    out = {ours: change(need(state, theirs), kind, True) for theirs, ours, kind in rows}
    return {**out, "w_avg": need(state, "dlatent_avg"), FILTER: setup_filter((1, 3, 3, 1))}


def tf2_from_ours(state: State) -> dict[str, Tensor]:
    depth = sum(bool(re.fullmatch(r"mapping\.fc\d+\.bias", k)) for k in state)
    rows = tf2_mapping_names(depth, "mapping.embed.weight" in state)
    rows += tf2_generator_names(sum(k.endswith(".conv1.weight") for k in state), lambda k: k in state)
    out = {theirs: change(need(state, ours), kind, False) for theirs, ours, kind in rows}
    return {**out, "dlatent_avg": need(state, "w_avg")}


def tf2_config(state: State) -> dict[str, Any]:
    return {**stylegan2_config(stylegan2_from_ours(tf2_to_ours(state))), "clamp": None}


def is_tf2_generator(keys: Iterable[str]) -> bool:
    own = set(plain(dict.fromkeys(keys)))  # type: ignore[arg-type]
    return {"synthesis/4x4/Const/const", "synthesis/4x4/Conv/mod_weight"} <= own


# -- the port --------------------------------------------------------------------------------------------------------

LEVELS = len(WIDTHS)


def blur_buffers(name: str, channels: int) -> dict[str, Tensor]:
    taps = torch.tensor([1.0, 2.0, 1.0])
    kernel = (torch.outer(taps, taps) / 16).repeat(channels, 1, 1, 1)
    return {f"{name}.weight": kernel, f"{name}.weight_flip": kernel.clone()}


def check_blur(state: State) -> None:
    """VgmError: a blur other than the networks' own [1, 2, 1]."""
    for name in (k.removesuffix(".weight_flip") for k in state if k.endswith(".weight_flip")):
        for key, own in blur_buffers(name, len(state[f"{name}.weight_flip"])).items():
            if key in state and not (state[key].shape == own.shape and torch.allclose(state[key].float(), own)):
                raise VgmError(f"{key} is another blur than [1, 2, 1], which the network here has", code=FAILED)


def port_names(mapping_layers: int) -> list[tuple[str, str]]:
    """(theirs, ours) of every module of the generator but the doubling convolutions; theirs end in weight_orig."""
    rows = [(f"style.{2 * i + 1}.linear", f"style.{i}") for i in range(mapping_layers)]
    for i in range(LEVELS):
        at, ours = f"generator.progression.{i}", f"levels.{i}"
        rows += [(f"{at}.conv2.conv", f"{ours}.conv2"), (f"generator.to_rgb.{i}.conv", f"to_rgb.{i}")]
        rows += [(f"{at}.adain{k}.style.linear", f"{ours}.adain{k}.style") for k in (1, 2)]
        if 0 < i < FUSED_FROM:
            rows.append((f"{at}.conv1.1.conv", f"{ours}.conv1"))
    return rows


def port_to_ours(state: State) -> dict[str, Tensor]:
    check_blur(state)
    count = sum(bool(re.fullmatch(r"style\.\d+\.linear\.bias", k)) for k in state)
    out = {"levels.0.input": need(state, "generator.progression.0.conv1.input")}
    for theirs, ours in port_names(count):
        out[f"{ours}.weight"] = need(state, f"{theirs}.weight_orig")
        out[f"{ours}.bias"] = need(state, f"{theirs}.bias")
    for i in range(LEVELS):
        at, ours = f"generator.progression.{i}", f"levels.{i}"
        for k in (1, 2):
            out[f"{ours}.noise{k}"] = need(state, f"{at}.noise{k}.weight_orig").flatten()
        if i >= FUSED_FROM:  # a transposed convolution's weight: (in, out), turned round
            out[f"{ours}.conv1.weight"] = need(state, f"{at}.conv1.0.weight").transpose(0, 1).flip(2, 3).contiguous()
            out[f"{ours}.conv1.bias"] = need(state, f"{at}.conv1.0.bias")
    return {**out, "w_avg": torch.zeros(need(state, "style.1.linear.bias").shape)}


def port_from_ours(state: State) -> dict[str, Tensor]:
    count = sum(bool(re.fullmatch(r"style\.\d+\.bias", k)) for k in state)
    out = {"generator.progression.0.conv1.input": need(state, "levels.0.input")}
    for theirs, ours in port_names(count):
        out[f"{theirs}.weight_orig"] = need(state, f"{ours}.weight")
        out[f"{theirs}.bias"] = need(state, f"{ours}.bias")
    for i in range(LEVELS):
        at, ours = f"generator.progression.{i}", f"levels.{i}"
        for k in (1, 2):
            out[f"{at}.noise{k}.weight_orig"] = need(state, f"{ours}.noise{k}").view(1, -1, 1, 1)
        if i:
            fused = i >= FUSED_FROM
            bias = need(state, f"{ours}.conv1.bias")
            out |= blur_buffers(f"{at}.conv1.{1 if fused else 2}", len(bias))
            if fused:
                out[f"{at}.conv1.0.weight"] = (
                    need(state, f"{ours}.conv1.weight").transpose(0, 1).flip(2, 3).contiguous()
                )
                out[f"{at}.conv1.0.bias"] = bias
    return out


def port_config(state: State) -> dict[str, Any]:
    return {
        "w_dim": len(need(state, "style.1.linear.bias")),
        "mapping_layers": sum(bool(re.fullmatch(r"style\.\d+\.linear\.bias", k)) for k in state),
        "widths": [need(state, f"generator.to_rgb.{i}.conv.weight_orig").shape[1] for i in range(LEVELS)],
    }


def port_discriminator_names(activated: bool) -> list[tuple[str, str]]:
    """(theirs up to the parameter's name, ours); halving convolutions of large sides keep their plain weight."""
    rows = [("linear.linear.{}_orig", "linear")]
    for i in range(LEVELS):
        at = f"progression.{LEVELS - 1 - i}"
        second = "conv2.0.conv.{}_orig" if i == 0 else "conv2.1.{}" if i >= FUSED_FROM else "conv2.1.conv.{}_orig"
        rows += [(f"{at}.conv1.0.conv.{{}}_orig", f"blocks.{i}.conv1"), (f"{at}.{second}", f"blocks.{i}.conv2")]
        entry = "0.conv" if activated else "conv"
        rows.append((f"from_rgb.{LEVELS - 1 - i}.{entry}.{{}}_orig", f"from_rgb.{i}"))
    return rows


def pairs_of(activated: bool) -> list[tuple[str, str]]:
    rows = []
    for theirs, ours in port_discriminator_names(activated):
        rows += [
            (theirs.format("weight"), f"{ours}.weight"),
            (theirs.replace("_orig", "").format("bias"), f"{ours}.bias"),
        ]
    return rows


def port_discriminator(activated: bool, name: str, summary: str) -> Layout:
    mark = "from_rgb.0.0.conv.bias" if activated else "from_rgb.0.conv.bias"

    def to_ours(state: State) -> dict[str, Tensor]:
        check_blur(state)
        return {ours: need(state, theirs) for theirs, ours in pairs_of(activated)}

    def from_ours(state: State) -> dict[str, Tensor]:
        out = {theirs: need(state, ours) for theirs, ours in pairs_of(activated)}
        for i in range(1, LEVELS):
            out |= blur_buffers(f"progression.{LEVELS - 1 - i}.conv2.0", len(need(state, f"blocks.{i}.conv2.bias")))
        return out

    def config(state: State) -> dict[str, Any]:
        entry = "0.conv" if activated else "conv"
        widths = [len(need(state, f"from_rgb.{LEVELS - 1 - i}.{entry}.bias")) for i in range(LEVELS)]
        return {"widths": widths, "from_rgb_activate": activated}

    def recognise(keys: Iterable[str]) -> bool:
        return {mark, "linear.linear.weight_orig"} <= set(keys)

    return Layout(
        name=name,
        component="stylegan-rosinality-discriminator",
        summary=summary,
        recognise=recognise,
        to_ours=to_ours,
        from_ours=from_ours,
        config=config,
    )


def is_port(keys: Iterable[str]) -> bool:
    return {"generator.progression.0.conv1.input", "style.1.linear.weight_orig"} <= set(keys)


# -- what converted files say of themselves --------------------------------------------------------------------------


def header(config: Mapping[str, Any]) -> dict[str, Any]:
    """Header parts with which a converted generator can be sampled from as it is; truncation is the user's choice."""
    size, channels = config.get("size", 1024), config.get("in_channels", 3)
    classes = config.get("num_classes", 0)
    data = {
        "sample_shape": [channels, size, size],
        "image_size": size,
        "image_channels": channels,
        "num_classes": classes,
    }
    recipe = {"paper": "stylegan", "sampler": {"name": "stylegan", "truncation_psi": 1.0}}
    return {"recipe": recipe, "data": data}


def allows(config: Mapping[str, Any]) -> None:
    """The published layouts start from 4x4."""
    size, base = config.get("size", 1024), config.get("base") or 4
    if size & (size - 1) or base != 4:
        raise VgmError(f"size={size} does not grow from 4x4 pixels, as this layout has it", code=USAGE)


GENERATOR = Layout(
    name="stylegan",
    component="stylegan",
    summary="NVlabs/stylegan, TensorFlow variables",
    recognise=is_tf_generator,
    to_ours=generator_to_ours,
    from_ours=generator_from_ours,
    config=generator_config,
    allows=allows,
    files=Files(names=plain_pairs),
    published=Published(header=header),
)
DISCRIMINATOR = Layout(
    name="stylegan-discriminator",
    component="stylegan-discriminator",
    summary="its discriminator",
    recognise=is_tf_discriminator,
    to_ours=discriminator_to_ours,
    from_ours=discriminator_from_ours,
    config=discriminator_config,
    allows=allows,
    files=Files(names=plain_pairs),
)
GENERATOR2 = Layout(
    name="stylegan2",
    component="stylegan2",
    summary="NVlabs/stylegan2-ada-pytorch",
    recognise=is_stylegan2,
    to_ours=stylegan2_to_ours,
    from_ours=stylegan2_from_ours,
    config=stylegan2_config,
    allows=allows,
    published=Published(header=header),
)
DISCRIMINATOR2 = Layout(
    name="stylegan2-discriminator",
    component="stylegan2-discriminator",
    summary="its discriminator",
    recognise=is_stylegan2_discriminator,
    to_ours=stylegan2_to_ours,
    from_ours=stylegan2_from_ours,
    config=stylegan2_discriminator_config,
    allows=allows,
)
GENERATOR2_TF = Layout(
    name="stylegan2-tf",
    component="stylegan2",
    summary="NVlabs/stylegan2 and stylegan2-ada, TensorFlow variables",
    recognise=is_tf2_generator,
    to_ours=tf2_to_ours,
    from_ours=tf2_from_ours,
    config=tf2_config,
    allows=allows,
    files=Files(names=plain_pairs),
    published=Published(header=header),
)
PORT = Layout(
    name="stylegan-rosinality",
    component="stylegan-rosinality",
    summary="rosinality/style-based-gan-pytorch",
    recognise=is_port,
    to_ours=port_to_ours,
    from_ours=port_from_ours,
    config=port_config,
    published=Published(header=header),
)
PORT_DISCRIMINATOR = port_discriminator(True, "stylegan-rosinality-discriminator", "its discriminator")
PORT_DISCRIMINATOR_PLAIN = port_discriminator(
    False, "stylegan-rosinality-discriminator-plain", "its discriminator without activation at the entry"
)
