"""Reinforcement learning of a trained model: a training run whose start is a checkpoint and whose data are rewards.

The checkpoint is the recipe's role `reference`, the policy as it was at first. Its file says what network it is, how
samplers look at it, behind which codec and with which classes; the result is a run like any other. No training image is
needed: classes are drawn, and the images are the policy's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vgm_cli import atomic
from vgm_cli import recipe as recipes
from vgm_cli.api import Batch, Step
from vgm_cli.conditioning import Conditions
from vgm_cli.data import open_dataset
from vgm_cli.engine import build
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.build import Facts
from vgm_cli.engine.conditions import conditions_for
from vgm_cli.engine.distill import run as distill
from vgm_cli.engine.run import Run
from vgm_cli.engine.train import loop as trainer
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.nn.meta import on_meta
from vgm_cli.recipe import Recipe
from vgm_cli.registry import load_target, registry
from vgm_cli.ui import ui
from vgm_cli.yaml_text import parse_yaml

VERB = "finetune-rl"
REFERENCE = recipes.STARTS[VERB]
PROMPTS = 1000  # captions of the data that are asked for where nobody names any


def methods() -> list[str]:
    """Objectives that learn from a reward."""
    return sorted(n for (kind, n), c in registry().components.items() if kind == "objective" and VERB in c.verbs)


def load(
    method: str,
    recipe: str | None = None,
    assignments: Sequence[str] = (),
    model: str | None = None,
    weights: str | None = None,
    rewards: Sequence[str] = (),
    prompts: Sequence[str] = (),
) -> Recipe:
    """The resolved recipe of `vgm finetune-rl METHOD --model MODEL --reward NAME=WEIGHT KEY=VALUE…`; without a model,
    with its stand-in. prompts: what a model that reads texts is asked for.

    VgmError: no such method, a recipe without a reward to learn from, a model that is no diffusion or flow network.
    """
    known = {n.split("/")[0] for n in recipes.shipped()} | set(registry().papers)
    if method not in known and "/" not in method and not method.endswith((".yaml", ".yml")):
        raise unknown("reinforcement learning method", method, methods())
    name, file = recipes.locate(method, recipe)
    config, origins = recipes.load_file(file, f"recipe {name}")
    if (config.get("objective") or {}).get("name") not in methods():
        other = recipes.next_command(name.split("/")[0], recipes.verb_of(config))
        hint = f"`{other}`; methods that learn from a reward: {', '.join(methods())}"
        raise VgmError(f"{name} does not learn from a reward", hint, USAGE)
    terms, rest = split_rewards(rewards, assignments)
    if terms:
        node = {"kind": "reward", "name": "weighted", "terms": terms}
        distill.replace(config, origins, "roles.reward", node, "command line")
    if model is not None:
        start_from(config, origins, ckpt.resolve(model, weights))
    if prompts:
        ask_for(config, origins, prompts)
    resolved = build.settle(distill.finish(REFERENCE, config, origins, name, rest))
    if origins.get("guidance_scale") not in ("command line", "environment"):  # sampled as it was trained
        config["guidance_scale"] = config["objective"].get("guidance_scale", config.get("guidance_scale"))
    return resolved


def split_rewards(rewards: Sequence[str], assignments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Collect the reward terms of a command line: (terms, the other assignments).

    Terms come from `--reward NAME[=WEIGHT]`, from `reward={NAME: WEIGHT}` and from `reward.NAME.OPTION=VALUE`.
    """
    terms: dict[str, Any] = {}
    for text in rewards:
        name, _, weight = text.partition("=")
        value = parse_yaml(weight, text) if weight else 1.0
        if not name or isinstance(value, bool) or not isinstance(value, int | float | dict):
            raise VgmError(f"--reward {text} is not NAME=WEIGHT", "example: --reward ink=1.0", USAGE)
        terms[name] = value
    rest = []
    for text in assignments:
        key, eq, value = text.partition("=")
        if key == "reward" and eq:
            node = parse_yaml(value, text)
            terms |= node if isinstance(node, dict) else {str(node): 1.0}
        elif key.startswith("reward.") and eq:
            name, _, option = key.removeprefix("reward.").rpartition(".")
            term = terms.get(name)
            if not name or term is None:
                raise VgmError(
                    f"'{text}': there is no such reward", "--reward NAME first, then reward.NAME.OPTION=…", USAGE
                )
            options = term if isinstance(term, dict) else {"weight": term}
            terms[name] = {**options, option: parse_yaml(value, text)}
        else:
            rest.append(text)
    check_terms(terms)
    return terms, rest


