"""Trains pico's Janus: caption -> image tokens. Some captions are dropped, for classifier-free guidance."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.modeling_janus import JanusVQVAE

from dcdd_core.method.sampling import keyed_generator
from dcdd_core.models.janus.sampler import JanusSampler, prompt_ids, unconditional_ids
from dcdd_core.models.text_tokenizer import save_tokenizer
from dcdd_core.training.ema import EMA
from dcdd_core.training.optimizers import adamw_with_muon
from dcdd_core.training.schedules import set_learning_rate, warmup_cosine

from . import embedded
from .build_context import BuildContext
from .scenes import SceneFacts, vocabulary
from .train_tokenizer import tokens_digest
from .training_loop import train

_STAGE = 3
_WIDTH = 256
_RATE = 2e-3
_DROPPED = 0.1
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


def janus_config(vq: JanusVQVAE, tokenizer: PreTrainedTokenizerFast) -> JanusConfig:
    """A Llama with 6 layers of width 256. The vision tower, which generation does not use, is kept small."""
    vq_config = vq.config.to_dict() | {
        "projection_dim": _WIDTH,
        "image_token_embed_dim": _WIDTH,
        "num_hidden_layers": 2,
    }
    grid = vq.config.num_patches
    return JanusConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=_WIDTH,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
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
            projection_dim=_WIDTH,
            num_image_tokens=grid * grid,
        ).to_dict(),
        vq_config=vq_config,
        image_token_id=tokenizer.unk_token_id,
        tie_word_embeddings=True,
    )


def train_janus(
    context: BuildContext, vq: JanusVQVAE, tokens: torch.Tensor, held_out_tokens: torch.Tensor
) -> tuple[JanusForConditionalGeneration, PreTrainedTokenizerFast]:
    """Trains (or restores) the language model on the tokens [M, N] of the training scenes and their captions."""
    recipe, device = context.recipe, context.device
    tokenizer = pico_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed + _STAGE)
        janus = JanusForConditionalGeneration(janus_config(vq, tokenizer))
    janus.model.vqmodel.load_state_dict(vq.state_dict())
    with torch.no_grad():  # similar codes start with similar embeddings
        codebook = vq.quantize.embedding.weight
        janus.model.generation_embeddings.weight.copy_(codebook * codebook.shape[1] ** 0.5)
    janus.to(device).train()
    janus.model.vqmodel.eval().requires_grad_(False)
    janus.model.vision_model.requires_grad_(False)
    weights = {name: p for name, p in janus.named_parameters() if p.requires_grad}
    matrices = [name for name, p in weights.items() if ".layers." in name and p.ndim == 2]
    optimizers = adamw_with_muon(weights, matrices, betas=(0.9, 0.95), weight_decay=0.05)
    prompts = _all_prompts(context.train_facts, tokenizer)
    held_out_prompts = _all_prompts(context.held_out_facts, tokenizer)
    ema = EMA(weights, 0.998)

    def step(i: int) -> dict[str, torch.Tensor]:
        rate = warmup_cosine(i, recipe.janus_steps, peak=_RATE, warmup=150)
        index = context.batch(_STAGE, i, recipe.janus_batch)
        dropped = torch.rand(len(index), generator=keyed_generator(recipe.seed, _STAGE, i, 1)) < _DROPPED
        rows = [
            unconditional_ids(prompts[k], tokenizer) if drop else prompts[k]
            for k, drop in zip(index, dropped, strict=True)
        ]
        with context.autocast():
            loss = next_token_loss(janus, rows, tokens[index].to(device)).mean()
        janus.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        for optimizer in optimizers.values():
            set_learning_rate(optimizer, rate)
            optimizer.step()
        ema.update()
        return {"loss": loss.detach()}

    @torch.no_grad()
    def evaluate(_: int) -> dict[str, float]:
        with ema.swapped_in(), context.autocast():
            losses = torch.cat(
                [
                    next_token_loss(janus, held_out_prompts[k : k + 32], held_out_tokens[k : k + 32].to(device))
                    for k in range(0, len(held_out_prompts), 32)
                ]
            )
        return {"loss": float(losses.mean())}

    train(
        context.folder / "janus",
        settings=context.settings(
            "janus_batch", tokenizer=tokens_digest(vq), layers=janus.config.text_config.num_hidden_layers
        ),
        steps=recipe.janus_steps,
        step=step,
        state={"model": janus, "ema": ema, **optimizers},
        evaluate=evaluate,
        evaluate_every=500,
        save_every=250,
    )
    ema.apply()
    return janus.eval().requires_grad_(False), tokenizer


def next_token_loss(
    janus: JanusForConditionalGeneration, prompts: list[list[int]], tokens: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy in nats of each image token given the prompt and earlier tokens: tokens [B, N] -> [B, N].

    Rows are padded at the end, where causal attention does not reach, so positions are the same as in sampling.
    """
    embed = janus.get_input_embeddings()
    device = tokens.device
    image = janus.prepare_embeddings_for_image_generation(tokens[:, :-1])
    rows = [
        torch.cat([embed(torch.tensor(ids, device=device)).to(image.dtype), drawn])
        for ids, drawn in zip(prompts, image, strict=True)
    ]
    hidden = janus.model.language_model(inputs_embeds=pad_sequence(rows, batch_first=True)).last_hidden_state
    ends = torch.tensor([len(ids) - 1 for ids in prompts], device=device)[:, None]
    positions = ends + torch.arange(tokens.shape[1], device=device)
    hidden = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[2]))
    logits = janus.model.generation_head(hidden).float()
    return F.cross_entropy(rearrange(logits, "b n k -> b k n"), tokens, reduction="none")


def _all_prompts(facts: list[SceneFacts], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [prompt_ids(tokenizer, f.caption()) for f in facts]


def save_janus(
    folder: Path,
    janus: JanusForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    *,
    device: torch.device | str = "cpu",
) -> JanusSampler:
    """Writes the model in the transformers layout (float16), and returns the model read back from these files."""
    janus = copy.deepcopy(janus).half()
    janus.config.dcdd_name = embedded.NAME
    janus.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return JanusSampler.load(folder, device=device)
