"""Names of models on the Hub, and what the Hub and the way to it can refuse."""
