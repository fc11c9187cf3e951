"""ComfyUI's side: model folders, memory manager, progress with previews, notices, pictures and masks.

Shapes: B batch, H W pixels, C channels. ComfyUI's IMAGE is [B, H, W, C] in 0..1, its MASK [B, H, W] in 0..1.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Generic, TypeVar

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import folder_paths
import torch
from comfy_execution.utils import get_executing_context
from diffusers import AutoencoderKL
from einops import rearrange
from PIL import Image
from server import PromptServer
from torch import nn

from ..dcdd_core.models.vae import KLCodec
from ..dcdd_core.pipelines import oom as parts
from ..dcdd_core.types import DCDDWarning, TokenLogits

T = TypeVar("T")

Preview = torch.Tensor | Image.Image | None

log = logging.getLogger("ComfyUI-DCDD")

#: Where a model may live while it works.
PLACEMENTS = ("auto", "low VRAM", "CPU")
_PREVIEW_SIZE = 512
#: From 0.16 on ComfyUI has a patcher of its own for modules that it did not build.
_Patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)


# --- memory -----------------------------------------------------------------------------------------------------------


class _Holder(nn.Module):
    """Around a module whose `device` cannot be written (transformers, diffusers): ComfyUI's patcher wants to."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.device = None


class Managed(Generic[T]):
    """A model that ComfyUI's memory manager loads, pushes out for other nodes' models, and frees.

    Its linear layers become ComfyUI's own, which can stay in RAM and be streamed to the GPU one by one where it is too
    small for all of them. Nothing but the sockets holds it: when the last graph lets go, it is gone.
    """

    def __init__(self, value: T, module: nn.Module, *, placement: str = "auto", eight_bit: tuple[str, ...] = ()):
        """
        Args:
            value: what works with `module`.
            placement: one of `PLACEMENTS`: ComfyUI decides, all layers are streamed, or everything stays on the CPU.
            eight_bit: names of children whose linear layers are stored in 8-bit (float8_e4m3fn) and computed with in
                the type that their input has.
        """
        if placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}")
        _use_comfy_linears(module, comfy.ops.disable_weight_init.Linear)
        for name in eight_bit:
            _use_comfy_linears(module.get_submodule(name), comfy.ops.manual_cast.Linear, torch.float8_e4m3fn)
        cpu, on = torch.device("cpu"), device_of(placement)
        off = cpu if placement == "CPU" else comfy.model_management.unet_offload_device()
        self._value = value
        self._stream = placement == "low VRAM" and on != cpu
        # ComfyUI's log calls a model by its class.
        holder = type(type(module).__name__, (_Holder,), {})(module)
        self._patcher = _Patcher(holder, load_device=on, offload_device=off)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._patcher.load_device

    @property
    def resident(self) -> bool:
        """Whether all its weights are on its device now that it is ready, none of them streamed."""
        return all(weight.device == self.device for weight in self._patcher.model.parameters())

    @property
    def idle(self) -> T:
        """The model wherever it is now, to read its description from."""
        return self._value

    def ready(self, memory: int = 0) -> T:
        """The model, brought to its device.

        Args:
            memory: bytes that working with it takes, besides its weights.
        """
        bring(self, memory=memory)
        return self._value


def bring(*models: Managed, memory: int = 0) -> None:
    """Brings models that work together to their device: none of them is pushed out for another.

    Args:
        memory: bytes that working with them takes, besides their weights.
    """
    stream = any(model._stream for model in models)
    most = comfy.model_management.get_total_memory(models[0].device) if stream else None
    patchers = [model._patcher for model in models]
    comfy.model_management.load_models_gpu(patchers, memory_required=memory, minimum_memory_required=most)
    for model in models:
        # A partial load leaves behind what cannot be streamed: norms, embeddings and convolutions, which are small. It
        # does not call itself partial where there is nothing else.
        for part in model._patcher.model.modules():
            if not hasattr(part, "comfy_cast_weights"):
                part._apply(lambda tensor, device=model.device: tensor.to(device), recurse=False)


def device_of(placement: str) -> torch.device:
    """Where a model of this placement works."""
    return torch.device("cpu") if placement == "CPU" else comfy.model_management.get_torch_device()


def autoencoder_memory(height: int, width: int, channels: int) -> int:
    """Bytes that a convolutional autoencoder takes for one picture in float32, either way: an estimate.

    Args:
        channels: of its widest layers, those at the size of the picture.
    """
    # What ComfyUI reckons for decoding with FLUX's, of 128 channels (comfy/sd.py), AMD's share too.
    share = 2.73 if comfy.model_management.is_amd() else 1
    return round(share * 4 * 2178 * height * width * channels / 128)


