"""The paper's equations: tensors in, tensors out; no weights, no files, no devices, no randomness of its own."""
