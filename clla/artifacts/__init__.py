"""The frozen results of the stages: statistics, plan and codec. Each file carries the hash of what made it."""
