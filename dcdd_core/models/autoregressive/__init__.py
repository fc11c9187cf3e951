"""What all autoregressive image models share: the decode loop and the sampler around it."""
