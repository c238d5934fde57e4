# %% [markdown]
# # Induction Heads on a laptop
#
# *... Harry Potter ... Harry* → *Potter*. A model that has seen a pair once should
# complete it the next time: this is the task of section 4.1.2 of the
# [paper](https://arxiv.org/abs/2312.00752v2), and what makes it interesting is length.
# A sequence is random symbols with a *trigger* somewhere, and ends in the trigger
# again. What stood behind it the first time?
#
# We train two blocks of Mamba on sequences of 64 tokens, in a few minutes on two cores,
# and then ask for sequences up to hundreds of times as long.

# %% tags=["parameters"]
steps, d_model, lr, longest = 5000, 32, 3e-3, 1 << 14

# %%
import matplotlib.pyplot as plt
import numpy as np

from sscan.tasks.induction import Induction, InductionOptions
from sscan.tasks.training import TrainingRun

options = InductionOptions(
    d_model=d_model, length=64, batch=16, lr=lr, final=1e-5, steps=steps
)
task = Induction(options)
ids, answers = task.sequences(np.random.default_rng(0), 1, length=24)
print("sequence:", *ids[0], "(the trigger is 16)")
print("answer:  ", answers[0])

# %% [markdown]
# ## Training
#
# Only the last symbol is trained on. A step is a function of the seed and its number,
# so this run gives the same losses again. There are 16 symbols: who guesses has a loss
# of $\ln 16 = 2.77$.

# %%
run = TrainingRun(task)
while not run.done:
    run.step()

window = max(steps // 100, 1)
smooth = np.convolve(run.losses, np.ones(window) / window, mode="valid")
plt.figure(figsize=(7, 3), layout="constrained")
plt.semilogy(smooth)
plt.axhline(np.log(16), color="0.7")
plt.xlabel("step")
plt.ylabel("loss, nats")
print(f"{sum(p.size for p in run.model.parameters()):,} parameters, {steps} steps")

# %% [markdown]
# There is a plateau, and then the model has it. On the plateau it guesses; what it
# needs is two things at once, to notice the trigger and to keep what follows, and
# either is of no use without the other.
#
# ## What it has learned
#
# The step sizes say what enters the states. Here they are for one sequence, in the
# channels of each block that open widest beside their usual size; the lines are the
# two triggers.


# %%
from sscan.nn import no_grad, ops


@no_grad()
def step_sizes(model, ids):
    """delta (channels, length) of every block, for one sequence."""
    found, stream = [], model.backbone.embedding(ids)
    for block in model.backbone.layers:
        mixer, hidden = block.mixer, block.norm(stream)
        xz = mixer.in_proj.channel_first(hidden.swapaxes(1, 2))
        x, _ = mixer.conv1d(xz[:, : mixer.d_inner], "silu")
        dt = mixer.x_proj.channel_first(x)[:, : mixer.dt_rank]
        delta = ops.matmul(mixer.dt_proj.weight, dt) + mixer.dt_proj.bias.reshape(-1, 1)
        found.append(np.logaddexp(0, delta.data)[0])
        stream = stream + mixer(hidden)
    return found


ids, _ = task.sequences(np.random.default_rng(1), 1, length=64)
_, axes = plt.subplots(2, 1, sharex=True, figsize=(7, 5), layout="constrained")
for axis, delta in zip(axes, step_sizes(run.model, ids), strict=True):
    widest = np.argsort(delta.max(1) / np.median(delta, 1))[-6:]
    for place in np.flatnonzero(ids[0] == 16):
        axis.axvline(place, color="0.7")
    axis.semilogy(delta[widest].T, ".-", linewidth=0.8)
axes[0].set_title("delta, block 1 and block 2")
axes[1].set_xlabel("token")

# %% [markdown]
# It is block 1 that selects. These channels open once, at the token right behind the
# trigger, with a step size of several units that replaces what was in the state;
# everywhere else they are shut, at hundredths and far below. That a trigger went
# before they know from the convolution, which sees three tokens back. Nobody has told
# the model where to look.
#
# ## Longer sequences
#
# 64 sequences of each length, twice as long each time. They are read in parts, with the
# states carried along, so any length fits.

# %%
lengths = [64 << k for k in range((longest // 64).bit_length())]
accuracy = {length: task.accuracy(run.model, length) for length in lengths}

plt.figure(figsize=(7, 3), layout="constrained")
plt.semilogx(lengths, [100 * share for share in accuracy.values()], "o-", base=2)
plt.axvline(options.length, color="0.7")
plt.axhline(100 / 16, color="0.7", linestyle=":")
plt.ylim(0, 105)
plt.xlabel("length (trained on: the line)")
plt.ylabel("right answers, %")
for length, share in accuracy.items():
    print(f"{length:>6} tokens: {share:.1%}")

# %% [markdown]
# Nothing in the model knows how long a sequence is. Once it keeps the answer in its
# state and lets nothing else in, it does not matter how much noise follows, as long as
# each step lets in, and forgets, little enough. How little differs from seed to seed:
# of the three in [Experiments](../experiments.md), this one makes the most mistakes,
# and one makes none.
#
# In the paper, Mamba trained at length 256 is right up to $2^{20}$, and attention
# hardly beyond twice the length that it was trained on. `sscan reproduce table11`
# trains Mamba and the others side by side; see [Experiments](../experiments.md) for
# what came out, with several seeds.
