"""One command a file; `clla.cli` puts them together. Nothing heavy is imported before a command runs."""
