"""One decoding step of a whole Mamba language model in one call: bound by reading the weights, each once, as they lie.

A block has four phases. A task of one is some rows of a weight, with what can be made of their products at once:

1. norm of the residual stream, in_proj; the half that is x goes through convolution and SiLU
2. x_proj
3. dt_proj, softplus, the step of the states, gate
4. out_proj, added to the stream

Norm and head are one phase more. Everything between the weights is in the accumulation dtype, and is rounded to that
of the weights only where it becomes the state of a convolution. A row of a batch gives the same bits as alone.
"""

from typing import Any, NamedTuple

import numpy as np
from numba.extending import register_jitable

from sscan.cpu._parallel import finish, kernel, next_task, phases, run, take, threads
from sscan.cpu._products import ITEMS, TILES, products
from sscan.cpu._tiles import TILE, padded, pieces
from sscan.cpu._vector import (
    STORAGE,
    borrowed,
    constant,
    first,
    flush_subnormals,
    fma,
    lane_sums,
    load,
    load_column,
    read,
    restore_environment,
    splat,
    store,
    store_column,
    write,
)
from sscan.cpu._vector_math import LOG2_E, decay, sigmoid, softplus
from sscan.cpu.rms_norm import _limits, inverse_root

# Rows of the tables in which kernels find arrays as (address, storage); address 0: absent.
NORM, IN_PROJ, IN_BIAS, CONV, CONV_BIAS, X_PROJ, DT_PROJ, DT_BIAS, A_LOG, D, OUT_PROJ, OUT_BIAS = range(12)
CONV_STATE, SSM_STATE = range(2)
FINAL_NORM, HEAD = range(2)

TASK = 1 << 16  # bytes of a task: some microseconds of reading
FEW_ROWS = 4  # of x_proj and out_proj in a task, at least: their rows are few and long
ALONE = 1 << 21  # bytes of a step that is not worth waking a thread
MOST_THREADS = 16  # they have all the memory's bandwidth by then, and every phase waits for the last one


class Sizes(NamedTuple):
    """Of a model and a batch; the last five, how much of each phase is a task."""

    batch: int
    model: int
    inner: int
    state: int
    width: int  # of the convolution
    rank: int
    vocabulary: int
    in_blocks: int  # of 16 rows
    x_rows: int
    dt_blocks: int
    out_rows: int
    head_blocks: int


@register_jitable
def entry(table, i, name):
    """The (address, storage) of one array: numbers, since Numba counts the references to a part of a table."""
    return table[i, name, 0], table[i, name, 1]


@register_jitable
def numbers(like, array, index, count):
    """``count`` <= 16 numbers from ``index`` on of an (address, storage), then zeros; only zeros if it is absent."""
    if array[0] == 0:
        return constant(like, 0.0)
    item = ITEMS[array[1]]
    return read(like, array[0] + index * item, count, item, array[1])


@register_jitable
def put_numbers(array, index, count, x):
    """Round the first ``count`` lanes to the elements from ``index`` on of an (address, storage)."""
    item = ITEMS[array[1]]
    write(array[0] + index * item, count, item, array[1], x)


@register_jitable
def normalise(X, lanes, stream, norm, eps, sizes, limits):
    """X = the normalised rows of the stream; both have rows of whole vectors."""
    size, stride = sizes.model, padded(sizes.model)
    zero = splat(stream.dtype.type(0))
    for b in range(sizes.batch):
        row = X[b * stride : (b + 1) * stride]
        squares, total = zero, stream.dtype.type(0)
        for k in range(0, stride, TILE):
            v = load(stream, b * stride + k)
            squares = fma(v, v, squares)
            store(row, k, v)
        store(lanes, 0, squares)
        for k in range(TILE):
            total += lanes[k]
        r = splat(inverse_root(row, total, eps, size, limits)[0])
        for k in range(0, size, TILE):
            store(row, k, load(row, k) * r * numbers(zero, norm, k, min(TILE, size - k)))


@register_jitable
def convolve(now, before, taps, state, d0, rows, row, sizes):
    """The convolution of 16 channels from d0 on, whose newest inputs are ``now``, for one row of the batch.

    ``taps`` are theirs, ``before`` is scratch; the inputs move up in the state.
    """
    kept = sizes.width - 1
    total = now * load_column(taps, kept, sizes.width)
    if kept == 0:
        return total
    at, count = (row * sizes.inner + d0) * kept, rows * kept
    for k in range(0, count, TILE):
        store(before, k, numbers(now, state, at + k, min(TILE, count - k)))
    for k in range(kept):
        earlier = load_column(before, k, kept)
        total = fma(earlier, load_column(taps, k, sizes.width), total)
        if k > 0:
            store_column(before, k - 1, kept, earlier)
    store_column(before, kept - 1, kept, now)
    for k in range(0, count, TILE):
        put_numbers(state, at + k, min(TILE, count - k), load(before, k))
    return total


