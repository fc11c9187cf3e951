"""`dcdd`: text to image, reconstruction, calibration, a look inside and evaluation, embedded models or real folders."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from dcdd_pico import models as pico_models
from dcdd_pico.models import load_pico
from dcdd_pico.scenes import render_scene, scene_facts, scene_pixels

from ..evaluation.decoding import Decoders
from ..evaluation.evaluate import Run, evaluate_reconstruction, evaluate_text, generate_geneval
from ..evaluation.figures import beside, heat_map, labelled_grid, save_image, to_image, top_curve
from ..evaluation.image_folder import Picture, at_most, open_picture, pictures_in, read_pixels
from ..evaluation.networks import FeatureNetwork, PerceptualNetwork, feature_network, perceptual_network
from ..evaluation.prompts import read_geneval, read_prompts
from ..evaluation.results_store import hold_to
from ..evaluation.tables import statistics_table
from ..method.flow import timesteps
from ..method.statistics import describe_logits
from ..models.card import DecoderCard
from ..models.vq import VQTokenizer
from ..pipelines.calibrate import PROMPTS, KeptSamples, Proxies, calibrate_to, compared, verdict
from ..pipelines.condition import condition_for, serving
from ..pipelines.decode import decode, decode_tokens
from ..pipelines.distributed import Processes, processes
from ..pipelines.images import to_pixels, to_tensor
from ..pipelines.load import Models, load_models
from ..pipelines.oom import is_out_of_memory
from ..pipelines.sample import sample
from ..types import Calibration, Condition, TokenLogits
from .parser import HELD, OF_REAL, PAINTING, SAMPLING, command_parser, given

DEMO_PROMPTS = (
    "a large striped red heart in the centre on a wavy sky ground",
    "a large checked blue diamond in the centre on a dotted cream ground",
    "a large barred purple ring on the left on a plain mint ground with writing at the top",
    "a large plain green cross at the bottom left on a wavy slate ground with a small yellow circle at the top right",
)
DEMO_SCENES = (4, 12, 25, 44)
_MOST_TOKENS = 64 * 64
_COMPILER = "install a C++ compiler, and on a GPU Triton as well, or leave out --compile"
_ROOM = "take a smaller picture, --dtype bfloat16, --janus-int8, --decoder-8bit or --stream"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 for a failure that is explained, 130 when interrupted."""
    chosen = _parser().parse_args(arguments)
    chosen.command = shlex.join(["dcdd", *(sys.argv[1:] if arguments is None else arguments)])
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)  # whatever filters the caller has set
            warnings.showwarning = lambda message, *_: print(f"dcdd: {message}", file=sys.stderr)
            chosen.run(chosen)
    except (ValueError, OSError) as error:
        print(f"dcdd: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        from torch._dynamo.exc import TorchDynamoException  # Whose import takes longer than many a command.

        if is_out_of_memory(error):
            print(f"dcdd: out of memory: {_ROOM}", file=sys.stderr)
        elif isinstance(error, TorchDynamoException):
            reason = str(error).splitlines()[0][:200]
            print(f"dcdd: --compile failed ({reason}): {_COMPILER}", file=sys.stderr)
        else:
            raise
        return 1
    except KeyboardInterrupt:
        print("dcdd: stopped", file=sys.stderr)
        return 130
    return 0


def generate(chosen: argparse.Namespace) -> None:
    """Prompts to pictures."""
    _check_png(chosen.out)
    models = _load(chosen)
    _check_painting(models, chosen, "compare")
    _warn_of_unknown_words(models, chosen.prompt)
    seeds = _seeds(chosen, len(chosen.prompt))
    grid = _sample(models, chosen.prompt, seeds, chosen)
    if chosen.logits is not None:
        grid.save(chosen.logits)
        print(f"wrote {chosen.logits}")
    by_vq = decode_tokens(models.tokenizer, grid)
    if models.decoder is None:
        _write(by_vq, chosen.out, "")
        return
    _write(_paint(models, _condition(models, grid, chosen), seeds, chosen), chosen.out, "")
    if chosen.compare:
        _write(by_vq, chosen.out, "-vq")


def reconstruct(chosen: argparse.Namespace) -> None:
    """Pictures through the tokenizer and back, by both decoders."""
    names = [path.stem for path in chosen.image]
    if len(set(names)) < len(names):
        raise ValueError(
            "two of the pictures have one name: their results would overwrite each other; take them in turn"
        )
    if chosen.side is not None and chosen.side < 1:
        raise ValueError(f"--side must be at least 1 pixel, best the VLM's own size; got {chosen.side}")
    models = _load(chosen, with_sampler=False)
    _check_painting(models, chosen)
    for path in chosen.image:
        proxies = models.tokenizer.encode(_read_image(path, models.tokenizer, chosen.side))
        results = {"vq": decode_tokens(models.tokenizer, proxies)}
        if models.decoder is not None:
            condition = _condition(models, proxies, chosen)
            results["dcdd"] = _paint(models, condition, _seeds(chosen, 1), chosen)
        for suffix, pixels in results.items():
            print(f"wrote {save_image(to_image(pixels[0]), chosen.out / f'{path.stem}-{suffix}.png')}")


def calibrate(chosen: argparse.Namespace) -> None:
    """Fits a calibration: what the VLM samples for prompts, against the tokenizer's features of pictures. The first
    step of a decoder's training. A stopped run that is started again goes on from the samples that it kept;
    `accelerate launch` or `torchrun` share the sampling between processes.
    """
    with processes(chosen.device) as crew:
        chosen.device = crew.device
        prompts, files = _calibration_material(chosen)
        models = _load(chosen)
        sampler, guidance = models.sampler, _guidance(models, chosen)
        folder = chosen.samples or chosen.out.with_name(f"{chosen.out.stem}-samples")
        options = {name: getattr(chosen, name) for name in ("temperature", "top_k", "top_p", "seed")}
        settings = {"vlm": sampler.fingerprint, "guidance": guidance, **options}
        hold_to(settings, folder, write=crew.first)
        crew.wait()
        if crew.first:
            _warn_of_unknown_words(models, prompts)
        proxies = Proxies(models.tokenizer, _pixels(models, files, chosen)) if crew.first else None
        samples = KeptSamples(folder, prompts, seed=chosen.seed, device=models.tokenizer.device)
        if crew.first and samples.missing < len(prompts):
            print(f"going on: {len(prompts) - samples.missing} of {len(prompts)} samples are in {folder}")
        samples.fill(
            lambda texts, seeds: _sample(models, texts, seeds, chosen),
            crew,
            batch=chosen.batch,
            bytes_each=4 * math.prod(sampler.grid) * sampler.codebook.size,
        )
        if crew.first:
            calibration = calibrate_to(
                samples,
                proxies,
                vlm=sampler.name,
                guidance=guidance,
                temperature=chosen.temperature,
                with_anchor=chosen.fit_anchor,
            )
            calibration.save(chosen.out)
            print(statistics_table(compared(sampler.name, samples, proxies, calibration)))
            print(f"\n{verdict(calibration)}\nwrote {chosen.out}; the samples stay in {folder}")


def inspect(chosen: argparse.Namespace) -> None:
    """The paper's Table 1 as text and its Figure 6 as a picture."""
    _check_png(chosen.out)
    if chosen.logits:
        idle = given(chosen, *OF_REAL, *HELD, *SAMPLING)
        if idle:
            raise ValueError(f"{idle} would do nothing: --logits are looked at as they were saved; leave it out")
        codebook = _load(chosen, with_sampler=False).vq.codebook
        columns = {str(path): describe_logits(TokenLogits.load(path), codebook) for path in chosen.logits}
    else:
        prompts, files = _calibration_material(chosen)
        models = _load(chosen)
        calibration = models.decoder.card.calibration if models.decoder is not None else None
        if chosen.calibration is not None:
            calibration = Calibration.load(chosen.calibration)
        proxies = Proxies(models.tokenizer, _pixels(models, files, chosen))
        columns = compared(models.sampler.name, _grids(models, prompts, chosen), proxies, calibration)
    print(statistics_table(columns))
    print(f"wrote {save_image(top_curve(columns), chosen.out)}")


def demo(chosen: argparse.Namespace) -> None:
    """Four sentences and four scenes, by both decoders, on one sheet, with the embedded models."""
    _check_png(chosen.out)
    clock = _Clock()
    models = load_pico(device=_device(chosen))
    _check_painting(models, chosen)
    clock.lap("load the embedded models")
    prompts = list(chosen.prompt or DEMO_PROMPTS)
    _warn_of_unknown_words(models, prompts)
    seeds = _seeds(chosen, len(prompts))
    grid = _sample(models, prompts, seeds, chosen)
    clock.lap(f"Janus samples {len(prompts)} x {grid.tokens.shape[1]} tokens")
    by_vq = decode_tokens(models.tokenizer, grid)
    clock.lap("VQ-VAE decode")
    condition = _condition(models, grid, chosen)
    painted = _paint(models, condition, seeds, chosen)
    clock.lap(f"LCDM + DCDD, {chosen.steps or models.decoder.card.steps} steps")
    doubt = rearrange(1 - condition.uncertainty[..., 0], "b (h w) -> b h w", h=grid.grid[0])
    rows = [[vq, ours, heat_map(map_, (vq.shape[1], vq.shape[2]))] for vq, ours, map_ in zip(by_vq, painted, doubt)]
    text_sheet = labelled_grid(
        rows, columns=("VQ-VAE decode", "DCDD decode", "uncertainty, 1 - p(1)"), captions=prompts, title="Text to image"
    )

    scenes = [render_scene("test", index) for index in DEMO_SCENES]
    pixels = torch.cat([scene_pixels(scene.image[None], models.tokenizer.device) for scene in scenes])
    proxies = models.tokenizer.encode(pixels)
    by_vq = decode_tokens(models.tokenizer, proxies)
    painted = _paint(models, _condition(models, proxies, chosen), _seeds(chosen, len(scenes)), chosen)
    clock.lap(f"reconstruct {len(scenes)} held-out scenes by both decoders")
    scene_sheet = labelled_grid(
        list(zip(pixels, by_vq, painted)),
        columns=("ground truth", "VQ-VAE decode", "DCDD decode"),
        captions=[scene.caption for scene in scenes],
        title="Reconstruction of held-out scenes",
    )
    save_image(beside(text_sheet, scene_sheet), chosen.out)
    clock.lap(f"write {chosen.out}")


def reconstruction(chosen: argparse.Namespace) -> None:
    """rFID, SSIM, PSNR and LPIPS of both decoders over a folder of pictures. A stopped run that is started again goes
    on; `accelerate launch` or `torchrun` share it between processes."""
    if chosen.limit is not None and chosen.statistics is not None and not chosen.statistics.exists():
        raise ValueError(
            f"--statistics {chosen.statistics} does not exist yet and would be of the first {chosen.limit} pictures "
            "alone: make it without --limit, or leave it out"
        )
    with processes(chosen.device) as crew:
        chosen.device = crew.device
        pictures = pictures_in(chosen.images, by_category=chosen.by_category, limit=chosen.limit)
        models = _load(chosen, with_sampler=False)
        device = models.tokenizer.device
        report = evaluate_reconstruction(
            _run(chosen, crew),
            pictures,
            _decoders(models, chosen),
            features=_feature_network(chosen, device),
            perceptual=_perceptual_network(chosen, device),
            size=chosen.size,
            keep_pictures=chosen.keep_pictures,
        )
        _tell(report, chosen)


def text(chosen: argparse.Namespace) -> None:
    """gFID of both decoders over a file of prompts, from the same tokens and logits, and GenEval's folders for its own
    scorer. A stopped run that is started again goes on; `accelerate launch` or `torchrun` share it between processes.
    """
    if chosen.prompts is None and chosen.geneval is None:
        raise ValueError("nothing to draw: give --prompts FILE, --geneval FILE or both")
    measured = [f"--{name}" for name in ("references", "statistics", "inception") if getattr(chosen, name) is not None]
    if chosen.prompts is None and measured:
        raise ValueError(f"{', '.join(measured)} would do nothing: GenEval's own scorer measures; leave it out")
    with processes(chosen.device) as crew:
        chosen.device = crew.device
        kept = {"limit": chosen.limit, "by_category": chosen.by_category}
        prompts = at_most(read_prompts(chosen.prompts), **kept) if chosen.prompts is not None else []
        geneval = at_most(read_geneval(chosen.geneval), **kept) if chosen.geneval is not None else []
        models = _load(chosen)
        decoders, run = _decoders(models, chosen), _run(chosen, crew)
        options = {"temperature": chosen.temperature, "top_k": chosen.top_k, "top_p": chosen.top_p}
        options = {"guidance": _guidance(models, chosen), **options}
        sampling = {"vlm": models.sampler.fingerprint, **options}
        if crew.first:
            _warn_of_unknown_words(models, [prompt.text for prompt in (*prompts, *geneval)])

        def sampled(texts: Sequence[str], seeds: Sequence[int]) -> TokenLogits:
            return sample(models.sampler, texts, seeds=seeds, **options)

        if prompts:
            features = _feature_network(chosen, models.tokenizer.device)
            report = evaluate_text(
                run,
                prompts,
                decoders,
                sampled,
                sampling=sampling,
                features=features,
                references=chosen.references,
                by_category=chosen.by_category,
            )
            _tell(report, chosen)
        if geneval:
            folders = generate_geneval(run, geneval, decoders, sampled, sampling=sampling)
            if crew.first:
                print("\n".join(f"wrote {folder}: a folder for GenEval's evaluate_images.py" for folder in folders))


class _Clock:
    """Prints how long each stage took."""

    def __init__(self):
        self.last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        print(f"{now - self.last:7.2f} s  {stage}")
        self.last = now


def _device(chosen: argparse.Namespace) -> torch.device:
    try:
        return torch.zeros(1, device=chosen.device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {chosen.device} cannot be used here ({reason}); try --device cpu") from error


def _load(chosen: argparse.Namespace, *, with_sampler: bool = True) -> Models:
    device = _device(chosen)
    if chosen.janus is None:
        idle = given(chosen, *OF_REAL, *HELD)
        if idle:
            raise ValueError(f"{idle} goes with --janus; without it the embedded models are used")
        return load_pico(device=device, with_sampler=with_sampler)
    return load_models(
        vlm=chosen.janus,
        decoder=chosen.decoder,
        vae=chosen.vae,
        base=chosen.base,
        device=device,
        dtype=getattr(torch, chosen.dtype or "float32"),
        with_sampler=with_sampler,
        **{name: getattr(chosen, option) for option, name in HELD.items()},
    )


def _feature_network(chosen: argparse.Namespace, device: torch.device) -> FeatureNetwork:
    """Inception from a file; without one, for the embedded models the scene reader."""
    if chosen.inception is None and chosen.janus is None:
        return pico_models.feature_network(device=device)
    return feature_network(chosen.inception, device=device)


def _perceptual_network(chosen: argparse.Namespace, device: torch.device) -> PerceptualNetwork:
    """LPIPS from a file; without one, for the embedded models the scene reader."""
    if chosen.lpips is None and chosen.janus is None:
        return pico_models.perceptual_network(device=device)
    return perceptual_network(chosen.lpips, device=device)


def _check_painting(models: Models, chosen: argparse.Namespace, *others: str) -> None:
    """Before anything is sampled: that there is a decoder for what was asked of it, and a schedule."""
    idle = given(chosen, *PAINTING, *others)
    if models.decoder is None and idle:
        raise ValueError(f"{idle} would do nothing without a decoder: give --decoder and --vae as well")
    timesteps(1 if chosen.steps is None else chosen.steps, shift=chosen.shift or 0.0)


def _decoders(models: Models, chosen: argparse.Namespace) -> Decoders:
    _check_painting(models, chosen)
    card = _card(models, chosen) if models.decoder is not None else None
    return Decoders(models=models, card=card, steps=chosen.steps, shift=chosen.shift)


def _run(chosen: argparse.Namespace, crew: Processes) -> Run:
    return Run(
        out=chosen.out,
        processes=crew,
        seed=chosen.seed,
        batch=chosen.batch,
        statistics=chosen.statistics,
        command=chosen.command,
    )


def _tell(report: str | None, chosen: argparse.Namespace) -> None:
    if report is not None:
        print(f"{report}\nwrote {chosen.out / 'report.md'} and results.json")


def _seeds(chosen: argparse.Namespace, count: int) -> list[int]:
    return [chosen.seed + i for i in range(count)]


def _warn_of_unknown_words(models: Models, prompts: Sequence[str]) -> None:
    for prompt in prompts:
        unknown = models.sampler.unknown_words(prompt)
        if unknown:
            print(
                f"dcdd: {models.sampler.name} does not know {', '.join(unknown)} (in: {prompt}); it knows "
                f"{', '.join(models.sampler.known_words())}",
                file=sys.stderr,
            )


@contextmanager
def _bar(label: str) -> Iterator[Callable[..., None]]:
    """A progress bar as an `on_step`."""
    with tqdm(desc=label, unit="step", leave=False, disable=None) as bar:

        def on_step(step: int, total: int, _: torch.Tensor) -> None:
            bar.total = total
            bar.update(step - bar.n)

        yield on_step


def _sample(models: Models, prompts: Sequence[str], seeds: Sequence[int], chosen: argparse.Namespace) -> TokenLogits:
    with _bar("tokens") as on_step:
        return sample(
            models.sampler,
            prompts,
            seeds=seeds,
            guidance=_guidance(models, chosen),
            temperature=chosen.temperature,
            top_k=chosen.top_k,
            top_p=chosen.top_p,
            on_step=on_step,
        )


def _grids(models: Models, prompts: Sequence[str], chosen: argparse.Namespace) -> Iterator[TokenLogits]:
    """Token logits of many prompts, a batch at a time."""
    seeds = _seeds(chosen, len(prompts))
    for k in range(0, len(prompts), chosen.batch):
        yield _sample(models, prompts[k : k + chosen.batch], seeds[k : k + chosen.batch], chosen)


def _guidance(models: Models, chosen: argparse.Namespace) -> float:
    """The one that was asked for, that of the decoder's calibration, or DeepSeek's 5."""
    if chosen.guidance is not None:
        return chosen.guidance
    calibration = models.decoder.card.calibration if models.decoder is not None else None
    return calibration.guidance if calibration is not None and calibration.guidance is not None else 5.0


def _paint(models: Models, condition: Condition, seeds: Sequence[int], chosen: argparse.Namespace) -> torch.Tensor:
    with _bar("decoder") as on_step:
        options = {"steps": chosen.steps, "shift": chosen.shift, "on_step": on_step}
        return decode(models.decoder, models.codec, condition, seeds=seeds, **options).pixels


def _card(models: Models, chosen: argparse.Namespace) -> DecoderCard:
    """The decoder's card, with what was asked for in place of its own."""
    calibration = Calibration.load(chosen.calibration) if chosen.calibration is not None else None
    return serving(models.decoder.card, calibration=calibration, anchor=chosen.anchor, reads=chosen.reads)


def _condition(models: Models, grid: TokenLogits, chosen: argparse.Namespace) -> Condition:
    return condition_for(_card(models, chosen), grid, models.tokenizer.codebook)


def _calibration_material(chosen: argparse.Namespace) -> tuple[list[str], list[Picture] | None]:
    """Prompts and picture files; for the embedded models captions, and None for rendered scenes, where none are given.

    Any other VLM gets the package's prompts. Of a folder, whose sub-folders may be classes, pictures are taken evenly.
    """
    count, embedded = chosen.count, chosen.janus is None
    if count < 1:
        raise ValueError(f"--count must be at least 1, best 100; got {count}")
    if chosen.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {chosen.batch}")
    if chosen.prompts is None and embedded:
        prompts = [facts.caption() for facts in scene_facts("calibration", count)]
    else:
        prompts = [prompt.text for prompt in read_prompts(chosen.prompts or PROMPTS)[:count]]
    if chosen.images is not None:
        found = pictures_in(chosen.images)
        count = min(count, len(found))
        return prompts, [found[i * len(found) // count] for i in range(count)]
    if embedded:
        return prompts, None
    raise ValueError(
        "a VLM of your own needs real pictures: the proxies, which are what its tokenizer sees in them, are made to "
        "look like what the VLM says. Give --images FOLDER, about 100 of the kind that the decoder will be trained on"
    )


def _pixels(models: Models, files: Sequence[Picture] | None, chosen: argparse.Namespace) -> Iterator[torch.Tensor]:
    """The pictures [1, 3, S, S] one by one, as squares of the size that the VLM paints; scenes where there are none."""
    vq, size = models.tokenizer, Decoders(models=models).size
    for one in tqdm(files or range(chosen.count), desc="features", unit="picture", disable=None):
        if files is None:
            yield scene_pixels(render_scene("calibration", one).image[None], vq.device)
        else:
            yield read_pixels([one], size, vq.device)


def _read_image(path: Path, vq: VQTokenizer, side: int | None = None) -> torch.Tensor:
    """A picture file as pixels [1, 3, H, W], centre-cropped to a multiple of the tokenizer's factor.

    Args:
        side: larger pictures are shrunk until their longer side has this many pixels.
    """
    image = open_picture(path)
    if side is not None:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    f = vq.factor
    h, w = image.height // f, image.width // f
    if h == 0 or w == 0:
        raise ValueError(f"{path} is {image.width} x {image.height}, smaller than one {f}-pixel token")
    if h * w > _MOST_TOKENS:
        raise ValueError(f"{path} would be {h} x {w} tokens, more than {_MOST_TOKENS}: shrink it with --side PIXELS")
    left, top = (image.width - w * f) // 2, (image.height - h * f) // 2
    return to_pixels(to_tensor(image.crop((left, top, left + w * f, top + h * f)))[None], vq.device)


def _check_png(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out {path}: pictures are written as PNG, give a name that ends in .png")


def _write(pictures: torch.Tensor, out: Path, suffix: str) -> None:
    """One picture under the given name, several numbered."""
    for i, pixels in enumerate(pictures):
        number = f"-{i + 1}" if len(pictures) > 1 else ""
        print(f"wrote {save_image(to_image(pixels), out.with_name(f'{out.stem}{number}{suffix}.png'))}")


def _parser() -> argparse.ArgumentParser:
    return command_parser(__doc__, generate, reconstruct, calibrate, inspect, reconstruction, text, demo)
