"""`dcdd calibrate`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from .. import registry
from ..evaluation.results_store import hold_to
from ..evaluation.tables import statistics_table
from ..pipelines.calibrate import KeptSamples, Proxies, compared, fit_to_samples, verdict
from ..pipelines.distributed import processes
from ..pipelines.progress import ProgressBar
from . import arguments, common


def add(commands: Any, help: str) -> None:
    """Adds the command."""
    groups = common.model_options, common.sampling_options, common.material_options(count=100)
    command = common.add_command(commands, "calibrate", run, *groups, help=help)
    command.add_argument(
        "--out",
        type=arguments.path,
        default=Path("out/calibration.safetensors"),
        help="file to write (default: out/calibration.safetensors)",
    )
    command.add_argument("--fit-anchor", action="store_true", help="fit the anchor too (beyond the paper)")
    command.add_argument(
        "--fit-anchor-temperature",
        action="store_true",
        help="fit the anchor and a temperature together, so that uncertainty features too are like the proxies'",
    )
    command.add_argument(
        "--samples",
        type=arguments.path,
        metavar="FOLDER",
        help="where to keep what the VLM samples, to resume from: 38 MB an image of Janus-Pro (default: beside --out)",
    )


def run(args: argparse.Namespace) -> None:
    """Fits a calibration: the tokenizer's features of images to what the VLM samples for prompts. This is the first
    step of training a decoder. Run the same command again to resume a stopped run from the samples it kept;
    `accelerate launch` or `torchrun` share the sampling among processes.
    """
    arguments.check_out("--out", args.out)
    folder = args.samples or args.out.with_name(f"{args.out.stem}-samples")
    arguments.check_out("--samples", folder, folder=True)
    with processes(args.device) as crew:
        args.device = crew.device
        if args.janus is not None:
            registry.sampler_family(args.janus)
        prompts, files = common.calibration_material(args)
        models = common.load(args)
        sampler, options = models.sampler, common.sampling_of(models, args)
        names = ("temperature", "top_k", "top_p", "seed")
        given = {name: getattr(args, name) for name in names}
        settings = {"vlm": sampler.fingerprint, "guidance": options.guidance, **given}
        settings |= common.rounding_of(sampler, args.parallel)
        hold_to(settings, folder, write=crew.first, option="--samples")
        crew.wait()
        if crew.first:
            common.warn_of_unknown_words(models, prompts)
        proxies = Proxies(models.tokenizer, common.material_pixels(models, files, args)) if crew.first else None
        samples = KeptSamples(folder, prompts, seed=args.seed, device=models.tokenizer.device)
        if crew.first and samples.missing < len(prompts):
            print(f"resuming: {len(prompts) - samples.missing} of {len(prompts)} samples are in {folder}")
        samples.fill(
            lambda texts, seeds: common.sample_tokens(models, texts, seeds, args),
            crew,
            batch=args.batch,
            bytes_each=4 * math.prod(sampler.grid) * sampler.codebook.size,
        )
        if crew.first:
            with ProgressBar(label="calibration", unit="pass") as bar:
                calibration = fit_to_samples(
                    samples,
                    proxies,
                    vlm=sampler.name,
                    guidance=options.guidance,
                    temperature=args.temperature,
                    with_anchor=args.fit_anchor,
                    with_temperature=args.fit_anchor_temperature,
                    on_pass=bar.reach,
                )
            calibration.save(args.out)
            print(statistics_table(compared(sampler.name, samples, proxies, calibration)))
            print(f"\n{verdict(calibration)}\nwrote {args.out}; the samples stay in {folder}")
