"""Checkpoints of other tools: read, written, loaded, described."""
