"""The causal depthwise convolution on the GPU: which kernels a problem takes (see ``kernels/causal_conv1d.py``)."""

import functools
from typing import Any, NamedTuple

from sscan import _recording
from sscan.cuda import _launch
from sscan.cuda._launch import Kernel
from sscan.cuda._sums import over_parts

LAST = "causal_conv1d_last"
WARP, CHANNEL_BITS = 32, 2
CHANNELS = 1 << CHANNEL_BITS  # of a block, a warp for each
# Bytes that a lane has of a part of a row; warps of a multiprocessor that are enough, for which parts are made shorter.
PART, PART_BACKWARD, WARPS, WARPS_BACKWARD = 64, 256, 32, 16
STEPS = 2048  # of a warp of `wide_dweight`
BLOCK, BLOCK_OF_STEP = 128, 256  # threads of the other kernels, and of `update`
LONGEST = 16  # inputs in the state of a step that do not matter yet
TURN = 4  # steps that a thread with neighbouring channels works on at a time
# Blocks of such threads that a multiprocessor runs at once; steps that the begin of a chunk takes as long as; how often
# the GPU may be filled.
RESIDENT, RESIDENT_BACKWARD, BEGIN, WAVES = 5, 4, 7, 8
AGES = "float16"  # ages are whole numbers below the width


def _is_small(width, dtype, mask):
    """Whether a kernel is specialised for the width: what it keeps of a window fits into registers."""
    return width <= (4 if mask or dtype.itemsize == 8 else 8)


def _age_dtype(width):
    """A dtype that holds ages: whole numbers below the width."""
    return AGES if width <= 2048 else "float32"


class Tables(NamedTuple):
    """What masks are made of: see ``kernels/causal_conv1d.py``. Arrays or None."""

    mask: str
    ages: Any
    sequences: Any


@functools.cache
def _kernel(factory, dtype, *key, module="causal_conv1d"):
    return Kernel(module, factory, (dtype.name, *key))


