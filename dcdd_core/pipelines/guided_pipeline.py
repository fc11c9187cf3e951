"""Distribution guidance with a diffusers pipeline as the prior: FLUX.1, FLUX.2 [klein], SDXL or Stable Diffusion 1.x.

The pipeline encodes the prompt with its own text encoders and runs its own denoiser. Before every scheduler step the
predicted clean latents are read out, corrected and handed back.

Shapes: B batch, C latent channels, h' w' latent grid.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from einops import rearrange

from .. import registry
from ..files import is_finite, read_json, reading, utf8_path
from ..method.flow import interpolate, recover_clean, timesteps
from ..method.guidance import (
    clean_from_noise,
    clean_from_v,
    noise_from_clean,
    time_of_alpha,
    v_from_clean,
    velocity_towards,
)
from ..method.latents import pack, unpack
from ..method.sampling import keyed_generator
from ..models.flux2_vae import Flux2Codec
from ..protocols import ImageTokenizer, LatentCodec
from ..settings import require_number
from ..types import Condition
from .decode import Decoded, OnDecodeStep, check_part, pixels_of
from .guided import GuidanceOptions, TokenGuide, token_guide
from .host import PLAIN, Host
from .oom import one_by_one
from .tiles import Decode

#: The pipeline classes that can be read, each with its name in messages.
READ = {
    "FluxPipeline": "FLUX.1",
    "FluxImg2ImgPipeline": "FLUX.1",
    "Flux2KleinPipeline": "FLUX.2 [klein]",
    "StableDiffusionXLPipeline": "SDXL",
    "StableDiffusionXLImg2ImgPipeline": "SDXL",
    "StableDiffusionPipeline": "Stable Diffusion 1.x",
    "StableDiffusionImg2ImgPipeline": "Stable Diffusion 1.x",
}
_MOST_STEPS = 1000
_KLEIN = "Flux2KleinPipeline"
#: The first diffusers release with this pipeline.
_HAS_KLEIN = "0.37"


class PriorPipeline:
    """A diffusers image-to-image pipeline that paints what tokens say.

    Args:
        pipe: of FLUX.1, SDXL or Stable Diffusion 1.x. Its scheduler is replaced: flow-matching Euler, or DDIM.
        codec: the pipeline's autoencoder in float32, with which guidance decodes latents.

    Raises:
        ValueError: for scheduler settings that do not fit, and a model that predicts neither epsilon nor v.
    """

    def __init__(self, pipe: Any, codec: LatentCodec):
        from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

        self.pipe, self.codec, self.flow = pipe, codec, hasattr(pipe, "transformer")
        kind = FlowMatchEulerDiscreteScheduler if self.flow else DDIMScheduler
        if not self.flow and not {"beta_schedule", "trained_betas"} & set(pipe.scheduler.config):
            raise ValueError(
                f"the pipeline's scheduler, {type(pipe.scheduler).__name__}, has no beta_schedule; guidance reads "
                "models that were trained with one, as SDXL and Stable Diffusion 1.x were"
            )
        with reading("the pipeline's scheduler_config.json", f"the settings of a {kind.__name__}"):
            # The times of a flow model are already shifted (`_times`). DDIM would clip latents, as if they were pixels.
            plain = (
                {"use_dynamic_shifting": False, "shift": 1.0, "shift_terminal": None}
                if self.flow
                else {"clip_sample": False, "thresholding": False}
            )
            self._schedule = dict(pipe.scheduler.config)
            pipe.scheduler = kind.from_config({**self._schedule, **plain})
        if not self.flow and pipe.scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"the pipeline's model predicts {pipe.scheduler.config.prediction_type!r}; guidance reads models that "
                "predict 'epsilon' or 'v_prediction'"
            )
        pipe.set_progress_bar_config(disable=True)

    @property
    def device(self) -> torch.device:
        """The device it computes on."""
        return self.pipe.device

    def size_for(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size (H, W), if the model can paint it.

        Raises:
            ValueError: for sides that are not a multiple of 16 or 8 pixels, depending on the model.
        """
        unit = self.codec.factor * (2 if self.flow else 1)
        if any(side < unit or side % unit for side in size):
            fits = " x ".join(str(max(unit, round(side / unit) * unit)) for side in reversed(size))
            raise ValueError(
                f"this model paints sides of multiples of {unit} pixels, got {size[1]} x {size[0]}: use {fits}"
            )
        return size

    def paint(
        self,
        tokenizer: ImageTokenizer,
        condition: Condition,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        scale: float,
        size: tuple[int, int],
        options: GuidanceOptions | None = None,
        steps: int = 10,
        start: float = 0.6,
        image: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        decode: Decode | None = None,
        on_step: OnDecodeStep | None = None,
        host: Host = PLAIN,
        **arguments: Any,
    ) -> Decoded:
        """Paints B images, one by one, from the soft VQ decode noised to t0 = `start`.

        Args:
            prompts, seeds: one per image.
            scale: s of the VLM's calibration.
            size: (H, W) of the images.
            steps: number of denoiser steps to run from `start` on, 1..1000.
            start: above 0 and up to 1: t0 of flow models; for SDXL and Stable Diffusion, the share of the schedule run.
            image, mask: to repaint a part, both or neither: see `pipelines.decode.canvas_of`. Where the mask is 0, the
                latents follow the image's own, noised to each step's time (as in RePaint, arXiv 2201.09865), and the
                image is returned bit for bit.
            decode: how guidance decodes latents; the pipeline's autoencoder by default, or a cheap stand-in for it.
            arguments: further arguments of the pipeline's own call, such as `guidance_scale`.

        Raises:
            ValueError: for numbers out of range, another tokenizer's condition, an image or mask that does not fit, and
                latents that are not finite.
            RuntimeError: if an image does not fit into memory.
        """
        count = len(condition.code_vectors)
        if len(prompts) != count or len(seeds) != count:
            raise ValueError(f"got {len(prompts)} prompts and {len(seeds)} seeds for {count} images: give one an image")
        require_number("steps", steps, whole=True, least=1, most=_MOST_STEPS)
        require_number("start", start, above=0, most=1)
        size = self.size_for(size)
        check_part(image, mask, count, size)

        def part_of(k: int) -> list[torch.Tensor | None]:
            return [x if x is None or len(x) == 1 else x[k : k + 1] for x in (image, mask)]

        def run(k: int) -> torch.Tensor:
            own, (own_image, own_mask) = condition.part(k, k + 1).to(self.device), part_of(k)
            guide = token_guide(
                tokenizer, self.codec, own, scale=scale, options=options, size=size, decode=decode, host=host
            )
            known = None
            if own_image is not None:
                guide = guide.under(own_mask.to(self.device))
                known = self.codec.normalize(self.codec.encode(own_image))
            return self._paint_one(guide, prompts[k], seeds[k], size, steps, start, on_step, arguments, known)

        latents = torch.cat(list(one_by_one(run, count, host)))
        pixels = torch.cat([pixels_of(self.codec, latents[k : k + 1], *part_of(k)) for k in range(count)])
        return Decoded(pixels=pixels, latents=latents)

    @torch.no_grad()
    def _paint_one(
        self,
        guide: TokenGuide,
        prompt: str,
        seed: int,
        size: tuple[int, int],
        steps: int,
        start: float,
        on_step: OnDecodeStep | None,
        arguments: dict[str, Any],
        known: torch.Tensor | None,
    ) -> torch.Tensor:
        """Raw latents [1, C, h', w'] of one image.

        Args:
            known: normalised latents of the image to repaint; None for none.
        """
        keep = functools.partial(_kept, known, guide.area)
        latent_size = (guide.soft.shape[2], guide.soft.shape[3])
        with self._hooked(guide, latent_size, steps, on_step, keep):
            latents = self._run(keep(guide.soft), prompt, seed, size, steps, start, arguments)
        if not is_finite(latents):
            raise ValueError("the pipeline's latents became NaN or infinite: load it in float32 or bfloat16")
        return latents

    def _run(
        self,
        clean: torch.Tensor,
        prompt: str,
        seed: int,
        size: tuple[int, int],
        steps: int,
        start: float,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        """Makes the pipeline's own call: raw latents [1, C, h', w'] float32.

        Args:
            clean: normalised latents to start from, before noise.
        """
        latent_size = (clean.shape[2], clean.shape[3])
        made = self.pipe(
            prompt=prompt,
            image=clean.to(self.pipe.vae.dtype),
            generator=keyed_generator(seed),
            output_type="latent",
            **self._part_of_schedule(latent_size, size, steps, start),
            **arguments,
        ).images
        return self.codec.denormalize(self._unpacked(made, latent_size).float())

    def _part_of_schedule(
        self, latent_size: tuple[int, int], size: tuple[int, int], steps: int, start: float
    ) -> dict[str, Any]:
        """The pipeline's own arguments for running `steps` steps from `start` on."""
        if self.flow:
            times = self._times(latent_size, steps, start)
            return {
                "sigmas": times, "strength": 1.0, "num_inference_steps": steps, "height": size[0], "width": size[1]
            }  # fmt: skip
        # These pipelines run floor(strength * whole) steps: the half keeps rounding from losing one.
        whole = max(steps, round(steps / start))
        return {"strength": min(1.0, (steps + 0.5) / whole), "num_inference_steps": whole}

    def _times(self, latent_size: tuple[int, int], steps: int, start: float) -> list[float]:
        """An even schedule from 1 to 0, shifted by the model's own mu and scaled to begin at `start`, without the 0.

        `pipelines.decode.paint` computes it in the same way.
        """
        return (start * timesteps(steps, shift=self._shift(latent_size, steps)))[:-1].tolist()

    def _shift(self, latent_size: tuple[int, int], steps: int) -> float:
        """The model's own mu of the time shift."""
        schedule = self._schedule
        if not schedule.get("use_dynamic_shifting"):
            return math.log(schedule.get("shift", 1.0))
        few, many = schedule.get("base_image_seq_len", 256), schedule.get("max_image_seq_len", 4096)
        least, most = schedule.get("base_shift", 0.5), schedule.get("max_shift", 1.15)
        tokens = (latent_size[0] // 2) * (latent_size[1] // 2)
        return least + (most - least) * (tokens - few) / (many - few)

    @contextmanager
    def _hooked(
        self,
        guide: TokenGuide,
        latent_size: tuple[int, int],
        total: int,
        on_step: OnDecodeStep | None,
        keep: Callable[[torch.Tensor], torch.Tensor],
    ) -> Iterator[None]:
        """Within this context, the scheduler's steps continue from corrected predictions.

        Args:
            keep: puts the kept latents back in place in clean latents. As the scheduler's step is deterministic, it
                then leads from the kept latents noised to one time to the same latents noised to the next.
        """
        scheduler, plain, done = self.pipe.scheduler, self.pipe.scheduler.step, 0

        @functools.wraps(plain)
        def step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **options: Any) -> Any:
            nonlocal done
            clean, time, back = self._predicted(model_output, timestep, sample)
            z = predicted = self._unpacked(clean, latent_size)
            if guide.guided(time, done):
                z = guide.correct(z, time)
            z = keep(z)
            if z is not predicted:
                model_output = back(self._packed(z)).to(model_output.dtype)
            done += 1
            if on_step is not None:
                on_step(done, max(done, total), self.codec.denormalize(z))
            return plain(model_output, timestep, sample, *args, **options)

        scheduler.step = step
        try:
            yield
        finally:
            del scheduler.step

    def _predicted(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor
    ) -> tuple[torch.Tensor, float, Callable[[torch.Tensor], torch.Tensor]]:
        """The predicted clean latents in float32, their time, and a function from clean latents to the model output."""
        scheduler, output, x = self.pipe.scheduler, model_output.float(), sample.float()
        if self.flow:
            if scheduler.step_index is None:
                scheduler._init_step_index(timestep)
            time = float(scheduler.sigmas[scheduler.step_index])
            return recover_clean(x, output, time), time, lambda clean: velocity_towards(x, clean, time)
        alpha_bar = float(scheduler.alphas_cumprod[int(timestep)])
        time = time_of_alpha(alpha_bar)
        if scheduler.config.prediction_type == "epsilon":
            return clean_from_noise(x, output, alpha_bar), time, lambda clean: noise_from_clean(x, clean, alpha_bar)
        return clean_from_v(x, output, alpha_bar), time, lambda clean: v_from_clean(x, clean, alpha_bar)

    def _unpacked(self, latents: torch.Tensor, latent_size: tuple[int, int]) -> torch.Tensor:
        return unpack(latents, *latent_size) if self.flow else latents

    def _packed(self, latents: torch.Tensor) -> torch.Tensor:
        return pack(latents) if self.flow else latents


class KleinPrior(PriorPipeline):
    """FLUX.2 [klein], which diffusers offers only as text-to-image: it is given the noised latents to start from."""

    def _run(
        self,
        clean: torch.Tensor,
        prompt: str,
        seed: int,
        size: tuple[int, int],
        steps: int,
        start: float,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        times = self._times((clean.shape[2], clean.shape[3]), steps, start)
        noise = torch.randn(clean.shape, generator=keyed_generator(seed)).to(clean)
        made = self.pipe(
            prompt=prompt,
            latents=interpolate(clean, noise, times[0]),
            sigmas=times,
            num_inference_steps=steps,
            height=size[0],
            width=size[1],
            output_type="latent",
            **arguments,
        ).images
        return made.float()

    def _shift(self, latent_size: tuple[int, int], steps: int) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        return compute_empirical_mu(image_seq_len=latent_size[0] * latent_size[1], num_steps=steps)

    def _unpacked(self, latents: torch.Tensor, latent_size: tuple[int, int]) -> torch.Tensor:
        return rearrange(latents, "b (h w) f -> b f h w", h=latent_size[0])

    def _packed(self, latents: torch.Tensor) -> torch.Tensor:
        return rearrange(latents, "b f h w -> b (h w) f")


def load_prior_pipeline(
    folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PriorPipeline:
    """Loads the pipeline in a diffusers folder, from local files only.

    Raises:
        ValueError: for a path that is not a folder, another kind of pipeline, files that cannot be read, and a version
            of diffusers that is too old for the pipeline.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected a diffusers pipeline of {_kinds()}")
    index = read_json(folder / "model_index.json", "the list of a diffusers pipeline's parts")
    name = index.get("_class_name")
    if name not in READ:
        raise ValueError(f"{folder} holds a {name!r}; expected a diffusers pipeline of {_kinds()}")
    if name == _KLEIN:
        return _load_klein(folder, device, dtype)
    import diffusers

    codec = registry.load_codec(folder, device=device, dtype=torch.float32)
    kind = getattr(diffusers, image_to_image(name))
    with reading(folder, f"a {READ[name]} pipeline"), utf8_path(folder) as readable, warnings.catch_warnings():
        # Newer diffusers rename torch_dtype; the oldest supported one knows only this name.
        warnings.simplefilter("ignore", FutureWarning)
        pipe = kind.from_pretrained(readable, torch_dtype=dtype, local_files_only=True)
    return PriorPipeline(pipe.to(device), codec)


def image_to_image(name: str) -> str:
    """The name of the image-to-image class that goes with a pipeline's class, in diffusers' naming.

    AutoPipelineForImage2Image knows these names too, but imports every pipeline, and a newer transformers breaks some
    of an old diffusers.
    """
    return name.replace("Img2Img", "").replace("Pipeline", "Img2ImgPipeline")


def _load_klein(folder: Path, device: torch.device | str, dtype: torch.dtype) -> KleinPrior:
    import diffusers

    if not hasattr(diffusers, _KLEIN):
        raise ValueError(
            f"{folder} holds a {_KLEIN!r}, which diffusers has since {_HAS_KLEIN}, and this is "
            f"{diffusers.__version__}: upgrade diffusers"
        )
    with reading(folder, f"a {READ[_KLEIN]} pipeline"), utf8_path(folder) as readable, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        vae = diffusers.AutoencoderKLFlux2.from_pretrained(
            readable / "vae", torch_dtype=torch.float32, local_files_only=True
        )
        pipe = diffusers.Flux2KleinPipeline.from_pretrained(readable, torch_dtype=dtype, local_files_only=True)
    return KleinPrior(pipe.to(device), Flux2Codec(vae.to(device).eval().requires_grad_(False)))


def _kept(known: torch.Tensor | None, area: torch.Tensor | None, clean: torch.Tensor) -> torch.Tensor:
    """Clean latents with the known ones where nothing is painted; unchanged without known latents or an area."""
    return clean if known is None or area is None else torch.where(area.to(clean) > 0, clean, known.to(clean))


def _kinds() -> str:
    return ", ".join(dict.fromkeys(READ.values()))
