"""ComfyUI's side of the library: its memory manager, progress with previews, interrupts, notices.

Shapes: B batch, H W pixels, h' w' latent grid, C latent channels.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import latent_preview
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy_execution.utils import ExecutionContext, get_executing_context
from einops import rearrange
from PIL import Image
from server import PromptServer
from torch import nn

from ..dcdd_core.pipelines.host import Host, Result
from ..dcdd_core.protocols import LatentCodec
from ..dcdd_core.types import DCDDWarning

T = TypeVar("T")

Preview = torch.Tensor | Image.Image | None

log = logging.getLogger("ComfyUI-DCDD")

#: Where a model may be while it runs.
PLACEMENTS = ("auto", "low VRAM", "CPU")
#: Prefixes of the attributes that ComfyUI's memory manager keeps on modules.
_COMFY_STATE = (
    "dynamic_",
    "_v",
    "_pin",
    "_prefetch",
    "comfy_",
    "prev_comfy_",
    "weight_lowvram",
    "bias_lowvram",
    "weight_function",
    "bias_function",
)
#: Since 0.16, ComfyUI has a patcher of its own for modules that it did not build.
_Patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)


# --- memory -----------------------------------------------------------------------------------------------------------


class _Holder(nn.Module):
    """Wraps a module, since ComfyUI's patcher writes to `device`, which transformers and diffusers do not allow."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.device = None


class Managed(Generic[T]):
    """A model that ComfyUI's memory manager loads, moves out to make room for other nodes' models, and frees.

    Its linear layers become ComfyUI's own, which can stay in RAM and be streamed to the GPU one by one if the GPU is
    too small for all of them. Only the sockets hold a reference to it: when the last graph drops it, it is freed.
    """

    def __init__(
        self,
        value: T,
        *,
        placement: str = "auto",
        casting: tuple[str, ...] = (),
        streamed: bool = True,
        savings: tuple[tuple[str, str], ...] = (),
    ):
        """
        Args:
            value: a network, or an object whose `model` is one, or None if it has none.
            placement: one of `PLACEMENTS`: ComfyUI decides, all layers are streamed, or everything stays on the CPU.
            casting: names of submodules whose linear layers compute in the dtype of their input, whatever their weights
                are stored in.
            streamed: False for a model whose layers must not be streamed one by one.
            savings: (setting, node) of what would take less memory, such as ("storage '8-bit'", "Load DCDD Decoder").
        """
        module = value if isinstance(value, nn.Module) else value.model
        module = nn.Module() if module is None else module
        if placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}")
        _use_comfy_linears(module, comfy.ops.disable_weight_init.Linear)
        for name in casting:
            _use_comfy_linears(module.get_submodule(name), comfy.ops.manual_cast.Linear)
        self._value, self.savings = value, savings
        self._stream = placement == "low VRAM" and device_of(placement).type != "cpu"
        # ComfyUI's log names a model by its class.
        holder = type(type(module).__name__, (_Holder,), {})(module)
        self._patcher = patcher_of(holder, placement, streamed=streamed)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._patcher.load_device

    @property
    def resident(self) -> bool:
        """Whether all its weights are on its device now, none of them streamed."""
        return all(weight.device == self.device for weight in self._patcher.model.parameters())

    @property
    def network(self) -> nn.Module:
        """Its network, wherever it is now."""
        return self._patcher.model.module

    @property
    def idle(self) -> T:
        """The model, wherever it is now, to read its description."""
        return self._value


def patcher_of(module: nn.Module, placement: str = "auto", *, streamed: bool = True) -> Any:
    """The patcher through which ComfyUI's memory manager handles a module.

    Args:
        placement: one of `PLACEMENTS`.
        streamed: see `Managed`.
    """
    cpu = torch.device("cpu")
    off = cpu if placement == "CPU" else comfy.model_management.unet_offload_device()
    kind = _Patcher if streamed else comfy.model_patcher.ModelPatcher
    return kind(module, load_device=device_of(placement), offload_device=off)


class _Whole(_Patcher):
    """Loads all weights together. Where there is no room for them (--novram), ComfyUI's patcher would leave those of
    layers that are not its own in RAM, while their input is on the GPU."""

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> Any:
        return super().partially_load(device_to, 1e32, force_patch_weights=force_patch_weights)


