"""Quantized layers inside Hugging Face models."""
