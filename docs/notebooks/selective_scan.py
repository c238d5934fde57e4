# %% [markdown]
# # The selective scan, from the paper's equations
#
# A state space model carries a state $h$ along a sequence. Everything that it knows of
# the past is in there, so the question is what goes in and what is forgotten. This page
# builds the answer of [Mamba](https://arxiv.org/abs/2312.00752v2) in NumPy, from
# equation (2) on, and looks at it.

# %%
import matplotlib.pyplot as plt
import numpy as np

import sscan

# %% [markdown]
# ## One channel, one state
#
# In continuous time $h'(t) = A\,h(t) + B\,u(t)$ with a negative $A$: the state decays,
# and the input pushes it. In steps of length $\Delta$ this becomes
#
# $$
# h_t = e^{\Delta A}\,h_{t-1} + \Delta\,B\,u_t, \qquad y_t = C\,h_t .
# $$
#
# $\Delta$ is in both places. A large one forgets what was ($e^{\Delta A}$ near 0) *and*
# takes much of what is. A small one keeps the state and passes the token over. Here a
# single 1 comes in at step 5:


# %%
def scan(u, delta, A, B, C):
    """y and the states h, one step after the other."""
    h, states = 0.0, []
    for t in range(len(u)):
        h = np.exp(delta[t] * A) * h + delta[t] * B[t] * u[t]
        states.append(h)
    return C * np.array(states), np.array(states)


length = 60
u, ones = np.zeros(length), np.ones(length)
u[5] = 1.0
for step in (0.02, 0.1, 0.5):
    _, h = scan(u, np.full(length, step), -1.0, ones, ones)
    plt.plot(h, label=f"delta = {step}")
plt.title("the state after a single token")
plt.xlabel("t")
plt.legend()

# %% [markdown]
# With a constant $\Delta$ one has to choose: either the token enters strongly and is
# soon gone, or it stays long and hardly enters. Such a model is *time-invariant*; its
# output is a convolution of the input, and no convolution can tell one token from
# another by what it is.
#
# ## Selection
#
# Now let $\Delta$, and $B$ and $C$, depend on the input. Take a sequence of noise with
# a few tokens in it that matter, at the marked places. A model that has learned this
# opens $\Delta$ there and closes it elsewhere. We set it by hand:

# %%
rng = np.random.default_rng(0)
places = np.array([8, 20, 41])
u = rng.normal(0, 0.3, length)
u[places] = [1.0, -1.0, 1.0]
selective = np.full(length, 0.003)
selective[places] = 4.0
constant = np.full(length, 0.3)

_, axes = plt.subplots(3, 1, sharex=True, figsize=(7, 5), layout="constrained")
axes[0].bar(np.arange(length), u)
axes[0].set_ylabel("u")
axes[1].semilogy(constant, label="constant")
axes[1].semilogy(selective, label="selective")
axes[1].set_ylabel("delta")
for delta in (constant, selective):
    # Divided by delta where it is large, so that the state is what came last.
    _, h = scan(u, delta, -1.0, 1 / np.maximum(delta, 1), ones)
    axes[2].plot(h)
axes[2].set_ylabel("h")
axes[1].legend()

# %% [markdown]
# The state of the selective one holds the last token that mattered, however much noise
# follows; the other one is a blur of what came by. This is Theorem 1 of the paper: with
# one state, $A = -1$ and $\Delta = \mathrm{softplus}(s)$ the exact rule of
# discretisation makes
#
# $$
# h_t = (1 - g_t)\,h_{t-1} + g_t\,u_t, \qquad g_t = \sigma(s_t),
# $$
#
# the gate of a recurrent network. sscan has that rule too; `delta_softplus` applies the
# softplus:

# %%
s = rng.normal(size=(1, 1, length))
x = rng.normal(size=(1, 1, length))
one = np.ones((1, 1))
y = sscan.selective_scan(
    x, s, -one, one, one, delta_softplus=True, discretization="zoh"
)

