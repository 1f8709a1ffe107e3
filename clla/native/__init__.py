"""Code in C for a CPU, compiled at its first use where there is a compiler."""