def check_terms(terms: Mapping[str, Any]) -> None:
    """VgmError: a reward of that name does not exist. Called before anything is loaded."""
    for name in terms:
        if ":" not in name:
            registry().find("reward", name)


def start_from(config: dict[str, Any], origins: dict[str, str], path: Path) -> None:
    """Make the policy at `path` the reference of a recipe, and take codec, guidance and sampler from its file."""
    distill.start_from(REFERENCE, config, origins, path)
    header = ckpt.read_header(path)
    distill.replace(config, origins, "sampler", header.recipe.get("sampler"), REFERENCE)
    if not header.data.get("num_classes"):
        config["objective"]["guidance_scale"] = None


def ask_for(config: dict[str, Any], origins: dict[str, str], prompts: Sequence[str]) -> None:
    """Put prompts into the condition of a recipe that reads texts. VgmError: it has none."""
    nodes = config.get("conditions") or {}
    targets = {k: n.get("name", k) for k, n in nodes.items()}
    names = [k for k, n in targets.items() if column_of(n) == "text"]
    if not names:
        raise VgmError(
            "--prompt is a text, which this model does not read", "--label is not needed: classes are drawn", USAGE
        )
    for name in names:
        nodes[name]["items"] = list(prompts)
        origins[f"conditions.{name}.items"] = "command line"


def column_of(condition: str) -> str:
    return str(load_target(registry().find("condition", condition).target).column)


def given_items(recipe: Recipe, facts: Facts) -> None:
    """Let the captions of the data be the texts that are asked for, where the recipe names none. VgmError: there are
    none, or too many to be named."""
    with on_meta():
        parts = conditions_for(recipe.config.get("conditions") or {}, facts).parts
    for name, part in parts.items():
        if len(part.items):
            continue
        if part.column != "text":
            raise VgmError(f"conditions.{name} is told pictures, which finetune-rl does not ask for", code=USAGE)
        found = captions(recipe)
        if not found:
            part.in_turn([0])  # says what is missing
        if len(found) > PROMPTS:
            raise VgmError(f"the data has {len(found):,} captions", "--prompts FILE says which are asked for", USAGE)
        recipe.config["conditions"][name]["items"] = found
        ui.info(f"prompts: the {len(found)} captions of {recipe.node('data').path}")


def captions(recipe: Recipe) -> list[str]:
    """The captions of the data that the model was trained on, each once; none where it is not here."""
    try:
        data = open_dataset(recipe.node("data").path, split=recipe.node("data").split, quiet=True)
    except VgmError:
        return []
    return list(dict.fromkeys(t for i in range(len(data)) if (t := data.caption(i)))) if data.facts.captions else []


