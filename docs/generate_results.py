"""Train every paper's handwritten-digit recipe, measure it, and write docs/results.md: `make results`.

    python docs/generate_results.py [--runs DIR] [--only dit,sit] [--jobs 2]

A run that is complete in DIR is measured, not trained again; a measurement kept beside it is not repeated. As many runs
at a time as there are jobs, each on its share of the cores: small networks gain little from a second core, so that two
runs side by side are ready sooner than one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from vgm_cli.atomic import dump_json

TARGET = Path(__file__).with_name("results.md")
QUALITY = "fid,class-accuracy"
VAE_BITS = "bits-per-dim:n=256:samples=1,bits-per-dim:n=256:samples=100"


@dataclass
class Run:
    """command makes the run ({dir}: where other runs lie, of which it needs `after`); metrics are of 2,000 samples,
    bits a likelihood of images that the run left out, where it left any; restore are tasks for the run as a prior."""

    name: str
    command: str
    metrics: str = QUALITY
    after: str = ""
    bits: str = ""
    sampled: bool = True
    restore: tuple[str, ...] = ()


RUNS = [  # the longest first, those that others wait for before all
    Run("sit", "train sit", bits="bits-per-dim:n=50"),
    Run("rectified-flow", "train rectified-flow", f"{QUALITY},straightness", bits="bits-per-dim:n=50"),
    Run("dmd", "distill dmd --teacher {dir}/sit", after="sit"),
    Run("add", "distill add --teacher {dir}/sit", after="sit"),
    Run("add-without-adversary", "distill add --recipe mnist-distillation-only --teacher {dir}/sit", after="sit"),
    Run("consistency-distilled", "distill consistency --teacher {dir}/sit", after="sit"),
    Run("consistency", "train consistency"),
    Run("meanflow", "train meanflow"),
    Run("meanflow-finetune", "distill meanflow --recipe mnist-finetune --teacher {dir}/sit", after="sit"),
    Run("scm-distilled", "distill scm --recipe mnist-scd --teacher {dir}/sit", after="sit"),
    Run("scm-from-data", "distill scm --recipe mnist-sct --teacher {dir}/sit", after="sit"),
    Run("scm", "train scm"),
    Run("dit", "train dit", bits="bits-per-dim:n=50"),
    Run("lightningdit", "train lightningdit", bits="bits-per-dim:n=50"),
    Run("vavae", "train lightningdit --recipe mnist-vavae", "fid,psnr", sampled=False),
    Run("lightningdit-vavae", "train lightningdit --codec {dir}/vavae", after="vavae"),
    Run("plain-codec", "train lightningdit --recipe mnist-vavae objective.vf_weight=0", "fid,psnr", sampled=False),
    Run("lightningdit-plain-codec", "train lightningdit --codec {dir}/plain-codec", after="plain-codec"),
    Run("stylegan", "train stylegan"),
    Run("vdmpp", "train vdmpp", bits="bits-per-dim:n=50,bits-per-dim:n=50:method=elbo"),
    Run("vdm", "train vdmpp --recipe mnist-vdm", "fid", bits="bits-per-dim:n=500:method=elbo"),
    Run("score-sde", "train score-sde", "fid", bits="bits-per-dim:n=50",
        restore=("inpainting mask=lower --method score-sde-restore --noise none steps=200",)),
    Run("score-sde-subvp", "train score-sde --recipe mnist-subvp", "fid", bits="bits-per-dim:n=50"),
    Run("score-sde-ve", "train score-sde --recipe mnist-ve", "fid", bits="bits-per-dim:n=50"),
    Run("glow", "train glow", bits="bits-per-dim:n=256"),
    Run("starflow", "train starflow", bits="bits-per-dim:n=256"),
    Run("starflow-pixels", "train starflow --recipe mnist-pixels", bits="bits-per-dim:n=500"),
    Run("flow-grpo", "finetune-rl flow-grpo --model {dir}/rectified-flow", after="rectified-flow"),
    Run("rectified-flow-2", "distill rectified-flow --recipe mnist-reflow --teacher {dir}/rectified-flow",
        f"{QUALITY},straightness", after="rectified-flow"),
    Run("rectified-flow-1", "distill rectified-flow --recipe mnist-distill --teacher {dir}/rectified-flow-2",
        after="rectified-flow-2"),
    Run("adm-unet", "train adm-unet", bits="bits-per-dim:n=50"),
    Run("dps", "train dps", bits="bits-per-dim:n=50",
        restore=("super-resolution scale=4", "inpainting mask=box box=10", "inpainting mask=box",
                 "inpainting mask=box --label data",
                 "gaussian-deblurring std=1.5", "super-resolution scale=4 --method ddrm",
                 "super-resolution scale=4 --method pigdm", "super-resolution scale=4 --method diffpir")),
    Run("llamagen", "train llamagen", bits="bits-per-dim:n=500"),
    Run("randar", "train randar", bits="bits-per-dim:n=500"),
    Run("maskgit", "train maskgit"),
    Run("maskgit-halton", "train maskgit sampler=halton"),
    Run("mar", "train mar"),
    Run("var-tokenizer", "train var --recipe mnist-tokenizer", "fid,psnr", sampled=False),
    Run("var", "train var --codec {dir}/var-tokenizer", after="var-tokenizer", bits="bits-per-dim:n=500"),
    Run("vqgan", "train vqgan", "fid,psnr", sampled=False),
    Run("vqgan-prior", "train vqgan --recipe mnist-prior", bits="bits-per-dim:n=500"),
    Run("vqvae", "train vqvae", "fid,psnr", sampled=False),
    Run("vqvae-prior", "train vqvae --recipe mnist-prior --codec {dir}/vqvae", after="vqvae", bits="bits-per-dim:n=500"),
    Run("vqvae-likelihood", "train vqvae --recipe mnist-likelihood", "fid,psnr", bits="bits-per-dim:n=500", sampled=False),
    Run("vqvae-likelihood-prior",
        "train vqvae --recipe mnist-prior --codec {dir}/vqvae-likelihood data.split=train",
        after="vqvae-likelihood", bits="bits-per-dim:n=500"),
    Run("vae", "train vae", "fid", bits=VAE_BITS),
    Run("vae-8bit", "train vae --recipe mnist-8bit", "fid", bits=VAE_BITS),
]  # fmt: skip


def vgm(*args: str, threads: int | None = None) -> Any:
    """A command's JSON."""
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    done = subprocess.run([sys.executable, "-m", "vgm_cli", *args, "--json"], capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"vgm {' '.join(args)}\n{done.stderr}")
    return None if args[0] in ("train", "distill", "finetune-rl") else json.loads(done.stdout)


