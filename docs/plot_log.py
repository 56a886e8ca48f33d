"""A picture of what a run logged: python docs/plot_log.py RUN variance,variance_cosine OUT.svg [--log]

Columns of RUN/metrics.jsonl over its steps, as lines with their names; --log for a logarithmic axis.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from vgm_cli.atomic import write_text

WIDTH, HEIGHT, LEFT, BOTTOM, RIGHT, TOP = 680, 320, 56, 36, 190, 16
COLOURS = ("#1f6fb4", "#d1662b", "#3d8f4f", "#8a5ab5", "#7a7a7a")


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round values between the ends, about five."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return [v for p in powers for v in (10.0**p, 3 * 10.0**p) if low <= v <= high]
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * step) <= 6)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def svg(lines: dict[str, list[tuple[float, float]]], along: str, log: bool = False) -> str:
    """Lines {name: [(x, y), ...]} as a picture; along: what x is; log: logarithmic y, of which only y > 0 is drawn."""
    lines = {name: [(x, y) for x, y in points if y > 0 or not log] for name, points in lines.items()}
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    first, last = min(xs), max(xs)
    low, high = (min(ys) * 0.8, max(ys) * 1.25) if log else (min(0.0, *ys), max(ys) * 1.05)
    scale = math.log if log else float

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (x - first) / (last - first)

    def up(y: float) -> float:
        share = (scale(y) - scale(low)) / (scale(high) - scale(low))
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * share

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for y in ticks(low, high, log):
        parts.append(f'<path d="M{LEFT} {up(y):.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in ticks(first, last, False):
        parts.append(f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{along}</text>')
    for i, (name, points) in enumerate(lines.items()):
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
        row, colour = TOP + 14 + 18 * i, COLOURS[i % len(COLOURS)]
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<path d="M{WIDTH - RIGHT + 10} {row}h18" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 34}" y="{row + 4}">{name}</text>')
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {box}>', *parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("columns", help="names in metrics.jsonl, with commas between them")
    parser.add_argument("out", type=Path)
    parser.add_argument("--log", action="store_true", help="logarithmic axis of values")
    args = parser.parse_args()
    rows = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = {c: [(r["step"], r[c]) for r in rows if c in r] for c in args.columns.split(",")}
    write_text(args.out, svg(lines, "step", args.log))


if __name__ == "__main__":
    main()
