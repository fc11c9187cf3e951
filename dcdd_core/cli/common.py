"""What the commands share: groups of options, models from them, sampling and painting under a progress bar."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from dcdd_pico import embedded
from dcdd_pico.models import load_pico
from dcdd_pico.prior import load_prior
from dcdd_pico.progressive import SAMPLING as PICO_PLAN
from dcdd_pico.scenes import render_scene, scene_facts, scene_pixels

from ..evaluation.decoding import Decoders
from ..evaluation.figures import save_image, to_image
from ..evaluation.image_folder import ImageFile, LeftOut, large_enough, list_images
from ..evaluation.prompts import check_prompt, read_prompts
from ..method.flow import timesteps
from ..method.lcdm import map_logits
from ..method.progressive import MOST_PASSES, ORDERS, ProgressiveOptions, Revise, Staged
from ..models.card import READINGS, DecoderCard, ServedGuidance
from ..models.cheap_decoder import CheapDecoder, load_cheap_decoder
from ..pipelines.calibrate import PROMPTS
from ..pipelines.condition import condition_for, serving
from ..pipelines.decode import decode
from ..pipelines.guided import GuidanceOptions, TokenGuide, token_guide
from ..pipelines.guided_pipeline import PriorPipeline, load_prior_pipeline
from ..pipelines.image_files import ReadPolicy
from ..pipelines.images import UnreadableImage, read_rgb, square, to_pixels
from ..pipelines.load import LoadOptions, ModelPaths, Models, load_models
from ..pipelines.progress import ProgressBar
from ..pipelines.progressive import StagedSampler, changed_plan, sample_stages, staged_sampler
from ..pipelines.sample import sample
from ..protocols import LatentCodec, Progress, SamplingOptions, TokenSampler
from ..settings import require_number
from ..types import Calibration, Condition, TokenLogits
from .arguments import add_vlm_option, check_out, embedded_vlm, path

#: Options that choose real models, and those that say how they are held.
OF_REAL = ("decoder", "vae", "base", "dtype")
HELD = ("janus_int8", "decoder_8bit", "stream", "compile")
#: Options that say how the diffusion decoder paints.
PAINTING = ("steps", "shift", "condition_guidance", "calibration", "anchor", "reads")
#: Options of distribution guidance.
GUIDED = ("strength", "start", "paint_side", "guide_decoder")
#: Options of samplers that reveal many tokens per pass.
PROGRESSIVE = ("passes", "revision_passes", "order", "spread", "revise")
#: What --sampler takes: one token after the other, or many at a time.
SAMPLERS = ("autoregressive", "progressive")
#: Name of the embedded masked sampler.
_MASKED = next(name for name, folder in embedded.VLMS.items() if folder == embedded.PROGRESSIVE)
#: Options that say what is sampled, and how.
SAMPLING = (
    *("calibration", "prompts", "images", "count", "batch", "guidance", "temperature", "top_k", "top_p", "seed"),
    *("parallel", "min_side", "skip_unreadable"),
)
#: Options that say which images may be left out.
READING = ("min_side", "skip_unreadable")
#: The largest numbers that options take: beyond any use, so that a typing error does not run for days.
MOST = {"steps": 1000, "count": 1_000_000, "batch": 10_000, "limit": 10**9, "side": 2**16, "paint_side": 2**13}

#: What --decoder takes instead of a bundle: distribution guidance of a prior that was not trained on conditions.
GUIDANCE = "guidance"
#: Defaults of distribution guidance without a trained decoder: strength, pull, starting time of painting, and steps.
STRENGTH, PULL, START, STEPS = 0.4, 1.0, 0.6, 10

Parser = argparse.ArgumentParser


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], None],
    *groups: Callable[[Parser], None],
    help: str,
    seeded: bool = True,
) -> Parser:
    """Adds a command and returns its parser, which is described by the docstring of the command's function.

    Args:
        commands: what `add_subparsers` returned.
        run: the command's function, called with the parsed options. These hold it as `run`, and as `default_of` a
            function that gives an option's default.
        groups: add options, in this order.
        seeded: whether it draws anything at random; otherwise --seed is accepted, with a message that it has no effect.
    """
    command = commands.add_parser(name, help=help, description=run.__doc__)
    command.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: cpu)")
    if seeded:
        command.add_argument("--seed", type=int, default=0, help="the images' own seeds count up from it (default: 0)")
    else:
        command.add_argument("--seed", type=int, default=0, action=_IdleSeed, help=argparse.SUPPRESS)
    for add in groups:
        add(command)
    command.set_defaults(run=run, default_of=command.get_default)
    return command


class _IdleSeed(argparse.Action):
    """The --seed of a command that draws nothing at random; earlier versions listed it in the help."""

    def __call__(self, parser, namespace, values: Any, option_string=None):
        print(f"dcdd: {option_string} has no effect: `{parser.prog}` draws nothing at random", file=sys.stderr)


def model_options(parser: Parser) -> None:
    """Adds options for which models are used, and how they are held."""
    group = parser.add_argument_group("models (the embedded ones without a folder)")
    add_vlm_option(group, "Janus or Janus-Pro (transformers' or DeepSeek's layout), LlamaGen, or a masked sampler")
    group.add_argument(
        "--decoder",
        type=path,
        metavar="BUNDLE",
        help=f"decoder bundle; without it, only the VQ path; or {GUIDANCE!r}: distribution guidance of a prior that "
        "was not trained on tokens, the embedded one or that in --base",
    )
    group.add_argument("--vae", type=path, metavar="PATH", help="the decoder's autoencoder, file or folder")
    group.add_argument(
        "--base",
        type=path,
        metavar="PATH",
        help=f"FLUX.1-Fill, if the bundle needs it, file or folder; with --decoder {GUIDANCE}, the folder of a "
        "diffusers pipeline (FLUX.1, FLUX.2 [klein], SDXL, Stable Diffusion 1.x), which is run in "
        f"{STEPS} steps if --steps does not say otherwise",
    )
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32")
    group.add_argument(
        "--vlm-int8",
        "--janus-int8",
        dest="janus_int8",
        action="store_true",
        help="hold the language model's layers in 8 bits (torchao)",
    )
    group.add_argument(
        "--decoder-8bit", action="store_true", help="hold the diffusion decoder's layers in 8 bits (torchao)"
    )
    group.add_argument(
        "--stream", action="store_true", help="keep the diffusion decoder in RAM, one block at a time on the device"
    )
    group.add_argument("--compile", action="store_true", help="compile the diffusion decoder's blocks")


def sampling_options(parser: Parser) -> None:
    """Adds options for how tokens are sampled."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--guidance", type=float, help="classifier-free guidance (default: the calibration's, or the VLM's)"
    )
    group.add_argument(
        "--temperature", type=float, default=1.0, help="of sampling; 0: always the likeliest code (default: 1)"
    )
    group.add_argument(
        "--top-k", type=int, help="the likeliest codes alone; 0: all (default: 1000 for a published LlamaGen, else all)"
    )
    group.add_argument(
        "--top-p",
        type=float,
        help="the likeliest codes that together have this probability; 1: all (default: 0.8 for BIGFix, else all)",
    )
    group.add_argument(
        "--parallel",
        type=int,
        metavar="N",
        help="tokens that an autoregressive VLM draws in each pass; those that drawing one by one would give are kept, "
        "so that in float32 the image does not depend on it; half precision rounds differently, and gives another "
        "image of the same distributions (default: on a CPU in float32 up to 12, fewer in a batch, else 1: one by one)",
    )