@register_jitable
def in_projection(weights, i, state, out, tiles, X, before, taps, x, z, block, sizes):
    """The block-th 16 channels of x, and if there are more of z, for all rows of the batch."""
    inner, blocks = sizes.inner, pieces(sizes.inner, TILE)
    d0 = block % blocks * TILE
    rows, half = min(TILE, inner - d0), block // blocks * inner
    like = load(X, 0)
    if half == 0:
        of_taps, count = entry(weights, i, CONV), rows * sizes.width
        for k in range(0, count, TILE):
            store(taps, k, numbers(like, of_taps, d0 * sizes.width + k, min(TILE, count - k)))
    products(out, tiles, X, sizes.batch, entry(weights, i, IN_PROJ), half + d0, rows, sizes.model)
    for b in range(sizes.batch):
        total = load(out, TILE * b) + numbers(like, entry(weights, i, IN_BIAS), half + d0, rows)
        at = b * padded(inner) + d0
        if half == 0:
            total = convolve(total, before, taps, state, d0, rows, b, sizes)
            total = total + numbers(like, entry(weights, i, CONV_BIAS), d0, rows)
            store(x, at, first(total * sigmoid(total), rows))
        else:
            store(z, at, total)


@register_jitable
def x_projection(weights, i, out, tiles, x, low, r0, sizes):
    """Some rows, of dt, B or C, which lie behind each other in ``low``, each for all of the batch."""
    rank, state = sizes.rank, sizes.state
    rows = min(sizes.x_rows, rank + 2 * state - r0)
    products(out, tiles, x, sizes.batch, entry(weights, i, X_PROJ), r0, rows, sizes.inner)
    of_B = sizes.batch * padded(rank)
    of_C = of_B + sizes.batch * padded(state)
    for b in range(sizes.batch):
        for k in range(rows):
            r, value = r0 + k, out[TILE * b + k]
            if r < rank:
                low[b * padded(rank) + r] = value
            elif r < rank + state:
                low[of_B + b * padded(state) + r - rank] = value
            else:
                low[of_C + b * padded(state) + r - rank - state] = value


@register_jitable
def advance(weights, i, states, out, tiles, steps, x, z, low, y, d0, sizes):
    """The states of 16 channels from d0 on, and y of them."""
    inner, count = sizes.inner, sizes.state
    rows = min(TILE, inner - d0)
    of_A, of_h = entry(weights, i, A_LOG), entry(states, i, SSM_STATE)
    like = load(x, 0)
    log2_e, one, zero = constant(like, LOG2_E), constant(like, 1.0), constant(like, 0.0)
    products(out, tiles, low, sizes.batch, entry(weights, i, DT_PROJ), d0, rows, sizes.rank)
    for b in range(sizes.batch):
        at, B = b * padded(inner) + d0, sizes.batch * padded(sizes.rank) + b * padded(count)
        C = B + sizes.batch * padded(count)
        delta = softplus(load(out, TILE * b) + numbers(like, entry(weights, i, DT_BIAS), d0, rows))
        u, gate = load(x, at), load(z, at)
        store(steps, 0, delta)
        store(steps, TILE, delta * u)
        for r in range(rows):
            step, step_u, total = splat(steps[r]), splat(steps[TILE + r]), zero
            for n in range(0, count, TILE):
                size, here = min(TILE, count - n), (d0 + r) * count + n
                A = zero - decay(one, log2_e * numbers(like, of_A, here, size))
                h = numbers(like, of_h, b * inner * count + here, size)
                h = fma(decay(step, log2_e * A), h, load(low, B + n) * step_u)
                put_numbers(of_h, b * inner * count + here, size, h)
                total = fma(load(low, C + n), h, total)
            store(tiles, TILE * r, total)
        total = fma(numbers(like, entry(weights, i, D), d0, rows), u, lane_sums(tiles, 0, TILE))
        store(y, at, first(total * (gate * sigmoid(gate)), rows))