def measure(run: Run, runs: Path, threads: int) -> dict[str, Any]:
    """A run's row; trains what is missing."""
    folder, kept = runs / run.name, runs / f"{run.name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    call, state = partial(vgm, threads=threads), folder / "checkpoints/last/state.json"
    if not (folder / "card.md").exists():  # written when a run is complete
        verb, *rest = run.command.format(dir=runs).split()
        call(verb, *rest, "--out", str(folder), *(["--resume"] if state.exists() else ["--overwrite"]))
    trained, start = json.loads(state.read_text()), time.monotonic()
    results = call("evaluate", str(folder), "--reference", "mnist5k", "--metrics", run.metrics, "-n", "2000")
    if run.bits:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        split = ["--split", "test"] if config["data"]["split"] == "train" else []
        results += call("evaluate", str(folder), "--metrics", run.bits, *split)
    speed = 0.0
    if run.sampled:
        speed = call("sample", str(folder), "-n", "200", "--out", str(runs / f"{run.name}.npz"))["images_per_second"]
        call("sample", str(folder), "-n", "50", "--out", str(runs / f"{run.name}.png"))
    restored = []
    for task in run.restore:
        options = f"--model {folder} --task {task} --input mnist5k --split test -n 64 --out {runs}/{run.name}-restored"
        restored.append({"task": task} | {
            k: v for k, v in call("restore", *options.split()).items()
            if k in ("restored", "baseline", "gain", "seconds", "nfe")
        })  # fmt: skip
    row = {
        "command": f"vgm {run.command.format(dir='RUNS')} --out RUNS/{run.name}",
        "parameters": call("inspect", str(folder))["parameters"],
        "seconds": trained["seconds"],
        "all_seconds": trained["seconds"] + time.monotonic() - start,
        "steps": trained["step"],
        "images_per_second": speed,
        "metrics": [
            [
                r["metric"],
                r["value"],
                r.get("uncertainty"),
                r["protocol"].get("likelihood") or r["protocol"].get("options", {}).get("likelihood"),
            ]
            for r in results
        ],
        "nfe": next((r["nfe"] for r in results if r.get("nfe")), None),
        "restored": restored,
        "log": json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1]),
    }
    kept.write_text(dump_json(row, indent=2))
    return row


