"""Everything that can be known to be wrong before the first step, in one place for every verb.

`check` looks at a recipe alone (`vgm validate`, --plan, before processes are launched), `before_start` at the recipe
with its data, before a run directory is made. Torch-free at import.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.recipe import COMPONENT_NODES, Recipe, check_components
from vgm_cli.ui import ui

if TYPE_CHECKING:
    from vgm_cli.engine.build import Built, Facts, PlannedCodec


def check(recipe: Recipe) -> tuple[dict[str, int], str]:
    """({role: parameters}, "") of a recipe that builds; ({}, why) when its components fit but nothing tells the size
    of the images. VgmError: unknown keys, values that do not fit, files that are not there, parts that do not go
    together."""
    from vgm_cli.engine import build

    build.settle(recipe)
    check_parts(recipe)
    check_batch(recipe)
    data = recipe.node("data")
    here = not data.path or data.path in shipped() or "{" in data.path or Path(data.path).expanduser().exists()
    if not here:
        ui.warn(f"no such data here: {data.path}; checked with the recipe's own numbers")
    try:
        facts = build.declared_facts(data)
    except VgmError as e:
        if not data.path or not here:
            return {}, e.message
        facts, _, planned = build.plan_facts(recipe)
    else:
        planned = build.planned_codec(recipe, facts) if recipe.config.get("codec") else None
        facts = planned.facts if planned else facts
    built = build_on_meta(recipe, facts, planned)
    return {role: sum(p.numel() for p in network.parameters()) for role, network in built.networks.items()}, ""


def shipped() -> Mapping[str, str]:
    from vgm_cli.data import SHIPPED

    return SHIPPED


def before_start(recipe: Recipe, world: int = 1, reads_data: bool = True) -> Any:
    """The data set of a run that may start (None where the caller makes the batches itself: reads_data=False).

    Writes nothing. Raises VgmError for whatever `check` does, and for missing or unreadable data, labels that are not
    there, a batch that does not divide, networks that do not fit the images.
    """
    check_parts(recipe)
    check_batch(recipe, world)
    if not reads_data:
        return None
    from vgm_cli.data.latents import Latents
    from vgm_cli.engine import build
    from vgm_cli.engine.conditions import check_files
    from vgm_cli.engine.train import data_feed

    dataset, _ = data_feed.open_images(recipe)
    check_files(recipe.config.get("conditions") or {}, recipe.name)
    facts = build.facts_for(recipe, dataset)
    node, planned = recipe.config.get("codec"), None
    if node:
        if not node.get("weights") and (not node.get("fallback") or isinstance(dataset, Latents)):
            raise build.missing_codec(node)
        planned = build.planned_codec(recipe, facts, dataset)
        facts = planned.facts
    elif isinstance(dataset, Latents):
        raise data_feed.not_for_pixels(dataset)
    build_on_meta(recipe, facts, planned)
    return dataset


def check_parts(recipe: Recipe) -> None:
    """Components, their keywords, their files, the sampler: what needs no data."""
    check_components(recipe)
    nodes = [(n, recipe.config.get(n)) for n in COMPONENT_NODES]
    nodes += [(f"roles.{r}", n) for r, n in recipe.roles().items()]
    for where, node in nodes:
        if node and node.get("weights") is not None:
            check_weights(where, node)
    from vgm_cli.engine import build

    given = build.sampler_parameters(recipe) & recipe.roles().keys()
    check_sampler(recipe.config.get("sampler"), bool(given))


def check_batch(recipe: Recipe, world: int = 1) -> None:
    """As many images for every process and micro-batch."""
    opts = recipe.node("train")
    per_step = world * opts.accumulate
    if opts.batch_size % per_step:
        raise VgmError(
            f"train.batch_size={opts.batch_size} does not divide over {world} processes × {opts.accumulate} "
            "micro-batches",
            f"a multiple of {per_step} does",
            USAGE,
        )


def check_weights(where: str, node: Mapping[str, Any]) -> None:
    """The file is there and, where it says what it holds, holds this network."""
    from vgm_cli.engine import checkpoint as ckpt
    from vgm_cli.engine.initial import refuse_other

    weights = node["weights"]
    if not isinstance(weights, str) or not weights:
        raise VgmError(f"{where}.weights={weights!r} is no file", f"{where}.weights=RUN|FILE", USAGE)
    path = ckpt.resolve(weights)
    if where == "codec" or node.get("partial"):
        return  # its own header counts; whatever fits is taken
    try:
        header = ckpt.read_header(path)
    except VgmError:
        return  # a file without a header: the shapes of its tensors are compared when it is loaded
    refuse_other(header, str(node.get("name")), path)


def check_sampler(node: Mapping[str, Any] | None, given: bool = False) -> None:
    """Build it: samplers hold settings only. The network that may guide one is not opened, its file is looked for.
    given: it receives a role, which is not built here."""
    if not node:
        return
    from vgm_cli.engine import checkpoint as ckpt
    from vgm_cli.registry import registry

    node = dict(node)
    if isinstance(node.get("classifier"), str):
        ckpt.resolve(node.pop("classifier"))
    if "also" in node:
        for run in [also] if isinstance(also := node.pop("also"), str) else also or []:
            ckpt.resolve(run)
    if not given:
        registry().build("sampler", node)


def build_on_meta(recipe: Recipe, facts: Facts, planned: PlannedCodec | None = None) -> Built:
    """Networks and objective without memory, and what only they can tell: what the phases train, whether the recipe's
    optimizers and their groups are there."""
    from vgm_cli.engine import build
    from vgm_cli.engine.train import optim
    from vgm_cli.nn.meta import on_meta

    with on_meta():
        codec = {"codec": planned.codec} if planned else {}
        built = build.build_objective(recipe, facts, {**codec, **build.plan_roles(recipe, facts, codec.get("codec"))})
    optim.check(recipe, built.networks, built.objective.phases())
    return built
