"""Stages of `clla.evaluate`; calling this package runs them (`clla.api.evaluate`)."""

from clla.calling import make_callable

make_callable(__name__)
