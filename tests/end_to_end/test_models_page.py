"""docs/models.md says what was found, after all that it is written from."""

from __future__ import annotations

import pytest
from conftest import FAMILY_CONFIGS, OTHER_CONFIGS
from model_table import PAGE, REMEDY, TABLE, tracked_cells


def test_page_says_what_was_found() -> None:
    page = TABLE.render([*FAMILY_CONFIGS, *OTHER_CONFIGS])
    if page is None:
        pytest.skip("the page is of all families and checks, and not all of them were run")
    if TABLE.writing:
        PAGE.write_text(page, encoding="utf-8")
        tracked_cells.cache_clear()
    assert PAGE.read_text(encoding="utf-8") == page, REMEDY


def test_a_cell_that_differs_is_noticed() -> None:
    """Also where only one family or one command was run."""
    if TABLE.writing:
        pytest.skip("the page is being written")
    TABLE.passed("llama", "clla convert")
    with pytest.raises(AssertionError, match="make models-page"):
        TABLE.passed("llama", "clla convert", "no: for a test")
    TABLE.checks["llama"]["clla convert"] = "ok"
