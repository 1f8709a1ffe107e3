"""Moments and Fisher metric of keys and values, from a run of the source over text."""
