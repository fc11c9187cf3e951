"""Diffusion transformers, one module or folder each; `registry` lists them."""