h, gated = 0.0, []
for g, value in zip(1 / (1 + np.exp(-s[0, 0])), x[0, 0], strict=True):
    h = (1 - g) * h + g * value
    gated.append(h)
assert np.allclose(y[0, 0], gated)

# %% [markdown]
# ## Many channels, many states
#
# A model has hundreds of channels $d$, each with its own $\Delta_d$ and $N$ states. $A$
# is a matrix (dim, N), which starts as $-1, -2, \ldots, -N$: states that forget at
# different speeds. $B_t$ and $C_t$ say what is written to which state and what is read
# from it, and are shared by the channels:
#
# $$
# h_{t,d,n} = e^{\Delta_{t,d} A_{d,n}}\,h_{t-1,d,n} + \Delta_{t,d}\,B_{t,n}\,u_{t,d},
# \qquad y_{t,d} = \sum_n C_{t,n}\,h_{t,d,n} + D_d\,u_{t,d} .
# $$
#
# `sscan.selective_scan` computes it, for arrays (batch, dim, length):

# %%
batch, dim, N = 1, 4, 16
u = rng.normal(size=(batch, dim, length))
delta = rng.uniform(0.01, 0.2, (batch, dim, length))
A = -np.tile(np.arange(1.0, N + 1), (dim, 1))
B, C = rng.normal(size=(2, batch, N, length))
D = np.ones(dim)

y, last = sscan.selective_scan(u, delta, A, B, C, D, return_last_state=True)

h = np.zeros((batch, dim, N))
for t in range(length):
    step = delta[..., t, None]
    h = np.exp(step * A) * h + step * B[:, None, :, t] * u[..., t, None]
    expected = (h * C[:, None, :, t]).sum(-1) + D * u[..., t]
    assert np.allclose(y[..., t], expected)
assert np.allclose(last, h)
y.shape, last.shape

# %% [markdown]
# The state `last` is all that is needed to go on: decoding costs the same for the tenth
# token and for the millionth.
#
# ## What one token does
#
# The output is linear in $u$, so the effect of one token on a later output is a number:
# with $u_{s,d}$ alone, $y_{t,d}$ is $\sum_n C_{t,n}\,e^{A_{d,n}(\Delta_{s+1} + \ldots +
# \Delta_t)}\,\Delta_s B_{s,n}$. The scan of a unit matrix gives all of them, one row
# for each token:

# %%
d = 0


def effects(delta):
    """(token, output): what a 1 at a token adds to each output of channel d."""
    unit = np.eye(length)[:, None]
    rows = np.broadcast_to(delta[:, d : d + 1], unit.shape)
    same = [np.broadcast_to(x, (length, N, length)) for x in (B, C)]
    return sscan.selective_scan(unit, rows, A[d : d + 1], *same)[:, 0]


reset = delta.copy()
reset[..., 30] = 6.0
_, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for axis, steps in zip(axes, (delta, reset), strict=True):
    axis.imshow(np.log10(np.abs(effects(steps)) + 1e-6), vmin=-4)
    axis.set(xlabel="output t", ylabel="token s")
axes[0].set_title("log10 of the effect")
axes[1].set_title("with delta[30] = 6")

# %% [markdown]
# Nothing below the diagonal: the scan is causal. On the right the step size of one
# token is large. Its own row is the brightest, and later outputs hardly see any token
# before it: the state was reset. This is the matrix that attention would compute; the
# scan never forms it.
#
# How a model learns its step sizes is in [Induction Heads](induction_heads.md), the
# gradients are in [Mathematics](../maths.md), and [Experiments](../experiments.md) has
# the step sizes of a trained model.

# %%
picture = effects(reset)
assert np.all(np.tril(picture, -1) == 0)
before, after = np.abs(picture[:30, 30:]).max(), np.abs(picture[30, 30:]).max()
print(f"largest effect of tokens before 30 on later outputs: {before:.1e}")
print(f"of token 30: {after:.1e}")
