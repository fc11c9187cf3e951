"""Paths of the embedded models. Imports nothing of the library, so that the ComfyUI nodes can use it too."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
NAME = "pico"
#: In the folder of the embedded models: what makes their decoder unconditional.
PRIOR = "prior.safetensors"


def model_paths(weights: Path | None = None) -> dict[str, Path]:
    """The paths of the embedded models, keyed as the fields of `dcdd_core.pipelines.load.ModelPaths`.

    Args:
        weights: their folder; the shipped one by default.

    Raises:
        ValueError: if the folder is missing.
    """
    weights = weights or WEIGHTS
    if not weights.is_dir():
        raise ValueError(
            f"the embedded models are not at {weights}: install the pack again, or in a git clone "
            "`git checkout -- dcdd_pico/weights`"
        )
    return {"vlm": weights / "janus", "decoder": weights / "decoder.safetensors", "vae": weights / "vae"}
