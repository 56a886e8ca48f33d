"""`vgm restore`: degraded images (or images to degrade) and a prior in; restored images, figures and records out.

Image i depends on (seed, i) alone: masks, kernels and noise come from one generator per item, the walk from another.
"""

from __future__ import annotations

import inspect
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgm_cli import __version__, atomic, limits
from vgm_cli.api import Request, generators, seed_of
from vgm_cli.data import SHIPPED, open_dataset
from vgm_cli.data.decode import SUFFIXES, Unreadable, load_image
from vgm_cli.data.transforms import crop_to
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.engine.checkpoint import Loaded
from vgm_cli.engine.sample.loop import class_labels, class_numbers, each_step, refuse_non_finite
from vgm_cli.engine.sample.output import free_name
from vgm_cli.engine.sample.setup import named
from vgm_cli.errors import FAILED, USAGE, VgmError, unknown
from vgm_cli.images import compared, save_png, to_uint8
from vgm_cli.metrics.image import WINDOW, load_lpips, psnr, ssim
from vgm_cli.operators.base import Operator
from vgm_cli.operators.latent import Decoded
from vgm_cli.operators.noise import Clean, Noise, noise_class
from vgm_cli.recipe import parse_yaml
from vgm_cli.registry import bind, load_target, registry, signature
from vgm_cli.ui import Progress

SHIPPED_N = 16  # images taken of a shipped set unless told otherwise
GRID_ITEMS = 32  # items shown in the grid

Perceptual = Callable[[Tensor, Tensor], Tensor]


# -- what is asked ---------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """Component nodes of the degradation and the method, and the noise."""

    task: dict[str, Any]
    method: dict[str, Any]
    noise: Noise
    noise_node: dict[str, Any]


def methods() -> list[str]:
    """Samplers that restore."""
    return sorted(c.name for c in registry().components.values() if c.kind == "sampler" and "restore" in c.verbs)


def settings_for(task: str, method: str, noise: str, overrides: Sequence[str]) -> Settings:
    """KEY=VALUE words go to whichever of task, noise, method has the keyword; task.KEY, noise.KEY, method.KEY choose.

    VgmError: unknown names or keywords, a keyword that two of them have.
    """
    r = registry()
    if ":" not in method and method not in methods():
        if method in r.names("sampler"):
            known = ", ".join(methods())
            raise VgmError(f"'{method}' samples, it does not restore", f"methods that restore: {known}", USAGE)
        raise unknown("restoration method", method, methods())
    operator, sampler, added = r.find("operator", task), r.find("sampler", method), noise_class(noise)
    targets = {
        "task": load_target(operator.target, task),
        "noise": added,
        "method": load_target(sampler.target, method),
    }
    keys = {where: keywords(target) for where, target in targets.items()}
    keys["method"].append("preset")
    nodes: dict[str, dict[str, Any]] = {"task": {"name": task}, "noise": {}, "method": {"name": method}}
    for text in overrides:
        key, eq, value = text.partition("=")
        if not eq:
            raise VgmError(f"'{text}' is not KEY=VALUE", "example: scale=4", USAGE)
        where, dot, rest = key.partition(".")
        if dot and where in keys:
            owners, key = [where], rest
        else:
            owners = [w for w, known in keys.items() if key in known]
        if len(owners) > 1:
            hint = f"say which: {' or '.join(f'{w}.{key}' for w in owners)}"
            raise VgmError(f"both {' and '.join(owners)} have a '{key}'", hint, USAGE)
        if not owners or key not in keys[owners[0]]:
            raise unknown(
                "key", key, [k for w in (owners or keys) for k in keys[w]], f"{task}, {noise} noise or {method}"
            )
        nodes[owners[0]][key] = parse_yaml(value, text)
    made = added(**bind(added, nodes["noise"], {}, f"{noise} noise"))
    return Settings(nodes["task"], nodes["method"], made, {"name": noise, **nodes["noise"]})


def keywords(target: Any) -> list[str]:
    if target.__init__ is object.__init__:
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [n for n, p in signature(target).parameters.items() if p.kind in named]


