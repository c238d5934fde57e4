"""The time-invariant system on the GPU: its kernel, and the convolution through the FFT of the arrays' library."""

import sys

import scipy  # its fft when first used: a quarter of what importing this package takes

from sscan.cuda import _launch, _products
from sscan.cuda._launch import Kernel

THREADS = 128
CHUNK = 2048  # steps of the kernel in a block
BLOCK = 1 << 26  # padded numbers that the convolution transforms at once


def ssm_kernel_forward(A_bar, B_bar, C, K):
    """Fill K (dim, length), real, from (dim, state) arrays, all contiguous and in one precision."""
    (dim, length), state = K.shape, A_bar.shape[1]
    _launch.launch(
        Kernel("ssm", "kernel_forward", (A_bar.dtype.name,)), dim * -(-length // CHUNK),
        A_bar, B_bar, C, K, dim, length, state,
    )  # fmt: skip


def ssm_kernel_backward(dK, A_bar, B_bar, C, dA_bar, dB_bar, dC):
    """Fill dA_bar, dB_bar and dC; arrays as in ``ssm_kernel_forward``."""
    (dim, length), state, key = dK.shape, A_bar.shape[1], (A_bar.dtype.name,)
    chunks, size = -(-length // CHUNK), dim * state
    sums = _launch.empty((chunks, 2, dim, state), A_bar.dtype)
    _launch.launch(Kernel("ssm", "kernel_backward", key), dim * chunks, dK, A_bar, sums, dim, length, state)
    _launch.launch(
        Kernel("ssm", "kernel_gradients", key), -(-size // THREADS), sums, B_bar, C, dA_bar, dB_bar, dC, chunks, size
    )


def _fft_of(array):
    """The module ``fft`` of the array's library."""
    return sys.modules[type(array).__module__.partition(".")[0]].fft


def _channels(shape):
    """Blocks of channels, with the length that they are padded to: at least twice, so that nothing wraps around."""
    batch, dim, length = shape
    if batch * length == 0:
        return
    padded = scipy.fft.next_fast_len(2 * length, real=True)
    block = max(1, BLOCK // (batch * padded))
    for first in range(0, dim, block):
        yield slice(first, first + block), padded


def ssm_convolution_forward(u, kernel, y):
    """Fill y from u, both (batch, dim, length), and kernel (dim, length) in the accumulation dtype."""
    fft = _fft_of(u)
    for channels, padded in _channels(u.shape):
        transform = fft.rfft(u[:, channels].astype(kernel.dtype, copy=False), padded)
        transform *= fft.rfft(kernel[channels], padded)
        y[:, channels] = fft.irfft(transform, padded)[..., : u.shape[2]]
    _products.keep_plans(fft)


def ssm_convolution_backward(dy, u, kernel, du, dkernel):
    """Fill du and dkernel; arrays as in ``ssm_convolution_forward``."""
    fft, length = _fft_of(u), u.shape[2]
    dkernel[...] = 0
    for channels, padded in _channels(u.shape):
        of_dy = fft.rfft(dy[:, channels].astype(kernel.dtype, copy=False), padded)
        of_u = fft.rfft(u[:, channels].astype(kernel.dtype, copy=False), padded)
        of_kernel = fft.rfft(kernel[channels], padded)
        du[:, channels] = fft.irfft(of_dy * of_kernel.conj(), padded)[..., :length]
        dkernel[channels] = fft.irfft((of_dy * of_u.conj()).sum(axis=0), padded)[..., :length]
    _products.keep_plans(fft)
