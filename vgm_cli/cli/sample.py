"""vgm sample."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vgm_cli.cli import complete
from vgm_cli.ui import Progress, ui


def register(app: typer.Typer) -> None:
    app.command("sample")(sample)
    app.command("rerun")(rerun)


def sample(
    model: Annotated[
        str, typer.Argument(help="A run, a checkpoint folder or a .safetensors file.", autocompletion=complete.runs)
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Keywords of the sampler: eta=0.5 …")
    ] = None,
    n: Annotated[int, typer.Option("-n", help="How many images.", min=1)] = 64,
    label: Annotated[str, typer.Option(help="Classes, numbers or names: 3,7. Default: all in turn.")] = "",
    sampler: Annotated[
        str | None, typer.Option(help="Another sampler than the recipe's.", autocompletion=complete.samplers)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Sampler steps.", min=1)] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is no guidance.")] = None,
    guidance_interval: Annotated[
        str | None, typer.Option(metavar="LO,HI", help="Guide only where t (0 data, 1 noise) lies between.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Image i depends on (seed, i) alone.")] = 0,
    weights: Annotated[
        str | None, typer.Option(help="raw, or an average: ema-0.9999. Default: the first average.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Changes speed and memory, not the images.", min=1)] = 64,
    precision: Annotated[
        str, typer.Option(help="auto | fp32 | bf16. auto: as trained, where this machine can.")
    ] = "auto",
    images: Annotated[
        str | None,
        typer.Option("--input", help="Images to start from (data as for train), for samplers that take them."),
    ] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Also NAME-trace.png: x_t and the estimate of x_0, step by step.")
    ] = False,
    nproc: Annotated[int, typer.Option(help="Processes on this machine; the images do not depend on it.", min=1)] = 1,
    out: Annotated[
        Path | None, typer.Option(help="grid.png, a folder (one PNG each), or x.npz (ADM layout). Default: in the run.")
    ] = None,
) -> None:
    """Sample images from a trained model.

    Examples:

        vgm sample runs/dit-mnist/20260101-120000

        vgm sample RUN -n 1000 --label 3,7 --guidance-scale 2 --out samples.npz

        vgm sample RUN -n 50000 --out FOLDER --nproc 8     # interrupted? the same command goes on

    Next: vgm evaluate RUN, vgm rerun sample.png
    """
    from vgm_cli.engine.distributed import relaunched

    if relaunched(nproc):
        return
    from vgm_cli.engine import output, ranks
    from vgm_cli.engine.sampling import open_model, plan_for, warn_of_ignored

    ranks.join()
    loaded, device = open_model(model, weights)
    plan = plan_for(
        loaded,
        n=n,
        label=label,
        sampler=sampler,
        steps=steps,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        seed=seed,
        batch_size=batch_size,
        overrides=overrides or [],
        images=images,
        precision=precision,
    )
    target = out or output.default_target(loaded, model, plan)
    with Progress("sampling", n) as progress:
        result = output.write(loaded, plan, target, model, device, progress)
    warn_of_ignored(result, plan)
    if trace and ui.main:
        result["trace"] = str(output.write_trace(loaded, plan, target, device))
    ui.document(result)
    ui.data(str(target))
    if trace:
        ui.data(result.get("trace", ""))
    ui.info(
        f"{n} images in {result['seconds']:.1f} s "
        f"({result['images_per_second']:.1f} img/s, {result.get('nfe', '?')} NFE)"
    )
    if loaded.header.weights == "raw":
        ui.info("these are raw weights; averages usually look better")


def rerun(
    image: Annotated[Path, typer.Argument(help="A PNG of `vgm sample`: it remembers how it was made.")],
    out: Annotated[Path | None, typer.Option(help="Default: NAME-again.png beside it.")] = None,
) -> None:
    """Make the same image again. Exit code 3 if a pixel differs (other hardware, other versions).

    Examples:

        vgm rerun samples/000017.png

    Next: vgm sample RUN
    """
    from vgm_cli.engine.output import rerun as again
    from vgm_cli.engine.sampling import device_for
    from vgm_cli.errors import CHECK_FAILED, VgmError

    result = again(image, out, device_for())
    ui.document(result)
    ui.data(result["again"])
    if not result["identical"]:
        raise VgmError(f"not the same image: pixels differ by up to {result['largest_difference']}", code=CHECK_FAILED)
    ui.info("identical")