def progressive_options(parser: Parser) -> None:
    """Adds options for how a masked sampler reveals and revises tokens."""
    group = parser.add_argument_group(
        "progressive sampling: tokens from coarse to fine, many at a time",
        "What is left out is the model's own. "
        f"pico's: {PICO_PLAN.passes} passes, the last {PICO_PLAN.revision_passes} for revision alone; order "
        f"{PICO_PLAN.order}, spread {PICO_PLAN.spread}, revise {PICO_PLAN.revise}.",
    )
    group.add_argument(
        "--sampler",
        choices=SAMPLERS,
        help="of the embedded models (default: autoregressive); with --vlm, the model says which it is",
    )
    group.add_argument(
        "--passes", type=int, metavar="N", help="passes of the network, those that only revise among them"
    )
    group.add_argument(
        "--revision-passes",
        type=int,
        metavar="N",
        help="the last of them, which reveal nothing new and only draw again (default: the model's share of --passes)",
    )
    group.add_argument("--order", choices=tuple(ORDERS), help="which tokens are revealed first")
    group.add_argument(
        "--spread",
        type=int,
        metavar="N",
        help="rows or columns of tokens between two tokens of the same pass, where there is room",
    )
    group.add_argument(
        "--revise",
        type=_revise,
        metavar="N",
        help="which revealed tokens each pass draws again: 'all', or the last N; 0 never takes one back",
    )