class ManagedAutoencoder:
    """A decoder's own autoencoder: an `Autoencoder` that comes to its device for each picture."""

    #: Up to this many weights it draws the previews itself; for FLUX's a linear estimate does.
    _SMALL = 5_000_000

    def __init__(self, network: AutoencoderKL, *, placement: str):
        self.managed = Managed(KLCodec(network), network, placement=placement)
        self.is_small = sum(weight.numel() for weight in network.parameters()) <= self._SMALL
        channels = network.config.block_out_channels
        self._factor, self._channels = 2 ** (len(channels) - 1), channels[0]
        self._blank: dict[tuple[int, ...], torch.Tensor] = {}

    def memory(self, latents: torch.Tensor) -> int:
        """Bytes that it takes for one picture of these latents [B, C, h', w']: an estimate."""
        return autoencoder_memory(*(side * self._factor for side in latents.shape[2:]), self._channels)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """See `Autoencoder.encode`. The empty canvas of every whole picture is encoded once a size."""
        blank, size = not bool(pixels.any()), tuple(pixels.shape)
        if blank and size in self._blank:
            return self._blank[size]
        memory = autoencoder_memory(*pixels.shape[2:], self._channels)
        latents = self.managed.ready(memory).encode(pixels)
        if blank:
            self._blank[size] = latents.cpu()
        return latents

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See `Autoencoder.decode`."""
        return self.managed.ready(self.memory(latents)).decode(latents)

    def preview(self, latents: torch.Tensor) -> torch.Tensor:
        """Up to four pictures of latents, where it is already."""
        return torch.cat([self.managed.idle.decode(one) for one in latents[:4].split(1)])


def _use_comfy_linears(module: nn.Module, kind: type[nn.Linear], storage: torch.dtype | None = None) -> None:
    """Puts ComfyUI's linear layers in the place of torch's, with the same weights."""
    for part in module.modules():
        for name, layer in part.named_children():
            if not isinstance(layer, nn.Linear):
                continue
            ours = kind(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            weight = layer.weight if storage is None else layer.weight.detach().to(storage)
            ours.weight, ours.bias = nn.Parameter(weight, requires_grad=False), layer.bias
            setattr(part, name, ours.train(layer.training))


_REMEDY = (
    "close other programs that use the GPU, choose 'low VRAM' or 8-bit storage in the loader, or a smaller picture"
)


def in_parts(run: Callable[[int, int], T], count: int, *, remedy: str = _REMEDY) -> list[T]:
    """See `pipelines.parts.in_parts`; between the parts ComfyUI gives back what it can."""

    def on_split(size: int) -> None:
        log.warning("out of memory: going on with %d pictures at a time", size)
        comfy.model_management.soft_empty_cache()

    return parts.in_parts(run, count, remedy=remedy, on_split=on_split)


def one_by_one(run: Callable[[int], T], count: int, *, remedy: str = _REMEDY) -> Iterator[T]:
    """run(0), run(1), ... run(count - 1).

    Raises:
        RuntimeError: if one does not fit into memory; says `remedy`.
    """
    for k in range(count):
        yield from in_parts(lambda *_, k=k: run(k), 1, remedy=remedy)


# --- progress and notices ---------------------------------------------------------------------------------------------


class Progress:
    """A node's progress bar with a picture; each step is also where an interrupt stops the node."""

    def __init__(self, total: int):
        self._bar = comfy.utils.ProgressBar(total)

    def step(self, done: int, total: int, preview: Preview = None) -> None:
        """
        Args:
            preview: a picture, or pixels [B, 3, H, W] in -1..1.
        """
        # ComfyUI's bar leaves out reports that come too soon, and with them its check.
        comfy.model_management.throw_exception_if_processing_interrupted()
        picture = _sheet(preview) if isinstance(preview, torch.Tensor) else preview
        self._bar.update_absolute(done, total, None if picture is None else ("JPEG", picture, _PREVIEW_SIZE))


