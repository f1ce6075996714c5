"""Shapes of the generated scenes: blobs, polygons, rings, bodies with limbs, bare curves, in units of the side."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

F32 = NDArray[np.float32]

_SUPERSAMPLE = 2


class Brush:
    """Filled shapes in unit coordinates, drawn oversampled and averaged down to coverage."""

    def __init__(self, size: int) -> None:
        self.size, self.scale = size, size * _SUPERSAMPLE
        self.picture = Image.new("L", (self.scale, self.scale))
        self.draw = ImageDraw.Draw(self.picture)

    def polygon(self, points: NDArray[np.float64], value: int = 255) -> None:
        self.draw.polygon([(float(x), float(y)) for x, y in points * self.scale], fill=value)

    def stroke(self, points: NDArray[np.float64], width: float, value: int = 255) -> None:
        thick = max(2 * _SUPERSAMPLE, round(width * self.scale))
        path = [(float(x), float(y)) for x, y in points * self.scale]
        self.draw.line(path, fill=value, width=thick, joint="curve")
        for x, y in (path[0], path[-1]):
            r = thick / 2
            self.draw.ellipse((x - r, y - r, x + r, y + r), fill=value)

    def alpha(self) -> F32:
        small = self.picture.reduce(_SUPERSAMPLE)
        return np.asarray(small, np.float32) / np.float32(255)


Shape = Callable[[Brush, np.random.Generator, float, float, float], None]


def _turned(
    u: NDArray[np.float64], v: NDArray[np.float64], rng: np.random.Generator, cx: float, cy: float
) -> NDArray[np.float64]:
    angle = rng.uniform(0, 2 * math.pi)
    c, s = math.cos(angle), math.sin(angle)
    return np.stack([cx + c * u - s * v, cy + s * u + c * v], axis=-1)


def _outline(rng: np.random.Generator, radius: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A superellipse, regular or random polygon, star, or Fourier blob of about pi r^2 area."""
    stretch = math.exp(rng.normal(0, 0.32))
    kind = rng.integers(4)
    if kind == 0:
        t = np.linspace(0, 2 * math.pi, 64, endpoint=False)
        power = float(rng.choice([0.3, 0.7, 1.0, 1.0]))
        u = np.sign(np.cos(t)) * np.abs(np.cos(t)) ** power
        v = np.sign(np.sin(t)) * np.abs(np.sin(t)) ** power
        grow = radius
    elif kind == 1:
        t = np.sort(rng.uniform(0, 2 * math.pi, int(rng.integers(3, 9))))
        t = 0.5 * t + 0.5 * np.linspace(0, 2 * math.pi, len(t), endpoint=False)
        u, v, grow = np.cos(t), np.sin(t), radius * 1.2
    elif kind == 2:
        points = int(rng.integers(4, 9))
        t = np.linspace(0, 2 * math.pi, 2 * points, endpoint=False)
        r = np.where(np.arange(2 * points) % 2, rng.uniform(0.35, 0.75), 1.0)
        u, v, grow = r * np.cos(t), r * np.sin(t), radius * 1.25
    else:
        t = np.linspace(0, 2 * math.pi, 96, endpoint=False)
        r = np.ones_like(t)
        for k in range(2, 7):
            r += rng.normal(0, 0.28) / k * 2 * np.cos(k * t + rng.uniform(0, 2 * math.pi))
        r = np.maximum(r, 0.25)
        u, v, grow = r * np.cos(t), r * np.sin(t), radius
    return u * grow * stretch, v * grow / stretch


def _solid(brush: Brush, rng: np.random.Generator, cx: float, cy: float, radius: float) -> None:
    brush.polygon(_turned(*_outline(rng, radius), rng, cx, cy))


def _holed(brush: Brush, rng: np.random.Generator, cx: float, cy: float, radius: float) -> None:
    grow = radius * 1.15
    _solid(brush, rng, cx, cy, grow)
    for _ in range(int(rng.integers(1, 3))):
        angle, reach = rng.uniform(0, 2 * math.pi), grow * rng.uniform(0, 0.4)
        hole = _outline(rng, grow * rng.uniform(0.3, 0.5))
        centre = cx + reach * math.cos(angle), cy + reach * math.sin(angle)
        brush.polygon(_turned(*hole, rng, *centre), 0)


def _limbed(brush: Brush, rng: np.random.Generator, cx: float, cy: float, radius: float) -> None:
    """A body with thin limbs, like a chair, a spider or a lamp."""
    body = radius * 0.8
    _solid(brush, rng, cx, cy, body)
    for _ in range(int(rng.integers(2, 6))):
        angle, bend = rng.uniform(0, 2 * math.pi), rng.normal(0, 0.5)
        length = body * rng.uniform(1.3, 2.4)
        steps = np.linspace(0, 1, 8)
        heading = angle + bend * steps
        path = np.stack([cx + length * steps * np.cos(heading), cy + length * steps * np.sin(heading)], -1)
        brush.stroke(path, max(0.012, body * rng.uniform(0.12, 0.3)))


def _curve(brush: Brush, rng: np.random.Generator, cx: float, cy: float, radius: float) -> None:
    """A bare curve: a rope, a branch, a cable."""
    area = math.pi * radius**2
    width = max(0.015, math.sqrt(area) * rng.uniform(0.12, 0.3))
    length = min(area / width, 1.2)
    heading = rng.uniform(0, 2 * math.pi) + np.cumsum(rng.normal(0, 1) * 0.08 + rng.normal(0, 0.1, 24))
    path = np.cumsum(np.stack([np.cos(heading), np.sin(heading)], -1) * length / 24, 0)
    path += np.array([cx, cy]) - path.mean(0)
    brush.stroke(path, width)


def _ring(brush: Brush, rng: np.random.Generator, cx: float, cy: float, radius: float) -> None:
    u, v = _outline(rng, radius * 1.3)
    outer = _turned(u, v, rng, cx, cy)
    inner = np.array([cx, cy]) + (outer - np.array([cx, cy])) * rng.uniform(0.5, 0.75)
    brush.polygon(outer)
    brush.polygon(inner, 0)


SHAPES: tuple[tuple[Shape, bool], ...] = (
    (_solid, False), (_holed, False), (_limbed, True), (_curve, True), (_ring, True),
)  # fmt: skip
SHAPE_WEIGHTS = (0.48, 0.12, 0.2, 0.1, 0.1)
