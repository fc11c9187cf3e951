"""Fits a calibration: samples a VLM, and fits the tokenizer's proxy logits to its statistics (Eqs. 9-16).

It is the first step of training a decoder. Samples are kept on disk, one file per prompt, so that a stopped run can be
resumed, and are read one at a time. A hundred images of Janus-Pro, 576 x 16384 logits each, take 3.8 GB on disk and
38 MB of memory.

Shapes: B batch, N tokens, K codes, D code dimension.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..method.anchoring import POINT_PASSES, condition_spread, fit_anchor_and_temperature
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
from ..protocols import ImageTokenizer
from ..types import Calibration, Codebook, TokenLogits
from .distributed import Processes
from .sample import Sample

OnPass = Callable[[int, int], None]

#: Neutral prompts on many subjects, one per line, shuffled so that any first part of the list is varied.
PROMPTS = Path(__file__).with_name("calibration_prompts.txt")

_REMEDIES = """\
What to do, most likely cause first:
1. Sample with the settings you will generate with: --guidance and --temperature affect the VLM's entropy most.
2. Give --images that suit the tokenizer, about 100 of the kind that the decoder will be trained on.
3. Use this VLM's own tokenizer: another codebook of the same size has other meanings.
4. Use more prompts and images (--count), if there were only a few."""


@dataclass(frozen=True, kw_only=True)
class _Sampled:
    prompt: str
    seed: int
    file: Path


class KeptSamples:
    """A VLM's samples for prompts, one file of token logits each; iterating reads them one by one, in order.

    Args:
        folder: holds the files; need not exist yet. It belongs to one VLM and one set of sampling options.
        seed: prompt i is sampled with seed + i.
        device: device that logits are moved to when they are read.
    """

    def __init__(self, folder: Path, prompts: Sequence[str], *, seed: int = 0, device: torch.device | str = "cpu"):
        self.folder = folder
        self.device = device
        # Files are named by number and prompt: appended prompts keep the earlier files, changed ones are sampled again.
        names = [hashlib.sha256(prompt.encode()).hexdigest()[:12] for prompt in prompts]
        self._all = [
            _Sampled(prompt=prompt, seed=seed + i, file=folder / f"{i:05}-{names[i]}.safetensors")
            for i, prompt in enumerate(prompts)
        ]

    def __iter__(self) -> Iterator[TokenLogits]:
        """Yields the logits and tokens of one prompt at a time; raises ValueError for a missing file."""
        for one in self._all:
            grid = TokenLogits.load(one.file)
            yield grid.to(self.device)

    @property
    def missing(self) -> int:
        """Number of prompts that have not been sampled yet."""
        return sum(not one.file.exists() for one in self._all)

    def fill(self, sample: Sample, processes: Processes, *, batch: int, bytes_each: int) -> None:
        """Samples the missing prompts, `batch` at a time, and saves each finished batch, so that it can be stopped.

        Args:
            bytes_each: size of one file, in bytes.

        Raises:
            ValueError: before sampling, if the disk does not have enough space, or for a batch size below 1.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        needed, free = self.missing * bytes_each, shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"{self.missing} samples need {needed / 1e9:.1f} GB, but {self.folder} has {free / 1e9:.1f} GB left: "
                "give a folder on another disk with --samples, or take fewer with --count"
            )
        for part in processes.batches(self._all, batch, done=lambda one: one.file.exists(), label="samples"):
            grid = sample([one.prompt for one in part], [one.seed for one in part])
            for i, one in enumerate(part):
                if not one.file.exists():
                    grid.part(i, i + 1).save(one.file)


class Proxies:
    """Proxy logits (Eqs. 9-10) of images of one size; iterating computes them one image at a time.

    Attributes:
        features: one tensor [1, N, D] per image, kept instead of the much larger logits: 18 KB for 576 tokens.

    Args:
        images: pixels [1, 3, H, W] in -1..1, iterated once.

    Raises:
        ValueError: if there are no images.
    """

    def __init__(self, tokenizer: ImageTokenizer, images: Iterable[torch.Tensor]):
        self.tokenizer = tokenizer
        self.features, self._grid = [], (0, 0)
        for pixels in images:
            self.features.append(tokenizer.features(pixels))
            self._grid = tokenizer.grid_of(*pixels.shape[2:])
        if not self.features:
            raise ValueError("got no images; expected about 100 of the kind that the decoder will be trained on")

    def __iter__(self) -> Iterator[TokenLogits]:
        codebook = self.tokenizer.codebook
        for features in self.features:
            logits = proxy_logits(features, codebook)
            yield TokenLogits(
                logits,
                logits.argmax(-1),
                self._grid,
                source="proxy",
                model=self.tokenizer.name,
                codebook=codebook.fingerprint,
            )