def _sheet(pixels: torch.Tensor) -> Image.Image:
    """Up to four pictures in one, so that a batch shows more than its first."""
    shown = pixels[:4]
    sheet = rearrange(shown, "(r c) d h w -> (r h) (c w) d", r=2 if len(shown) == 4 else 1)
    return Image.fromarray(((sheet.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy())


def notice(text: str) -> None:
    """Warns the user of something that is no failure: on the node that is running, and in the log."""
    log.warning(text)
    tell(text)


def tell(text: str) -> None:
    """Shows a line on the node that is running."""
    context = get_executing_context()
    if context is not None and getattr(PromptServer, "instance", None) is not None:
        PromptServer.instance.send_progress_text(text, context.node_id)


@contextmanager
def noticed() -> Iterator[None]:
    """Warnings that the library gives become notices; others' stay warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DCDDWarning)
        yield
    ours = [warning for warning in caught if issubclass(warning.category, DCDDWarning)]
    for text in dict.fromkeys(str(warning.message) for warning in ours):
        notice(text)
    for warning in caught:
        if warning not in ours:
            warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)


# --- pictures and masks -----------------------------------------------------------------------------------------------


def pixels_of(image: torch.Tensor) -> torch.Tensor:
    """IMAGE -> pixels [B, 3, H, W] float32 in -1..1; an alpha channel is left out, a single one repeated.

    Raises:
        ValueError: for what is no picture, or holds NaN or infinity.
    """
    if not isinstance(image, torch.Tensor) or image.ndim != 4 or image.shape[3] not in (1, 3, 4) or image.numel() == 0:
        came = list(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
        raise ValueError(f"expected an IMAGE [batch, height, width, 1, 3 or 4 channels], got {came}: connect a picture")
    if not bool(torch.isfinite(image).all()):
        raise ValueError("the picture holds NaN or infinity: an earlier node failed, look at its output")
    colours = image[..., :3].expand(-1, -1, -1, 3)
    return rearrange(colours.float().clamp(0, 1), "b h w c -> b c h w") * 2 - 1


def image_of(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [B, 3, H, W] in -1..1 -> IMAGE, on ComfyUI's intermediate device."""
    image = rearrange((pixels.float().clamp(-1, 1) + 1) / 2, "b c h w -> b h w c")
    return image.contiguous().to(comfy.model_management.intermediate_device())


def moved(grid: TokenLogits, device: torch.device) -> TokenLogits:
    """Token logits on another device."""
    return replace(grid, logits=grid.logits.to(device), tokens=grid.tokens.to(device))


def kept(grid: TokenLogits) -> TokenLogits:
    """Token logits on ComfyUI's intermediate device, where results wait for other nodes."""
    return moved(grid, comfy.model_management.intermediate_device())


def check_finite(**values: float) -> None:
    """Refuses numbers that ComfyUI's own limits let through.

    Raises:
        ValueError: naming the input.
    """
    for name, value in values.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}")


def from_pil(picture: Image.Image) -> torch.Tensor:
    """A PIL picture -> IMAGE of one."""
    raw = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    return rearrange(raw.float() / 255, "(h w c) -> 1 h w c", h=picture.height, c=3)


def mask_of(mask: torch.Tensor) -> torch.Tensor:
    """MASK, [H, W], [B, H, W] or [B, 1, H, W] -> [B, 1, H, W] float32 in 0..1.

    Raises:
        ValueError: for what is no mask, or holds NaN or infinity.
    """
    if (
        not isinstance(mask, torch.Tensor)
        or mask.numel() == 0
        or not (mask.ndim in (2, 3) or (mask.ndim == 4 and mask.shape[1] == 1))
    ):
        came = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"expected a MASK [batch, height, width], got {came}: connect a mask")
    if not bool(torch.isfinite(mask).all()):
        raise ValueError("the mask holds NaN or infinity: an earlier node failed, look at its output")
    return mask.float().clamp(0, 1).reshape(-1, 1, *mask.shape[-2:])


