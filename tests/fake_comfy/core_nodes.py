"""ComfyUI's own nodes in the shipped workflows: what their sockets and widgets are, and what those do that run here.

Those that work on FLUX's files have sockets alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

UPSCALE = ("nearest-exact", "bilinear", "area", "bicubic", "lanczos")


@dataclass(frozen=True)
class CoreNode:
    """One of ComfyUI's own nodes.

    Attributes:
        inputs: name -> (type, what is said of it); a tuple of choices in the type's place is a combo, an empty one of
            model files.
        run: None where only the sockets are known.
        shows: whether it ends a graph.
        optional: further inputs.
    """

    inputs: dict[str, tuple]
    outputs: tuple[str, ...] = ()
    run: Callable[..., Any] | None = None
    shows: bool = False
    optional: dict[str, tuple] = field(default_factory=dict)

    def info(self) -> dict[str, Any]:
        """The node's entry of /object_info."""
        required, optional = (
            {k: [list(v[0]) if isinstance(v[0], tuple) else v[0], *v[1:]] for k, v in part.items()}
            for part in (self.inputs, self.optional)
        )
        return {
            "input": {"required": required} | ({"optional": optional} if optional else {}),
            "output": list(self.outputs),
            "output_name": list(self.outputs),
            "output_node": self.shows,
            "python_module": "nodes",
        }


def core_nodes(comfy: Any, folders: Any) -> dict[str, CoreNode]:
    """By node id.

    Args:
        comfy, folders: the double's own modules `comfy` and `folder_paths`.
    """

    def save(images: torch.Tensor, filename_prefix: str) -> dict[str, Any]:
        return _written(images, Path(folders.get_output_directory()), filename_prefix, "output")

    def preview(images: torch.Tensor) -> dict[str, Any]:
        return _written(images, Path(folders.get_temp_directory()), "preview", "temp")

    def scale_by(image: torch.Tensor, upscale_method: str, scale_by: float) -> tuple[torch.Tensor]:
        sides = (round(side * scale_by) for side in image.shape[2:0:-1])
        return (comfy.utils.common_upscale(image.movedim(-1, 1), *sides, upscale_method, "disabled").movedim(1, -1),)

    def sample(model, latent_image: dict, **values: Any) -> tuple[dict[str, Any]]:
        progress = comfy.utils.ProgressBar(values["steps"])
        return (_sampled(model, latent_image, progress, **values),)

    whole = {"default": 512, "min": 0, "max": 16384}
    image, mask, latent, model, vae, clip, conditioning = (
        (kind, {}) for kind in ("IMAGE", "MASK", "LATENT", "MODEL", "VAE", "CLIP", "CONDITIONING")
    )
    number, text = ("FLOAT", {"default": 1.0}), ("STRING", {"multiline": True})
    saved = {"images": image, "filename_prefix": ("STRING", {"default": "ComfyUI"})}
    sampling = {
        "model": model,
        "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}),
        "steps": ("INT", {"default": 20, "min": 1, "max": 10000}),
        "cfg": ("FLOAT", {"default": 8.0, "min": 0.0, "max": 100.0}),
        "sampler_name": (("euler", "dpmpp_2m"),),
        "scheduler": (("simple", "normal"),),
        "positive": conditioning,
        "negative": conditioning,
        "latent_image": latent,
        "denoise": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0}),
    }
    scaled = {"image": image, "upscale_method": (UPSCALE,)}
    placed = {"x": ("INT", {"default": 0, "min": 0}), "y": ("INT", {"default": 0, "min": 0})}
    return {
        "SaveImage": CoreNode(saved, run=save, shows=True),
        "PreviewImage": CoreNode({"images": image}, run=preview, shows=True),
        "MaskPreview": CoreNode({"mask": mask}, run=lambda mask: preview(_as_image(mask)), shows=True),
        "MaskToImage": CoreNode({"mask": mask}, ("IMAGE",), lambda mask: (_as_image(mask),)),
        "SolidMask": CoreNode(
            {
                "value": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0}),
                "width": ("INT", whole),
                "height": ("INT", whole),
            },
            ("MASK",),
            lambda value, width, height: (torch.full((1, height, width), value),),
        ),
        "MaskComposite": CoreNode(
            {
                "destination": mask,
                "source": mask,
                **placed,
                "operation": (("multiply", "add", "subtract", "and", "or", "xor"),),
            },
            ("MASK",),
            _composite,
        ),
        "RepeatImageBatch": CoreNode(
            {"image": image, "amount": ("INT", {"default": 1, "min": 1, "max": 4096})},
            ("IMAGE",),
            lambda image, amount: (image.repeat(amount, 1, 1, 1),),
        ),
        "ImageScaleBy": CoreNode(
            {**scaled, "scale_by": ("FLOAT", {"default": 1.0, "min": 0.01, "max": 8.0})}, ("IMAGE",), scale_by
        ),
        "ImageSharpen": CoreNode(
            {
                "image": image,
                "sharpen_radius": ("INT", {"default": 1, "min": 1, "max": 31}),
                "sigma": ("FLOAT", {"default": 1.0, "min": 0.1, "max": 10.0}),
                "alpha": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 5.0}),
            },
            ("IMAGE",),
            _sharpened,
        ),
        "ImageScale": CoreNode(
            {**scaled, "width": ("INT", whole), "height": ("INT", whole), "crop": (("disabled", "center"),)}, ("IMAGE",)
        ),
        "UNETLoader": CoreNode(
            {"unet_name": ((),), "weight_dtype": (("default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"),)},
            ("MODEL",),
        ),
        "DualCLIPLoader": CoreNode(
            {
                "clip_name1": ((),),
                "clip_name2": ((),),
                "type": (("sdxl", "sd3", "flux"),),
                "device": (("default", "cpu"),),
            },
            ("CLIP",),
        ),
        "VAELoader": CoreNode({"vae_name": ((),)}, ("VAE",)),
        "CLIPTextEncode": CoreNode({"text": text, "clip": clip}, ("CONDITIONING",)),
        "VAEEncode": CoreNode(
            {"pixels": image, "vae": vae}, ("LATENT",), lambda pixels, vae: ({"samples": vae.encode(pixels)},)
        ),
        "VAEDecode": CoreNode(
            {"samples": latent, "vae": vae}, ("IMAGE",), lambda samples, vae: (vae.decode(samples["samples"]),)
        ),
        "SetLatentNoiseMask": CoreNode(
            {"samples": latent, "mask": mask},
            ("LATENT",),
            lambda samples, mask: ({**samples, "noise_mask": mask.reshape(-1, 1, *mask.shape[-2:])},),
        ),
        "ImageCompositeMasked": CoreNode(
            {"destination": image, "source": image, **placed, "resize_source": ("BOOLEAN", {"default": False})},
            ("IMAGE",),
            optional={"mask": mask},
        ),
        "FluxGuidance": CoreNode({"conditioning": conditioning, "guidance": number}, ("CONDITIONING",)),
        "ConditioningZeroOut": CoreNode({"conditioning": conditioning}, ("CONDITIONING",)),
        "KSampler": CoreNode(sampling, ("LATENT",), sample),
    }


