"""Curves over the steps of a run, as SVG for pages and as PNG for papers: one drawing, two pens. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

WIDTH, HEIGHT, LEFT, BOTTOM, RIGHT, TOP = 680, 320, 56, 36, 190, 16
COLOURS = ("#1f6fb4", "#d1662b", "#3d8f4f", "#8a5ab5", "#7a7a7a", "#b8a12f", "#2aa3a3", "#c2468c", "#8b5a2b", "#111111")
GRID, INK = "#dddddd", "#222222"
POINTS = 1000  # of a line; more are thinned out evenly
Curves = Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Stroke:
    """A line through points, in pixels."""

    points: Sequence[tuple[float, float]]
    colour: str
    width: float = 1.0


@dataclass(frozen=True)
class Label:
    """Text on a base line."""

    x: float
    y: float
    text: str
    anchor: Literal["start", "middle", "end"] = "start"


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """Round values between the ends, about five."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return [v for p in powers for v in (10.0**p, 3 * 10.0**p) if low <= v <= high]
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * step) <= 6)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def spans_decades(curves: Curves) -> bool:
    """Whether a logarithmic axis shows more: all values are above 0, and the largest is above 30 times the smallest."""
    ys = [y for points in curves.values() for _, y in points]
    return bool(ys) and min(ys) > 0 and max(ys) > 30 * min(ys)


def drawable(curves: Curves, log: bool) -> dict[str, list[tuple[float, float]]]:
    """The points that can be drawn, evenly thinned out; a curve without any is left out."""
    out = {}
    for name, points in curves.items():
        kept = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log)]
        stride = -(-len(kept) // POINTS) or 1
        if kept:
            out[name] = [*kept[:-1:stride], kept[-1]]
    return out


def drawing(curves: Curves, along: str, log: bool = False) -> list[Stroke | Label]:
    """Curves {name: [(x, y), ...]} with axes and names, none if there is nothing to draw. along: what x is; log:
    logarithmic y, of which only y > 0 is drawn."""
    lines = drawable(curves, log)
    if not lines:
        return []
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    first, last = (min(xs), max(xs)) if min(xs) < max(xs) else (min(xs) - 1, max(xs) + 1)
    low, high = (min(ys) * 0.8, max(ys) * 1.25) if log else (min(0.0, *ys), max(0.0, max(ys) * 1.05))
    high = high if low < high else low + 1
    scale = math.log if log else float

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (x - first) / (last - first)

    def up(y: float) -> float:
        share = (scale(y) - scale(low)) / (scale(high) - scale(low))
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * share

    marks: list[Stroke | Label] = []
    for y in ticks(low, high, log):
        marks.append(Stroke([(LEFT, up(y)), (WIDTH - RIGHT, up(y))], GRID))
        marks.append(Label(LEFT - 6, up(y) + 4, f"{y:g}", "end"))
    marks += [Label(across(x), HEIGHT - BOTTOM + 16, f"{x:g}", "middle") for x in ticks(first, last)]
    marks.append(Label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, along, "middle"))
    for i, (name, points) in enumerate(lines.items()):
        row, colour = TOP + 14 + 18 * i, COLOURS[i % len(COLOURS)]
        marks.append(Stroke([(across(x), up(y)) for x, y in points], colour, 2))
        marks.append(Stroke([(WIDTH - RIGHT + 10, row), (WIDTH - RIGHT + 28, row)], colour, 2))
        marks.append(Label(WIDTH - RIGHT + 34, row + 4, name if len(name) <= 24 else f"…{name[-23:]}"))
    return marks


def svg(curves: Curves, along: str, log: bool = False) -> str:
    """The drawing as an SVG document; "" if there is nothing to draw."""
    marks = drawing(curves, along, log)
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for m in marks:
        if isinstance(m, Label):
            parts.append(f'<text x="{m.x:.1f}" y="{m.y:.1f}" text-anchor="{m.anchor}">{escape(m.text)}</text>')
        else:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in m.points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{m.colour}" stroke-width="{m.width:g}"/>')
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12" fill="{INK}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {box}>', *parts, "</svg>", ""]) if marks else ""


def save_png(curves: Curves, along: str, path: Path, log: bool = False, zoom: int = 2) -> None:
    """The drawing as a PNG of zoom times the size, written atomically. There is something to draw."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    from vgm_cli import images

    fine = 2 * zoom  # drawn at twice the size: Pillow's lines have no soft edges
    picture = Image.new("RGB", (WIDTH * fine, HEIGHT * fine), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(12 * fine)
    for m in drawing(curves, along, log):
        if isinstance(m, Label):
            pen.text(
                (m.x * fine, m.y * fine),
                m.text,
                INK,
                font,
                anchor={"start": "l", "middle": "m", "end": "r"}[m.anchor] + "s",
            )
        else:
            pen.line([(x * fine, y * fine) for x, y in m.points], m.colour, round(m.width * fine), joint="curve")
    images.save_png(np.asarray(picture.reduce(2)), path)