def _revise(text: str) -> Revise:
    try:
        return text if text == "all" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected 'all' or a whole number, got {text!r}") from None


def decoding_options(parser: Parser) -> None:
    """Adds options for how the diffusion decoder paints."""
    parser.add_argument("--steps", type=int, help="Euler steps of the decoder (default: the bundle's)")
    parser.add_argument(
        "--shift",
        type=float,
        metavar="MU",
        help="time shift; a higher one spends more steps near the noise (default: the bundle's)",
    )
    parser.add_argument(
        "--condition-guidance",
        type=float,
        metavar="W",
        help="scale of classifier-free guidance on the condition; 1 is off, others take about twice the "
        "time and need a decoder that was trained with --drop-condition (default: the bundle's, which is mostly 1)",
    )
    parser.add_argument("--calibration", type=path, metavar="FILE", help="in place of the bundle's own")
    parser.add_argument("--anchor", type=float, metavar="BETA", help="read logits anchored by this much")
    parser.add_argument("--reads", choices=READINGS, help="what of the VLM's output the decoder is served")


def guidance_options(parser: Parser) -> None:
    """Adds the options of distribution guidance."""
    group = parser.add_argument_group("distribution guidance")
    strength_option(group, f"; with --decoder {GUIDANCE}, {STRENGTH}")
    group.add_argument(
        "--start",
        type=float,
        metavar="T",
        help="time to start from, 0 to 1: below 1 from the soft VQ decode with noise, not from noise alone (default: "
        f"1; with --decoder {GUIDANCE}, {START})",
    )
    group.add_argument(
        "--paint-side", type=int, metavar="PIXELS", help="longer side of what --base paints (default: the VQ decode's)"
    )
    guide_decoder_option(group)


def strength_option(parser: Any, otherwise: str = "") -> None:
    """Adds the option for the strength of distribution guidance.

    Args:
        otherwise: says in the help where the default is a different one.
    """
    parser.add_argument(
        "--strength",
        type=float,
        metavar="ETA",
        help="how strongly each step is pulled towards what the VLM's distributions say; 0 is off (default: the "
        f"bundle's, which is mostly 0{otherwise})",
    )


def guide_decoder_option(parser: Any) -> None:
    """Adds the option for the decoder through which guidance sees latents."""
    parser.add_argument(
        "--guide-decoder",
        type=path,
        metavar="FOLDER",
        help="guide through a small decoder of the same latents, such as TAESD or TAEF1 (an AutoencoderTiny folder): "
        "faster, less exact; the image is still decoded by the autoencoder",
    )


def reading_options(parser: Parser) -> None:
    """Adds options for which images may be left out."""
    parser.add_argument(
        "--min-side",
        type=int,
        metavar="PIXELS",
        help="leave out images whose shorter side is smaller, rather than enlarge them (default: half of the size at "
        "which they are used)",
    )
    parser.add_argument(
        "--skip-unreadable",
        type=float,
        metavar="SHARE",
        default=ReadPolicy.skip_unreadable,
        help=f"the largest share of unreadable images that are left out (default: {ReadPolicy.skip_unreadable:g})",
    )


def material_options(count: int) -> Callable[[Parser], None]:
    """Adds options for the prompts and images that a VLM is measured on, by default at most `count` of each."""

    def add(parser: Parser) -> None:
        parser.add_argument(
            "--prompts",
            type=path,
            metavar="FILE",
            help="a prompt a line, or JSON (default: 300 built-in ones; for the embedded models, captions of scenes)",
        )
        parser.add_argument(
            "--images", type=path, metavar="FOLDER", help="images for the proxies, in sub-folders or not"
        )
        parser.add_argument("--count", type=int, default=count, help=f"how many of each at most (default: {count})")
        parser.add_argument("--batch", type=int, default=8, help="prompts sampled at once (default: 8)")
        reading_options(parser)

    return add


def given(args: argparse.Namespace, *options: str) -> str:
    """Those of the named options that differ from their defaults, as they are typed: "--top-k, --seed"."""
    differ = [name for name in options if getattr(args, name) != args.default_of(name)]
    return ", ".join(f"--{name.replace('_', '-')}" for name in differ)