def fit_to_samples(
    samples: Iterable[TokenLogits],
    proxies: Proxies,
    *,
    vlm: str,
    guidance: float,
    temperature: float,
    with_anchor: bool = False,
    with_temperature: bool = False,
    on_pass: OnPass | None = None,
) -> Calibration:
    """Fits the calibration of the proxies to a VLM's samples (`method.calibration.fit_calibration`).

    Args:
        samples: iterated more than once.
        vlm, guidance, temperature: how the samples were drawn, recorded in the calibration.
        with_anchor: fit the anchor too (`method.calibration.fit_anchor`).
        with_temperature: fit the anchor and its temperature jointly (`method.anchoring.fit_anchor_and_temperature`).
        on_pass: called several times per pass with (passes done, their approximate total); may raise to stop.
    """
    measured_on = {"vlm": vlm, "guidance": guidance, "temperature": temperature}
    codebook, anchored = proxies.tokenizer.codebook, with_anchor and not with_temperature
    total = PASSES + (POINT_PASSES if with_temperature else 0)
    on_chunk = _counted(on_pass, PASSES, total)
    given = {"anchored": anchored, "on_chunk": on_chunk}
    calibration = _fitted(samples, proxies, proxies.features, codebook, measured_on, **given)
    if with_temperature:
        target = condition_spread(proxies, codebook, calibration)
        last = _counted(on_pass, total, total, first=PASSES)
        calibration = fit_anchor_and_temperature(samples, codebook, target, calibration, on_chunk=last)
    if on_pass is not None:
        on_pass(total, total)
    return calibration


def fit_to(
    proxies: TokenLogits,
    reference: TokenLogits,
    codebook: Codebook,
    *,
    anchored: bool = False,
    on_pass: OnPass | None = None,
) -> Calibration:
    """`fit_to_samples` for logits in memory: fits the calibration of proxy logits to a VLM's logits.

    Args:
        anchored: fit the anchor too.
        on_pass: called several times per pass with (passes over the proxies done, their approximate total); may raise
            to stop.

    Raises:
        ValueError: for logits of the wrong source or of another codebook.
    """
    measured_on = {name: getattr(reference, name) for name in ("guidance", "temperature")} | {"vlm": reference.model}
    features = proxy_features(proxies, codebook)
    given = {"anchored": anchored, "on_chunk": _counted(on_pass, PASSES, PASSES)}
    calibration = _fitted(reference, proxies, features, codebook, measured_on, **given)
    if on_pass is not None:
        on_pass(PASSES, PASSES)
    return calibration


def _counted(on_pass: OnPass | None, last: int, total: int, *, first: int = 0) -> Callable[[int], None] | None:
    """An `on_chunk` that reports passes from `first` on, below `last`, of `total`."""
    return None if on_pass is None else lambda passes: on_pass(min(first + passes, last - 1), total)


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
    """The columns of the paper's Table 1: the VLM, raw proxies and, given a calibration, calibrated proxies."""
    codebook: Codebook = proxies.tokenizer.codebook
    columns = {vlm: describe_logits(samples, codebook), "raw proxies": describe_logits(proxies, codebook)}
    if calibration is not None:
        columns["calibrated proxies"] = describe_logits(proxies, codebook, calibration)
    return columns


def verdict(calibration: Calibration) -> str:
    """Target and achieved statistics (Eq. 12), the parameters, and whether the fit converged; if not, remedies."""
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
            f"NOT converged: the mean entropy is not within {TOLERANCE:g} of the VLM's. A decoder trained with this "
            f"calibration would see distributions that the VLM never gives.\n{_REMEDIES}"
        )
    parameters = (
        f"scale {calibration.scale:.3f} x {calibration.affine_scale:.3f}, smoothing {calibration.smoothing:.4f}, "
        f"anchor {calibration.anchor:.3f}"
    )
    if calibration.anchor_temperature != 1:
        parameters += f" at temperature {calibration.anchor_temperature:.3f}"
    return "\n".join([*rows, parameters, end])
