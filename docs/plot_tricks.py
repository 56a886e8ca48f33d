"""LightningDiT's claim in small: python docs/plot_tricks.py FOLDER OUT.svg [--steps 2400] [--every 400] [-n 1000]

Trains DiT on the shipped digits, then the same with each trick of LightningDiT added to those before, in FOLDER;
measures FID at every checkpoint, and draws the curves. Runs and figures that are there already are kept. Every run has
the width, depth, batch and seed of the digit recipes, and is sampled with its own recipe's sampler and guidance.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from vgm_cli.atomic import write_json, write_text
from vgm_cli.engine.report.charts import svg

OFF = {"model.swiglu": "false", "model.rmsnorm": "false", "model.rope": "false", "objective.cosine_weight": "0",
       "objective.time_sampling": "uniform", "optimizer.betas": "[0.9,0.999]"}  # fmt: skip
TRICKS = (  # what is added, by the keys of OFF that go back to the recipe's own
    ("straight paths", ()),
    ("+ beta2 0.95", ("optimizer.betas",)),
    ("+ logit-normal", ("objective.time_sampling",)),
    ("+ direction loss", ("objective.cosine_weight",)),
    ("+ SwiGLU", ("model.swiglu",)),
    ("+ RMSNorm", ("model.rmsnorm",)),
    ("+ rotary positions", ("model.rope",)),
)
CODECS = (("+ 16 channels", ("objective.vf_weight=0",)), ("+ VA-VAE", ()))  # of a tokenizer of 16 channels


def vgm(*args: str) -> Any:
    done = subprocess.run([sys.executable, "-m", "vgm_cli", *args, "--json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"vgm {' '.join(args)}\n{done.stderr}")
    return json.loads(done.stdout) if args[0] == "evaluate" else None


def train(folder: Path, *args: str) -> None:
    """A run, whole: begun, continued or kept."""
    if (folder / "card.md").exists():  # written when a run is complete
        return
    print(folder.name, flush=True)
    started = (folder / "checkpoints/last/state.json").exists()
    vgm("train", *args, "--out", str(folder), "--resume" if started else "--overwrite")


def curve(folder: Path, n: int) -> list[tuple[int, float]]:
    """(step, FID of n samples) of every checkpoint of a run."""
    kept = folder / "fid.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    for checkpoint in sorted((folder / "checkpoints").glob("step-*")):
        step = str(int(checkpoint.name.removeprefix("step-")))
        if step != "0" and step not in found:
            results = vgm("evaluate", str(checkpoint), "--reference", "mnist5k", "--metrics", "fid", "-n", str(n))
            found[step] = next(r["value"] for r in results if r["metric"] == "fid")
            write_json(kept, found)
    return [(int(k), v) for k, v in sorted(found.items(), key=lambda item: int(item[0]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where runs lie")
    parser.add_argument("out", type=Path, help="the picture")
    parser.add_argument("--steps", type=int, default=2400, help="of every denoiser; tokenizers take half")
    parser.add_argument("--every", type=int, default=400, help="steps between figures")
    parser.add_argument("-n", type=int, default=1000, help="samples of a figure")
    args = parser.parse_args()
    shared = (f"train.steps={args.steps}", f"train.save_every={args.every}", "train.keep=1000", "train.preview_n=0")

    lines: dict[str, list[tuple[float, float]]] = {}
    train(args.folder / "dit", "dit", *shared)
    lines["DiT"] = [*curve(args.folder / "dit", args.n)]
    off = dict(OFF)
    for name, keys in TRICKS:
        off = {k: v for k, v in off.items() if k not in keys}
        run = args.folder / name.strip("+ ").replace(" ", "-")
        train(run, "lightningdit", *(f"{k}={v}" for k, v in off.items()), *shared)
        lines[name] = [*curve(run, args.n)]
    for name, words in CODECS:
        run = args.folder / name.strip("+ ").replace(" ", "-")
        tokenizer = run.with_name(f"{run.name}-tokenizer")
        steps = f"train.steps={max(args.steps // 2, 1)}"
        train(tokenizer, "lightningdit", "--recipe", "mnist-vavae", *words, steps, "train.preview_n=0")
        train(run, "lightningdit", "--codec", str(tokenizer), *shared)
        lines[name] = [*curve(run, args.n)]
    write_text(args.out, svg(lines, "step", log=True))


if __name__ == "__main__":
    main()
