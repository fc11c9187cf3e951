"""What autoregressive models of images share: the decode loop and the sampler around it."""