def whole_patcher_of(module: nn.Module) -> Any:
    """`patcher_of` a small module whose layers ComfyUI cannot stream, and which other packs' and core nodes load."""
    off = comfy.model_management.unet_offload_device()
    return _Whole(module, load_device=device_of("auto"), offload_device=off)


def copied(value: T, *, placement: str = "auto", dtype: torch.dtype | None = None) -> Managed[T]:
    """A second copy of a model, through which gradients can pass (`let_gradients_pass`).

    Args:
        dtype: of its weights; unchanged by default. float16, in which gradients vanish, becomes float32.
    """
    with torch.inference_mode(False):
        twin = _without_comfy_state(value)
        module = twin if isinstance(twin, nn.Module) else twin.model
        for part in (*module.parameters(), *module.buffers()):
            if part.is_floating_point():
                wanted = part.dtype if dtype is None else dtype
                part.data = part.data.to(torch.float32 if wanted == torch.float16 else wanted)
        # A backward pass needs every weight at once, so streaming would save nothing.
        managed = Managed(twin, placement=placement, streamed=False)
        module.to(managed._patcher.offload_device)
        return managed


def _without_comfy_state(value: T) -> T:
    """A deep copy without what ComfyUI keeps on modules, since its native buffers would be freed twice."""
    module = value if isinstance(value, nn.Module) else value.model
    taken = [
        (part, name, part.__dict__.pop(name))
        for part in module.modules()
        for name in list(part.__dict__)
        if name.startswith(_COMFY_STATE) or name.endswith("_comfy_model_dtype")
    ]
    try:
        return copy.deepcopy(value)
    finally:
        for part, name, kept in taken:
            part.__dict__[name] = kept


def let_gradients_pass(*models: Managed) -> None:
    """Brings all weights of copies to their device, in a form that gradients can pass through.

    ComfyUI moves models in torch's inference mode, and tensors made in it can never be part of a gradient's graph, so
    such weights are replaced by copies. Streamed layers share one buffer, which the next layer overwrites before the
    backward pass, so nothing is streamed.
    """
    with torch.inference_mode(False):
        for model in models:
            _unpin(model._patcher)
            for part in model._patcher.model.modules():
                if getattr(part, "comfy_cast_weights", False):
                    part.comfy_cast_weights = False
                for own in (part._parameters, part._buffers):
                    for name, tensor in own.items():
                        if tensor is not None and (tensor.is_inference() or tensor.device != model.device):
                            plain = tensor.detach().to(model.device, copy=True)
                            own[name] = nn.Parameter(plain, requires_grad=False) if own is part._parameters else plain


def with_models(conds: dict[str, list[dict[str, Any]]], *models: Managed) -> dict[str, list[dict[str, Any]]]:
    """The conditioning, with models added that ComfyUI has to load beside the MODEL while it samples."""
    for name, own in conds.items():
        if own:
            first, *others = own
            beside = [*first.get("additional_models", []), *(model._patcher for model in models)]
            return {**conds, name: [{**first, "additional_models": beside}, *others]}
    return conds


def bring(*models: Managed, memory: int = 0) -> None:
    """Brings models that run together to their device, without moving one of them out for another.

    Args:
        memory: bytes that running them takes, besides their weights.
    """
    stream = any(model._stream for model in models)
    most = comfy.model_management.get_total_memory(models[0].device) if stream else None
    patchers = [model._patcher for model in models]
    comfy.model_management.load_models_gpu(patchers, memory_required=memory, minimum_memory_required=most)
    for model in models:
        # A partial load leaves behind what cannot be streamed: norms, embeddings and convolutions, which are small. If
        # a model has no other layers, ComfyUI does not even call the load partial.
        for name, part in model._patcher.model.named_modules():
            if not hasattr(part, "comfy_cast_weights"):
                _unpin(model._patcher, [f"{name}.{own}" for own in part._parameters])
                part._apply(lambda tensor, device=model.device: tensor.to(device), recurse=False)


def _unpin(patcher: Any, names: Collection[str] | None = None) -> None:
    """Lets go of page-locked host memory of a model's weights, which must not be freed while it is locked.

    Args:
        names: of these weights; None for all.
    """
    # A set in ComfyUI's own patchers, in older versions absent.
    pinned = getattr(patcher, "pinned", ())
    for key in list(pinned) if names is None else [name for name in names if name in pinned]:
        patcher.unpin_weight(key)


