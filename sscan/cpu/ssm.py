"""The time-invariant system on the CPU: its kernel from powers of A_bar, and the convolution through scipy.fft."""

import numpy as np
import scipy  # its fft when first used: a quarter of what importing this package takes
from numba.extending import register_jitable

from sscan.cpu._parallel import kernel, run, take
from sscan.cpu._rows import PLANE, SQUARE, lanes, load_lanes, reals_per, store_lanes
from sscan.cpu._tiles import TILE
from sscan.cpu._vector import flush_subnormals, load, real, restore_environment, scratch, store

CHUNK = 4096  # steps of the kernel in a task
TASK = 1 << 19  # padded numbers that one task of the convolution transforms


@register_jitable
def power(x, k, one):
    """x to the k-th, k >= 0, by squaring."""
    result = one
    while k > 0:
        if k & 1:
            result = result * x
        k >>= 1
        if k > 0:
            x = x * x
    return result


@register_jitable
def load_powers(like, T, first, x):
    """first, first x, ..., first x^15 as lanes; T is scratch."""
    for k in range(TILE):
        T[k], T[PLANE + k] = first.real, first.imag
        first = first * x
    return load_lanes(like, T, 0)


@kernel
def kernel_forward(counter, tasks, A_bar, CB, K):
    """One task: ``CHUNK`` steps of one channel. K[d, k] = Re sum_n CB[d, n] A_bar[d, n]^k, 16 steps at a time."""
    dim, state = A_bar.shape
    length = K.shape[1]
    one, nothing = A_bar.dtype.type(1), lanes(A_bar.dtype.type(0))
    T, S = scratch(SQUARE, K.dtype), scratch(CHUNK, K.dtype)
    environment = flush_subnormals()
    while True:
        task = take(counter)
        if task >= tasks:
            break
        d, t0 = task % dim, task // dim * CHUNK
        steps = min(CHUNK, length - t0)
        S[:] = 0
        for n in range(state):
            a = A_bar[d, n]
            p, step = load_powers(nothing, T, CB[d, n] * power(a, t0, one), a), lanes(power(a, TILE, one))
            for t in range(0, steps, TILE):
                store(S, t, load(S, t) + real(p))
                p = p * step
        for t in range(steps):
            K[d, t0 + t] = S[t]
    restore_environment(environment)


@kernel
def kernel_backward(counter, tasks, dK, A_bar, sums):
    """One task: ``CHUNK`` steps of one channel.

    sums[chunk, :, part, d] = the real and imaginary parts of its sums of dK_k a^k and of (k + 1) dK_{k+1} a^k.
    """
    dim, state = A_bar.shape
    length = dK.shape[1]
    one, nothing = A_bar.dtype.type(1), lanes(A_bar.dtype.type(0))
    T = scratch(SQUARE, dK.dtype)
    G, E = scratch(CHUNK, dK.dtype), scratch(CHUNK, dK.dtype)
    environment = flush_subnormals()
    while True:
        task = take(counter)
        if task >= tasks:
            break
        d, chunk = task % dim, task // dim
        t0 = chunk * CHUNK
        steps = min(CHUNK, length - t0)
        G[:] = 0
        E[:] = 0
        for t in range(steps):
            G[t] = dK[d, t0 + t]
            if t0 + t + 1 < length:
                E[t] = (t0 + t + 1) * dK[d, t0 + t + 1]
        for n in range(state):
            a = A_bar[d, n]
            p, step = load_powers(nothing, T, power(a, t0, one), a), lanes(power(a, TILE, one))
            value, slope = nothing, nothing
            for t in range(0, steps, TILE):
                value, slope, p = value + p * load(G, t), slope + p * load(E, t), p * step
            for i in range(2):
                store_lanes(T, 0, value if i == 0 else slope)
                for part in range(reals_per(nothing)):
                    total = T[part * PLANE]
                    for k in range(1, TILE):
                        total += T[part * PLANE + k]
                    sums[chunk, i, part, d, n] = total
    restore_environment(environment)


@kernel
def next_task(counter):
    """What ``take`` is to Python code."""
    return take(counter)


def over_channels(work, shape):
    """Call work(channels, padded) for blocks of channels, on all threads; the length is padded to at least twice."""
    batch, dim, length = shape
    if batch * length == 0:
        return
    padded = scipy.fft.next_fast_len(2 * length, real=True)
    block = max(1, TASK // (batch * padded))

    def loop(counter, tasks):  # scipy.fft releases the GIL as kernels do
        while (task := int(next_task(counter))) < tasks:
            work(slice(task * block, (task + 1) * block), padded)

    run(loop, -(-dim // block))


# --- what the ops call -----------------------------------------------------------------------------------------------


@np.errstate(all="ignore")  # products may overflow, as those that kernels form
def ssm_kernel_forward(A_bar, B_bar, C, K):
    """Fill K (dim, length), real, from (dim, state) arrays, all contiguous and in one precision."""
    twice = 2 if np.iscomplexobj(A_bar) else 1
    dim, length = K.shape
    run(kernel_forward, dim * -(-length // CHUNK), A_bar, twice * C * B_bar, K)


@np.errstate(all="ignore")
def ssm_kernel_backward(dK, A_bar, B_bar, C, dA_bar, dB_bar, dC):
    """Fill dA_bar, dB_bar and dC; arrays as in ``ssm_kernel_forward``."""
    is_complex = np.iscomplexobj(A_bar)
    dim, length = dK.shape
    chunks = -(-length // CHUNK)
    sums = np.empty((chunks, 2, 2 if is_complex else 1, *A_bar.shape), dK.dtype)
    run(kernel_backward, dim * chunks, dK, A_bar, sums)
    total = sums.sum(axis=0)
    value, slope = 2 * (total[:, 0] + 1j * total[:, 1]) if is_complex else total[:, 0]
    dA_bar[...] = (C * B_bar * slope).conj()
    dB_bar[...] = (C * value).conj()
    dC[...] = (B_bar * value).conj()


def ssm_convolution_forward(u, kernel, y):
    """Fill y from u, both (batch, dim, length), and kernel (dim, length) in the accumulation dtype."""

    def work(channels, padded):
        transform = scipy.fft.rfft(u[:, channels].astype(kernel.dtype, copy=False), padded)
        transform *= scipy.fft.rfft(kernel[channels], padded)
        y[:, channels] = scipy.fft.irfft(transform, padded)[..., : u.shape[2]]

    over_channels(work, u.shape)


def ssm_convolution_backward(dy, u, kernel, du, dkernel):
    """Fill du and dkernel; arrays as in ``ssm_convolution_forward``."""

    def work(channels, padded):
        length = u.shape[2]
        of_dy = scipy.fft.rfft(dy[:, channels].astype(kernel.dtype, copy=False), padded)
        of_u = scipy.fft.rfft(u[:, channels].astype(kernel.dtype, copy=False), padded)
        of_kernel = scipy.fft.rfft(kernel[channels], padded)
        du[:, channels] = scipy.fft.irfft(of_dy * of_kernel.conj(), padded)[..., :length]
        dkernel[channels] = scipy.fft.irfft((of_dy * of_u.conj()).sum(axis=0), padded)[..., :length]

    dkernel[...] = 0
    over_channels(work, u.shape)