def check_model(loaded: Loaded, target: str) -> tuple[int, int, int]:
    """The shape of the images that the model makes. VgmError: not a diffusion or flow network."""
    if not isinstance(loaded.view, Denoiser):
        raise VgmError(
            f"{target} is no diffusion or flow network, it cannot be a prior",
            "a model trained by dit, sit, adm-unet, … can; `vgm train dps` makes a small one",
            USAGE,
        )
    shape = tuple(loaded.header.data.get("sample_shape") or ())
    if len(shape) != 3:
        raise VgmError(f"{loaded.path} does not say the shape of its images", code=USAGE)
    if loaded.codec is not None:
        device = next(loaded.model.parameters()).device
        with torch.no_grad():
            shape = tuple(loaded.codec.decode(torch.zeros(1, *shape, device=device))[0].shape)
    return shape[0], shape[1], shape[2]


def labels_for(loaded: Loaded, wanted: str, n: int, data: Sequence[int] | None) -> list[int] | None:
    """One label per item; None for the null class or an unconditional network.

    wanted: "" for the null class where the network has one, "data", or classes. VgmError: no such labels.
    """
    classes = loaded.header.data.get("num_classes") or 0
    if wanted not in ("", "data"):
        return class_labels(n, classes, class_numbers([w.strip() for w in wanted.split(",") if w.strip()], loaded))
    if not classes:
        if wanted:
            raise VgmError("this network is unconditional, it takes no labels", code=USAGE)
        return None
    if wanted == "" and null_condition(loaded, 1) is not None:
        return None
    if data is None or max(data, default=0) >= classes:
        raise VgmError(
            "this network needs labels, and the input has none that fit" if not wanted else "the input has no labels",
            f"--label 0 … {classes - 1}, one for all images or one each",
            USAGE,
        )
    return list(data)


def null_condition(loaded: Loaded, n: int) -> dict[str, Tensor] | None:
    """The condition "no class", where the network has it."""
    device = next(loaded.model.parameters()).device
    try:
        null = loaded.model.null_condition  # type: ignore[union-attr]
        return null({"y": torch.zeros(n, dtype=torch.long, device=device)})  # type: ignore[operator]
    except (AttributeError, VgmError):
        return None


# -- what is given ---------------------------------------------------------------------------------------------------


@dataclass
class Inputs:
    """names: one per image. truth: (N, C, H, W) in [-1, 1] or None. measured: (N, ...), None if the tool degrades."""

    names: list[str]
    truth: Tensor | None = None
    measured: Tensor | None = None
    labels: list[int] | None = None
    source: str = ""

    def __len__(self) -> int:
        return len(self.names)


