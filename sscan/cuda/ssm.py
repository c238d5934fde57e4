"""The time-invariant system on the GPU: its kernel, and the convolution through the FFT of the arrays' library."""

import importlib
import sys

import scipy  # its fft when first used: a quarter of what importing this package takes

from sscan.cuda import _launch, _products, elementwise
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


def _library(array):
    """The array's library, and the module of its Fourier transforms, which has SciPy's interface."""
    xp = sys.modules[type(array).__module__.partition(".")[0]]
    return xp, importlib.import_module("cupyx.scipy.fft" if hasattr(xp, "cuda") else "scipy.fft")


def _channels(shape):
    """Blocks of channels, with the length that they are padded to: at least twice, so that nothing wraps around."""
    batch, dim, length = shape
    if batch * length == 0:
        return
    padded = scipy.fft.next_fast_len(2 * length, real=True)
    block = max(1, BLOCK // (batch * padded))
    for first in range(0, dim, block):
        yield slice(first, first + block), padded


def _copy(array, out):
    if "float64" in (array.dtype.name, out.dtype.name):
        out[...] = array
    else:
        elementwise.compute("copy", [array], out)


def _padded(array, size, dtype, xp):
    """The array with zeros behind it, in another dtype."""
    out = xp.zeros((*array.shape[:-1], size), dtype)  # the driver does that twice as fast as a part is filled
    _copy(array, out[..., : array.shape[-1]])
    return out


def ssm_convolution_forward(u, kernel, y):
    """Fill y from u, both (batch, dim, length), and kernel (dim, length) in the accumulation dtype."""
    xp, fft = _library(u)
    for channels, padded in _channels(u.shape):
        transform = fft.rfft(_padded(u[:, channels], padded, kernel.dtype, xp))
        transform *= fft.rfft(kernel[channels], padded, norm="forward")  # so that the larger one need not be divided
        back = fft.irfft(transform, padded, norm="forward", overwrite_x=True)
        _copy(back[..., : u.shape[2]], y[:, channels])
    _products.keep_plans(xp.fft)


def ssm_convolution_backward(dy, u, kernel, du, dkernel):
    """Fill du and dkernel; arrays as in ``ssm_convolution_forward``."""
    (xp, fft), length = _library(u), u.shape[2]
    dkernel[...] = 0
    for channels, padded in _channels(u.shape):
        of_dy, of_u = (fft.rfft(_padded(x[:, channels], padded, kernel.dtype, xp)) for x in (dy, u))
        xp.conjugate(of_u, out=of_u)
        of_u *= of_dy
        dkernel[channels] = fft.irfft(of_u.sum(axis=0), padded)[..., :length]
        of_dy *= fft.rfft(kernel[channels], padded, norm="forward").conj()
        _copy(fft.irfft(of_dy, padded, norm="forward", overwrite_x=True)[..., :length], du[:, channels])
    _products.keep_plans(xp.fft)
