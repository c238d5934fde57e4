"""Checkers of types come with the group lint, and run only when named: ``pytest tests/types/test_types.py``."""

collect_ignore_glob = ["*"]
