"""Trains pico's Janus: caption -> image tokens. Some captions are dropped, for classifier-free guidance.

`python -m dcdd_pico.train_janus` trains a new Janus for existing weights, resuming where it stopped, and replaces
theirs; the image tokenizer is kept. Scenes are rendered on the fly. docs/embedded.md lists what a new Janus makes
stale, and the commands that renew it.

Its size is what two CPU cores can train in two hours. The table gives the seconds of one core per update of 64 scenes
(AMD EPYC with AVX-512 BF16, with other load on the machine; the loss and its gradient in batches of 16 except at width
256, the optimisers, and 0.36 for rendering and encoding), and how many scenes that allows in 2.2 hours of two cores at
nine tenths of their speed:

| layers x width | parameters, M | seconds | scenes |
|---|---|---|---|
| 6 x 256 | 5.3 | 2.5 | 358,000 |
| 6 x 320 | 8.3 | 3.2 | 279,000 |
| 6 x 384 | 11.7 | 4.1 | 218,000 |

A width of 384 also needs more space than is left among the embedded weights. When compiled (`--compile`, or a recipe
that says so), an update of 6 x 320 takes 0.6 of the time: 1.3 s instead of 2.1 s, on both cores of an Intel Xeon with
AMX, with no other load and without rendering.

Shapes: B batch, N tokens, M scenes.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.modeling_janus import JanusVQVAE

from dcdd_core import registry
from dcdd_core.evaluation.figures import save_image, training_curves
from dcdd_core.files import write_text
from dcdd_core.method.sampling import keyed_generator
from dcdd_core.models.janus.files import save_int8
from dcdd_core.models.janus.sampler import JanusSampler, prompt_ids, unconditional_ids
from dcdd_core.models.text_tokenizer import save_tokenizer
from dcdd_core.training.log import read_log

from . import embedded
from .build_context import BuildContext, Recipe, stage_context, stage_parser
from .scene_tokens import TokenBatch, different_scenes, encode_scenes, scene_facts_of
from .scenes import SceneFacts, vocabulary
from .token_training import TokenTraining, block_of
from .training_loop import last_held_out

_STAGE = 3
_RATE = 2e-3
_WARMUP = 300
_DROPPED = 0.1
_SAVE_EVERY = 100
_HEAD_WIDTH = 64
_LENGTHS = 16
_SPECIAL = ("<|begin_of_sentence|>", "<pad>", "<unk>", "<|User|>", "<|Assistant|>", "<begin_of_image>")


def pico_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level text tokenizer over the vocabulary of captions; other words become <unk>."""
    words = {word: i for i, word in enumerate((*_SPECIAL, ":", ",", ".", *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_sentence|>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<|User|>", "<|Assistant|>", "<begin_of_image>"],
    )


def janus_config(
    vq: JanusVQVAE,
    tokenizer: PreTrainedTokenizerFast,
    *,
    width: int = Recipe.janus_width,
    layers: int = Recipe.janus_layers,
) -> JanusConfig:
    """A Llama with attention heads of 64 channels. Generation does not use the vision tower, which is kept small.

    Args:
        width: a multiple of 64.

    Raises:
        ValueError: if the width is not a multiple of 64.
    """
    if width % _HEAD_WIDTH or width < _HEAD_WIDTH:
        raise ValueError(f"the width must be a multiple of {_HEAD_WIDTH}, the width of a head, got {width}")
    vq_config = vq.config.to_dict() | {
        "projection_dim": width,
        "image_token_embed_dim": width,
        "num_hidden_layers": 2,
    }
    grid = vq.config.num_patches
    return JanusConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=32 * round(width * 11 / 4 / 32),
            num_hidden_layers=layers,
            num_attention_heads=width // _HEAD_WIDTH,
            num_key_value_heads=width // _HEAD_WIDTH,
            max_position_embeddings=64 + grid * grid,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,  # transformers 4 reads it here, 5 below
        ).to_dict(),
        vision_config=JanusVisionConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8 * grid,
            patch_size=8,
            projection_dim=width,
            num_image_tokens=grid * grid,
        ).to_dict(),
        vq_config=vq_config,
        image_token_id=tokenizer.unk_token_id,
        tie_word_embeddings=True,
        dcdd_name=embedded.NAME,
    )


