"""Healing: the converted model is trained to give the outputs of its source."""
