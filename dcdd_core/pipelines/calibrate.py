"""A VLM measured, and a tokenizer's proxies calibrated to it: the first step of a decoder's training (Eqs. 9-16).

What the VLM samples is kept, a file a prompt: a stopped run goes on, and the files are read one at a time, as often as
they are needed. A hundred pictures of Janus-Pro, 576 x 16384 logits each, are 3.8 GB on the disk and 38 MB in memory.

Shapes: B batch, N tokens, K codes, D code dimension.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..evaluation.generation import Sample
from ..method.calibration import (
    PASSES,
    TOLERANCE,
    anchor_statistics,
    fit_anchor,
    fit_calibration,
    proxy_features,
    proxy_logits,
    target_statistics,
)
from ..method.statistics import TokenStatistics, describe_logits
from ..models.vq import VQTokenizer
from ..types import Calibration, Codebook, TokenLogits
from .distributed import Processes

#: Neutral subjects of many kinds, one a line, mixed so that any first part of them is varied.
PROMPTS = Path(__file__).with_name("calibration_prompts.txt")

_REMEDIES = """\
What to do, the likeliest first:
1. Sample as you will serve: --guidance and --temperature decide the VLM's entropy more than anything else.
2. Give --images that the tokenizer is meant for, about 100 of the kind that the decoder will be trained on.
3. Take the tokenizer of this very VLM: another one's codebook has the right size and the wrong meaning.
4. Give more prompts and pictures (--count), if there were only a few."""


@dataclass(frozen=True, kw_only=True)
class _Sampled:
    prompt: str
    seed: int
    file: Path


class KeptSamples:
    """What a VLM samples for prompts, a file of token logits each; iterating reads them one by one, in their order.

    Args:
        folder: of the files; need not exist. It belongs to one VLM and one way of sampling (see `kept.hold_to`).
        seed: the i-th prompt is sampled with seed + i.
        device: where the logits come to.
    """

    def __init__(self, folder: Path, prompts: Sequence[str], *, seed: int = 0, device: torch.device | str = "cpu"):
        self.folder = folder
        self.device = device
        # By number and words: with more prompts the first ones stay, and a prompt that was rewritten is sampled anew.
        names = [hashlib.sha256(prompt.encode()).hexdigest()[:12] for prompt in prompts]
        self._all = [
            _Sampled(prompt=prompt, seed=seed + i, file=folder / f"{i:05}-{names[i]}.safetensors")
            for i, prompt in enumerate(prompts)
        ]

    def __iter__(self) -> Iterator[TokenLogits]:
        """Raises ValueError for a file that is missing."""
        for one in self._all:
            grid = TokenLogits.load(one.file)
            yield replace(grid, logits=grid.logits.to(self.device), tokens=grid.tokens.to(self.device))

    @property
    def missing(self) -> int:
        """How many are still to be sampled."""
        return sum(not one.file.exists() for one in self._all)

    def fill(self, sample: Sample, processes: Processes, *, batch: int, bytes_each: int) -> None:
        """Samples what is not there yet, `batch` prompts at once; what is done is kept even if it is stopped then.

        Args:
            bytes_each: size of one file.

        Raises:
            ValueError: before anything is sampled, if the disk has no room for it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        needed, free = self.missing * bytes_each, shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"{self.missing} samples need {needed / 1e9:.1f} GB and {self.folder} has {free / 1e9:.1f} GB left: "
                "name a folder on another disk with --samples, or take fewer with --count"
            )
        for part in processes.batches(self._all, batch, done=lambda one: one.file.exists(), label="samples"):
            grid = sample([one.prompt for one in part], [one.seed for one in part])
            for i, one in enumerate(part):
                if not one.file.exists():
                    replace(grid, logits=grid.logits[i : i + 1], tokens=grid.tokens[i : i + 1]).save(one.file)


class Proxies:
    """Proxy logits of pictures (Eqs. 9-10) of one size; iterating makes them one picture at a time.

    Attributes:
        features: a tensor [1, N, D] a picture: 18 KB for 576 tokens, so these are kept and the logits are not.

    Args:
        pictures: pixels [1, 3, H, W] in -1..1, read once.

    Raises:
        ValueError: without any picture.
    """

    def __init__(self, vq: VQTokenizer, pictures: Iterable[torch.Tensor]):
        self.vq = vq
        self.features, self._grid = [], (0, 0)
        for pixels in pictures:
            self.features.append(vq.features(pixels))
            self._grid = vq.grid_of(*pixels.shape[2:])
        if not self.features:
            raise ValueError("got no pictures; expected about 100 that the decoder is to be trained on")

    def __iter__(self) -> Iterator[TokenLogits]:
        codebook = self.vq.codebook
        for features in self.features:
            logits = proxy_logits(features, codebook)
            yield TokenLogits(
                logits,
                logits.argmax(-1),
                self._grid,
                source="proxy",
                model=self.vq.name,
                codebook=codebook.fingerprint,
            )


