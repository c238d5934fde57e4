"""Compiling every kernel takes minutes, so it runs only when named: ``pytest tests/compiled/test_registers.py``."""

collect_ignore_glob = ["*"]