def found(row: dict[str, Any], metric: str) -> list[list[Any]]:
    return [m for m in row["metrics"] if m[0] == metric and m[1] is not None]


def number(value: float, spread: float | None = None, digits: int = 3) -> str:
    return f"{value:.{digits}g}" + (f" ± {spread:.1g}" if spread else "")


def cell(row: dict[str, Any], metric: str) -> str:
    return ", ".join(number(value, spread) for _, value, spread, _ in found(row, metric)[:1])


def kind_of(kind: str) -> str:
    """How a likelihood was had, and of which pixels where they are not the 8-bit ones."""
    other = [part for part in kind.split(", ")[1:] if "bits" in part or "binarised" in part]
    return ", ".join([kind.split(",")[0], *other])


def likelihood(row: dict[str, Any]) -> str:
    """Bits per dimension, or, where a codec stands before the model, per latent number or code."""
    return ", ".join(
        [f"{number(v)} ({kind_of(kind)})" for _, v, _, kind in found(row, "bits-per-dim")]
        + [f"{number(v)} per latent ({kind_of(kind)})" for _, v, _, kind in found(row, "bits-per-latent-dim")]
    )


def table(head: str, rows: list[list[str]]) -> str:
    columns = head.split(" | ")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary(rows: dict[str, dict[str, Any]]) -> str:
    cells = []
    for name, row in rows.items():
        speed = f"{row['images_per_second']:,.0f}" if row["images_per_second"] else ""
        trained = f"{row['seconds'] / 60:.1f} min, {row['steps']} steps"
        cells.append([name, f"{row['parameters']:,}", trained, str(row["nfe"] or ""), speed, cell(row, "fid"),
                      cell(row, "class-accuracy"), likelihood(row)])  # fmt: skip
    return table("run | parameters | training | NFE | images/s | FID | class accuracy | bits/dim", cells)


def students(rows: dict[str, dict[str, Any]]) -> str:
    """Teachers and what was distilled from them."""
    cells = []
    for teacher, names in {
        "sit": (
            *("dmd", "add", "add-without-adversary", "consistency-distilled", "meanflow-finetune"),
            *("scm-distilled", "scm-from-data"),
        ),
        "rectified-flow": ("rectified-flow-2", "rectified-flow-1"),
    }.items():
        for name in (teacher, *names):
            if teacher in rows and name in rows:
                row, base = rows[name], found(rows[teacher], "fid")[0][1]
                ratio = "" if name == teacher else f"{found(row, 'fid')[0][1] / base:.2f}"
                cells.append([f"{name}, student of {teacher}" if ratio else name, str(row["nfe"]), cell(row, "fid"), ratio,
                              f"{row['images_per_second']:,.0f}", f"{row['seconds'] / 60:.1f} min"])  # fmt: skip
    return table("run | NFE | FID | of the teacher's | images/s | training", cells)


def restorations(rows: dict[str, dict[str, Any]]) -> str:
    cells = []
    for part in (part for row in rows.values() for part in row["restored"]):
        plain, better = part["baseline"], part["restored"]
        task, _, rest = part["task"].partition(" --")
        cells.append([f"{task}, given the class" if "label" in rest else task,
                      rest.partition(" ")[2] if rest.startswith("method") else "dps", str(part["nfe"]),
                      f"{plain['psnr']:.1f}", f"{better['psnr']:.1f}", f"{part['gain']:+.1f}",
                      f"{plain['ssim']:.2f}", f"{better['ssim']:.2f}", f"{64 / part['seconds']:.2g}"])  # fmt: skip
    return table("task | method | NFE | baseline PSNR | PSNR | gain (dB) | baseline SSIM | SSIM | images/s", cells)


def rewards(rows: dict[str, dict[str, Any]]) -> str:
    if "flow-grpo" not in rows:
        return "Not measured yet."
    row, before = rows["flow-grpo"], rows["rectified-flow"]
    log = row["log"]
    terms = ", ".join(f"{k.partition('/')[2]} {v:.3g}" for k, v in log.items() if k.startswith("reward/"))
    return (
        f"After {row['steps']} steps in {row['seconds'] / 60:.1f} minutes the reward (ink, and the classifier's confidence)\n"
        f"is {log['reward']:.3g} ({terms}), {log['reward_gain']:.2g} standard deviations of the base model's above that\n"
        f"model's. Class accuracy {cell(before, 'class-accuracy')} before, {cell(row, 'class-accuracy')} after; KL to the base\n"
        f"model {log['kl']:.2g} per step. Digits become bold, hence the FID."
    )


