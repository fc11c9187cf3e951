"""Chooses how the masked sampler samples by default: `python -m dcdd_pico.progressive_serving`.

For existing weights, for example after training the masked sampler anew. Guidance and its ramp, the passes that only
revise and the schedule are chosen one after the other, by the same Frechet joint distances on calibration captions that
choose the decoder's shift (`serving.JointDistance`, with the extra `ruler`), but for the VQ decode's images. The number
of passes and the order are kept. The choice is written into the sampler's config.json, and a calibration fitted to what
it then samples is written beside its folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dcdd_core import registry
from dcdd_core.files import write_text
from dcdd_core.method.progressive import SCHEDULES, ProgressiveOptions
from dcdd_core.models.masked.files import save_sampling

from .build_context import BuildContext, digest, stage_context, stage_parser
from .embedded import PROGRESSIVE, model_paths
from .progressive import progressive_folder
from .reader import SceneReader
from .ruler import TextDetectorRuler
from .serving import GUIDANCES, JointDistance, judges, overall
from .train_calibration import fit_own_calibration

#: Option -> values to try, in this order.
CANDIDATES: Mapping[str, Sequence[Any]] = {
    "guidance": GUIDANCES,
    "ramp": (True, False),
    "revision_passes": (1, 2, 3, 4, 5),
    "schedule": SCHEDULES,
}


def search_sampling(
    start: ProgressiveOptions, distance: Callable[[ProgressiveOptions], float]
) -> dict[ProgressiveOptions, float]:
    """Distances of all options tried: `start`, then each of `CANDIDATES` changed in the best options so far.

    Among equally good options the first one tried counts as the best.
    """
    found = {start: distance(start)}
    for name, values in CANDIDATES.items():
        best = min(found, key=found.__getitem__)
        for value in values:
            options = replace(best, **{name: value})
            if options not in found:
                found[options] = distance(options)
    return found


@torch.no_grad()
def choose_sampling(
    context: BuildContext, weights: Path, networks: Mapping[str, SceneReader | TextDetectorRuler]
) -> ProgressiveOptions:
    """Options of least `overall` distance for the masked sampler in `weights`; they are written as its default.

    The sampler's calibration is then fitted to what it samples with them (`fit_own_calibration`).

    Distances are kept in `progressive-serving.json` in the work folder: an interrupted choice resumes, and one for
    other weights or networks starts anew.

    Args:
        networks: the networks that judge (`serving.judges`).

    Raises:
        ValueError: if a part of the weights is missing.
    """
    folder, path = progressive_folder(weights), context.folder / "progressive-serving.json"
    janus = model_paths(weights)["vlm"]
    vq = registry.sampler_family(janus).load_tokenizer(str(janus), device=context.device, dtype=torch.float32)
    where = {"device": context.device, "dtype": torch.bfloat16}
    sampler = registry.sampler_family(folder).load_sampler(str(folder), **where)
    inputs = [digest(sampler.model), digest(vq.model), context.recipe.choice_scenes, sorted(networks)]
    key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:12]
    held = json.loads(path.read_text("utf-8")) if path.exists() else {}
    measured = held["measured"] if held.get("models") == key else []
    judge = JointDistance(context, networks)

    def distance(options: ProgressiveOptions) -> float:
        said = json.loads(json.dumps(asdict(options)))
        for row in measured:
            if row["options"] == said:
                return overall(row["distances"])
        samples = judge.samples(sampler, options)
        found = judge.of(lambda _, grid: vq.decode_tokens(grid.tokens, grid.grid), samples)
        measured.append({"options": said, "distances": found})
        write_text(path, json.dumps({"models": key, "measured": measured}, indent=1) + "\n")
        print(f"{told(options)}: {overall(found):.4f} {found}", flush=True)
        return overall(found)

    by_options = search_sampling(sampler.sampling, distance)
    chosen = min(by_options, key=by_options.__getitem__)
    save_sampling(folder, chosen)
    fit_own_calibration(weights, PROGRESSIVE, chosen.guidance, device=context.device)
    return chosen


def told(options: ProgressiveOptions) -> str:
    """The options that are chosen here, in words."""
    return ", ".join(f"{name.replace('_', ' ')} {getattr(options, name)}" for name in CANDIDATES)


def main() -> None:
    chosen = stage_parser(__doc__).parse_args()
    context = stage_context(chosen)
    print(f"chosen: {told(choose_sampling(context, chosen.weights, judges(context)))}")


if __name__ == "__main__":
    main()
