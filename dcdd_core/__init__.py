"""Distribution-conditioned diffusion decoding: keep the distribution that a VLM predicts for every image token, and
paint the image from it."""

from .types import Calibration, CalibrationStatistics, Codebook, Condition, TokenLogits

__all__ = ["Calibration", "CalibrationStatistics", "Codebook", "Condition", "TokenLogits"]
