"""Train every paper's handwritten-digit recipe, measure it, and write docs/results.md: `make results`.

    python docs/generate_results.py [--runs DIR] [--only dit,sit]

A run that is complete in DIR is measured, not trained again; a measurement kept beside it is not repeated. One process at
a time, so that the times mean something. About 80 minutes from nothing on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TARGET = Path(__file__).with_name("results.md")
N = 2000

# name, the command that makes the run ({dir}: where other runs lie), what is measured of it
RUNS: list[tuple[str, str, str]] = [
    ("dit", "train dit", "fid,class-accuracy"),
    ("sit", "train sit", "fid,class-accuracy"),
    ("adm-unet", "train adm-unet", "fid,class-accuracy"),
    ("rectified-flow", "train rectified-flow", "fid,class-accuracy,straightness"),
    ("vae", "train vae", "fid,bits-per-dim"),
    ("glow", "train glow", "fid,bits-per-dim"),
    ("vqgan", "train vqgan", "fid,psnr"),
    ("vqgan-prior", "train vqgan --recipe mnist-prior", "fid,class-accuracy"),
    ("llamagen", "train llamagen", "fid,class-accuracy"),
    ("stylegan", "train stylegan", "fid"),
    (
        "reflow",
        "distill rectified-flow --recipe mnist-reflow --teacher {dir}/rectified-flow",
        "fid,class-accuracy,straightness",
    ),
    ("rectified-flow-1", "distill rectified-flow --teacher {dir}/rectified-flow", "fid,class-accuracy"),
    ("dmd", "distill dmd --teacher {dir}/dit", "fid,class-accuracy"),
    ("consistency", "distill consistency --teacher {dir}/dit", "fid,class-accuracy"),
    ("flow-grpo", "finetune-rl flow-grpo --model {dir}/sit", "fid,class-accuracy"),
]
BITS = {"dit", "sit", "adm-unet", "rectified-flow", "llamagen", "vqgan-prior"}  # likelihood of 50 images: slow for ODEs


def vgm(*args: str) -> Any:
    """A command's JSON."""
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([sys.executable, "-m", "vgm_cli", *args, "--json"], capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"vgm {' '.join(args)}\n{done.stderr}")
    return done.stdout


def measure(name: str, command: str, metrics: str, runs: Path, n: int) -> dict[str, Any]:
    run, kept = runs / name, runs / f"{name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    if not (run / "checkpoints/last").exists():
        verb, *rest = command.format(dir=runs).split()
        vgm(verb, *rest, "--out", str(run), *(["--resume"] if run.exists() else []))
    state = json.loads((run / "checkpoints/last/state.json").read_text())
    results = json.loads(vgm("evaluate", str(run), "--metrics", metrics, "-n", str(n)))
    if name in BITS:
        results += json.loads(vgm("evaluate", str(run), "--metrics", "bits-per-dim", "-n", "50"))
    held = json.loads(vgm("inspect", str(run)))
    speed = 0.0
    if name != "vqgan":
        speed = json.loads(vgm("sample", str(run), "-n", "200", "--out", str(runs / f"{name}.npz")))[
            "images_per_second"
        ]
        vgm("sample", str(run), "-n", "50", "--out", str(runs / f"{name}.png"))
    row = {
        "command": f"vgm {command.format(dir='RUNS')}",
        "parameters": held["parameters"],
        "seconds": state["seconds"],
        "steps": state["step"],
        "images_per_second": speed,
        "metrics": {r["metric"]: [r["value"], r.get("uncertainty")] for r in results},
        "nfe": next((r["nfe"] for r in results if r.get("nfe")), None),
        "kinds": {r["metric"]: r["protocol"].get("kind") for r in results if "bits" in r["metric"]},
    }
    kept.write_text(json.dumps(row, indent=2))
    return row


def cell(row: dict[str, Any], metric: str, digits: int = 3) -> str:
    found = row["metrics"].get(metric)
    if not found or found[0] is None:
        return ""
    value, spread = found
    return f"{value:.{digits}g}" + (f" ± {spread:.1g}" if spread else "")


def document(rows: dict[str, dict[str, Any]], machine: str, n: int) -> str:
    head = "| run | parameters | training | NFE | images/s | FID | class accuracy | bits/dim |\n|---|---|---|---|---|---|---|---|"
    lines = []
    for name, row in rows.items():
        bits = cell(row, "bits-per-dim") or (
            cell(row, "bits-per-latent-dim") and cell(row, "bits-per-latent-dim") + " (latent)"
        )
        minutes = f"{row['seconds'] / 60:.1f} min, {row['steps']} steps"
        speed = f"{row['images_per_second']:.3g}" if row["images_per_second"] else ""
        cells = [name, f"{row['parameters']:,}", minutes, str(row["nfe"] or ""), speed, cell(row, "fid"),
                 cell(row, "class-accuracy"), bits]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    commands = "\n".join(f"{row['command']} --out RUNS/{name}" for name, row in rows.items())
    left = [name for name, *_ in RUNS if name not in rows]
    table = head + "\n" + "\n".join(lines) + (f"\n\nNot measured yet: {', '.join(left)}." if left else "")
    return TEMPLATE.format(machine=machine, n=n, table=table, commands=commands)


TEMPLATE = """# Results

Handwritten digits (the shipped 5,000 MNIST images, 28×28), each recipe as it is, on {machine}. Written by `make results`.

{table}

FID: {n} samples against the 5,000 images, features of the shipped digit network (mnist-features), so these numbers compare
only with each other; ± is a standard error. Class accuracy: share of conditional samples that the shipped digit classifier
recognises as their class (it sees about 99 % of held-out digits right). NFE: network evaluations for one image, guidance counted
twice. images/s: sampling, batch 64. bits/dim: one scale, 8-bit pixels with uniform dequantisation where densities are continuous;
exact for Glow, a bound for VAE, an ODE likelihood of 50 images for diffusion and flow models, of latents or codes where it
says so (not comparable with pixels). vqgan's FID is of reconstructions.

The commands, in this order:

```
{commands}
```

Measured with `vgm evaluate RUNS/NAME --metrics fid,class-accuracy -n {n}`; `vgm sample RUNS/NAME -n 50` shows them.
"""


def machine() -> str:
    facts = json.loads(vgm("env"))
    bf16 = ", bf16" if facts["bf16"] else ""
    return f"{facts['cores']} CPU cores ({facts['cpu']}{bf16}), torch {facts['packages']['torch']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("results"))
    parser.add_argument("--only", default="")
    parser.add_argument("-n", type=int, default=N, help="samples for FID and class accuracy")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    only = set(filter(None, args.only.split(",")))
    rows = {}
    for name, command, metrics in RUNS:
        if not only or name in only:
            print(name, flush=True)
            rows[name] = measure(name, command, metrics, args.runs, args.n)
    TARGET.write_text(document(rows, machine(), args.n), encoding="utf-8")


if __name__ == "__main__":
    main()
