"""aMUSEd's folder as diffusers writes it: transformer, text_encoder, tokenizer, vqvae, scheduler, each in a folder.

Sizes come from the configurations, and are compared with each other and with the weights' headers before a network is
built. diffusers' pipeline is not used, since later versions deprecate it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UVit2DModel, VQModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from ...files import in_file, reading
from ...method.progressive import ProgressiveOptions
from ...settings import require_number, shown
from ..checkpoints import (
    Header,
    check_count,
    check_size,
    load_strictly,
    model_name,
    quantised,
    read_config,
    read_headers,
    read_wanted,
)
from ..vae import require_config
from .amused_network import CONDITIONS, AmusedConfig, AmusedNetwork
from .amused_tokenizer import AmusedTokenizer, unit_rows
from .amused_words import AmusedWords
from .sampler import MaskedSampler

PIPELINES = ("AmusedPipeline", "AmusedImg2ImgPipeline", "AmusedInpaintPipeline")
"""The pipeline classes that the model_index.json of such a folder may name."""
NETWORK = "UVit2DModel"
_AGAIN = "fetch the whole model again (amused/amused-256 or amused/amused-512)"
_CODES = "quantize.embedding.weight"
_POSITIONS = "text_model.embeddings.position_ids"
"""A buffer of whole numbers that older versions of transformers saved with the weights."""

_WHOLE = (
    "hidden_size",
    "cond_embed_dim",
    "micro_cond_encode_dim",
    "micro_cond_embed_dim",
    "encoder_hidden_size",
    "vocab_size",
    "codebook_size",
    "in_channels",
    "block_out_channels",
    "num_res_blocks",
    "block_num_heads",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "sample_size",
)
_SWITCHES = ("use_bias", "downsample", "upsample", "ln_elementwise_affine")
_TEXT_WHOLE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
#: Entries of the transformer's configuration, each with a tensor and the axis of it that has this size.
_SIZES = (
    ("hidden_size", "encoder_proj.weight", 0),
    ("encoder_hidden_size", "encoder_proj.weight", 1),
    ("vocab_size", "embed.embeddings.weight", 0),
    ("in_channels", "embed.embeddings.weight", 1),
    ("block_out_channels", "embed.conv.weight", 0),
    ("codebook_size", "mlm_layer.conv2.weight", 0),
    ("intermediate_size", "transformer_layers.0.ff.net.2.weight", 1),
)
_TEXT_SIZES = (
    ("vocab_size", "text_model.embeddings.token_embedding.weight", 0),
    ("hidden_size", "text_model.embeddings.token_embedding.weight", 1),
    ("max_position_embeddings", "text_model.embeddings.position_embedding.weight", 0),
    ("intermediate_size", "text_model.encoder.layers.0.mlp.fc1.weight", 0),
    ("projection_dim", "text_projection.weight", 0),
)


class AmusedFolder:
    """A folder with an aMUSEd model.

    Attributes:
        path: the folder.
        name: the model's name: the folder's, or in the hub's cache the repository's.

    Raises:
        ValueError: if there is no such folder, if it lacks the transformer or the vqvae, and if their configurations
            are invalid or do not fit each other.
    """

    def __init__(self, path: str | Path):
        self.path, self.name = Path(path), model_name(path)
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is not a folder; expected the folder of an aMUSEd model")
        self._network = self._config("transformer", NETWORK)
        self._codec = self._config("vqvae", "VQModel")
        self._check_network()
        self._check_codec()

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of its images."""
        return (self._network["sample_size"],) * 2

    def sampler(self, *, dtype: torch.dtype, device: torch.device | str) -> MaskedSampler:
        """Loads the masked sampler.

        By default it samples as diffusers' pipeline does: 12 passes with its scheduler's schedule (up to rounding, at
        most one position per pass), in order of confidence, guidance 10 in each pass, no revision. Other plans can be
        requested, but the network is not trained for revision: it has never seen a wrong token.

        Raises:
            ValueError: for entries of the configurations that are missing, unknown, out of range, or do not fit the
                weights; tensors that are missing, unexpected, quantised or of a wrong shape; files that cannot be read.
        """
        text, plan, mask_token = self._text(), *self._plan()
        words = AmusedWords.load(self._part("tokenizer"), text.max_position_embeddings)
        if len(words.tokenizer) > text.vocab_size:
            raise ValueError(
                f"{self.path / 'tokenizer'} has {len(words.tokenizer)} words, and the text encoder {text.vocab_size}: "
                f"they do not belong together, {_AGAIN}"
            )
        config = AmusedConfig(grid=self.grid, factor=self._factor, mask_token=mask_token)
        file, read = self._file("transformer"), {"dtype": dtype, "device": device}
        headers = self._headers("transformer")
        layers, blocks = self._network["num_hidden_layers"], self._network["num_res_blocks"]
        check_count(file, "num_hidden_layers", layers, headers, "transformer_layers.")
        check_count(file, "num_res_blocks", blocks, headers, "down_block.res_blocks.")
        for entry, name, axis in _SIZES:
            check_size(file, entry, self._network[entry], headers, name, axis)
        with reading(file, f"the configuration of a {NETWORK}", _AGAIN), torch.device("meta"):
            transformer = UVit2DModel(**self._network)
        self._load(transformer, "transformer", headers, **read)

        file, headers = self._file("text_encoder"), self._headers("text_encoder")
        check_count(file, "num_hidden_layers", text.num_hidden_layers, headers, "text_model.encoder.layers.")
        for entry, name, axis in _TEXT_SIZES:
            check_size(file, entry, getattr(text, entry), headers, name, axis)
        with reading(file, "the configuration of a CLIP text model", _AGAIN), torch.device("meta"):
            encoder = CLIPTextModelWithProjection(text)
        self._load(encoder, "text_encoder", headers, **read)
        # The only buffer, which a checkpoint need not hold.
        encoder.text_model.embeddings.position_ids = torch.arange(text.max_position_embeddings, device=device)[None]

        network = AmusedNetwork(config, transformer, encoder).eval().requires_grad_(False)
        return MaskedSampler(network, words, unit_rows(self._codes())[0], name=self.name, sampling=plan)

    def tokenizer(self, *, dtype: torch.dtype | None, device: torch.device | str) -> AmusedTokenizer:
        """Loads the image tokenizer; in float32 if float16 is requested and its configuration says `force_upcast`.

        Raises:
            ValueError: as `sampler`.
        """
        codes, headers, file = self._codes(), self._headers("vqvae"), self._file("vqvae")
        check_count(
            file, "layers_per_block", self._codec["layers_per_block"], headers, "encoder.down_blocks.0.resnets."
        )
        widths = self._codec["block_out_channels"]
        check_count(file, "block_out_channels, whose values are", len(widths), headers, "encoder.down_blocks.")
        check_size(file, "block_out_channels[0]", widths[0], headers, "encoder.conv_in.weight", 0)
        check_size(file, "latent_channels", self._codec["latent_channels"], headers, "decoder.conv_in.weight", 1)
        with reading(file, "the configuration of a VQModel", _AGAIN), torch.device("meta"):
            model = VQModel(**self._codec)
        if dtype == torch.float16 and self._codec["force_upcast"]:
            dtype = torch.float32
        self._load(model, "vqvae", headers, dtype=dtype, device=device)
        return AmusedTokenizer(model, codes, grid=self.grid, name=self.name)

    @property
    def _factor(self) -> int:
        return 2 ** (len(self._codec["block_out_channels"]) - 1)

    def _part(self, name: str) -> Path:
        part = self.path / name
        if not part.is_dir():
            held = ", ".join(sorted(child.name for child in self.path.iterdir())[:8]) or "nothing"
            raise ValueError(f"{self.path} has no folder {name} (it holds {held}), as every aMUSEd model has: {_AGAIN}")
        return part

    def _file(self, name: str) -> Path:
        return self.path / name / ("scheduler_config.json" if name == "scheduler" else "config.json")

    def _config(self, name: str, kind: str) -> dict[str, Any]:
        """A part's configuration with diffusers' defaults, without entries that begin with "_".

        Raises:
            ValueError: for another class, quantised weights, and unknown entries.
        """
        config = read_config(self._part(name), self._file(name).name)
        if config.get("_class_name") != kind:
            raise ValueError(
                f"{self._file(name)}: _class_name is {shown(config.get('_class_name'))}, expected {kind!r}: {_AGAIN}"
            )
        if "quantization_config" in config:
            raise ValueError(
                f"{self._file(name)}: its weights are quantised, which is not read: take the original model"
            )
        if name == "scheduler":
            return config
        entries = inspect.signature({NETWORK: UVit2DModel, "VQModel": VQModel}[kind].__init__).parameters
        known = {entry: found.default for entry, found in entries.items() if entry != "self"}
        given = {entry: value for entry, value in config.items() if not entry.startswith("_")}
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"{self._file(name)}: unknown entries {', '.join(unknown)}: update diffusers, or {_AGAIN}")
        return known | given

    def _check_network(self) -> None:
        values = self._network
        with in_file(self._file("transformer")):
            for name in _WHOLE:
                require_number(name, values[name], whole=True, least=1, most=2**20, remedy=_AGAIN)
            for name in _SWITCHES:
                if not isinstance(values[name], bool):
                    raise ValueError(f"{name} must be true or false, got {shown(values[name])}: {_AGAIN}")
            for name in ("hidden_dropout", "attention_dropout"):
                require_number(name, values[name], least=0, below=1, remedy=_AGAIN)
            require_number("layer_norm_eps", values["layer_norm_eps"], above=0, remedy=_AGAIN)
            for whole, part in (("hidden_size", "num_attention_heads"), ("block_out_channels", "block_num_heads")):
                if values[whole] % values[part]:
                    raise ValueError(f"{whole} {values[whole]} must be a multiple of {part} {values[part]}: {_AGAIN}")
            if values["micro_cond_embed_dim"] != CONDITIONS * values["micro_cond_encode_dim"]:
                raise ValueError(
                    f"micro_cond_embed_dim must be {CONDITIONS} times micro_cond_encode_dim "
                    f"{values['micro_cond_encode_dim']}, for image size, crop and score, got "
                    f"{values['micro_cond_embed_dim']}: {_AGAIN}"
                )
            if values["downsample"] != values["upsample"] or (values["downsample"] and values["sample_size"] % 2):
                raise ValueError(
                    f"downsample {values['downsample']} and upsample {values['upsample']} must be the same, and true "
                    f"only of an even sample_size, got {values['sample_size']}: {_AGAIN}"
                )

    def _check_codec(self) -> None:
        values, file = self._codec, self._file("vqvae")
        require_config(values, str(file))
        with in_file(file):
            if (values["in_channels"], values["out_channels"]) != (3, 3):
                raise ValueError(
                    f"in_channels and out_channels must be 3, of colour images, got {values['in_channels']} and "
                    f"{values['out_channels']}: {_AGAIN}"
                )
            require_number("vq_embed_dim", values["vq_embed_dim"], whole=True, least=1, optional=True, remedy=_AGAIN)
            if values["norm_type"] != "group":
                raise ValueError(f"norm_type must be 'group', got {shown(values['norm_type'])}: {_AGAIN}")
            if values["num_vq_embeddings"] != self._network["codebook_size"]:
                raise ValueError(
                    f"num_vq_embeddings is {shown(values['num_vq_embeddings'])}, and {self._file('transformer')} says "
                    f"codebook_size {self._network['codebook_size']}: they do not belong together, {_AGAIN}"
                )

    def _text(self) -> CLIPTextConfig:
        config, file = read_config(self._part("text_encoder")), self._file("text_encoder")
        kinds = config.get("architectures")
        if config.get("model_type") != "clip_text_model" or kinds != [CLIPTextModelWithProjection.__name__]:
            raise ValueError(
                f"{file}: architectures is {shown(kinds)} and model_type {shown(config.get('model_type'))}, expected "
                f"['CLIPTextModelWithProjection'] and 'clip_text_model': {_AGAIN}"
            )
        if "quantization_config" in config:
            raise ValueError(f"{file}: its weights are quantised, which is not read: take the original model")
        with reading(file, "the configuration of a CLIP text model", _AGAIN):
            text = CLIPTextConfig.from_dict(config)
        with in_file(file):
            for name in _TEXT_WHOLE:
                require_number(name, getattr(text, name), whole=True, least=1, most=2**20, remedy=_AGAIN)
            if text.hidden_size % text.num_attention_heads:
                raise ValueError(
                    f"hidden_size {text.hidden_size} must be a multiple of num_attention_heads "
                    f"{text.num_attention_heads}: {_AGAIN}"
                )
            for ours, theirs in (("hidden_size", "encoder_hidden_size"), ("projection_dim", "cond_embed_dim")):
                if getattr(text, ours) != self._network[theirs]:
                    raise ValueError(
                        f"{ours} is {getattr(text, ours)}, and {self._file('transformer')} says {theirs} "
                        f"{self._network[theirs]}: they do not belong together, {_AGAIN}"
                    )
        return text

    def _plan(self) -> tuple[ProgressiveOptions, int]:
        """How diffusers' pipeline samples by default, and the id of a hidden token."""
        scheduler = self._config("scheduler", "AmusedScheduler")
        with in_file(self._file("scheduler")):
            codes, words = self._network["codebook_size"], self._network["vocab_size"]
            mask_token = scheduler.get("mask_token_id")
            require_number("mask_token_id", mask_token, whole=True, least=codes, most=words - 1, remedy=_AGAIN)
            schedule = scheduler.get("masking_schedule", "cosine")
            if schedule not in ("cosine", "linear"):
                raise ValueError(f"masking_schedule must be 'cosine' or 'linear', got {shown(schedule)}: {_AGAIN}")
        plan = ProgressiveOptions(
            guidance=10.0,
            passes=12,
            revision_passes=0,
            schedule=schedule,
            order="confidence",
            order_noise=2.0,
            revise=0,
            ramp=False,
        )
        return plan, mask_token

    def _codes(self) -> torch.Tensor:
        """The codebook [K, D] as it is stored."""
        file, headers = self._file("vqvae"), self._headers("vqvae")
        width = self._codec["vq_embed_dim"] or self._codec["latent_channels"]
        if _CODES not in headers:
            raise ValueError(f"{self.path / 'vqvae'} has no tensor {_CODES}: {_AGAIN}")
        check_size(file, "num_vq_embeddings", self._codec["num_vq_embeddings"], headers, _CODES, 0)
        check_size(file, "vq_embed_dim or latent_channels", width, headers, _CODES, 1)
        return read_wanted(self.path / "vqvae", _CODES.__eq__)[_CODES]

    def _headers(self, name: str) -> Mapping[str, Header]:
        return read_headers(self._part(name), lambda tensor: tensor != _POSITIONS)

    def _load(
        self,
        module: nn.Module,
        name: str,
        headers: Mapping[str, Header],
        *,
        dtype: torch.dtype | None,
        device: torch.device | str,
    ) -> None:
        """Loads a part's weights into a module on "meta"."""
        expected = set(module.state_dict())
        dtypes = {tensor: header.dtype for tensor, header in headers.items() if tensor in expected}
        if how := quantised(dtypes, sorted(set(headers) - expected)):
            raise ValueError(
                f"{self.path / name} is quantised {how}, which is not read: take the folder of the original model"
            )
        tensors = read_wanted(self.path / name, headers.__contains__, dtype=dtype, device=device)
        load_strictly(module, tensors, str(self.path / name))
