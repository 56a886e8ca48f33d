"""vgm evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vgm_cli.cli import complete
from vgm_cli.ui import Progress, ui


def register(app: typer.Typer) -> None:
    app.command("evaluate")(evaluate)


def evaluate(
    target: Annotated[
        str,
        typer.Argument(help="A run or checkpoint (sampled first), a folder of images or an ADM .npz.", autocompletion=complete.runs),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Keywords of the sampler, for a run.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Data or a statistics file. Default: the data a run was trained on.")
    ] = None,
    metrics: Annotated[str, typer.Option(help="fid, kid, precision-recall, density-coverage, class-accuracy, …")] = "fid",
    features: Annotated[
        str | None, typer.Option(help="Feature network: mnist, or Inception weights (.pth, .pt). Default: by the data.")
    ] = None,
    n: Annotated[int | None, typer.Option("-n", help="Samples. Default: 2000 for a run, all of a folder.", min=2)] = None,
    sampler: Annotated[str | None, typer.Option(help="Another sampler.", autocompletion=complete.samplers)] = None,
    steps: Annotated[int | None, typer.Option(help="Sampler steps.", min=1)] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is no guidance.")] = None,
    seed: Annotated[int, typer.Option(help="Of the samples and of resampling metrics.")] = 0,
    weights: Annotated[str | None, typer.Option(help="raw, or an average. Default: the first average.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Of sampling and feature passes.")] = 100,
    precision: Annotated[str, typer.Option(help="fp32 | bf16, of sampling.")] = "fp32",
    check: Annotated[list[str] | None, typer.Option("--assert", help='Exit code 3 unless it holds: "fid<5".')] = None,
    save_stats: Annotated[Path | None, typer.Option(help="Also write the reference's statistics here.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the results here (JSON).")] = None,
) -> None:
    """Measure samples against a reference. Every number carries its protocol.

    Examples:

        vgm evaluate RUN --metrics fid,precision-recall -n 5000

        vgm evaluate samples.npz --reference FOLDER --features inception.pth --assert "fid<5"
    """
    from vgm_cli.engine.evaluating import evaluate_target

    names = [m.strip() for m in metrics.split(",") if m.strip()]
    with Progress("evaluating", n or 0) as progress:
        results = evaluate_target(
            target,
            reference=reference,
            metrics=names,
            features=features,
            n=n,
            sampler=sampler,
            steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
            weights=weights,
            batch_size=batch_size,
            precision=precision,
            overrides=overrides or [],
            save_stats=save_stats,
            progress=progress,
        )
    ui.document(results)
    for r in results:
        spread = f" ± {r['uncertainty']:.3g}" if r.get("uncertainty") is not None else ""
        ui.data(f"{r['metric']}: {r['value']:.4g}{spread}  (n={r['n']}, reference {r['n_reference']}, {r['protocol']['features']})")
    if out is not None:
        from vgm_cli import atomic

        atomic.write_json(out, results)
    from vgm_cli.engine.evaluate import check_assertion

    for expression in check or []:
        check_assertion(expression, results)
        ui.data(f"holds: {expression}")
