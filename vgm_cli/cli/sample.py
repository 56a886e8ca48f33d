"""vgm sample."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vgm_cli.cli import complete
from vgm_cli.ui import Progress, ui


def register(app: typer.Typer) -> None:
    app.command("sample")(sample)
    app.command("rerun")(rerun)


def sample(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A run, a checkpoint folder or a .safetensors file; the newest run of a paper (dit), of a folder of "
            "runs, or of all (last). Default: last.",
            autocompletion=complete.runs,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Keywords of the sampler: eta=0.5 …")
    ] = None,
    n: Annotated[int | None, typer.Option("-n", help="How many images. Default: 64.", min=1)] = None,
    label: Annotated[str, typer.Option(help="Classes, numbers or names: 3,7. Default: all in turn.")] = "",
    prompt: Annotated[
        list[str] | None, typer.Option(help="A text, of a model that reads one; several are taken in turn.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts, one a line: image i is of line i, from the first again.")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="A text to be guided away from.")] = None,
    hint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="IMG|DIR",
            help="A picture to follow, of a model that takes one; a folder: all in turn; NAME=IMG: one of several.",
        ),
    ] = None,
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
        typer.Option("--image", "--input", metavar="IMG|DIR", help="Pictures to start from, where a sampler can."),
    ] = None,
    mask: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|HALF",
            help="What is kept of --image: a file or folder of masks, bright there; lower, upper, left, right: that "
            "half is made anew.",
        ),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="How far --image goes back to noise, 0 to 1. Default: 0.75.", min=0, max=1)
    ] = None,
    accept: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Rejection: 0.05 keeps the best of 20 candidates for every image."),
    ] = None,
    judge: Annotated[
        str, typer.Option(help="What --accept goes by: a reward, `vgm ls rewards`.", autocompletion=complete.rewards)
    ] = "confidence",
    trace: Annotated[
        bool, typer.Option("--trace", help="Also NAME-trace.png: x_t and the estimate of x_0, step by step.")
    ] = False,
    nproc: Annotated[int, typer.Option(help="Processes on this machine; the images do not depend on it.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="auto | cpu | cuda | cuda:N | mps.")] = "auto",
    out: Annotated[
        Path | None, typer.Option(help="grid.png, a folder (one PNG each), or x.npz (ADM layout). Default: in the run.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Sample images from a trained model.

    Examples:

        vgm sample                                          # the newest run

        vgm sample runs/dit-mnist/20260101-120000

        vgm sample RUN -n 1000 --label 3,7 --guidance-scale 2 --out samples.npz

        vgm sample RUN --prompt "a red circle" --prompt "a blue square" -n 8

        vgm sample RUN -n 8 --accept 0.05                   # the best of 20 each, by a classifier

        vgm sample RUN --hint lineart.png -n 4

        vgm sample RUN --prompt "a red circle" --image photo.png --strength 0.6    # img2img

        vgm sample RUN --prompt "a red circle" --image photo.png --mask keep.png   # inpainting

        vgm sample RUN -n 50000 --out FOLDER --nproc 8     # interrupted? the same command goes on

    Next: vgm evaluate RUN, vgm rerun sample.png
    """
    from vgm_cli.engine.processes import relaunched

    if relaunched(nproc):
        return
    from vgm_cli.conditioning import lines_of
    from vgm_cli.engine import processes
    from vgm_cli.engine.run_files import newest
    from vgm_cli.engine.sample import loop as generate
    from vgm_cli.engine.sample import output
    from vgm_cli.engine.sample import trace as tracing
    from vgm_cli.engine.sample.setup import named, open_model, plan_for, warn_of_ignored
    from vgm_cli.errors import INTERRUPTED, USAGE, VgmError
    from vgm_cli.images import save_png
    from vgm_cli.recipe import allow_typed

    words = list(overrides or [])
    if model is not None and "=" in model and not Path(model).exists():
        words.insert(0, model)
        model = None
    if model is None and newest("last") is None:
        text = "no model is named, and there is no run below ./runs"
        raise VgmError(text, "name a run or a file; vgm train dit makes one", USAGE)
    model = model or "last"
    processes.join()
    allow_typed([sampler, judge, *words])
    loaded, where = open_model(model, weights, device)
    asked = [*(prompt or []), *(lines_of(prompts, "--prompts") if prompts is not None else [])]
    if n is None and len(asked) > 64:
        ui.info(f"of {len(asked)} prompts the first 64 are drawn: -n {len(asked)} draws all")
    plan = plan_for(
        loaded,
        n=n or 64,
        label=label,
        prompts=asked,
        negative=negative,
        hints=hint or [],
        sampler=sampler,
        steps=steps,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        seed=seed,
        batch_size=batch_size,
        overrides=words,
        images=images,
        mask=mask,
        strength=strength,
        precision=precision,
        accept=accept,
        judge=judge,
    )
    target = out or processes.from_main(output.default_target(loaded, plan, where))
    plan = output.fitted(plan, target, where, n is not None)
    meta = generate.provenance(loaded, plan, named(loaded, model), where)
    output.check_target(target, meta, plan, overwrite, trace)
    try:
        strips = tracing.trace(loaded, plan, where) if trace and ui.main else None
        with Progress("sampling", plan.n, every=10) as progress:
            result = output.write(loaded, plan, target, meta, where, progress, overwrite)
    except KeyboardInterrupt as e:
        raise VgmError(f"interrupted: {(kept := output.kept(target, plan))[0]}", kept[1], INTERRUPTED) from e
    warn_of_ignored(result, plan)
    if strips is not None:
        save_png(strips, tracing.trace_of(target), {"vgm.trace": meta["vgm"]})
        result["trace"] = str(tracing.trace_of(target))
    ui.document(result)
    ui.data(str(target))
    if trace:
        ui.data(result.get("trace", ""))
    ui.info(summary(result))
    if "accepted" in result:
        ui.info(rejection(result["accepted"], judge))
    if loaded.header.weights == "raw":
        ui.info("these are raw weights; averages usually look better")


