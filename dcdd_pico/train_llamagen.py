"""Trains pico's LlamaGen: a small T5 reads the caption, then image tokens follow one after the other.

`python -m dcdd_pico.train_llamagen` trains it for existing weights, resuming where it stopped, and writes it beside
them. Scenes are rendered on the fly.

The published model reads captions with a T5 that was trained on text alone. Here a T5 encoder of two layers replaces
it and is trained jointly: LlamaGen's own layers read a caption as means over its prefixes, so its features have to
encode which colour belongs to which shape.

Shapes: B batch, N tokens, K codes, n tokens of a caption.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from dcdd_core import registry
from dcdd_core.evaluation.figures import save_image, training_curves
from dcdd_core.files import write_text
from dcdd_core.method.sampling import keyed_generator
from dcdd_core.models.llamagen.captions import clean_caption
from dcdd_core.models.llamagen.files import MODEL_TYPE, OTHER_TEXT, save_network
from dcdd_core.models.llamagen.network import LlamaGenConfig, LlamaGenTransformer
from dcdd_core.models.t5 import TEXT_SLOTS, T5Words
from dcdd_core.models.text_tokenizer import save_tokenizer
from dcdd_core.training.log import read_log
from dcdd_core.types import Codebook

from .build_context import BuildContext, Recipe, stage_context, stage_parser
from .embedded import LLAMAGEN, model_paths
from .export import let_others_read
from .scene_tokens import TokenBatch, encode_scenes, scene_facts_of
from .scenes import SceneFacts, vocabulary
from .token_training import TokenTraining
from .training_loop import last_held_out

_STAGE = 10
_RATE = 2e-3
_WARMUP = 150
_USES = 3
_DROPPED = 0.1
_SAVE_EVERY = 250
_NAME = "pico llamagen"
_CHECKPOINT = "t2i_pico.safetensors"
_SPECIAL = ("<pad>", "</s>", "<unk>")


def pico_words() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the vocabulary of captions that ends a text as T5's does; other words are <unk>."""
    words = {word: i for i, word in enumerate((*_SPECIAL, ":", ",", ".", *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def text_config(words: int) -> T5Config:
    """Two layers of width 96."""
    return T5Config(
        vocab_size=words,
        d_model=96,
        d_kv=24,
        d_ff=192,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )


def network_config(codes: int, grid: tuple[int, int]) -> LlamaGenConfig:
    """Five layers of width 192."""
    return LlamaGenConfig(
        grid=grid, codes=codes, text_width=96, text_slots=TEXT_SLOTS, width=192, layers=5, heads=6, hidden=512
    )


def start(codebook: Codebook, grid: tuple[int, int], words: int, seed: int) -> LlamaGenTransformer:
    """An untrained network; similar codes start with similar embeddings."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = LlamaGenTransformer(network_config(codebook.size, grid))
        network.text_encoder = T5EncoderModel(text_config(words))  # trained as part of the network
        with torch.no_grad():
            nn.init.normal_(network.null, std=network.config.text_width**-0.5)
            nn.init.zeros_(network.head.weight)
            spread = torch.randn(codebook.dim, network.config.width) / codebook.dim**0.5
            network.language.embed_tokens.weight.copy_(codebook.vectors @ spread)
    return network


def next_token_loss(
    network: LlamaGenTransformer, ids: Sequence[Sequence[int]], tokens: torch.Tensor, dropped: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy in nats of each image token given the caption and earlier tokens: tokens [B, N] -> [B, N].

    Args:
        ids: token ids of each caption, [n].
        dropped: bool [B]; where True, the null features replace those of the caption, in as many slots.
    """
    device, most = tokens.device, max(map(len, ids))
    padding = torch.tensor([most - len(row) for row in ids])
    real = (torch.arange(most) >= padding[:, None]).to(device)
    # T5 reads captions padded on the right, LlamaGen on the left.
    right = torch.tensor([[*row, *[0] * (most - len(row))] for row in ids], device=device)
    states = network.text_encoder(input_ids=right, attention_mask=real.flip(1).long()).last_hidden_state
    states = torch.stack([state.roll(int(pad), 0) for state, pad in zip(states, padding)])
    states = torch.where(dropped.to(device)[:, None, None], network.null[-most:].to(states.dtype), states)
    logits = network(network.captions(states), real, tokens[:, :-1])
    return F.cross_entropy(rearrange(logits.float(), "b n k -> b k n"), tokens, reduction="none")


def train_llamagen(context: BuildContext, weights: Path, *, ahead: bool = True) -> LlamaGenTransformer:
    """Trains (or restores) the network on the image tokenizer of the models in `weights`.

    Args:
        ahead: see `SceneTokens`.
    """
    recipe, device = context.recipe, context.device
    steps, size = recipe.llamagen_steps, recipe.llamagen_batch
    vlm = model_paths(weights)["vlm"]
    tokenizer = registry.sampler_family(vlm).load_tokenizer(str(vlm), device=device, dtype=torch.float32)
    words = T5Words(pico_words())
    network = start(tokenizer.codebook, tokenizer.grid, len(words.tokenizer), recipe.seed + _STAGE).to(device).train()
    trained = dict(network.named_parameters())
    matrices = [name for name, weight in trained.items() if "language.layers." in name and weight.ndim == 2]
    training = TokenTraining(
        context, weights, tokenizer, network, trained=trained, matrices=matrices, uses=_USES, ahead=ahead
    )
    held_out_facts = scene_facts_of("calibration", range(recipe.held_out_scenes))
    held_out_tokens, _ = encode_scenes(tokenizer, "calibration", range(recipe.held_out_scenes), size=recipe.size)

    def ids_of(facts: Sequence[SceneFacts]) -> list[list[int]]:
        return [words.ids(clean_caption(one.caption())) for one in facts]

    def objective(i: int, found: TokenBatch) -> dict[str, torch.Tensor]:
        dropped = torch.rand(size, generator=keyed_generator(recipe.seed, _STAGE, i)) < _DROPPED
        with context.autocast():
            return {"loss": next_token_loss(network, ids_of(found.facts), found.tokens.to(device), dropped).mean()}

    @torch.no_grad()
    def evaluate(_: int) -> dict[str, float]:
        """Means over the held-out scenes, with their captions and without."""
        found: dict[str, list[torch.Tensor]] = {"loss": [], "without caption": []}
        for begin in range(0, len(held_out_tokens), size):
            part = slice(begin, begin + size)
            ids, tokens = ids_of(held_out_facts[part]), held_out_tokens[part].to(device)
            for name, losses in found.items():
                dropped = torch.full((len(ids),), name != "loss")
                with training.averaged() as model, context.autocast():
                    losses.append(next_token_loss(model, ids, tokens, dropped))
        return {name: float(torch.cat(losses).mean()) for name, losses in found.items()}

    training.run(
        "llamagen",
        objective,
        evaluate,
        steps=steps,
        batch=size,
        peak=_RATE,
        warmup=_WARMUP,
        settings=context.settings("llamagen_batch"),
        save_every=_SAVE_EVERY,
    )
    return network


def save_llamagen(context: BuildContext, weights: Path, network: LlamaGenTransformer) -> Path:
    """Writes the model beside those in `weights`, in 8 bits, with a card and its training curve; returns its folder.

    Its image tokenizer is still that of pico's Janus.
    """
    folder = weights / LLAMAGEN
    save_network(folder / _CHECKPOINT, network, int8=True)
    text = folder / OTHER_TEXT
    encoder = T5EncoderModel(network.text_encoder.config)
    encoder.load_state_dict(network.text_encoder.state_dict())
    encoder.half().save_pretrained(text)
    let_others_read(text, like=folder / _CHECKPOINT)
    save_tokenizer(pico_words(), text)
    config = {
        "model_type": MODEL_TYPE,
        "dcdd_name": _NAME,
        "num_attention_heads": network.config.heads,
        "block_size": network.config.tokens,
        "tokenizer": "../janus",
    }
    write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")
    log = read_log(context.folder / "llamagen")
    write_text(folder / "README.md", card(context.recipe, network, log))
    save_image(training_curves({"llamagen": log}, {"llamagen": "eval/loss"}), context.folder / "llamagen-curves.png")
    return folder


def card(recipe: Recipe, network: LlamaGenTransformer, log: Sequence[dict[str, Any]]) -> str:
    """Describes the weights, in Markdown."""
    text = sum(weight.numel() for weight in network.text_encoder.parameters())
    layers = sum(weight.numel() for weight in network.parameters()) - text
    drawn = recipe.llamagen_steps * recipe.llamagen_batch
    seconds, table = last_held_out(log)
    return f"""# pico's LlamaGen

LlamaGen's text-to-image transformer with {layers / 1e6:.1f} M parameters on pico's image tokenizer, and in the place of
flan-t5-xl a T5 encoder of {text / 1e6:.1f} M, trained with it. Trained for {recipe.llamagen_steps:,} updates of
{recipe.llamagen_batch} scenes ({drawn:,} drawn; each fresh scene is drawn {_USES} times),
{seconds / 3600:.2f} hours. Weights: int8 with a float32 scale a row; the text encoder's float16.

Command: `python -m dcdd_pico.train_llamagen`. Held-out loss in nats a token at the end:

{table}
"""


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--steps", type=int, help="updates; the recipe's by default")
    chosen = parser.parse_args()
    context = stage_context(chosen, llamagen_steps=chosen.steps)
    print(save_llamagen(context, chosen.weights, train_llamagen(context, chosen.weights)))


if __name__ == "__main__":
    main()
