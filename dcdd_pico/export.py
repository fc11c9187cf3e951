"""Writes the shipped weights: half precision or 8 bits, in the file layouts of the full-size models."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import JanusForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.janus.modeling_janus import JanusVQVAE

from dcdd_core.files import write_tensors
from dcdd_core.int8_rows import rounded
from dcdd_core.models.bundle import save_bundle
from dcdd_core.models.decoder import DistributionConditionedDecoder

from .build_context import Recipe
from .embedded import JANUS
from .train_janus import save_janus

#: Upper limit in bytes: the weights are in git, which keeps every version.
MOST_BYTES = 48 * 10**6
#: Two thirds of the reader's weights; used to read facts, but not for Frechet features or perceptual distances.
READER_IN_INT8 = ("hidden.2.weight",)


def export(
    weights: Path,
    *,
    janus: JanusForConditionalGeneration,
    words: PreTrainedTokenizerFast,
    vq: JanusVQVAE,
    vae: AutoencoderKL,
    decoder: DistributionConditionedDecoder,
    reader: nn.Module,
    recipe: Recipe,
) -> None:
    """Writes all weights that `load_pico` and `load_reader` read, into a temporary folder that then replaces `weights`
    except for its README.md.

    The decoder's text stream is left out; the decoder can still be trained further (`load_decoder` with fold=False).

    Raises:
        ValueError: if the weights take more than 48 MB; the previous weights are kept in that case.
    """
    fresh = weights.with_name(weights.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    janus = copy.deepcopy(janus)
    janus.model.vqmodel.load_state_dict(vq.state_dict())
    save_janus(fresh / JANUS, janus, words)
    copy.deepcopy(vae).half().save_pretrained(fresh / "vae")
    save_bundle(fresh / "decoder.safetensors", decoder, dtype=torch.float16)
    write_tensors(fresh / "reader.safetensors", rounded(reader.state_dict(), READER_IN_INT8), {})
    let_others_read(fresh, like=fresh / "reader.safetensors")
    recipe.save(fresh)
    size = sum(path.stat().st_size for path in fresh.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        shutil.rmtree(fresh)
        raise ValueError(f"the weights take {size / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:.0f}: shrink a model")
    if weights.exists():
        if (card := weights / "README.md").exists():
            shutil.copy2(card, fresh)
        shutil.rmtree(weights)
    fresh.rename(weights)


def let_others_read(folder: Path, *, like: Path) -> None:
    """Gives all safetensors files in a folder the permissions of another file.

    What `save_pretrained` writes with safetensors 0.8 is readable by the owner only.
    """
    for path in folder.rglob("*.safetensors"):
        shutil.copymode(like, path)
