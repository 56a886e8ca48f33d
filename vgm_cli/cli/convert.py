"""vgm convert."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from vgm_cli.cli import complete
from vgm_cli.ui import human, ui


def register(app: typer.Typer) -> None:
    app.command("convert")(convert)


def convert(
    src: Annotated[
        str,
        typer.Argument(
            help="A published checkpoint (.safetensors, .pt, .ckpt, .bin, .pkl, .npz, .msgpack, shards, a diffusers "
            "folder), a file of ours, or a run.",
            autocompletion=complete.runs,
        ),
    ],
    dst: Annotated[
        Path, typer.Argument(help="x.safetensors: ours. x.pt: the official layout. A folder: diffusers, with --to.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]…",
            help="What the file does not tell: num_heads=6 schedule=cosine codec=FILE base=FILE; of a codec "
            "stats=FILE: mean and deviation of its latents; transfer=FILE moves a network from base=FILE.",
        ),
    ] = None,
    from_: Annotated[
        str | None,
        typer.Option("--from", help="Layout of SRC, where it does not tell.", autocompletion=complete.layouts),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(help="Layout of DST; vgm is ours. `vgm ls converters`.", autocompletion=complete.layouts),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="ema, model, or an entry by name. Default: the average where there is one.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32 | bf16 | fp16. Default: as it is.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Prove it: round trip bit for bit, forward pass on both sides.")
    ] = False,
    codec: Annotated[
        str | None,
        typer.Option(help="Converted codec that decodes this network's samples.", autocompletion=complete.runs),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A published file whose tensors are taken where SRC has none."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Larger .safetensors are split.")] = "5GB",
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Open SRC even if it runs code. Only for files you trust.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    force: Annotated[bool, typer.Option("--force", hidden=True)] = False,
) -> None:
    """Convert weights between published layouts, ours and diffusers'.

    Our files say what they hold: they can be sampled from, distilled and finetuned as they are.

    Examples:

        vgm convert DiT-XL-2-256x256.pt dit-xl.safetensors --verify

        vgm convert dit-xl.safetensors dit-xl/ --to dit-diffusers

        vgm convert runs/dit-mnist/20260101-120000 dit.pt          # the official layout, averaged weights

    Next: vgm sample DST
    """
    from vgm_cli.weights import convert as engine

    if trust_pickle:
        ui.warn(f"--trust-pickle lets {src} run any program on this machine")
    result = engine.convert(
        src,
        dst,
        from_=from_,
        to=to,
        weights=weights,
        dtype=dtype,
        verify=verify,
        trust=trust_pickle,
        max_shard_size=max_shard_size,
        codec=codec,
        on=on,
        overrides=overrides or [],
        overwrite=overwrite or force,
    )
    ui.document(result)
    for line in report(result):
        ui.data(line)
    for remark in result["remarks"]:
        ui.info(remark)
    if result["needs_base"]:
        ui.info("it steers another network: base=UNET.safetensors says which")
    if result["needs_codec"]:
        ui.info("its samples are latents: --codec VAE.safetensors makes images of them")
    if result["samplable"]:
        ui.info(f"next: vgm sample {shlex.quote(str(result['files'][0]))}")


def report(result: dict[str, Any]) -> list[str]:
    """What was read, what was written, what was proved."""
    component = result["component"]
    preset = " or ".join(result["presets"])
    what = f"{component.get('kind', 'model')} {component['name']}" + (f" ({preset})" if preset else "")
    lines = [
        f"{result['source']} -> {result['files'][0]}: {result['from']} -> {result['to']}",
        f"  network     {what}, {result['weights']} weights",
        f"  tensors     {result['tensors']:,}, {human(result['parameters'])} values",
    ]
    if len(result["files"]) > 1:
        lines.append(f"  files       {', '.join(Path(f).name for f in result['files'])}")
    if result["left_out"]:
        names = ", ".join(result["left_out"][:3]) + (", …" if len(result["left_out"]) > 3 else "")
        lines.append(f"  left out    {len(result['left_out'])} tensors of SRC: {names}")
    for check in result["verified"]:
        lines.append(f"  verified    {check['what']}: {check['outcome']}")
    return lines
