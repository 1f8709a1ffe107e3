"""Speed and memory of a converted model beside its source's, in one run."""
