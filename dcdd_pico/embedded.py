"""Paths of the embedded models. Imports nothing of the library, so that the ComfyUI nodes can use it too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

WEIGHTS = Path(__file__).parent / "weights"
NAME = "pico"
#: In the folder of the embedded models: what makes their decoder unconditional.
PRIOR = "prior.safetensors"
#: And a small decoder of the latents, which guidance can look through.
CHEAP = "cheap_decoder"
#: There too, the VLMs, which all sample the tokens of Janus' image tokenizer: autoregressive, masked, autoregressive.
JANUS, PROGRESSIVE, LLAMAGEN = "janus", "progressive", "llamagen"
#: What commands call them -> their folder.
VLMS: Mapping[str, str] = MappingProxyType(
    {NAME: JANUS, f"{NAME}-{PROGRESSIVE}": PROGRESSIVE, f"{NAME}-{LLAMAGEN}": LLAMAGEN}
)


def model_paths(weights: Path | None = None, *, vlm: str = JANUS) -> dict[str, Path]:
    """The paths of the embedded models, keyed as the fields of `dcdd_core.pipelines.load.ModelPaths`.

    Args:
        weights: their folder; the shipped one by default.
        vlm: which of them.

    Raises:
        ValueError: if the folder, or that of the VLM, is missing.
    """
    weights = weights or WEIGHTS
    if not weights.is_dir():
        raise ValueError(
            f"the embedded models are not at {weights}: install the pack again, or in a git clone "
            "`git checkout -- dcdd_pico/weights`"
        )
    folder = weights / vlm
    if not folder.is_dir():
        raise ValueError(
            f"the embedded {NAME} {vlm} is not at {folder}: install the pack again, or in a git clone "
            f"`git checkout -- dcdd_pico/weights/{vlm}`"
        )
    return {"vlm": folder, "decoder": weights / "decoder.safetensors", "vae": weights / "vae"}


def calibration_name(vlm: str) -> str:
    """The file of a VLM's own calibration. Not in the VLM's folder, where it would be taken for another model."""
    return f"{vlm}-calibration.safetensors"


def own_calibration(weights: Path | None = None, *, vlm: str) -> Path | None:
    """The calibration that an embedded VLM is served with in place of the one on the decoder's card, Janus'; or None.

    Args:
        weights, vlm: see `model_paths`.
    """
    file = (weights or WEIGHTS) / calibration_name(vlm)
    return file if file.exists() else None
