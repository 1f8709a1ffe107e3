"""Stages of `clla.heal`; calling this package runs them (`clla.api.heal`)."""

from clla.calling import make_callable

make_callable(__name__)
