"""The leaderboard: every paper's small recipe trained, measured and ranked. `make leaderboard`

    python docs/generate_results.py [--runs DIR] [--only dit,sit] [--jobs 2] [--minutes 150] [--seeds 10]

Writes docs/results.md, the pictures docs/images/results*.png, and DIR/leaderboard.html, one page with everything inside.
What each run and each figure of it left in DIR is kept: the same command goes on where it was stopped, by --minutes, by
Ctrl-C or by a power cut, and repeats only what failed. As many runs at a time as there are jobs, each on its share of
the cores: small networks gain little from a second core, so that two runs side by side are ready sooner than one after
the other. A run that others need waits for nobody; one that fails takes along those that need it, and nobody else.

Protocol: runs are trained on the part `train` of their data and measured on `test`, which chose nothing; likelihoods and
restorations are of `test`, too. FID against all images of the set is given beside, as before there were parts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

import results_page
import results_tables
import yaml

from vgm_cli.atomic import write_json, write_text
from vgm_cli.errors import VgmError

DOCS = Path(__file__).parent
QUALITY = "fid,class-accuracy"
VAE_BITS = "bits-per-dim:n=256:samples=1,bits-per-dim:n=256:samples=100"
ASKED = 2000  # samples of a figure
CAPTIONS, PAIRED = 256, 200  # samples that are asked for by captions, and by test pictures' words and hints


@dataclass(frozen=True)
class Run:
    """command makes the run ({dir}: where other runs lie, of which it needs `after`); metrics are of its samples, or of
    a codec's reconstructions, paired of samples asked for by every test picture's own words and hint, bits of the model
    itself and test images. samples: how many, where it is not the board's number. variants: options of `vgm sample` for
    FEW samples more; restore: options of `vgm restore` with the run as a prior."""

    name: str
    command: str
    metrics: str = QUALITY
    after: str = ""
    bits: str = ""
    sampled: bool = True
    paired: str = ""
    samples: int = ASKED
    variants: tuple[str, ...] = ()
    restore: tuple[str, ...] = ()


FEW = 500  # samples of rows whose samples take long, and of other samplers than the run's own
EMOJIS: dict[str, Any] = {"metrics": "fid", "samples": FEW}  # guided networks of many steps
ODES = tuple(f"--sampler score-sde-ode rtol={tol} atol={tol}" for tol in ("1e-2", "1e-4"))


def corrected(snr: float) -> tuple[str, ...]:
    """Predictor and corrector of score-sde, in few steps and in more."""
    return tuple(f"--steps {n} predictor=reverse-diffusion corrector=langevin snr={snr}" for n in (25, 100))


RUNS = [  # the cheapest first, each after the one that it needs
    Run("vae", "train vae", "fid", bits=VAE_BITS),
    Run("vqvae", "train vqvae", "fid,psnr", sampled=False),
    Run("vqgan", "train vqgan", "fid,psnr", sampled=False),
    Run("vae-8bit", "train vae --recipe mnist-8bit", "fid", bits=VAE_BITS),
    Run("vqvae-likelihood", "train vqvae --recipe mnist-likelihood", "fid,psnr", bits="bits-per-dim:n=500", sampled=False),
    Run("var-tokenizer", "train var --recipe mnist-tokenizer", "fid,psnr", sampled=False),
    Run("vavae", "train lightningdit --recipe mnist-vavae", "fid,psnr", sampled=False),
    Run("plain-codec", "train lightningdit --recipe mnist-vavae objective.vf_weight=0", "fid,psnr", sampled=False),
    Run("ldm-openmoji-codec", "train ldm --recipe openmoji-codec", "fid,psnr", sampled=False),
    Run("var", "train var", bits="bits-per-dim:n=500",
        restore=("--mask lower --method var",)),
    Run("maskgit", "train maskgit",
        restore=("--mask lower --method maskgit",)),
    Run("randar", "train randar", bits="bits-per-dim:n=500",
        restore=("--mask lower --method randar",)),
    Run("llamagen", "train llamagen", bits="bits-per-dim:n=500",
        restore=("--mask lower --method llamagen",)),
    Run("vqgan-prior", "train vqgan --recipe mnist-prior", bits="bits-per-dim:n=500"),
    Run("vqvae-prior", "train vqvae --recipe mnist-prior --codec {dir}/vqvae", after="vqvae", bits="bits-per-dim:n=500"),
    Run("sit", "train sit", bits="bits-per-dim:n=50"),
    Run("meanflow-finetune", "distill meanflow --recipe mnist-finetune --teacher {dir}/sit", after="sit"),
    Run("dmd", "distill dmd --teacher {dir}/sit", after="sit"),
    Run("scm-distilled", "distill scm --recipe mnist-scd --teacher {dir}/sit", after="sit"),
    Run("consistency-distilled", "distill consistency --teacher {dir}/sit", after="sit"),
    Run("add", "distill add --teacher {dir}/sit", after="sit"),
    Run("rectified-flow", "train rectified-flow", bits="bits-per-dim:n=50,straightness"),
    Run("rectified-flow-2", "distill rectified-flow --recipe mnist-reflow --teacher {dir}/rectified-flow",
        after="rectified-flow", bits="straightness"),
    Run("rectified-flow-1", "distill rectified-flow --recipe mnist-distill --teacher {dir}/rectified-flow-2",
        after="rectified-flow-2"),
    Run("flow-grpo", "finetune-rl flow-grpo --model {dir}/rectified-flow", after="rectified-flow"),
    Run("meanflow", "train meanflow"),
    Run("scm", "train scm"),
    Run("consistency", "train consistency"),
    Run("starflow", "train starflow", bits="bits-per-dim:n=256",
        restore=("--mask lower --method starflow-inpaint",)),
    Run("glow", "train glow", bits="bits-per-dim:n=256"),
    Run("stylegan", "train stylegan"),
    Run("mar", "train mar",
        restore=("--mask lower --method mar",)),
    Run("dps", "train dps", bits="bits-per-dim:n=50",
        restore=("--task super-resolution scale=4", "--task inpainting mask=box box=10", "--task inpainting mask=box",
                 "--task inpainting mask=box --label data",
                 "--task gaussian-deblurring std=1.5", "--task super-resolution scale=4 --method ddrm",
                 "--task super-resolution scale=4 --method pigdm", "--task super-resolution scale=4 --method diffpir",
                 "--mask lower")),
    Run("adm-unet", "train adm-unet", bits="bits-per-dim:n=50"),
    Run("ldm", "train ldm"),
    Run("vdmpp", "train vdmpp", bits="bits-per-dim:n=50,bits-per-dim:n=50:method=elbo"),
    Run("dit", "train dit", bits="bits-per-dim:n=50"),
    Run("lightningdit", "train lightningdit", bits="bits-per-dim:n=50"),
    Run("score-sde", "train score-sde", "fid", bits="bits-per-dim:n=50", variants=(*corrected(0.05), *ODES),
        restore=("--mask lower --method score-sde-restore steps=200",)),
    Run("score-sde-subvp", "train score-sde --recipe mnist-subvp", "fid", bits="bits-per-dim:n=50",
        variants=(*corrected(0.05), *ODES)),
    Run("score-sde-ve", "train score-sde --recipe mnist-ve", "fid", bits="bits-per-dim:n=50",
        variants=(*corrected(0.16), *ODES)),
    Run("vdm", "train vdmpp --recipe mnist-vdm", "fid", bits="bits-per-dim:n=500:method=elbo"),
    Run("scm-from-data", "distill scm --recipe mnist-sct --teacher {dir}/sit", after="sit"),
    Run("add-without-adversary", "distill add --recipe mnist-distillation-only --teacher {dir}/sit", after="sit"),
    Run("maskgit-halton", "train maskgit sampler=halton"),
    Run("vqvae-likelihood-prior",
        "train vqvae --recipe mnist-prior --codec {dir}/vqvae-likelihood data.split=train",
        after="vqvae-likelihood", bits="bits-per-dim:n=500"),
    Run("starflow-pixels", "train starflow --recipe mnist-pixels", bits="bits-per-dim:n=500"),
    Run("lightningdit-vavae", "train lightningdit --codec {dir}/vavae", after="vavae"),
    Run("lightningdit-plain-codec", "train lightningdit --codec {dir}/plain-codec", after="plain-codec"),
    Run("ldm-openmoji", "train ldm --recipe openmoji", **EMOJIS, variants=("--steps 1",)),
    Run("add-openmoji", "distill add --recipe openmoji --teacher {dir}/ldm-openmoji", **EMOJIS, after="ldm-openmoji"),
    Run("supir-encoder", "train supir --recipe openmoji-encoder", "fid,psnr", after="ldm-openmoji", sampled=False),
    Run("supir", "train supir --recipe openmoji roles.base.run={dir}/ldm-openmoji codec.weights={dir}/supir-encoder "
        "conditions.text.weights={dir}/ldm-openmoji", "", after="supir-encoder", sampled=False,
        paired="fid,retrieval,edge-f1",
        restore=("--task classical --method supir task.blur=0.5 task.noise=10 task.jpeg=75",)),
    Run("controlnet-openmoji", "train controlnet --recipe openmoji --base {dir}/ldm-openmoji", "",
        after="ldm-openmoji", sampled=False, paired="fid,retrieval,edge-f1"),
    Run("sit-openmoji", "train sit --recipe openmoji", **EMOJIS, variants=("--steps 2 method=euler",)),
]  # fmt: skip

# -- rows that nobody wrote ----------------------------------------------------------------------------------------------


def all_runs() -> list[Run]:
    """RUNS, and a row for every small recipe of a paper that has none there, and for every short one on emojis."""
    from vgm_cli import recipe as recipes

    written = {
        (c[1], c[c.index("--recipe") + 1] if "--recipe" in c else "") for run in RUNS for c in [run.command.split()]
    }
    papers, rows = {paper for paper, _ in written}, []
    for full, file in sorted(recipes.shipped().items(), key=lambda item: "codec" not in item[0]):  # codecs come first
        paper, _, name = full.partition("/")
        small = (name.startswith("openmoji") and "long" not in name) or (paper not in papers and name == "mnist")
        if (paper, name) in written or not small:
            continue
        config = recipes.load_file(file, full)[0]
        verb = recipes.verb_of(config)
        after = {"distill": "sit", "finetune-rl": "rectified-flow"}.get(verb, "")
        source = {"distill": " --teacher {dir}/sit", "finetune-rl": " --model {dir}/rectified-flow"}.get(verb, "")
        labelled = (config.get("data") or {}).get("labels") is not False and not name.startswith("openmoji")
        rows.append(
            Run(
                paper if name == "mnist" else f"{paper}-{name}",
                f"{verb} {paper} --recipe {name}{source}",
                QUALITY if labelled else "fid,psnr" if "codec" in name else "fid",
                after,
                sampled="codec" not in name,
                samples=FEW if name.startswith("openmoji") else ASKED,
            )
        )
    return [*RUNS, *rows]


# -- commands ------------------------------------------------------------------------------------------------------------


class Failed(Exception):
    """A command said why it could not."""


class OutOfTime(Exception):
    """The minutes are over; what was begun can go on."""


def vgm(*args: str, threads: int | None = None, deadline: float = float("inf")) -> Any:
    """A command's JSON. At the deadline it is asked to stop: runs save, samples keep what was made."""
    if time.monotonic() > deadline:
        raise OutOfTime
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    command = [sys.executable, "-m", "vgm_cli", *args, "--json"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        left = deadline - time.monotonic()
        out, err = child.communicate(timeout=None if left == float("inf") else left)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGTERM)
        child.communicate()
        raise OutOfTime from None
    if child.returncode:
        raise Failed(reason(err) or f"exit code {child.returncode}")
    return None if args[0] in ("train", "distill", "finetune-rl") else json.loads(out)


