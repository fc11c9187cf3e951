"""Captioned scenes, rendered from a seed: the data that the embedded models are trained and evaluated on.

A scene has a main object on a textured ground, often a small accent object and a word in thin letters. Such details
(sharp edges, stripes, dots, thin strokes, small objects on busy grounds) are what a VQ-VAE blurs within a token.
Everything is drawn from signed distances, so that a scene can be rendered at any size with the same antialiasing.

Shapes in comments: S image side in pixels, [S, S] one value per pixel. Coordinates run from 0 to 1, x right and y down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

Split = Literal["test", "calibration", "train"]

#: First seed of each split. A split ends where the next begins, so that no two splits share a scene.
SPLIT_START: dict[str, int] = {"test": 0, "calibration": 1_000_000, "train": 2_000_000}
SPLIT_SIZE = 1_000_000

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.84, 0.15, 0.18),
    "orange": (0.95, 0.53, 0.12),
    "yellow": (0.98, 0.85, 0.22),
    "green": (0.17, 0.58, 0.27),
    "blue": (0.15, 0.36, 0.83),
    "purple": (0.51, 0.22, 0.68),
    "white": (0.97, 0.97, 0.95),
    "black": (0.09, 0.09, 0.11),
}
GROUND_COLOURS: dict[str, tuple[float, float, float]] = {
    "cream": (0.93, 0.87, 0.72),
    "sky": (0.60, 0.79, 0.93),
    "rose": (0.93, 0.69, 0.74),
    "mint": (0.64, 0.86, 0.73),
    "slate": (0.44, 0.49, 0.57),
    "navy": (0.13, 0.19, 0.38),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
TEXTURES = ("plain", "striped", "barred", "hatched", "dotted", "checked")
GROUND_TEXTURES = ("plain", "lined", "woven", "dotted", "wavy")
SIZES = ("small", "large")
PLACES: dict[str, tuple[float, float]] = {
    "at the top left": (0.27, 0.27),
    "at the top": (0.50, 0.27),
    "at the top right": (0.73, 0.27),
    "on the left": (0.27, 0.50),
    "in the centre": (0.50, 0.50),
    "on the right": (0.73, 0.50),
    "at the bottom left": (0.27, 0.73),
    "at the bottom": (0.50, 0.73),
    "at the bottom right": (0.73, 0.73),
}
WRITING_PLACES = ("at the top", "at the bottom")

# Letters as strokes (x0, y0, x1, y1) in a box 2 wide and 3 high, y down.
_LETTERS: tuple[tuple[tuple[float, float, float, float], ...], ...] = (
    ((0, 3, 1, 0), (1, 0, 2, 3), (0.5, 2, 1.5, 2)),  # A
    ((0, 0, 0, 3), (0, 0, 2, 0), (0, 1.5, 1.6, 1.5), (0, 3, 2, 3)),  # E
    ((0, 0, 0, 3), (2, 0, 2, 3), (0, 1.5, 2, 1.5)),  # H
    ((0, 0, 0, 3), (2, 0, 0, 1.6), (0.6, 1.2, 2, 3)),  # K
    ((0, 0, 0, 3), (0, 3, 2, 3)),  # L
    ((0, 3, 0, 0), (0, 0, 2, 3), (2, 3, 2, 0)),  # N
    ((0, 0, 2, 0), (1, 0, 1, 3)),  # T
    ((0, 0, 1, 3), (1, 3, 2, 0)),  # V
    ((0, 0, 2, 3), (2, 0, 0, 3)),  # X
    ((0, 0, 2, 0), (2, 0, 0, 3), (0, 3, 2, 3)),  # Z
)


@dataclass(frozen=True, kw_only=True)
class Accent:
    """The small second object of a scene."""

    colour: str
    shape: str
    place: str


@dataclass(frozen=True, kw_only=True)
class SceneFacts:
    """What a scene shows and its caption says. Everything else (tilt, tone, exact position) is random jitter."""

    shape: str
    colour: str
    texture: str
    size: str
    place: str
    ground_colour: str
    ground_texture: str
    accent: Accent | None = None
    writing: str | None = None

    def caption(self) -> str:
        """The facts as a sentence, such as "a large dotted red star at the top on a woven navy ground with a small
        white ring on the left and writing at the bottom"."""
        text = (
            f"a {self.size} {self.texture} {self.colour} {self.shape} {self.place} "
            f"on a {self.ground_texture} {self.ground_colour} ground"
        )
        extras = []
        if self.accent is not None:
            extras.append(f"a small {self.accent.colour} {self.accent.shape} {self.accent.place}")
        if self.writing is not None:
            extras.append(f"writing {self.writing}")
        return text + (" with " + " and ".join(extras) if extras else "")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One rendered scene.

    Attributes:
        image: [S, S, 3] uint8, sRGB.
        caption: its caption.
        facts: what the caption says, as data.
    """

    image: np.ndarray
    caption: str
    facts: SceneFacts


def vocabulary() -> tuple[str, ...]:
    """All words that captions use, sorted."""
    words = {"a", "on", "ground", "with", "and", "writing"}
    for group in (COLOURS, GROUND_COLOURS, SHAPES, TEXTURES, GROUND_TEXTURES, SIZES, PLACES):
        for entry in group:
            words.update(entry.split())
    return tuple(sorted(words))


def render_scene(split: Split, index: int, *, size: int = 96) -> Scene:
    """Scene number `index` of a split, the same on every machine.

    Args:
        split: "train", "calibration" or "test"; their scenes are disjoint.
        index: 0..999999.
        size: image side in pixels; facts and composition do not depend on it.

    Raises:
        ValueError: for an unknown split, and an index out of range.
    """
    if split not in SPLIT_START:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLIT_START)}")
    if not 0 <= index < SPLIT_SIZE:
        raise ValueError(f"scene index {index} is outside 0..{SPLIT_SIZE - 1}")
    rng = np.random.default_rng(SPLIT_START[split] + index)
    facts = sample_facts(rng)
    return Scene(image=draw(facts, rng, size=size), caption=facts.caption(), facts=facts)


def sample_facts(rng: np.random.Generator) -> SceneFacts:
    """Draws the facts of a scene. The accent keeps its distance from the main object; writing covers neither."""

    def pick(options):
        options = list(options)
        return options[int(rng.integers(len(options)))]

    place = pick(PLACES)
    x, y = PLACES[place]
    far = [name for name, (px, py) in PLACES.items() if abs(px - x) + abs(py - y) > 0.4]
    accent = None
    colour = pick(COLOURS)
    if rng.random() < 0.5:
        accent = Accent(colour=pick(c for c in COLOURS if c != colour), shape=pick(SHAPES), place=pick(far))
    writing = None
    if rng.random() < 0.3:
        free = [w for w in WRITING_PLACES if w not in place and (accent is None or w not in accent.place)]
        writing = pick(free) if free else None
    return SceneFacts(
        shape=pick(SHAPES),
        colour=colour,
        texture=pick(TEXTURES),
        size=pick(SIZES),
        place=place,
        ground_colour=pick(GROUND_COLOURS),
        ground_texture=pick(GROUND_TEXTURES),
        accent=accent,
        writing=writing,
    )


def scene_facts(split: Split, count: int) -> list[SceneFacts]:
    """The facts of the first `count` scenes of a split, without rendering them."""
    return [sample_facts(np.random.default_rng(SPLIT_START[split] + index)) for index in range(count)]


def draw(facts: SceneFacts, rng: np.random.Generator, *, size: int = 96) -> np.ndarray:
    """Renders facts with jitter drawn from `rng`: [size, size, 3] uint8."""
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(centres, centres)  # [S, S]
    pixel = 1.0 / size

    base = _jitter(GROUND_COLOURS[facts.ground_colour], rng)
    angle = rng.uniform(0, 2 * np.pi)
    slope = (np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5)) * rng.uniform(0.0, 0.12)
    image = base[None, None, :] + slope[..., None].astype(np.float32)  # [S, S, 3]
    tone = -0.15 if base.mean() > 0.5 else 0.16
    image = image + (tone * _ground_coverage(facts.ground_texture, x, y, pixel, rng))[..., None]

    if facts.writing is not None:
        ink = np.full(3, 0.1 if base.mean() > 0.4 else 0.95, dtype=np.float32)
        image = _blend(image, ink, _coverage(_lettering(facts.writing, x, y, rng), pixel))

    radius = rng.uniform(0.21, 0.245) if facts.size == "large" else rng.uniform(0.135, 0.155)
    image = _object(image, facts.shape, facts.colour, facts.texture, facts.place, radius, x, y, pixel, rng)
    if facts.accent is not None:
        a = facts.accent
        image = _object(image, a.shape, a.colour, "plain", a.place, rng.uniform(0.065, 0.085), x, y, pixel, rng)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _object(image, shape, colour, texture, place, radius, x, y, pixel, rng):
    """Draws an object over the image: body, texture in a second tone, sometimes a thin outline."""
    cx, cy = PLACES[place]
    cx, cy = cx + rng.uniform(-0.025, 0.025), cy + rng.uniform(-0.025, 0.025)
    tilt = rng.uniform(-0.2, 0.2)
    cos, sin = np.cos(tilt), np.sin(tilt)
    u = (cos * (x - cx) + sin * (y - cy)) / radius
    v = (-sin * (x - cx) + cos * (y - cy)) / radius
    distance = _SHAPES[shape](u.astype(np.float32), v.astype(np.float32)) * radius
    body = _jitter(COLOURS[colour], rng)
    second = body * 0.42 if body.max() > 0.3 else body + 0.55
    pattern = _texture_coverage(texture, x - cx, y - cy, pixel, rng)
    paint = body + (second - body) * pattern[..., None]
    image = _blend(image, paint, _coverage(distance, pixel))
    if rng.random() < 0.4:
        line = np.abs(distance) - 0.008
        image = _blend(image, second.astype(np.float32), _coverage(line, pixel))
    return image


def _blend(image, paint, coverage):
    return image + (paint - image) * coverage[..., None]


def _coverage(distance, pixel):
    """Share of each pixel that lies inside a shape, from its signed distance (negative inside)."""
    return np.clip(0.5 - distance / pixel, 0, 1).astype(np.float32)


def _jitter(colour, rng):
    return np.clip(np.asarray(colour, dtype=np.float32) + rng.uniform(-0.035, 0.035, 3).astype(np.float32), 0, 1)


def _bars(position, period, width):
    """Signed distance to bars of `width`, one every `period` along `position`."""
    return np.abs((position / period) % 1.0 - 0.5) * period - width / 2


def _texture_coverage(texture, x, y, pixel, rng):
    period = rng.uniform(0.088, 0.105)
    if texture == "plain":
        return np.zeros_like(x)
    if texture == "striped":
        return _coverage(_bars(y, period, period * 0.5), pixel)
    if texture == "barred":
        return _coverage(_bars(x, period, period * 0.5), pixel)
    if texture == "hatched":
        return _coverage(_bars((x + y) * np.sqrt(0.5), period, period * 0.4), pixel)
    if texture == "dotted":
        u, v = (x / period) % 1.0 - 0.5, (y / period) % 1.0 - 0.5
        return _coverage((np.hypot(u, v) - 0.3) * period, pixel)
    cell = period * 1.1  # checked
    a, b = _bars(x, 2 * cell, cell), _bars(y, 2 * cell, cell)
    return _coverage(-np.sign(a * b) * np.minimum(np.abs(a), np.abs(b)), pixel)


def _ground_coverage(texture, x, y, pixel, rng):
    period = rng.uniform(0.105, 0.125)
    shift_x, shift_y = rng.uniform(0, period, 2)
    thin = 0.014
    if texture == "plain":
        return np.zeros_like(x)
    if texture == "lined":
        return _coverage(_bars(y + shift_y, period, thin), pixel)
    if texture == "woven":
        return _coverage(np.minimum(_bars(x + shift_x, period, thin), _bars(y + shift_y, period, thin)), pixel)
    if texture == "dotted":
        u, v = ((x + shift_x) / period) % 1.0 - 0.5, ((y + shift_y) / period) % 1.0 - 0.5
        return _coverage((np.hypot(u, v) - 0.17) * period, pixel)
    wave = 0.018 * np.sin(2 * np.pi * (x + shift_x) / (2.2 * period))  # wavy
    return _coverage(_bars(y + shift_y + wave, period, 0.026), pixel)


def _lettering(place, x, y, rng):
    """Signed distance to a word of three to five letters near the upper or lower edge."""
    count = int(rng.integers(3, 6))
    height, half_stroke = 0.105, 0.0075
    width = height * 2 / 3
    pitch = width + 0.045
    left = rng.uniform(0.06, 0.94 - count * pitch + 0.045)
    top = 0.05 if place == "at the top" else 0.95 - height
    distance = np.full_like(x, 1.0)
    for i in range(count):
        for x0, y0, x1, y1 in _LETTERS[int(rng.integers(len(_LETTERS)))]:
            ax, ay = left + i * pitch + x0 / 2 * width, top + y0 / 3 * height
            bx, by = left + i * pitch + x1 / 2 * width, top + y1 / 3 * height
            distance = np.minimum(distance, _segment(x, y, ax, ay, bx, by))
    return distance - half_stroke


def _segment(x, y, ax, ay, bx, by):
    dx, dy = bx - ax, by - ay
    t = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(x - ax - t * dx, y - ay - t * dy)


def _polygon(points: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Signed distance to a closed polygon [P, 2]: nearest edge, sign by even-odd crossings."""

    def distance(u, v):
        nearest = np.full_like(u, np.inf)
        inside = np.zeros(u.shape, dtype=bool)
        for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, axis=0)):
            nearest = np.minimum(nearest, _segment(u, v, ax, ay, bx, by))
            crosses = (ay > v) != (by > v)
            inside ^= crosses & (u < (bx - ax) * (v - ay) / (by - ay + 1e-12) + ax)
        return np.where(inside, -nearest, nearest)

    return distance


