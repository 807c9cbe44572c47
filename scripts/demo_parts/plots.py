"""Plots of the demo's report as inline SVG: no script, no font, no file beside the page.

Each function takes plain numbers and gives a string of SVG that scales with the page. Text is escaped here.
"""

from collections.abc import Mapping, Sequence
from html import escape

INK, SOFT, GRID = "#17252a", "#5b6f73", "#dfe8e6"
COLOURS = {"reference": "#9aa8ab", "local": "#d9a441", "federated": "#0b6e5f", "pooled": "#4b7fb5"}


def colour(name: str) -> str:
    """The colour of an adapter, by its name."""
    return COLOURS.get(name.split(" ")[0], SOFT)


def _text(
    x: float, y: float, words: str, size: int = 14, anchor: str = "start", fill: str = INK, bold: int = 400
) -> str:
    style = f'font-size="{size}" text-anchor="{anchor}" fill="{fill}" font-weight="{bold}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'


def _svg(width: int, height: int, parts: Sequence[str], title: str) -> str:
    head = f'<svg viewBox="0 0 {width} {height}" role="img" xmlns="http://www.w3.org/2000/svg">'
    return head + f"<title>{escape(title)}</title>" + "".join(parts) + "</svg>"


def bars(rows: Sequence[tuple[str, float, float | None, float | None]], title: str) -> str:
    """Horizontal bars in percent with their intervals: (name, percent, low, high)."""
    left, width, step = 150, 760, 44
    scale = (width - left - 70) / 100
    height = step * len(rows) + 34
    parts = []
    for mark in range(0, 101, 20):
        x = left + mark * scale
        parts.append(f'<line x1="{x:.1f}" y1="4" x2="{x:.1f}" y2="{height - 26}" stroke="{GRID}"/>')
        parts.append(_text(x, height - 8, f"{mark} %", 12, "middle", SOFT))
    for number, (name, percent, low, high) in enumerate(rows):
        y = step * number + 10
        bold = 700 if name == "federated" else 400
        parts.append(_text(left - 10, y + 19, name, 14, "end", INK, bold))
        parts.append(
            f'<rect x="{left}" y="{y}" width="{percent * scale:.1f}" height="26" rx="4" fill="{colour(name)}"/>'
        )
        end = percent
        if low is not None and high is not None:
            a, b, middle = left + low * scale, left + high * scale, y + 13
            parts.append(f'<path d="M{a:.1f} {middle}H{b:.1f}M{a:.1f} {y + 7}v12M{b:.1f} {y + 7}v12" stroke="{INK}"/>')
            end = high
        parts.append(_text(left + end * scale + 8, y + 19, f"{percent:.1f}", 15, "start", INK, 700))
    return _svg(width, height, parts, title)


def heat(names: Sequence[str], columns: Sequence[str], values: Mapping[str, Mapping[str, float]], title: str) -> str:
    """A table of percentages as coloured cells: rows are adapters, columns clinics."""
    left, cell, line = 150, 150, 44
    width, height = left + cell * len(columns) + 10, line * len(names) + 34
    parts = [_text(left + cell * (i + 0.5), 20, name, 14, "middle", SOFT) for i, name in enumerate(columns)]
    for r, name in enumerate(names):
        y = 30 + line * r
        parts.append(_text(left - 10, y + 26, name, 14, "end", INK, 700 if name == "federated" else 400))
        for c, column in enumerate(columns):
            value = values[name][column]
            opacity = min(1.0, max(0.06, (value - 25) / 70))
            x = left + cell * c
            parts.append(f'<rect x="{x + 2}" y="{y}" width="{cell - 4}" height="{line - 4}" rx="5" fill="#eef5f3"/>')
            shade = f'fill="#0b6e5f" fill-opacity="{opacity:.2f}"'
            parts.append(f'<rect x="{x + 2}" y="{y}" width="{cell - 4}" height="{line - 4}" rx="5" {shade}/>')
            parts.append(
                _text(x + cell / 2, y + 26, f"{value:.1f} %", 15, "middle", "#fff" if opacity > 0.55 else INK, 700)
            )
    return _svg(width, height, parts, title)


def lines(series: Mapping[str, Sequence[float]], ticks: Sequence[str], title: str) -> str:
    """One line per clinic over the rounds; the vertical axis starts at zero."""
    width, height, left, bottom = 760, 260, 50, 34
    top = max([max(values) for values in series.values() if values] or [1.0]) * 1.1 or 1.0
    step = (width - left - 130) / max(1, len(ticks) - 1)
    parts = []
    for mark in range(5):
        y = height - bottom - (height - bottom - 12) * mark / 4
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{width - 120}" y2="{y:.1f}" stroke="{GRID}"/>')
        parts.append(_text(left - 8, y + 4, f"{top * mark / 4:.2f}", 12, "end", SOFT))
    parts += [_text(left + step * i, height - 10, tick, 12, "middle", SOFT) for i, tick in enumerate(ticks)]
    for number, (name, values) in enumerate(series.items()):
        ink = ("#0b6e5f", "#d9a441", "#4b7fb5", "#a3507a")[number % 4]
        points = [(left + step * i, height - bottom - (height - bottom - 12) * v / top) for i, v in enumerate(values)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{ink}" stroke-width="2.5"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{ink}"/>' for x, y in points]
        parts.append(f'<rect x="{width - 108}" y="{16 + 22 * number}" width="12" height="12" rx="3" fill="{ink}"/>')
        parts.append(_text(width - 90, 27 + 22 * number, name, 13))
    return _svg(width, height, parts, title)
