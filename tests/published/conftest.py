"""Needs the package typeseg and runs only when it is named: ``pytest tests/published/test_typeseg.py``."""

collect_ignore_glob = ["*"]