def _star_points() -> np.ndarray:
    angles = -np.pi / 2 + np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 1.1, 0.48)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles) + 0.06], axis=1)


def _box(u, v, half_u, half_v):
    du, dv = np.abs(u) - half_u, np.abs(v) - half_v
    return np.hypot(np.maximum(du, 0), np.maximum(dv, 0)) + np.minimum(np.maximum(du, dv), 0)


def _heart(u, v):
    """Two lobes over a wedge; the distance is accurate near the edge only, which is enough for antialiasing."""
    u = np.abs(u)
    lobe = np.hypot(u - 0.45, v + 0.32) - 0.52
    wedge = np.maximum((u * 0.97 + v * 0.80) / np.hypot(0.97, 0.80) - 0.62, -(v + 0.32))
    return np.minimum(lobe, wedge)


_SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda u, v: np.hypot(u, v) - 1.0,
    "square": lambda u, v: _box(u, v, 0.86, 0.86),
    "triangle": _polygon(np.array([(0.0, -1.05), (1.02, 0.78), (-1.02, 0.78)])),
    "star": _polygon(_star_points()),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.76) - 0.26,
    "cross": lambda u, v: np.minimum(_box(u, v, 1.0, 0.36), _box(u, v, 0.36, 1.0)),
    "diamond": _polygon(np.array([(0.0, -1.1), (0.82, 0.0), (0.0, 1.1), (-0.82, 0.0)])),
    "heart": _heart,
}


def scene_pixels(images: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in -1..1."""
    pixels = torch.from_numpy(np.array(images)).to(device)
    return pixels.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1.0)
