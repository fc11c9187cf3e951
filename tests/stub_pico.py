"""A pico of stubs whose images are known: scenes of one grey each, and decoders that add their own offset to them.

So the scores of a table row are known: PSNR 10 log10(4 / d^2) for an offset d, perceptual distance |d|, Frechet
distance d^2 (the stub's feature is the mean of an image), and SSIM by its formula for constant images. Rows that were
swapped would have each other's numbers.
"""

from types import SimpleNamespace

import numpy as np
import torch

from dcdd_core.protocols import SamplingOptions
from dcdd_core.types import Calibration
from dcdd_pico import sections
from dcdd_pico.reader import FACTS
from dcdd_pico.scenes import scene_facts, scene_pixels
from dcdd_pico.sections import EvalSetup
from tests.tiny import tiny_card

GREYS = np.array([60, 90, 140, 200, 120, 80], dtype=np.uint8)
COUNT = len(GREYS)
SCENES = torch.from_numpy(GREYS).float() / 127.5 - 1
BETA = 7.0
OFFSETS = {
    "vq": 0.1,
    "expected": 0.15,
    "proxy": 0.2,
    "logits": 0.25,
    "anchored": 0.3,
    "tokens": 0.35,
    "discrete": 0.4,
    "lcdm": 0.45,
    "lcdm+lc": 0.5,
    "rerendered": 0.05,
}


class StubReader:
    """Feature, perceptual distance and answers follow from the mean of an image; it answers 0 to every question."""

    def frechet_features(self, images):
        return images.mean((2, 3))[:, :1]

    def perceptual_distance(self, first, second):
        return (first - second).abs().mean((1, 2, 3))

    def __call__(self, images):
        return {name: torch.eye(len(answers))[:1].expand(len(images), -1) for name, answers in FACTS.items()}


class StubTokenizer:
    """Tokens are the images themselves."""

    device, codebook = "cpu", "the codebook"

    def encode(self, pixels):
        return SimpleNamespace(tokens=pixels, grid=(1, 1), source="proxy")

    def decode_tokens(self, tokens, grid):
        return tokens + OFFSETS["vq"]

    def decode_vectors(self, vectors, grid):
        return vectors + OFFSETS["expected"]


class StubSampler:
    """Samples a scene's own image for its caption; refuses another caption, seed or guidance."""

    def sample(self, captions, *, seeds, options):
        facts = scene_facts("test", COUNT)
        assert list(captions) == [facts[k].caption() for k in seeds]
        assert options == SamplingOptions(guidance=3.0)
        return SimpleNamespace(tokens=pixels(list(seeds)), grid=(1, 1), source="vlm")


def pixels(scenes):
    return SCENES[list(scenes)][:, None, None, None].expand(-1, 3, 16, 16)


def stub_setup(monkeypatch, *modules):
    """The setup; `modules` besides `sections` get its `condition_for` too."""
    calibration = Calibration(scale=25.0, anchor=BETA, guidance=3.0)
    card = tiny_card(calibration=calibration, reads="anchored", shift=1.5)
    decoder = SimpleNamespace(card=card, dtype=torch.float32)

    def condition_for(card, grid, codebook):
        assert codebook == "the codebook"
        trained = card.variant if card is not decoder.card and card.base != decoder.card.base else None
        read = trained or ("proxy" if grid.source == "proxy" else card.reads)
        return SimpleNamespace(code_vectors=grid.tokens, pixels=grid.tokens, read=read)

    def decode(_, codec, condition, *, seeds, steps, shift):
        assert codec == "the codec" and shift == 1.5
        assert torch.equal(condition.pixels, pixels(list(seeds)))
        return SimpleNamespace(pixels=condition.pixels + OFFSETS[condition.read] + (steps - 10) / 1000)

    for module in (sections, *modules):
        monkeypatch.setattr(module, "condition_for", condition_for)
    monkeypatch.setattr(sections, "decode", decode)
    # Without a default for the device.
    monkeypatch.setattr(sections, "scene_pixels", lambda images, device: scene_pixels(images, device))
    return EvalSetup(
        pico=SimpleNamespace(tokenizer=StubTokenizer(), sampler=StubSampler(), decoder=decoder, codec="the codec"),
        reader=StubReader(),
        images=np.broadcast_to(GREYS[:, None, None, None], (COUNT, 16, 16, 3)),
        batch=4,
        steps=10,
        guidance=3.0,
    )