def _steps(array):
    """Strides of batch and channel, in elements."""
    return (0, 0) if array is None else tuple(s // array.itemsize for s in array.strides[:2])


def _group_of_last(itemsize):
    """Neighbouring channels of a thread."""
    return 2 if itemsize == 8 else 4


def channels_last(x, width):
    """Whether x (batch, dim, length) is taken as it is because its channels are neighbours in memory."""
    size = x.itemsize
    group = _group_of_last(size)
    return (
        x.strides[1] == size and x.strides[2] != size and min(x.shape[1:]) > 1 and x.shape[1] % group == 0
        and x.strides[0] % (group * size) == x.strides[2] % (group * size) == 0 and width <= (4 if size == 8 else 8)
    )  # fmt: skip


def _in_order(wave, like):
    """An array along time with neighbouring channels: itself, if it lies as the kernels want it, or a copy."""
    group_size = _group_of_last(wave.itemsize) * wave.itemsize
    if wave is like or (wave.strides[1] == wave.itemsize and wave.strides[2] != wave.itemsize):
        if not (_launch.address(wave) % group_size or wave.strides[0] % group_size or wave.strides[2] % group_size):
            return wave
    return wave.transpose(0, 2, 1).copy().transpose(0, 2, 1)


def _chunks(x, group, resident):
    """Chunks of time, the steps of each, how many threads are neighbours along the channels, as a power of 2; blocks.

    So many chunks that the GPU runs all blocks at once, or in a few whole waves: whatever takes the fewest steps one
    after the other, of which a chunk takes ``BEGIN`` before its first.
    """
    batch, dim, length = x.shape
    across, room = -(-dim // group), resident * _launch.processors()
    bits = min(BLOCK.bit_length() - 1, (across - 1).bit_length())
    in_row, rows_of_block = -(-across >> bits), BLOCK >> bits

    def cut(chunks):
        chunk = TURN * -(-length // (TURN * chunks))
        chunks = -(-length // chunk)
        return chunks, chunk, bits, -(-batch * chunks * in_row // rows_of_block)

    cuts = [cut(max(1, wave * room * rows_of_block // (batch * in_row))) for wave in range(1, WAVES + 1)]
    return min(cuts, key=lambda cut: -(-cut[3] // room) * (cut[1] + BEGIN))


def _steps_of_last(array):
    """Strides of batch and time, in elements."""
    return array.strides[0] // array.itemsize, array.strides[2] // array.itemsize


def _tiling(*arrays):
    """Steps of a lane, tiles of the row that has most, and whether there are groups that are partly outside of rows.

    16 bytes a lane, if groups of that size begin at the same steps in all arrays.
    """
    itemsize, length = arrays[0].itemsize, arrays[0].shape[2]
    group = 16 // itemsize
    places = {
        ((_launch.address(a) // itemsize) % group, *(s // itemsize % group for s in a.strides[:2])) for a in arrays
    }
    if len(places) > 1 or any(_launch.address(a) % itemsize for a in arrays):
        return 1, -(-length // WARP), False
    shifted = places != {(0, 0, 0)}
    ends = shifted or length % group > 0
    return group, -(-(length + (group - 1) * shifted) // (WARP * group)), ends


def _parts(batch, dim, tiles, most, warps):
    """Parts of each row and tiles of a part, ``most`` or fewer; and rows of a part, if it has all tiles of them.

    Smaller parts, if the GPU has room for more warps.
    """
    wanted = warps * _launch.processors()
    parts = max(-(-tiles // most), min(tiles, -(-wanted // max(1, batch * dim))), 1)
    tiles_of_part = max(1, -(-tiles // parts))
    rows = min(most // max(1, tiles), batch * dim // wanted, batch)
    return max(1, -(-tiles // tiles_of_part)), tiles_of_part, max(1, rows)


def _tables(segments, width, with_states):
    """Ages of all steps and, for packed sequences with states, the sequences that they are of."""
    count, batch, length, seq_idx, cu_seqlens = segments
    if (seq_idx is None and cu_seqlens is None) or width == 1 or not length:
        return Tables("", None, None)
    with_states = with_states and cu_seqlens is not None and count > 0
    storage = _age_dtype(width)
    ages = _launch.empty((batch, length), storage)
    sequences = _launch.empty((length,), "int64") if with_states else None
    blocks = -(-length // BLOCK)
    _launch.launch(
        Kernel("causal_conv1d", "tables", (storage,)), batch * blocks, ages, sequences, seq_idx, cu_seqlens, count,
        max(0, count - 1).bit_length(), length, width, blocks,
    )  # fmt: skip
    return Tables("states" if with_states else "ages", ages, sequences)


def causal_conv1d_forward(x, weight, bias, silu, segments, initial_state, y, final_state):
    """Fill y and final_state (unless None) from x.

    x and y (batch, dim, length) have unit stride along time; or along channels, if ``channels_last``, and then start at
    16 aligned bytes. weight, bias (or None) and states (or None) are contiguous, in the accumulation dtype.
    """
    batch, dim, length = x.shape
    width = weight.shape[1]
    tables = _tables(segments, width, initial_state is not None)
    before = initial_state if width > 1 else None
    if not (batch and dim and length):
        pass
    elif channels_last(x, width):
        x = _in_order(x, x)
        group = _group_of_last(x.itemsize)
        chunks, chunk, bits, blocks = _chunks(x, group, RESIDENT)
        _launch.launch(
            _kernel("forward", x.dtype, width, group, silu, tables.mask, module=LAST), blocks, x, y, weight, bias,
            before, tables.ages, tables.sequences, batch, dim, length, chunks, chunk, bits, *_steps_of_last(x),
            *_steps_of_last(y),
        )  # fmt: skip
    elif _is_small(width, x.dtype, tables.mask):
        group, tiles, ends = _tiling(x, y)
        parts, tiles_of_part, _ = _parts(batch, dim, tiles, PART // (group * x.itemsize), WARPS)
        _launch.launch(
            _kernel("forward", x.dtype, width, group, ends, silu, tables.mask), batch * parts * -(-dim // CHANNELS),
            x, y, weight, bias, before, tables.ages, tables.sequences, dim, length, tiles, parts, tiles_of_part,
            *_steps(x), *_steps(y),
        )  # fmt: skip
    else:
        _wide_sum(None, x, y, weight, bias, silu, before, tables)
    if final_state is not None and width > 1:
        ages = tables.ages if segments.seq_idx is not None else None
        _launch.launch(
            _kernel("final_states", x.dtype, _age_dtype(width)), segments.count * -(-dim // BLOCK), x, before,
            final_state, ages, segments.cu_seqlens, dim, length, width, *_steps(x), x.strides[2] // x.itemsize,
        )  # fmt: skip


def _wide_sum(dy, x, y, weight, bias, silu, initial_state, tables):
    (batch, dim, length), width = x.shape, weight.shape[1]
    blocks = -(-length // BLOCK)
    _launch.launch(
        _kernel("wide_sum", x.dtype, _age_dtype(width), silu, tables.mask, dy is not None), batch * dim * blocks, dy, x,
        y, weight, bias, initial_state, tables.ages, tables.sequences, dim, length, width, blocks, *_steps(dy),
        *_steps(x), *_steps(y),
    )  # fmt: skip


def causal_conv1d_backward(
    dy, x, weight, bias, silu, segments, initial_state, dfinal_state, dx, dweight, dbias, dinitial_state
):
    """Fill dx, dweight, dbias and dinitial_state (unless None); arrays as in ``causal_conv1d_forward``."""
    dim, length, width = x.shape[1], x.shape[2], weight.shape[1]
    states = (initial_state, dfinal_state) if width > 1 else (None, None)
    tables = _tables(segments, width, any(state is not None for state in states))
    arrays = dy, x, dx, weight, bias
    if channels_last(x, width) and len(x):
        x, dy = _in_order(x, x), _in_order(dy, x)
        arrays = dy, x, dx, weight, bias
        dweights, dbiases = _last_backward(*arrays, silu, *states, tables, dbias is not None)
    elif _is_small(width, x.dtype, tables.mask):
        dweights, dbiases = _small_backward(*arrays, silu, *states, tables, dbias is not None)
    else:
        dweights, dbiases = _wide_backward(*arrays, silu, *states, tables, dbias is not None)
    over_parts((dweights, dweight), *([] if dbias is None else [(dbiases, dbias)]))
    if dinitial_state is not None and width > 1:
        ages = tables.ages if segments.seq_idx is not None else None
        _launch.launch(
            _kernel("initial_gradients", x.dtype, _age_dtype(width), silu), segments.count * -(-dim // BLOCK),
            dy, x, weight, bias, initial_state, dfinal_state, dinitial_state, ages, segments.cu_seqlens, dim, length,
            width, *_steps(dy), dy.strides[2] // dy.itemsize, *_steps(x), x.strides[2] // x.itemsize,
        )  # fmt: skip


def _partials(parts, weight, with_bias):
    """Workspace for the sums of all parts."""
    dbiases = _launch.empty((parts, len(weight)), weight.dtype) if with_bias else None
    return _launch.empty((parts, *weight.shape), weight.dtype), dbiases


def _small_backward(dy, x, dx, weight, bias, silu, initial_state, dfinal_state, tables, with_bias):
    (batch, dim, length), width = x.shape, weight.shape[1]
    group, tiles, ends = _tiling(x, dy, dx)
    parts, *of_part = _parts(batch, dim, tiles, PART_BACKWARD // (group * x.itemsize), WARPS_BACKWARD)
    all_parts = parts * -(-batch // of_part[1])
    dweights, dbiases = _partials(all_parts, weight, with_bias)
    _launch.launch(
        _kernel("backward", x.dtype, width, group, ends, silu, tables.mask), all_parts * -(-dim // CHANNELS), dy, x, dx,
        weight, bias, initial_state, dfinal_state, tables.ages, tables.sequences, dweights, dbiases, batch, dim, length,
        tiles, parts, *of_part, *_steps(dy), *_steps(x), *_steps(dx),
    )  # fmt: skip
    return dweights, dbiases


def _last_backward(dy, x, dx, weight, bias, silu, initial_state, dfinal_state, tables, with_bias):
    (batch, dim, length), width = x.shape, weight.shape[1]
    group = _group_of_last(x.itemsize) // 2  # which leaves room for the sums
    chunks, chunk, bits, blocks = _chunks(x, group, RESIDENT_BACKWARD)
    dweights, dbiases = _partials(batch * chunks, weight, with_bias)
    _launch.launch(
        _kernel("backward", x.dtype, width, group, silu, tables.mask, module=LAST), blocks, dy, x, dx, weight, bias,
        initial_state, dfinal_state, tables.ages, tables.sequences, dweights, dbiases, batch, dim, length, chunks,
        chunk, bits, *_steps_of_last(dy), *_steps_of_last(x), *_steps_of_last(dx),
    )  # fmt: skip
    return dweights, dbiases


def _wide_backward(dy, x, dx, weight, bias, silu, initial_state, dfinal_state, tables, with_bias):
    (batch, dim, length), width = x.shape, weight.shape[1]
    parts, blocks = -(-length // STEPS), -(-length // BLOCK)
    dweights, dbiases = _partials(batch * parts, weight, with_bias)
    gradients = _launch.empty((batch, dim, length), weight.dtype)
    _wide_sum(dy, x, gradients, weight, bias, silu, initial_state, tables)
    _launch.launch(
        _kernel("wide_dx", x.dtype, _age_dtype(width), tables.mask), batch * dim * blocks, gradients, dx, weight,
        dfinal_state, tables.ages, tables.sequences, dim, length, width, blocks, *_steps(dx),
    )  # fmt: skip
    _launch.launch(
        _kernel("wide_dweight", x.dtype, _age_dtype(width), tables.mask), batch * parts * -(-dim // CHANNELS),
        gradients, x, initial_state, tables.ages, tables.sequences, dweights, dbiases, dim, length, width, parts,
        *_steps(x),
    )  # fmt: skip
    return dweights, dbiases


def causal_conv1d_update(x, conv_state, weight, bias, silu, y):
    """Fill y (batch, dim) from x and shift it into conv_state (batch, dim, kept).

    conv_state, weight and bias are in any storage dtype that the accumulation dtype holds, weight and bias in the same
    one; weight and y are contiguous, and the last axis of conv_state and bias has unit stride.
    """
    (batch, dim), kept, width = x.shape, conv_state.shape[2], weight.shape[1]
    unused = kept - (width - 1)
    if unused > LONGEST:  # which the kernel would write out
        _recording.not_repeatable()
        conv_state[..., :unused] = conv_state[..., 1 : unused + 1].copy()
        conv_state, kept = conv_state[..., unused:], width - 1
    together = kept in (2, 4, 8) and _launch.aligned(kept, conv_state)
    _launch.launch(
        _kernel("update", x.dtype, conv_state.dtype.name, weight.dtype.name, width, kept, together, silu),
        -(-batch * dim // BLOCK_OF_STEP), x, conv_state, weight, bias, y, batch, dim, *_steps(x[..., None]),
        *_steps(conv_state),
    )  # fmt: skip
