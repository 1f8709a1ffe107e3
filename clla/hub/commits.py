"""Commits of the Hub. Nothing heavy is imported."""

import re

COMMIT = re.compile(r"[0-9a-f]{40}")
