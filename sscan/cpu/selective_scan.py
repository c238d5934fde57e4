"""The selective scan on the CPU: what is launched, and the split along time of a call that has few channels."""

import numpy as np
from numba import from_dtype

from sscan.cpu._parallel import run
from sscan.cpu._scan_kernels import CHECKPOINT, CHUNK, GONE, Waves, backward_kernel, carry_kernel, forward_kernel, reach
from sscan.cpu._tiles import ABSENT, TILE, View, view
from sscan.cpu._vector import STATES

TASKS = 16  # of a backward call, about: enough for many cores, few enough that partial sums stay small


def checkpoints_of(segments: np.ndarray) -> np.ndarray:
    """How many checkpoints each segment has."""
    return -(-segments[:, 2] // CHECKPOINT)


def with_checkpoints(segments: np.ndarray) -> np.ndarray:
    """The table of segments with one column more: the number of the segment's first checkpoint."""
    chunks = checkpoints_of(segments)
    return np.column_stack([segments, np.cumsum(chunks) - chunks])


def blocks_of(A: np.ndarray, groups: int) -> int:
    """Blocks of 16 channels in a group."""
    return -(-(A.shape[0] // groups) // TILE)


def in_columns(array):
    """Whether an array along time is taken as it is because channels are neighbours in memory: never, it is copied."""
    return False


def checkpoints_shape(batch, dim, length, state, groups, number, seq_idx, sequences, segments=None):
    """The shape of checkpoints, the states at the start of every 32nd step of every segment.

    Sizes may be symbols. ``seq_idx`` is whether there is one, ``sequences`` how many ``cu_seqlens`` packs, or None.
    With either the shape depends on their values: None, unless ``segments`` are given.
    """
    chunks = batch * -(-length // CHECKPOINT)
    if seq_idx or sequences is not None:
        if segments is None:
            return None
        chunks = int(checkpoints_of(segments).sum())
    step = STATES[from_dtype(np.dtype(number))]
    channels = groups * -(-(dim // groups) // TILE) * TILE
    return (chunks * channels * -(-state // step) * step,)


def both_forms(array: np.ndarray, A: np.ndarray, groups: int) -> tuple[View, np.ndarray]:
    """B or C as a view, if it varies, and as an array, if it is constant; the form that it has not is empty."""
    if array.ndim == 2:
        return ABSENT, array
    return view(np.broadcast_to(array, (array.shape[0], groups, *array.shape[2:]))), np.empty((0, 0), A.dtype)


def or_none(states: np.ndarray | None, A: np.ndarray) -> np.ndarray:
    """States, or an empty array in their place."""
    return np.empty((0, 0, 0), A.dtype) if states is None else states


def waves_of(inputs, groups: int) -> Waves:
    """The inputs along time as the kernels take them."""
    return Waves(
        view(inputs.u, groups), view(inputs.delta, groups), view(inputs.z, groups), inputs.D, inputs.delta_bias,
        inputs.delta_softplus,
    )  # fmt: skip


def with_zeros(inputs):
    """The inputs, zeros in place of a D and a delta_bias that are absent."""
    A = inputs.A
    absent = {name: np.zeros(A.shape[0], A.real.dtype) for name in ("D", "delta_bias") if getattr(inputs, name) is None}
    return inputs._replace(**absent) if absent else inputs


def selective_scan_forward(segments, groups, inputs, initial_state, y, last_state, checkpoints, known_parts):
    """Fill y, last_state and checkpoints, each if not None.

    ``inputs`` is a named tuple of u, delta, A, B, C, D, z, delta_bias, delta_softplus and zoh; D, z and
    delta_bias may be None. Summaries of this backend know no parts.
    """
    inputs = with_zeros(inputs.by_group())
    if last_state is None:
        segments = np.column_stack([segments[:, :4], np.full(len(segments), -1)])
        last_state = or_none(None, inputs.A)
    table = parts(segments, groups * blocks_of(inputs.A, groups))
    results = y, last_state, checkpoints
    if table is None or not forward_in_parts(table, segments, groups, inputs, initial_state, *results):
        launch_forward(segments, groups, inputs, initial_state, *results)


def launch_forward(segments, groups, inputs, initial_state, y, last_state, checkpoints):
    """``selective_scan_forward`` of segments as they are."""
    A, B, C = inputs.A, inputs.B, inputs.C
    (B_view, B_constant), (C_view, C_constant) = both_forms(B, A, groups), both_forms(C, A, groups)
    run(
        forward_kernel(inputs.zoh, B.ndim == 4, C.ndim == 4),
        len(segments) * groups * blocks_of(A, groups),
        CHUNK if checkpoints is None else CHECKPOINT, groups, with_checkpoints(segments), waves_of(inputs, groups),
        B_view, C_view, view(y, groups), A, B_constant, C_constant, or_none(initial_state, A), last_state,
        np.empty(0, A.dtype) if checkpoints is None else checkpoints,
    )  # fmt: skip


def selective_scan_summary(segments, groups, inputs, initial_state, carry):
    """Fill carry (batch, dim, reals + 1), as ``selective_scan_forward`` hands it on; there are no parts."""
    inputs = with_zeros(inputs.by_group())
    whole = not all_finite(inputs.u, inputs.delta, inputs.B)
    fill_carry(carry, *ends_of(segments, groups, inputs, whole), inputs.A, initial_state)


def selective_scan_backward_summary(segments, groups, inputs, dy, dlast_state, carry):
    """Fill carry (batch, dim, reals + 1) for the way back; there are no parts."""
    inputs = with_zeros(inputs.by_group())
    whole = not all_finite(dy, inputs.z, inputs.delta, inputs.C)
    fill_carry(carry, *starts_of(segments, groups, inputs, dy, whole), inputs.A.conj(), dlast_state)


def fill_carry(carry, sums, states, A, entering):
    """The carry of sequences: the states that they end in, from what ``entering`` leaves of itself, and their sums."""
    if entering is not None:
        states = pass_states(entering, sums, A, states)
    carry[..., :-1], carry[..., -1] = states.view(A.real.dtype), sums


def selective_scan_prefix(A, carries, back, entering, states):
    """Fill states (batch, dim, state) with the prefix of all carries, plus ``entering``, which comes after them."""
    states[...] = 0
    for carry in carries[::-1] if back else carries:
        states[...] = pass_states(states, carry[..., -1], A.conj() if back else A, carry[..., :-1].view(A.dtype))
    if entering is not None:
        states += entering


@np.errstate(all="ignore")  # sums of partial sums may overflow, as those that kernels form
def selective_scan_backward(segments, groups, inputs, checkpoints, dy, dlast_state, gradients, known_parts):
    """Fill ``gradients``, which has the attributes du, ddelta, ... and dinitial_state, None where there is no input."""
    inputs = with_zeros(inputs.by_group())
    dB, dC = gradients.dB.reshape(inputs.B.shape), gradients.dC.reshape(inputs.C.shape)
    gradients = gradients._replace(dB=dB, dC=dC)
    table = parts(segments, groups * blocks_of(inputs.A, groups))
    rest = checkpoints, dy, dlast_state, gradients
    if table is None or not backward_in_parts(table, segments, groups, inputs, *rest):
        launch_backward(segments, groups, inputs, *rest)


def launch_backward(segments, groups, inputs, checkpoints, dy, dlast_state, gradients):
    """``selective_scan_backward`` of segments as they are."""
    A, B, C = inputs.A, inputs.B, inputs.C
    bundles = max(1, min(len(segments), TASKS))
    slices = max(1, min(blocks_of(A, groups), -(-TASKS // (bundles * groups))))
    (B_view, B_constant), (C_view, C_constant) = both_forms(B, A, groups), both_forms(C, A, groups)
    B_sums, C_sums = (Sums(x, A, groups, inputs.u.shape[2], bundles, slices) for x in (gradients.dB, gradients.dC))
    A_sums = np.empty((bundles, *A.shape), A.dtype)
    D_sums, bias_sums = np.empty((2, bundles, A.shape[0]), inputs.D.dtype)
    run(
        backward_kernel(inputs.zoh, B.ndim == 4, C.ndim == 4),
        bundles * groups * slices, groups, bundles, slices, with_checkpoints(segments), waves_of(inputs, groups),
        B_view, C_view, view(dy, groups), A, B_constant, C_constant, checkpoints, or_none(dlast_state, A),
        view(gradients.du, groups), view(gradients.ddelta, groups), view(gradients.dz, groups), B_sums.varying,
        C_sums.varying, A_sums, B_sums.constant, C_sums.constant, D_sums, bias_sums,
        or_none(gradients.dinitial_state, A),
    )  # fmt: skip
    gradients.dA[...] = A_sums.sum(0)
    for gradient, sums in ((gradients.dD, D_sums), (gradients.ddelta_bias, bias_sums)):
        if gradient is not None:
            gradient[...] = sums.sum(0)
    B_sums.store(False)
    C_sums.store(True)


class Sums:
    """Partial sums of the backward kernel for dB or dC: one for each slice if it varies, for each bundle if not.

    The first slice lies in the gradient itself, if that has the form of the sums.
    """

    def __init__(
        self, gradient: np.ndarray, A: np.ndarray, groups: int, length: int, bundles: int, slices: int
    ) -> None:
        self.gradient, self.varies, real = gradient, gradient.ndim == 4, A.real.dtype
        shape = (gradient.shape[0] if self.varies else 0, groups, A.shape[1], length)
        planes = 2 if A.dtype.kind == "c" else 1
        self.begun = planes == 1 and gradient.shape == shape and (slices == 1 or gradient.dtype == real)
        self.sums = np.empty((slices - self.begun, planes, *shape), real)
        stride, plane = self.sums.strides[:2]
        first = view(gradient if self.begun else self.sums[0, 0])
        self.varying = first, plane, self.sums.ctypes.data - first.address if self.begun else stride, stride
        self.constant = np.empty((0, 0, 0) if self.varies else (bundles, *A.shape), A.dtype)

    def store(self, of_C: bool) -> None:
        """Add up all partial sums in order, and round the total to the gradient."""
        if self.begun:
            for (others,) in self.sums:
                self.gradient += others
            return
        if self.varies:
            planes = self.sums[0]
            for others in self.sums[1:]:
                planes += others
            total = planes[0] + 1j * planes[1] if len(planes) == 2 else planes[0]
        else:
            total = self.constant.sum(0)
        store_numbers(self.gradient, 2 * total.conj() if of_C and total.dtype.kind == "c" else total)


def store_numbers(gradient: np.ndarray, total: np.ndarray) -> None:
    """Round a sum over channels to B's or C's form: one group for all, interleaved real and imaginary parts."""
    if gradient.ndim == 4 and gradient.shape[1] < total.shape[1]:
        total = total.sum(1, keepdims=True)
    gradient[...] = total if gradient.dtype.kind == total.dtype.kind else total.view(total.real.dtype)


# --- the split along time ---------------------------------------------------------------------------------------------
# State passing: the carry of a part is the state that it ends in when it starts from zero, and the sum of its step
# sizes. The part leaves exp(A sum) of a state that enters it, so what enters a part follows from the carries of the
# parts before it. The end from zero needs only those last steps that are still felt there. The backward is the same in
# reverse.
#
# This holds while all numbers are finite. A NaN is felt for ever. A state that grows may be finite although both of its
# terms are infinite. So if a state at the border of two parts is not finite, the call is computed again without parts.

BLOCKS = 4  # a call with fewer is split along time
PARTS = 8  # about so many blocks it has then
SHORTEST = 2048  # a part has at least so many steps


def parts(segments: np.ndarray, blocks: int) -> np.ndarray | None:
    """The segments cut so that more cores have work, as a table with the segment's row in place of the states' rows.

    None if there is work enough. By shape only, so that results do not depend on the machine.
    """
    if not 0 < len(segments) * blocks < BLOCKS:
        return None
    lengths = segments[:, 2]
    counts = np.clip(lengths // SHORTEST, 1, -(-PARTS // (len(segments) * blocks)))
    if (counts == 1).all():
        return None
    steps = -(-lengths // (counts * CHECKPOINT)) * CHECKPOINT  # parts begin at checkpoints, so none is added
    counts = np.maximum(-(-lengths // np.maximum(steps, 1)), 1)
    parent = np.repeat(np.arange(len(segments)), counts)
    index = np.arange(len(parent)) - np.repeat(np.cumsum(counts) - counts, counts)
    batch, start, whole = segments[parent, :3].T
    step = steps[parent]
    begin = np.minimum(index * step, whole)
    return np.stack([batch, start + begin, np.minimum(begin + step, whole) - begin, parent, parent], axis=1)


def forward_in_parts(table, segments, groups, inputs, initial_state, y, last_state, checkpoints):
    """``launch_forward`` over parts; whether the results may be kept."""
    parent, first, last = relatives(table)
    states = first_rows(first, segments[parent, 3], initial_state, inputs.A)
    carrying = np.flatnonzero(~last)
    sums, ends = ends_of(table[carrying], groups, inputs)
    for part, passed, end in zip(carrying, sums, ends, strict=True):
        states[part + 1] = pass_states(states[part], passed, inputs.A, end)
    if not np.isfinite(states).all():
        return False
    number, ends = np.arange(len(table)), np.empty_like(states)
    launch_forward(np.column_stack([table[:, :3], number, number]), groups, inputs, states, y, ends, checkpoints)
    last_rows(last, segments[parent, 4], ends, last_state)
    return np.isfinite(ends[carrying]).all()


def ends_of(table, groups, inputs, whole=False):
    """The sums of the step sizes over stretches, and the states that these end in when they start from zero.

    ``whole``: all of their steps are walked, also those that are not felt at the end.
    """
    sums, steps = felt(table, groups, inputs, True)
    steps = table[:, 2] if whole else steps
    tails = np.column_stack(
        [table[:, 0], table[:, 1] + table[:, 2] - steps, steps, 0 * steps - 1, np.arange(len(table))]
    )
    ends = np.empty((len(table), *inputs.A.shape), inputs.A.dtype)
    launch_forward(tails, groups, inputs, None, None, ends, None)
    return sums, ends


def backward_in_parts(table, segments, groups, inputs, checkpoints, dy, dlast_state, gradients):
    """``launch_backward`` over parts; whether the results may be kept."""
    parent, first, last = relatives(table)
    states = first_rows(last, segments[parent, 4], dlast_state, inputs.A)
    carrying = np.flatnonzero(~first)
    sums, starts = starts_of(table[carrying], groups, inputs, dy)
    for part, passed, start in reversed(list(zip(carrying, sums, starts, strict=True))):
        states[part - 1] = pass_states(states[part], passed, inputs.A.conj(), start)
    if not np.isfinite(states).all():
        return False
    number, starts = np.arange(len(table)), np.empty_like(states)
    launch_backward(
        np.column_stack([table[:, :3], number, number]), groups, inputs, checkpoints, dy, states,
        gradients._replace(dinitial_state=starts),
    )  # fmt: skip
    last_rows(first, segments[parent, 3], starts, gradients.dinitial_state)
    return np.isfinite(starts[carrying]).all()


def starts_of(table, groups, inputs, dy, whole=False):
    """The sums of the step sizes over stretches, and the gradients at their starts when none enters at their ends."""
    sums, steps = felt(table, groups, inputs, False)
    steps = table[:, 2] if whole else steps
    heads = np.column_stack([table[:, :2], steps])
    starts = np.empty((len(table), *inputs.A.shape), inputs.A.dtype)
    C_view, C_constant = both_forms(inputs.C, inputs.A, groups)
    run(
        carry_kernel(inputs.C.ndim == 4), len(heads) * groups * blocks_of(inputs.A, groups), groups, heads,
        waves_of(inputs, groups), C_view, view(dy, groups), inputs.A, C_constant, starts,
    )  # fmt: skip
    return sums, starts


def relatives(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each part: the segment it comes from, whether it is the segment's first, whether its last."""
    parent = table[:, 3]
    border = np.diff(parent) > 0
    return parent, np.insert(border, 0, True), np.append(border, True)


def first_rows(at: np.ndarray, rows: np.ndarray, states: np.ndarray | None, A: np.ndarray) -> np.ndarray:
    """Zeros for every part, but the given states for the parts that take them from outside."""
    taken = np.zeros((len(at), *A.shape), A.dtype)
    if states is not None:
        outside = at & (rows >= 0)
        taken[outside] = states[rows[outside]]
    return taken


def last_rows(at: np.ndarray, rows: np.ndarray, states: np.ndarray, given: np.ndarray | None) -> None:
    """Fill ``given``, if it is, from the parts that hand their states outside."""
    outside = at & (rows >= 0)
    if given is not None and outside.any():
        given[rows[outside]] = states[outside]


def felt(table, groups, inputs, from_end):
    """The sum of step sizes over each part, and how many steps at its end (or start) are felt outside of it.

    If some are not, nothing is left of a state that enters the part. The sum is then not the true one, but one that is
    large enough to leave nothing.
    """
    A, dtype = inputs.A, inputs.delta_bias.dtype
    blocks = groups * blocks_of(A, groups)
    sums, walked = np.empty((len(table), A.shape[0]), dtype), np.empty((len(table), blocks), np.int64)
    waves, gone = waves_of(inputs, groups), GONE[dtype.itemsize]
    run(reach, len(table) * blocks, groups, table, waves, A, gone, from_end, sums, walked)
    slowest = -A.real.max(1)
    part, channel = np.nonzero(np.isinf(sums) & (slowest > 0))
    sums[part, channel] = gone / slowest[channel]
    return sums, walked.max(axis=1, initial=0)


@np.errstate(all="ignore")
def pass_states(states, sums, A, ends):
    """States after a part, from those before it, the sums of its step sizes, and what it ends in from zero.

    The decay is applied in two halves, finite wherever its product with a number is. A state of zero stays zero.
    """
    half = np.exp(sums[..., None] / 2 * A).astype(A.dtype)
    return np.where(states == 0, 0, half * (half * states)) + ends


def all_finite(*arrays: np.ndarray | None) -> bool:
    """Whether there is no NaN and no infinity in any of the arrays."""
    return all(np.isfinite(x).all() for x in arrays if x is not None)
