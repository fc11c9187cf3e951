"""A Janus folder: its layout, configuration, tokenizer and weights, each checked before the next is read.

All layouts are read in the same way. A network is built without weights, in the sizes that config.json declares and the
weights' headers confirm; its tensors are then looked up under the layout's names, and only those it uses are read.

`save_int8` writes transformers' layout with the matrices in 8 bits. transformers has no such method and would take the
integers for weights, so the file has a name that it does not look for, and config.json names the method.
"""

from __future__ import annotations

import codecs
import copy
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.modeling_janus import JanusVQVAE

from ...files import in_file, read_json, reading, regular_file, utf8_path, write_tensors
from ...int8_rows import SCALE, large_matrices, restored, rounded
from ...settings import require_text
from ..checkpoints import (
    Header,
    check_count,
    check_size,
    misfits,
    model_name,
    quantised,
    read_config,
    read_headers,
    read_wanted,
    whole_number,
)
from ..int8 import linear_weights
from . import deepseek

TRANSFORMERS = "janus"
"""model_type of a whole model in transformers' layout."""
TOKENIZER = "janus_vqgan"
"""model_type of a VQ-VAE alone, in transformers' layout."""
INT8_FILE = "int8_rows.safetensors"
"""Name of the weights file that `save_int8` writes."""
INT8_METHOD = "dcdd_int8_rows"
"""quant_method in the config.json beside that file."""

_CONFIG = "the configuration of a Janus model"
#: JSON files of the text tokenizer; all but the first may be absent.
_WORD_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_AGAIN = "choose a folder with a Janus or Janus-Pro model, or fetch its config.json again"
_WORDS = "what a Janus model's tokenizer is made from"

_SAMPLER_PARTS = (
    "model.language_model.",
    "model.generation_embeddings.",
    "model.generation_aligner.",
    "model.generation_head.",
    "model.vqmodel.quantize.",
)
_TOKENIZER_PARTS = (
    "model.vqmodel.encoder.",
    "model.vqmodel.quant_conv.",
    "model.vqmodel.quantize.",
    "model.vqmodel.post_quant_conv.",
    "model.vqmodel.decoder.",
)
_UNUSED_PARTS = ("lm_head.", "model.vision_model.", "model.aligner.")
_VQ = "model.vqmodel."

# Entries of config.json, each with the least value of a whole number, or its type. Absent ones have transformers'
# defaults.
_TEXT: Mapping[str, int | type] = MappingProxyType(
    {
        "vocab_size": 1,
        "hidden_size": 1,
        "intermediate_size": 1,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": 1,
        "rms_norm_eps": float,
        "hidden_act": str,
        "attention_bias": bool,
        "mlp_bias": bool,
    }
)
_CODES: Mapping[str, int | type] = MappingProxyType(
    {
        "embed_dim": 1,
        "num_embeddings": 1,
        "latent_channels": 1,
        "in_channels": 1,
        "out_channels": 1,
        "base_channels": 1,
        "channel_multiplier": list,
        "num_res_blocks": 0,
        "num_patches": 1,
        "num_hidden_layers": 1,
        "projection_dim": 1,
        "image_token_embed_dim": 1,
        "double_latent": bool,
        "hidden_act": str,
    }
)

