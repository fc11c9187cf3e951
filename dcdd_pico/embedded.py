"""Paths of the embedded models. Imports nothing of the library, so that the ComfyUI nodes can use it too."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
NAME = "pico"
#: In the folder of the embedded models: what makes their decoder unconditional.
PRIOR = "prior.safetensors"
#: There too: the masked sampler of the same image tokenizer.
PROGRESSIVE = "progressive"
#: And a second autoregressive model of these tokens, once it is trained.
LLAMAGEN = "llamagen"


def model_paths(weights: Path | None = None, *, progressive: bool = False) -> dict[str, Path]:
    """The paths of the embedded models, keyed as the fields of `dcdd_core.pipelines.load.ModelPaths`.

    Args:
        weights: their folder; the shipped one by default.
        progressive: the masked sampler in the place of Janus.

    Raises:
        ValueError: if the folder, or that of the masked sampler, is missing.
    """
    weights = weights or WEIGHTS
    if not weights.is_dir():
        raise ValueError(
            f"the embedded models are not at {weights}: install the pack again, or in a git clone "
            "`git checkout -- dcdd_pico/weights`"
        )
    vlm = weights / (PROGRESSIVE if progressive else "janus")
    if progressive and not vlm.is_dir():
        raise ValueError(
            f"the embedded sampler pico progressive is not at {vlm}: install the pack again, or in a git clone "
            f"`git checkout -- dcdd_pico/weights/{PROGRESSIVE}`"
        )
    return {"vlm": vlm, "decoder": weights / "decoder.safetensors", "vae": weights / "vae"}