def summary(result: dict[str, Any]) -> str:
    """One line on a finished job: number of images, seconds, images per second, network evaluations."""
    n, made = result["n"], result["made"]
    if not made:
        return "the image was there" if n == 1 else f"all {n} images were there"
    nfe = f", {result['nfe']} NFE" if "nfe" in result else ""
    rest = f"; {n - made} were there" if made < n else ""
    speed = f"{result['images_per_second']:.3g} img/s"
    return f"{made} image{'s' * (made > 1)} in {result['seconds']:.1f} s ({speed}{nfe}){rest}"


def rejection(found: dict[str, Any], judge: str) -> str:
    """One line on what was kept of the candidates."""
    share = f"accepted {found['images']:.0f} of {found['of']:.0f} candidates ({found['images'] / found['of']:.1%})"
    return f"{share}: {judge} {found['kept']:.3g} on average, {found['all']:.3g} of all"


def rerun(
    image: Annotated[Path, typer.Argument(help="A PNG of `vgm sample`: it remembers how it was made.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Default: FOLDER-again/ for one of a folder of samples, else NAME-again.png here."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto | cpu | cuda | cuda:N | mps.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Make the same image again. Exit code 3 if a pixel differs (other hardware, other versions).

    Examples:

        vgm rerun samples/000017.png

    Next: vgm sample RUN
    """
    from vgm_cli.engine.sample.again import rerun as again
    from vgm_cli.errors import CHECK_FAILED, INTERRUPTED, VgmError

    try:
        result = again(image, out, device, overwrite)
    except KeyboardInterrupt as e:
        raise VgmError("interrupted: nothing is written", code=INTERRUPTED) from e
    ui.document(result)
    ui.data(result["again"])
    if not result["identical"]:
        most = result["largest_difference"]
        how = "it has another size" if most is None else f"pixels differ by up to {most}"
        raise VgmError(f"not the same image: {how}", code=CHECK_FAILED)
    ui.info("identical; both are there")
