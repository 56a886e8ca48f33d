"""vgm evaluate: measure (the default), diff, stats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from vgm_cli.cli import complete
from vgm_cli.ui import counted, ui, with_error

DEFAULT = "(measure)"  # no target's name
Features = Annotated[
    str | None,
    typer.Option(
        help="Feature network: mnist, colour, inception, or weights files (Inception, DINOv2, CLIP), comma-separated."
    ),
]
ProtocolName = Annotated[str, typer.Option("--protocol", help="vgm | adm | edm | clean | torch-fidelity | mar")]
BatchSize = Annotated[int, typer.Option(min=1, help="Of sampling and feature passes.")]
NProc = Annotated[int, typer.Option(help="Processes that share the work; the numbers stay the same.", min=1)]
Device = Annotated[str, typer.Option(help="auto | cpu | cuda | cuda:N | mps.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


class ShortContext(typer.Context):
    """Usage lines read `vgm evaluate TARGET`."""

    @property
    def command_path(self) -> str:
        return super().command_path.removesuffix(f" {DEFAULT}")


class Measure(TyperCommand):
    context_class = ShortContext


class TargetOrCommand(TyperGroup):
    """`vgm evaluate TARGET …` without naming a subcommand: what is no subcommand's name is the target."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        completing_first = not args and ctx.resilient_parsing
        if not completing_first and (not args or args[0] not in self.commands):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        found = [c for c in super().shell_complete(ctx, incomplete) if c.value != DEFAULT]
        kind = type(found[0]) if found else None
        return found + ([kind(r) for r in complete.runs(incomplete)] if kind else [])


def register(app: typer.Typer) -> None:
    group = typer.Typer(cls=TargetOrCommand, help="Measure samples against a reference; compare results; statistics.")
    group.command(DEFAULT, cls=Measure)(evaluate)
    group.command("diff")(diff)
    group.command("stats")(stats)
    app.add_typer(group, name="evaluate")