def cropped(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[B, C, H, W] -> [B, C, H', W'], at the centre, of the shape height : width: what `resized` shows of it."""
    h, w = pixels.shape[2:]
    top, left = round(max(0, h - w * height / width) / 2), round(max(0, w - h * width / height) / 2)
    return pixels[:, :, top : h - top, left : w - left]


def resized(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[B, C, H, W] -> [B, C, height, width], cropped at the centre to its shape, as ComfyUI's own nodes do it."""
    if pixels.shape[2:] == (height, width):
        return pixels
    return comfy.utils.common_upscale(pixels, width, height, "bicubic", "center")


# --- folders ----------------------------------------------------------------------------------------------------------

BUNDLES = "dcdd"
JANUS = "janus"


def add_model_folders() -> None:
    """Makes models/janus and models/dcdd known, behind what extra_model_paths.yaml names for them."""
    for key in (JANUS, BUNDLES):
        folder_paths.add_model_folder_path(key, os.path.join(folder_paths.models_dir, key))
    # Only bundles are single files; a key without extensions would list everything there is.
    folder_paths.folder_names_and_paths[BUNDLES][1].add(".safetensors")


def model_folder(key: str) -> Path:
    """Where new files of a kind go: the folder that is called like it, among those that are searched."""
    paths = [Path(path) for path in folder_paths.get_folder_paths(key)]
    return next((path for path in paths if path.name == key), paths[0])


def files(key: str) -> list[str]:
    """Names of the model files of a kind, as combos list them."""
    return folder_paths.get_filename_list(key)


def folders(key: str, *, holding: str) -> list[str]:
    """Names of the folders of a kind that hold a file or folder of that name."""
    found = (
        child.name
        for root in map(Path, folder_paths.get_folder_paths(key))
        if root.is_dir()
        for child in root.iterdir()
        if (child / holding).exists()
    )
    return sorted(dict.fromkeys(found))


def transformers() -> list[str]:
    """What may hold a FLUX transformer: model files, and diffusers folders marked by a slash at their end."""
    return [*files("diffusion_models"), *(f"{name}/" for name in folders("diffusers", holding="transformer"))]


def autoencoders() -> list[str]:
    """What may hold a FLUX autoencoder: VAE files, and diffusers folders marked by a slash at their end."""
    return [*files("vae"), *(f"{name}/" for name in folders("diffusers", holding="vae"))]


def transformer_path(name: str) -> Path:
    """The file or folder of a name from `transformers`."""
    return path_of("diffusers", name) / "transformer" if name.endswith("/") else path_of("diffusion_models", name)


def autoencoder_path(name: str) -> Path:
    """The file or folder of a name from `autoencoders`."""
    return path_of("diffusers", name) / "vae" if name.endswith("/") else path_of("vae", name)


def path_of(key: str, name: str) -> Path:
    """The file or folder that a combo's name stands for.

    Raises:
        ValueError: if it is not there (any more), or points out of its folder.
    """
    for root in map(Path, folder_paths.get_folder_paths(key)):
        path = root / name
        if name and path.exists() and path.resolve() != root.resolve() and ".." not in Path(name).parts:
            return path
    where = " or ".join(folder_paths.get_folder_paths(key))
    raise ValueError(f"{name!r} is not in {where}: put it there, press R to refresh the lists, and choose it again")


CALIBRATIONS = "calibrations"
#: What a combo shows where there is none.
NO_CALIBRATION = "none yet: fit one and save it"


def bundles() -> list[str]:
    """Decoder bundles in models/dcdd; calibrations lie in a folder of their own there."""
    return [name for name in files(BUNDLES) if Path(name).parts[0] != CALIBRATIONS]


def calibrations() -> list[str]:
    """Calibration files, by name below their folder."""
    names = (Path(name) for name in files(BUNDLES))
    return [name.relative_to(CALIBRATIONS).as_posix() for name in names if name.parts[0] == CALIBRATIONS]


def calibration_path(name: str) -> Path:
    """The file of a name from `calibrations`.

    Raises:
        ValueError: if it is not there, or none is.
    """
    if name == NO_CALIBRATION:
        raise ValueError(
            "no calibration was saved yet: fit one with a Logit Calibrator, save it, press R and choose it"
        )
    return path_of(BUNDLES, f"{CALIBRATIONS}/{name}")


def new_calibration(name: str) -> Path:
    """A path for a calibration that does not exist yet.

    Raises:
        ValueError: for a name that is none.
    """
    name = name.strip().removesuffix(".safetensors")
    if not name or name.startswith(".") or any(sign in name for sign in '/\\:*?"<>|'):
        raise ValueError(f"{name!r} is no name for a file: use letters, digits, spaces, - and _")
    folder = model_folder(BUNDLES) / CALIBRATIONS
    numbered = (folder / f"{name}{suffix}.safetensors" for suffix in ("", *(f"_{k}" for k in range(2, 10_000))))
    return next(path for path in numbered if not path.exists())


def state_of(path: Path) -> str:
    """Changes when a model file, or a file in a model folder, does: loaders run again then, and only then."""
    parts = sorted(path.rglob("*")) if path.is_dir() else [path]
    return "|".join(f"{p.name}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in parts if p.is_file())
