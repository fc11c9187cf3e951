"""Draws the pack's icon and banner from scenes of the embedded world: `python tools/make_brand.py`.

Both show what the pack does: on the left the grid of tokens, on the right the image that they encode.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dcdd_core.evaluation.figures import save_image  # noqa: E402
from dcdd_pico.scenes import SceneFacts, draw  # noqa: E402

CIRCLE = SceneFacts(
    shape="circle",
    colour="red",
    texture="striped",
    size="large",
    place="in the centre",
    ground_colour="sky",
    ground_texture="wavy",
)
RING = SceneFacts(
    shape="ring",
    colour="yellow",
    texture="dotted",
    size="large",
    place="in the centre",
    ground_colour="navy",
    ground_texture="woven",
)
STAR = SceneFacts(
    shape="star",
    colour="purple",
    texture="checked",
    size="large",
    place="in the centre",
    ground_colour="mint",
    ground_texture="lined",
)
PAPER, INK = (250, 249, 246), (24, 24, 28)


def emblem(facts: SceneFacts, side: int, *, tokens: int = 12, seed: int = 7) -> Image.Image:
    """The middle of a scene, with the left half as its token grid."""
    whole = Image.fromarray(draw(facts, np.random.default_rng(seed), size=round(1.7 * side)))
    edge = (whole.width - side) // 2
    fine = whole.crop((edge, edge, edge + side, edge + side))
    coarse = fine.resize((tokens, tokens), Image.Resampling.BOX).resize((side, side), Image.Resampling.NEAREST)
    lines = ImageDraw.Draw(coarse)
    for k in range(1, tokens):
        at = round(k * side / tokens)
        lines.line((at, 0, at, side), fill=PAPER)
        lines.line((0, at, side, at), fill=PAPER)
    fine.paste(coarse.crop((0, 0, side // 2, side)), (0, 0))
    return fine


def banner(width: int = 1680, height: int = 720) -> Image.Image:
    """Three emblems and the name, 21:9."""
    sheet = Image.new("RGB", (width, height), PAPER)
    side, gap = height // 2, height // 14
    left = (width - 3 * side - 2 * gap) // 2
    for k, facts in enumerate((STAR, CIRCLE, RING)):
        sheet.paste(emblem(facts, side, seed=3 + k), (left + k * (side + gap), gap + gap // 2))
    pen = ImageDraw.Draw(sheet)
    for text, size, top in (
        ("ComfyUI-DCDD", height // 8, 0.645),
        ("images from full token distributions, not only from the sampled tokens", height // 24, 0.82),
    ):
        font = ImageFont.load_default(size=size)
        pen.text(((width - font.getlength(text)) / 2, height * top), text, fill=INK, font=font)
    return sheet


if __name__ == "__main__":
    save_image(emblem(STAR, 396, seed=3), ROOT / "web" / "icon.png")
    save_image(banner(), ROOT / "web" / "banner.png")
