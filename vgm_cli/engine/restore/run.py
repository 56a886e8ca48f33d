"""`vgm restore`: degraded images (or images to degrade) and a prior in; restored images, figures and records out.

Image i depends on (seed, i) alone: masks, kernels and noise come from one generator per item, the method's own noise
from another.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgm_cli.api import (
    CompletesImages,
    FinishesImages,
    FollowsPictures,
    Request,
    RestorationMethod,
    TakesSteps,
    generators,
    seed_of,
)
from vgm_cli.conditioning import unconditional
from vgm_cli.engine.checkpoint import Loaded
from vgm_cli.engine.restore import blind
from vgm_cli.engine.restore.figures import figures, perceptual_from
from vgm_cli.engine.restore.inputs import Inputs, open_measured, open_truth
from vgm_cli.engine.restore.records import Restored, check_folder, default_folder, write
from vgm_cli.engine.restore.setup import Settings, adopt_own_settings, build_method
from vgm_cli.engine.sample.loop import autocast, each_step, refuse_non_finite
from vgm_cli.engine.sample.setup import named, negative_for, words_for
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.images import blended
from vgm_cli.operators.base import Operator
from vgm_cli.operators.latent import Decoded
from vgm_cli.operators.noise import Clean
from vgm_cli.registry import registry
from vgm_cli.ui import Progress, ui


def image_shape(loaded: Loaded) -> tuple[int, int, int]:
    """The shape (C, H, W) of the images that the model makes. VgmError: its file does not say it."""
    shape = tuple(loaded.header.data.get("sample_shape") or ())
    if not shape or (loaded.codec is None and len(shape) != 3):
        raise VgmError(f"{loaded.path} does not say the shape of its images", code=USAGE)
    if loaded.codec is not None:
        device = next(loaded.model.parameters()).device
        with torch.no_grad():
            shape = tuple(loaded.codec.decode(torch.zeros(1, *shape, device=device))[0].shape)
    return shape[0], shape[1], shape[2]


def given_for(
    loaded: Loaded,
    n: int,
    label: str = "",
    prompts: Sequence[str] = (),
    hints: Sequence[str] = (),
    data: Sequence[int] | None = None,
    later: Sequence[str] = (),
) -> dict[str, Sequence[Any]]:
    """{condition: an item for each of n images}; conditions that are left out are no condition, where the network has
    one.

    label: "data" for those of the input, or classes. later: conditions whose items come later. VgmError: no such
    conditions, or one is missing.
    """
    conditions = loaded.conditions
    words = words_for(conditions, "" if label == "data" else label, prompts, hints)
    parts = [conditions.parts[name] for name in words]
    given = {p.name: p.in_turn(range(n), p.condition.parse(words[p.name])) for p in parts}
    known = conditions.of_column("label")
    if known is None and label == "data":
        raise VgmError("this network is unconditional, it takes no labels", code=USAGE)
    nothing = null_condition(loaded, 1) is not None
    if known is not None and known.name not in given and (label or not nothing):
        given[known.name] = labels_of(data, len(known.condition.choices), label)
    if not nothing:
        for part in conditions.parts.values():
            if part.name not in given and part.name not in later:
                part.in_turn(range(n))  # says what is missing
    return given


def labels_of(data: Sequence[int] | None, classes: int, wanted: str) -> list[int]:
    """The input's own labels. VgmError: it has none that fit."""
    if data is None or max(data, default=0) >= classes:
        raise VgmError(
            "this network needs labels, and the input has none that fit" if not wanted else "the input has no labels",
            f"--label 0 … {classes - 1}, one for all images or one each",
            USAGE,
        )
    return list(data)


def null_condition(loaded: Loaded, n: int) -> dict[str, Tensor] | None:
    """The keywords of no condition, where the network has them."""
    device, conditions = next(loaded.model.parameters()).device, loaded.conditions
    try:
        return unconditional(loaded.model, conditions.example(n, device)["cond"], conditions.null(device, guided=False))
    except VgmError:
        return None


# -- the work --------------------------------------------------------------------------------------------------------


