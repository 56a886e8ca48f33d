"""Checkpoints of a run: what training leaves behind, whole or not at all, and how it goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vgm_cli import atomic
from vgm_cli.data.fingerprint import older
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.run_files import read_record
from vgm_cli.engine.train import sharding
from vgm_cli.engine.train.optim import OLDER, load_optimizer_tensors, optimizer_tensors
from vgm_cli.errors import FAILED, USAGE, VgmError
from vgm_cli.ui import ui

if TYPE_CHECKING:
    from vgm_cli.engine.train.setup import Trainer

NEW_RUN = "put back what was there; a new run may begin from the old weights: model.weights=RUN"


def header(t: Trainer, role: str = "model", weights: str = "raw") -> ckpt.Header:
    """What a weights file of this run says of itself."""
    codec = {"codec": t.feed.codec_ref} if role == "model" and t.feed.codec_ref else {}
    return ckpt.Header(
        component=t.components.get(role, {"kind": "model", "name": role, "kwargs": {}}),
        view=t.objective.view() if role == "model" else None,
        parts=t.references.get(role, {}) | codec,
        recipe=t.recipe.config,
        data={**asdict(t.facts), **t.feed.describe()},
        step=t.start,
        images=t.images,
        weights=weights,
        conditions=t.conditions.components() if role == "model" else None,
    )


# -- writing -----------------------------------------------------------------------------------------------------------


def save(t: Trainer, done: int, seconds: float) -> None:
    """One complete checkpoint; it gets its name only when every byte is on disk."""
    main = t.acc.is_main_process
    states = {r: sharding.gather(t.networks[r].state_dict(), main) for r in {"model", *t.kept}}
    averages = {a.name: sharding.gather(a.state_dict(), main) for a in t.averages}
    tensors: dict[str, Tensor] = {}
    for name, optimizing in t.optimizers.items():
        tensors |= sharding.gather(optimizer_tensors(optimizing.optimizer, f"optimizer.{name}."), main)
    totals = t.window.totals()
    if not main:
        return
    window = {k: [v, t.window.counts[k]] for k, v in totals.items()}
    with t.run.new_checkpoint(done, t.opts.keep) as temp:
        write(t, temp, done, seconds, window, states, averages, tensors)


def write(
    t: Trainer,
    temp: Path,
    done: int,
    seconds: float,
    window: Mapping[str, Any],
    states: Mapping[str, Mapping[str, Tensor]],
    averages: Mapping[str, Mapping[str, Tensor]],
    tensors: dict[str, Tensor],
) -> None:
    """Write the files of a checkpoint into the folder `temp`, from whole (unsharded) tensors.

    All files carry one hash, by which `restore` knows that they belong together. state.json is written
    last.
    """
    described = f"{t.recipe.dump()} {t.feed.describe().get('fingerprint')} {done}"
    identity = {"checkpoint": hashlib.sha256(described.encode("utf-8", "backslashreplace")).hexdigest()[:16]}
    own = header(t)
    own.step, own.extra = done, identity
    tensors |= save_weights(t, temp, "model", states["model"], own)
    for name, state in averages.items():
        own.weights = name
        tensors |= save_weights(t, temp, name, state, own)
    for role in t.kept:
        if role != "model":
            other = header(t, role)
            other.step, other.extra = done, identity
            ckpt.save_network(temp / f"{role}.safetensors", states[role], other)
    tensors |= {f"objective.{k}": v for k, v in t.objective.state_dict().items()}
    atomic.save_safetensors(
        {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()},
        temp / "trainer.safetensors",
        {"format": "pt", **{f"vgm.{k}": json.dumps(v) for k, v in identity.items()}},
    )
    scaler = t.acc.scaler.state_dict() if t.acc.scaler is not None else None
    record = {
        "step": done,
        "images": t.images,
        "seconds": seconds,
        "seed": t.opts.seed,
        "world": t.world,
        "ema_updates": {a.name: a.updates for a in t.averages},
        "scaler": scaler,
        "window": window,
        **identity,
    }
    atomic.write_json(temp / "state.json", record)


def save_weights(t: Trainer, temp: Path, name: str, state: Mapping[str, Tensor], own: ckpt.Header) -> dict[str, Tensor]:
    """Write one weights file in the form in which others read it, and return what only resuming needs.

    An objective's `export` may change the state (adapters are folded into the weights). Entries of `state` that the
    exported file lacks are returned as {"kept.NAME.ENTRY": tensor}, to be stored in trainer.safetensors.
    """
    plain = t.objective.export("model", state)
    ckpt.save_network(temp / f"{name}.safetensors", plain, own)
    return {f"kept.{name}.{k}": v for k, v in state.items() if k not in plain}


# -- reading -----------------------------------------------------------------------------------------------------------


def restore(t: Trainer) -> None:
    """Continue from the last complete checkpoint, or from step 0 when there is none.

    VgmError: the data or the codec have changed since, or a file is damaged or belongs to another run.
    """
    refuse_other_data(t)
    folder = t.run.last()
    if folder is None:
        ui.info(f"{t.run.path} has no checkpoint yet: starting at step 0")
        if t.acc.is_main_process:
            t.run.rewind_log(0)
        return
    state = read_state(folder, [a.name for a in t.averages])
    tensors = read_part(folder / "trainer.safetensors", state)
    refuse_other_codec(t, folder)
    for role in t.trained:
        own_state = t.networks[role].state_dict()
        stored = whole(role, own_state, tensors, folder, state)
        t.networks[role].load_state_dict({k: sharding.like(own_state[k], v) for k, v in stored.items()})
    for average in t.averages:
        weights = whole(average.name, average.state_dict(), tensors, folder, state)
        average.load_state_dict(weights, state["ema_updates"][average.name])
    file = folder / "trainer.safetensors"
    stateful = any(o.setting.name != "sgd" or o.setting.betas[0] for o in t.optimizers.values())
    empty = not any(k.startswith("optimizer.") for k in tensors)
    if state["step"] and stateful and empty and t.skip is None:  # that rule may have skipped every update so far
        raise VgmError(f"{file} holds no optimizer state", OLDER, FAILED)
    for name, optimizing in t.optimizers.items():
        load_optimizer_tensors(optimizing.optimizer, tensors, f"optimizer.{name}.", file)
    own = {k.removeprefix("objective."): v for k, v in tensors.items() if k.startswith("objective.")}
    try:
        t.objective.load_state_dict(own)
    except (KeyError, RuntimeError, ValueError) as e:
        raise VgmError(f"{file} does not fit this run's objective: {e}", OLDER, FAILED) from e
    if t.acc.scaler is not None and state.get("scaler"):
        t.acc.scaler.load_state_dict(state["scaler"])
    t.start, t.images, t.seconds = state["step"], state["images"], state["seconds"]
    t.window.load(state.get("window", {}))
    if t.acc.is_main_process:  # a row for a part of an interval is not one that an uninterrupted run has
        t.run.rewind_log(t.start - bool(t.window.sums))
    ui.info(f"resuming from step {t.start}")


def read_state(folder: Path, averages: Sequence[str]) -> dict[str, Any]:
    """Read state.json of a checkpoint folder. VgmError: it is damaged, or belongs to another folder."""
    try:
        state = read_record(folder / "state.json")
        step, images, seconds = state["step"], state["images"], state["seconds"]
        sound = type(step) is int and type(images) is int and isinstance(seconds, int | float)
        sound = sound and step == int(folder.name.removeprefix("step-")) and images >= 0 and seconds >= 0
        sound = sound and all(type(state["ema_updates"][name]) is int for name in averages)
        sound = sound and all(len(v) == 2 for v in state.get("window", {}).values())
    except (KeyError, TypeError, ValueError, AttributeError, VgmError) as e:
        raise VgmError(f"{folder} is damaged: {e}", OLDER, FAILED) from e
    if not sound:
        raise VgmError(f"{folder} is damaged: its state.json does not belong to it", OLDER, FAILED)
    return state


def read_part(file: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read one file of the checkpoint that `state` describes. VgmError: it is damaged, or belongs to another
    checkpoint."""
    tensors, metadata = ckpt.read_tensors(file)
    if "checkpoint" in state and metadata.get("vgm.checkpoint") != json.dumps(state["checkpoint"]):
        raise VgmError(f"{file} does not belong to {file.parent}: it is another checkpoint's", OLDER, FAILED)
    return tensors


