"""vgm data: look at a set, pack it into one file, encode it once for a frozen codec. Torch-free until used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vgm_cli import atomic
from vgm_cli.cli import complete
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.ui import Progress, counted, some, ui

SHOWN = 12  # classes and skipped files listed before "and N more"

Where = Annotated[
    str, typer.Argument(help="A folder, .zip, .tar, .npz, latents, or a shipped set: mnist5k, openmoji, shapes.")
]
Size = Annotated[int | None, typer.Option(help="Pixels per side. Default: as found.", min=1)]
Channels = Annotated[int | None, typer.Option(help="1 or 3. Default: as found.")]
Crop = Annotated[str, typer.Option(help="adm | center | resize | none")]
Split = Annotated[str | None, typer.Option(help="train, val or test, where the set has them.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")]
Columns = Annotated[
    list[str] | None, typer.Option("--column", help="Pictures beside the images, by name; several times for several.")
]
LabelKey = Annotated[str | None, typer.Option(help="Column, array or JSON key that holds the labels.")]


def register(app: typer.Typer) -> None:
    group = typer.Typer(invoke_without_command=True, help="Look at data, pack it, encode it for a codec.")
    group.callback()(help_alone)
    for name, command in (("info", info), ("pack", pack), ("encode", encode), ("grid", grid)):
        group.command(name)(command)
    app.add_typer(group, name="data")


def help_alone(context: typer.Context) -> None:
    """`vgm data` says what there is."""
    if context.invoked_subcommand is None:
        ui.data(context.get_help())


def opened(path: str, **how: Any) -> Any:
    """A set; `how` as in `open_dataset`."""
    from vgm_cli.data import open_dataset

    return open_dataset(path, **how)


# -- info ------------------------------------------------------------------------------------------------------------


def info(
    path: Where,
    size: Size = None,
    channels: Channels = None,
    crop: Crop = "adm",
    split: Split = None,
    label_key: LabelKey = None,
    distances: Annotated[
        bool, typer.Option("--distances", help="Also how far images are apart in [0, 1]: sigma_max of VE networks.")
    ] = False,
) -> None:
    """Say what training would see: images, sizes, classes, captions, and what is left out.

    Examples:

        vgm data info photos/

        vgm data info mnist5k --json

    Next: vgm train dit data.path=PATH
    """
    dataset = opened(path, size=size, channels=channels, crop=crop, split=split, label_key=label_key, quiet=True)
    facts = described(dataset)
    if distances:
        facts["distances"] = apart(dataset)
    ui.document(facts)
    ui.data(f"{facts['root']}: {headline(facts)}")
    if facts["classes"]:
        counts = [f"{k} ({n})" for k, n in facts["classes"].items()]
        ui.data(f"  classes      {len(counts)}: {some(counts, SHOWN)}")
    else:
        ui.data(f"  classes      none{': ' + facts['unlabelled'] if facts['unlabelled'] else ''}")
    ui.data(f"  captions     {'such as ' + repr(facts['caption']) if facts['captions'] else 'none'}")
    if facts["columns"]:
        ui.data(f"  columns      {', '.join(facts['columns'])}: pictures beside the images, for conditions")
    if facts["skipped"]:
        ui.data(f"  left out     {len(facts['skipped'])} unreadable: {some(facts['skipped'], SHOWN)}")
    if facts["others"]:
        shown = some([f"{suffix} ({n:,})" for suffix, n in facts["others"].items()], SHOWN)
        ui.data(f"  not used     {counted(sum(facts['others'].values()), 'file')}, no pictures: {shown}")
    for key in ("codec", "mirrored", "mean", "std"):
        if key in facts:
            ui.data(f"  {key:<12} {facts[key]}")
    if distances:
        far = facts["distances"]
        ui.data(f"  distances    {far['median']:.4g} (median), {far['largest']:.4g} (largest) in {far['n']} images")
    ui.data(f"  fingerprint  {facts['fingerprint']}")
    for remark in facts["remarks"]:
        ui.warn(remark)


def described(dataset: Any) -> dict[str, Any]:
    """What `vgm data info --json` prints."""
    import numpy as np

    from vgm_cli.data import Dataset

    f = dataset.facts
    counts = np.bincount(f.labels, minlength=f.num_classes).tolist() if f.labels is not None else []
    facts = {
        "root": f.root,
        "kind": f.kind,
        "count": f.count,
        "size": f.size,
        "channels": f.channels,
        "num_classes": f.num_classes,
        "classes": dict(zip(f.class_names, counts)),
        "unlabelled": "",
        "captions": f.captions,
        "caption": None,
        "columns": dataset.source.columns if isinstance(dataset, Dataset) else sorted(f.columns),
        "class_names": f.class_names,
        "skipped": f.skipped,
        "others": f.others,
        "remarks": f.remarks,
        "crop": dataset.crop,
        "fingerprint": dataset.fingerprint(),
    }
    if isinstance(dataset, Dataset):
        facts["unlabelled"] = "" if f.num_classes else dataset.source.no_labels
        if f.captions:
            facts["caption"] = next((t for i in range(min(f.count, 100)) if (t := dataset.item(i)[2])), None)
        return facts
    facts |= {"latent_shape": list(dataset.shape), "mirrored": dataset.mirrored, "codec": dataset.codec or "unknown"}
    if f.captions:
        facts["caption"] = next((t for t in dataset.captions if t), None)
    if dataset.statistics is not None:
        mean, std = dataset.statistics
        facts |= {"mean": [round(v, 4) for v in mean.tolist()], "std": [round(v, 4) for v in std.tolist()]}
    return facts


FAR = 1000  # images whose distances are measured


def apart(dataset: Any) -> dict[str, float]:
    """Euclidean distances between pairs of images in [0, 1], of images spread evenly over the set. VgmError: latents,
    or fewer than two images."""
    import torch

    from vgm_cli.errors import USAGE, VgmError

    count = len(dataset)
    if not hasattr(dataset, "source") or count < 2:
        raise VgmError("distances are those of at least two images", "a set of images", USAGE)
    n = min(count, FAR)
    x = torch.stack([dataset.pixels([i * count // n])[0].flatten() for i in range(n)]).add(1).div(2)
    found = torch.pdist(x)
    return {"n": n, "median": float(found.median()), "largest": float(found.max())}


def headline(facts: dict[str, Any]) -> str:
    if "latent_shape" in facts:
        return f"{counted(facts['count'], 'latent')} of {'×'.join(map(str, facts['latent_shape']))} ({facts['kind']})"
    shape = f"{facts['size']}×{facts['size']}×{facts['channels']}"
    return f"{counted(facts['count'], 'image')} of {shape} ({facts['kind']}, crop {facts['crop']})"


# -- pack ------------------------------------------------------------------------------------------------------------


def pack(
    source: Where,
    target: Annotated[Path, typer.Argument(metavar="DST.zip|.npz|.tar", help="The file to write.")],
    size: Size = None,
    channels: Channels = None,
    crop: Crop = "adm",
    split: Split = None,
    label_key: LabelKey = None,
    columns: Columns = None,
    overwrite: Overwrite = False,
) -> None:
    """Crop a set once and store it as one file: EDM's .zip, ADM's .npz or a webdataset .tar.

    Examples:

        vgm data pack photos/ photos-64.zip --size 64

        vgm data pack imagenet/train imagenet-256.zip --size 256 --crop adm

    Next: vgm train dit data.path=photos-64.zip
    """
    from vgm_cli.data import tell_skipped
    from vgm_cli.data.pack import check_target, refuse_itself
    from vgm_cli.data.pack import pack as write

    refuse_itself(target, source)
    check_target(target, overwrite)
    if crop == "random":
        raise VgmError("random crops differ each time: a packed set has one", "--crop adm", USAGE)
    how: dict[str, Any] = {"size": size, "channels": channels, "crop": crop, "split": split, "label_key": label_key}
    dataset = opened(source, **how, columns=columns or ())
    f = dataset.facts
    known = len(f.skipped)
    with Progress("packing", f.count) as progress:
        n = write(dataset, target, progress.update)
    ui.document(
        {
            "out": str(target),
            "count": n,
            "size": f.size,
            "channels": f.channels,
            "skipped": f.skipped,
            "bytes": target.stat().st_size,
        }
    )
    ui.data(str(target))
    ui.info(f"{counted(n, 'image')} of {f.size}×{f.size}×{f.channels}, {target.stat().st_size / 1e6:.1f} MB")
    tell_skipped(dataset, known)


# -- encode ----------------------------------------------------------------------------------------------------------


def encode(
    path: Where,
    codec: Annotated[
        str,
        typer.Option(help="A codec's run or file, or a run that trains on its latents.", autocompletion=complete.runs),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the latent cache; what is there already is kept.")],
    tokens: Annotated[bool, typer.Option("--tokens", help="The ids of its codes, for token models.")] = False,
    hflip: Annotated[bool, typer.Option("--hflip", help="Mirrored images too, for data.hflip=true.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32 | float16 | bfloat16. Default: as the codec gives.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images encoded at once.", min=1)] = 64,
    size: Size = None,
    channels: Channels = None,
    crop: Crop = "adm",
    split: Split = None,
    label_key: LabelKey = None,
    columns: Columns = None,
    decode: Annotated[str, typer.Option(help="exact | fast, as data.decode of the training.")] = "exact",
    nproc: Annotated[int, typer.Option(help="Processes on this machine, which share the shards.", min=1)] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Build a cache that is there again.")] = False,
) -> None:
    """Encode every image once for a frozen codec, into a folder that training reads (data.cache_latents=FOLDER).

    A job that was cut off goes on where it stopped. A cache is refused where codec, images or dtype differ.

    Examples:

        vgm data encode imagenet/train --codec kl-f8.safetensors --size 256 --hflip --nproc 8 --out cache/

        vgm data encode mnist5k --codec mnist-codec --out cache/

        vgm data encode photos/ --codec VQGAN_RUN --tokens --out cache/

        vgm data encode photos/ --codec KL_RUN --column lineart --out cache/   # image: the pictures themselves

    Next: vgm train dit data.path=PATH data.cache_latents=cache/
    """
    from vgm_cli.data import Dataset, tell_skipped
    from vgm_cli.data.latent_cache import DTYPES
    from vgm_cli.engine import processes
    from vgm_cli.engine.encode import encode as shared
    from vgm_cli.engine.sample.setup import device_for

    for name, value, known_values in (("dtype", dtype, DTYPES), ("decode", decode, ("exact", "fast"))):
        if value is not None and value not in known_values:
            raise unknown(name, value, known_values)
    if processes.relaunched(nproc):
        return
    processes.join()
    device = device_for()
    network, digest = open_codec(codec, device, tokens)
    beside = [c for c in columns or () if c != "image"]
    read: dict[str, Any] = {"size": size, "channels": channels, "crop": crop, "split": split, "label_key": label_key}
    dataset = opened(path, **read, columns=beside, decode=decode)
    if not isinstance(dataset, Dataset):
        raise VgmError(f"{path} holds latents already", "name the images", USAGE)
    known = len(dataset.facts.skipped)
    how: dict[str, Any] = {"hflip": hflip, "dtype": dtype, "keeps_images": "image" in (columns or ())}
    latents = shared(dataset, network, out, digest, device=device, batch=batch_size, overwrite=overwrite, **how)
    facts = described(latents)
    ui.document({"out": str(out), **facts})
    ui.data(str(out))
    ui.info(headline(facts) + (", mirrored too" if latents.mirrored else ""))
    tell_skipped(dataset, known)


def open_codec(target: str, device: Any, tokens: bool = False) -> tuple[Any, str]:
    """(frozen codec, key of its caches) from a codec's run or file, or from a run behind one, which names its own.

    tokens: the codec as token models see it; a run on tokens says so itself.
    """
    from vgm_cli.engine import checkpoint as ckpt
    from vgm_cli.registry import registry

    path = ckpt.resolve(target)
    header = ckpt.read_header(path)
    if "codec" in header.parts:
        return ckpt.load_codec(header, path, device), header.parts["codec"].cache_key
    if ("codec", header.component["name"]) not in registry().components:
        raise VgmError(
            f"{target} is not a codec but {header.component['name']}", "`vgm ls codecs` names the codecs", USAGE
        )
    reference = ckpt.refer_codec(path, output="tokens" if tokens else None)
    return ckpt.read_codec(path, device, reference.output), reference.cache_key


# -- grid ------------------------------------------------------------------------------------------------------------


def grid(
    path: Where,
    out: Annotated[Path, typer.Option(help="The picture: x.png.")],
    n: Annotated[int, typer.Option("-n", help="How many images.", min=1)] = 64,
    label: Annotated[str, typer.Option(help="Only these classes, numbers or names: 3,7.")] = "",
    seed: Annotated[int, typer.Option(help="Which images are drawn.")] = 0,
    codec: Annotated[
        str | None, typer.Option(help="Decodes latents: a run or file.", autocompletion=complete.runs)
    ] = None,
    size: Size = None,
    channels: Channels = None,
    crop: Crop = "adm",
    split: Split = None,
    label_key: LabelKey = None,
    overwrite: Overwrite = False,
) -> None:
    """Put some images of a set on one picture, cropped as training sees them; of latents, decoded.

    Examples:

        vgm data grid photos/ --out photos.png

        vgm data grid mnist5k --label 3,7 -n 100 --out digits.png

        vgm data grid cache/ --codec mnist-codec --out decoded.png

    Next: vgm train dit data.path=PATH
    """
    from vgm_cli.images import save_grid

    if out.suffix.lower() != ".png":
        raise VgmError(f"--out {out} is not a .png", "example: --out images.png", USAGE)
    atomic.refuse_existing(out, overwrite)
    dataset = opened(path, size=size, channels=channels, crop=crop, split=split, label_key=label_key)
    chosen = choose(dataset, n, label, seed)
    save_grid(pictures(dataset, chosen, codec), out, metadata={"vgm.data": dataset.facts.root})
    f = dataset.facts
    rows = [{"index": i, "label": None if f.labels is None else f.class_names[f.labels[i]]} for i in chosen]
    ui.document({"out": str(out), "count": len(chosen), "images": rows})
    ui.data(str(out))


def choose(dataset: Any, n: int, label: str, seed: int) -> list[int]:
    """n items (or all there are), drawn by `seed`."""
    import numpy as np

    f = dataset.facts
    rows = np.arange(f.count)
    if label:
        if f.labels is None:
            raise VgmError(f"{f.root} has no labels", "leave --label out", USAGE)
        rows = rows[
            np.isin(f.labels, [class_of(word.strip(), f.class_names) for word in label.split(",") if word.strip()])
        ]
    return np.random.default_rng(seed).permutation(rows)[:n].tolist()


def class_of(word: str, names: list[str]) -> int:
    if word in names:
        return names.index(word)
    if word.isdigit() and int(word) < len(names):
        return int(word)
    raise unknown("class", word, names)


def pictures(dataset: Any, chosen: list[int], codec: str | None) -> Any:
    """float32 (B, C, H, W) in [-1, 1]; latents go through their codec."""
    from vgm_cli.data import Dataset

    if isinstance(dataset, Dataset):
        return dataset.pixels(chosen)
    if codec is None:
        raise VgmError(f"{dataset.facts.root} holds latents", "--codec RUN|FILE decodes them", USAGE)
    import torch

    from vgm_cli.data.latents import to_model

    network, digest = open_codec(codec, "cpu", dataset.codec.endswith(":tokens"))
    dataset.refuse_other(digest)
    with torch.no_grad():
        return network.decode(to_model(network, dataset.gather(chosen)["moments"], drawn=dataset.drawn))
