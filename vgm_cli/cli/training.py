"""What `vgm train`, `distill` and `finetune-rl` have in common: their options, and what becomes of them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from vgm_cli.cli import complete
from vgm_cli.ui import ui

RUN, HARDWARE, RECORD = "Run", "Hardware", "Records"


def option(text: str, panel: str | None = None, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


Trust = Annotated[
    bool, option("Run the code (module:attr) that the recipe file names. Only for files you trust.", None, "--trust")
]


@dataclasses.dataclass
class Training:
    """The options of `vgm train`, `distill` and `finetune-rl`, as they were typed."""

    recipe: Annotated[
        str | None,
        option(
            "One of its recipes (vgm ls), or a YAML file. Default: the small one, mostly mnist.",
            autocompletion=complete.recipes,
        ),
    ] = None
    trust: Trust = False
    out: Annotated[Path | None, option("Run directory. Default: runs/NAME-RECIPE/TIME.")] = None
    resume: Annotated[bool, option("Go on from the last checkpoint in --out.", RUN, "--resume")] = False
    overwrite: Annotated[bool, option("Empty --out first.", RUN, "--overwrite")] = False
    stop_after: Annotated[int | None, option("Save and stop at this step; --resume goes on.", RUN, min=1)] = None
    seed: Annotated[int | None, option("Short for train.seed=N.", RUN)] = None
    plan: Annotated[bool, option("Parameters, FLOPs, memory, time; trains nothing.", RUN, "--plan")] = False
    print_config: Annotated[bool, option("The resolved recipe with origins.", RUN, "--print-config")] = False
    help_config: Annotated[bool, option("Every key with type and default.", RUN, "--help-config")] = False
    device: Annotated[str, option("auto | cpu | cuda | cuda:N | mps. auto: the GPU, if there is one.", HARDWARE)] = (
        "auto"
    )
    nproc: Annotated[int, option("Processes on this machine.", HARDWARE)] = 1
    nnodes: Annotated[int, option("Machines.", HARDWARE)] = 1
    rdzv: Annotated[str | None, option("Meeting point of the machines.", HARDWARE, metavar="HOST:PORT")] = None
    track: Annotated[
        str, option("jsonl | none | tensorboard | wandb | trackio (the last three are extras).", RECORD)
    ] = "jsonl"

    @property
    def asks_only(self) -> bool:
        """Whether the command only shows something (a plan, the config) and trains nothing."""
        return self.plan or self.print_config or self.help_config

    def words(self, word: str | None, overrides: list[str] | None, what: str) -> tuple[str | None, list[str]]:
        """(recipe or None, KEY=VALUE…) of a command line whose first word may be left out with --resume."""
        from vgm_cli.engine.train import tracking
        from vgm_cli.errors import USAGE, VgmError

        tracking.check(self.track)
        rest = list(overrides or [])
        if self.resume and word is not None and ("=" in word or word.startswith("~")):
            rest.insert(0, word)
            word = None
        if word is None and not self.resume:
            raise VgmError(f"no {what} is named", "`vgm ls` lists the papers; `vgm train dit` is a start", USAGE)
        return word, rest if self.seed is None else [*rest, f"train.seed={self.seed}"]

    def stored(self, assignments: list[str]) -> Any:
        """The recipe of the run in --out, for --resume without the name of a recipe."""
        from vgm_cli import recipe as recipes
        from vgm_cli.errors import USAGE, VgmError

        if self.out is None:
            raise VgmError("--resume needs the run's directory", "--resume --out RUN", USAGE)
        return recipes.stored(self.out, assignments)

    def run(self, engine: Callable[..., Any], resolved: Any) -> None:
        """Show what was asked for, or train, in several processes where several are asked for."""
        from vgm_cli.engine import processes
        from vgm_cli.errors import USAGE, VgmError

        if self.nproc < 1 or self.nnodes < 1:
            raise VgmError("--nproc and --nnodes must be at least 1", code=USAGE)
        if (self.help_config or self.print_config) and any(node.get("run") for node in resolved.roles().values()):
            from vgm_cli.engine.build import settle

            settle(resolved)
        if self.help_config:
            return show_keys(resolved)
        if self.print_config:
            return show_config(resolved)
        if self.plan:
            from vgm_cli.engine.train.plan import make_plan, show_plan

            return show_plan(make_plan(resolved, world=self.nproc * self.nnodes, nodes=self.nnodes))
        processes.adopt_slurm()
        if (self.nproc > 1 or self.nnodes > 1) and not processes.launched():
            raise typer.Exit(processes.relaunch(self.nproc, self.nnodes, self.rdzv, processes.default_argv()))
        engine(
            resolved,
            self.out,
            resume=self.resume,
            overwrite=self.overwrite,
            stop_after=self.stop_after,
            track=self.track,
            device=self.device,
        )


def trains(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator of a verb: to its own parameters the options of `Training` are added, but for some of them; it is
    called with `options`, a Training."""

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        shared = [f for f in dataclasses.fields(Training) if f.name not in without]
        hints = get_type_hints(Training, include_extras=True)
        own = inspect.signature(verb, eval_str=True)
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [p.replace(kind=keyword) for p in own.parameters.values() if p.name != "options"]
        parameters += [inspect.Parameter(f.name, keyword, default=f.default, annotation=hints[f.name]) for f in shared]

        def command(**values: Any) -> None:
            options = Training(**{f.name: values.pop(f.name) for f in shared})
            verb(**values, options=options)

        command.__name__, command.__doc__ = verb.__name__, verb.__doc__
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


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
    from vgm_cli.recipe import Recipe
    from vgm_cli.registry import load_target, registry, signature
    from vgm_cli.settings import COMPONENT_NODES, NODES, keys_of

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
