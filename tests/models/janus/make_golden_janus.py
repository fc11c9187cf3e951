"""DeepSeek's image loop, written for plainness, and the golden numbers that it gives for the tiny Janus.

Run from the repository root: python -m tests.models.janus.make_golden_janus
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from transformers import DynamicCache, JanusForConditionalGeneration

from tests.tiny import tiny_janus

GOLDEN = Path(__file__).with_name("golden_janus.json")
PROMPTS = ("a red circle on the left", "a blue square and a green circle on the ground , red on the right")
GUIDANCE = 5.0
STEPS = (0, 1, 7, 15)
CODES = 12


@torch.no_grad()
def deepseek_loop(
    model: JanusForConditionalGeneration, ids: list[int], pad: int, guidance: float, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The released loop for one prompt, with the most likely code where it draws: logits [N, K] and tokens [N].

    As released: row 0 has the prompt and row 1 pads for all but its first and last id, no attention mask, positions
    from 0 by default, a cache that grows, guidance on the head's output.
    """
    language = copy.deepcopy(model.model.language_model)
    language.set_attn_implementation("eager")
    rows = torch.tensor([ids, ids])
    rows[1, 1:-1] = pad
    embeddings, cache = language.get_input_embeddings()(rows), DynamicCache()
    logits, tokens = [], []
    for _ in range(count):
        hidden = language(inputs_embeds=embeddings, use_cache=True, past_key_values=cache).last_hidden_state
        conditional, unconditional = model.model.generation_head(hidden[:, -1])
        step = unconditional + guidance * (conditional - unconditional)
        token = step.argmax()
        logits.append(step)
        tokens.append(token)
        embeddings = model.prepare_embeddings_for_image_generation(token.repeat(2)).unsqueeze(1)
    return torch.stack(logits), torch.stack(tokens)


def template_ids(prompt: str) -> list[int]:
    """The prompt's ids, token by token: the tiny tokenizer's words are separated by spaces in `PROMPTS`."""
    _, tokenizer = tiny_janus()
    words = ["<|begin_of_sentence|>", "<|User|>", ":", *prompt.split(), "<|Assistant|>", ":", "<begin_of_image>"]
    return [tokenizer.get_vocab()[word] for word in words]


def make() -> dict:
    model, tokenizer = tiny_janus()
    entries = []
    for prompt in PROMPTS:
        logits, tokens = deepseek_loop(model, template_ids(prompt), tokenizer.pad_token_id, GUIDANCE, 16)
        entries.append(
            {
                "prompt": prompt,
                "tokens": tokens.tolist(),
                "logits": {str(i): [round(x, 5) for x in logits[i, :CODES].tolist()] for i in STEPS},
            }
        )
    return {"guidance": GUIDANCE, "prompts": entries}


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(make(), indent=1) + "\n")
