"""vgm restore."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vgm_cli.cli import complete
from vgm_cli.ui import ui


def register(app: typer.Typer) -> None:
    app.command("restore")(restore)


def operators(incomplete: str) -> list[str]:
    return complete.names("operator", incomplete)


def methods(incomplete: str) -> list[str]:
    from vgm_cli.registry import registry

    found = registry().components.values()
    return sorted(
        c.name for c in found if c.kind == "sampler" and "restore" in c.verbs and c.name.startswith(incomplete)
    )


def restore(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]…",
            help="Keywords of the task (scale=4), the noise (sigma=0.05) and the method (zeta=1); task.KEY=… where two "
            "have it; conditions.NAME.KEY=… of what the network is told.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The prior: a run, a checkpoint folder or a file.", autocompletion=complete.runs),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="inpainting, … `vgm ls operators`. Default: super-resolution; inpainting with --mask.",
            autocompletion=operators,
        ),
    ] = None,
    mask: Annotated[
        str | None,
        typer.Option(
            help="What is kept: a file or folder of masks, bright there; lower, upper, left, right (that half is made "
            "anew), box, random. Without noise."
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option("--input", help="An image, a folder, an .npz, or a shipped set (mnist5k).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A folder. Default: restored/ in the run.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier restoration.")] = False,
    device: Annotated[str, typer.Option(help="auto | cpu | cuda | cuda:N | mps.")] = "auto",
    method: Annotated[
        str,
        typer.Option(
            help="dps, mcg, projection, ddrm, pigdm, diffpir, consistency-edit, supir; of models of tokens their own "
            "sampler.",
            autocompletion=methods,
        ),
    ] = "dps",
    degrade: Annotated[
        bool | None,
        typer.Option(
            "--degrade/--degraded",
            help="The input is whole and is degraded first, or it is degraded. Default: whole; of supir degraded, "
            "unless a --task is named.",
        ),
    ] = None,
    truth: Annotated[str | None, typer.Option(help="The whole images of a degraded input, to measure against.")] = None,
    noise: Annotated[
        str | None, typer.Option(help="none, gaussian, poisson. Default: gaussian; of a degraded input none.")
    ] = None,
    n: Annotated[
        int | None, typer.Option("-n", help="Images, spread over the input. Default: all, 16 of a shipped set.", min=1)
    ] = None,
    split: Annotated[str | None, typer.Option(help="train, val or test, where the input has them.")] = None,
    label: Annotated[
        str, typer.Option(help="Classes (3,7), or data for the input's own. Default: no class where the model can.")
    ] = "",
    prompt: Annotated[
        list[str] | None, typer.Option(help="A text, of a model that reads one; several are taken in turn.")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="A text to be guided away from.")] = None,
    hint: Annotated[
        list[str] | None, typer.Option(metavar="IMG|DIR", help="A picture to follow, of a model that takes one.")
    ] = None,
    upscale: Annotated[
        float | None, typer.Option(help="supir: sides of the result over those of the input. Default: 1.")
    ] = None,
    tile: Annotated[
        int | None, typer.Option(metavar="PIXELS", help="supir: work in tiles of this size, which takes less memory.")
    ] = None,
    tile_prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="supir: a text for each tile of one picture, one a line.")
    ] = None,
    colour_fix: Annotated[
        str | None,
        typer.Option("--color-fix", "--colour-fix", help="supir: wavelet, adain or none. Default: wavelet."),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="fp32 | bf16: activations, and of supir weights, in half the bytes.")
    ] = "fp32",
    offload: Annotated[bool, typer.Option("--offload", help="supir: encoders of texts stay on the CPU.")] = False,
    steps: Annotated[int | None, typer.Option(help="Steps of the method. Default: its own.", min=1)] = None,
    tries: Annotated[
        int, typer.Option(help="Walks per image; the one that fits the measurement best is kept.", min=1)
    ] = 1,
    blend: Annotated[
        float | None,
        typer.Option(
            metavar="RADIUS",
            help="With --mask: put what was made anew into the image itself, its border blurred by so many pixels.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Image i depends on (seed, i) alone.")] = 0,
    weights: Annotated[str | None, typer.Option(help="raw, or an average. Default: the first average.")] = None,
    batch_size: Annotated[int, typer.Option(help="Changes speed and memory, not the images.", min=1)] = 64,
    lpips: Annotated[
        str | None,
        typer.Option(
            metavar="VGG,HEADS",
            help="Also measure LPIPS with these two weight files. Default: VGM_LPIPS_VGG, VGM_LPIPS_HEADS.",
        ),
    ] = None,
) -> None:
    """Restore degraded images with a trained diffusion or flow model, or complete images with a model of tokens.

    Examples:

        vgm restore --model RUN --task super-resolution scale=4 --input mnist5k -n 64

        vgm restore --model RUN --task inpainting mask=box box=0.5 --method ddrm --input photo.png --out restored

        vgm restore --model RUN --task gaussian-deblurring std=1.5 --degraded --input blurred/ --noise none

        vgm restore --model RUN --method maskgit --mask lower --input mnist5k

        vgm restore --model RUN --method supir --input photos --prompt "a street" --upscale 2 --tile 1024

    Next: the folder's grid.png (degraded, restored, truth) and results.json.
    """
    from vgm_cli.engine.restore import records, setup
    from vgm_cli.engine.restore import run as engine
    from vgm_cli.engine.restore.figures import summary
    from vgm_cli.engine.sample.setup import adopt_conditions, device_for, open_model, precision_of
    from vgm_cli.errors import INTERRUPTED, USAGE, VgmError
    from vgm_cli.ranges import NonNegative, Steps, fit
    from vgm_cli.recipe import allow_typed
    from vgm_cli.yaml_text import parse_yaml

    if model is None:
        raise engine.no_model()
    if source is None:
        raise VgmError("no input is given", "--input IMAGE|FOLDER, or a shipped set: --input mnist5k", USAGE)
    follows = setup.is_blind(method)
    degrade = task is not None or mask is not None or not follows if degrade is None else degrade
    if truth is not None and degrade:
        raise VgmError("--truth belongs to --degraded: without it the input is the truth", code=USAGE)
    overrides = overrides or []
    if mask is not None:
        if task not in (None, "inpainting"):
            raise VgmError(f"--mask says which pixels are kept, it is not for {task}", "--task inpainting", USAGE)
        task, overrides = "inpainting", [f"task.mask={json.dumps(mask)}", *overrides]
    task = task or "super-resolution"
    told = {"upscale": upscale, "tile": tile, "colour_fix": colour_fix}
    conditions = [text for text in overrides if text.startswith("conditions.")]
    overrides = [text for text in overrides if text not in conditions]
    overrides = [*overrides, *(f"method.{key}={value}" for key, value in told.items() if value is not None)]
    allow_typed([task, method, *overrides])
    steps = fit(steps, Steps | None, "--steps")
    clean = not degrade or mask is not None or follows  # a blind method's tasks have their own noise
    settings = setup.settings_for(task, method, noise or ("none" if clean else "gaussian"), overrides)
    if out is not None:
        records.check_folder(out, overwrite)
    loaded, where = open_model(model, weights, "cpu" if follows else device)
    where = device_for(device) if follows else where
    adopt_conditions(loaded, {k: parse_yaml(v, k) for k, _, v in (text.partition("=") for text in conditions)}, ())
    if noise is None and mask is None and not follows:
        ui.info(setup.assumed(settings, degrade))
    try:
        results = engine.run(
            loaded,
            model,
            source,
            settings,
            degrade=degrade,
            truth=truth,
            n=n,
            split=split,
            label=label,
            prompts=prompt or [],
            hints=hint or [],
            negative=negative,
            tile_prompts=tile_prompts,
            precision=precision_of(loaded, precision),
            offload=offload,
            seed=seed,
            steps=steps,
            tries=tries,
            blend=fit(blend, NonNegative | None, "--blend"),
            batch_size=batch_size,
            lpips=lpips,
            out=out,
            overwrite=overwrite,
            device=where,
        )
    except KeyboardInterrupt as e:
        text = "interrupted: nothing is written, what was there is unchanged"
        raise VgmError(text, "a folder of results is made at its end; -n takes fewer images", INTERRUPTED) from e
    ui.document(results)
    if rows := summary(results):
        ui.table(["", "PSNR", "SSIM", "LPIPS", "residual"], rows)
    if "gain" in results:
        ui.info(f"{results['gain']:+.2f} dB PSNR over the baseline")
    count = f"{results['n']} image{'s' * (results['n'] > 1)}"
    ui.info(f"{count} in {results['seconds']:.1f} s ({results['nfe']} network evaluations each)")
    for text in results["notes"]:
        ui.info(text)
    ui.data(results["out"])
