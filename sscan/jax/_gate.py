"""The way of XLA's threads into Python, which is closed before the interpreter ends.

A thread that wants the interpreter while that ends is stopped where it stands, for good, and XLA then waits for it
without end. So what XLA calls is a few instructions that need no interpreter: they count who is inside, and once the
gate is closed they answer with an error.
"""

import atexit
import ctypes
import os
import time
from typing import Any

import llvmlite.binding as llvm

from sscan.jax import _frame

_inside, _closed = ctypes.c_int64(0), ctypes.c_int64(0)
_refusal = _frame.ErrorCreate(
    struct_size=ctypes.sizeof(_frame.ErrorCreate), message=b"sscan.jax: Python is ending", code=_frame.INTERNAL
)

_CODE = """
define ptr @gate(ptr %frame) {{
  %before = atomicrmw add ptr inttoptr (i64 {inside} to ptr), i64 1 seq_cst
  %closed = load atomic i64, ptr inttoptr (i64 {closed} to ptr) seq_cst, align 8
  %open = icmp eq i64 %closed, 0
  br i1 %open, label %enter, label %refuse
enter:
  %answer = call ptr inttoptr (i64 {handler} to ptr)(ptr %frame)
  br label %leave
refuse:
  %place = getelementptr i8, ptr %frame, i64 {api}
  %api = load ptr, ptr %place
  %entry = getelementptr i8, ptr %api, i64 {error_create}
  %error_create = load ptr, ptr %entry
  %error = call ptr %error_create(ptr inttoptr (i64 {refusal} to ptr))
  br label %leave
leave:
  %result = phi ptr [%answer, %enter], [%error, %refuse]
  %after = atomicrmw sub ptr inttoptr (i64 {inside} to ptr), i64 1 seq_cst
  ret ptr %result
}}
"""


class Gate:
    """A foreign function for XLA that leads to a handler, both held as long as the process runs."""

    def __init__(self, handler: Any) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        code = _CODE.format(
            inside=ctypes.addressof(_inside), closed=ctypes.addressof(_closed), refusal=ctypes.addressof(_refusal),
            handler=ctypes.cast(handler, ctypes.c_void_p).value, api=_frame.CallFrame.api.offset,
            error_create=_frame.Api.error_create.offset,
        )  # fmt: skip
        self._handler = handler
        machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(code), machine)
        self._engine.finalize_object()
        self.function = _frame.HANDLER(self._engine.get_function_address("gate"))


@atexit.register
def _close() -> None:
    """Let nobody in any more, and wait for those inside, whatever is raised meanwhile.

    JAX was imported before, so what it registered for the end comes after this.
    """
    _closed.value = 1
    try:
        while _inside.value:
            time.sleep(0.001)
    except BaseException:
        _close()
        raise


def _after_fork() -> None:
    _inside.value = 0  # a child has none of its parent's threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