def given(ctx: typer.Context) -> frozenset[str]:
    """Names of the parameters that the user typed."""
    typed = {name for name in ctx.params if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"}
    return frozenset(name for name in typed if ctx.params[name] not in (None, [], ()))


def evaluate(
    ctx: typer.Context,
    target: Annotated[
        str | None,
        typer.Argument(
            help="A run or checkpoint, sampled first (the newest run of a paper, of a folder of runs, of all: last), "
            "a codec, a folder of images or an ADM .npz. Default: last.",
            autocompletion=complete.runs,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Keywords of the sampler, for a run.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Data or a statistics file. Default: the data a run was trained on.")
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(help="fid, kid:subset_size=500, precision-recall, … (`vgm ls metrics`). Default: the protocol's."),
    ] = "",
    features: Features = None,
    protocol: ProtocolName = "vgm",
    n: Annotated[
        int | None,
        typer.Option("-n", help="Samples. Default: the protocol's for a run (vgm: 2000), all of a folder.", min=2),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of the reference: train, val or test, where it has them.")] = None,
    held_out: Annotated[str | None, typer.Option(help="Images that no training saw, for memorisation.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Another sampler.", autocompletion=complete.samplers)] = None,
    steps: Annotated[int | None, typer.Option(help="Sampler steps.", min=1)] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is no guidance.")] = None,
    guidance_interval: Annotated[
        str | None, typer.Option(metavar="LO,HI", help="Guide only where t (0 data, 1 noise) lies between.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the samples and of resampling metrics.")] = 0,
    weights: Annotated[str | None, typer.Option(help="raw, or an average. Default: the first average.")] = None,
    batch_size: BatchSize = 100,
    precision: Annotated[str, typer.Option(help="auto | fp32 | bf16, of sampling. auto: as trained.")] = "auto",
    nproc: NProc = 1,
    device: Device = "auto",
    check: Annotated[list[str] | None, typer.Option("--assert", help='Exit code 3 unless it holds: "fid<5".')] = None,
    save_stats: Annotated[Path | None, typer.Option(help="Also write the reference's statistics here.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Also write the results here (JSON), for `vgm evaluate diff`.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure samples against a reference. Every number carries its protocol.

    Examples:

        vgm evaluate                                        # the newest run

        vgm evaluate RUN --metrics fid,precision-recall -n 5000

        vgm evaluate samples.npz --reference FOLDER --features inception.pth --assert "fid<5"

        vgm evaluate RUN --protocol adm --reference VIRTUAL_imagenet256_labeled.npz --features inception.pth --nproc 8

    Also: vgm evaluate diff A.json B.json (may two numbers be compared?), vgm evaluate stats DATA -o REF.safetensors
    """
    from vgm_cli.engine.processes import relaunched

    if relaunched(nproc):
        return
    from vgm_cli import atomic
    from vgm_cli.engine import processes
    from vgm_cli.engine.evaluate.run import check_assertion, finite, parse_assertion, refuse_non_finite
    from vgm_cli.engine.evaluate.setup import evaluate_target
    from vgm_cli.engine.evaluate.targets import Options, is_model
    from vgm_cli.engine.run_files import newest
    from vgm_cli.errors import INTERRUPTED, USAGE, VgmError
    from vgm_cli.metrics.statistics import check_target
    from vgm_cli.recipe import allow_typed

    words = list(overrides or [])
    if target is not None and "=" in target and not Path(target).exists():
        words.insert(0, target)
        target = None
    if target is None and newest("last") is None:
        hint = "name a run, a file or a folder of images; vgm train dit makes a run"
        raise VgmError("nothing to measure is named, and there is no run below ./runs", hint, USAGE)
    target = target or "last"
    allow_typed([sampler, *words])
    processes.join()
    if out is not None:
        processes.on_main(lambda: atomic.refuse_existing(out, overwrite and not out.is_dir()))
    if save_stats is not None:
        processes.on_main(lambda: check_target(save_stats, overwrite))
    for expression in check or []:
        parse_assertion(expression)  # a typo is told before the work
    options = Options(
        reference=reference,
        metrics=[m.strip() for m in metrics.split(",") if m.strip()],
        features=features,
        protocol=protocol,
        n=n,
        split=split,
        held_out=held_out,
        sampler=sampler,
        steps=steps,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        seed=seed,
        weights=weights,
        batch_size=batch_size,
        precision=precision,
        overrides=words,
        save_stats=save_stats,
        assertions=check or [],
        device=device,
        named=given(ctx) | ({"overrides"} if words else frozenset()),
    )
    if overwrite and out is None and save_stats is None:
        ui.warn("--overwrite has no effect: nothing is written without --out or --save-stats")
    try:
        results = evaluate_target(target, options)
    except KeyboardInterrupt as e:
        hint = f"vgm sample {target} --out FOLDER keeps what it makes and goes on; vgm evaluate FOLDER measures it"
        text = "interrupted: no number is made, and nothing is written"
        raise VgmError(text, hint if is_model(target) else "the same command begins anew", INTERRUPTED) from e
    ui.document(results)
    for r in filter(finite, results):
        against = f", reference {r['n_reference']}" if r["n_reference"] else ""
        number = with_error(r["value"], r.get("uncertainty"))
        ui.data(f"{r['metric']}: {number}  (n={r['n']}{against}, {r['protocol']['features']})")
    if out is not None and ui.main:
        atomic.write_json(out, results)
    refuse_non_finite(results)
    for expression in check or []:
        check_assertion(expression, results)
        ui.data(f"holds: {expression}")


def diff(
    a: Annotated[Path, typer.Argument(help="Results of `vgm evaluate --out`.")],
    b: Annotated[Path, typer.Argument(help="Others.")],
) -> None:
    """Say whether the numbers of two results may be compared, and why not. Exit code 3 if some may not.

    Example:

        vgm evaluate diff before.json after.json
    """
    from vgm_cli.engine.evaluate.compare import compare, read_results
    from vgm_cli.errors import CHECK_FAILED, USAGE, VgmError

    found = compare(read_results(a), read_results(b))
    if not found:
        raise VgmError(f"{a} and {b} have no metric in common", code=USAGE)
    ui.document(found)
    for c in found:
        first, second = c["values"]
        verdict = "comparable" if c["comparable"] else "NOT comparable"
        sigmas = f", {c['sigmas']:.1f} standard deviations apart" if "sigmas" in c else ""
        ui.data(f"{c['metric']}: {first:.4g} and {second:.4g} are {verdict}{sigmas}")
        for line in c["reasons"]:
            ui.data(f"  because {line}")
        for line in c["notes"]:
            ui.data(f"  note: {line}")
    bad = [c["metric"] for c in found if not c["comparable"]]
    if bad:
        raise VgmError(f"{', '.join(bad)} may not be compared", "measure both by one protocol", CHECK_FAILED)


def stats(
    ctx: typer.Context,
    data: Annotated[str, typer.Argument(help="A data set, or statistics in another format.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .safetensors to write.")],
    features: Features = None,
    protocol: ProtocolName = "vgm",
    size: Annotated[int | None, typer.Option(help="Pixels per side of the samples to come. Default: as found.")] = None,
    split: Annotated[str | None, typer.Option(help="train, val or test, where the set has them.")] = None,
    batch_size: BatchSize = 100,
    keep_features: Annotated[
        bool, typer.Option("--keep-features", help="Also every image's features, for KID, precision and recall.")
    ] = False,
    nproc: NProc = 1,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Write a reference's feature statistics, to be given to --reference instead of the images.

    Example:

        vgm evaluate stats FOLDER -o ref.safetensors --features inception.pth
    """
    from vgm_cli.engine.processes import relaunched

    if relaunched(nproc):
        return
    from vgm_cli.engine.evaluate.setup import evaluate_statistics

    found = evaluate_statistics(
        data,
        out,
        features=features,
        size=size,
        split=split,
        protocol=protocol,
        batch_size=batch_size,
        keep_features=keep_features,
        device=device,
        overwrite=overwrite,
        named=given(ctx) - {"data"},
    )
    ui.document(found)
    n = "an unknown number of images" if found["n"] is None else counted(found["n"], "image")
    ui.data(f"{out}: {n}, {found['dim']} features of {found.get('features') or 'an unknown network'}")
