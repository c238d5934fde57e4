"""Every op against the definition, on every case, in both directions."""

from __future__ import annotations

import pytest
from cases import CASES, DIFFERENTIABLE, Case, check_backward, check_forward

import sscan


def label(case: Case) -> str:
    return f"{case.op}: {case.name}"


@pytest.mark.parametrize("case", CASES, ids=label)
def test_forward(case: Case) -> None:
    check_forward(sscan, case)


@pytest.mark.parametrize("case", [case for case in CASES if case.op in DIFFERENTIABLE], ids=label)
def test_gradients(case: Case) -> None:
    check_backward(sscan, case)
