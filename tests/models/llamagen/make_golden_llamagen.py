"""The golden numbers of LlamaGen's released loop for the tiny LlamaGen, made by that code itself.

Run from the repository root, with a checkout of github.com/FoundationVision/LlamaGen, and with ftfy and beautifulsoup4,
which its cleaning of captions needs: python -m tests.models.llamagen.make_golden_llamagen CHECKOUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from dcdd_core.method.sampling import gumbel_noise
from tests.tiny_bigfix import tiny_text_encoder, tiny_words
from tests.tiny_llamagen import SIDE, SLOTS, TINY, tiny_weights

GOLDEN = Path(__file__).with_name("golden_llamagen.json")
PROMPTS = ("A red circle on the left", "a blue square and a green circle on the ground , red on the right")
GUIDANCE, TOP_K, SEEDS = 7.5, 10, (3, 4)
STEPS, CODES = (0, 1, 7, 15), 12
CAPTIONS = (
    "  A Red CIRCLE ",
    "a&amp;b &lt;b&gt;bold&lt;/b&gt; <i>italic</i> text",
    "see https://example.com/a?b=1 now",
    "photo by @nick_12 of a cat",
    "dog\u2014cat \u2013 \u201cquoted\u201d \u2018single\u2019 \u00abguillemets\u00bb",
    "this-is-my-cute-cat_photo",
    "well-known, half-timbered house",
    "a 猫 and a dog",
    "no. 123456789 #12 #12345 file.png at 10.0.0.1 12:30 ",
    "***SALE*** (brand) [new] {x} a|b \\ / ~",
    "jc6640 jc6640vc 6640vc231 j2d1a2a",
    "free shipping! click for more, page 12, 1920x1080 jpg images",
    '"all in quotes"',
    "a colour : red.green,blue",
    "-starts and ends-",
    "a%20encoded+prompt",
    "fi\u00adve \ufb01gs, caf\u00e9 na\u0131ve",
    "a line\nbroken\\nprompt   with   spaces...and dots",
    "<person> smiling",
)


def released(checkout: str):
    """Its modules."""
    sys.path.insert(0, checkout)
    from autoregressive.models import generate, gpt
    from language import t5

    return gpt, generate, t5


@torch.no_grad()
def make(checkout: str) -> dict:
    gpt, generate, t5 = released(checkout)
    shape = TINY["layers.0.feed_forward.w1.weight"]
    model = gpt.Transformer(
        gpt.ModelArgs(
            dim=shape[1],
            n_layer=2,
            n_head=2,
            multiple_of=shape[0],
            ffn_dim_multiplier=0.5,
            caption_dim=16,
            model_type="t2i",
            vocab_size=64,
            cls_token_num=SLOTS,
            block_size=SIDE**2,
        )
    ).eval()
    model.load_state_dict(tiny_weights(), strict=True)

    text = object.__new__(t5.T5Embedder)
    text.tokenizer, text.model, text.device = tiny_words(), tiny_text_encoder(), torch.device("cpu")
    text.model_max_length, text.use_text_preprocessing = SLOTS, True
    features, masks = text.get_text_embeddings(list(PROMPTS))
    # As in sample_t2i.py: the caption moves to the right end.
    moved = torch.stack([torch.cat([f[int(m.sum()) :], f[: int(m.sum())]]) for f, m in zip(features, masks)])
    masks = masks.flip(-1)

    seen, draws, sample = [], [], generate.sample

    def kept(logits: torch.Tensor, **how):
        seen.append(logits[:, -1].clone())
        if how.get("sample_logits", True):
            # Their multinomial draw is replaced by one with the noise of (seed, position).
            draws.append(len(draws))
        return sample(logits, **how)

    def keyed(probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        noise = torch.stack([gumbel_noise(seed, draws[-1], probabilities.shape[1]) for seed in SEEDS])
        return (probabilities.log() + noise).argmax(-1, keepdim=True)

    generate.sample = kept
    multinomial = torch.multinomial
    runs = {}
    for name, how in (
        ("greedy", {"sample_logits": False}),
        ("drawn", {"sample_logits": True, "top_k": TOP_K}),
        ("alone", {"sample_logits": False, "cfg_scale": 1.0}),
    ):
        seen.clear()
        torch.multinomial = keyed
        tokens = generate.generate(model, moved * masks[..., None], SIDE**2, masks, **({"cfg_scale": GUIDANCE} | how))
        torch.multinomial = multinomial
        runs[name] = {
            "tokens": tokens.tolist(),
            "logits": {str(i): [[round(x, 5) for x in row] for row in seen[i][:, :CODES].tolist()] for i in STEPS},
        }
    return {
        "guidance": GUIDANCE,
        "top_k": TOP_K,
        "seeds": SEEDS,
        "prompts": PROMPTS,
        "runs": runs,
        "captions": [[caption, text.text_preprocessing(caption)] for caption in CAPTIONS],
    }


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(make(sys.argv[1]), indent=1) + "\n")
