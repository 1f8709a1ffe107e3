"""Checkpoints in forms that other engines know."""
