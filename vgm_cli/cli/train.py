"""vgm train."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from vgm_cli.cli import complete
from vgm_cli.ui import ui

RUN, HARDWARE, RECORD = "Run", "Hardware", "Records"
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Run the code (module:attr) that the recipe file names. Only for files you trust."),
]


def register(app: typer.Typer) -> None:
    app.command("train", cls=RecipeCommand)(train)


def train(
    paper: Annotated[
        str | None,
        typer.Argument(
            help="A paper (`vgm ls`), PAPER/RECIPE, or a YAML file; with --resume, the run's own recipe.",
            show_default=False,
            autocompletion=complete.trainable,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]…", help="train.steps=100, ~optimizer.warmup …", autocompletion=complete.keys
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Recipe of the paper, or a YAML file. Default: mnist.", autocompletion=complete.recipes),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory. Default: runs/PAPER-RECIPE/TIME.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.", rich_help_panel=RUN)
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Empty --out first.", rich_help_panel=RUN)] = False,
    stop_after: Annotated[
        int | None,
        typer.Option(help="Save and stop at this step; --resume goes on.", min=1, rich_help_panel=RUN),
    ] = None,
    trust: Trust = False,
    codec: Annotated[
        str | None,
        typer.Option(
            help="A trained first stage: short for codec.weights=RUN, and no other.", autocompletion=complete.runs
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Short for train.seed=N.", rich_help_panel=RUN)] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Parameters, FLOPs, memory, time; trains nothing.", rich_help_panel=RUN)
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="The resolved recipe with origins.", rich_help_panel=RUN)
    ] = False,
    help_config: Annotated[
        bool, typer.Option("--help-config", help="Every key with type and default.", rich_help_panel=RUN)
    ] = False,
    device: Annotated[
        str,
        typer.Option(
            help="auto | cpu | cuda | cuda:N | mps. auto: the GPU, if there is one.", rich_help_panel=HARDWARE
        ),
    ] = "auto",
    nproc: Annotated[int, typer.Option(help="Processes on this machine.", rich_help_panel=HARDWARE)] = 1,
    nnodes: Annotated[int, typer.Option(help="Machines.", rich_help_panel=HARDWARE)] = 1,
    rdzv: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Meeting point of the machines.", rich_help_panel=HARDWARE)
    ] = None,
    track: Annotated[
        str,
        typer.Option(
            help="jsonl | none | tensorboard | wandb | trackio (the last three are extras).", rich_help_panel=RECORD
        ),
    ] = "jsonl",
) -> None:
    """Train a paper's model.

    Examples:

        vgm train dit                                   # MNIST, minutes on a laptop CPU

        vgm train dit data.path=FOLDER                  # your images, class sub-folders become labels

        vgm train dit --recipe imagenet256 --plan       # what the paper's run costs

        vgm train llamagen --codec RUN data.path=FOLDER # on the codes of a `vgm train vqgan` run

    Next: vgm sample RUN
    """
    from vgm_cli import recipe as recipes
    from vgm_cli.engine.train import tracking
    from vgm_cli.errors import USAGE, VgmError

    tracking.check(track)
    paper, assignments = named(paper, overrides, "paper", resume)
    if seed is not None:
        assignments.append(f"train.seed={seed}")
    if codec is not None:
        assignments += [f"codec.weights={codec}", "codec.fallback=null"]
    recipes.allow_typed(assignments, trust)
    if paper is None:
        resolved = recipes.stored(run_to_resume(out), assignments)
    else:
        resolved = recipes.load(paper, recipe, assignments)
    verb = recipes.verb_of(resolved.config)
    if verb != "train" and resolved.start() is None and not (plan or help_config or print_config):
        needs = "a trained model" if verb == "finetune-rl" else "a trained teacher"
        raise VgmError(f"{resolved.name} needs {needs}", recipes.next_command(resolved.paper, verb), USAGE)
    if verb == "finetune-rl" and not (plan or help_config or print_config):
        raise VgmError(f"{resolved.name} learns from rewards", recipes.next_command(resolved.paper, verb), USAGE)
    if shown_instead(resolved, help_config, print_config, plan, nproc, nnodes):
        return
    launch(nproc, nnodes, rdzv)
    from vgm_cli.engine.train.loop import train as run

    run(resolved, out, resume=resume, overwrite=overwrite, stop_after=stop_after, track=track, device=device)


def named(word: str | None, overrides: list[str] | None, what: str, resume: bool) -> tuple[str | None, list[str]]:
    """(recipe or None, overrides) of a command line whose first word may be left out with --resume."""
    from vgm_cli.errors import USAGE, VgmError

    rest = list(overrides or [])
    if resume and word is not None and ("=" in word or word.startswith("~")):
        rest.insert(0, word)
        word = None
    if word is None and not resume:
        raise VgmError(f"no {what} is named", "`vgm ls` lists the papers; `vgm train dit` is a start", USAGE)
    return word, rest


def run_to_resume(out: Path | None) -> Path:
    from vgm_cli.errors import USAGE, VgmError

    if out is None:
        raise VgmError("--resume needs the run's directory", "--resume --out RUN", USAGE)
    return out


def shown_instead(
    resolved: Any, help_config: bool, print_config: bool, plan: bool, nproc: int = 1, nnodes: int = 1
) -> bool:
    """Do what was asked for instead of training; True when there was something."""
    from vgm_cli.errors import USAGE, VgmError

    if nproc < 1 or nnodes < 1:
        raise VgmError("--nproc and --nnodes must be at least 1", code=USAGE)
    if (help_config or print_config) and any(node.get("run") for node in resolved.roles().values()):
        from vgm_cli.engine.build import settle

        settle(resolved)
    if help_config:
        show_keys(resolved)
    elif print_config:
        show_config(resolved)
    elif plan:
        from vgm_cli.engine.train.plan import make_plan, show_plan

        show_plan(make_plan(resolved, world=nproc * nnodes))
    return help_config or print_config or plan


def launch(nproc: int, nnodes: int, rdzv: str | None) -> None:
    """Go on as one of several processes, where several are asked for."""
    from vgm_cli.engine import distributed

    distributed.adopt_slurm()
    if (nproc > 1 or nnodes > 1) and not distributed.launched():
        raise typer.Exit(distributed.relaunch(nproc, nnodes, rdzv, distributed.default_argv()))


class RecipeCommand(TyperCommand):
    """A verb whose settings are KEY=VALUE: `--steps 30` is told to be train.steps=30."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)  # the parser empties the list
        try:
            return super().parse_args(ctx, args)
        except Exception as e:
            option = str(getattr(e, "option_name", ""))  # of click's NoSuchOption, of which typer has its own
            key = recipe_key(option.lstrip("-"), given) if option else None
            if key is None:
                raise
            from vgm_cli.errors import USAGE, VgmError

            hint = f"settings of the recipe have no dashes: {key}={value_after(option, given)}"
            raise VgmError(f"there is no option {option}", hint, USAGE) from e