def has_float8(placement: str) -> bool:
    """Whether the device on which a model with this placement runs can hold weights in float8_e4m3fn."""
    return comfy.model_management.supports_cast(device_of(placement), torch.float8_e4m3fn)


def device_of(placement: str) -> torch.device:
    """The device on which a model with this placement runs."""
    return torch.device("cpu") if placement == "CPU" else comfy.model_management.get_torch_device()


class ComfyHost(Host):
    """The models of one node, on ComfyUI's devices."""

    def __init__(
        self,
        *models: Managed,
        convolutional: bool = False,
        besides: int = 0,
        smaller: str = "use a smaller image",
    ):
        """
        Args:
            models: those that run together.
            convolutional: whether the memory that `bring` is asked for is that of convolutions.
            besides: bytes needed in addition, such as for previews.
            smaller: how a user makes the work itself smaller, in the terms of the node.
        """
        self.models, self.besides, self.smaller = models, besides, smaller
        self._convolutional = convolutional

    @property
    def remedy(self) -> str:
        """What a user can do when memory runs out."""
        devices = [model.device for model in self.models] or [comfy.model_management.get_torch_device()]
        of_gpu = " that use the GPU" if any(device.type != "cpu" for device in devices) else ""
        settings: dict[str, list[str]] = {}
        for setting, node in dict.fromkeys(saving for model in self.models for saving in model.savings):
            settings.setdefault(node, []).append(setting)
        choices = [f"choose {' or '.join(own)} in {node}" for node, own in settings.items()]
        return f"{', '.join([f'close other programs{of_gpu}', *choices])}, or {self.smaller}"

    @property
    def weights_resident(self) -> bool:
        """Whether all weights are on their device now, none of them streamed."""
        return all(model.resident for model in self.models)

    def bring(self, memory: int = 0) -> None:
        """Brings the models to their device together."""
        memory = convolution_memory(memory) if self._convolutional else memory
        bring(*self.models, memory=memory + self.besides)

    def check(self) -> None:
        """Stops the node if the user asked for it."""
        comfy.model_management.throw_exception_if_processing_interrupted()

    def on_split(self, size: int) -> None:
        """Writes to the log, and frees what can be freed."""
        log.warning("out of memory: continuing with %d images at a time", size)
        comfy.model_management.soft_empty_cache()

    def on_fallback(self, change: str) -> None:
        """Writes to the node and the log, and frees what can be freed."""
        notice(f"out of memory: {change}")
        comfy.model_management.soft_empty_cache()

    def keep(self, result: Result) -> Result:
        """Moves a result to the device on which it waits for other nodes."""
        return result.to(comfy.model_management.intermediate_device())


def convolution_memory(memory: int) -> int:
    """Bytes that convolutions take on this GPU if they take `memory` on other GPUs."""
    # ComfyUI's own factor for decoding with a VAE on AMD GPUs (comfy/sd.py).
    return round(2.73 * memory) if comfy.model_management.is_amd() else memory


