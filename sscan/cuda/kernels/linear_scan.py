"""The recurrence h_t = a_t h_{t-1} + b_t on the GPU.

A *line* is a row, or one of several parts of it. ``width`` threads walk along a line in chunks of ``width`` times
``steps``, each thread owning ``steps`` consecutive steps. For every chunk

1. each thread makes one affine map of its steps, h -> decay h + value,
2. a warp scan makes one map of all threads of the warp up to each,
3. the maps of the warps go through shared memory, and carry the line's state past each warp and past the chunk,
4. each thread runs its steps again, from the state that it now knows.

The next chunk is on its way from memory meanwhile. A walk that ``descends`` goes from the last step to the first, with
chunks and threads numbered from the end. Steps past the end of a row have a = 1 and b = 0, which leave the state alone.

As in every parallel scan, the product of a thread's decays up to that of a chunk's must not overflow, unless the state
before is 0; a product that underflows is only a state forgotten.
"""

from functools import cache
from types import SimpleNamespace

import numpy as np

from sscan.cuda._launch import Kernel, Shape
from sscan.cuda._math import number_functions
from sscan.cuda._primitives import (
    block_index,
    dtype_of,
    local_array,
    reader,
    real_of,
    select,
    shared_array,
    shared_get,
    shared_reader,
    shared_set,
    shared_writer,
    shuffle_from,
    shuffle_up,
    synchronize,
    synchronize_warp,
    thread_index,
    writer,
)
from sscan.cuda._target import device
from sscan.cuda.kernels._warp import WARP, affine_map, affine_scan
from sscan.cuda.linear_scan import STEPS, THREADS


def _number_of(storage):
    """The dtype of states, and that of the reals in memory."""
    dtype = dtype_of(storage)
    if dtype.kind == "c":
        return dtype, real_of(dtype)
    return np.dtype(np.float64 if dtype == np.float64 else np.float32), dtype


