"""Seeded synthetic scenes with exact object masks.

The scenes train and measure the small SAM that the project carries, and serve wherever a picture with
known objects is needed but no data set may be assumed. A scene is painted back to front: a background
with the 1/f spectrum of photographs, then objects of many shapes (blobs, polygons, rings, bodies with
limbs, bare curves), each with one texture of its own. About a third of the objects are partly hidden by
later ones, about a third are painted in nearly the colour of what lies behind them, and many share
their texture with another object elsewhere in the scene.

Everything is drawn in units of the picture's side, so a scene of any size has the same composition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hypersam.scene_shapes import F32, SHAPE_WEIGHTS, SHAPES, Brush

Split = Literal["train", "held_out"]

_STREAM: dict[Split, int] = {"train": 0x7261, "held_out": 0x6865}
MIN_AREA, MAX_AREA = 0.005, 0.40
"""Visible area of a labelled object, as a share of the picture."""
HIDDEN_FROM = 0.10
"""An object counts as partly hidden when at least this share of it is covered."""
_MAX_HIDDEN = 0.65


@dataclass(frozen=True)
class SceneObject:
    """One labelled object: its visible mask (bool, H x W) and how it was painted."""

    mask: NDArray[np.bool_]
    hidden: float
    low_contrast: bool
    thin: bool
    twin: bool

    @property
    def partly_hidden(self) -> bool:
        """Whether a visible share of it is covered by later objects."""
        return self.hidden >= HIDDEN_FROM

    @property
    def area(self) -> float:
        """Visible share of the picture."""
        return float(self.mask.mean())

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(x0, y0, x1, y1) in pixels, upper bounds exclusive."""
        ys, xs = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


@dataclass(frozen=True)
class Scene:
    """A picture (uint8, H x W x 3, RGB) and its labelled objects, back to front."""

    image: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True)
class _Texture:
    kind: str
    colour: F32
    second: F32
    contrast: float
    frequency: float
    angle: float
    field: int
    offset: tuple[int, int]


def make_scene(seed: int, *, split: Split = "held_out", size: int = 256) -> Scene:
    """Paint scene number ``seed`` of a split. The same arguments always give the same scene.

    The splits share neither random streams nor noise fields, so no held-out scene was ever trained on.
    """
    if size < 32:
        raise ValueError(f"a scene needs a side of at least 32 pixels, got {size}")
    rng = np.random.default_rng([_STREAM[split], seed])
    return _Painter(rng, size, _noise_bank(split, size)).paint()


def scenes(first: int, count: int, *, split: Split = "held_out", size: int = 256) -> Iterator[Scene]:
    """Scenes ``first`` to ``first + count - 1`` of a split."""
    for seed in range(first, first + count):
        yield make_scene(seed, split=split, size=size)


@lru_cache(maxsize=4)
def _noise_bank(split: Split, size: int) -> tuple[F32, ...]:
    """Periodic random fields of zero mean and unit variance with power spectra 1/f^a, a from 0 to 4,
    and a few band-passed ones for spots and blotches."""
    rng = np.random.default_rng([_STREAM[split], 0xBA4C])
    fy, fx = np.fft.fftfreq(size)[:, None] * size, np.fft.rfftfreq(size)[None, :] * size
    radius = np.maximum(np.hypot(fy, fx), 1.0)
    filters = [radius**-a for a in (0.0, 0.5, 0.8, 1.0, 1.0, 1.2, 1.2, 1.5, 1.5, 2.0)]
    filters += [np.exp(-(np.log(radius / f) ** 2) / 0.18) for f in (6, 9, 14, 20, 28, 40)]
    bank = []
    for shape in filters * 2:
        field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((size, size))) * shape, s=(size, size))
        field -= field.mean()
        bank.append((field / field.std()).astype(np.float32))
    return tuple(bank)