# Entries, each with the tensor and axis whose length it states.
_TEXT_SIZES = (
    ("vocab_size", "model.language_model.embed_tokens.weight", 0),
    ("hidden_size", "model.language_model.embed_tokens.weight", 1),
    ("intermediate_size", "model.language_model.layers.0.mlp.gate_proj.weight", 0),
)
_CODE_SIZES = (
    ("num_embeddings", "model.vqmodel.quantize.embedding.weight", 0),
    ("embed_dim", "model.vqmodel.quantize.embedding.weight", 1),
)
_CODEC_SIZES = (
    *_CODE_SIZES,
    ("base_channels", "model.vqmodel.encoder.conv_in.weight", 0),
    ("latent_channels", "model.vqmodel.decoder.conv_in.weight", 1),
)


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """How a layout names its tensors.

    Attributes:
        rename: maps a name in transformers' `JanusForConditionalGeneration`, in the parts that are used, to the
            layout's.
        parts: the layout's name prefix of each part, by transformers' prefix; a name with none of them is unexpected.
        ignored: names that hold no weights.
    """

    rename: Callable[[str], str]
    parts: Mapping[str, str]
    ignored: frozenset[str] = frozenset()

    def wanted(self, parts: Collection[str]) -> Callable[[str], bool]:
        """A predicate on names: whether a tensor belongs to one of these parts, or to no known part."""
        skipped = tuple(theirs for ours, theirs in self.parts.items() if ours not in parts)
        return lambda name: name not in self.ignored and not name.startswith(skipped)


_ALL_PARTS = (*_SAMPLER_PARTS, *_TOKENIZER_PARTS, *_UNUSED_PARTS)
_LAYOUTS: Mapping[str, _Layout] = MappingProxyType(
    {
        TRANSFORMERS: _Layout(rename=lambda name: name, parts={part: part for part in _ALL_PARTS}),
        TOKENIZER: _Layout(rename=lambda name: name.removeprefix(_VQ), parts={}),
        deepseek.MODEL_TYPE: _Layout(
            rename=deepseek.deepseek_name, parts=deepseek.PARTS, ignored=frozenset({deepseek.BOOKKEEPING})
        ),
    }
)
KINDS = tuple(_LAYOUTS)
"""Every model_type that can be read."""
SAMPLERS = (TRANSFORMERS, deepseek.MODEL_TYPE)
"""The model_types of whole models."""