def check_options(args: argparse.Namespace) -> None:
    """Checks the options as far as possible before anything is loaded.

    Raises:
        ValueError: for numbers out of range, a calibration that cannot be read, and texts that cannot be prompts.
    """
    held = vars(args)
    for name, most in MOST.items():
        if held.get(name) is not None and held[name] > most:
            raise ValueError(f"--{name} must be at most {most:,}, got {held[name]:,}")
    if not -(2**63) <= args.seed < 2**63:
        raise ValueError(f"--seed must be a whole number of 64 bits, got {args.seed}")
    if "temperature" in held:
        names = ("temperature", "top_k", "top_p")
        require_number("--parallel", args.parallel, whole=True, least=1, optional=True, remedy="1 draws one by one")
        SamplingOptions(
            guidance=1.0 if args.guidance is None else args.guidance, **{name: held[name] for name in names}
        )
    if held.get("stream") and held.get("compile"):
        raise ValueError("--stream and --compile exclude each other, got both: leave one of them out")
    if "passes" in held:
        # What the sampler's own plan adds is checked together with it, later.
        ProgressiveOptions(**{"passes": MOST_PASSES, "revision_passes": 0, **_staged(args)})
    if "skip_unreadable" in held:
        policy_of(args)
    if "shift" in held and held["calibration"] is not None:
        Calibration.load(args.calibration)
    for prompt in held.get("prompt") or ():
        check_prompt(prompt)


def policy_of(args: argparse.Namespace) -> ReadPolicy:
    """Which images may be left out."""
    return ReadPolicy(min_side=args.min_side, skip_unreadable=args.skip_unreadable)


def device_of(args: argparse.Namespace) -> torch.device:
    """The device asked for.

    Raises:
        ValueError: if it cannot be used.
    """
    try:
        device = torch.zeros(1, device=args.device).device
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {args.device} cannot be used here ({reason}); try --device cpu") from error


def load(args: argparse.Namespace, *, with_sampler: bool = True) -> Models:
    """Loads the models asked for.

    Raises:
        ValueError: for options that do not go together or have no effect on the embedded models, and as the loaders.
    """
    device, kind = device_of(args), getattr(args, "sampler", None)
    if guided(args) and not hasattr(args, "start"):
        raise ValueError(f"--decoder {GUIDANCE} goes with `dcdd generate` and `dcdd reconstruct`: leave it out")
    if args.janus is None:
        of_guidance = ("decoder", "base", "dtype") if guided(args) else ()
        idle = given(args, *(name for name in (*OF_REAL, *HELD) if name not in of_guidance))
        if idle:
            raise ValueError(f"{idle} goes with the folder of a VLM in --vlm; the embedded ones are used as they are")
        vlm = embedded_vlm(args, embedded.PROGRESSIVE if kind == SAMPLERS[1] else embedded.JANUS)
        models = load_pico(device=device, with_sampler=with_sampler, vlm=vlm)
        _check_kind(models, kind, args.embedded)
        own_prior = guided(args) and args.base is None
        return replace(models, decoder=load_prior(device=device)) if own_prior else models
    if guided(args):
        idle = given(args, "vae", *(name for name in HELD if name != "janus_int8"))
        if args.base is None or args.calibration is None or idle:
            raise ValueError(
                f"with a folder in --vlm, --decoder {GUIDANCE} paints with a diffusers pipeline and compares "
                "calibrated distributions: give --base FOLDER (FLUX.1, FLUX.2 [klein], SDXL or Stable Diffusion 1.x) "
                f"and --calibration FILE, and leave out {idle or 'the rest of the decoder'}"
            )
    options = LoadOptions(
        device=device,
        dtype=getattr(torch, args.dtype or "float32"),
        sampler_int8=args.janus_int8,
        eight_bit=args.decoder_8bit,
        streamed=args.stream,
        compiled=args.compile,
    )
    paths = ModelPaths(vlm=args.janus)
    if not guided(args):
        paths = replace(paths, decoder=args.decoder, vae=args.vae, base=args.base)
    models = load_models(paths, options, with_sampler=with_sampler)
    _check_kind(models, kind, args.janus)
    return models


def _check_kind(models: Models, kind: str | None, vlm: Path | str | None) -> None:
    if None not in (kind, vlm, models.sampler) and isinstance(models.sampler, StagedSampler) != (kind == SAMPLERS[1]):
        own = f", or give --vlm {_MASKED}" if vlm == embedded.NAME and kind == SAMPLERS[1] else ""
        raise ValueError(f"--sampler {kind}, but {vlm} holds a sampler of the other kind: leave --sampler out{own}")