def restore(
    loaded: Loaded,
    inputs: Inputs,
    settings: Settings,
    *,
    given: Mapping[str, Sequence[Any]],
    negative: Mapping[str, Sequence[Any]] | None = None,
    seed: int = 0,
    steps: int | None = None,
    tries: int = 1,
    blend: float | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: Any = None,
) -> Restored:
    """Degrade where that is asked, and restore. given: {condition: an item for each image}; negative: {condition: an
    item that guidance leads away from}. tries: walks per image; what fits the measurement best is kept. blend: of a
    method that completes images, see images.blended."""
    device = torch.device(device)
    method = build_method(loaded, settings.method, str(loaded.path))
    shape = image_shape(loaded)
    task: Operator = registry().build("operator", settings.task)
    sample_shape = tuple(loaded.header.data["sample_shape"])
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
        known = knowledge(loaded, method, operator, y, inputs.whole(start, stop))
        items: dict[str, Any] = {name: own[start:stop] for name, own in given.items()}
        if isinstance(method, FollowsPictures):
            items[blind.part_of(loaded).name] = operator.enlarged(y).float().clamp(-1, 1)
        best: dict[str, Any] = {}
        for k in range(tries):
            done = start * tries + k * (stop - start)
            callback = each_step(None, progress, done, stop - start)
            request = Request(
                shape=sample_shape,
                generators=generators(seed_of("restore", seed, i, k) for i in range(start, stop)),
                cond=condition(loaded, items, stop - start, device),
                asked=loaded.conditions.asked(items),
                null=loaded.conditions.null(device, negative),
                steps=steps,
                guidance_scale=settings.guidance_scale,
                device=device,
                callback=callback,
                codec=loaded.codec,
                **known,
            )
            with torch.no_grad():
                x = method(loaded.view, request)
                x = loaded.codec.decode(x.float() if x.is_floating_point() else x) if loaded.codec is not None else x
                x = x.float()
                if isinstance(method, FinishesImages):
                    x = method.finish(x, request)
                if blend is not None:
                    made = request.info.get("made", ~known["mask"][:, 0])
                    x = blended(x, inputs.whole(start, stop).to(x), made, blend)
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
    stage1 = torch.cat([b["stage1"] for b in batches]) if batches[0].get("stage1") is not None else None
    baseline = None if batches[0]["baseline"] is None else torch.cat([b["baseline"] for b in batches])
    curve = torch.cat([b["curve"] for b in batches], dim=1)
    state = {k: torch.cat([b["state"][k] for b in batches]) for k in batches[0]["state"]}
    notes = list(dict.fromkeys(text for b in batches for text in b["notes"]))
    info = {"nfe": batches[0].get("nfe"), "notes": notes}
    return Restored(**joined, baseline=baseline, curve=curve, state=state, stage1=stage1, info=info)


def knowledge(
    loaded: Loaded, method: RestorationMethod, operator: Operator, y: Tensor, whole: Tensor
) -> dict[str, Any]:
    """What a method is told of the images, as keywords of its request: the measurement y and how it came about, or, of
    a method that completes images, the images `whole` as the model sees them and which pixels are kept. VgmError: the
    task does more than hide pixels."""
    if not isinstance(method, CompletesImages):
        if loaded.codec is not None:
            channels, height, width = loaded.header.data["sample_shape"]
            operator = Decoded(operator, loaded.codec, (channels, height, width))
        return {"operator": operator, "measurement": y}
    check_completion(operator)
    images = whole.to(y)
    if loaded.codec is not None:
        with torch.no_grad():
            images = loaded.codec.latents(loaded.codec.encode(images))
    assert operator.kept is not None
    return {"images": images, "mask": operator.kept.to(y.device)}


def check_completion(operator: Operator) -> None:
    """VgmError: a task that does more than hide pixels, for a method that completes images."""
    if operator.kept is None:
        text = f"this method completes images, it cannot undo {operator.name}"
        raise VgmError(text, "--mask lower, or a file that is bright where pixels are kept", USAGE)
    if operator.noise.sigma:
        raise VgmError("this method keeps pixels as they are, it removes no noise", "--noise none", USAGE)


def condition(loaded: Loaded, items: Mapping[str, Sequence[Any]], n: int, device: torch.device) -> dict[str, Tensor]:
    """Keywords of n images: of these items, and no condition for whatever is left out."""
    null = null_condition(loaded, n) if loaded.conditions.parts.keys() - items.keys() else None
    return (null or {}) | loaded.conditions.encode(items, device)