def whole(
    role: str, own: Mapping[str, Tensor], kept: Mapping[str, Tensor], folder: Path, state: Mapping[str, Any]
) -> Mapping[str, Tensor]:
    """The full state of a network (or of an average) as training needs it: the inverse of `save_weights`.

    own: the network's present state. kept: the tensors of trainer.safetensors. Where save_weights kept entries back,
    the weights file holds an export, e.g. adapters folded in: then the entries kept are laid over `own`, whose other
    entries (the frozen base) never change. Otherwise the weights file itself is the state. VgmError: names or shapes
    differ.
    """
    file = folder / f"{role}.safetensors"
    prefix = f"kept.{role}."
    part = {k.removeprefix(prefix): v for k, v in kept.items() if k.startswith(prefix)}
    found = {**own, **part} if part else read_part(file, state)
    wrong = sorted(k for k in own.keys() | found.keys() if k not in own or k not in found)
    wrong = wrong or [k for k in own if own[k].shape != found[k].shape]
    if wrong:
        raise VgmError(f"{file} does not fit this run: {wrong[0]} differs", OLDER, FAILED)
    return found


def refuse_other_data(t: Trainer) -> None:
    """VgmError (exit code 2): the images or classes differ from those that the run began with."""
    before, now = t.run.record("data.json"), t.data_facts()
    then, there = list(before.get("class_names") or []), list(now.get("class_names") or [])
    if then and there and then != there:
        first = next((i for i, pair in enumerate(zip(then, there)) if pair[0] != pair[1]), min(len(then), len(there)))
        was, is_now = ("missing" if first >= len(n) else n[first] for n in (then, there))
        message = f"the classes are not those of {t.run.path}: class {first} was {was}, now {is_now}"
        raise VgmError(message, NEW_RUN, USAGE)
    for key in ("num_classes", "count", "image_size", "image_channels", "fingerprint"):
        if older(before.get(key), now.get(key)):
            ui.warn(f"{t.run.path} was begun by an older version: that its data is unchanged is not checked")
        elif before.get(key) is not None and before[key] != now.get(key):
            raise VgmError(
                f"the data is not that of {t.run.path}: {key} was {before[key]}, now {now.get(key)}",
                NEW_RUN,
                USAGE,
            )


def refuse_other_codec(t: Trainer, folder: Path) -> None:
    """VgmError (exit code 2): the first stage's file has other bytes than when `folder` was written."""
    before = ckpt.read_header(folder / "model.safetensors").parts.get("codec") if "model" in t.networks else None
    now = t.feed.codec_ref
    if before and now and before.sha256 != now.sha256:
        raise VgmError(f"the codec is not the one that {t.run.path} was trained with", NEW_RUN, USAGE)