def guided(args: argparse.Namespace) -> bool:
    """Whether distribution guidance replaces a trained decoder."""
    return str(getattr(args, "decoder", None)) == GUIDANCE


def check_painting(models: Models, args: argparse.Namespace, *others: str) -> None:
    """Refuses painting options without effect, invalid schedules, and what does not fit the decoder.

    To be called before anything is sampled.

    Args:
        others: names of further options that have no effect without a decoder.

    Raises:
        ValueError: naming them.
    """
    by_pipeline = guided(args) and args.base is not None
    of_guidance = {name: getattr(args, name) for name in GUIDED if hasattr(args, name)}
    idle = given(args, *PAINTING, *of_guidance, *others)
    if models.decoder is None and idle and not by_pipeline:
        raise ValueError(f"{idle} would do nothing without a decoder: give --decoder and --vae as well")
    idle = given(args, "shift", *(() if models.decoder is not None else ("anchor", "reads")))
    if by_pipeline and idle:
        raise ValueError(f"{idle} would do nothing with the pipeline in --base: leave it out")
    if guided(args) and args.condition_guidance is not None:
        raise ValueError(
            f"--condition-guidance would do nothing with --decoder {GUIDANCE}, whose prior has no condition: leave it "
            "out"
        )
    if of_guidance.get("paint_side") is not None and not by_pipeline:
        raise ValueError(
            f"--paint-side goes with --decoder {GUIDANCE} and --base; other decoders have a size of their own"
        )
    timesteps(1 if args.steps is None else args.steps, shift=args.shift or 0.0)
    options, start = guidance_of(args, None if models.decoder is None else models.decoder.card)
    if not 0 < start <= 1:
        raise ValueError(f"--start must be above 0 and at most 1, got {start}; 1 starts from noise alone")
    if of_guidance.get("guide_decoder") is not None:
        if options.strength == 0:
            raise ValueError("--guide-decoder would do nothing without guidance: give a --strength above 0")
        if not by_pipeline:
            guide_decoder_of(args, models.codec)
    if models.decoder is None:
        return
    models.decoder.card.condition_guidance_of(args.condition_guidance)
    if card_of(models, args).calibration is None and (not options.off or start < 1):
        raise ValueError("distribution guidance compares calibrated distributions: give --calibration FILE")


def card_of(models: Models, args: argparse.Namespace) -> DecoderCard:
    """The decoder's card, with its values replaced by those asked for."""
    calibration = Calibration.load(args.calibration) if args.calibration is not None else None
    return serving(models.decoder.card, calibration=calibration, anchor=args.anchor, reads=args.reads)


def decoders_of(models: Models, args: argparse.Namespace) -> Decoders:
    """Both decoders, as asked for."""
    check_painting(models, args)
    if models.decoder is None:
        return Decoders(models=models)
    card = models.decoder.card
    return Decoders(
        models=models,
        card=card_of(models, args),
        steps=args.steps,
        shift=shift_of(args, card),
        condition_guidance=args.condition_guidance,
        strength=guidance_of(args, card)[0].strength,
    )


def seeds_of(args: argparse.Namespace, count: int) -> list[int]:
    """One seed per image, counting up from --seed."""
    return [args.seed + i for i in range(count)]


def sampling_of(models: Models, args: argparse.Namespace) -> SamplingOptions:
    """The sampling options; guidance defaults to that of the decoder's calibration, or else to the VLM's own.

    Raises:
        ValueError: for values out of range, options of passes for a sampler without passes, and --parallel for one with
            them.
    """
    calibration = models.decoder.card.calibration if models.decoder is not None else None
    if (file := getattr(args, "calibration", None)) is not None:
        calibration = Calibration.load(file)
    guidance = args.guidance
    if guidance is None and calibration is not None:
        guidance = calibration.guidance
    options = SamplingOptions(
        guidance=models.sampler.default_guidance if guidance is None else guidance,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
    )
    if args.parallel is not None and isinstance(models.sampler, StagedSampler):
        raise ValueError(
            f"--parallel would do nothing: {models.sampler.name or 'this model'} draws many tokens in each of its "
            "passes; leave it out, or choose --passes with `dcdd generate`"
        )
    staged = _staged(args)
    return changed_plan(_staged_sampler(models, args).sampling, options, **staged) if staged else options


