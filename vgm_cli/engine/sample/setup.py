"""What `vgm sample` and `vgm evaluate` share: open a model, turn options into a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vgm_cli import foreign
from vgm_cli.api import HasClasses, TakesSteps
from vgm_cli.conditioning import ClassLabel, Conditions, Part, build_parts
from vgm_cli.data.decode import image_files
from vgm_cli.diffusion.samplers import GaussianSampler
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.conditions import adopt_hints
from vgm_cli.engine.environment import bf16_supported
from vgm_cli.engine.processes import keep_memory, pick_device
from vgm_cli.engine.sample.accept import Judge, candidates_for
from vgm_cli.engine.sample.given import given_pictures, with_strength
from vgm_cli.engine.sample.loop import Plan, build_sampler, items_for, labels_in, sampler_node
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.ranges import Images, NonNegative, Steps, fit
from vgm_cli.registry import load_target, registry, signature
from vgm_cli.ui import ui
from vgm_cli.validation import check_sampler
from vgm_cli.yaml_text import parse_yaml


def device_for(name: str | None = None) -> torch.device:
    return pick_device(name)


def open_model(
    model: str, weights: str | None = None, device_name: str | None = None
) -> tuple[ckpt.Loaded, torch.device]:
    """A loaded generator on this machine's device; codecs alone cannot be sampled from."""
    device = pick_device(device_name)
    if device.type == "cpu":
        keep_memory()
    loaded = ckpt.load(model, weights, device)
    if weights is not None and weights != loaded.header.weights:
        ui.warn(f"--weights {weights} has no effect: {loaded.path} holds {loaded.header.weights}")
    refuse_codec(loaded.header, model)
    return loaded, device


def refuse_codec(header: ckpt.Header, model: object) -> None:
    if header.is_codec:
        hint = f"train a model on its latents or codes (--codec {model}), or measure it: vgm evaluate {model}"
        raise VgmError(f"{model} is a codec: it reconstructs, it does not generate", hint, USAGE)


def precision_of(loaded: ckpt.Loaded, asked: str = "auto") -> str:
    """auto: bf16 where this machine has it and the network was trained in it, else fp32. VgmError: unknown name."""
    if asked not in ("auto", "fp32", "bf16"):
        raise unknown("precision", asked, ("auto", "fp32", "bf16"))
    if asked != "auto":
        return asked
    trained = (loaded.header.recipe.get("train") or {}).get("precision", "fp32")
    return "bf16" if trained in ("auto", "bf16") and bf16_supported() else "fp32"