def keep_best(best: dict[str, Any], x: Tensor, residual: Tensor, info: Mapping[str, Any]) -> None:
    """Per item, keep whichever of `best` and this attempt fits the measurement better. x: (B, C, H, W), residual:
    (B,)."""
    curve = torch.stack(info["residual"]) if info.get("residual") else torch.zeros(0, len(x))
    if not best:
        best.update(images=x, residual=residual, curve=curve, nfe=info.get("nfe"), notes=info.get("notes", []))
        best["stage1"] = info["stage1"].float().cpu() if "stage1" in info else None
        return
    better = residual < best["residual"]
    best["images"] = torch.where(better.view(-1, 1, 1, 1), x, best["images"])
    best["curve"] = torch.where(better, curve, best["curve"])
    best["residual"] = torch.where(better, residual, best["residual"])


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
    prompts: Sequence[str] = (),
    hints: Sequence[str] = (),
    negative: str | None = None,
    tile_prompts: Path | None = None,
    seed: int = 0,
    steps: int | None = None,
    tries: int = 1,
    blend: float | None = None,
    batch_size: int = 64,
    precision: str = "fp32",
    offload: bool = False,
    lpips: str | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """All of `vgm restore` but the printing: what was found, as results.json has it."""
    began = time.perf_counter()
    adopt_own_settings(loaded, settings)
    method = build_method(loaded, settings.method, model)  # refused before anything is opened
    follows = isinstance(method, FollowsPictures)
    if not follows and (tile_prompts is not None or offload):
        raise VgmError("--tile-prompts and --offload are for methods that follow pictures", "--method supir", USAGE)
    if steps is not None and not isinstance(method, TakesSteps):
        ui.warn(f"--steps has no effect on {settings.method['name']}")
        steps = None
    if blend is not None and not isinstance(method, CompletesImages):
        ui.warn(f"--blend has no effect on {settings.method['name']}, which keeps no pixels")
        blend = None
    if follows:  # it was loaded on the CPU: what is halved or stays there never fills a card
        blind.place(loaded, torch.device(device), precision, offload)
    shape = image_shape(loaded)
    folder = out or default_folder(loaded, settings, seed, steps)
    check_folder(folder, overwrite)
    perceptual = perceptual_from(lpips)
    if follows and not degrade:
        if truth is not None:
            raise VgmError("pictures of any size are not measured", "--task degrades whole images first", USAGE)
        with autocast(precision, torch.device(device)):
            return blind.restore_files(
                loaded,
                method,
                source,
                folder,
                shape,
                n=n,
                prompts=prompts,
                tile_prompts=tile_prompts,
                negative=negative,
                seed=seed,
                steps=steps,
                guidance_scale=settings.guidance_scale,
                precision=precision,
                offload=offload,
                device=torch.device(device),
                record=recorded(loaded, model, settings, {"input": source, "seed": seed, "steps": steps}),
            )
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
        inputs = open_measured(source, operator, n, paired=truth is not None)
        if truth is not None:
            known = open_truth(truth, shape, None, split, paired=True)
            if len(known) != len(inputs):
                raise VgmError(f"{truth} has {len(known)} images, {source} has {len(inputs)}", code=USAGE)
            inputs.truth, inputs.labels = known.truth, known.labels
    away: dict[str, Any] = negative_for(loaded.conditions, negative)
    later, captions = list[str](), dict[str, list[str]]()
    if isinstance(method, FollowsPictures):
        later, away = [blind.part_of(loaded).name], blind.away_from(loaded.conditions, method, negative)
        texts = blind.texts_for(method, prompts, inputs.texts, len(inputs))
        prompts, captions = blind.told(loaded.conditions, prompts, texts)
        blind.use_tiles(loaded, method)
    given = given_for(loaded, len(inputs), label, prompts, hints, inputs.labels, [*later, *captions]) | captions
    prompts = prompts or next(iter(captions.values()), [])
    part = loaded.conditions.of_column("label")
    labels = None if part is None or part.name not in given else list(given[part.name])
    with Progress("restoring", len(inputs) * tries, every=10) as progress, autocast(precision, torch.device(device)):
        done = restore(
            loaded,
            inputs,
            settings,
            given=given,
            negative=away,
            seed=seed,
            steps=steps,
            tries=tries,
            blend=blend,
            batch_size=batch_size,
            device=device,
            progress=progress,
        )
    own = {
        "task": settings.task,
        "noise": settings.noise_node if not isinstance(settings.noise, Clean) else {"name": "none"},
        "steps": steps,
        "tries": tries,
        "blend": blend,
        "input": inputs.source,
        "split": split,
        "degraded_by": "vgm" if degrade else "before",
        "n": len(inputs),
        "seed": seed,
        "labels": labels,
        **({"prompts": list(dict.fromkeys(prompts))} if prompts else {}),
        **({"negative": negative} if negative is not None else {}),
        **({"hints": list(hints)} if hints else {}),
        "nfe": done.info["nfe"],
        "notes": done.info["notes"],
        "seconds": round(time.perf_counter() - began, 2),
    }
    return write(folder, done, inputs, recorded(loaded, model, settings, own), figures(done, inputs, perceptual))


def recorded(loaded: Loaded, model: str, settings: Settings, own: Mapping[str, Any]) -> dict[str, Any]:
    """What results.json says of model and method, and `own`."""
    return {
        "model": named(loaded, model),
        "weights": loaded.header.weights,
        "step": loaded.header.step,
        "method": settings.method,
        "guidance_scale": settings.guidance_scale,
        **own,
    }


def no_model() -> VgmError:
    """The error when --model is left out."""
    return VgmError(
        "no prior is given",
        "--model RUN: any diffusion or flow run (dit, sit, adm-unet, …); `vgm train dps` makes a small one for digits",
        USAGE,
    )
