"""One HTML page about a converted checkpoint: its plan, its quality, what its layers lose, samples of its text."""

from clla.report.run import Options, make_page

__all__ = ["Options", "make_page"]