def plan_for(
    loaded: ckpt.Loaded,
    *,
    n: int,
    label: str = "",
    prompts: Sequence[str] = (),
    negative: str | None = None,
    hints: Sequence[str] = (),
    sampler: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_interval: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    overrides: Sequence[str] = (),
    images: str | None = None,
    mask: str | None = None,
    strength: float | None = None,
    precision: str = "auto",
    accept: float | None = None,
    judge: str = "confidence",
) -> Plan:
    """Command-line options on top of the recipe that the checkpoint carries."""
    recipe = loaded.header.recipe
    own = {}
    for text in overrides:
        key, eq, value = text.partition("=")
        if not eq:
            raise VgmError(f"'{text}' is not KEY=VALUE", "example: eta=0.5", USAGE)
        own[key.removeprefix("sampler.")] = parse_yaml(value, text)
    prompts, anew = adopt_conditions(loaded, own, prompts)
    if sampler in (None, (recipe.get("sampler") or {}).get("name")):
        keywords = {k: v for k, v in (recipe.get("sampler") or {}).items() if k not in own}
        foreign.tell_files(keywords, loaded.path)
    guidance_scale = fit(guidance_scale, NonNegative | None, "--guidance-scale")
    steps = fit(steps, Steps | None, "--steps")
    n, batch_size = fit(n, Images, "-n"), fit(batch_size, Images, "--batch-size")
    for key, asked in (("steps", steps), ("guidance_scale", guidance_scale)):
        if asked is not None and own.get(key, asked) != asked:
            text = f"--{key.replace('_', '-')} {asked} and {key}={own[key]} say two things"
            raise VgmError(text, "one of them is enough", USAGE)
    refuse_options(node := with_strength(sampler_node(recipe, sampler, own), strength, images, mask), own)
    check_sampler(node)
    device = next(loaded.model.parameters()).device
    table = build_sampler(node, device)
    adopt_classes(loaded, table)
    if mask is not None and images is None:
        raise VgmError("--mask says what is kept of a picture", "--image FILE", USAGE)
    pictures = None if images is None else given_pictures(loaded, table, images, mask, n)
    adopt_hints(loaded.conditions, table)
    words = words_for(loaded.conditions, label, prompts, hints)
    away = negative_for(loaded.conditions, negative)
    interval = None
    if guidance_interval is not None:
        try:
            low, high = (float(v) for v in guidance_interval.split(","))
        except ValueError as e:
            raise VgmError(f"--guidance-interval {guidance_interval} is not LO,HI", "example: 0.1,0.8", USAGE) from e
        if not 0 <= low <= high:  # no upper end: a network of EDM's path counts in sigma
            hint = "t is 0 at the data, 1 at noise; of EDM's networks sigma"
            raise VgmError(f"--guidance-interval {guidance_interval} is no interval of times", hint, USAGE)
        interval = (low, high)
    wishes = {
        "seed": seed or None,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "guidance_interval": interval,
        "images": None if mask is not None else images,
        "negative": negative,
    }
    wanted = {name: loaded.conditions.parts[name].condition.parse(own) for name, own in words.items()}
    wanted |= pictures.items(loaded.conditions) if pictures is not None else {}
    given = items_for(loaded.conditions, n, wanted, table)
    plan = Plan(
        n=n,
        seed=seed,
        given=given,
        labels=labels_in(loaded.conditions, given),
        words={name: own for name, own in words.items() if loaded.conditions.parts[name].condition.column != "label"},
        negative=away,
        conditions=anew,
        sampler=node,
        steps=steps,
        guidance_scale=recipe.get("guidance_scale") if guidance_scale is None else guidance_scale,
        guidance_interval=interval,
        batch_size=batch_size,
        pictures=pictures,
        roles=loaded.roles,
        precision=precision_of(loaded, precision),
        named=tuple(k for k, v in wishes.items() if v is not None),
        judge=Judge(candidates_for(accept), judge) if accept is not None else None,
        built=table,
    )
    if isinstance(plan.build(device), TakesSteps) and steps is not None:
        plan.sampler["steps"] = steps  # one truth in every record
    return plan


def refuse_options(node: Mapping[str, Any], typed: Mapping[str, Any]) -> None:
    """VgmError: a KEY=VALUE that is an option of the command line and no keyword of the sampler."""
    known = signature(load_target(registry().find("sampler", node["name"]).target, node["name"])).parameters
    for key in ("guidance_scale", "guidance_interval", "label", "negative", "batch_size", "seed", "weights"):
        if key in typed and key not in known:
            hint = f"it is an option: --{key.replace('_', '-')} {typed[key]}"
            raise VgmError(f"'{key}' is no keyword of the sampler {node['name']}", hint, USAGE)


def warn_of_ignored(info: Mapping[str, Any], plan: Plan) -> None:
    """Warn of options that the user gave and the sampler did not read, and say what the sampler had to say."""
    for text in info.get("notes", ()):
        ui.warn(text)
    for name in info.get("ignored", ()):
        why = "" if plan.given or not name.startswith("guidance") else ": this network has no conditions"
        option = "image" if name == "images" else name.replace("_", "-")
        ui.warn(f"--{option} has no effect on the sampler {plan.sampler['name']}{why}")


def words_for(
    conditions: Conditions, label: str = "", prompts: Sequence[str] = (), hints: Sequence[str] = ()
) -> dict[str, list[str]]:
    """{condition: words} of the options --label, --prompt and --hint. VgmError: the network has no such condition."""
    out: dict[str, list[str]] = {}
    labels = [w.strip() for w in label.split(",") if w.strip()]
    for option, column, own in (("--label", "label", labels), ("--prompt", "text", list(prompts))):
        if not own:
            continue
        if not (parts := conditions.on(column)):
            raise not_taken(conditions, option)
        out |= {part.name: own for part in parts}
    for hint in hints:
        name, files = hint_of(conditions, hint)
        out[name] = [*out.get(name, ()), *files]
    return out


