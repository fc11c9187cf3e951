"""LlamaGen (Sun et al. 2024, arXiv 2406.06525), text to image: sampler, tokenizer, and the files they come in."""

from .family import LlamaGenFamily

FAMILY = LlamaGenFamily()
