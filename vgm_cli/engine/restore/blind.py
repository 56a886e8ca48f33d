"""Restoring pictures without a word on how they were degraded, by methods whose networks follow the picture itself
(`offers.FollowsPictures`): files of any size, one after the other."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vgm_cli import __version__, atomic
from vgm_cli.api import FinishesImages, FollowsPictures, HasTiles, Request, generators, seed_of
from vgm_cli.conditioning import Conditions, Part, lines_of
from vgm_cli.data.decode import image_files
from vgm_cli.engine.checkpoint import Loaded
from vgm_cli.engine.restore import memory
from vgm_cli.engine.restore.inputs import decoded, picked, usable
from vgm_cli.engine.sample.loop import each_step, refuse_non_finite
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.images import compared, enlarged, returned, save_png
from vgm_cli.limits import read_text
from vgm_cli.ui import Progress, ui

PICTURES = ("restored", "stage1")


def part_of(loaded: Loaded) -> Part:
    """The condition by which the network follows a picture. VgmError: it has none, or several."""
    parts = loaded.conditions.of_pictures()
    if len(parts) != 1:
        found = ", ".join(p.name for p in parts) or "none"
        raise VgmError(f"{loaded.path} follows one picture, its conditions on pictures are: {found}", code=USAGE)
    return parts[0]


def texts_for(method: FollowsPictures, prompts: Sequence[str], own: Sequence[str] | None, n: int) -> list[str]:
    """A text for each of n pictures: what the user typed, in turn, else the pictures' own captions, else none; the
    method's words behind it. [] where there is nothing to say."""
    texts = [prompts[i % len(prompts)] for i in range(n)] if prompts else list(own or [])
    if not texts and method.added:
        texts = [""] * n
    return [text + method.added for text in texts]


def told(
    conditions: Conditions, prompts: Sequence[str], texts: list[str]
) -> tuple[Sequence[str], dict[str, list[str]]]:
    """Prompts to be checked, where the user typed some, else {condition: captions}, which may have words that a prompt
    is refused for."""
    readers = conditions.on("text")
    if prompts:
        return texts if readers else prompts, {}
    return (), {part.name: texts for part in readers} if texts else {}


def away_from(conditions: Conditions, method: FollowsPictures, negative: str | None) -> dict[str, list[Any]]:
    """{condition: the text that guidance leads away from}: the user's, else the method's."""
    words = method.negative if negative is None else negative
    parts = conditions.on("text")
    if negative and not parts:
        raise VgmError("--negative is a text, which this network does not read", code=USAGE)
    return {p.name: p.condition.parse([words]) for p in parts} if words else {}