def _staged(args: argparse.Namespace) -> dict[str, Any]:
    """The options of progressive sampling that are given, by name."""
    return {name: getattr(args, name) for name in PROGRESSIVE if getattr(args, name, None) is not None}


def _staged_sampler(models: Models, args: argparse.Namespace) -> StagedSampler:
    own = f"give --vlm {_MASKED}" if args.embedded else f"add --sampler {SAMPLERS[1]}"
    other = own if args.janus is None else "give the folder of a masked sampler"
    remedy = f"{other}, or leave out {given(args, *PROGRESSIVE, 'stages')}"
    return staged_sampler(models.sampler, remedy=remedy)


def warn_of_unknown_words(models: Models, prompts: Sequence[str]) -> None:
    """Prints the words of each prompt that mean nothing to the sampler."""
    for prompt in prompts:
        unknown = models.sampler.unknown_words(prompt)
        if unknown:
            known = models.sampler.known_words()
            print(
                f"dcdd: {models.sampler.name} does not know {', '.join(unknown)} (in: {prompt})"
                + (f"; it knows {', '.join(known)}" if known else ""),
                file=sys.stderr,
            )


@contextmanager
def bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar; gives a function to call with (done, total)."""
    with tqdm(desc=label, unit="step", leave=False, disable=None) as shown:

        def step(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield step


def sample_tokens(
    models: Models,
    prompts: Sequence[str],
    seeds: Sequence[int],
    args: argparse.Namespace,
    report: Callable[[str], None] | None = None,
) -> TokenLogits:
    """Samples token logits for the prompts, with a progress bar.

    Args:
        report: called with a line that says in how many passes of the network they were sampled.
    """
    passes: dict[int, int] = {}  # of each part of the batch, if it was split
    with bar("tokens") as step:

        def on_progress(progress: Progress) -> None:
            step(progress.done, progress.total)
            passes[progress.first] = progress.passes

        options = sampling_of(models, args)
        found = sample(
            models.sampler, prompts, seeds=seeds, options=options, parallel=args.parallel, on_progress=on_progress
        )
    if report is not None:
        report(_passes_told(found, sum(passes.values())))
    return found


def sample_in_stages(
    models: Models,
    prompts: Sequence[str],
    seeds: Sequence[int],
    args: argparse.Namespace,
    report: Callable[[str], None],
) -> Staged:
    """Samples token logits for the prompts, and keeps the passes that led to them, with a progress bar.

    Args:
        report: as in `sample_tokens`.

    Raises:
        ValueError: for a sampler without passes.
    """
    sampler, passes = _staged_sampler(models, args), {}
    with bar("passes") as step:

        def on_progress(progress: Progress) -> None:
            step(progress.done, progress.total)
            passes[progress.first] = progress.passes

        options = sampling_of(models, args)
        found = sample_stages(sampler, prompts, seeds=seeds, options=options, on_progress=on_progress)
    report(_passes_told(found.token_logits, sum(passes.values())))
    return found


def _passes_told(sampled: TokenLogits, passes: int) -> str:
    images, count = sampled.tokens.shape
    each = f" for each of {images} images" if images > 1 else ""
    return f"{count} tokens{each} in {passes} {'pass' if passes == 1 else 'passes'}"


def guidance_of(args: argparse.Namespace, card: DecoderCard | None = None) -> tuple[GuidanceOptions, float]:
    """How predicted images are pulled, and the time at which painting starts.

    Args:
        card: of a trained decoder; gives the default strength.

    Raises:
        ValueError: for a strength that is negative or not finite.
    """
    alone, served = guided(args), _served(args, card)
    strength, start = args.strength, getattr(args, "start", None)
    if strength is None:
        strength = STRENGTH if alone else 0.0 if served is None else served.strength
    start = (START if alone else 1.0) if start is None else start
    return GuidanceOptions(strength=strength, pull=PULL if alone else 0.0), start


def shift_of(args: argparse.Namespace, card: DecoderCard | None) -> float | None:
    """Mu of the time shift; None for the decoder's own."""
    served = _served(args, card)
    return served.shift if args.shift is None and served is not None else args.shift


