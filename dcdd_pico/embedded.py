"""Paths of the embedded models. Imports nothing from the library, so that the ComfyUI nodes can use it too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

WEIGHTS = Path(__file__).parent / "weights"
NAME = "pico"
#: In the folder of the embedded models: the weights that make their decoder unconditional.
PRIOR = "prior.safetensors"
#: In the same folder: a small decoder of the latents, through which guidance can look.
CHEAP = "cheap_decoder"
#: In the same folder: the VLMs (autoregressive, masked, autoregressive). All sample tokens of Janus' image tokenizer.
JANUS, PROGRESSIVE, LLAMAGEN = "janus", "progressive", "llamagen"
#: Name of a VLM in commands -> its folder.
VLMS: Mapping[str, str] = MappingProxyType(
    {NAME: JANUS, f"{NAME}-{PROGRESSIVE}": PROGRESSIVE, f"{NAME}-{LLAMAGEN}": LLAMAGEN}
)


def model_paths(weights: Path | None = None, *, vlm: str = JANUS) -> dict[str, Path]:
    """The paths of the embedded models, with the fields of `dcdd_core.pipelines.load.ModelPaths` as keys.

    Args:
        weights: their folder; by default the shipped one.
        vlm: folder name of one of the VLMs.

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
    """File name of a VLM's own calibration, beside the VLM's folder: inside, it would be taken for another model."""
    return f"{vlm}-calibration.safetensors"


def own_calibration(weights: Path | None = None, *, vlm: str) -> Path | None:
    """An embedded VLM's own calibration, used instead of Janus' on the decoder's card; None if the VLM has none.

    Args:
        weights, vlm: see `model_paths`.
    """
    file = (weights or WEIGHTS) / calibration_name(vlm)
    return file if file.exists() else None
