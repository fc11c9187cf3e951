"""A second metric network, pretrained on real images by others: PP-OCRv6's text detector, as `rapidocr` ships it.

The scene reader was trained on scenes like those it measures. This network had no part in any training; it helps to
choose how the decoder is served, on other captions than those measured (`serving`). Its weights (PaddleOCR's,
Apache-2.0) are inside rapidocr's wheel and are not copied here.

Shapes: B batch, C channels, S image side in pixels.
"""

from __future__ import annotations

import hashlib
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F

_MODEL = "models/PP-OCRv6_det_small.onnx"
_SHA256 = "090f04abcd9d9a7498bc4ebf677e4cb9bdce1fe4197ddb7e529f1ef44e1ff94f"
#: Outputs at which the backbone's stages end, at 1/4, 1/8 and 1/16 of the side.
_STAGES = ("Add.33", "Add.65", "Add.121")
#: Of its input in 0..1, as in its training (PaddleOCR, configs/det/PP-OCRv6): ImageNet's, in the order red, green,
#: blue, though it reads blue, green, red.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_EXTRA = "pip install 'dcdd[ruler]' (from this repository: pip install '.[ruler]')"


class TextDetectorRuler:
    """Frechet features and perceptual distances from a text detector, with the interface of `SceneReader`.

    Args:
        model: the detector's ONNX file.
        threads: CPU threads; 0 for all.

    Raises:
        ValueError: if the optional packages are missing, or the file is not the expected one.
    """

    def __init__(self, model: Path | None = None, *, threads: int = 0):
        model = model or bundled_model()
        content = model.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != _SHA256:
            raise ValueError(
                f"{model} is not the text detector that measures here: its SHA-256 is {found[:12]}..., expected "
                f"{_SHA256[:12]}...; install rapidocr 3.10.0"
            )
        try:
            import onnx
            import onnxruntime
        except ModuleNotFoundError as error:
            raise ValueError(f"the second metric network needs {error.name}: {_EXTRA}") from error
        stages = onnx.utils.Extractor(onnx.load_from_string(content)).extract_model(["x"], list(_STAGES))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._run = partial(
            onnxruntime.InferenceSession(stages.SerializeToString(), options, providers=["CPUExecutionProvider"]).run,
            None,
        )
        self.fingerprint = f"pp-ocrv6-det-small-{found[:12]}-imagenet"

    def stage_maps(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """pixels [B, 3, S, S] in -1..1 -> the three stages' outputs on the CPU, [B, C, S / 4 .. S / 16, ...]."""
        x = (pixels.flip(1).float().cpu() + 1) / 2
        x = (x - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_DEVIATION)[:, None, None]
        return [torch.from_numpy(found) for found in self._run({"x": x.numpy()})]

    def frechet_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Spatial means of the stages: [B, 336]."""
        return torch.cat([found.mean(dim=(2, 3)) for found in self.stage_maps(pixels)], dim=1)

    def perceptual_distance(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """As `SceneReader.perceptual_distance`, over the three stages: [B], 0 for equal images."""
        total = torch.zeros(len(first))
        for a, b in zip(self.stage_maps(first), self.stage_maps(second)):
            total = total + (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(dim=1).mean(dim=(1, 2))
        return total


def bundled_model() -> Path:
    """The detector's file within the installed rapidocr, which is not imported.

    Raises:
        ValueError: if rapidocr is not installed, or has no such file.
    """
    found = find_spec("rapidocr")
    if found is None:
        raise ValueError(f"the second metric network lies in the package rapidocr, which is not installed: {_EXTRA}")
    path = Path(found.submodule_search_locations[0]) / _MODEL
    if not path.is_file():
        raise ValueError(f"rapidocr has no {_MODEL}: install rapidocr 3.10.0")
    return path
