"""Image tokens: seconds per call, pico with its trained weights

Compared with transformers' `generate`, and with a loop like DeepSeek's published one (growing cache, eager attention,
multinomial sampling). All use the same weights and number of tokens. How many passes ours takes depends on the weights;
those of the large model are random.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable

import torch
from torch import nn
from transformers import DynamicCache, JanusForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.janus.modeling_janus import JanusVQVAE

from benchmarks.memory import janus
from benchmarks.targets import Target
from benchmarks.timing import NOT_MEASURED, compared, is_h100
from dcdd_core.models.janus.files import JanusFolder
from dcdd_core.models.janus.sampler import JanusSampler, prompt_ids
from dcdd_core.protocols import SamplingOptions
from dcdd_pico.embedded import model_paths
from dcdd_pico.train_janus import janus_config, pico_tokenizer
from dcdd_pico.train_tokenizer import tokenizer_config
from tests.tiny import fill

HEAD = ("model, batch", "who", "seconds", "times ours")
PROMPT = "a large striped red heart in the centre on a wavy sky ground"
GUIDANCE = 5.0
#: Memory bandwidth of an H100 (SXM) in bytes/s. A step of a large model cannot be faster than reading its weights.
H100_BYTES = 3.35e12
_ONE_BY_ONE = "ours, one token a pass"
_OURS, _GENERATE, _LIMIT = "ours, with all logits kept", "transformers' generate", "limit by an H100's memory bandwidth"
_PICO, _LARGE = "pico (CPU, float32)", "Janus-Pro-7B's shape (GPU, bfloat16)"
TARGETS = (
    *(
        Target(
            row=(f"{_PICO}, {batch}", _GENERATE),
            column="times ours",
            relation="at least",
            bound=bound,
            source="chosen, above what a plain loop such as DeepSeek's gives",
        )
        for batch, bound in ((1, 3.0), (4, 1.6))
    ),
    Target(
        row=(f"{_LARGE}, 1", _GENERATE),
        column="times ours",
        relation="at least",
        bound=3.0,
        source="chosen: the paper's 11.86 s per image are 5.5 times the limit",
    ),
    Target(
        row=(f"{_LARGE}, 1", _OURS),
        column="seconds",
        baseline=(f"{_LARGE}, 1", _LIMIT),
        relation="at most",
        bound=1.6,
        source="chosen: the limit is reading all weights once per token",
    ),
)


def pico(grid: int = 12) -> tuple[JanusForConditionalGeneration, PreTrainedTokenizerFast]:
    """A Janus of pico's shape with random weights."""
    words = pico_tokenizer()
    return fill(JanusForConditionalGeneration(janus_config(JanusVQVAE(tokenizer_config(grid)), words))), words


def as_loaded(model: JanusForConditionalGeneration, words: PreTrainedTokenizerFast) -> JanusSampler:
    """A sampler with these weights, loaded from a folder as usual."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        words.save_pretrained(folder)
        return JanusSampler.load(folder)


def generate(model: JanusForConditionalGeneration, ids: torch.Tensor, pad: int) -> Callable[[], torch.Tensor]:
    """transformers' own image generation for prompts with ids [B, L]."""
    config = copy.deepcopy(model.generation_config)
    config.bos_token_id, config.pad_token_id = int(ids[0, 0]), pad
    config.generation_kwargs = {"boi_token_id": int(ids[0, -1])}
    config.update(do_sample=True, guidance_scale=GUIDANCE, top_k=0)

    @torch.no_grad()
    def run() -> torch.Tensor:
        mask = torch.ones_like(ids)
        own = copy.deepcopy(config)
        return model.generate(inputs=ids, attention_mask=mask, generation_mode="image", generation_config=own)

    return run


def deepseek(
    model: JanusForConditionalGeneration, ids: torch.Tensor, pad: int, count: int
) -> Callable[[], torch.Tensor]:
    """A loop like DeepSeek's published one for prompts with ids [B, L]."""
    model = copy.deepcopy(model)
    language = model.model.language_model
    language.set_attn_implementation("eager")

    @torch.no_grad()
    def run() -> torch.Tensor:
        rows = ids.repeat_interleave(2, dim=0)
        rows[1::2, 1:-1] = pad
        embeddings, cache, tokens = language.get_input_embeddings()(rows), DynamicCache(), []
        for _ in range(count):
            hidden = language(inputs_embeds=embeddings, use_cache=True, past_key_values=cache).last_hidden_state
            logits = model.model.generation_head(hidden[:, -1])
            conditional, unconditional = logits[0::2], logits[1::2]
            step = unconditional + GUIDANCE * (conditional - unconditional)
            tokens.append(torch.multinomial(step.softmax(-1), 1))
            embeddings = model.prepare_embeddings_for_image_generation(tokens[-1].repeat_interleave(2, dim=0))
        return torch.cat(tokens, dim=1)

    return run


def contest(
    what: str, model: JanusForConditionalGeneration, sampler: JanusSampler, batch: int, rounds: int
) -> list[tuple[str, ...]]:
    ids = torch.tensor([prompt_ids(sampler.tokenizer, PROMPT)] * batch, device=model.device)
    pad, count = sampler.tokenizer.pad_token_id, sampler.grid[0] * sampler.grid[1]

    def ours(parallel: int | None) -> Callable[[], object]:
        options, seeds = SamplingOptions(guidance=GUIDANCE), range(batch)
        return lambda: sampler.sample([PROMPT] * batch, seeds=seeds, options=options, parallel=parallel)

    functions = {
        _OURS: ours(None),
        _ONE_BY_ONE: ours(1),
        _GENERATE: generate(model, ids, pad),
        "DeepSeek's loop": deepseek(model, ids, pad, count),
    }
    return compared(f"{what}, {batch}", functions, rounds)


def seven_billion() -> tuple[JanusForConditionalGeneration, JanusSampler]:
    """A model and sampler of Janus-Pro-7B's shape in bfloat16 on the GPU, with random weights."""
    model = janus("Janus-Pro-7B").to(torch.bfloat16).to_empty(device="cuda").eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.02)
    language = model.model.language_model
    language.rotary_emb = type(language.rotary_emb)(language.config).cuda()
    return model, JanusSampler(model, pico_tokenizer())


def weights_read(model: JanusForConditionalGeneration, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of weights that a pass reads: layers in that dtype, the generation head in float32."""
    language, head = model.model.language_model, model.model.generation_head
    layers = sum(dtype.itemsize * w.numel() for w in language.layers.parameters())
    return layers + sum(4 * w.numel() for w in head.parameters())


def step_limit(model: JanusForConditionalGeneration) -> float:
    """Seconds an H100 needs to read the weights of a pass."""
    return weights_read(model) / H100_BYTES


def rows() -> list[tuple[str, ...]]:
    folder = model_paths()["vlm"]
    model, sampler = JanusFolder(folder).sampler(dtype=torch.float32, device="cpu"), JanusSampler.load(folder)
    found = [row for batch in (1, 4) for row in contest(_PICO, model, sampler, batch, 5)]
    if not torch.cuda.is_available():
        return [*found, (f"{_LARGE}, 1", "all", NOT_MEASURED, "-")]
    model, sampler = seven_billion()
    found += contest(_LARGE, model, sampler, 1, 3)
    if is_h100():
        limit = step_limit(model) * sampler.grid[0] * sampler.grid[1]
        found.append((f"{_LARGE}, 1", _LIMIT, f"{limit:.3g}", "-"))
    return found