class _Painter:
    """Paints one scene; holds the canvas, the random stream and what was painted so far."""

    def __init__(self, rng: np.random.Generator, size: int, bank: tuple[F32, ...]) -> None:
        self.rng, self.size, self.bank = rng, size, bank
        self.canvas = np.empty((size, size, 3), np.float32)
        axis = (np.arange(size, dtype=np.float32) + 0.5) / size
        self.y, self.x = np.meshgrid(axis, axis, indexing="ij")

    def paint(self) -> Scene:
        rng = self.rng
        self._background()
        count = int(rng.integers(6, 14))
        areas = np.exp(rng.uniform(math.log(0.006), math.log(0.45), count))
        areas[0] = math.exp(rng.uniform(math.log(0.05), math.log(0.45)))
        # Large ones lie behind as a rule, else they would hide the small ones altogether.
        order = np.argsort(-(np.log(areas) + rng.normal(0, 0.5, count)))
        full: list[NDArray[np.bool_]] = []
        visible: list[NDArray[np.bool_]] = []
        notes: list[tuple[bool, bool, bool]] = []
        textures: list[_Texture] = []
        for area in areas[order]:
            alpha, thin = self._place(float(area), visible)
            mask = alpha > 0.5
            if mask.sum() < 12:
                continue
            texture, twin = self._choose_texture(mask, textures, visible)
            low = bool(rng.random() < 0.36)
            if low:
                texture = self._fade(texture, mask)
            self._composite(alpha, texture)
            visible = [v & ~mask for v in visible]
            full.append(mask)
            visible.append(mask)
            textures.append(texture)
            notes.append((low, thin, twin))
        image = self._expose()
        objects = []
        for whole, seen, (low, thin, twin) in zip(full, visible, notes, strict=True):
            hidden = 1.0 - float(seen.sum()) / float(whole.sum())
            if MIN_AREA <= seen.mean() <= MAX_AREA and hidden <= _MAX_HIDDEN:
                objects.append(SceneObject(seen, hidden, low, thin, twin))
        return Scene(image, tuple(objects))

    # Background and camera

    def _background(self) -> None:
        rng = self.rng
        texture = self._new_texture(contrast=float(rng.uniform(4, 30)))
        everything = (slice(0, self.size), slice(0, self.size))
        self.canvas[:] = self._render(texture, everything)
        for _ in range(int(rng.integers(0, 3))):  # large regions without an outline: sky, ground, wall
            angle, offset = rng.uniform(0, 2 * math.pi), rng.uniform(-0.3, 0.3)
            side = (self.x - 0.5) * math.cos(angle) + (self.y - 0.5) * math.sin(angle) + offset
            side = side + 0.05 * self._field(self._new_texture(5.0), everything)
            soft = np.clip(side * rng.choice([6, 20, 200]) + 0.5, 0, 1)[..., None]
            other = self._render(self._new_texture(float(rng.uniform(3, 18))), everything)
            self.canvas += soft * (other - self.canvas)

    def _expose(self) -> NDArray[np.uint8]:
        """Light falling off, a slight blur, sensor noise, and rounding to bytes."""
        rng = self.rng
        gx, gy = rng.normal(0, 0.18, 2)
        light = np.exp(gx * (self.x - 0.5) + gy * (self.y - 0.5)).astype(np.float32)
        picture = self.canvas * light[..., None]
        if rng.random() < 0.5:
            weight = float(rng.uniform(0.05, 0.25))
            for axis in (0, 1):
                shifted = np.roll(picture, 1, axis) + np.roll(picture, -1, axis)
                picture = (1 - 2 * weight) * picture + weight * shifted
        noise = rng.standard_normal(picture.shape, dtype=np.float32)
        picture += noise * np.float32(rng.uniform(0.5, 7))
        exposed: NDArray[np.uint8] = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
        return exposed

    # Textures

    def _colour(self) -> F32:
        grey = self.rng.uniform(25, 230)
        chroma = self.rng.normal(0, 1, 3) * self.rng.choice([8, 25, 60])
        colour: F32 = np.clip(grey + chroma - chroma.mean(), 5, 250).astype(np.float32)
        return colour

    def _new_texture(self, contrast: float | None = None) -> _Texture:
        rng = self.rng
        kinds = ["flat", "noise", "noise", "noise", "stripes", "checks", "spots", "blend"]
        return _Texture(
            kind=str(rng.choice(kinds)),
            colour=self._colour(),
            second=self._colour(),
            contrast=float(rng.uniform(3, 35)) if contrast is None else contrast,
            frequency=float(np.exp(rng.uniform(math.log(6), math.log(45)))),
            angle=float(rng.uniform(0, math.pi)),
            field=int(rng.integers(len(self.bank))),
            offset=(int(rng.integers(self.size)), int(rng.integers(self.size))),
        )

    def _choose_texture(
        self, mask: NDArray[np.bool_], textures: list[_Texture], visible: list[NDArray[np.bool_]]
    ) -> tuple[_Texture, bool]:
        """A new texture, or that of an earlier object which this one does not touch (a distractor)."""
        if textures and self.rng.random() < 0.45:
            near = _grow(mask, max(2, self.size // 64))
            apart = [t for t, v in zip(textures, visible, strict=True) if not (v & near).any()]
            if apart:
                return apart[int(self.rng.integers(len(apart)))], True
        return self._new_texture(), False

    def _fade(self, texture: _Texture, mask: NDArray[np.bool_]) -> _Texture:
        """The same pattern in nearly the colour that lies behind the object."""
        behind = self.canvas[mask].mean(0)
        shift = self.rng.normal(0, 1, 3) + 1.2 * self.rng.normal()
        shift *= self.rng.uniform(10, 24) / max(float(np.linalg.norm(shift)), 1e-6) * math.sqrt(1.5)
        if ((behind + shift < 0) | (behind + shift > 255)).any():
            shift = -shift
        colour = np.clip(behind + shift, 0, 255).astype(np.float32)
        second = np.clip(colour + (texture.second - texture.colour) * 0.06, 0, 255).astype(np.float32)
        return _Texture(
            texture.kind, colour, second, min(texture.contrast, 8.0),
            texture.frequency, texture.angle, texture.field, texture.offset,
        )  # fmt: skip

    def _field(self, texture: _Texture, where: tuple[slice, slice]) -> F32:
        dy, dx = texture.offset
        rows = (np.arange(where[0].start, where[0].stop) + dy) % self.size
        columns = (np.arange(where[1].start, where[1].stop) + dx) % self.size
        part: F32 = self.bank[texture.field][rows[:, None], columns[None, :]]
        return part

    def _render(self, texture: _Texture, where: tuple[slice, slice]) -> F32:
        """Colours (float32, h x w x 3, 0 to 255) of a texture in a part of the picture."""
        field = self._field(texture, where)
        x, y = self.x[where], self.y[where]
        along = x * math.cos(texture.angle) + y * math.sin(texture.angle)
        across = y * math.cos(texture.angle) - x * math.sin(texture.angle)
        turn = np.float32(2 * math.pi * texture.frequency)
        amount: F32
        match texture.kind:
            case "flat":
                amount = field * np.float32(0.02)
            case "noise":
                amount = field * np.float32(0.5)
            case "stripes":
                amount = np.sin(turn * along + 0.4 * field)
            case "checks":
                amount = np.sign(np.sin(turn * along) * np.sin(turn * across)).astype(np.float32)
            case "spots":
                amount = np.tanh(3 * (field - 0.6))
            case _:
                amount = (2 * along - 1).astype(np.float32) + 0.05 * field
        if texture.kind == "blend":
            mix = np.clip(0.5 + 0.5 * amount, 0, 1)[..., None]
            blended: F32 = texture.colour + mix * (texture.second - texture.colour) * np.float32(0.6)
            return blended
        tint = texture.second - texture.colour
        tint = tint / max(float(np.abs(tint).max()), 1.0)
        direction = (0.6 + 0.4 * tint) * texture.contrast
        return texture.colour + amount[..., None] * direction.astype(np.float32)

    # Objects

    def _composite(self, alpha: F32, texture: _Texture) -> None:
        rng = self.rng
        ys, xs = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
        where = (slice(int(ys[0]), int(ys[-1]) + 1), slice(int(xs[0]), int(xs[-1]) + 1))
        if rng.random() < 0.25:
            self._shadow(alpha)
        paint = self._render(texture, where)
        cover = alpha[where][..., None]
        if rng.random() < 0.5:  # a side turned to the light
            angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(4, 28)
            h, w = cover.shape[:2]
            v, u = np.linspace(-1, 1, h)[:, None], np.linspace(-1, 1, w)[None, :]
            shade = strength * (u * math.cos(angle) + v * math.sin(angle))
            paint = paint + shade[..., None].astype(np.float32)
        if rng.random() < 0.15:  # an outline
            inner = alpha[where]
            rim = np.abs(inner - np.roll(inner, 1, 0)) + np.abs(inner - np.roll(inner, 1, 1))
            paint = paint - np.float32(rng.uniform(15, 50)) * np.clip(rim, 0, 1)[..., None]
        self.canvas[where] += cover * (paint - self.canvas[where])

    def _shadow(self, alpha: F32) -> None:
        reach = max(1, self.size // 42)
        dy, dx = (int(v) for v in self.rng.integers(-reach, reach + 1, 2))
        shadow = _shift(alpha, dy, dx)
        shadow = (shadow + _shift(shadow, 1, 0) + _shift(shadow, 0, 1) + _shift(shadow, 1, 1)) * np.float32(0.25)
        self.canvas *= 1 - np.float32(self.rng.uniform(0.15, 0.45)) * shadow[..., None]

    def _place(self, area: float, visible: list[NDArray[np.bool_]]) -> tuple[F32, bool]:
        """Draw a shape of about ``area`` of the picture, over the edge of an earlier object or apart."""
        rng = self.rng
        radius = math.sqrt(area / math.pi)
        shape, thin = SHAPES[int(rng.choice(len(SHAPES), p=SHAPE_WEIGHTS))]
        taken = np.logical_or.reduce(visible) if visible else np.zeros((self.size,) * 2, bool)
        seen = [v for v in visible if v.mean() >= MIN_AREA]
        if seen and rng.random() < 0.5:
            # Over the edge of an earlier object: its centre about a radius away from a pixel of the rim.
            victim = seen[int(rng.integers(len(seen)))]
            ys, xs = np.nonzero(victim & ~_shrink(victim))
            pick = int(rng.integers(len(ys)))
            angle, distance = rng.uniform(0, 2 * math.pi), radius * rng.uniform(0.2, 0.8)
            cx = xs[pick] / self.size + distance * math.cos(angle)
            cy = ys[pick] / self.size + distance * math.sin(angle)
        else:
            spots = rng.uniform(0.02 + 0.5 * radius, 0.98 - 0.5 * radius, (8, 2))
            cost = [self._crowding(taken, cx, cy, radius) for cx, cy in spots]
            cx, cy = spots[int(np.argmin(cost))]
        draw = Brush(self.size)
        shape(draw, rng, float(cx), float(cy), radius)
        return draw.alpha(), thin

    def _crowding(self, taken: NDArray[np.bool_], cx: float, cy: float, radius: float) -> float:
        lo_y, hi_y = (int(np.clip(v * self.size, 0, self.size)) for v in (cy - radius, cy + radius))
        lo_x, hi_x = (int(np.clip(v * self.size, 0, self.size)) for v in (cx - radius, cx + radius))
        part = taken[lo_y:hi_y:2, lo_x:hi_x:2]
        return float(part.mean()) if part.size else 1.0


def _shift(a: F32, dy: int, dx: int) -> F32:
    """``a`` moved by (dy, dx) with zeros coming in."""
    out = np.zeros_like(a)
    h, w = a.shape
    out[max(dy, 0) : h + min(dy, 0), max(dx, 0) : w + min(dx, 0)] = a[
        max(-dy, 0) : h + min(-dy, 0), max(-dx, 0) : w + min(-dx, 0)
    ]
    return out


def _shrink(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels whose four neighbours are set too."""
    p = np.pad(mask, 1)
    return mask & p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]


def _grow(mask: NDArray[np.bool_], reach: int) -> NDArray[np.bool_]:
    """The mask and all pixels within ``reach`` of it (in rows and columns)."""
    for _ in range(reach):
        p = np.pad(mask, 1)
        mask = mask | p[:-2, 1:-1] | p[2:, 1:-1] | p[1:-1, :-2] | p[1:-1, 2:]
    return mask
