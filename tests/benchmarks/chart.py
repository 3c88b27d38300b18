"""The README's picture of `idle_drop`: for each row and each way that a connection ends, the share that failed."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from tests.report import Report, Value

LABEL, BAR, GAP, TOP, WIDTH = 190, 13, 10, 62, 760
SPAN = WIDTH - LABEL - 90
"""Pixels of 100 %."""
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")


def draw(report: Report) -> str:
    """SVG, readable on a light page and on a dark one."""
    rows = report.rows
    names = list(dict.fromkeys(str(row["row"]) for row in rows))
    faults = list(dict.fromkeys(str(row["idle connections end by"]) for row in rows))
    found = {(str(row["row"]), str(row["idle connections end by"])): row for row in rows}
    height = TOP + len(names) * (len(faults) * BAR + GAP) + GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">',
        "<title>Evaluations that failed because an idle connection was dropped</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        '<text x="12" y="20" font-size="14" font-weight="bold" fill="#222222">'
        "Evaluations that failed because an idle connection was dropped</text>",
        *_legend(faults),
    ]
    y = TOP
    for name in names:
        middle = y + len(faults) * BAR / 2 + 4
        weight = "bold" if name.startswith("Proctor") else "normal"
        style = f'text-anchor="end" font-weight="{weight}" fill="#222222"'
        lines.append(f'<text x="{LABEL - 10}" y="{middle:g}" {style}>{escape(name)}</text>')
        for fault, colour in zip(faults, COLOURS, strict=False):
            row = found.get((name, fault))
            if row is not None:
                lines += _bar(y, colour, row)
            y += BAR
        y += GAP
    return "\n".join([*lines, "</svg>", ""])


def _legend(faults: Sequence[str]) -> Iterator[str]:
    x = LABEL
    yield '<text x="12" y="44" fill="#555555">the connection ends by</text>'
    for fault, colour in zip(faults, COLOURS, strict=False):
        yield f'<rect x="{x}" y="35" width="10" height="10" fill="{colour}"/>'
        yield f'<text x="{x + 15}" y="44" fill="#555555">{escape(fault)}</text>'
        x += 40 + 7 * len(fault)


def _bar(y: float, colour: str, row: Mapping[str, Value]) -> Iterator[str]:
    share, n = float(row["failed %"] or 0), int(row["evaluations"] or 0)
    width = max(SPAN * share / 100, 1)
    yield f'<rect x="{LABEL}" y="{y:g}" width="{width:.1f}" height="{BAR - 3}" fill="{colour}"/>'
    yield f'<text x="{LABEL + width + 6:.1f}" y="{y + 9:g}" font-size="10" fill="#555555">{_words(share, n)}</text>'


def _words(share: float, n: int) -> str:
    return f"0 of {n:,}" if share == 0 else f"{share:.1f} %"
