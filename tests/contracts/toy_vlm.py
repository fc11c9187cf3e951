"""A VLM family in one file: a sampler that is not autoregressive, and its tokenizer.

The sampler reveals its tokens in three passes, from the centre outwards. The tokenizer's codes are colours: it paints a
token as a flat square. Both are real enough to be sampled, edited, encoded, calibrated and trained on.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors.torch import load_file, save_file
from torch import nn

from dcdd_core.method.calibration import proxy_logits
from dcdd_core.method.sampling import guide, gumbel_max, gumbel_noise_grid, temper, top_k, top_p
from dcdd_core.models.checkpoints import fingerprint_of
from dcdd_core.models.edits import check_edit, check_request, kept_calibrated
from dcdd_core.protocols import DEFAULT_SAMPLING, Progress
from dcdd_core.types import Codebook, TokenLogits

CODES, DIM, FACTOR, GRID = 32, 4, 4, (4, 4)
PASSES = 3


class ToyTokenizer:
    """Codes are directions; the first three numbers of a direction are its colour."""

    def __init__(self, model: nn.Module, name: str):
        self.model, self.name = model, name
        self.codebook = Codebook(model.weight)
        self.factor, self.grid = FACTOR, GRID

    @property
    def device(self):
        return self.model.weight.device

    def grid_of(self, height, width):
        if height % FACTOR or width % FACTOR or not height or not width:
            raise ValueError(f"{height} x {width} has no whole grid of {FACTOR}-pixel tokens: crop it")
        return height // FACTOR, width // FACTOR

    def features(self, pixels):
        self.grid_of(*pixels.shape[2:])
        colours = rearrange(F.avg_pool2d(pixels.to(self.device).float(), FACTOR), "b c h w -> b (h w) c")
        return torch.cat([colours, torch.full_like(colours[..., :1], 0.5)], dim=-1)

    def tokens(self, features):
        return proxy_logits(features, self.codebook).argmax(-1)

    def quantisation_errors(self, features, tokens):
        return 1 - F.cosine_similarity(features, self.codebook.vectors[tokens], dim=-1)

    def encode(self, pixels):
        logits = proxy_logits(self.features(pixels), self.codebook)
        return TokenLogits(
            logits,
            logits.argmax(-1),
            self.grid_of(*pixels.shape[2:]),
            source="proxy",
            model=self.name,
            codebook=self.codebook.fingerprint,
        )

    def decode_vectors(self, vectors, grid):
        colours = rearrange(vectors[..., :3], "b (h w) c -> b c h w", h=grid[0])
        return repeat(colours.float().clamp(-1, 1), "b c h w -> b c (h f) (w g)", f=FACTOR, g=FACTOR)

    def decode_tokens(self, tokens, grid):
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.codebook.size:
            raise ValueError(f"tokens must lie in 0..{self.codebook.size - 1}: use this tokenizer's")
        return self.decode_vectors(self.codebook.vectors[tokens], grid)

    def working_memory(self, grid):
        return 4 * 3 * grid[0] * grid[1] * FACTOR**2


class ToySampler:
    """Logits are a function of prompt, position and the mean of what is revealed."""

    default_guidance = 2.0

    def __init__(self, model: nn.Module, name: str):
        self.model, self.name, self.grid = model, name, GRID
        self.codebook = Codebook(model.weight)

    @property
    def fingerprint(self):
        return fingerprint_of(self.model.state_dict())

    def unknown_words(self, prompt):
        return [word for word in dict.fromkeys(prompt.split()) if word == "zebra"]

    def known_words(self):
        return []

    def working_memory(self, prompts, *, options=DEFAULT_SAMPLING):
        return 4 * 4 * len(prompts) * GRID[0] * GRID[1] * self.codebook.size

    @torch.no_grad()
    def sample(
        self,
        prompts,
        *,
        seeds,
        options=DEFAULT_SAMPLING,
        previous=None,
        resample=None,
        on_progress=None,
        parallel=None,
        weights_resident=False,
    ):
        check_request(prompts, seeds)
        count = GRID[0] * GRID[1]
        anew = torch.ones(len(prompts), count, dtype=torch.bool)
        tokens = torch.zeros(len(prompts), count, dtype=torch.int64)
        logits = torch.zeros(len(prompts), count, self.codebook.size)
        if previous is not None or resample is not None:
            anew = check_edit(self, previous, resample, len(prompts))
            if not bool(anew.any()):
                return previous
            tokens, logits = previous.tokens.clone(), previous.logits.clone()
        known = ~anew
        y, x = torch.meshgrid(torch.arange(GRID[0]) - 1.5, torch.arange(GRID[1]) - 1.5, indexing="ij")
        ring = ((y**2 + x**2).flatten().argsort().argsort() * PASSES // count).expand_as(anew)
        noise = gumbel_noise_grid(seeds, range(count), self.codebook.size)
        own = torch.stack([self._wish(prompt) for prompt in prompts])
        for step in range(PASSES):
            wish = own + 0.1 * (tokens * known).float().mean(1)[:, None, None]
            plain = wish.mean(dim=2, keepdim=True).expand_as(wish)
            found = temper(guide(wish, plain, options.guidance), options.temperature or 1.0)
            drawn = found if options.temperature == 0 else top_p(top_k(found, options.top_k), options.top_p)
            best = gumbel_max(drawn, noise if options.temperature else torch.zeros_like(noise))[1]
            now = anew & (ring == step)
            tokens, logits = torch.where(now, best, tokens), torch.where(now[..., None], found, logits)
            known = known | now
            if on_progress is not None:
                on_progress(Progress(done=step + 1, total=PASSES, tokens=tokens, known=known))
        return TokenLogits(
            logits,
            tokens,
            GRID,
            guidance=float(options.guidance),
            temperature=float(options.temperature),
            model=self.name,
            codebook=self.codebook.fingerprint,
            calibrated_at=kept_calibrated(previous, anew),
        )

    def _wish(self, prompt):
        """[N, K], from a prompt's hash."""
        seed = int.from_bytes(hashlib.sha256(prompt.strip().encode()).digest()[:4], "big")
        return 2 * torch.randn(GRID[0] * GRID[1], CODES, generator=torch.Generator().manual_seed(seed))


