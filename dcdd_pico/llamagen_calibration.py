"""Calibrates pico's LlamaGen: `python -m dcdd_pico.llamagen_calibration`, with the optional `ruler`.

Chooses LlamaGen's guidance on calibration captions (section `llamagen-choice`, measured if needed), and fits the
calibration of the proxies, and the anchor, to LlamaGen's own distributions. Both are written beside its weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from dcdd_core.files import write_text
from dcdd_core.models.checkpoints import read_config
from dcdd_core.pipelines.calibrate import verdict
from dcdd_core.types import Calibration

from .embedded import LLAMAGEN
from .llamagen_sections import chosen_guidance
from .sections import measure, parse
from .train_calibration import fit_own_calibration

_CHOICE = "llamagen-choice"


def fit_llamagen_calibration(weights: Path, guidance: float, *, device: torch.device | str = "cpu") -> Calibration:
    """`fit_own_calibration` for LlamaGen; also writes the guidance into its config.json.

    Raises:
        ValueError: as `fit_own_calibration`.
    """
    calibration, folder = fit_own_calibration(weights, LLAMAGEN, guidance, device=device), weights / LLAMAGEN
    config = read_config(folder) | {"guidance": guidance}
    write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")
    return calibration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--guidance", type=float, help=f"of its samples; by default what {_CHOICE} says")
    chosen, options = parse(parser)
    guidance = chosen.guidance
    if guidance is None:
        guidance = chosen_guidance(measure(options, [_CHOICE])[1].rows[_CHOICE])
    calibration = fit_llamagen_calibration(options.weights, guidance, device=options.device)
    print(f"guidance {guidance:g}\n{verdict(calibration)}")


if __name__ == "__main__":
    main()
