"""Every check of tests/gpu in a process of its own, within a budget; the table last, OUT/gpu.json, OUT/log.txt.

What only has to be right runs side by side first, what is timed has the card to itself afterwards. A check that fails,
hangs or crashes is recorded with its sentence and takes no other with it; what no longer fits is recorded as such.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import jobs

WIDTH = 118


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("out", type=Path)
    p.add_argument("--budget", type=float, default=470.0, help="seconds for everything")
    p.add_argument("--only", default="", help="comma list of " + ", ".join(jobs.ALL))
    p.add_argument("--dry-run", action="store_true", help="on the CPU, tiny sizes, this process: does the script work?")
    p.add_argument("--table", action="store_true", help="print the figures of OUT/gpu.json as Markdown and stop")
    p.add_argument("--job", help=argparse.SUPPRESS)
    return p.parse_args(argv)


class Report:
    """OUT/gpu.json and OUT/log.txt, complete after every check."""

    def __init__(self, out: Path, facts: dict[str, Any]):
        self.out, self.content = out, {**facts, "checks": {}}
        (out / "log.txt").write_text("")

    def add(self, name: str, result: dict[str, Any], log: str = "") -> None:
        self.content["checks"][name] = result
        (self.out / "gpu.json").write_text(json.dumps(self.content, indent=1, default=str) + "\n")
        with open(self.out / "log.txt", "a") as f:
            f.write(f"{'=' * 20} {name}: {result['status']} in {result['seconds']:.1f} s\n{log}\n")
        print(f"[{time.strftime('%H:%M:%S')}] {name:<14} {result['status']:<8} {result['seconds']:6.1f} s", flush=True)

    def table(self) -> str:
        lines = [f"{self.content['device']}, torch {self.content['torch']}, {self.content['seconds']:.0f} s in all"]
        for name, result in self.content["checks"].items():
            lines.append(
                f"{name:<14} {result['status']:<8} {result['seconds']:6.1f} s  {result.get('error', '')}"[:WIDTH]
            )
            for row in result["rows"]:
                values = "  ".join(f"{k} {shown(v)}" for k, v in row.items() if k != "what")
                lines.append(f"  {row['what']:<34} {values}"[: 2 * WIDTH])
        return "\n".join(lines)


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(v) for v in value[:4]) + (f" and {len(value) - 4} more" if len(value) > 4 else "")
    return str(value)


def markdown(content: dict[str, Any]) -> str:
    """The figures as docs/gpu.md has them: a table for training, one for sampling, the other rows as they are."""
    rows = [r for c in content["checks"].values() for r in c["rows"]]
    named = {r["what"]: r for r in rows}
    train = ["| training | a step | images/s | MFU | memory | plain loop |", "|---|---|---|---|---|---|"]
    for what, r in named.items():
        name, _, kind = what.rpartition(": ")
        if kind == "ours":
            plain = named.get(f"{name}: plain", {})
            how = ", ".join(["compiled"] * bool(r["compiled"]) + ["checkpointed"] * bool(r["checkpointing"]))
            told = f"{name}, {r['batch']} images{', ' + how if how else ''}"
            mfu = f"{100 * r['mfu']:.1f} %" if isinstance(r["mfu"], float) and r["mfu"] == r["mfu"] else "not counted"
            theirs = f"{plain['ms']:.0f} ms" if plain else "not measured"
            train.append(
                f"| {told} | {r['ms']:.0f} ms | {r['images_per_s']:.0f} | {mfu} | {r['gib']:.1f} GiB | {theirs} |"
            )
    sample = ["| sampling | time | plain loop |", "|---|---|---|"]
    sample += [f"| {r['what']} | {r['ours_s']:.2f} s | {r['plain_s']:.2f} s |" for r in rows if "ours_s" in r]
    used = {w for w in named if w.endswith((": ours", ": plain"))} | {r["what"] for r in rows if "ours_s" in r}
    lines = [f"{content['device']}, torch {content['torch']}, {content['cores']} cores, {content['date']}", ""]
    lines += [*train, ""] * (len(train) > 2) + [*sample, ""] * (len(sample) > 2)
    for check, result in content["checks"].items():
        said = f": {result['error']}" if result.get("error") else ""
        lines.append(f"- `{check}`: {result['status']} in {result['seconds']:.0f} s{said}")
        for r in result["rows"]:
            if r["what"] not in used:
                lines.append(f"  - {r['what']}: " + ", ".join(f"{k} {shown(v)}" for k, v in r.items() if k != "what"))
    return "\n".join(lines)


class Child:
    """One check in a process of its own. go: it waits, everything imported, until start()."""

    def __init__(self, name: str, out: Path, folder: Path, limit: float = 0.0, go: bool = False):
        self.name, self.began, self.limit = name, time.time(), limit
        self.go = folder / f"{name}.go" if go else None
        self.result, self.log = folder / f"{name}.json", folder / f"{name}.log"
        self.file = open(self.log, "w")  # open as long as the process
        env = {**os.environ, **jobs.environment(name)}
        env |= {"VGM_GPU_PART": str(self.result), "VGM_GPU_GO": str(self.go or "")}
        command = [sys.executable, __file__, str(out), "--job", name]
        self.process = subprocess.Popen(
            command, stdout=self.file, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )

    def start(self, limit: float) -> None:
        self.began, self.limit = time.time(), limit
        if self.go is not None:
            self.go.touch()

    def stop(self) -> None:
        import signal

        os.killpg(self.process.pid, signal.SIGKILL)  # its own session: itself and what it started
        self.process.wait()

    def done(self) -> bool:
        if self.process.poll() is not None:
            return True
        if time.time() - self.began > self.limit:
            self.stop()
            return True
        return False

    def finish(self, report: Report) -> None:
        self.file.close()
        log = self.log.read_text(errors="replace")
        result = json.loads(self.result.read_text()) if self.result.exists() else {"status": "running", "rows": []}
        if result["status"] == "running":
            code = self.process.returncode
            late = time.time() - self.began >= self.limit
            last = next((line for line in reversed(log.splitlines()) if line.strip()), "")
            result["status"] = "late" if late else "crashed"
            result["error"] = f"stopped after {self.limit:.0f} s" if late else f"exit code {code}: {last[:200]}"
        result["seconds"] = time.time() - self.began
        report.add(self.name, result, log[-60_000:])


def main() -> int:
    args = arguments()
    began = time.time()
    if args.table:
        print(markdown(json.loads((args.out / "gpu.json").read_text())))
        return 0
    if args.job:
        go = os.environ.get("VGM_GPU_GO")
        return jobs.run(args.job, Path(os.environ["VGM_GPU_PART"]), dry=False, go=Path(go) if go else None)
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = [w for w in args.only.split(",") if w] or list(jobs.ALL)
    unknown = set(wanted) - set(jobs.ALL)
    if unknown:
        print(f"error: no such check: {', '.join(sorted(unknown))}; known: {', '.join(jobs.ALL)}", file=sys.stderr)
        return 2
    facts = jobs.facts(args.dry_run)
    if not args.dry_run and facts["device"] == "cpu":
        print("error: torch sees no GPU here; --dry-run tries the script on the CPU", file=sys.stderr)
        return 1
    report = Report(args.out, facts)
    deadline = began + args.budget
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        if args.dry_run:
            for name in wanted:
                start = time.time()
                part = folder / f"{name}.json"
                jobs.run(name, part, dry=True)
                report.add(name, {**json.loads(part.read_text()), "seconds": time.time() - start})
        else:
            together(report, [n for n in wanted if n in jobs.TOGETHER], args.out, folder, deadline)
            alone(report, [n for n in wanted if n in jobs.ALONE], args.out, folder, deadline)
    report.content["seconds"] = time.time() - began
    (args.out / "gpu.json").write_text(json.dumps(report.content, indent=1, default=str) + "\n")
    table = report.table()
    (args.out / "table.txt").write_text(table + "\n")
    print("\n" + table, flush=True)
    statuses = [r["status"] for r in report.content["checks"].values()]
    return 1 if any(s in ("failed", "crashed", "late") for s in statuses) else 0


def together(report: Report, names: list[str], out: Path, folder: Path, deadline: float) -> None:
    """Side by side, as many as there are cores and memory of the card for, each with its own limit."""
    waiting, running = list(names), []
    slots, room = max(2, (os.cpu_count() or 2) - 2), 0.95 * report.content.get("memory_gib", 0.0)

    def fits(name: str) -> bool:
        cores = jobs.cores(name) + sum(jobs.cores(c.name) for c in running)
        memory = jobs.gib(name) + sum(jobs.gib(c.name) for c in running)
        return not running or (cores <= slots and memory <= room)

    while waiting or running:
        while name := next((n for n in waiting if fits(n)), ""):
            waiting.remove(name)
            left = deadline - time.time()
            if left < jobs.LEAST:
                report.add(name, {"status": "no time", "rows": [], "error": "no time left", "seconds": 0.0})
            else:
                running.append(Child(name, out, folder, min(jobs.limit(name), left)))
        for child in [c for c in running if c.done()]:
            running.remove(child)
            child.finish(report)
        time.sleep(0.1)


def alone(report: Report, names: list[str], out: Path, folder: Path, deadline: float) -> None:
    """One after the other; the next one imports what it needs meanwhile."""
    following: list[Child] = []
    for i, name in enumerate(names):
        child = following.pop() if following else Child(name, out, folder, go=True)
        left = deadline - time.time()
        if left < jobs.least(name):
            child.stop()
            child.file.close()
            report.add(name, {"status": "no time", "rows": [], "error": "no time left", "seconds": 0.0})
            continue
        child.start(min(jobs.limit(name), left))
        if i + 1 < len(names):
            following.append(Child(names[i + 1], out, folder, go=True))
        while not child.done():
            time.sleep(0.1)
        child.finish(report)


if __name__ == "__main__":
    sys.exit(main())