def document(rows: dict[str, dict[str, Any]], machine: str, jobs: int) -> str:
    left = [run.name for run in RUNS if run.name not in rows]
    return TEMPLATE.format(
        machine=machine,
        psnr=cell(rows["vqgan"], "psnr") if "vqgan" in rows else "…",
        summary=summary(rows) + (f"\n\nNot measured yet: {', '.join(left)}." if left else ""),
        students=students(rows),
        restorations=restorations(rows),
        rewards=rewards(rows),
        jobs="one run" if jobs == 1 else f"{jobs} runs",
        minutes=sum(row["all_seconds"] for row in rows.values()) / 60 / jobs,
        commands="\n".join(row["command"] for row in rows.values()),
    )


TEMPLATE = """# Results

Every paper's small recipe, unchanged, on the shipped handwritten digits (5,000 MNIST images of 28×28 pixels).
`make results` trains and measures them and writes this page. Machine: {machine}; {jobs} at a time shared the cores,
{minutes:.0f} minutes for all rows.

One seed a row. The recipes were chosen by these same measures on these same digits (several settings each for StyleGAN,
Glow, consistency distillation), so the figures show that a recipe works and are no unbiased comparison of papers.

## Every paper

{summary}

FID: 2,000 samples against the 5,000 images, features of the shipped digit network (mnist-features), so these numbers compare
only with each other; ± is a standard error. Class accuracy: share of conditional samples that the shipped digit classifier
recognises as their class (it sees about 99 % of held-out digits right). NFE: network evaluations for one image, guidance counted
twice. images/s: sampling, 200 images. The FID of codecs (vqgan, vavae, plain-codec, …) is of reconstructions; vqgan's PSNR is {psnr} dB.

bits/dim: 8-bit pixels unless it says otherwise; where densities are continuous, with uniform dequantisation. Exact for glow, the
black border that it puts around digits counted in; ELBO and a tighter bound of 100 draws (IWAE) for vae; the probability-flow
ODE of 50 images for diffusion and flow models. Models behind a codec have the likelihood of its latents or codes ("per latent"),
which does not compare with that of pixels. Of held-out digits for vae, glow, dps and vdm, which are trained without every tenth; of
training digits for the others.

## Distillation (`vgm distill`)

{students}

## Restoration (`vgm restore`)

64 digits that the prior (`vgm train dps`) never saw, Gaussian noise of 0.05. The baseline is the adjoint; of super-resolution
the bicubic image.

{restorations}

## Reinforcement learning (`vgm finetune-rl`)

{rewards}

## The commands

```
{commands}
```

Then `vgm evaluate RUNS/NAME --metrics fid,class-accuracy,bits-per-dim -n 2000`, `vgm sample RUNS/NAME -n 50`, and
`vgm restore --model RUNS/dps --task TASK --input mnist5k --split test -n 64`.
"""


def machine() -> str:
    facts = vgm("env")
    bf16 = ", bf16" if facts["bf16"] else ""
    return f"{facts['cores']} CPU cores ({facts['cpu']}{bf16}), torch {facts['packages']['torch']}"


def main() -> None:
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("results"))
    parser.add_argument("--only", default="", help="names of runs; those kept from before stay in the tables")
    parser.add_argument("--jobs", type=int, default=min(2, cores), help="runs at a time")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    only = set(filter(None, args.only.split(",")))
    chosen = [run for run in RUNS if not only or run.name in only]
    done: dict[str, Future[dict[str, Any]]] = {}

    def work(run: Run) -> dict[str, Any]:
        if run.after in done:
            done[run.after].result()  # submitted earlier, so that a worker has it already
        print(run.name, flush=True)
        return measure(run, args.runs, max(cores // args.jobs, 1))

    with ThreadPoolExecutor(args.jobs) as pool:
        for run in chosen:
            done[run.name] = pool.submit(work, run)
    rows = {name: row.result() for name, row in done.items()}
    for run in RUNS:
        if run.name not in rows and (args.runs / f"{run.name}.json").exists():
            rows[run.name] = json.loads((args.runs / f"{run.name}.json").read_text())
    rows = {run.name: rows[run.name] for run in RUNS if run.name in rows}
    TARGET.write_text(document(rows, machine(), args.jobs), encoding="utf-8")


if __name__ == "__main__":
    main()
