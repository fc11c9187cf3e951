"""FLUX.1-Fill: the backbone of the paper."""

from .backbone import FluxFillFamily

FAMILY = FluxFillFamily()