class JanusFolder:
    """A folder whose config.json is of a Janus model, or of only its tokenizer.

    Attributes:
        path: the folder.
        kind: its model_type.
        name: the model's name: "dcdd_name" in its config.json, or the folder's name, or in the hub's cache the
            repository's. A calibration belongs to a VLM by name, while folders may be renamed.

    Raises:
        ValueError: if there is no such folder, or its config.json is damaged or of another model.
    """

    def __init__(self, path: str | Path, kinds: Collection[str] = KINDS):
        self.path = Path(path)
        self._config = read_config(self.path)
        self.kind = self._config.get("model_type")
        if self.kind not in tuple(kinds):
            known = " or ".join(map(repr, kinds))
            raise ValueError(
                f"{self.path} holds a model of type {self.kind!r}, expected {known}: choose a folder with a Janus or "
                "Janus-Pro model"
            )
        self._file = self.path / "config.json"
        with in_file(self._file):
            require_text("dcdd_name", self._config.get("dcdd_name"), optional=True)
        self.name = self._config.get("dcdd_name") or model_name(self.path)
        self._layout = _LAYOUTS[self.kind]
        said = self._config.get("quantization_config")
        self._int8 = self.kind == TRANSFORMERS and isinstance(said, dict) and said.get("quant_method") == INT8_METHOD

    def words(self) -> PreTrainedTokenizerFast:
        """Loads the text tokenizer.

        Raises:
            ValueError: naming the file that is missing, damaged or not part of a tokenizer.
        """
        for name in _WORD_FILES:
            if name == "tokenizer.json" or (self.path / name).exists():
                read_json(self.path / name, _WORDS)
        for template in sorted(self.path.glob("chat_template*")):
            if not template.is_dir():
                regular_file(template, "a chat template")
        try:
            # Not AutoTokenizer: in transformers 5 its Llama class overwrites the byte-level rules of DeepSeek's
            # tokenizer.json, and the spaces of a prompt are lost (huggingface/transformers#45488).
            where = self.path / "tokenizer_config.json"
            remedy = "fetch the tokenizer's files again"
            if int(transformers.__version__.split(".")[0]) < 5:
                remedy += ", or if transformers 5 wrote them, install that"
            with _without_marks(self.path) as plain, reading(where, _WORDS, remedy), utf8_path(plain) as folder:
                words = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
                words("a")  # Entries of a wrong type fail here.
            return words
        except ValueError:
            path = self.path / "tokenizer.json"
            # Finds out which of the files it is.
            with reading(path, _WORDS, "fetch the tokenizer's files again"):
                Tokenizer.from_str(path.read_text("utf-8-sig"))
            raise

    def sampler(
        self, *, dtype: torch.dtype, device: torch.device | str, int8: bool = False
    ) -> JanusForConditionalGeneration:
        """Loads the network without the parts that sampling does not use, which need not be in the files.

        These are the vision tower with its aligner, the text head, and the VQ model except for its codebook.

        Args:
            int8: leave the layers' matrices in the files' dtype if that is smaller than `dtype`, since
                `int8.store_in_int8` widens them one by one.

        Raises:
            ValueError: for entries of config.json of a wrong type or out of range, sizes that differ from the weights',
                quantised weights, tensors that are missing, unexpected or of a wrong shape, by their names in the
                layout, and files that cannot be read.
        """
        self._refuse_quantised()
        config = self._model_config()
        headers = read_headers(self.path, self._layout.wanted(_SAMPLER_PARTS))
        self._check_int8(headers)
        layers, aligner = config.text_config.num_hidden_layers, config.vq_config.num_hidden_layers
        if self.kind == deepseek.MODEL_TYPE:
            section = "language_config"
            check_count(self._file, f"{section}.num_hidden_layers", layers, headers, "language_model.model.layers.")
            check_count(self._file, "gen_aligner_config.params.depth", aligner, headers, "gen_aligner.layers.")
        else:
            section, deeper = "text_config", "model.generation_aligner.hidden_layers."
            check_count(self._file, f"{section}.num_hidden_layers", layers, headers, "model.language_model.layers.")
            # The first of the aligner's layers has a name of its own.
            check_count(self._file, "vq_config.num_hidden_layers", aligner, headers, deeper, besides=1)
            self._check_sizes("vq_config", config.vq_config, headers, _CODE_SIZES)
        self._check_sizes(section, config.text_config, headers, _TEXT_SIZES)

        # Parts that are dropped are built as small as possible, whatever their configuration says.
        smallest = copy.deepcopy(config)
        smallest.vq_config.channel_multiplier, smallest.vq_config.num_res_blocks = [1], 0
        smallest.vq_config.base_channels = smallest.vq_config.latent_channels = 32
        with reading(self._file, _CONFIG, _AGAIN), torch.device("meta"):
            model = JanusForConditionalGeneration(smallest)
        del model.lm_head, model.model.vision_model, model.model.aligner
        vq = model.model.vqmodel
        del vq.encoder, vq.decoder, vq.quant_conv, vq.post_quant_conv
        language = model.model.language_model
        narrow = {f"model.language_model.layers.{name}" for name in linear_weights(language.layers)} if int8 else set()
        self._load(model, headers, dtype=dtype, device=device, narrow=narrow)
        # The only buffer, which checkpoints do not hold.
        with reading(self._file, _CONFIG, _AGAIN):
            language.rotary_emb = type(language.rotary_emb)(language.config)
        return model.eval()

    def tokenizer(self, *, dtype: torch.dtype | None, device: torch.device | str) -> JanusVQVAE:
        """Loads the VQ model. Only its tensors are read: 0.3 GB of a 7B checkpoint, not 14 GB.

        Raises:
            ValueError: as `sampler`.
        """
        config = None
        if self.kind == deepseek.MODEL_TYPE:  # Before the weights, since other models have this type too.
            config = deepseek.janus_config(self._config, str(self.path)).vq_config
        headers = read_headers(self.path, self._layout.wanted(_TOKENIZER_PARTS))
        if config is None:
            config = self._codes_config(headers)
            self._check_sizes("vq_config", config, headers, _CODEC_SIZES)
        with reading(self._file, _CONFIG, _AGAIN), torch.device("meta"):
            model = JanusVQVAE(config)
        self._load(model, headers, prefix=_VQ, dtype=dtype, device=device)
        return model.eval()

    def _refuse_quantised(self) -> None:
        """Refuses a model that config.json declares quantised; its tensors are checked separately."""
        for section in (self._config, self._config.get("text_config"), self._config.get("language_config")):
            said = section.get("quantization_config") if isinstance(section, dict) else None
            if said is not None and not (self._int8 and section is self._config):
                raise ValueError(self._quantised(f"(by its config.json): {_method(said)}"))

    def _check_int8(self, headers: Mapping[str, Header]) -> None:
        """Refuses 8-bit weights whose config.json does not declare them, and the other way round."""
        stored = any(header.dtype == "I8" for header in headers.values())
        if self._int8 and not stored:
            file = next(iter(headers.values())).file.name if headers else "its weights"
            raise ValueError(
                f"{self._file} says that matrices are stored as 8-bit rows ({INT8_METHOD}), and {file} holds none: "
                "they do not belong together, fetch the whole model again"
            )
        if stored and not self._int8 and any(header.file.name == INT8_FILE for header in headers.values()):
            raise ValueError(
                f"{self.path} has matrices as 8-bit rows in {INT8_FILE}, and a config.json that does not say so (its "
                f"quantization_config would be {INT8_METHOD}): they do not belong together, fetch the whole model again"
            )

    def _quantised(self, how: str) -> str:
        return f"{self.path} is quantised {how}, which is not read: take the folder of the original model"

    def _model_config(self) -> JanusConfig:
        """The configuration of the whole model; of the vision tower only the sides matter, other sizes are small."""
        if self.kind == deepseek.MODEL_TYPE:
            config = deepseek.janus_config(self._config, str(self.path))
        else:
            text = self._section("text_config", _TEXT)
            for name in ("num_key_value_heads", "head_dim"):
                if text.get(name) is not None:
                    whole_number(text, name, str(self.path), remedy=_AGAIN)
            if text.get("model_type", "llama") != "llama":
                raise ValueError(
                    f"{self.path} has a language model of type {text['model_type']!r}, expected 'llama': {_AGAIN}"
                )
            text = {**text, **self._rotary(text)}
            codes, vision = self._section("vq_config", _CODES), self._vision()
            # channel_multiplier belongs to networks that sampling drops, so it may have any length.
            used = {name: codes[name] for name in codes if name in _CODES and name != "channel_multiplier"}
            with reading(self._file, _CONFIG, _AGAIN):
                config = JanusConfig(
                    text_config=LlamaConfig.from_dict(dict(text)),
                    vision_config=JanusVisionConfig(**vision, num_hidden_layers=1),
                    vq_config=JanusVQVAEConfig(**used),
                    attn_implementation="sdpa",
                )
        side, most = config.vq_config.num_patches, config.text_config.max_position_embeddings
        if side**2 > most:
            raise ValueError(
                f"{self._file} says images of {side:,} x {side:,} tokens, and max_position_embeddings {most:,}, fewer "
                f"than an image has: {_AGAIN}"
            )
        return config

    def _rotary(self, text: Mapping[str, Any]) -> dict[str, Any]:
        """The rope_parameters of transformers 5, under transformers 4's names, which 5 reads too.

        Otherwise transformers 4 would silently use its own values.
        """
        rope = text.get("rope_parameters")
        if rope is None:
            rope = {"rope_theta": text["rope_theta"]} if "rope_theta" in text else {}
        if not isinstance(rope, dict):
            self._refuse("rope_parameters", rope, "an object")
        named: dict[str, Any] = {}
        if "rope_theta" in rope:
            theta = rope["rope_theta"]
            if type(theta) not in (int, float) or not math.isfinite(theta) or theta <= 0:
                self._refuse("rope_theta", theta, "a finite number above 0")
            named["rope_theta"] = theta
        if rope.get("rope_type", "default") != "default":
            named["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
        return named

    def _codes_config(self, headers: Mapping[str, Header]) -> JanusVQVAEConfig:
        """The configuration of the VQ model, in transformers' layout."""
        codes = self._section("" if self.kind == TOKENIZER else "vq_config", _CODES)
        values = {name: codes[name] for name in codes if name in _CODES}
        usual = JanusVQVAEConfig()
        blocks = values.get("num_res_blocks", usual.num_res_blocks)
        levels = len(values.get("channel_multiplier", usual.channel_multiplier))
        down = self._layout.rename("model.vqmodel.encoder.down.")
        # The last level has no downsampling, and so no tensors at all if it has no blocks.
        last = 0 if blocks else 1
        check_count(self._file, "channel_multiplier, whose values are", levels, headers, down, besides=last)
        check_count(self._file, "num_res_blocks", blocks, headers, f"{down}0.block.")
        if self.kind == TRANSFORMERS:
            vision = self._vision()
            values["num_patches"] = vision["image_size"] // vision["patch_size"]
        with reading(self._file, _CONFIG, _AGAIN):
            return JanusVQVAEConfig(**values)

    def _vision(self) -> dict[str, int]:
        """The sides of an image and of a patch, in pixels: 384 and 16 in every published model."""
        vision = self._section("vision_config", {})
        sides = {
            name: whole_number(vision, name, str(self.path), usual=usual, remedy=_AGAIN)
            for name, usual in (("image_size", 384), ("patch_size", 16))
        }
        if sides["image_size"] < sides["patch_size"]:
            raise ValueError(f"{self.path} has {sides} in its config.json, an image smaller than a patch: {_AGAIN}")
        return sides

    def _section(self, name: str, entries: Mapping[str, int | type]) -> Mapping[str, Any]:
        """A section of config.json, or all of it for an empty name, with its entries checked."""
        section = self._config.get(name, {}) if name else self._config
        if not isinstance(section, dict):
            raise ValueError(f"{self.path} has {name} {section!r} in its config.json, expected an object: {_AGAIN}")
        for entry, expected in entries.items():
            if entry not in section:
                continue
            value = section[entry]
            if isinstance(expected, int):
                whole_number(section, entry, str(self.path), least=expected, remedy=_AGAIN)
            elif expected is list:
                if not isinstance(value, list) or not value or not all(type(v) is int and v > 0 for v in value):
                    self._refuse(entry, value, "a list of whole numbers from 1")
            elif expected is float:
                if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
                    self._refuse(entry, value, "a finite number from 0")
            elif type(value) is not expected:
                self._refuse(entry, value, {str: "a name", bool: "true or false"}[expected])
        return section

    def _refuse(self, entry: str, value: Any, expected: str) -> None:
        raise ValueError(f"{self.path} has {entry} {value!r} in its config.json, expected {expected}: {_AGAIN}")

    def _check_sizes(
        self, section: str, config: Any, headers: Mapping[str, Header], table: tuple[tuple[str, str, int], ...]
    ) -> None:
        for entry, name, axis in table:
            theirs = self._layout.rename(name)
            check_size(self._file, f"{section}.{entry}", getattr(config, entry), headers, theirs, axis)

    def _load(
        self,
        module: nn.Module,
        headers: Mapping[str, Header],
        *,
        prefix: str = "",
        dtype: torch.dtype | None,
        device: torch.device | str,
        narrow: Collection[str] = (),
    ) -> None:
        """Loads a module on "meta".

        Args:
            prefix: precedes its tensor names in a `JanusForConditionalGeneration`.
            narrow: names of weights that are not widened to `dtype`.
        """
        expected = {
            self._layout.rename(prefix + name): (name, tuple(value.shape))
            for name, value in module.state_dict().items()
        }
        headers = _of_floats(headers) if self._int8 else headers
        unexpected = sorted(set(headers) - set(expected))
        dtypes = {name: headers[name].dtype for name in expected if name in headers}
        if how := quantised(dtypes, () if self._int8 else unexpected):
            raise ValueError(self._quantised(how))
        misfit = misfits(
            missing=sorted(set(expected) - set(headers)),
            unexpected=unexpected,
            wrong=[
                f"{name} is {list(headers[name].shape)}, expected {list(shape)}"
                for name, (_, shape) in expected.items()
                if name in headers and headers[name].shape != shape
            ],
        )
        if misfit:
            raise ValueError(
                f"the weights in {self.path} do not fit its config.json; {misfit}: fetch the whole model again"
            )
        left = {
            theirs for theirs, (name, _) in expected.items() if name in narrow and headers[theirs].size < dtype.itemsize
        }
        found = self._read(expected.keys() - left, dtype=dtype, device=device)
        if left:
            found |= self._read(left, dtype=None, device=device)
        module.load_state_dict({name: found[theirs] for theirs, (name, _) in expected.items()}, assign=True)

    def _read(
        self, names: Collection[str], *, dtype: torch.dtype | None, device: torch.device | str
    ) -> dict[str, torch.Tensor]:
        """Reads these tensors; matrices stored in 8 bits become floats."""
        if not self._int8:
            return read_wanted(self.path, names.__contains__, dtype=dtype, device=device)
        found = read_wanted(self.path, lambda name: name.removesuffix(SCALE) in names, device=device)
        with in_file(self.path):
            whole = restored(found, remedy="fetch the whole model again")
        return {name: value if dtype is None else value.to(dtype) for name, value in whole.items()}


def save_int8(folder: str | Path, janus: JanusForConditionalGeneration) -> None:
    """Writes config.json and weights: large matrices in 8 bits with a float32 scale per row, the rest in float16.

    The whole VQ model is stored in float16, so that its tokens do not change. The vision tower, its aligner and the
    text head, which nothing here uses, are left out. The caller writes the text tokenizer.

    Raises:
        OSError: if a file cannot be written.
    """
    kept = {name: value for name, value in janus.state_dict().items() if not name.startswith(_UNUSED_PARTS)}
    matrices = [name for name in large_matrices(janus) if name in kept and not name.startswith(_VQ)]
    write_tensors(Path(folder) / INT8_FILE, rounded(kept, matrices), {"format": "pt"})
    config = copy.deepcopy(janus.config)
    config.quantization_config = {"quant_method": INT8_METHOD}
    config.save_pretrained(folder)


def _of_floats(headers: Mapping[str, Header]) -> dict[str, Header]:
    """The headers that the weights have once 8-bit rows are restored: floats, without the scales."""
    return {
        name: header._replace(dtype="F32") if header.dtype == "I8" else header
        for name, header in headers.items()
        if not (name.endswith(SCALE) and name.removesuffix(SCALE) in headers)
    }


@contextmanager
def _without_marks(folder: Path) -> Iterator[Path]:
    """The tokenizer's folder, or if a file begins with a byte order mark, a temporary copy of the files without it.

    The tokenizers library and transformers cannot read byte order marks.
    """
    held = {name: (folder / name).read_bytes() for name in _WORD_FILES if (folder / name).exists()}
    if not any(content.startswith(codecs.BOM_UTF8) for content in held.values()):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="dcdd-") as copy:
        for name, content in held.items():
            (Path(copy) / name).write_bytes(content.removeprefix(codecs.BOM_UTF8))
        yield Path(copy)


def _method(said: Any) -> str:
    """What a quantization_config says, as text."""
    if not isinstance(said, dict) or not isinstance(said.get("quant_method"), str):
        return "in a way that it does not name"
    bits = 4 if said.get("load_in_4bit") else 8 if said.get("load_in_8bit") else said.get("bits")
    return said["quant_method"] + (f", {bits} bits" if type(bits) is int else "")