def start(vq: JanusVQVAE, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> JanusForConditionalGeneration:
    """An untrained model with this VQ-VAE; similar codes start with similar embeddings."""
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed + _STAGE)
        config = janus_config(vq, tokenizer, width=recipe.janus_width, layers=recipe.janus_layers)
        janus = JanusForConditionalGeneration(config)
    janus.model.vqmodel.load_state_dict(vq.state_dict())
    with torch.no_grad():
        codebook = vq.quantize.embedding.weight
        janus.model.generation_embeddings.weight.copy_(codebook * codebook.shape[1] ** 0.5)
    janus.model.vqmodel.eval().requires_grad_(False)
    janus.model.vision_model.requires_grad_(False)
    return janus


def train_janus(
    context: BuildContext, weights: Path, *, ahead: bool = True
) -> tuple[JanusForConditionalGeneration, PreTrainedTokenizerFast]:
    """Trains (or restores) the language model on the image tokenizer in `weights`.

    Args:
        weights: folder of embedded models; only the VQ-VAE of their Janus is read, and nothing else has to be there.
        ahead: see `SceneTokens`.
    """
    recipe, device = context.recipe, context.device
    steps, size = recipe.janus_steps, recipe.janus_batch
    vlm = embedded.model_paths(weights)["vlm"]
    vq = registry.sampler_family(vlm).load_tokenizer(str(vlm), device=device, dtype=torch.float32)
    tokenizer = pico_tokenizer()
    janus = start(vq.model, tokenizer, recipe).to(device).train()
    janus.model.vqmodel.eval()
    # On a CPU this takes four fifths of the time of PyTorch's fused attention for such short sequences.
    janus.model.language_model.set_attn_implementation("eager")
    if recipe.compiled:
        janus.model.language_model.compile(dynamic=False)
    trained = {name: p for name, p in janus.named_parameters() if p.requires_grad}
    matrices = [name for name, p in trained.items() if ".layers." in name and p.ndim == 2]
    training = TokenTraining(
        context, weights, vq, janus, trained=trained, matrices=matrices, uses=recipe.janus_uses, ahead=ahead
    )
    held_out_tokens, _ = encode_scenes(vq, "calibration", range(recipe.held_out_scenes), size=recipe.size)

    def prompts_of(facts: Sequence[SceneFacts]) -> list[list[int]]:
        return [prompt_ids(tokenizer, one.caption()) for one in facts]

    def objective(i: int, found: TokenBatch) -> dict[str, torch.Tensor]:
        dropped = torch.rand(size, generator=keyed_generator(recipe.seed, _STAGE, i)) < _DROPPED
        prompts = [
            unconditional_ids(ids, tokenizer) if drop else ids for ids, drop in zip(prompts_of(found.facts), dropped)
        ]
        with context.autocast():
            return {"loss": next_token_loss(janus, prompts, found.tokens.to(device)).mean()}

    def losses(facts: Sequence[SceneFacts], tokens: torch.Tensor) -> torch.Tensor:
        """The loss of each scene, with its caption and the EMA weights: [M]."""
        parts = []
        for k in range(0, len(tokens), size):
            with context.autocast():
                found = next_token_loss(janus, prompts_of(facts[k : k + size]), tokens[k : k + size].to(device))
            parts.append(found.mean(1).cpu())
        return torch.cat(parts).double()

    @torch.no_grad()
    def evaluate(done: int) -> dict[str, float]:
        """Held-out scenes, and as many training scenes, taken evenly from the whole training so far."""
        nonlocal held_out_tokens
        count = recipe.janus_held_out if done == steps else recipe.held_out_scenes
        if count > len(held_out_tokens):
            more, _ = encode_scenes(vq, "calibration", range(len(held_out_tokens), count), size=recipe.size)
            held_out_tokens = torch.cat([held_out_tokens, more])
        updates = torch.linspace(0, done - 1, max(1, count // size)).long().tolist()
        with training.averaged():
            held_out = losses(scene_facts_of("calibration", range(count)), held_out_tokens[:count])
            batches = (training.scenes.batch(k, size) for k in updates)
            seen = torch.cat([losses(found.facts, found.tokens) for found in batches])
        return gap_of(held_out, seen)

    training.run(
        "janus",
        objective,
        evaluate,
        steps=steps,
        batch=size,
        peak=_RATE,
        warmup=_WARMUP,
        settings=context.settings("janus_layers", "janus_width", "janus_batch", "janus_uses"),
        save_every=_SAVE_EVERY,
    )
    return janus, tokenizer


def gap_of(held_out: torch.Tensor, seen: torch.Tensor) -> dict[str, float]:
    """Mean losses of held-out scenes [M] and of training scenes [M'], their difference, and its standard error."""
    error = sum(part.var() / len(part) for part in (held_out, seen)) ** 0.5
    return {
        "loss": float(held_out.mean()),
        "training loss": float(seen.mean()),
        "gap": float(held_out.mean() - seen.mean()),
        "gap, standard error": float(error),
    }


def next_token_loss(
    janus: JanusForConditionalGeneration, prompts: list[list[int]], tokens: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy in nats of each image token given the prompt and earlier tokens: tokens [B, N] -> [B, N].

    Rows are padded at the end, which causal attention does not see, so positions are the same as in sampling. They are
    padded to a multiple of 16, so that a compiled model meets only few lengths.
    """
    embed = janus.get_input_embeddings()
    device = tokens.device
    image = janus.prepare_embeddings_for_image_generation(tokens[:, :-1])
    rows = [
        torch.cat([embed(torch.tensor(ids, device=device)).to(image.dtype), drawn])
        for ids, drawn in zip(prompts, image, strict=True)
    ]
    padded = pad_sequence(rows, batch_first=True)
    padded = F.pad(padded, (0, 0, 0, -padded.shape[1] % _LENGTHS))
    hidden = janus.model.language_model(inputs_embeds=padded, use_cache=False).last_hidden_state
    ends = torch.tensor([len(ids) - 1 for ids in prompts], device=device)[:, None]
    positions = ends + torch.arange(tokens.shape[1], device=device)
    hidden = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[2]))
    logits = janus.model.generation_head(hidden).float()
    return F.cross_entropy(rearrange(logits, "b n k -> b k n"), tokens, reduction="none")


def save_janus(
    folder: Path,
    janus: JanusForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    *,
    device: torch.device | str = "cpu",
) -> JanusSampler:
    """Replaces a folder by the model, with its matrices in 8 bits (`save_int8`); returns it as read back from there."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    save_int8(fresh, janus)
    save_tokenizer(tokenizer, fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    return JanusSampler.load(folder, device=device)


def describe_janus(context: BuildContext, folder: Path, janus: JanusForConditionalGeneration) -> None:
    """Writes the card of a trained model into its folder, and its training curves into the work folder."""
    log = read_log(context.folder / "janus")
    write_text(folder / "README.md", card(context.recipe, janus, log))
    curves = training_curves({"janus": log, "gap": log}, {"janus": "eval/loss", "gap": "eval/gap"})
    save_image(curves, context.folder / "janus-curves.png")


def card(recipe: Recipe, janus: JanusForConditionalGeneration, log: Sequence[Mapping[str, Any]]) -> str:
    """Describes the weights, in Markdown."""
    layers = sum(weight.numel() for weight in janus.model.language_model.layers.parameters())
    drawn = recipe.janus_steps * recipe.janus_batch
    different = different_scenes(drawn, block=block_of(recipe.train_scenes), uses=recipe.janus_uses)
    seconds, table = last_held_out(log)
    return f"""# pico's Janus

A Llama of {recipe.janus_layers} layers of width {recipe.janus_width} ({layers / 1e6:.1f} M parameters) between Janus'
embeddings and head, on pico's image tokenizer. Trained for {recipe.janus_steps:,} updates of {recipe.janus_batch}
scenes ({drawn:,} drawn, {different:,} different ones), {seconds / 3600:.2f} hours. Weights: int8 with
a float32 scale a row; the tokenizer's and small ones float16. `JanusSampler.load` reads them, transformers does not.

Command: `python -m dcdd_pico.train_janus`. Loss in nats a token at the end, of held-out scenes and of scenes that it
was trained on:

{table}
"""


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--steps", type=int, default=Recipe.janus_steps, help="updates (default %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: as the recipe says")
    chosen = parser.parse_args()
    own = Recipe.defaults("janus_") | {"janus_steps": chosen.steps, "compiled": chosen.compile}
    context = stage_context(chosen, **own)
    janus, tokenizer = train_janus(context, chosen.weights)
    folder = embedded.model_paths(chosen.weights)["vlm"]
    save_janus(folder, janus, tokenizer)
    describe_janus(context, folder, janus)
    context.recipe.save(chosen.weights)
    print(folder)


if __name__ == "__main__":
    main()
