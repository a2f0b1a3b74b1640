"""Codes ↔ bytes, one file per format, nothing else."""