def calibrate_to(
    samples: Iterable[TokenLogits],
    proxies: Proxies,
    *,
    vlm: str,
    guidance: float,
    temperature: float,
    with_anchor: bool = False,
) -> Calibration:
    """The calibration of these proxies to what this VLM sampled, see `method.calibration.fit_calibration`.

    Args:
        samples: can be read more than once.
        with_anchor: fit the anchor too (`method.calibration.fit_anchor`).
    """
    measured_on = {"vlm": vlm, "guidance": guidance, "temperature": temperature}
    return _fitted(samples, proxies, proxies.features, proxies.vq.codebook, measured_on, anchored=with_anchor)


def fit_to(
    proxies: TokenLogits,
    reference: TokenLogits,
    codebook: Codebook,
    *,
    anchored: bool = False,
    on_pass: Callable[[int, int], None] | None = None,
) -> Calibration:
    """`calibrate_to` for logits at hand: fits a calibration of proxy logits to a VLM's.

    Args:
        anchored: fit the anchor too.
        on_pass: called with (passes over the proxies done, about how many there are), several times a pass; may raise
            to stop.

    Raises:
        ValueError: for logits of the wrong source or of another codebook.
    """

    def on_chunk(passes: int) -> None:
        if on_pass is not None:
            on_pass(min(passes, PASSES - 1), PASSES)

    measured_on = {name: getattr(reference, name) for name in ("guidance", "temperature")} | {"vlm": reference.model}
    features = proxy_features(proxies, codebook)
    calibration = _fitted(reference, proxies, features, codebook, measured_on, anchored=anchored, on_chunk=on_chunk)
    if on_pass is not None:
        on_pass(PASSES, PASSES)
    return calibration


def _fitted(
    reference: Iterable[TokenLogits] | TokenLogits,
    proxies: Iterable[TokenLogits] | TokenLogits,
    features: torch.Tensor | Sequence[torch.Tensor],
    codebook: Codebook,
    measured_on: dict[str, Any],
    *,
    anchored: bool,
    on_chunk: Callable[[int], None] | None = None,
) -> Calibration:
    target = target_statistics(reference)
    calibration = fit_calibration(features, codebook, target, on_chunk=on_chunk, **measured_on)
    if not anchored:
        return calibration
    wanted = anchor_statistics(proxies, codebook, calibration)
    last = None if on_chunk is None else lambda _: on_chunk(PASSES)
    return fit_anchor(reference, codebook, wanted, calibration, on_chunk=last)


def compared(
    vlm: str, samples: Iterable[TokenLogits], proxies: Proxies, calibration: Calibration | None
) -> dict[str, TokenStatistics]:
    """The columns of the paper's Table 1: the VLM, raw proxies and, with a calibration, calibrated ones."""
    codebook: Codebook = proxies.vq.codebook
    columns = {vlm: describe_logits(samples, codebook), "raw proxies": describe_logits(proxies, codebook)}
    if calibration is not None:
        columns["calibrated proxies"] = describe_logits(proxies, codebook, calibration)
    return columns


def verdict(calibration: Calibration) -> str:
    """The parameters, achieved beside target (Eq. 12), and whether to go on; if not, what to do."""
    found, target = asdict(calibration.achieved), asdict(calibration.target)
    rows = [f"{'':<24}{'VLM':>10}{'calibrated':>12}{'difference':>12}"]
    rows += [
        f"{label:<24}{target[name]:>10.4f}{found[name]:>12.4f}{found[name] - target[name]:>+12.4f}"
        for name, label in {
            "mean_entropy": "mean entropy",
            "entropy_95": "95th percentile of it",
            "mean_confidence": "mean confidence",
            "confidence_95": "95th percentile of it",
        }.items()
    ]
    if calibration.converged:
        end = f"converged: the mean entropy is within {TOLERANCE:g} of the VLM's"
    else:
        end = (
            f"NOT converged: the mean entropy should come within {TOLERANCE:g} of the VLM's. A decoder trained on this "
            f"reads distributions that the VLM never gives.\n{_REMEDIES}"
        )
    parameters = (
        f"scale {calibration.scale:.3f} x {calibration.affine_scale:.3f}, smoothing {calibration.smoothing:.4f}, "
        f"anchor {calibration.anchor:.3f}"
    )
    return "\n".join([*rows, parameters, end])
