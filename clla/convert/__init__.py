"""From a model to a converted checkpoint: the order of the stages, and what each keeps for the next run."""
