"""Masked samplers of image tokens, which reveal many positions a pass and revise them (`method.progressive`)."""

from .family import MaskedFamily

FAMILY = MaskedFamily()
