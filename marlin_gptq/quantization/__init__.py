"""Pure tensors in, tensors out: no files, no transformers, no GPU required."""
