"""A drawing of lines, dots and words, as SVG or as PNG: the same few shapes, so that both look alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

from smalti.report.files import replacing, write_text

Point = tuple[float, float]
FONT_SIZE = 12.0
_SHARPNESS, _SMOOTHING = 2, 2  # pixels of the PNG for each unit; samples for each pixel


@dataclass(frozen=True)
class Line:
    """Through all points; dashed lines are for what one compares with."""

    points: Sequence[Point]
    colour: str
    width: float = 1.0
    dashed: bool = False


@dataclass(frozen=True)
class Dot:
    """A filled circle, or a ring around white."""

    centre: Point
    radius: float
    colour: str
    ring: bool = False


@dataclass(frozen=True)
class Words:
    """One line of text; `at` is on its baseline, at its start, middle or end."""

    at: Point
    text: str
    colour: str = "#374151"
    anchor: Literal["start", "middle", "end"] = "start"
    size: float = FONT_SIZE
    bold: bool = False


@dataclass(frozen=True)
class Drawing:
    """Shapes on white, later ones on top; colours as #rrggbb."""

    width: int
    height: int
    shapes: Sequence[Line | Dot | Words]

    def write(self, path: Path) -> None:
        """As the ending of `path` says, .svg or .png.

        Raises:
            ValueError: another ending.
            StorageError: the disk is full or refuses.
        """
        if path.suffix.lower() == ".svg":
            write_text(path, self.svg())
        elif path.suffix.lower() == ".png":
            with replacing(path) as temporary:
                self.image().save(temporary, format="PNG")
        else:
            raise ValueError(f"{path}: a drawing is written as .svg or .png")

    def svg(self) -> str:
        body = "".join(map(_svg, self.shapes))
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" font-family="system-ui, sans-serif"><rect width="100%" height="100%" fill="#fff"/>'
            f"{body}</svg>\n"
        )

    def image(self) -> Image.Image:
        scale = _SHARPNESS * _SMOOTHING
        image = Image.new("RGB", (self.width * scale, self.height * scale), "#ffffff")
        canvas = ImageDraw.Draw(image)
        for shape in self.shapes:
            _paint(canvas, shape, scale)
        return image.resize((self.width * _SHARPNESS, self.height * _SHARPNESS), Image.Resampling.BOX)


def _svg(shape: Line | Dot | Words) -> str:
    if isinstance(shape, Line):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape.points)
        dash = ' stroke-dasharray="6 4"' if shape.dashed else ""
        return (
            f'<polyline fill="none" stroke="{shape.colour}" stroke-width="{shape.width:g}" stroke-linejoin="round"'
            f'{dash} points="{points}"/>'
        )
    if isinstance(shape, Dot):
        (x, y), fill = shape.centre, "#ffffff" if shape.ring else shape.colour
        return (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{shape.radius:g}" fill="{fill}" stroke="{shape.colour}" '
            f'stroke-width="2"/>'
        )
    x, y = shape.at
    weight = ' font-weight="600"' if shape.bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{shape.colour}" font-size="{shape.size:g}" '
        f'text-anchor="{shape.anchor}"{weight}>{escape(shape.text)}</text>'
    )


def _paint(canvas: ImageDraw.ImageDraw, shape: Line | Dot | Words, scale: int) -> None:
    if isinstance(shape, Line):
        points = [(x * scale, y * scale) for x, y in shape.points]
        width = round(shape.width * scale)
        for piece in _dashes(points, 6 * scale, 4 * scale) if shape.dashed else [points]:
            canvas.line(piece, fill=shape.colour, width=width, joint="curve")
    elif isinstance(shape, Dot):
        (x, y), r = shape.centre, shape.radius
        box = [(x - r - 1) * scale, (y - r - 1) * scale, (x + r + 1) * scale, (y + r + 1) * scale]
        canvas.ellipse(box, fill="#ffffff" if shape.ring else shape.colour, outline=shape.colour, width=2 * scale)
    else:
        font = ImageFont.load_default(shape.size * scale)
        where = shape.at[0] * scale, shape.at[1] * scale
        side = {"start": "l", "middle": "m", "end": "r"}[shape.anchor]
        stroke = round(0.3 * scale) if shape.bold else 0
        canvas.text(where, shape.text, fill=shape.colour, font=font, anchor=f"{side}s", stroke_width=stroke)


def _dashes(points: Sequence[Point], dash: float, gap: float) -> list[list[Point]]:
    """Straight pieces of a broken line; each segment starts with a dash."""
    pieces = []
    for (x0, y0), (x1, y1) in pairwise(points):
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        start = 0.0
        while start < length:
            ends = (start / length, min(start + dash, length) / length)
            pieces.append([(x0 + s * (x1 - x0), y0 + s * (y1 - y0)) for s in ends])
            start += dash + gap
    return pieces