def use_tiles(loaded: Loaded, method: FollowsPictures) -> None:
    """The codec in tiles of half the size of the sampler's, as the first stage needs more memory for a pixel."""
    if method.tile is not None and isinstance(loaded.codec, HasTiles) and loaded.codec.tile is None:
        factor = loaded.codec.factor
        loaded.codec.tile = max(2 * factor, method.tile // 2 // factor * factor)


def place(loaded: Loaded, device: torch.device, precision: str, offload: bool) -> None:
    """Network and codec on the device, with offload the encoders of texts on the CPU. bf16: of the network's linear and
    convolutional layers, where nearly all weights are; normalisations stay as they are."""
    for module in loaded.model.modules() if precision == "bf16" else ():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(torch.bfloat16)
    loaded.model.to(device)
    if isinstance(loaded.codec, nn.Module):
        loaded.codec.to(device)
    loaded.conditions.to(torch.device("cpu") if offload else device)


def caption_beside(file: Path) -> str | None:
    """The text of NAME.txt beside a picture."""
    beside = file.with_suffix(".txt")
    return read_text(beside).strip() if beside.is_file() else None


@dataclass
class Picture:
    """One file on its way: its name, its pixels (H, W, C) uint8, the size at which it is restored, that of the
    result."""

    name: str
    pixels: np.ndarray
    at: tuple[int, int]
    back: tuple[int, int]

    @classmethod
    def open(cls, file: Path, name: str, channels: int, method: FollowsPictures, side: int, least: int) -> Picture:
        image = decoded(file).convert("L" if channels == 1 else "RGB")
        pixels = np.array(image).reshape(image.height, image.width, channels)
        return cls(name, pixels, *method.sizes(pixels.shape[:2], side, least))


def names_of(files: Sequence[Path]) -> list[str]:
    """A name for each file's results: its own without the ending, numbered where two are alike."""
    taken: dict[str, int] = {}
    out = []
    for file in files:
        k = taken[file.stem] = taken.get(file.stem, -1) + 1
        out.append(f"{file.stem}-{k}" if k else file.stem)
    return out


@torch.no_grad()
def restore_files(
    loaded: Loaded,
    method: Any,  # FollowsPictures, built for this model
    source: str,
    folder: Path,
    shape: tuple[int, int, int],
    *,
    n: int | None = None,
    prompts: Sequence[str] = (),
    tile_prompts: Path | None = None,
    negative: str | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    precision: str = "fp32",
    offload: bool = False,
    device: torch.device,
    record: Mapping[str, Any],
) -> dict[str, Any]:
    """Restore every picture of a file or folder and write the folder of results: restored/NAME.png, stage1/NAME.png
    where the method has a first stage, grid.png of pictures of one size, results.json, which is returned.

    shape: (C, H, W) of the images that the model was trained on. tile_prompts: a file with a text for every tile, of a
    single picture. offload: encoders of texts stay on the CPU. Files that cannot be read are left out. VgmError: no
    picture that can be read, results that are not finite.
    """
    began = time.perf_counter()
    files = image_files(source)
    files = [files[i] for i in picked(len(files), n, True)]
    named = list(zip(range(len(files)), files, names_of(files)))
    named = usable(named, lambda row: decoded(row[1]), lambda row: row[1].name, source)
    part, conditions = part_of(loaded), loaded.conditions
    least = method.grain(loaded.view, loaded.codec)
    captions = [caption_beside(f) for f in files]
    own = [c or "" for c in captions] if any(captions) else None
    texts = texts_for(method, prompts, own, len(files))
    where = torch.device("cpu") if offload else device
    readers = conditions.on("text")
    if texts and not readers and prompts:
        raise VgmError("this network takes no --prompt", code=USAGE)
    use_tiles(loaded, method)
    tiles = tile_texts(method, tile_prompts, len(files))
    null = moved(conditions.null(where, away_from(conditions, method, negative)), device)
    rows: list[dict[str, Any]] = []
    shown: list[dict[str, Tensor]] = []
    with atomic.replacing_folder(folder) as temp, Progress("restoring", len(named), every=1) as progress:
        for i, file, name in named:
            picture = Picture.open(file, name, shape[0], method, shape[1], least)
            x: Any = enlarged(picture.pixels, picture.at)[None].to(device)
            if not rows:
                memory.tell(loaded, method, picture.at, precision)
            words = tiles or ([texts[i]] if texts else [])
            typed = bool(prompts or tiles)  # captions may have words that a prompt is refused for
            items = {p.name: p.condition.parse(words) if typed else words for p in readers} if words else {}
            cond = moved(conditions.null(where, guided=False), device) if not items else {}
            cond |= moved(conditions.encode(items, where), device)
            cond |= conditions.encoded(part, x, device)
            request = Request(
                shape=tuple(cond_shape(cond, loaded)),
                generators=generators([seed_of("restore", seed, i)]),
                cond=cond,
                null=null,
                steps=steps,
                guidance_scale=guidance_scale,
                device=device,
                callback=each_step(None, progress, len(rows), 1),
                codec=loaded.codec,
                index=[i],
            )
            z = method(loaded.view, request)
            made = loaded.codec.decode(z.float()) if loaded.codec is not None else z
            made = method.finish(made.float(), request) if isinstance(method, FinishesImages) else made.float()
            refuse_non_finite(made, i, "--precision fp32, or tiles")
            results = {"restored": made[0]}
            if "stage1" in request.info:
                results["stage1"] = request.info["stage1"][0].float()
            meta = {"vgm": atomic.dump_json({"version": __version__, "command": "restore", **record})}
            for kind, result in results.items():
                save_png(returned(result, picture.back), temp / kind / f"{name}.png", {**meta, "vgm.item": str(i)})
            if not shown or shown[0]["restored"].shape == made[0].shape:
                shown.append({"degraded": x[0].cpu(), **{k: v.cpu() for k, v in reversed(results.items())}})
            size = {"input": list(picture.pixels.shape[:2]), "at": list(picture.at), "size": list(picture.back)}
            rows.append({"name": name, **size, **({"text": words[0]} if words else {}), "nfe": request.info.get("nfe")})
        if len(shown) == len(named) and max(shown[0]["degraded"].shape[1:]) <= 512:
            save_png(compared({k: torch.stack([s[k] for s in shown]) for k in shown[0]}), temp / "grid.png", meta)
        seconds = round(time.perf_counter() - began, 2)
        out = {**record, "n": len(named), "seconds": seconds, "images": rows, "notes": [], "out": str(folder)}
        atomic.write_json(temp / "results.json", {**out, "nfe": rows[0]["nfe"]})
    return {**out, "nfe": rows[0]["nfe"]}


def moved(cond: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {k: v.to(device) for k, v in cond.items()}


def cond_shape(cond: Mapping[str, Tensor], loaded: Loaded) -> tuple[int, ...]:
    """Of one sample: the picture's latents, where the network follows these."""
    wanted = tuple(loaded.header.data["sample_shape"])
    found = [v.shape[1:] for v in cond.values() if v.ndim == 4 and v.shape[1] == wanted[0]]
    return tuple(found[0]) if found else wanted


def tile_texts(method: FollowsPictures, file: Path | None, n: int) -> list[str]:
    """A text for every tile of a single picture, by the lines of a file. VgmError: several pictures, no tiles."""
    if file is None:
        return []
    if n != 1 or method.tile is None:
        raise VgmError("--tile-prompts are for the tiles of one picture", "--tile 1024, one --input file", USAGE)
    found = [line + method.added for line in lines_of(file, "--tile-prompts")]
    ui.info(f"{len(found)} texts, one for each tile from the top left on")
    return found