def reason(err: str) -> str:
    """The sentence by which a command says what is wrong."""
    told = [line.removeprefix("error: ") for line in err.splitlines() if line.startswith("error: ")]
    return told[-1] if told else (err.strip().splitlines() or [""])[-1]


Call = Callable[..., Any]


@dataclass
class Kept:
    """What is known of a run, on disk after every stage. A stage that failed says so and is tried again next time."""

    file: Path
    stages: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.file.exists():
            self.stages = json.loads(self.file.read_text(encoding="utf-8"))

    def stage(self, name: str, make: Callable[[], Any]) -> Any:
        """The stage's result; None where it failed."""
        found = self.stages.get(name)
        if found is None or "failed" in found:
            began = time.monotonic()
            try:
                found = {"value": make()}
            except Failed as e:
                found = {"failed": str(e)}
            self.stages[name] = {**found, "wall": round(time.monotonic() - began, 1)}
            write_json(self.file, self.stages)
        return self.stages[name].get("value")


# -- one row -------------------------------------------------------------------------------------------------------------


@dataclass
class Board:
    """Where runs lie, how commands are called, how many samples a figure takes, and how many images are restored."""

    runs: Path
    call: Call = vgm
    samples: int = ASKED
    restored: int = 64
    packing: Lock = field(default_factory=Lock)

    def measure(self, run: Run, call: Call) -> dict[str, Any]:
        """A run's stages; makes what is missing. Failed: it could not be trained."""
        folder, kept = self.runs / run.name, Kept(self.runs / f"{run.name}.json")
        kept.stage("trained", lambda: self.train(run, folder, call))
        if "failed" in kept.stages["trained"]:
            raise Failed(kept.stages["trained"]["failed"])
        config = read_config(folder)
        data, samples = str(config["data"]["path"]), self.runs / f"{run.name}.npz"
        n, few = min(self.samples, run.samples), min(self.samples, FEW)
        test, evaluate = ("--reference", data, "--split", "test"), partial(call, "evaluate")
        if run.sampled:
            kept.stage("sampled", lambda: self.sample(folder, config, n, samples, call))
            target: tuple[str, ...] = (str(samples),)
        else:
            target = (str(folder), "-n", str(few))
        if run.metrics and (samples.exists() or not run.sampled):
            more = f"{run.metrics},precision-recall" if run.sampled else run.metrics
            kept.stage("measured", lambda: evaluate(*target, "--metrics", more, *test))
            kept.stage("measured-all", lambda: evaluate(*target, "--metrics", "fid", "--reference", data))
        if samples.exists():
            held = ("--reference", data, "--split", "train", "--held-out", str(self.held_out(data, call)))
            kept.stage("memorised", lambda: evaluate(*target, "--metrics", "memorisation", *held))
        if run.paired:
            part = (*test, "-n", str(min(self.samples, PAIRED)))
            kept.stage("paired", lambda: evaluate(str(folder), "--metrics", run.paired, *part))
        elif "text" in (config.get("conditions") or {}) and "retrieval" in known_metrics():
            asked = ("-n", str(min(self.samples, CAPTIONS)))
            kept.stage("caption", lambda: evaluate(str(folder), "--metrics", "retrieval", *asked))  # of what it learned
        if run.bits:
            kept.stage("likelihood", lambda: evaluate(str(folder), "--metrics", run.bits, "--split", "test"))
        for number, words in enumerate(run.variants):
            file = self.runs / f"{run.name}-{number}.npz"
            make = partial(self.variant, folder, config, words, few, file, test, call)
            kept.stage(f"sampled {words}", make)
        for task in run.restore:
            kept.stage(f"restored {task}", partial(self.restore, run, task, data, call))
        return kept.stages

    def sample(self, folder: Path, config: dict[str, Any], n: int, out: Path, call: Call, words: str = "") -> Any:
        asked = self.conditions(config, str(config["data"]["path"]), n)
        to = ("--out", str(out), "--overwrite")
        found = call("sample", str(folder), *words.split(), "-n", str(n), *asked, *to)
        return {k: v for k, v in found.items() if k != "labels"}

    def variant(
        self, folder: Path, config: dict[str, Any], words: str, n: int, out: Path, test: tuple[str, ...], call: Call
    ) -> dict[str, Any]:
        """The run sampled in another way, and the FID of that."""
        sampled = self.sample(folder, config, n, out, call, words)
        return {"sampled": sampled, "results": call("evaluate", str(out), "--metrics", "fid", *test)}

    def train(self, run: Run, folder: Path, call: Call) -> dict[str, Any]:
        """Facts of the finished run, which is begun, continued or found complete."""
        state = folder / "checkpoints/last/state.json"
        command = command_of(run)
        if not (folder / "card.md").exists():  # written when a run is complete
            words = command.format(dir=self.runs).split()
            call(*words, "--out", str(folder), *(["--resume"] if state.exists() else ["--overwrite"]))
        trained = json.loads(state.read_text(encoding="utf-8"))
        log = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return {
            "command": f"vgm {command.format(dir='RUNS')} --out RUNS/{run.name}",
            "data": str(read_config(folder)["data"]["path"]),
            "sampled": run.sampled,
            "seconds": trained["seconds"],
            "steps": trained["step"],
            "parameters": call("inspect", str(folder))["parameters"],
            "log": json.loads(log[-1]) if log else {},
        }

    def conditions(self, config: dict[str, Any], data: str, n: int) -> list[str]:
        """Options that ask a model for n captions: evenly spaced ones that it has seen, since others have words that it
        does not know. None for classes, which take turns."""
        from vgm_cli.data import open_dataset

        if "text" not in (config.get("conditions") or {}):
            return []
        with self.packing:
            dataset = open_dataset(data, split="train", quiet=True)
            count = min(n, len(dataset))
            words = self.runs / f"{Path(data).name}-train-{count}.txt"
            rows = [i * len(dataset) // count for i in range(count)]
            write_text(words, "\n".join(dataset.gather(rows)["text"]) + "\n")
        return ["--prompts", str(words)]

    def held_out(self, data: str, call: Call) -> Path:
        """The test images as a file, for the memorisation check."""
        file = self.runs / f"{Path(data).name}-test.zip"
        with self.packing:
            if not file.exists():
                call("data", "pack", data, str(file), "--split", "test")
        return file

    def restore(self, run: Run, task: str, data: str, call: Call) -> dict[str, Any]:
        number = run.restore.index(task)
        out = self.runs / f"{run.name}-restored-{number}"
        options = f"--model {self.runs / run.name} {task} --input {data} --split test -n {self.restored} --out {out}"
        found = call("restore", *options.split(), "--overwrite")
        kept = {k: found.get(k) for k in ("restored", "baseline", "gain", "seconds", "nfe", "n")}
        return {**kept, "task": task, "picture": str(out / "grid.png")}


def read_config(folder: Path) -> dict[str, Any]:
    """The recipe of a run."""
    found: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return found


def known_metrics() -> list[str]:
    from vgm_cli.registry import registry

    return registry().names("metric")


def command_of(run: Run) -> str:
    """Runs are trained on the part `train`; those made from another run take that one's data."""
    alone = run.command.startswith("train ") and "data.split" not in run.command
    return f"{run.command} data.split=train" if alone else run.command


# -- all rows ------------------------------------------------------------------------------------------------------------


def run_all(runs: Sequence[Run], work: Callable[[Run], Any], jobs: int) -> dict[str, str]:
    """Work on runs in their order, as many at a time as there are jobs, each after the one that it needs: {name of a run
    that was left out: why}."""
    waiting, finished, lost = list(runs), set[str](), dict[str, str]()
    names = {run.name for run in runs}
    with ThreadPoolExecutor(jobs) as pool:
        going: dict[Future[Any], Run] = {}
        while waiting or going:
            before = len(waiting)
            for run in list(waiting):
                if run.after in lost:
                    lost[run.name] = f"needs {run.after}"
                    waiting.remove(run)
                elif len(going) < jobs and (run.after in finished or run.after not in names):
                    waiting.remove(run)
                    going[pool.submit(work, run)] = run
            if not going and len(waiting) == before:  # a circle: nobody can begin
                lost |= {run.name: f"needs {run.after}" for run in waiting}
                break
            if not going:
                continue
            for future in wait(going, return_when=FIRST_COMPLETED).done:
                run = going.pop(future)
                try:
                    future.result()
                    finished.add(run.name)
                except OutOfTime:
                    lost[run.name] = "out of time"
                except Failed as e:
                    lost[run.name] = str(e)
    return lost


def again(rows: dict[str, dict[str, Any]], runs: Sequence[Run], count: int) -> list[Run]:
    """The first rows once more with another seed, those made from another run from the same."""
    best = [name for name in results_tables.ranked(rows) if "@" not in name][:count]
    return [
        replace(
            run,
            name=f"{run.name}@1",
            command=f"{run.command} train.seed=1",
            bits="",
            paired="",
            variants=(),
            restore=(),
        )
        for run in runs
        if run.name in best
    ]


def rows_of(runs: Sequence[Run], folder: Path) -> dict[str, dict[str, Any]]:
    """{name: stages} of what was trained, in the order of the runs, other seeds at the end."""
    names = [run.name for run in runs] + [f"{run.name}@1" for run in runs]
    found = {name: Kept(folder / f"{name}.json").stages for name in names if (folder / f"{name}.json").exists()}
    return {
        name: {**stages, **facts_of(folder / name.partition("@")[0])}
        for name, stages in found.items()
        if "value" in stages.get("trained", {})
    }


@cache
def facts_of(folder: Path) -> dict[str, Any]:
    """What the run itself says: its recipe, and the tokens that it writes, if it does."""
    if not (folder / "config.yaml").exists():
        return {}
    config = read_config(folder)
    facts: dict[str, Any] = {"config": {"value": config}}
    if (config.get("codec") or {}).get("output") == "tokens" or config["paper"] == "mar":
        try:
            facts["tokens"] = {"value": tokens_of(folder)}
        except VgmError as e:
            facts["tokens"] = {"failed": str(e)}
    return facts


def tokens_of(run: Path) -> dict[str, Any] | None:
    """How many tokens an image is by the codec of a run, of how many codes or of which length; None without a codec."""
    from vgm_cli.engine import checkpoint as ckpt
    from vgm_cli.engine import parts

    path = ckpt.resolve(run)
    header = ckpt.read_header(path)
    if "codec" not in header.parts:
        return None
    ref, codec, side = header.parts["codec"], ckpt.load_codec(header, path), header.data["image_size"]
    shape = codec.latent_shape((header.data["image_channels"], side, side))
    codes = ref.output == "tokens"
    return {
        "tokenizer": ref.asset or parts.folder_of(parts.locate(ref, path, "codec")).name,
        "count": math.prod(shape if codes else shape[1:]),
        "vocabulary": codec.vocab_size if codes else None,
        "channels": None if codes else shape[0],
    }


def publish(runs: Sequence[Run], board: Board, lost: dict[str, str], machine: str, docs: Path) -> None:
    """results.md, its pictures and the page, from whatever is there."""
    rows = rows_of(runs, board.runs)
    left = {run.name: lost.get(run.name, "not made yet") for run in runs if run.name not in rows}
    images = results_page.pictures(rows, board.runs, docs / "images")
    write_text(docs / "results.md", results_page.markdown(rows, left, machine, images))
    write_text(board.runs / "leaderboard.html", results_page.html(rows, left, machine, board.runs))


def machine_of(call: Call) -> str:
    facts = call("env")
    bf16 = ", bf16" if facts["bf16"] else ""
    return f"{facts['cores']} CPU cores ({facts['cpu']}{bf16}), torch {facts['packages']['torch']}"


def leaderboard(
    runs: Sequence[Run],
    board: Board,
    *,
    only: Collection[str] = (),
    jobs: int = 1,
    minutes: float = float("inf"),
    seeds: int = 0,
    docs: Path = DOCS,
) -> dict[str, str]:
    """Make and measure all runs, or `only` some, and publish what there is; {run that was left out: why}. A second call
    goes on."""
    board.runs.mkdir(parents=True, exist_ok=True)
    (docs / "images").mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    machine = machine_of(board.call)
    call = partial(board.call, threads=max((os.cpu_count() or 1) // jobs, 1), deadline=deadline)

    def work(run: Run) -> None:
        print(run.name, flush=True)
        board.measure(run, call)
        with board.packing:
            publish(runs, board, {}, machine, docs)

    chosen = [run for run in runs if not only or run.name in only]
    lost = run_all(chosen, work, jobs)
    lost |= run_all(again(rows_of(chosen, board.runs), chosen, seeds), work, jobs)
    publish(runs, board, lost, machine, docs)
    return lost


def main() -> None:
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("results"), help="where runs lie")
    parser.add_argument("--only", default="", help="names of runs; those kept from before stay in the tables")
    parser.add_argument("--jobs", type=int, default=min(2, cores), help="runs at a time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop then; the same command goes on")
    parser.add_argument("--seeds", type=int, default=10, help="how many of the first rows are made again with seed 1")
    args = parser.parse_args()
    runs = all_runs()
    only = set(filter(None, args.only.split(",")))
    if odd := only - {run.name for run in runs}:
        raise SystemExit(f"no such run: {', '.join(sorted(odd))}; known: {', '.join(run.name for run in runs)}")
    lost = leaderboard(runs, Board(args.runs), only=only, jobs=args.jobs, minutes=args.minutes, seeds=args.seeds)
    for name, why in lost.items():
        print(f"{name}: {why}", file=sys.stderr)


if __name__ == "__main__":
    main()