def picked(count: int, n: int | None, all_of_it: bool) -> list[int]:
    """n positions spread evenly over count; None: all, or a few of a shipped set."""
    n = (count if all_of_it else min(SHIPPED_N, count)) if n is None else n
    if n > count:
        raise VgmError(f"-n {n}: the input has {count} image{'s' * (count != 1)}", code=USAGE)
    return [i * count // n for i in range(n)]


def open_truth(source: str, shape: tuple[int, int, int], n: int | None, split: str | None) -> Inputs:
    """Images to degrade, cropped to the model's shape. VgmError: nothing there, images smaller than the model's."""
    channels, height, width = shape
    path = Path(source)
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        image = decoded(path)
        check_large_enough(image.size, shape, path.name)
        pixels = np.array(crop_to(image.convert("L" if channels == 1 else "RGB"), height, "adm"))
        truth = torch.from_numpy(pixels.reshape(height, width, channels)).permute(2, 0, 1)[None]
        return Inputs([path.stem], truth.float() / 127.5 - 1, source=str(path))
    dataset = open_dataset(source, size=height, channels=channels, split=split)
    rows = picked(len(dataset), n, source not in SHIPPED)
    for i in rows:
        found = dataset.source.header(int(dataset.rows[i]))
        check_large_enough(found[:2], shape, dataset.name(i))
    labels = dataset.labels()
    return Inputs(
        [Path(dataset.name(i)).with_suffix("").as_posix() for i in rows],
        dataset.pixels(rows),
        labels=None if labels is None else [int(labels[i]) for i in rows],
        source=dataset.facts.root,
    )


def check_large_enough(size: tuple[int, int], shape: tuple[int, int, int], name: str) -> None:
    if size[0] < shape[2] or size[1] < shape[1]:
        raise VgmError(
            f"{name} is {size[0]}x{size[1]}, the model makes {shape[2]}x{shape[1]}: there is no truth to degrade",
            "--degraded if it is the degraded image itself",
            USAGE,
        )


def decoded(path: Path) -> Any:
    try:
        return load_image(path)
    except Unreadable as e:
        raise VgmError(f"{path} cannot be read: {e}", code=FAILED) from e


def image_files(source: str) -> list[Path]:
    """One image, or the images of a folder in the order of their names."""
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise VgmError(f"no such file or folder: {source}", code=USAGE)
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not files:
        raise VgmError(f"no images in {source}", "png, jpg, webp, … or an .npz with 'y'", USAGE)
    return files


def open_measured(source: str, operator: Operator, n: int | None) -> Inputs:
    """Already degraded images: files as [-1, 1], or array "y" of an .npz as it is.

    VgmError: nothing there, or another size than what the degradation makes of the model's images.
    """
    shape = operator.measurement_shape
    path = Path(source)
    if path.suffix == ".npz" and path.is_file():
        arrays = limits.read_npz(path, ["y"])
        if "y" not in arrays:
            raise VgmError(f"{source} has no array 'y'", "measurements.npz of an earlier restoration has", USAGE)
        y = torch.from_numpy(arrays["y"]).float()
        check_measured(tuple(y.shape[1:]), shape, source, operator)
        rows = picked(len(y), n, True)
        return Inputs([f"{i:06d}" for i in rows], measured=y[rows], source=source)
    files = image_files(source)
    files = [files[i] for i in picked(len(files), n, True)]
    rows_of = []
    for file in files:
        image = decoded(file).convert("L" if shape[0] == 1 else "RGB")
        a = torch.from_numpy(np.array(image).reshape(image.height, image.width, -1)).permute(2, 0, 1)
        check_measured(tuple(a.shape), shape, file.name, operator)
        rows_of.append(a.float() / 127.5 - 1)
    return Inputs([f.stem for f in files], measured=torch.stack(rows_of), source=source)


def check_measured(found: tuple[int, ...], wanted: tuple[int, ...], name: str, operator: Operator) -> None:
    if found != wanted:
        show = lambda s: "x".join(map(str, s))
        raise VgmError(
            f"{name} is {show(found)}; {operator.name} makes {show(wanted)} of the model's {show(operator.shape)}",
            "another model, other settings of the task, or --degrade if these are whole images; of an earlier "
            "restoration give measurements.npz, not its pictures",
            USAGE,
        )


# -- the work --------------------------------------------------------------------------------------------------------


@dataclass
class Restored:
    """Everything of N items. images, pictures (of what is degraded): (N, C, H, W) in [-1, 1]. curve: (steps, N)."""

    images: Tensor
    pictures: Tensor
    measured: Tensor
    baseline: Tensor | None
    residual: Tensor  # (N,) |y - A(image)|
    curve: Tensor
    state: dict[str, Tensor]
    info: dict[str, Any] = field(default_factory=dict)


def restore(
    loaded: Loaded,
    inputs: Inputs,
    settings: Settings,
    *,
    labels: Sequence[int] | None,
    seed: int = 0,
    steps: int | None = None,
    tries: int = 1,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: Any = None,
) -> Restored:
    """Degrade where that is asked, and restore. tries: walks per image; what fits the measurement best is kept."""
    device = torch.device(device)
    shape = check_model(loaded, str(loaded.path))
    task: Operator = registry().build("operator", settings.task)
    method = registry().build("sampler", settings.method)
    latent = tuple(loaded.header.data["sample_shape"])
    batches: list[dict[str, Any]] = []
    for start in range(0, len(inputs), batch_size):
        stop = min(start + batch_size, len(inputs))
        drawn = generators(seed_of("degrade", seed, i) for i in range(start, stop))
        operator = task.bind(shape, drawn, settings.noise, first=start)
        with torch.no_grad():
            if inputs.measured is None:
                assert inputs.truth is not None
                y = settings.noise(operator(inputs.truth[start:stop].to(device)), drawn)
            else:
                y = inputs.measured[start:stop].to(device)
        seen = operator if loaded.codec is None else Decoded(operator, loaded.codec, (latent[0], latent[1], latent[2]))
        best: dict[str, Any] = {}
        for k in range(tries):
            done = start * tries + k * (stop - start)
            tell = each_step(None, progress, done, stop - start)
            request = Request(
                shape=latent,
                generators=generators(seed_of("restore", seed, i, k) for i in range(start, stop)),
                cond=condition(loaded, labels, start, stop, device),
                steps=steps,
                device=device,
                operator=seen,
                measurement=y,
                callback=tell,
            )
            with torch.no_grad():
                x = method(loaded.view, request)
                x = (loaded.codec.decode(x.float()) if loaded.codec is not None else x).float()
                refuse_non_finite(x, start, f"a gentler {settings.method['name']}, or weights that are finite")
                residual = (y - operator(x)).flatten(1).norm(dim=1)
            keep_best(best, x.cpu(), residual.cpu(), request.info)
        with torch.no_grad():
            base = operator.baseline(y)
            batches.append(
                {
                    **best,
                    "measured": y.cpu(),
                    "pictures": operator.picture(y).cpu(),
                    "baseline": None if base is None else base.cpu(),
                    "state": {k: v.cpu() for k, v in operator.state().items()},
                }
            )
    joined = {k: torch.cat([b[k] for b in batches]) for k in ("images", "pictures", "measured", "residual")}
    baseline = None if batches[0]["baseline"] is None else torch.cat([b["baseline"] for b in batches])
    curve = torch.cat([b["curve"] for b in batches], dim=1)
    state = {k: torch.cat([b["state"][k] for b in batches]) for k in batches[0]["state"]}
    return Restored(**joined, baseline=baseline, curve=curve, state=state, info={"nfe": batches[0].get("nfe")})


def condition(
    loaded: Loaded, labels: Sequence[int] | None, start: int, stop: int, device: torch.device
) -> dict[str, Tensor]:
    if labels is not None:
        return {"y": torch.tensor(list(labels[start:stop]), device=device)} if labels else {}
    if not loaded.header.data.get("num_classes"):
        return {}
    return null_condition(loaded, stop - start) or {}


def keep_best(best: dict[str, Any], x: Tensor, residual: Tensor, info: Mapping[str, Any]) -> None:
    """Per item, what fits the measurement better than the tries before."""
    curve = torch.stack(info["residual"]) if info.get("residual") else torch.zeros(0, len(x))
    if not best:
        best.update(images=x, residual=residual, curve=curve, nfe=info.get("nfe"))
        return
    better = residual < best["residual"]
    best["images"] = torch.where(better.view(-1, 1, 1, 1), x, best["images"])
    best["curve"] = torch.where(better, curve, best["curve"])
    best["residual"] = torch.where(better, residual, best["residual"])


# -- figures ---------------------------------------------------------------------------------------------------------


def in_unit(x: Tensor) -> Tensor:
    """What a saved PNG holds, over 255: float64 (N, C, H, W) in [0, 1]."""
    return to_uint8(x).double() / 255


def compare(x: Tensor, truth: Tensor, perceptual: Perceptual | None) -> dict[str, list[float]]:
    """psnr, ssim, lpips of every image against the truth, both as 8-bit pixels."""
    a, b = in_unit(x), in_unit(truth)
    out = {"psnr": psnr(a, b).tolist()}
    if min(a.shape[-2:]) >= WINDOW:
        out["ssim"] = ssim(a, b).tolist()
    if perceptual is not None:
        with torch.no_grad():
            pairs = zip((a.float() * 2 - 1).split(16), (b.float() * 2 - 1).split(16))
            out["lpips"] = [float(v) for p, q in pairs for v in perceptual(p, q).flatten()]
    return out


def mean(values: Sequence[float]) -> float | None:
    value = sum(values) / max(len(values), 1)
    return value if math.isfinite(value) else None


def figures(done: Restored, inputs: Inputs, perceptual: Perceptual | None) -> dict[str, Any]:
    """{"restored": means, "baseline": means, "gain": dB} and "images": one row each."""
    rows: list[dict[str, Any]] = [{"name": n, "residual": r} for n, r in zip(inputs.names, done.residual.tolist())]
    out: dict[str, Any] = {"restored": {"residual": mean(done.residual.tolist())}}
    if inputs.truth is not None:
        sides = {"restored": done.images}
        if done.baseline is not None:
            sides["baseline"] = done.baseline
        for side, x in sides.items():
            measured = compare(x, inputs.truth, perceptual)
            out[side] = {**out.get(side, {}), **{k: mean(v) for k, v in measured.items()}}
            for k, values in measured.items():
                for row, value in zip(rows, values):
                    row[k if side == "restored" else f"baseline_{k}"] = value if math.isfinite(value) else None
        if "baseline" in out and None not in (out["restored"]["psnr"], out["baseline"]["psnr"]):
            out["gain"] = out["restored"]["psnr"] - out["baseline"]["psnr"]
    return {**out, "images": rows}


def perceptual_from(files: str | None) -> Perceptual | None:
    """LPIPS from "VGG,HEADS", two weight files, or from those that VGM_LPIPS_VGG and VGM_LPIPS_HEADS name, if any."""
    if files is None and not (os.environ.get("VGM_LPIPS_VGG") and os.environ.get("VGM_LPIPS_HEADS")):
        return None
    vgg, comma, heads = (files or "").partition(",")
    if files is not None and not comma:
        raise VgmError(f"--lpips {files} is not VGG,HEADS", "vgg16-397923af.pth,vgg.pth (of PyPI's lpips)", USAGE)
    return load_lpips(vgg or None, heads or None)[0]


# -- records ---------------------------------------------------------------------------------------------------------


WRITTEN = (
    "restored",
    "degraded",
    "grid.png",
    "measurements.npz",
    "drawn.safetensors",
    "residual.jsonl",
    "results.json",
)


def default_folder(loaded: Loaded, settings: Settings, seed: int, steps: int | None) -> Path:
    """In restored/ of the run, or of the working folder, named by how it is made; a number where the name is taken."""
    run = next((p for p in loaded.path.resolve().parents if (p / "config.yaml").exists()), None)
    made = [settings.task["name"], settings.method["name"], *([f"{steps}steps"] if steps else []), f"seed{seed}"]
    return free_name((run or Path.cwd()) / "restored" / "-".join(made))


def check_folder(folder: Path, overwrite: bool) -> None:
    """VgmError: something is there that may not be replaced, or that no restoration wrote."""
    if folder.exists() and not folder.is_dir():
        raise VgmError(f"{folder} is a file", "--out names a folder", USAGE)
    atomic.refuse_existing(folder, overwrite)
    others = sorted(p.name for p in folder.iterdir() if p.name not in WRITTEN) if folder.is_dir() else []
    if others:
        text = f"{folder} holds what vgm restore did not write ({', '.join(others[:3])}), so --overwrite leaves it"
        raise VgmError(text, "choose another --out", USAGE)


def write(
    folder: Path, done: Restored, inputs: Inputs, record: dict[str, Any], measures: Mapping[str, Any]
) -> dict[str, Any]:
    """restored/*.png, degraded/*.png, grid.png, measurements.npz, what was drawn, residual.jsonl, results.json: the
    whole folder takes its name at the end."""
    results = {**record, **measures, "residual_curve": [float(r.mean()) for r in done.curve], "out": str(folder)}
    with atomic.replacing_folder(folder) as temp:
        write_records(temp, done, inputs, record)
        atomic.write_json(temp / "results.json", results)
    return results


def write_records(folder: Path, done: Restored, inputs: Inputs, record: dict[str, Any]) -> None:
    meta = {"vgm": atomic.dump_json({"version": __version__, "command": "restore", **record})}
    names = [f"{i:06d}.png" for i in range(len(inputs))]
    for part, x in (("restored", done.images), ("degraded", done.pictures)):
        for i, image in enumerate(to_uint8(x).permute(0, 2, 3, 1).numpy()):
            save_png(image, folder / part / names[i], {**meta, "vgm.item": str(i)})
    rows = {"degraded": done.pictures, "restored": done.images}
    if inputs.truth is not None:
        rows["truth"] = inputs.truth
    save_png(compared(rows, GRID_ITEMS), folder / "grid.png", meta)
    with atomic.replacing(folder / "measurements.npz") as temp, open(temp, "wb") as f:
        np.savez(f, y=done.measured.numpy())
    if done.state:
        atomic.save_safetensors({k: v.contiguous() for k, v in done.state.items()}, folder / "drawn.safetensors", meta)
    lines = [
        atomic.dump_json({"step": i, "mean": float(row.mean()), "values": [round(float(v), 6) for v in row]})
        for i, row in enumerate(done.curve)
    ]
    atomic.write_text(folder / "residual.jsonl", "".join(line + "\n" for line in lines))


def run(
    loaded: Loaded,
    model: str,
    source: str,
    settings: Settings,
    *,
    degrade: bool = True,
    truth: str | None = None,
    n: int | None = None,
    split: str | None = None,
    label: str = "",
    seed: int = 0,
    steps: int | None = None,
    tries: int = 1,
    batch_size: int = 64,
    lpips: str | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """All of `vgm restore` but the printing: what was found, as results.json has it."""
    began = time.perf_counter()
    shape = check_model(loaded, model)
    folder = out or default_folder(loaded, settings, seed, steps)
    check_folder(folder, overwrite)
    perceptual = perceptual_from(lpips)
    if degrade:
        inputs = open_truth(source, shape, n, split)
    else:
        task: Operator = registry().build("operator", settings.task)
        if task.is_drawn:
            raise VgmError(
                f"how these images were degraded is not known: {task.name} needs its mask or kernel",
                "mask=FILE or kernel=FILE; drawn.safetensors of an earlier restoration works",
                USAGE,
            )
        operator = task.bind(shape, generators([seed_of("degrade", seed, 0)]), settings.noise)
        inputs = open_measured(source, operator, n)
        if truth is not None:
            known = open_truth(truth, shape, None, split)
            if len(known) != len(inputs):
                raise VgmError(f"{truth} has {len(known)} images, {source} has {len(inputs)}", code=USAGE)
            inputs.truth, inputs.labels = known.truth, known.labels
    labels = labels_for(loaded, label, len(inputs), inputs.labels)
    with Progress("restoring", len(inputs) * tries, every=10) as progress:
        done = restore(
            loaded,
            inputs,
            settings,
            labels=labels,
            seed=seed,
            steps=steps,
            tries=tries,
            batch_size=batch_size,
            device=device,
            progress=progress,
        )
    record = {
        "model": named(loaded, model),
        "weights": loaded.header.weights,
        "step": loaded.header.step,
        "task": settings.task,
        "noise": settings.noise_node if not isinstance(settings.noise, Clean) else {"name": "none"},
        "method": settings.method,
        "steps": steps,
        "tries": tries,
        "input": inputs.source,
        "split": split,
        "degraded_by": "vgm" if degrade else "before",
        "n": len(inputs),
        "seed": seed,
        "labels": labels,
        "nfe": done.info["nfe"],
        "seconds": round(time.perf_counter() - began, 2),
    }
    return write(folder, done, inputs, record, figures(done, inputs, perceptual))


def assumed(settings: Settings, degrade: bool) -> str:
    """What --noise left out means here."""
    own = f"{settings.noise_node['name']} noise, sigma={settings.noise.sigma:g}"
    if degrade:
        return f"added to the degraded images: {own} (--noise none, sigma=…)"
    return "the input is taken to be free of noise (--noise gaussian sigma=… says otherwise)"


def no_model() -> VgmError:
    """Said when --model is left out."""
    return VgmError(
        "no prior is given",
        "--model RUN: any diffusion or flow run (dit, sit, adm-unet, …); `vgm train dps` makes a small one for digits",
        USAGE,
    )


def summary(results: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the printed table: what, PSNR, SSIM, LPIPS, residual."""
    show = lambda v, digits: "-" if v is None else f"{v:.{digits}f}"
    rows = []
    for side in ("baseline", "restored"):
        if side in results:
            m = results[side]
            digits = (("psnr", 2), ("ssim", 4), ("lpips", 4), ("residual", 3))
            rows.append([side, *(show(m.get(k), d) for k, d in digits)])
    return rows
