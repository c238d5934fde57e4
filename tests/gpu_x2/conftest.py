"""Tests for several GPUs run only when they are named: ``pytest tests/gpu_x2/test_gpu_distributed.py``."""

collect_ignore_glob = ["*"]
