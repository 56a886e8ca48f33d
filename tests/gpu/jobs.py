"""The checks by name: what runs side by side, what runs alone, for how long at most; and what each finds out."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import platform
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESUME_GROUPS = 6
PAPERS = sorted({p.parent.name for kind in ("mnist*", "small*") for p in (ROOT / "recipes").glob(f"*/{kind}.yaml")})
LEAST = 15.0  # seconds under which nothing is started
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}

# name: (seconds at most, cores). Most important first.
TOGETHER: dict[str, tuple[float, int]] = {
    "golden": (170, 4),
    # compiles a large network, so that what is timed later finds it compiled: DiT, SiT, LlamaGen
    **{f"warm-{i}": (170, 3) for i in range(3)},
    **{f"resume-{i}": (150, 1) for i in range(RESUME_GROUPS)},
    "sampling": (120, 1),
    "networks": (90, 1),
    "memory": (90, 1),
    "distributed": (120, 1),
    "precision": (90, 1),
    **{f"compile-{paper}": (170, 2) for paper in PAPERS},
}
WARM_GIB, GIB = 56.0, 3.5  # of the card that a check side by side with others may take: warm-N, the others
# name: (seconds at most, seconds under which it is not begun)
ALONE: dict[str, tuple[float, float]] = {
    "peak": (45, 10),
    "dit": (150, 35),
    "demo": (120, 40),
    "sit": (100, 30),
    "llamagen": (100, 30),
    "dit-sampling": (60, 25),
    "adm": (70, 20),
    "stylegan2": (70, 20),
    "dmd": (70, 20),
    "llamagen-sampling": (60, 20),
    "glow": (70, 20),
    "checkpointing": (70, 25),
    # papers.py: a training step of every other paper
    **dict.fromkeys(("lightningdit", "meanflow", "var", "mar", "scm", "maskgit", "randar", "starflow"), (60, 20)),
    **dict.fromkeys(("ldm", "score-sde", "vdmpp", "vqvae", "add", "controlnet", "supir"), (60, 20)),
    **dict.fromkeys(("ldm-openmoji", "sit-openmoji"), (60, 20)),
}
ALL = [*TOGETHER, *ALONE]


def limit(name: str) -> float:
    return (TOGETHER.get(name) or ALONE[name])[0]


def cores(name: str) -> int:
    return TOGETHER[name][1]


def gib(name: str) -> float:
    return WARM_GIB if name.startswith("warm") else GIB


def least(name: str) -> float:
    return ALONE[name][1]


def environment(name: str) -> dict[str, str]:
    more = {"OMP_NUM_THREADS": str(cores(name)) if name in TOGETHER else "8"}
    cache = Path(os.environ.get("VGM_CACHE", tempfile.gettempdir())) / "inductor"
    more["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    if name.startswith(("compile", "warm")):
        more["TORCHINDUCTOR_COMPILE_THREADS"] = "4"
    if name.startswith(("resume", "distributed")):
        more |= DETERMINISTIC
    return more


def facts(dry: bool) -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available() and not dry
    found = {
        "device": torch.cuda.get_device_name(0) if cuda else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "dry_run": dry,
        "date": time.strftime("%Y-%m-%d"),
        "seconds": 0.0,
    }
    if cuda:
        found["memory_gib"] = torch.cuda.get_device_properties(0).total_memory / 2**30
    return found


class Job:
    """One check while it runs. row() is on disk at once, so that what was found survives a crash."""

    def __init__(self, name: str, path: Path, dry: bool):
        import torch

        self.name, self.path, self.dry = name, path, dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.rows: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.began = time.time()
        self.write("running")

    def row(self, what: str, **values: Any) -> None:
        self.rows.append({"what": what, **values})
        self.write("running")
        print(what, values, flush=True)

    def fail(self, sentence: str) -> None:
        self.failures.append(sentence)
        print("FAILED:", sentence, flush=True)

    def left(self) -> float:
        return limit(self.name) - (time.time() - self.began)

    def write(self, status: str, error: str = "") -> None:
        content = {"status": status, "error": error, "rows": self.rows, "failures": self.failures}
        self.path.write_text(json.dumps(content, default=str))


def run(name: str, path: Path, dry: bool, go: Path | None = None) -> int:
    """Run one check and leave its result in `path`; never raises. go: everything is imported, then nothing happens until
    this file is there."""
    if go is not None:
        wait_for(go)
    job = Job(name, path, dry)
    try:
        family, _, part = name.partition("-")
        check, own = (CHECKS[family], [part]) if family in ("resume", "warm", "compile") else (CHECKS[name], [])
        with scratch(), quiet():
            check(job, *own)
    except BaseException as e:
        traceback.print_exc()
        job.write("failed", sentence(e))
        return 1
    job.write("failed" if job.failures else "ok", "; ".join(job.failures)[:600])
    return 0


def wait_for(go: Path) -> None:
    import torch._inductor.compile_fx  # noqa: F401

    import vgm_cli.engine.evaluate.run
    import vgm_cli.engine.train.loop  # noqa: F401

    _checks()
    parent = os.getppid()
    while not go.exists():
        time.sleep(0.01)
        if os.getppid() != parent:
            sys.exit(1)  # nobody is left to give the word


def sentence(e: BaseException) -> str:
    text = str(e).strip().splitlines()
    return f"{type(e).__name__}: {text[0] if text else ''}"[:300]


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """vgm's own lines go to the log only when something is wrong."""
    from vgm_cli.ui import ui

    before, ui.quiet = ui.quiet, True
    try:
        yield
    finally:
        ui.quiet = before


