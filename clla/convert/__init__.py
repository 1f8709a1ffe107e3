"""Stages of `clla.convert`; calling this package runs them (`clla.api.convert`)."""

from clla.calling import make_callable

make_callable(__name__)
