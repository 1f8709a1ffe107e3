"""Published methods and our own side by side on one model: the same text, real caches, measured bytes."""

from clla.compare.methods import METHODS
from clla.compare.run import Comparison, Options, run_comparison

__all__ = ["METHODS", "Comparison", "Options", "run_comparison"]
