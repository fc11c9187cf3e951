"""Loaders of Janus or another token sampler, of its tokenizer alone and of the diffusion decoder; and the download."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import comfy.model_management
import torch
from comfy_api.latest import io

from ..dcdd_core import registry
from ..dcdd_core.files import read_json
from ..dcdd_core.models.bundle import DecoderOptions, load_decoder
from ..dcdd_core.models.download import KNOWN_MODELS, KnownModel, download_model
from ..dcdd_core.pipelines.load import check_codec
from ..dcdd_core.protocols import ImageTokenizer
from ..dcdd_pico.embedded import JANUS, LLAMAGEN, PROGRESSIVE, model_paths
from . import host, model_folders
from .host import Managed, ManagedCodec
from .sockets import Decoder, DecoderSocket, JanusModel, JanusModelSocket, VQVAESocket, schema

PICO = "pico (built in)"
PICO_PROGRESSIVE = "pico progressive (built in)"
PICO_LLAMAGEN = "pico llamagen (built in)"
#: Combo values of the models that come with the pack -> their folders.
BUILT_IN = {PICO: JANUS, PICO_PROGRESSIVE: PROGRESSIVE, PICO_LLAMAGEN: LLAMAGEN}
CONNECTED = "with the bundle, or connected"
HELD = "in the bundle"
DTYPES = ("auto", "float32", "bfloat16", "float16")
#: The guidance that pico's decoder is calibrated for. The files of the other built-in models state theirs.
_PICO_GUIDANCE = 3.0
STORAGE = ("auto", "float32", "bfloat16", "float16", "8-bit")


class LoadJanus(io.ComfyNode):
    """Janus, Janus-Pro, LlamaGen or a masked sampler, with its tokenizer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "LoadJanus",
            "Load Janus",
            category="loaders",
            description=(
                "Loads a Janus, Janus-Pro or LlamaGen model, which turns a prompt into image tokens, together with "
                "its VQ-VAE. Put the model's whole folder into models/janus: Janus in the transformers or the DeepSeek "
                "layout, LlamaGen with its checkpoint, its VQ-VAE and the folder flan-t5-xl. Folders of masked "
                "samplers go there too, for the Progressive Token Sampler. 'pico', 'pico llamagen' and 'pico "
                "progressive' are tiny models that come with the pack, so that you can start without a download."
            ),
            search_aliases=["janus pro", "deepseek", "vlm", "autoregressive", "llm loader", "llamagen", "masked model"],
            inputs=[
                _model(
                    BUILT_IN,
                    "A folder in models/janus that holds a Janus, Janus-Pro or LlamaGen model or a masked sampler, or "
                    "one of the three tiny built-in models: 'pico' (a Janus) and 'pico llamagen' sample one token "
                    "after the other, 'pico progressive' in passes.",
                ),
                _dtype(),
                _placement(),
            ],
            outputs=[
                JanusModelSocket.Output(
                    "janus",
                    display_name="janus",
                    tooltip="Connect to a Janus Logit Sampler; a masked sampler also to a Progressive Token Sampler.",
                ),
                VQVAESocket.Output("vq_vae", display_name="vq_vae", tooltip="Converts between images and tokens."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model: str, **_) -> str:
        return _state(model)

    @classmethod
    def execute(cls, model: str, dtype: str, placement: str) -> io.NodeOutput:
        folder, torch_dtype = _folder(model), _torch_dtype(dtype, model, placement)
        family = registry.sampler_family(folder)
        sampler = family.load_sampler(str(folder), dtype=torch_dtype, computes_on=host.device_of(placement))
        if model == PICO:
            sampler.default_guidance = _PICO_GUIDANCE
        vq, settings = _tokenizer(folder, placement, "Load Janus"), []
        device = host.device_of(placement)
        if torch_dtype == torch.float32:
            halved = device.type == "cpu" or comfy.model_management.should_use_bf16(device)
            settings = [f"dtype '{'bfloat16' if halved else 'float16'}'"]
        savings = _savings("Load Janus", *settings, *_smaller_placement(placement))
        return io.NodeOutput(JanusModel(sampler=Managed(sampler, placement=placement, savings=savings), vq=vq), vq)


class LoadVQVAE(io.ComfyNode):
    """Only the tokenizer of a sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "LoadVQVAE",
            "Load VQ-VAE",
            category="loaders",
            description=(
                "Loads only the image tokenizer (VQ-VAE) of a Janus or LlamaGen folder, or that of a masked sampler, "
                "in models/janus. Reconstructing an image needs nothing else, so the language model, several "
                "gigabytes, is not loaded."
            ),
            search_aliases=["tokenizer", "vqgan", "vq-16", "janus vae", "llamagen"],
            inputs=[
                _model(
                    (PICO,),
                    "A folder in models/janus whose VQ-VAE to load, or the tiny built-in one, which all pico models "
                    "share.",
                ),
                _placement(),
            ],
            outputs=[
                VQVAESocket.Output("vq_vae", display_name="vq_vae", tooltip="Converts between images and tokens.")
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model: str, **_) -> str:
        return _state(model)

    @classmethod
    def execute(cls, model: str, placement: str) -> io.NodeOutput:
        return io.NodeOutput(_tokenizer(_folder(model), placement, "Load VQ-VAE"))


class LoadDecoder(io.ComfyNode):
    """A decoder bundle over FLUX.1-Fill."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "LoadDecoder",
            "Load DCDD Decoder",
            category="loaders",
            description=(
                "Loads a Distribution-Conditioned Diffusion Decoder (DCDD): a bundle from models/dcdd, the "
                "FLUX.1-Fill transformer that it was trained on, and the FLUX VAE. 'pico' comes with the pack."
            ),
            search_aliases=["dcdd", "flux fill", "diffusion decoder", "bundle"],
            inputs=[
                io.Combo.Input(
                    "bundle",
                    options=[PICO, *model_folders.bundles()],
                    default=PICO,
                    tooltip=(
                        "The trained decoder: a .safetensors file in models/dcdd. A bundle works with one "
                        "tokenizer only."
                    ),
                ),
                io.Combo.Input(
                    "base_model",
                    options=[HELD, *model_folders.transformers()],
                    default=HELD,
                    tooltip=(
                        "The FLUX.1-Fill transformer, needed if the bundle holds only the weights that training "
                        "changed: a file in models/diffusion_models or models/unet, or a diffusers folder in "
                        "models/diffusers."
                    ),
                ),
                io.Combo.Input(
                    "vae",
                    options=[CONNECTED, *model_folders.autoencoders()],
                    default=CONNECTED,
                    tooltip=(
                        "The FLUX VAE (ae.safetensors in models/vae, or a diffusers folder). pico has its own. "
                        "Otherwise choose one here, or connect a VAE from ComfyUI's Load VAE to the decoder node."
                    ),
                ),
                io.Combo.Input(
                    "storage",
                    options=list(STORAGE),
                    default="auto",
                    tooltip=(
                        "Precision in which the transformer is kept in memory. '8-bit' needs half the memory of "
                        "bfloat16, at a small loss of quality. 'auto' uses bfloat16 on a GPU that supports it, "
                        "otherwise float16; on a CPU, and for pico, it uses float32."
                    ),
                ),
                _placement(),
            ],
            outputs=[
                DecoderSocket.Output(
                    "decoder", display_name="decoder", tooltip="Connect to a Distribution-Conditioned FLUX Decoder."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, bundle: str, base_model: str, vae: str, **_) -> str:
        if bundle == PICO:
            return model_folders.state_of(model_paths()["decoder"].parent)
        chosen = [model_folders.path_of(model_folders.BUNDLES, bundle)]
        chosen += [] if base_model == HELD else [model_folders.transformer_path(base_model)]
        chosen += [] if vae == CONNECTED else [model_folders.autoencoder_path(vae)]
        return "|".join(map(model_folders.state_of, chosen))

    @classmethod
    def execute(cls, bundle: str, base_model: str, vae: str, storage: str, placement: str) -> io.NodeOutput:
        if storage not in STORAGE:
            raise ValueError(f"storage must be one of {', '.join(STORAGE)}, got {storage!r}")
        if storage == "8-bit" and not host.has_float8(placement):
            raise ValueError(
                f"storage '8-bit' needs float8, which {host.device_of(placement)} does not have: choose 'float16', or "
                "placement 'CPU'"
            )
        # Older servers do not check names against the lists.
        base = None if base_model == HELD else model_folders.transformer_path(base_model)
        autoencoder = None if vae == CONNECTED else model_folders.autoencoder_path(vae)
        if bundle == PICO:
            if base is not None or autoencoder is not None:
                host.notice("the pico bundle has all its weights and its own VAE: base_model and vae are not used")
            pico = model_paths()
            path, base, autoencoder = pico["decoder"], None, pico["vae"]
        else:
            path = model_folders.path_of(model_folders.BUNDLES, bundle)
        eight_bit = storage == "8-bit"
        compute = _torch_dtype("auto" if eight_bit else storage, bundle, placement)
        held = DecoderOptions(dtype=compute, linear_dtype=torch.float8_e4m3fn if eight_bit else None)
        with host.noticed():
            decoder = load_decoder(path, base, held)
        codec = None
        if autoencoder is not None:
            codec = registry.load_codec(autoencoder, dtype=torch.float32)
            check_codec(codec, decoder, remedy="choose the VAE that the decoder was trained with")
            codec = ManagedCodec(codec, placement=placement)
        blocks = tuple(f"transformer.{name}" for name in decoder.backbone.block_names)
        settings = ["storage '8-bit'"] if not eight_bit and host.has_float8(placement) else []
        savings = _savings("Load DCDD Decoder", *settings, *_smaller_placement(placement))
        managed = Managed(decoder, placement=placement, casting=blocks if eight_bit else (), savings=savings)
        return io.NodeOutput(Decoder(decoder=managed, codec=codec))


class DownloadModel(io.ComfyNode):
    """The only node that uses the network, and only when it runs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "DownloadModel",
            "Download Model",
            category="loaders",
            description=(
                "Downloads a published model from Hugging Face into the right ComfyUI folder. No other node of "
                "this pack uses the network. An interrupted download resumes. For FLUX.1-Fill, first accept the "
                "licence on its page, then log in with `hf auth login` or set HF_TOKEN."
            ),
            search_aliases=["hugging face", "hub", "get model", "fetch weights"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "model",
                    options=list(_OFFERED),
                    tooltip="The model to download. Afterwards press R and choose it in its loader.",
                ),
            ],
            outputs=[io.String.Output("path", display_name="path", tooltip="The downloaded file or folder.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model: str) -> str | float:
        path = _offer(model)[2]
        # A new NaN equals nothing: a missing file is downloaded, even if it was missing before the last run too. (The
        # one of `math` is always the same object, which a cache takes for equal.)
        return model_folders.state_of(path) if path.exists() else float("nan")

    @classmethod
    def execute(cls, model: str) -> io.NodeOutput:
        known, folder, path = _offer(model)
        progress = host.NodeProgress(1000)

        def on_progress(there: int, whole: int) -> None:
            progress.step(round(1000 * there / max(1, whole)), 1000)

        download_model(known, folder, on_progress=on_progress)
        host.tell(f"{model} is at {path}. Its licence: {known.licence}")
        return io.NodeOutput(str(path))


NODES = [LoadJanus, LoadVQVAE, LoadDecoder, DownloadModel]

#: Combo value -> model.
_OFFERED = {f"{name} ({model.gigabytes:g} GB)": model for name, model in KNOWN_MODELS.items()}


def _model(built_in: Iterable[str], tooltip: str) -> io.Combo.Input:
    return io.Combo.Input("model", options=[*built_in, *model_folders.samplers()], default=PICO, tooltip=tooltip)


def _dtype() -> io.Combo.Input:
    return io.Combo.Input(
        "dtype",
        options=list(DTYPES),
        default="auto",
        tooltip=(
            "Precision of the weights. 'auto' uses bfloat16 on a GPU that supports it, otherwise float16; on a "
            "CPU, and for pico, it uses float32."
        ),
    )


def _placement() -> io.Combo.Input:
    return io.Combo.Input(
        "placement",
        options=list(host.PLACEMENTS),
        default="auto",
        tooltip=(
            "Where the model runs. 'auto' leaves this to ComfyUI's memory manager. 'low VRAM' keeps the layers in "
            "RAM and streams them to the GPU, which is slower. 'CPU' does not use the GPU."
        ),
    )


def _folder(model: str) -> Path:
    if model in BUILT_IN:
        return model_paths(vlm=BUILT_IN[model])["vlm"]
    return model_folders.path_of(model_folders.JANUS, model)


def _state(model: str) -> str:
    """State of the model's folder, and of its image tokenizer's if config.json names another folder for that."""
    folder = _folder(model)
    places, config = [folder], folder / "config.json"
    if config.exists():
        said = read_json(config, "a model's configuration", "fetch the whole model again").get("tokenizer")
        places += [folder / said] if isinstance(said, str) and (folder / said).is_dir() else []
    return "|".join(map(model_folders.state_of, places))


def _tokenizer(folder: Path, placement: str, node: str) -> Managed[ImageTokenizer]:
    """Loaded in float32, since its features decide which token a patch becomes."""
    tokenizer = registry.sampler_family(folder).load_tokenizer(str(folder), dtype=torch.float32)
    # Almost all of its layers are convolutions, which cannot be streamed.
    settings = ["placement 'CPU'"] if host.device_of(placement).type != "cpu" else []
    return Managed(tokenizer, placement=placement, savings=_savings(node, *settings))


def _savings(node: str, *settings: str) -> tuple[tuple[str, str], ...]:
    return tuple((setting, node) for setting in settings)


def _smaller_placement(placement: str) -> list[str]:
    """The next placement of a streamed model that takes less memory of a GPU, as a setting; none on a CPU."""
    if host.device_of(placement).type == "cpu":
        return []
    return ["placement 'low VRAM'" if placement == "auto" else "placement 'CPU'"]


def _torch_dtype(name: str, model: str, placement: str) -> torch.dtype:
    """The dtype that a combo's value stands for on this machine, for a model with that placement.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    if name != "auto":
        return getattr(torch, name)
    device = host.device_of(placement)
    if model in BUILT_IN or device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if comfy.model_management.should_use_bf16(device) else torch.float16


def _offer(model: str) -> tuple[KnownModel, Path, Path]:
    """The model that a combo's value stands for, the folder that it goes into, and its own file or folder there.

    Raises:
        ValueError: for a value that is not in the combo.
    """
    if model not in _OFFERED:
        raise ValueError(f"model must be one of {', '.join(_OFFERED)}, got {model!r}")
    known = _OFFERED[model]
    key, *below = known.folder.split("/")
    folder = model_folders.model_folder(key).joinpath(*below)
    return known, folder, folder / known.file if known.file else folder
