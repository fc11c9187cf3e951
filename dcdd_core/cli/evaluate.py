"""`dcdd evaluate reconstruction` and `dcdd evaluate text`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from dcdd_pico import models as pico

from ..evaluation.decoding import PATHS, Decoders, guidance_told
from ..evaluation.evaluate import EvaluationRun, evaluate_reconstruction, evaluate_text, generate_geneval
from ..evaluation.generation import GENEVAL, check_geneval
from ..evaluation.image_folder import at_most, list_images
from ..evaluation.networks import FeatureNetwork, PerceptualNetwork, feature_network, perceptual_network
from ..evaluation.prompts import read_geneval, read_prompts
from ..pipelines.distributed import Processes, processes
from ..pipelines.load import Models
from ..pipelines.sample import sample
from ..types import TokenLogits
from . import arguments, common


def add(commands: Any, help: str) -> None:
    """Adds the two commands."""
    what = commands.add_parser("evaluate", help=help, description="Measures both decoders.")
    what = what.add_subparsers(required=True, metavar="what")
    command = common.add_command(
        what,
        "reconstruction",
        reconstruction,
        common.model_options,
        common.decoding_options,
        common.strength_option,
        _measuring_options,
        help="rFID, SSIM, PSNR and LPIPS of a folder",
    )
    command.add_argument(
        "--images", type=arguments.path, required=True, metavar="FOLDER", help="images, in sub-folders or not"
    )
    command.add_argument("--size", type=int, metavar="PIXELS", help="of the squares to compare (default: as painted)")
    command.add_argument("--lpips", type=arguments.path, metavar="FILE", help="weights of LPIPS' backbone")
    command.add_argument("--keep-pictures", action="store_true", help="write the decoded images as well")
    command = common.add_command(
        what,
        "text",
        text,
        common.model_options,
        common.sampling_options,
        common.decoding_options,
        common.strength_option,
        _measuring_options,
        help="gFID of a file of prompts, GenEval",
    )
    command.add_argument(
        "--prompts",
        type=arguments.path,
        metavar="FILE",
        help="MJHQ-30K's meta_data.json, JSON lines, or a prompt a line",
    )
    command.add_argument("--references", type=arguments.path, metavar="FOLDER", help="real images to compare with")
    command.add_argument(
        "--geneval",
        type=arguments.path,
        metavar="FILE",
        help="evaluation_metadata.jsonl: four images for each of its prompts",
    )


def reconstruction(args: argparse.Namespace) -> None:
    """Measures rFID, SSIM, PSNR and LPIPS of both decoders over a folder of images. Run the same command again to
    resume a stopped run; `accelerate launch` or `torchrun` share it among processes."""
    if args.limit is not None and args.statistics is not None and not args.statistics.exists():
        raise ValueError(
            f"--statistics {args.statistics} does not exist yet and would be of the first {args.limit} images alone: "
            "make it without --limit, or leave it out"
        )
    _check_outputs(args)
    with processes(args.device) as crew:
        args.device = crew.device
        images = list_images(args.images, by_category=args.by_category, limit=args.limit)
        models = common.load(args, with_sampler=False)
        decoders, device = _decoders(models, args, crew), models.tokenizer.device
        report = evaluate_reconstruction(
            _run(args, crew),
            images,
            decoders,
            features=_feature_network(args, device),
            perceptual=_perceptual_network(args, device),
            size=args.size,
            keep_images=args.keep_pictures,
        )
        _tell(report, args)


def text(args: argparse.Namespace) -> None:
    """Measures gFID of both decoders for a file of prompts, from the same tokens and logits, and writes GenEval's
    folders for its own scorer. Run the same command again to resume a stopped run; `accelerate launch` or `torchrun`
    share it among processes."""
    if args.prompts is None and args.geneval is None:
        raise ValueError("nothing to draw: give --prompts FILE, --geneval FILE or both")
    measured = [f"--{name}" for name in ("references", "statistics", "inception") if getattr(args, name) is not None]
    if args.prompts is None and measured:
        raise ValueError(f"{', '.join(measured)} would do nothing: GenEval's own scorer measures; leave it out")
    if args.references is None and (idle := common.given(args, *common.READING)):
        raise ValueError(f"{idle} would do nothing without --references: leave it out")
    _check_outputs(args)
    with processes(args.device) as crew:
        args.device = crew.device
        kept = {"limit": args.limit, "by_category": args.by_category}
        prompts = at_most(read_prompts(args.prompts), **kept) if args.prompts is not None else []
        geneval = at_most(read_geneval(args.geneval), **kept) if args.geneval is not None else []
        models = common.load(args)
        decoders, run, options = _decoders(models, args, crew), _run(args, crew), common.sampling_of(models, args)
        given = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
        sampling = {"vlm": models.sampler.fingerprint, "guidance": options.guidance, **given}
        sampling |= common.rounding_of(models.sampler, args.parallel)
        if crew.first:
            common.warn_of_unknown_words(models, [prompt.text for prompt in (*prompts, *geneval)])

        def sampled(texts: Sequence[str], seeds: Sequence[int]) -> TokenLogits:
            return sample(models.sampler, texts, seeds=seeds, options=options, parallel=args.parallel)

        if geneval:
            check_geneval(geneval, args.out / GENEVAL, decoders.paths)  # before hours of other work
        if prompts:
            report = evaluate_text(
                run,
                prompts,
                decoders,
                sampled,
                sampling=sampling,
                features=_feature_network(args, models.tokenizer.device),
                references=args.references,
                by_category=args.by_category,
            )
            _tell(report, args)
        if geneval:
            folders = generate_geneval(run, geneval, decoders, sampled, sampling=sampling)
            if crew.first:
                print("\n".join(f"wrote {folder}: a folder for GenEval's evaluate_images.py" for folder in folders))


def _decoders(models: Models, args: argparse.Namespace, crew: Processes) -> Decoders:
    """Both decoders, as asked for; prints a line if guidance is used."""
    decoders = common.decoders_of(models, args)
    if (told := guidance_told(decoders.strength, decoders.served_shift)) and crew.first:
        print(f"{PATHS['dcdd']}: {told}")
    return decoders


def _check_outputs(args: argparse.Namespace) -> None:
    arguments.check_out("--out", args.out, folder=True)
    if args.statistics is not None:
        arguments.check_out("--statistics", args.statistics)


def _measuring_options(parser: common.Parser) -> None:
    parser.add_argument(
        "--out", type=arguments.path, required=True, metavar="FOLDER", help="of results, and to resume from"
    )
    parser.add_argument("--by-category", action="store_true", help="by sub-folder as well, as in MJHQ-30K")
    parser.add_argument("--limit", type=int, help="only the first N, with --by-category of each category")
    parser.add_argument("--batch", type=int, default=16, help="images at once (default: 16)")
    parser.add_argument(
        "--inception",
        type=arguments.path,
        metavar="FILE",
        help="weights of the FID's network (default: pico's scene reader)",
    )
    parser.add_argument(
        "--statistics",
        type=arguments.path,
        metavar="FILE",
        help="of the real images: read if it exists, else written from those that were measured",
    )
    common.reading_options(parser)


def _feature_network(args: argparse.Namespace, device: torch.device) -> FeatureNetwork:
    """Inception from a file; without one, the scene reader for the embedded models."""
    if args.inception is None and args.janus is None:
        return pico.feature_network(device=device)
    return feature_network(args.inception, device=device)


def _perceptual_network(args: argparse.Namespace, device: torch.device) -> PerceptualNetwork:
    """LPIPS from a file; without one, the scene reader for the embedded models."""
    if args.lpips is None and args.janus is None:
        return pico.perceptual_network(device=device)
    return perceptual_network(args.lpips, device=device)


def _run(args: argparse.Namespace, crew: Processes) -> EvaluationRun:
    return EvaluationRun(
        out=args.out,
        processes=crew,
        seed=args.seed,
        batch=args.batch,
        statistics=args.statistics,
        command=args.command,
        policy=common.policy_of(args),
    )


def _tell(report: str | None, args: argparse.Namespace) -> None:
    if report is not None:
        print(f"{report}\nwrote {args.out / 'report.md'} and results.json")