class ToyVLM:
    """See `protocols.SamplerFamily`."""

    name, expected = "toy", "the folder of a toy VLM (model_type 'toy')"

    def reads(self, path):
        config = Path(path) / "config.json"
        return config.is_file() and json.loads(config.read_text()).get("model_type") == "toy"

    def load_sampler(self, path, *, device="cpu", dtype=torch.float32, int8=False, computes_on=None):
        return ToySampler(self._model(path, dtype), Path(path).name)

    def load_tokenizer(self, path, *, device="cpu", dtype=None):
        return ToyTokenizer(self._model(path, dtype or torch.float32), Path(path).name)

    def published_tokenizer(self):
        with torch.device("meta"):
            model = nn.Embedding(CODES, DIM)
        tokenizer = ToyTokenizer.__new__(ToyTokenizer)
        tokenizer.model, tokenizer.name, tokenizer.factor, tokenizer.grid = model, "toy", FACTOR, GRID
        return tokenizer

    def _model(self, path, dtype):
        weights = Path(path) / "model.safetensors"
        if not weights.is_file():
            raise ValueError(f"{path} has no model.safetensors: fetch the whole model again")
        model = nn.Embedding(CODES, DIM)
        model.load_state_dict(load_file(weights))
        return model.to(dtype).requires_grad_(False)


def save(folder: Path) -> Path:
    """A toy VLM's files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "toy"}))
    (folder / "tokenizer.json").write_text("{}")  # ComfyUI's list of models looks for none, artists do
    weight = F.normalize(torch.randn(CODES, DIM, generator=torch.Generator().manual_seed(3)), dim=1)
    save_file({"weight": weight}, folder / "model.safetensors")
    return folder