def not_taken(conditions: Conditions, option: str) -> VgmError:
    there = " and ".join(dict.fromkeys(p.option for p in conditions.parts.values()))
    says = {"--label": "this network is unconditional, it takes no labels"}
    message = says[option] if option in says and not there else f"this network takes no {option}"
    return VgmError(message, f"it takes {there}" if there else "", USAGE)


def hint_of(conditions: Conditions, hint: str) -> tuple[str, list[str]]:
    """(condition, files) of one --hint: a picture or a folder of them; NAME=PICTURE where the network takes several.
    VgmError: it takes none, or it is not said which is meant."""
    parts = conditions.of_pictures()
    if not parts:
        raise not_taken(conditions, "--hint")
    names = [p.name for p in parts]
    name, equals, path = hint.partition("=")
    if not equals or name not in names:
        if equals and name.isidentifier() and not Path(hint).exists():
            raise unknown("picture", name, names)
        name, path = names[0], hint
        if len(parts) > 1:
            hint = " ".join(f"--hint {n}=…" for n in names)
            raise VgmError(f"this network takes {len(parts)} pictures: {', '.join(names)}", hint, USAGE)
    return name, [str(p) for p in image_files(path)]


def negative_for(conditions: Conditions, negative: str | None) -> dict[str, list[str]]:
    """{condition: a text to be guided away from}. VgmError: the network reads no texts, or not this one."""
    if negative is None:
        return {}
    if not (parts := conditions.on("text")):
        raise VgmError("--negative is a text, which this network does not read", code=USAGE)
    return {part.name: part.condition.parse([negative]) for part in parts}


def adopt_conditions(
    loaded: ckpt.Loaded, own: dict[str, Any], prompts: Sequence[str]
) -> tuple[Sequence[str], dict[str, Any]]:
    """conditions.NAME.KEY=VALUE among the overrides builds a condition anew (where its encoder lies here). Gives the
    prompts and those overrides, which are taken out of `own`. `prompt=` and `text_encoder=` are what earlier versions
    called --prompt and conditions.text.path."""
    if "prompt" in own and loaded.conditions.of_column("text"):
        said = own.pop("prompt")
        prompts = prompts or ([said] if isinstance(said, str) else list(said))
    if "text_encoder" in own and loaded.conditions.of_column("text"):
        own["conditions.text.path"] = own.pop("text_encoder")
    nodes = {name: dict(node) for name, node in loaded.conditions.components().items()}
    anew = {k: own.pop(k) for k in list(own) if k.startswith("conditions.")}
    for key, value in anew.items():
        _, name, option = [*key.split(".", 2), "", ""][:3]
        if name not in nodes or not option:
            raise unknown("condition", name, nodes)
        nodes[name][option] = value
        part = next(p for p in build_parts({name: nodes[name]}, loaded.header.data, loaded.codec))
        part.trained = False
        before = loaded.conditions.parts[name].condition
        if nodes[name].get("train") and isinstance(part.condition, nn.Module) and isinstance(before, nn.Module):
            part.condition.load_state_dict(before.state_dict())
            part.condition.eval().requires_grad_(False)
        loaded.conditions.parts[name] = part
        loaded.conditions.to(next(loaded.model.parameters()).device)
    return prompts, anew


def adopt_classes(loaded: ckpt.Loaded, sampler: Any) -> None:
    """Images of a network without classes are told some all the same where a classifier guides the sampler: its own."""
    guide = sampler.classifier if isinstance(sampler, GaussianSampler) else None
    if isinstance(guide, HasClasses) and loaded.conditions.of_column("label") is None:
        loaded.conditions.parts["class"] = Part("class", ClassLabel(guide.num_classes), "label")


def named(loaded: ckpt.Loaded, model: str) -> str:
    """The name under which a loaded model is recorded; `last` or a folder of runs becomes the run it means today."""
    path = Path(model)
    whole = path.is_file() or (path / "checkpoints").is_dir() or (path / "model.safetensors").is_file()
    if whole or loaded.path.parent == ckpt.ASSETS:
        return model
    return str(next((p.parent for p in loaded.path.parents if p.name == "checkpoints"), loaded.path))