def exact() -> None:
    """fp32 means fp32: no tf32 anywhere."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -- recipes small enough for a check -----------------------------------------------------------------------------------


def tiny(dry: bool = False) -> list[str]:
    """Every recipe that trains on the shipped digits, or is a small first stage for them."""
    from vgm_cli import recipe as recipes

    names = [n for n in sorted(recipes.shipped()) if n.split("/")[1].startswith(("mnist", "small"))]
    return ["sit/mnist"] if dry else names


def different(names: list[str]) -> list[str]:
    """Those that differ in their networks or in the objective's name."""
    found = {}
    for name in names:
        config = load(name).config
        kind = config.get("model"), config["objective"].get("name"), config.get("roles")
        found.setdefault(json.dumps(kind, sort_keys=True, default=str), name)
    return list(found.values())


def load(name: str, *more: str) -> Any:
    from vgm_cli import recipe as recipes

    return recipes.load(name, None, list(more))


def digits(folder: Path, n: int = 48) -> Path:
    """The first digits as a data set that is read and encoded in no time."""
    import numpy as np

    from vgm_cli.data import open_dataset

    path = folder / f"digits-{n}.npz"
    if not path.exists():
        found = open_dataset("mnist5k").gather(range(0, 5000, 5000 // n))
        np.savez(path, images=found["x"].permute(0, 2, 3, 1).numpy(), labels=found["label"].numpy())
    return path


def short(name: str, steps: int, *more: str) -> Any:
    """A tiny recipe, cut to a few steps on a few digits, in fp32 and uncompiled unless `more` says otherwise."""
    batch = 24 if name.startswith("flow-grpo") else 8
    own = [
        f"train.steps={steps}",
        f"train.batch_size={batch}",
        "train.log_every=1",
        f"train.save_every={steps}",
        "train.preview_n=0",
        "train.precision=fp32",
        "train.compile=off",
        f"data.path={digits(Path.cwd())}",
    ]
    return load(name, *own, *more)


def train(recipe: Any, out: Path, **options: Any) -> Any:
    """As `vgm train` does it; where pairs of a teacher are asked for, it learns from random ones."""
    from vgm_cli.engine.train import loop as trainer

    roles = {"pairs": some_pairs(recipe)} if "pairs" in recipe.roles() else None
    return trainer.train(recipe, out, quiet_end=True, track="none", roles=roles, **options)


def some_pairs(recipe: Any, n: int = 16) -> dict[str, Any]:
    import torch

    from vgm_cli.engine import build

    facts = build.plan_facts(recipe)[0]
    g = torch.Generator().manual_seed(4)
    pairs = {k: torch.randn(n, *facts.sample_shape, generator=g) for k in ("z", "x")}
    return pairs | ({"y": torch.arange(n) % facts.num_classes} if facts.num_classes else {})


def built(name: str, device: Any) -> tuple[Any, Any, Any]:
    """(recipe, built, facts) with weights that are not zero, on the device."""
    import torch

    from vgm_cli.engine import build
    from vgm_cli.testing.suites import randomise

    recipe = load(name)
    facts = build.plan_facts(recipe)[0]
    torch.manual_seed(0)
    codec = None
    roles: dict[str, Any] = {"pairs": some_pairs(recipe)} if "pairs" in recipe.roles() else {}
    node = recipe.config.get("codec")
    if node and node.get("weights"):
        from vgm_cli.engine import checkpoint as ckpt

        codec = roles["codec"] = ckpt.read_codec(ckpt.resolve(node["weights"]), device, node.get("output"))
    made = build.build_objective(recipe, facts, roles)
    for network in made.networks.values():
        randomise(network, scale=0.005 if name.startswith("glow") else 0.05)  # a flow's inverse would overflow
        network.to(device)
    made.objective.to(device)
    made.codec = codec
    return recipe, made, facts


def example(facts: Any, n: int, device: Any) -> dict[str, Any]:
    import torch

    g = torch.Generator().manual_seed(2)
    batch: dict[str, Any] = {"index": torch.arange(n)}
    if facts.vocab_size:
        batch["tokens"] = torch.randint(facts.vocab_size, (n, *facts.sample_shape), generator=g)
    else:
        batch["x"] = torch.randn(n, *facts.sample_shape, generator=g).clamp(-1, 1)
    if facts.num_classes:
        batch["label"] = torch.arange(n) % facts.num_classes
        batch["cond"] = {"y": batch["label"].to(device)}
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def each(job: Job, names: list[str], check: Callable[[str], None]) -> None:
    """check(name) for every recipe; one that fails is told and the others go on."""
    for name in names:
        if job.left() < 5 and not job.dry:
            job.fail(f"no time left for {name} and what follows")
            return
        try:
            check(name)
        except Exception as e:
            traceback.print_exc()
            job.fail(f"{name}: {sentence(e)}")
        free()


# -- right ------------------------------------------------------------------------------------------------------------


def golden(job: Job) -> None:
    """The golden cases on the card in fp32, with the tolerances of the CPU."""
    import subprocess
    from importlib import metadata, util

    files = [str(p) for p in sorted((ROOT / "tests/plugins").glob("test_*.py"))]
    files += [str(ROOT / "tests/host" / f"test_{n}_golden.py") for n in ("samplers", "diffusionflow")]
    files = [str(ROOT / "tests/plugins/test_sit.py")] if job.dry else files
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "-k", "golden", "--tb=line", "-rN", "-o", "addopts="]
    if not any(e.name == "vgm" for e in metadata.entry_points(group="pytest11")):
        options += ["-p", "vgm_cli.testing.pytest_plugin"]
    if util.find_spec("xdist") and not job.dry:
        options += ["-n", str(cores("golden"))]
    options += ["--golden-device", job.device.type, f"--junitxml={Path.cwd() / 'golden.xml'}"]
    if not util.find_spec("pytest_timeout"):
        options += ["-o", "timeout=0", "-W", "ignore::pytest.PytestConfigWarning"]
    found = subprocess.run([sys.executable, "-m", "pytest", *options, *files], cwd=ROOT, capture_output=True, text=True)
    print(found.stdout[-20_000:], found.stderr[-5_000:])
    import xml.etree.ElementTree as tree

    root = tree.parse("golden.xml").getroot()
    cases = [c for c in root.iter("testcase") if "[" in (c.get("name") or "")]
    bad = {}
    for c in cases:
        problem = next((k for k in c if k.tag in ("failure", "error")), None)
        if problem is not None:
            key = f"{(c.get('classname') or '').rpartition('.')[2].removeprefix('test_')}/{c.get('name')}"
            bad[key] = (problem.get("message") or "").splitlines()[0][:160]
    skipped = sum(any(k.tag == "skipped" for k in c) for c in cases)
    job.row("golden cases", run=len(cases) - skipped, right=len(cases) - skipped - len(bad), wrong=len(bad))
    for key, why in bad.items():
        job.row(f"wrong: {key}", why=why)
    if bad or not cases:
        job.fail(f"{len(bad)} of {len(cases)} golden cases differ")


def networks(job: Job) -> None:
    """Every tiny recipe's networks under bf16 autocast against fp32, without dropout, whose draws depend on the dtype,
    and with the codes of fp32: a latent between two codes takes either."""
    import torch
    from torch import nn

    from vgm_cli.api import Step

    exact()

    def one(name: str) -> None:
        _, made, facts = built(name, job.device)
        batch = example(facts, 24 if name.startswith("flow-grpo") else 8, job.device)
        codes: list[Any] = []

        def forward(bf16: bool) -> dict[str, Any]:
            kept: dict[str, list[Any]] = {role: [] for role in made.networks}  # of whole networks
            inner: dict[str, list[Any]] = {role: [] for role in made.networks}  # for those whose forward is not called
            again = iter(list(codes))

            def keep(into: list[Any], output: Any) -> None:
                into += [t for t in tensors(output) if t.is_floating_point() and t.numel() >= 8]

            def fixed(output: Any) -> Any:
                if bf16:
                    return next(again)
                codes.append(output)
                return None

            hooks = []
            for role, network in made.networks.items():
                network.eval()
                for m in network.modules():
                    into = (kept if m is network else inner)[role]
                    hooks.append(m.register_forward_hook(lambda m, i, o, into=into: keep(into, o)))
                if isinstance(quantize := getattr(network, "quantize", None), nn.Module):
                    hooks.append(quantize.register_forward_hook(lambda m, i, o: fixed(o)))
            torch.manual_seed(0)
            step = Step(3, device=job.device)
            with torch.no_grad(), torch.autocast(job.device.type, torch.bfloat16, enabled=bf16):
                made.objective.prepare(batch, step)
                part = next(iter(made.objective.experience(batch, step)))
            with torch.autocast(job.device.type, torch.bfloat16, enabled=bf16):
                for phase in made.objective.phases():
                    made.objective.loss(phase.name, part, step)
            for hook in hooks:
                hook.remove()
            return {r: kept[r][0] if kept[r] else inner[r][-1] for r in kept if kept[r] or inner[r]}

        want, got = forward(False), forward(True)
        away = {r: ((got[r].double() - t.double()).norm() / t.double().norm()).item() for r, t in want.items()}
        job.row(name, **away)
        if "model" not in away:
            job.fail(f"{name}: the network was not seen")
        for role, error in away.items():
            if not error < 0.1:
                job.fail(f"{name}: the {role} is {error:.2g} away from fp32 in bf16")

    each(job, tiny(job.dry), one)


def tensors(value: Any) -> list[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        return [value.detach()]
    return [t for v in value for t in tensors(v)] if isinstance(value, (tuple, list)) else []


def sampling(job: Job) -> None:
    """The same weights and seeds on the CPU and on the card: how far apart are the samples?"""
    import torch

    from vgm_cli.api import Request, Step, generators, seed_of
    from vgm_cli.engine import checkpoint as ckpt
    from vgm_cli.registry import registry

    exact()

    def one(name: str) -> None:
        recipe, made, facts = built(name, "cpu")
        if not recipe.config.get("sampler"):
            return
        with torch.no_grad():
            made.objective.prepare(example(facts, 24, "cpu"), Step(0))  # a flow without it overflows
        found = {}
        for device in dict.fromkeys(("cpu", job.device.type)):
            network = made.networks["model"].eval().to(device)
            if made.codec is not None:
                made.codec.to(device) if hasattr(made.codec, "to") else made.codec.codec.to(device)
            view = ckpt.build_view(network, made.objective.view())
            n = 4
            y = {"y": torch.arange(n, device=device) % facts.num_classes} if facts.num_classes else {}
            request = Request(
                shape=facts.sample_shape,
                generators=generators(seed_of("sample", 0, i) for i in range(n)),
                cond=y,
                steps=8,
                guidance_scale=recipe.config.get("guidance_scale") if y else None,
                device=torch.device(device),
                codec=made.codec,
            )
            began = time.time()
            with torch.no_grad():
                found[device] = registry().build("sampler", dict(recipe.config["sampler"]))(view, request)
            found[device + " seconds"] = time.time() - began
        a, b = found["cpu"], found[job.device.type]
        if b.device.type != job.device.type:
            job.fail(f"{name}: the samples are on {b.device}")
        b = b.cpu()
        if not a.is_floating_point():
            job.row(name, equal_tokens=(a == b).double().mean().item())
            return
        scale = a.double().abs().max().item()
        job.row(name, largest_difference=(a.double() - b.double()).abs().max().item(), largest_value=scale)
        if not torch.isfinite(b).all():
            job.fail(f"{name}: samples are not finite")

    each(job, tiny(job.dry), one)


def resume(job: Job, part: str) -> None:
    """k + k steps with a resume in between against 2k, bit for bit, under deterministic algorithms."""
    import torch

    from vgm_cli.engine import checkpoint as ckpt

    def one(name: str) -> None:
        began = time.time()
        torch.use_deterministic_algorithms(True, warn_only=True)
        folder = Path(tempfile.mkdtemp(dir=Path.cwd()))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            recipe = short(name, 4, "train.save_every=2", "train.keep=5")
            train(recipe, folder / "whole")
            train(recipe, folder / "parts", stop_after=2)
            train(recipe, folder / "parts", resume=True)
        torch.use_deterministic_algorithms(False)
        texts = [str(w.message) for w in seen if "deterministic" in str(w.message)]
        loose = sorted({re.split(r"[ (]", t)[0] for t in texts})
        last = "checkpoints/step-00000004"
        different = []
        for file in sorted((folder / "whole" / last).glob("*.safetensors")):
            a, b = (ckpt.read_tensors(folder / run / last / file.name)[0] for run in ("whole", "parts"))
            different += [f"{file.stem}.{k}" for k in a if not torch.equal(a[k], b[k])]
        values = {"different": len(different)} if different else {}
        job.row(name, exact=not different, seconds=time.time() - began, **values, not_deterministic=loose or "nothing")
        if different and not loose:
            job.fail(f"{name}: {different[0]} differs after a resume")

    each(job, tiny(job.dry)[int(part) :: 1 if job.dry else RESUME_GROUPS], one)


def precision(job: Job) -> None:
    """train.precision and --precision in every kind that the card has; the rates are those of steps under way."""
    import speed
    import torch

    kinds = ["fp32", "bf16"] + (["fp16"] if job.device.type == "cuda" else [])
    for kind in kinds:
        train(short("sit/mnist", 2, f"train.precision={kind}"), Path(kind))
        step = speed.stepping(speed.trainer_of(short("sit/mnist", 1000, f"train.precision={kind}")))
        for _ in range(1 if job.dry else 5):
            step()
        seconds = speed.timed(step, 1 if job.dry else 20)
        job.row(f"train.precision={kind}", images_per_second=8 / seconds, ms=seconds * 1e3)
    for kind in ("fp32", "bf16"):
        code, text = cli("sample", "fp32", "-n", "4", "--precision", kind, "--out", f"{kind}.png", "--steps", "4")
        job.row(f"vgm sample --precision {kind}", exit_code=code)
        if code:
            job.fail(f"vgm sample --precision {kind}: {text.strip()[-200:]}")
    job.row("bf16 is supported", yes=torch.cuda.is_available() and torch.cuda.is_bf16_supported())


# a first stage with a discriminator from the first step on
ADVERSARIAL = (
    "objective.disc_start=0",
    "roles.discriminator={kind: model, name: patchgan, in_channels: 1, n_layers: 1}",
)


def compile_(job: Job, paper: str) -> None:
    """torch.compile of the networks of a paper's tiny recipes: two training steps. Recipes of the same network and
    objective are one."""
    import torch

    if job.dry:  # the script is tried, not the compiler
        original = torch.nn.Module.compile
        torch.nn.Module.compile = lambda self, **k: original(self, backend="eager")  # type: ignore[method-assign]

    def one(name: str, *more: str) -> None:
        began = time.time()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        train(short(name, 2, "train.compile=on", *more), Path(tempfile.mkdtemp(dir=Path.cwd())) / "run")
        counts = torch._dynamo.utils.counters
        breaks = [str(k).splitlines()[0][:80] for k in counts["graph_break"]]
        graphs = counts["stats"].get("unique_graphs", 0)
        job.row(name, seconds=time.time() - began, graphs=graphs, graph_breaks=breaks or "none")

    try:
        names = different([n for n in tiny() if n.split("/")[0] == paper])
        each(job, names, one)
        adversarial = [n for n in names if load(n).config["objective"]["name"] == "autoencoder"]
        each(job, adversarial[:1], lambda name: one(name, *ADVERSARIAL))
    finally:
        if job.dry:
            torch.nn.Module.compile = original  # type: ignore[method-assign]


def cli(*argv: str) -> tuple[int, str]:
    """`vgm ARGV` in this process: (exit code, what it printed)."""
    from vgm_cli.__main__ import run as vgm

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = vgm(list(argv))
    text = out.getvalue()
    print(text)
    return code, text


def memory(job: Job) -> None:
    """Out of memory is one sentence that names what to lower."""
    import torch

    train(short("sit/mnist", 2), Path("run"))
    free()
    tries = {
        "train": (["train", "adm-unet", "--out", "big", "train.batch_size=65536", "train.preview_n=0", "--overwrite"], "batch_size"),
        "sample": (["sample", "run", "-n", "200000", "--batch-size", "200000", "--steps", "2", "--out", "s.npz"], "--batch-size"),
        "evaluate": (["evaluate", "run", "--metrics", "fid", "-n", "200000", "--batch-size", "200000"], "--batch-size"),
    }  # fmt: skip
    if job.dry:  # a CPU has no such error: raise it where the network is called
        from vgm_cli.engine.sample import loop as generate
        from vgm_cli.engine.train import loop as trainer

        def full(*a: Any, **k: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

        before = trainer.update, generate.registry
        trainer.update, generate.registry = full, full  # type: ignore[assignment]
        tries = {
            "train": (["train", "sit", "--out", "big", f"data.path={digits(Path.cwd())}"], "batch_size"),
            "sample": (["sample", "run", "-n", "4", "--steps", "2", "--out", "s.npz"], "--batch-size"),
        }
    else:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(3 * 2**30 / total)
    try:
        for verb, (argv, want) in tries.items():
            code, text = cli(*argv)
            said = [line for line in text.splitlines() if "memory" in line or want in line]
            job.row(f"vgm {verb} out of memory", exit_code=code, says=" / ".join(s.strip() for s in said)[:200])
            if code != 1 or want not in text or "memory" not in text or "Traceback" in text:
                job.fail(f"{verb}: exit code {code}, {text.strip()[-200:]!r}")
            free()
    finally:
        if job.dry:
            trainer.update, generate.registry = before
        else:
            torch.cuda.set_per_process_memory_fraction(1.0)


def distributed(job: Job) -> None:
    """DDP and FSDP2 in one process: train, save, resume, sample; the state is that of a run without them."""
    import torch
    from accelerate.state import AcceleratorState

    from vgm_cli.engine import checkpoint as ckpt

    torch.use_deterministic_algorithms(True, warn_only=True)
    last = Path("checkpoints/step-00000004")
    job_of = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}

    def under(kind: str) -> None:
        AcceleratorState._reset_state(True)
        more = ["train.fsdp=true"] if kind == "fsdp" else []
        if kind != "plain":
            os.environ.update(job_of, MASTER_PORT=str(free_port()))
        recipe = short("sit/mnist", 4, "train.save_every=2", "train.keep=5", *more)
        try:
            train(recipe, Path(kind), stop_after=2)
            train(recipe, Path(kind), resume=True)
            used = "process group" if torch.distributed.is_initialized() else "no process group"
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            AcceleratorState._reset_state(True)
            for key in (*job_of, "MASTER_PORT"):
                os.environ.pop(key, None)
        worst, different = 0.0, []
        for file in sorted((Path("plain") / last).glob("*.safetensors")):
            a, b = (ckpt.read_tensors(Path(run) / last / file.name)[0] for run in ("plain", kind))
            if a.keys() != b.keys():
                job.fail(f"{kind}: {file.name} holds other tensors")
                continue
            for k in a:
                if not torch.equal(a[k], b[k]):
                    different.append(k)
                    scale = a[k].double().abs().max().clamp_min(1e-12)
                    worst = max(worst, ((a[k].double() - b[k].double()).abs().max() / scale).item())
        code, text = cli("sample", kind, "-n", "4", "--steps", "4", "--out", f"{kind}.npz")
        job.row(f"{kind}: 2 + 2 steps", files=len(list((Path(kind) / last).iterdir())), unequal=len(different),
                largest_relative_difference=worst, sample_exit_code=code, ran_with=used)  # fmt: skip
        if worst > 1e-4:
            job.fail(f"{kind}: {different[0]} is {worst:.2g} away from the plain run's")
        if code:
            job.fail(f"sampling from the {kind} run: {text.strip()[-200:]}")

    each(job, ["plain", "ddp", "fsdp"], under)
    torch.use_deterministic_algorithms(False)


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def demo(job: Job) -> None:
    """`vgm train dit` and its figure, as a user runs them, start-up included."""
    import subprocess

    more = ["train.steps=4", "train.preview_n=0", f"data.path={digits(Path.cwd())}"] if job.dry else []
    if job.dry:
        code, _ = cli("train", "dit", "--out", "run", *more, "--overwrite")
        job.row("vgm train dit", exit_code=code)
        return
    began = time.time()
    vgm = [sys.executable, "-m", "vgm_cli"]
    trained = subprocess.run([*vgm, "train", "dit", "--out", "run", *more], capture_output=True, text=True)
    print(trained.stdout[-2000:], trained.stderr[-6000:])
    seconds = time.time() - began
    log = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    rates = sorted(r["images_per_second"] for r in log if "images_per_second" in r)
    job.row("vgm train dit", exit_code=trained.returncode, seconds=seconds, images_per_second=rates[len(rates) // 2])
    began = time.time()
    figure = subprocess.run(
        [*vgm, "evaluate", "run", "--metrics", "fid,class-accuracy", "-n", "2000", "--json"],
        capture_output=True,
        text=True,
    )
    print(figure.stdout[-4000:], figure.stderr[-4000:])
    line = re.findall(r'"fid[^"]*"[^0-9]{1,40}([0-9.]+)', figure.stdout)
    more_seconds = time.time() - began
    job.row("vgm evaluate --metrics fid", exit_code=figure.returncode, seconds=more_seconds, fid=line[:1])
    job.row("train and figure", seconds=seconds + more_seconds)
    if trained.returncode or figure.returncode:
        job.fail(f"exit codes {trained.returncode}, {figure.returncode}")


def _checks() -> dict[str, Callable[..., None]]:
    import papers
    import speed

    right = {
        "golden": golden,
        "networks": networks,
        "sampling": sampling,
        "resume": resume,
        "precision": precision,
        "compile": compile_,
        "memory": memory,
        "distributed": distributed,
        "demo": demo,
    }
    return {**right, **speed.CHECKS, **papers.CHECKS}


class _Lazy(dict[str, Callable[..., None]]):
    def __missing__(self, key: str) -> Callable[..., None]:
        self.update(_checks())
        return self[key]


CHECKS = _Lazy()
