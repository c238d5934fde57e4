"""AdamW and the clipping of gradients on the GPU: what is launched for the parameters of a model."""

import numpy as np

from sscan.cuda import _launch
from sscan.cuda._launch import Kernel

THREADS, EACH = 256, 4  # of a block; numbers of a thread
MOST = 4  # parameters of one launch


def _launches(factory, before, parameters):
    """Launch a kernel for tuples (number of elements, arguments): ``MOST`` of one dtype at a time."""
    by_dtype = {}
    for size, arguments in parameters:
        if size:
            by_dtype.setdefault(arguments[0].dtype.name, []).append((size, arguments))
    for dtype, those in by_dtype.items():
        for start in range(0, len(those), MOST):
            table, blocks = [], 0
            for size, arguments in those[start : start + MOST]:
                table += [*arguments, blocks]
                blocks += -(-size // (THREADS * EACH))
            width = len(table) // len(those[start : start + MOST])
            table += [*(0,) * (width - 1), blocks] * (MOST - len(table) // width)  # no block comes so far
            _launch.launch(Kernel("adamw", factory, (dtype,)), blocks, *before(dtype, blocks), *table)


def clip(gradients, max_norm):
    """Scale the gradients, contiguous, in place to a joint norm of at most max_norm; the norm before, float64 ()."""
    norm = _launch.empty(1, np.float64)
    total = sum(-(-g.size // (THREADS * EACH)) for g in gradients)
    partials, done = _launch.empty(max(1, total), np.float64), [0]

    def where(dtype, blocks):
        place, done[0] = partials[done[0] :], done[0] + blocks
        return (place,)

    _launches("squares", where, [(g.size, (g, g.size)) for g in gradients])
    for dtype in sorted({g.dtype.name for g in gradients}):
        scale = _launch.empty(1, dtype)
        _launch.launch(Kernel("adamw", "norm", (dtype,)), 1, partials, norm, scale, total, _launch.bits(max_norm))
        those = [(g.size, (g, g.size)) for g in gradients if g.dtype.name == dtype]
        _launches("scale", lambda dtype, blocks, scale=scale: (scale,), those)
    return norm[0]


def update(parameters, factors, loss, betas, eps):
    """Update parameters, tuples (value, gradient, m, v, group), all contiguous, in place.

    ``factors`` are float64 numbers in memory, by dtype of the parameters, see the kernel.
    """
    b1, b2 = betas
    constants = [_launch.bits(x) for x in (b1, 1 - b1, b2, 1 - b2, eps)]
    table = [(p[0].size, (*p[:4], p[0].size, 1 + 2 * p[4])) for p in parameters]
    _launches("update", lambda dtype, blocks: (factors[dtype], loss, *constants), table)
