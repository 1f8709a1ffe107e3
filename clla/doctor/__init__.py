"""What `clla doctor` finds about a machine and about a model."""