def run(
    recipe: Recipe,
    out: Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop_after: int | None = None,
    track: str = "jsonl",
    device: str | None = None,
) -> trainer.Outcome:
    """Train the policy on its own images; beside the checkpoints, adapters are left as files of their own."""
    if (start := recipe.start()) is None:
        raise VgmError("reinforcement learning needs a model", f"vgm {VERB} {recipe.paper} --model RUN", USAGE)
    path = ckpt.resolve(start)
    header = ckpt.read_header(path)
    codec = ckpt.load_codec(header, path)
    given_items(recipe, facts_of(header, path))

    def feed(recipe: Recipe, run: Run, accelerator: Any, size: int) -> ClassFeed:
        reference = None
        if (known := header.parts.get("codec")) is not None:
            reference = ckpt.refer_codec(ckpt.locate(known, path, "codec"), run.path, known.output)
        return ClassFeed(facts_of(header, path), dict(header.data), size, codec, reference, accelerator.device)

    outcome = trainer.train(
        recipe,
        out,
        resume=resume,
        overwrite=overwrite,
        stop_after=stop_after,
        track=track,
        device=device,
        roles={"codec": codec},
        open_feed=feed,
    )
    if (recipe.config["objective"].get("lora")) is not None:
        save_adapter(outcome.path, recipe.config["objective"]["lora"])
    return outcome


# -- batches without images ------------------------------------------------------------------------------------------


def facts_of(header: ckpt.Header, path: Path) -> Facts:
    """What the model was built for, from its own checkpoint. VgmError: it does not say."""
    known = {k: header.data.get(k) for k in ("image_size", "image_channels", "num_classes", "size", "channels")}
    missing = [k for k, v in known.items() if v is None]
    if missing:
        raise VgmError(
            f"{path} does not say its {', '.join(missing)}", "train it here, or convert it with its data", USAGE
        )
    names = {k: list(header.data.get(k) or []) for k in ("class_names", "words")}
    return Facts(**known, **names)  # type: ignore[arg-type]


@dataclass
class ClassFeed:
    """Batches for an objective that makes its images itself: as data_feed.Feed, but with zeros in place of images, and
    with the facts of the data that the model was trained on (its checkpoint's)."""

    facts: Facts
    data: dict[str, Any]
    size: int
    codec: Any
    codec_ref: ckpt.Reference | None
    device: torch.device
    dataset: None = None  # so that conditions have nothing to read: the objective asks for what it wants
    count: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.count = int(self.data.get("count") or 0)

    def describe(self) -> dict[str, Any]:
        rest = {k: v for k, v in self.data.items() if k not in self.facts.__dict__}
        return {**rest, "sample_shape": list(self.facts.sample_shape)}

    def batches(self, start: int = 0, size: int | None = None, shared: bool = False) -> Iterator[Batch]:
        n = size or self.size
        batch: Batch = {
            "x": torch.zeros(n, *self.facts.sample_shape, device=self.device),
            "index": torch.arange(n, device=self.device),
        }
        if self.facts.num_classes:
            batch["label"] = torch.zeros(n, dtype=torch.long, device=self.device)
        while True:
            yield dict(batch)

    def items(self, conditions: Conditions, n: int) -> dict[str, list[Any]]:
        """There are no images, and no items of theirs."""
        return {}

    def first(self, n: int, shared: int | None = None) -> Batch:
        return next(self.batches(0, shared or n))

    def to_model(self, batch: Batch, step: Step) -> Batch:
        return {k: v.to(self.device) for k, v in batch.items()}


# -- adapters --------------------------------------------------------------------------------------------------------


def save_adapter(out: Path, lora: Mapping[str, Any]) -> None:
    """Write the trained adapters to RUN/adapter/ under PEFT's names. They are those of the raw weights; the checkpoints
    beside them hold the weights with the adapters merged."""
    from vgm_cli.nn import lora as adapters

    folder = Run(out).last()
    if folder is None:
        return
    tensors, _ = ckpt.read_tensors(folder / "trainer.safetensors")
    state = {k.removeprefix("kept.model."): v for k, v in tensors.items() if k.startswith("kept.model.")}
    layers = sorted({k.rpartition(".")[0] for k in state})
    rank = int(next(iter(state.values())).shape[0])
    target = out / "adapter"
    target.mkdir(exist_ok=True)
    atomic.save_safetensors(adapters.to_peft(state), target / "adapter_model.safetensors", {"format": "pt"})
    alpha = lora.get("alpha")
    atomic.write_json(
        target / "adapter_config.json", adapters.peft_config(rank, rank if alpha is None else alpha, layers)
    )
