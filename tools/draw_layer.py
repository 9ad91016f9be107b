"""Draws docs/layer.svg, the layer's data flow on one small map. Every cell's colour is computed by the formula.

Standard library alone and numbers that floats hold exactly, so that every machine draws the same bytes.
"""

import argparse
import pathlib
from collections.abc import Callable

CHECKOUT = pathlib.Path(__file__).resolve().parents[1]

SIZE = 8  # positions in each direction of a map
CELL = 13  # pixels
STEP = 204  # from one map to the next
TOP = 20
BRIGHTEST = 4.0  # the value with the full colour
MEAN_SCALE, GAIN, BIAS = 1.0, 1.5, 0.5  # the example's

Map = list[list[float]]


def map_of(value: Callable[[int, int], float]) -> Map:
    return [[value(row, column) for column in range(SIZE)] for row in range(SIZE)]


def colour(value: float) -> str:
    """White at 0, orange above and blue below."""
    red, green, blue = (230, 97, 1) if value > 0 else (33, 102, 172)
    share = min(abs(value) / BRIGHTEST, 1.0)
    return "#" + "".join(f"{round(255 - share * (255 - channel)):02x}" for channel in (red, green, blue))


def draw_map(values: Map, left: int, top: int, name: str) -> list[str]:
    side = SIZE * CELL
    cells = [
        f'<path d="M{left + column * CELL},{top + row * CELL} h{CELL} v{CELL} h-{CELL} z" fill="{colour(value)}"/>'
        for row, line in enumerate(values)
        for column, value in enumerate(line)
    ]
    return [
        *cells,
        f'<rect class="frame" x="{left}" y="{top}" width="{side}" height="{side}"/>',
        f'<text class="name" x="{left + side // 2}" y="{top + side + 22}">{name}</text>',
    ]


def draw_arrow(number: int, above: str, below: str) -> list[str]:
    """The arrow from map `number` to the next, with what happens between them."""
    left, right, y = 24 + number * STEP + SIZE * CELL + 6, 24 + (number + 1) * STEP - 6, TOP + SIZE * CELL // 2
    middle = (left + right) // 2
    return [
        f'<path class="arrow" d="M{left},{y} H{right}"/>',
        f'<text x="{middle}" y="{y - 12}">{above}</text>',
        f'<text x="{middle}" y="{y + 22}">{below}</text>',
    ]


def draw() -> str:
    """Returns the picture."""
    # A level with a bright spot and a dark corner, and a shortcut of stripes.
    x = map_of(lambda row, column: 2.0 + max(0, 3 - abs(row - 2) - abs(column - 3)) - 1.5 * (row + column > 9))
    shortcut = map_of(lambda row, column: 1.0 if (row + column) % 4 < 2 else -0.5)
    mean = sum(map(sum, x)) / SIZE**2
    u = map_of(lambda row, column: x[row][column] - MEAN_SCALE * mean)
    scaled = map_of(lambda row, column: GAIN * u[row][column] + BIAS)
    z = map_of(lambda row, column: scaled[row][column] + shortcut[row][column])
    y = map_of(lambda row, column: max(0.0, z[row][column]))

    width, shortcut_top = 24 + 4 * STEP + SIZE * CELL + 24, TOP + SIZE * CELL + 56
    shortcut_left = 24 + 2 * STEP + SIZE * CELL + (STEP - SIZE * CELL) // 2 - SIZE * CELL // 2
    body = []
    for number, (values, name) in enumerate([(x, "x"), (u, "u"), (scaled, "gain u + bias"), (z, "z"), (y, "y")]):
        body += draw_map(values, 24 + number * STEP, TOP, name)
    body += draw_map(shortcut, shortcut_left, shortcut_top, "shortcut")
    body += draw_arrow(0, "− mean_scale", "× mean(x)")
    body += draw_arrow(1, "× gain", "+ bias")
    body += draw_arrow(2, "+ shortcut", "")
    body += draw_arrow(3, "act", "here: relu")
    middle = shortcut_left + SIZE * CELL // 2
    caption = ["One map, that is one channel of one sample:", "orange is above 0, blue below, white is 0."]
    body += [
        f'<text class="caption" x="24" y="{shortcut_top + 46 + 20 * number}">{line}</text>'
        for number, line in enumerate(caption)
    ]
    body.append(f'<path class="arrow" d="M{middle},{shortcut_top - 6} V{TOP + SIZE * CELL // 2 + 6}"/>')
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {shortcut_top + SIZE * CELL + 36}" '
            'font-family="Helvetica, Arial, sans-serif" font-size="13">',
            "<title>AutomaticGainControl on one map: subtract the mean, scale, add bias and shortcut, activate</title>",
            "<!-- Drawn by tools/draw_layer.py. -->",
            '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0,0 L10,5 L0,10 z" fill="#37474f"/></marker></defs>',
            "<style>",
            ".frame { fill: none; stroke: #37474f }",
            ".arrow { fill: none; stroke: #37474f; stroke-width: 2; marker-end: url(#head) }",
            "text { text-anchor: middle; fill: #263238 } .name { font-weight: bold } .caption { text-anchor: start }",
            "</style>",
            '<rect width="100%" height="100%" fill="#fff"/>',
            *body,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=CHECKOUT / "docs" / "layer.svg", help="%(default)s")
    parser.parse_args().output.write_text(draw(), encoding="utf-8")