@register_jitable
def out_projection(weights, i, out, tiles, y, stream, r0, sizes):
    """Add some rows of the block's output to the stream."""
    rows = min(sizes.out_rows, sizes.model - r0)
    products(out, tiles, y, sizes.batch, entry(weights, i, OUT_PROJ), r0, rows, sizes.inner)
    for b in range(sizes.batch):
        total = load(out, TILE * b)
        store(out, TILE * b, total + numbers(total, entry(weights, i, OUT_BIAS), r0, rows))
        at = b * padded(sizes.model) + r0
        for r in range(rows):
            stream[at + r] += out[TILE * b + r]


@register_jitable
def part(own, count):
    """The first numbers of one's own memory, and the others."""
    return own[:count], own[count:]


@register_jitable
def scratch_of(sizes):
    """Numbers that a thread needs for itself: normalised rows, products, and what is done to 16 channels."""
    return sizes.batch * (padded(sizes.model) + TILE) + TILES + TILE * (2 + 2 * sizes.width)


@kernel
def step(counter, tasks, progress, weights, eps, ends, states, sizes, limits, stream, x, z, low, y, logits, scratch):
    """All phases; a task is a thread, with a row of ``scratch`` for itself.

    ``weights`` and ``states`` are a table for each block, ``ends`` one of the final norm and the head. ``stream`` holds
    the embeddings of the tokens; it, ``x``, ``z``, ``low`` and ``y`` are zero behind their rows, up to whole vectors.
    """
    thread = take(counter)
    if thread >= tasks:
        return
    weights, ends, states, stream = borrowed(weights), borrowed(ends), borrowed(states), borrowed(stream)
    x, z, low, y, progress = borrowed(x), borrowed(z), borrowed(low), borrowed(y), borrowed(progress)
    own = borrowed(scratch[thread])
    X, own = part(own, sizes.batch * padded(sizes.model))
    out, own = part(own, sizes.batch * TILE)
    tiles, own = part(own, TILES)
    steps, own = part(own, 2 * TILE)
    taps, before = part(own, TILE * sizes.width)
    tiles[:] = 0
    channels = pieces(sizes.inner, TILE)
    environment = flush_subnormals()
    for i in range(len(weights)):
        normalised = False
        while True:
            task = next_task(progress, 4 * i, pieces(2 * channels, sizes.in_blocks), thread)
            if task < 0:
                break
            if not normalised:
                normalise(X, out, stream, entry(weights, i, NORM), eps[i], sizes, limits)
                normalised = True
            for block in range(task * sizes.in_blocks, min((task + 1) * sizes.in_blocks, 2 * channels)):
                in_projection(weights, i, entry(states, i, CONV_STATE), out, tiles, X, before, taps, x, z, block, sizes)
            finish(progress, 4 * i, thread)
        while True:
            task = next_task(progress, 4 * i + 1, pieces(sizes.rank + 2 * sizes.state, sizes.x_rows), thread)
            if task < 0:
                break
            x_projection(weights, i, out, tiles, x, low, task * sizes.x_rows, sizes)
            finish(progress, 4 * i + 1, thread)
        while True:
            task = next_task(progress, 4 * i + 2, pieces(channels, sizes.dt_blocks), thread)
            if task < 0:
                break
            for block in range(task * sizes.dt_blocks, min((task + 1) * sizes.dt_blocks, channels)):
                advance(weights, i, states, out, tiles, steps, x, z, low, y, block * TILE, sizes)
            finish(progress, 4 * i + 2, thread)
        while True:
            task = next_task(progress, 4 * i + 3, pieces(sizes.model, sizes.out_rows), thread)
            if task < 0:
                break
            out_projection(weights, i, out, tiles, y, stream, task * sizes.out_rows, sizes)
            finish(progress, 4 * i + 3, thread)
    last, rows, normalised = 4 * len(weights), TILE * sizes.head_blocks, False
    while True:
        task = next_task(progress, last, pieces(sizes.vocabulary, rows), thread)
        if task < 0:
            break
        if not normalised:
            normalise(X, out, stream, entry(ends, 0, FINAL_NORM), eps[len(weights)], sizes, limits)
            normalised = True
        for r in range(task * rows, min((task + 1) * rows, sizes.vocabulary), TILE):
            count = min(TILE, sizes.vocabulary - r)
            products(out, tiles, X, sizes.batch, entry(ends, 0, HEAD), r, count, sizes.model)
            for b in range(sizes.batch):
                put_numbers(logits, b * sizes.vocabulary + r, count, load(out, TILE * b))
        finish(progress, last, thread)
    restore_environment(environment)


