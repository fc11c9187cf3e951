"""Janus and Janus-Pro (Chen et al. 2025, arXiv 2501.17811): sampler, tokenizer, and the files they come in."""

from .family import JanusFamily

FAMILY = JanusFamily()
