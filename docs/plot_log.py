"""A picture of what a run logged: python docs/plot_log.py RUN variance,variance_cosine OUT.svg [--log]

Columns of RUN/metrics.jsonl over its steps, as lines with their names; --log for a logarithmic axis.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from vgm_cli.atomic import write_text

WIDTH, HEIGHT, LEFT, BOTTOM, RIGHT, TOP = 640, 320, 56, 36, 150, 16
COLOURS = ("#1f6fb4", "#d1662b", "#3d8f4f", "#8a5ab5", "#7a7a7a")


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round values between the ends, about five."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return [v for p in powers for v in (10.0**p, 3 * 10.0**p) if low <= v <= high]
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * step) <= 6)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def svg(rows: list[dict[str, float]], columns: list[str], log: bool) -> str:
    lines = {c: [(r["step"], r[c]) for r in rows if c in r and (r[c] > 0 or not log)] for c in columns}
    values = [v for points in lines.values() for _, v in points]
    last = max(r["step"] for r in rows)
    low, high = (min(values) * 0.8, max(values) * 1.25) if log else (min(0.0, *values), max(values) * 1.05)
    scale = math.log if log else float

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(value: float) -> float:
        share = (scale(value) - scale(low)) / (scale(high) - scale(low))
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * share

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for v in ticks(low, high, log):
        parts.append(f'<path d="M{LEFT} {y(v):.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>')
    for s in ticks(0, last, False):
        parts.append(f'<text x="{x(s):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{s:g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
    for colour, (name, points) in zip(COLOURS, lines.items()):
        path = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        end = points[-1]
        parts.append(f'<text x="{x(end[0]) + 6:.1f}" y="{y(end[1]) + 4:.1f}" fill="{colour}">{name}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">'
    return "\n".join([head, *parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("columns", help="names in metrics.jsonl, with commas between them")
    parser.add_argument("out", type=Path)
    parser.add_argument("--log", action="store_true", help="logarithmic axis of values")
    args = parser.parse_args()
    rows = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    write_text(args.out, svg(rows, args.columns.split(","), args.log))


if __name__ == "__main__":
    main()
