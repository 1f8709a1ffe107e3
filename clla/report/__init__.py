"""One HTML page about a converted checkpoint: its plan, its quality, what its layers lose, samples of its text."""