def _served(args: argparse.Namespace, card: DecoderCard | None) -> ServedGuidance | None:
    """The card's guidance where it applies: with its own decoder, and if no other strength was asked for."""
    if card is None or guided(args) or args.strength is not None:
        return None
    served = card.distribution_guidance
    return None if served is None or served.strength == 0 else served


def guide_of(models: Models, condition: Condition, args: argparse.Namespace) -> TokenGuide | None:
    """The guide of these images; None without guidance."""
    options, start = guidance_of(args, models.decoder.card)
    if options.off and start == 1:
        return None
    calibration = card_of(models, args).calibration
    return token_guide(
        models.tokenizer,
        models.codec,
        condition,
        scale=calibration.sharpness,
        options=options,
        size=models.decoder.painted_size(condition.grid),
        decode=guide_decoder_of(args, models.codec),
    )


def guide_decoder_of(args: argparse.Namespace, codec: LatentCodec) -> CheapDecoder | None:
    """The small decoder asked for, which fits the codec; None for the codec itself.

    Raises:
        ValueError: as `load_cheap_decoder`, and for latents with another number of channels.
    """
    folder = getattr(args, "guide_decoder", None)
    if folder is None:
        return None
    decoder = load_cheap_decoder(folder, device=device_of(args))
    decoder.require_for(codec)
    return decoder


def paint(models: Models, condition: Condition, seeds: Sequence[int], args: argparse.Namespace) -> torch.Tensor:
    """The decoder's images [B, 3, H, W] in -1..1, painted with a progress bar."""
    with bar("decoder") as step:
        painted = decode(
            models.decoder,
            models.codec,
            condition,
            seeds=seeds,
            steps=args.steps,
            shift=shift_of(args, models.decoder.card),
            condition_guidance=args.condition_guidance,
            guide=guide_of(models, condition, args),
            start=guidance_of(args, models.decoder.card)[1],
            on_step=lambda done, total, _: step(done, total),
        )
    return painted.pixels


def pipeline_of(args: argparse.Namespace) -> PriorPipeline | None:
    """The diffusers pipeline to guide; None for a decoder.

    Raises:
        ValueError: as `load_prior_pipeline`.
    """
    if not guided(args) or args.base is None:
        return None
    pipeline = load_prior_pipeline(args.base, device=device_of(args), dtype=getattr(torch, args.dtype or "float32"))
    guide_decoder_of(args, pipeline.codec)  # Before anything is sampled.
    return pipeline


def paint_with(
    pipeline: PriorPipeline,
    models: Models,
    token_logits: TokenLogits,
    prompts: Sequence[str],
    seeds: Sequence[int],
    args: argparse.Namespace,
) -> torch.Tensor:
    """The pipeline's images [B, 3, H, W] in -1..1, painted with a progress bar."""
    tokenizer, (options, start) = models.tokenizer, guidance_of(args)
    if models.decoder is not None:
        condition, calibration = condition_of(models, token_logits, args), card_of(models, args).calibration
    else:
        calibration = Calibration.load(args.calibration)
        condition = map_logits(token_logits, tokenizer.codebook, calibration)
    h, w = (side * tokenizer.factor for side in condition.grid)
    if args.paint_side is not None:
        h, w = (round(side * args.paint_side / max(h, w)) for side in (h, w))
    with bar("prior") as step:
        painted = pipeline.paint(
            tokenizer,
            condition,
            prompts,
            seeds=seeds,
            scale=calibration.sharpness,
            size=(h, w),
            options=options,
            steps=args.steps or STEPS,
            start=start,
            decode=guide_decoder_of(args, pipeline.codec),
            on_step=lambda done, total, _: step(done, total),
        )
    return painted.pixels


def condition_of(models: Models, token_logits: TokenLogits, args: argparse.Namespace) -> Condition:
    """The condition for the decoder, as it is served."""
    return condition_for(card_of(models, args), token_logits, models.tokenizer.codebook)


