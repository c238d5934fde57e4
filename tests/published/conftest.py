"""Tests with packages that few have run only when they are named: ``pytest tests/published/test_typeseg.py``."""

collect_ignore_glob = ["*"]