@cache
def _memory(storage, width, together):
    """How a thread gets its consecutive steps: directly, or from neighbours that read side by side.

    ``fetch(into, address, row, at, end)`` starts reading steps from ``at`` on of the row that begins at ``row``, of
    which those below ``end`` exist. After ``arrange(into, staging)`` they are the thread's own; ``put`` is the inverse
    of both. Without ``together``, lanes of a warp read (and write) consecutive steps and exchange them through shared
    memory, where ``place`` is the thread's place in the order of memory.
    """
    number, real = _number_of(storage)
    steps, span = STEPS[storage], min(width, WARP)
    if together:
        read, write = reader(real, number, steps, True), writer(real, number, steps, True)

        @device
        def fetch(into, address, row, at, place, end):
            read(into, address, row + at, end - at)

        @device
        def arrange(into, staging, place):
            pass

        @device
        def put(values, staging, address, row, at, place, end):
            write(address, row + at, values, end - at)

        return SimpleNamespace(fetch=fetch, arrange=arrange, put=put, staging=device(lambda: 0))

    read, write, one_number = reader(real, number, 1), writer(real, number, 1), local_array(1, number)
    together = min(steps, 4)
    group = local_array(together, number)
    read_group, write_group = shared_reader(number, together), shared_writer(number, together)

    @device
    def fetch(into, address, row, at, place, end):
        x, lane = one_number(), place & (span - 1)
        first = at - lane * steps + lane
        for k in range(steps):
            read(x, address, row + first + span * k, end - first - span * k)
            into[k] = x[0]

    @device
    def arrange(into, staging, place):
        x, lane = group(), place & (span - 1)
        first = (place - lane) * steps + lane
        for k in range(steps):
            shared_set(staging, first + span * k, into[k])
        synchronize_warp()
        for q in range(steps // together):
            read_group(x, staging, place * steps + together * q)
            for k in range(together):
                into[together * q + k] = x[k]
        synchronize_warp()

    @device
    def put(values, staging, address, row, at, place, end):
        x, y, lane = group(), one_number(), place & (span - 1)
        slot, first = (place - lane) * steps + lane, at - lane * steps + lane
        for q in range(steps // together):
            for k in range(together):
                x[k] = values[together * q + k]
            write_group(staging, place * steps + together * q, x)
        synchronize_warp()
        for k in range(steps):
            y[0] = shared_get(staging, slot + span * k)
            write(address, row + first + span * k, y, end - first - span * k)
        synchronize_warp()

    staging = shared_array(max(THREADS, width) * steps, number)
    return SimpleNamespace(fetch=fetch, arrange=arrange, put=put, staging=staging)


@cache
def _walk(storage, width, descends):
    """Device functions of a walk along a line: where a thread is, and step 2 and 3 of a chunk."""
    number, _ = _number_of(storage)
    steps, span, warps, lines = STEPS[storage], min(width, WARP), max(1, width // WARP), max(1, THREADS // width)
    choose, one = number_functions(number).choose, number.type(1)
    follow, scan = affine_map(number), affine_scan(number, span)
    last_lane = span - 1
    totals = shared_array(4 * warps, number)
    zero = number.type(0)

    @device
    def line(rows, parts):
        """Row and part; a row of ``rows`` or more does not exist."""
        if lines == 1:
            return block_index() // parts, block_index() % parts
        return block_index() * lines + thread_index() // width, 0  # rows are cut only when each has a block

    @device
    def place():
        """Where the thread's steps lie among those of the block, in the order of memory."""
        thread = thread_index()
        return thread ^ (width - 1) if descends else thread

    @device
    def first_step(part, chunk, chunks):
        """The thread's first step in a chunk of a part, counted along the row."""
        number_from_start = chunks - 1 - chunk if descends else chunk
        return ((part * chunks + number_from_start) * width + (place() & (width - 1))) * steps

    @device
    def carry_on(shared, chunk, decay, value, carry, passed):
        """From a thread's map: the state before its first step, and the line's state and product after the chunk."""
        lane = thread_index() & last_lane
        decay, value = scan(lane, decay, value)
        decay_before, value_before = shuffle_up(decay, 1), shuffle_up(value, 1)
        warp_end = (thread_index() & (WARP - 1)) | last_lane
        whole_decay, whole_value = shuffle_from(decay, warp_end), shuffle_from(value, warp_end)
        entering = carry
        if warps == 1:
            carry = follow(whole_decay, whole_value, carry)
            passed = follow(whole_decay, zero, passed)
        else:
            warp, slot = thread_index() // WARP, (chunk & 1) * 2 * warps  # two buffers: one barrier a chunk is enough
            shared_set(shared, slot + 2 * warp, whole_decay)
            shared_set(shared, slot + 2 * warp + 1, whole_value)
            synchronize()
            for w in range(warps):
                warp_decay, warp_value = shared_get(shared, slot + 2 * w), shared_get(shared, slot + 2 * w + 1)
                carry = follow(warp_decay, warp_value, carry)
                passed = follow(warp_decay, zero, passed)
                entering = choose(w < warp, carry, entering)
        before = choose(lane == 0, entering, follow(decay_before, value_before, entering))
        return before, carry, passed

    return SimpleNamespace(
        number=number, steps=steps, lines=lines, threads=max(THREADS, width), totals=totals, line=line, place=place,
        first_step=first_step, carry_on=carry_on, one=one, zero=zero, registers=local_array(steps, number),
    )  # fmt: skip


@cache
def _start(storage):
    """``start(initial, states, row, part, parts, valid)``: the state that a line starts from."""
    number, _ = _number_of(storage)
    real, one_number = real_of(number), local_array(1, number)
    read = reader(real, number, 1)

    @device
    def start(initial, states, row, part_before, parts, exists):
        x, y = one_number(), one_number()
        inside = (part_before >= 0) & (part_before < parts)
        read(x, initial, row, select(inside | (initial == 0), 0, exists))
        read(y, states, row * parts + part_before, select(inside, exists, 0))
        return x[0] + y[0]  # one of them is 0

    return start


def _blocks(storage, arrays):
    """Blocks of 128 threads to fit on a multiprocessor at least: Ampere needs up to twice the registers of Hopper."""
    few = STEPS[storage] * _number_of(storage)[0].itemsize <= 16
    return {2: 5 if few else 3, 3: 4 if few else 2}[arrays]


def forward(storage, width, together, reverse):
    """h of every line; lines that are parts start from ``states`` of the part before."""
    memory, walk, start = _memory(storage, width, together), _walk(storage, width, reverse), _start(storage)
    fetch, arrange, put, make_staging = memory.fetch, memory.arrange, memory.put, memory.staging
    line, place, first_step, carry_on, make_totals = walk.line, walk.place, walk.first_step, walk.carry_on, walk.totals
    f = number_functions(walk.number)
    product, choose, registers, one, zero = f.product, f.choose, walk.registers, walk.one, walk.zero
    steps = walk.steps

    def kernel(a, b, initial, states, h, rows, length, parts, chunks, a_row, b_row, h_row):
        """``chunks`` of every line; ``a_row`` and so on are the distances of rows, in numbers."""
        staging, totals = make_staging(), make_totals()
        A, B, next_A, next_B = registers(), registers(), registers(), registers()
        row, part = line(rows, parts)
        end = select(row < rows, length, 0)
        carry, passed = start(initial, states, row, part + 1 if reverse else part - 1, parts, end), one
        at, here = first_step(part, 0, chunks), place()
        fetch(next_A, a, row * a_row, at, here, end)
        fetch(next_B, b, row * b_row, at, here, end)
        for chunk in range(chunks):
            at = first_step(part, chunk, chunks)
            for k in range(steps):
                A[k], B[k] = next_A[k], next_B[k]
            if chunk + 1 < chunks:
                ahead = first_step(part, chunk + 1, chunks)
                fetch(next_A, a, row * a_row, ahead, here, end)
                fetch(next_B, b, row * b_row, ahead, here, end)
            arrange(A, staging, here)
            arrange(B, staging, here)
            decay, value = one, zero
            for i in range(steps):
                k = steps - 1 - i if reverse else i
                A[k] = choose(end - at > k, A[k], one)
                value = product(A[k], value) + B[k]
                decay = product(A[k], decay)
            state, carry, passed = carry_on(totals, chunk, decay, value, carry, passed)
            for i in range(steps):
                k = steps - 1 - i if reverse else i
                state = product(A[k], state) + B[k]
                B[k] = state
            put(B, staging, h, row * h_row, at, here, end)

    return kernel, Shape(walk.threads, _blocks(storage, 2))


def totals(storage, width, together, descends, adjoint):
    """What every part makes of the state before it: product (rows, parts) and end state from 0 (rows, parts).

    ``adjoint``: of the recurrence c <- conj(a) (b + c), which carries gradients.
    """
    memory, walk = _memory(storage, width, together), _walk(storage, width, descends)
    fetch, arrange, make_staging = memory.fetch, memory.arrange, memory.staging
    line, place, first_step, carry_on, make_totals = walk.line, walk.place, walk.first_step, walk.carry_on, walk.totals
    f = number_functions(walk.number)
    product, choose, conj, registers, one, zero = f.product, f.choose, f.conj, walk.registers, walk.one, walk.zero
    steps, one_number = walk.steps, local_array(1, walk.number)
    write = writer(real_of(walk.number), walk.number, 1)

    def kernel(a, b, decays, values, rows, length, parts, chunks, a_row, b_row):
        staging, shared = make_staging(), make_totals()
        A, B, next_A, next_B, x = registers(), registers(), registers(), registers(), one_number()
        row, part = line(rows, parts)
        end = select(row < rows, length, 0)
        carry, passed = zero, one
        at, here = first_step(part, 0, chunks), place()
        fetch(next_A, a, row * a_row, at, here, end)
        fetch(next_B, b, row * b_row, at, here, end)
        for chunk in range(chunks):
            at = first_step(part, chunk, chunks)
            for k in range(steps):
                A[k], B[k] = next_A[k], next_B[k]
            if chunk + 1 < chunks:
                ahead = first_step(part, chunk + 1, chunks)
                fetch(next_A, a, row * a_row, ahead, here, end)
                fetch(next_B, b, row * b_row, ahead, here, end)
            arrange(A, staging, here)
            arrange(B, staging, here)
            decay, value = one, zero
            for i in range(steps):
                k = steps - 1 - i if descends else i
                factor = choose(end - at > k, A[k], one)
                if adjoint:
                    factor = conj(factor)
                    value = product(factor, value + B[k])
                else:
                    value = product(factor, value) + B[k]
                decay = product(factor, decay)
            _, carry, passed = carry_on(shared, chunk, decay, value, carry, passed)
        first_thread = select(thread_index() == 0, 1, 0)
        x[0] = passed
        write(decays, row * parts + part, x, first_thread)
        x[0] = carry
        write(values, row * parts + part, x, first_thread)

    return kernel, Shape(walk.threads, _blocks(storage, 2))


def backward(storage, width, together, reverse):
    """da, db and the gradient of the initial state, against the direction of the scan.

    Carries c = conj(a) G: G = dh + c is db, and G conj(state before the step) is da. The state before a thread's last
    step is that of the next thread, which a lane at the end of its warp reads itself.
    """
    descends = not reverse
    memory, walk, start = _memory(storage, width, together), _walk(storage, width, descends), _start(storage)
    fetch, arrange, put, make_staging = memory.fetch, memory.arrange, memory.put, memory.staging
    line, place, first_step, carry_on, make_totals = walk.line, walk.place, walk.first_step, walk.carry_on, walk.totals
    number, steps, span = walk.number, walk.steps, min(width, WARP)
    f = number_functions(number)
    product, choose, conj, registers, one, zero = f.product, f.choose, f.conj, walk.registers, walk.one, walk.zero
    one_number = local_array(1, number)
    read_h = reader(_number_of(storage)[1], number, 1)
    read, write = reader(real_of(number), number, 1), writer(real_of(number), number, 1)
    beyond, near, far = (-1, steps - 1, 0) if descends else (steps, 0, steps - 1)

    @device
    def fetch_edge(edge, h, row, at, end):
        """The state that the last lane's last step starts from."""
        at_end = (thread_index() & (span - 1)) == span - 1
        read_h(edge, h, row + at + beyond, select(at_end & (at + beyond >= 0), end - at - beyond, 0))

    def kernel(
        dh, a, h, initial, states, da, db, dinitial, rows, length, parts, chunks, dh_row, a_row, h_row, da_row, db_row
    ):  # fmt: skip
        staging, totals = make_staging(), make_totals()
        A, DH, H, next_A, next_DH, next_H = registers(), registers(), registers(), registers(), registers(), registers()
        edge, next_edge, x = one_number(), one_number(), one_number()
        row, part = line(rows, parts)
        end = select(row < rows, length, 0)
        carry, passed = start(0, states, row, part + 1 if descends else part - 1, parts, end), one
        read(x, initial, row, select(initial == 0, 0, end))
        before_all, first_of_scan = x[0], length - 1 if reverse else 0
        at, here = first_step(part, 0, chunks), place()
        fetch(next_A, a, row * a_row, at, here, end)
        fetch(next_DH, dh, row * dh_row, at, here, end)
        fetch(next_H, h, row * h_row, at, here, end)
        fetch_edge(next_edge, h, row * h_row, at, end)
        for chunk in range(chunks):
            at = first_step(part, chunk, chunks)
            edge[0] = next_edge[0]
            for k in range(steps):
                A[k], DH[k], H[k] = next_A[k], next_DH[k], next_H[k]
            if chunk + 1 < chunks:
                ahead = first_step(part, chunk + 1, chunks)
                fetch(next_A, a, row * a_row, ahead, here, end)
                fetch(next_DH, dh, row * dh_row, ahead, here, end)
                fetch(next_H, h, row * h_row, ahead, here, end)
                fetch_edge(next_edge, h, row * h_row, ahead, end)
            arrange(A, staging, here)
            arrange(DH, staging, here)
            arrange(H, staging, here)
            lane = thread_index() & (WARP - 1)
            outside = shuffle_from(H[near], (lane + 1) & (WARP - 1))
            outside = choose((lane & (span - 1)) == span - 1, edge[0], outside)
            decay, value = one, zero
            for i in range(steps):
                k = steps - 1 - i if descends else i
                A[k] = conj(choose(end - at > k, A[k], one))
                value = product(A[k], value + DH[k])
                decay = product(A[k], decay)
            state, carry, passed = carry_on(totals, chunk, decay, value, carry, passed)
            for i in range(steps):
                k = steps - 1 - i if descends else i
                G = DH[k] + state
                state = product(A[k], G)
                DH[k] = G
                before = outside if k == far else H[k - 1 if descends else (k + 1) % steps]
                A[k] = product(G, conj(choose(at + k == first_of_scan, before_all, before)))
            put(DH, staging, db, row * db_row, at, here, end)
            put(A, staging, da, row * da_row, at, here, end)
        x[0] = carry
        last = (thread_index() & (width - 1)) == 0
        last_part = part == (0 if descends else parts - 1)
        write(dinitial, row, x, select(last & last_part & (row < rows) & (dinitial != 0), 1, 0))

    return kernel, Shape(walk.threads, _blocks(storage, 3))


def shipped():
    """Kernels that stand for all: every dtype, and every option once."""
    return [
        Kernel("linear_scan", *rest)
        for rest in (
            ("forward", ("float32", 128, True, False)),
            ("forward", ("float32", 8, False, True)),
            ("forward", ("bfloat16", 128, False, False)),
            ("forward", ("float64", 32, True, True)),
            ("forward", ("complex64", 128, True, False)),
            ("totals", ("float32", 128, True, False, False)),
            ("totals", ("complex128", 128, False, True, True)),
            ("backward", ("float32", 128, True, False)),
            ("backward", ("float16", 128, False, True)),
            ("backward", ("float64", 128, True, False)),
            ("backward", ("complex64", 32, True, False)),
            ("backward", ("complex128", 128, False, True)),
        )
    ]
