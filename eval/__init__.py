"""Evaluation of full-precision and quantized model directories."""