class ManagedCodec:
    """A decoder's own codec as a `LatentCodec` that is brought to its device whenever it encodes or decodes."""

    model = None

    def __init__(self, codec: LatentCodec, *, placement: str):
        self.managed = Managed(codec, placement=placement)
        self.factor, self.channels, self.shift, self.scale = codec.factor, codec.channels, codec.shift, codec.scale
        self.comfy_format = codec.comfy_format
        self.draws_previews = codec.preview(torch.zeros(1, codec.channels, 8, 8)) is not None
        self._blank: dict[tuple[int, ...], torch.Tensor] = {}

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """See `LatentCodec.encode`. The blank canvas of a whole image is encoded once per size."""
        blank, size = not bool(pixels.any()), tuple(pixels.shape)
        if blank and size in self._blank:
            return self._blank[size].to(self.managed.device)
        latents = self._ready(*pixels.shape[2:]).encode(pixels)
        if blank:
            self._blank[size] = latents.cpu()
        return latents

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See `LatentCodec.decode`."""
        return self._ready(*(side * self.factor for side in latents.shape[2:])).decode(latents)

    def normalize(self, latents: torch.Tensor) -> torch.Tensor:
        """See `LatentCodec.normalize`."""
        return self.managed.idle.normalize(latents)

    def denormalize(self, z: torch.Tensor) -> torch.Tensor:
        """See `LatentCodec.denormalize`."""
        return self.managed.idle.denormalize(z)

    def preview(self, latents: torch.Tensor) -> torch.Tensor | None:
        """See `LatentCodec.preview`; the network runs on the device where it is."""
        return self.managed.idle.preview(latents)

    def working_memory(self, height: int, width: int) -> int:
        """See `LatentCodec.working_memory`."""
        return convolution_memory(self.managed.idle.working_memory(height, width))

    def _ready(self, height: int, width: int) -> LatentCodec:
        bring(self.managed, memory=self.working_memory(height, width))
        return self.managed.idle


def _use_comfy_linears(module: nn.Module, kind: type[nn.Linear]) -> None:
    """Replaces torch's linear layers by ComfyUI's, with the same weights."""
    for part in module.modules():
        for name, layer in part.named_children():
            if not isinstance(layer, nn.Linear):
                continue
            ours = kind(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            ours.weight, ours.bias = nn.Parameter(layer.weight, requires_grad=False), layer.bias
            setattr(part, name, ours.train(layer.training))


# --- progress and notices ---------------------------------------------------------------------------------------------


class NodeProgress:
    """A node's progress bar with a preview. An interrupt by the user stops the node at the next step."""

    def __init__(self, total: int):
        self._bar = comfy.utils.ProgressBar(total)

    def step(self, done: int, total: int, preview: Preview = None) -> None:
        """
        Args:
            preview: an image, or pixels [B, 3, H, W] in -1..1; shown if ComfyUI shows previews.
        """
        # ComfyUI's bar drops reports that come too soon after the last, and with them its own check.
        comfy.model_management.throw_exception_if_processing_interrupted()
        image = _sheet(preview) if isinstance(preview, torch.Tensor) else preview
        shown = image is not None and shows_previews()
        longest = latent_preview.MAX_PREVIEW_RESOLUTION  # --preview-size
        self._bar.update_absolute(done, total, ("JPEG", image, longest) if shown else None)


def over_batch(done: int, total: int, *, first: int, count: int, batch: int) -> tuple[int, int]:
    """Progress over a batch, from that over `count` of its images, before which `first` are done; a batch that is not
    split keeps its own numbers."""
    return (done, total) if count == batch else (first * total + done * count, batch * total)


def shows_previews() -> bool:
    """Whether ComfyUI shows previews: by --preview-method, or by the setting that came with the prompt instead."""
    return args.preview_method != LatentPreviewMethod.NoPreviews


def _sheet(pixels: torch.Tensor) -> Image.Image:
    """Up to four images in one, so that a batch shows more than its first."""
    shown = pixels[:4]
    sheet = rearrange(shown, "(r c) d h w -> (r h) (c w) d", r=2 if len(shown) == 4 else 1)
    return Image.fromarray(((sheet.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy())


@dataclass
class _Shown:
    """What a node shows while it runs. All of it is sent each time: a new text replaces the one on the node.

    Attributes:
        context: that of the running node.
    """

    context: ExecutionContext | None = None
    notices: list[str] = field(default_factory=list)
    told: str = ""


_shown = _Shown()


def notice(text: str) -> None:
    """Warns the user of something that is not an error: on the node that is running, below its earlier notices, and in
    the log."""
    log.warning(text)
    _shown_now().notices.append(text)
    _show()


def tell(text: str) -> None:
    """Shows a text on the node that is running, below its notices and in place of what was told before."""
    _shown_now().told = text
    _show()


def _shown_now() -> _Shown:
    global _shown
    context = get_executing_context()
    if context is None or context is not _shown.context:
        _shown = _Shown(context)
    return _shown


def _show() -> None:
    if _shown.context is not None and getattr(PromptServer, "instance", None) is not None:
        lines = dict.fromkeys(filter(None, [*_shown.notices, _shown.told]))
        PromptServer.instance.send_progress_text("\n".join(lines), _shown.context.node_id)


@contextmanager
def noticed() -> Iterator[None]:
    """Turns the library's warnings into notices, even if the work fails; other warnings stay warnings."""
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DCDDWarning)
            yield
    finally:
        ours = [warning for warning in caught if issubclass(warning.category, DCDDWarning)]
        for text in dict.fromkeys(str(warning.message) for warning in ours):
            notice(text)
        for warning in caught:
            if warning not in ours:
                warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)
