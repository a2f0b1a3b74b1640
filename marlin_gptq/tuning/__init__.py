"""Tuning of a quantized model by gradient: codes, scales and norm weights against the full-precision model."""