def calibration_material(args: argparse.Namespace) -> tuple[list[str], list[ImageFile] | None]:
    """Prompts and image files; by default, for the embedded models, captions, and None for rendered scenes.

    Any other VLM gets the package's prompts by default. From a folder, whose sub-folders may be classes, images are
    taken evenly.

    Raises:
        ValueError: for counts below 1, options of images without --images, and a VLM of your own without images.
    """
    count, ours = args.count, args.janus is None
    if count < 1:
        raise ValueError(f"--count must be at least 1, best 100; got {count}")
    if args.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {args.batch}")
    if args.prompts is None and ours:
        prompts = [facts.caption() for facts in scene_facts("calibration", count)]
    else:
        prompts = [prompt.text for prompt in read_prompts(args.prompts or PROMPTS)[:count]]
    if args.images is not None:
        found = list_images(args.images)
        count = min(count, len(found))
        return prompts, [found[i * len(found) // count] for i in range(count)]
    if idle := given(args, *READING):
        raise ValueError(f"{idle} would do nothing without --images: leave it out")
    if ours:
        return prompts, None
    raise ValueError(
        "a VLM of your own needs real images: what its tokenizer sees in them is calibrated to what the VLM says. Give "
        "--images FOLDER, about 100 of the kind that the decoder will be trained on"
    )


def material_pixels(
    models: Models, files: Sequence[ImageFile] | None, args: argparse.Namespace
) -> Iterator[torch.Tensor]:
    """The images [1, 3, S, S] one by one, as squares of the size that the VLM paints; scenes if there are no files."""
    tokenizer, size = models.tokenizer, Decoders(models=models).size
    if files is None:
        for number in ProgressBar(range(args.count), label="features", unit="image"):
            yield scene_pixels(render_scene("calibration", number).image[None], tokenizer.device)
        return
    policy = policy_of(args)
    large, small = large_enough(files, policy, size)
    if small:
        print(f"dcdd: {LeftOut(small=small)}", file=sys.stderr)
    reasons: dict[str, str] = {}
    for image in ProgressBar(large, label="features", unit="image"):
        try:
            pixels = square(read_rgb(image.path), size)
        except UnreadableImage as error:
            reasons[image.name] = str(error)
        else:
            yield to_pixels(pixels[None], tokenizer.device)
    policy.check(len(large), len(reasons), reasons, str(args.images))
    if reasons:
        print(f"dcdd: {LeftOut(unreadable=tuple(reasons))}", file=sys.stderr)


def check_png(out: Path, option: str = "--out") -> None:
    """Refuses a file that does not end in .png, or that cannot be written.

    Args:
        option: as it is typed, for the message.

    Raises:
        ValueError: naming it.
    """
    if out.suffix.lower() != ".png":
        raise ValueError(f"{option} {out}: images are written as PNG, give a name that ends in .png")
    check_out(option, out)


def write_images(images: torch.Tensor, out: Path, suffix: str) -> None:
    """Writes images [B, 3, H, W] in -1..1: a single one under the given name, several of them numbered."""
    write_sheets([to_image(pixels) for pixels in images], out, suffix)


def write_sheets(sheets: Sequence[Image.Image], out: Path, suffix: str = "") -> None:
    """Writes a single image under the given name, several of them numbered."""
    for sheet, file in zip(sheets, image_paths(len(sheets), out, suffix), strict=True):
        print(f"wrote {save_image(sheet, file)}")


def image_paths(count: int, out: Path, suffix: str = "") -> list[Path]:
    """The files of this many images, numbered if there are several."""
    numbers = [f"-{i + 1}" for i in range(count)] if count > 1 else [""] * count
    return [out.with_name(f"{out.stem}{number}{suffix}.png") for number in numbers]


def check_not_read(written: Sequence[Path], read: Sequence[Path]) -> None:
    """Refuses results that would overwrite one of the images they are made of.

    Raises:
        ValueError: naming it.
    """
    if lost := {path.resolve() for path in written} & {path.resolve() for path in read}:
        raise ValueError(f"a result would overwrite {min(lost)}, which is one of the images: give another --out")


def rounding_of(sampler: TokenSampler, parallel: int | None) -> dict[str, Any]:
    """What decides how a sampler's numbers round: its dtype and, in half precision, `parallel`; plain JSON values."""
    dtype = next(weight.dtype for weight in sampler.model.parameters() if weight.is_floating_point())
    told = {"vlm dtype": str(dtype).removeprefix("torch.")}
    return told if dtype == torch.float32 else told | {"parallel": parallel}


def check_distinct(written: Mapping[str, Sequence[Path]]) -> None:
    """Refuses files that two options would both write.

    Args:
        written: option, as it is typed -> its files.

    Raises:
        ValueError: naming the options and the file.
    """
    owner: dict[Path, str] = {}
    for option, files in written.items():
        for file in files:
            if (other := owner.setdefault(file.resolve(), option)) != option:
                raise ValueError(f"{other} and {option} would both write {file}: give them names of their own")
