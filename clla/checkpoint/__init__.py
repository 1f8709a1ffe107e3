"""Checkpoints of converted models: written, checked and loaded."""
