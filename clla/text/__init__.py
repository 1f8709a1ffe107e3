"""Calibration and evaluation text: read from files and data sets, cut into sequences of token ids."""
