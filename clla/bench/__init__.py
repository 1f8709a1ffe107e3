"""Speed and memory of a converted model beside its source's, in one run."""

from clla.bench.run import Options, run_bench

__all__ = ["Options", "run_bench"]
