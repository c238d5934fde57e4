# %% [markdown]
# # Coming from VMamba
#
# [VMamba](https://github.com/MzeroMiko/VMamba) reads an image in four directions and
# scans each. Its kernels are CUDA extensions that one has to build. sscan has them
# under the same names, on CPU and GPU, with nothing to build; and the four directions
# are a few lines.

# %% tags=["parameters"]
batch, dim, state, height, width = 2, 24, 4, 14, 10

# %% [markdown]
# ## Change nothing
#
# VMamba's `csms6s.py` imports `selective_scan_cuda_oflex`, `selective_scan_cuda_core`
# and `selective_scan_cuda`. After this they exist:

# %%
import sscan.compat

installation = sscan.compat.install()

import selective_scan_cuda_core
import selective_scan_cuda_oflex
import torch

torch.manual_seed(0)
length, directions = height * width, 4
u = torch.randn(batch, directions * dim, length)
delta = torch.randn(batch, directions * dim, length)
A = -torch.rand(directions * dim, state)
B = torch.randn(batch, directions, state, length)
C = torch.randn(batch, directions, state, length)
D, bias = torch.ones(directions * dim), torch.randn(directions * dim)

out, *_ = selective_scan_cuda_oflex.fwd(u, delta, A, B, C, D, bias, True, 1, True)
core, *_ = selective_scan_cuda_core.fwd(u, delta, A, B, C, D, bias, True, 1)
assert torch.equal(out, core)

# %% [markdown]
# The arguments are those that VMamba's autograd functions pass: the last ones are
# `delta_softplus`, `nrows`, which was for the speed of their kernel and means nothing
# here, and for `oflex` whether the output of half-precision inputs is float32. `bwd` is
# there too. [Coming from mamba_ssm](../migration.md) lists all names.
#
# ## Or call the scan
#
# `sscan.torch.selective_scan` does the same with autograd, under `torch.compile`, and
# without `nrows`. B and C of four *groups* mean that each quarter of the channels, one
# direction, has its own:

# %%
import sscan.torch

inputs = [x.clone().requires_grad_() for x in (u, delta, A, B, C, D)]
y = sscan.torch.selective_scan(*inputs, delta_bias=bias, delta_softplus=True)
assert torch.equal(y, out)
y.sum().backward()
[tuple(x.grad.shape) for x in inputs]

# %% [markdown]
# ## Four directions
#
# A *cross-scan* makes four sequences of an image: its pixels row by row, column by
# column, and both of these backwards. A *cross-merge* puts the results back to their
# pixels and adds them.


# %%
def cross_scan(image):
    """(batch, dim, height, width) to (batch, 4, dim, height * width)."""
    ahead = torch.stack([image.flatten(2), image.mT.flatten(2)], 1)
    return torch.cat([ahead, ahead.flip(-1)], 1)


def cross_merge(sequences, height, width):
    """(batch, 4, dim, height * width) to (batch, dim, height, width)."""
    ahead, back = sequences.chunk(2, 1)
    rows, columns = (ahead + back.flip(-1)).unbind(1)
    return (
        rows.unflatten(-1, (height, width)) + columns.unflatten(-1, (width, height)).mT
    )


image = torch.arange(6.0).reshape(1, 1, 2, 3)
print(image[0, 0])
print(cross_scan(image)[0, :, 0])
assert torch.equal(cross_merge(cross_scan(image), 2, 3), 4 * image)

# %% [markdown]
# The directions lie beside each other as channels, so that one scan does all four. This
# is the core of VMamba's SS2D:

# %%
image = torch.randn(batch, dim, height, width)
sequences = cross_scan(image).flatten(1, 2)
scanned = sscan.torch.selective_scan(
    sequences, delta, A, B, C, D, delta_bias=bias, delta_softplus=True
)
merged = cross_merge(scanned.unflatten(1, (directions, dim)), height, width)
merged.shape

# %% [markdown]
# ## Check it
#
# Pixel by pixel, from the recurrence: direction $k$ visits the pixels in an order of
# its own, and where the recurrence is when it comes to a pixel is added there.

# %%
import numpy as np

places = np.arange(length).reshape(height, width)
orders = [places.ravel(), places.T.ravel()]
orders += [order[::-1] for order in orders]

pixels = image.double().flatten(2).numpy()
step = torch.nn.functional.softplus(delta + bias[:, None]).double().numpy()
expected = np.zeros_like(pixels)
for k, order in enumerate(orders):
    own = slice(k * dim, (k + 1) * dim)
    decay, skip = A[own].double().numpy(), D[own].double().numpy()
    h = np.zeros((batch, dim, state))
    for t, pixel in enumerate(order):
        size, value = step[:, own, t, None], pixels[..., pixel, None]
        h = np.exp(size * decay) * h + size * value * B[:, k, None, :, t].numpy()
        read = (h * C[:, k, None, :, t].numpy()).sum(-1)
        expected[..., pixel] += read + skip * value[..., 0]

error = np.abs(merged.flatten(2).numpy() - expected).max() / np.abs(expected).max()
print(f"largest difference from the loops in float64: {error:.1e} of the largest value")
assert error < 1e-5

# %%
installation.undo()