def _as_image(mask: torch.Tensor) -> torch.Tensor:
    return mask.reshape(-1, *mask.shape[-2:], 1).expand(-1, -1, -1, 3)


def _written(images: Iterable[torch.Tensor], root: Path, prefix: str, kind: str) -> dict[str, Any]:
    """PNG files PREFIX_00001_.png and on, as the page is told of them."""
    folder, name = (root / prefix).parent, Path(prefix).name
    folder.mkdir(parents=True, exist_ok=True)
    first, told = len(list(folder.glob(f"{name}_*.png"))) + 1, []
    for number, one in enumerate(images, first):
        file = f"{name}_{number:05}_.png"
        Image.fromarray((255 * one).clamp(0, 255).byte().numpy()).save(folder / file)
        told.append({"filename": file, "subfolder": Path(prefix).parent.as_posix().strip("."), "type": kind})
    return {"ui": {"images": told}}


def _composite(destination, source, x: int, y: int, operation: str) -> tuple[torch.Tensor]:
    """Sets or adds one mask on another at a place; what lies beyond is cut."""
    if operation != "add":
        raise NotImplementedError(f"no workflow composes masks by {operation!r}")
    whole = destination.clone()
    part = whole[:, y : y + source.shape[1], x : x + source.shape[2]]
    part += source[:, : part.shape[1], : part.shape[2]]
    return (whole.clamp(0, 1),)


def _sharpened(image: torch.Tensor, sharpen_radius: int, sigma: float, alpha: float) -> tuple[torch.Tensor]:
    """The image less its blurred self, 10 alpha times as strong, added to it."""
    steps = torch.linspace(-1, 1, 2 * sharpen_radius + 1)
    bell = torch.exp(-(steps**2) / (2 * sigma**2))
    kernel = torch.outer(bell, bell)
    kernel = (kernel / kernel.sum()).expand(3, 1, -1, -1)
    pixels = image.movedim(-1, 1)
    blurred = F.conv2d(F.pad(pixels, [sharpen_radius] * 4, mode="reflect"), kernel, groups=3)
    return ((pixels + 10 * alpha * (pixels - blurred)).clamp(0, 1).movedim(1, -1),)


def _sampled(
    model,
    latent: dict,
    progress,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    denoise: float,
    **_,
) -> dict[str, Any]:
    """Euler steps of a model on the flow's path, evenly spaced before its shift, without CFG."""
    if (sampler_name, scheduler, cfg) != ("euler", "simple", 1.0):
        raise NotImplementedError(f"no workflow that runs here samples by {sampler_name}, {scheduler}, CFG {cfg}")
    prepare = lambda model, shape, conds, model_options=None: model.model  # noqa: E731
    for wrapper in (one for own in model.wrappers.get("prepare_sampling", {}).values() for one in own):
        prepare = partial(wrapper, prepare)
    network = prepare(model, list(latent["samples"].shape), {}, model_options=model.model_options)
    sampling, whole = network.model_sampling, int(steps / denoise)
    sigmas = [float(sampling.sigmas[-1 - int(k * len(sampling.sigmas) / whole)]) for k in range(whole)] + [0.0]
    given = network.process_latent_in(latent["samples"])
    noise = torch.randn(given.shape, generator=torch.Generator().manual_seed(seed))
    area = latent.get("noise_mask")
    if area is not None:
        area = F.interpolate(area, given.shape[2:], mode="bilinear")
    sigmas = sigmas[-steps - 1 :]
    x = sampling.noise_scaling(sigmas[0], noise, given)
    told = {"transformer_options": {"sample_sigmas": torch.tensor(sigmas)}}
    for done, (now, after) in enumerate(pairwise(sigmas), 1):
        if area is not None:
            x = area * x + (1 - area) * sampling.noise_scaling(now, noise, given)
        clean = network.apply_model(x, now)
        for hook in model.model_options.get("sampler_post_cfg_function", []):
            clean = hook(
                {
                    "denoised": clean,
                    "sigma": torch.full((len(x),), now),
                    "model": network,
                    "input": x,
                    "model_options": told,
                }
            )
        if area is not None:
            clean = area * clean + (1 - area) * given
        x = x + (after - now) * (x - clean) / now
        progress.update_absolute(done, steps)
    return {**latent, "samples": network.process_latent_out(x)}