def recipe_key(word: str, args: list[str]) -> str | None:
    """The dotted key that `--word` may mean: of the host's nodes, else of the recipe named on the command line."""
    from vgm_cli import recipe as recipes
    from vgm_cli.errors import VgmError
    from vgm_cli.ui import flat

    word = word.replace("-", "_")
    known = [f"{n}.{f.name}" for n, cls in recipes.NODES.items() for f in dataclasses.fields(cls)]
    first = next((a for a in args if not a.startswith("-")), "")
    try:
        known += list(flat(recipes.load(first).config))
    except VgmError:
        pass
    known += recipes.TOP
    if word in known:
        return word
    hits = [k for k in known if k.endswith(f".{word}")]
    order = ["train", "optimizer", "data", "model"]
    hits.sort(key=lambda k: order.index(k.split(".")[0]) if k.split(".")[0] in order else len(order))
    short = {"lr": "optimizer.lr", "learning_rate": "optimizer.lr", "epochs": "train.steps", "max_steps": "train.steps"}
    return hits[0] if hits else short.get(word)


def value_after(option: str, args: list[str]) -> str:
    """What followed an option on the command line."""
    for i, arg in enumerate(args):
        if arg.startswith(f"{option}="):
            return arg.partition("=")[2]
        if arg == option and i + 1 < len(args) and not args[i + 1].startswith("--"):
            return args[i + 1]
    return "VALUE"


def show_config(resolved: object) -> None:
    """The resolved YAML, each leaf with where it came from."""
    from vgm_cli.recipe import Recipe
    from vgm_cli.ui import flat

    assert isinstance(resolved, Recipe)
    ui.document({"config": resolved.config, "origins": resolved.origins})
    values = flat(resolved.config)
    width = max(len(f"{k}: {v}") for k, v in values.items())
    for k, v in values.items():
        ui.data(f"{k}: {v}".ljust(width) + f"  # {resolved.origins.get(k, '')}".rstrip(" #"))


def show_keys(resolved: object) -> None:
    """Keys of the host's nodes and of the recipe's components: type, value here, meaning."""
    from vgm_cli.cli import meanings
    from vgm_cli.ranges import explain
    from vgm_cli.recipe import COMPONENT_NODES, NODES, Recipe, keys_of
    from vgm_cli.registry import load_target, registry, signature

    assert isinstance(resolved, Recipe)
    rows = []
    for node, cls in NODES.items():
        keys = keys_of(cls)
        found = meanings.of_class(cls, keys)
        for name, kind_of in keys.items():
            rows.append((f"{node}.{name}", explain(kind_of), resolved.config[node].get(name), found.get(name, "")))
    for kind in COMPONENT_NODES:
        config = resolved.config.get(kind)
        if config:
            component = registry().find(kind, config["name"])
            target = load_target(component.target, component.name)
            parameters = signature(target).parameters
            found = meanings.of_keys(target, parameters)
            for name, p in parameters.items():
                if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and (name != "model" or kind == "model"):
                    default = config.get(name, None if p.default is p.empty else p.default)
                    kind_of = "" if p.annotation is p.empty else explain(p.annotation)
                    rows.append((f"{kind}.{name}", kind_of, default, found[name]))
    ui.document([{"key": k, "type": t, "value": v, "meaning": m} for k, t, v, m in rows])
    ui.table(("key", "type", "value here", "meaning"), rows)