# --- what models call ------------------------------------------------------------------------------------------------


def _table(arrays):
    """Where arrays lie, and in which dtype, as kernels find it; None is absent."""
    return np.array([(0, 0) if a is None else (a.ctypes.data, STORAGE[a.dtype]) for a in arrays], np.int64)


class Weights:
    """The weights of a model as the kernel finds them: read where they lie at every step, so they must be there still.

    ``blocks`` are the arrays of each block in the order of the names above, contiguous.
    """

    def __init__(self, blocks: Any, final_norm: Any, head: Any) -> None:
        first = blocks[0]
        self.blocks, self.ends = np.stack([_table(block) for block in blocks]), _table([final_norm, head])[None]
        self.dtype = self.of_ssm = first[A_LOG].dtype
        self.of_conv = first[CONV].dtype
        self.vocabulary, self.model = head.shape
        (self.inner, self.state), self.width = first[A_LOG].shape, first[CONV].shape[-1]
        self.rank = first[DT_PROJ].shape[-1]
        self.bytes = head.nbytes + sum(a.nbytes for block in blocks for a in block if a is not None)
        self.tasks = self._tasks(first[IN_PROJ].itemsize)

    @classmethod
    def of(cls, blocks: Any, embedding: Any, final_norm: Any, head: Any) -> "Weights | None":
        """The weights, or None if shapes or dtypes of the arrays are not those of one model."""
        arrays = [array for block in blocks for array in block if array is not None]
        dtypes = {array.dtype for array in [*arrays, final_norm, head]}
        wide = blocks[0][A_LOG].dtype
        if not dtypes <= STORAGE.keys() or wide.itemsize == 2 or (np.dtype(np.float64) in dtypes and len(dtypes) > 1):
            return None
        if [blocks[0][name].ndim for name in (A_LOG, CONV, DT_PROJ)] != [2, 3, 2]:
            return None
        weights = cls(blocks, final_norm, head)
        return weights if final_norm.shape == (weights.model,) and all(map(weights._fits, blocks)) else None

    def _fits(self, block):
        model, inner, low = self.model, self.inner, self.rank + 2 * self.state
        shapes = (
            (model,), (2 * inner, model), (2 * inner,), (inner, 1, self.width), (inner,), (low, inner),
            (inner, self.rank), (inner,), (inner, self.state), (inner,), (model, inner), (model,),
        )  # fmt: skip
        return all(array is None or array.shape == shape for array, shape in zip(block, shapes, strict=True))

    def _tasks(self, item):
        """How much of each phase is a task."""

        def rows(bytes_of_row):
            return max(FEW_ROWS, min(TILE, TASK // 4 // max(1, bytes_of_row)))

        blocks = max(1, TASK // (TILE * self.model * item))
        of_dt = max(1, TASK // 4 // (TILE * (self.rank * item + 2 * self.state * self.dtype.itemsize)))
        return blocks, rows(self.inner * item), of_dt, rows(self.inner * item), blocks

    def state_shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the states of a block: of the convolution, of the scan."""
        return (batch, self.inner, self.width - 1), (batch, self.inner, self.state)

    def step(self, embeddings: Any, eps: list[float], states: list[tuple[Any, Any]]) -> Any:
        """Logits (batch, vocabulary) of embeddings (batch, model); the states are updated in place.

        ``eps`` are those of all norms, ``states`` (convolution, scan) of each block, contiguous.
        """
        batch, dtype = len(embeddings), self.dtype
        logits = np.empty((batch, self.vocabulary), dtype)
        if not batch:
            return logits
        sizes = Sizes(batch, self.model, self.inner, self.state, self.width, self.rank, self.vocabulary, *self.tasks)
        stream = np.zeros((batch, padded(self.model)), dtype)
        stream[:, : self.model] = embeddings
        x, z, y = np.zeros((3, batch * padded(self.inner)), dtype)
        low = np.zeros(batch * (padded(self.rank) + 2 * padded(self.state)), dtype)
        of_states = _table([array for pair in states for array in pair]).reshape(-1, 2, 2)
        most = min(threads(), MOST_THREADS) if self.bytes > ALONE else 1
        scratch = np.empty((most, scratch_of(sizes)), dtype)
        run(
            step, most, phases(4 * len(self.blocks) + 1, most), self.blocks, np.array(eps, dtype), self.ends,
            of_states, sizes, _limits(dtype), stream.reshape(-1), x, z, low, y,
            _table([logits])[0], scratch,
        )  # fmt: skip
        return logits
