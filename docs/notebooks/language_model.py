# %% [markdown]
# # A language model in PyTorch
#
# A small Mamba that reads and writes bytes, trained on the CPU. The text is what
# Python's own `help()` knows about the language, which every Python brings along.

# %% tags=["parameters"]
steps, d_model, batch, length, lr = 500, 96, 8, 256, 6e-3

# %%
import pydoc_data.topics

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn import functional

from sscan.nn import MambaConfig, warmup_cosine
from sscan.torch import MambaLM, decay_groups

text = "\n\n".join(pydoc_data.topics.topics.values()).encode()
data = torch.tensor(np.frombuffer(text, np.uint8).astype(np.int64))
training, held_out = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
print(f"{len(data):,} bytes, of which {len(held_out):,} are held out")

# %% [markdown]
# ## The model
#
# An embedding, blocks of Mamba with a norm before each, and a head that shares the
# embedding's matrix. `MambaLM` is an `nn.Module` as any other. Its initial values are
# the paper's, and its parameters have the names of the released checkpoints, so that
# `MambaLM.from_pretrained("state-spaces/mamba-130m")` gives a model of the same class.

# %%
torch.manual_seed(0)
config = MambaConfig(d_model=d_model, n_layer=2, vocab_size=256)
model = MambaLM(config)
print(f"{config.parameter_count():,} parameters")
model.backbone.layers[0].mixer

# %% [markdown]
# ## Training
#
# The recipe of the paper's section E.2: AdamW with a weight decay of 0.1 for matrices,
# and none for $A$, $D$, biases and norms (`decay_groups` makes the two groups),
# gradients clipped at a norm of 1, and a learning rate that rises and then falls along
# half a cosine.


# %%
def loss_of(ids):
    """Mean cross-entropy of each byte, given those before it, in nats."""
    logits = model(ids[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


optimiser = torch.optim.AdamW(decay_groups(model), lr=lr, betas=(0.9, 0.95))
generator = torch.Generator().manual_seed(0)
losses = []
for step in range(steps):
    for group in optimiser.param_groups:
        group["lr"] = warmup_cosine(step / steps, lr)
    starts = torch.randint(len(training) - length, (batch, 1), generator=generator)
    loss = loss_of(training[starts + torch.arange(length + 1)])
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    losses.append(loss.item())

plt.figure(figsize=(7, 3), layout="constrained")
plt.plot(np.array(losses) / np.log(2))
plt.xlabel("step")
plt.ylabel("bits per byte")
print(
    f"{losses[0] / np.log(2):.2f} bits per byte at first, {losses[-1] / np.log(2):.2f}"
)

# %% [markdown]
# ## How good is it?
#
# By bits per byte on the part that it has not seen. The text is read in one piece: the
# state has the same size after any number of bytes, so `extend` goes on from where the
# last part ended.

# %%
with torch.no_grad():
    states, nats, part = model.new_states(1), 0.0, 4096
    text = held_out[: 8 * part + 1]
    for start in range(0, len(text) - 1, part):
        logits, states = model.extend(text[None, start : start + part], states)
        targets = text[start + 1 : start + part + 1]
        nats += functional.cross_entropy(
            logits[0, : len(targets)], targets, reduction="sum"
        ).item()
bits = nats / np.log(2) / (len(text) - 1)
print(f"{bits:.2f} bits per byte on text that it has not seen")

# %% [markdown]
# ## Writing
#
# `generate` reads the prompt at once, through the scan, and then makes one byte after
# the other, each at the same cost.

# %%
prompt = np.frombuffer(b"The statement ", np.uint8).astype(np.int64)
(made,) = model.generate(prompt[None], 160, temperature=0.7, top_p=0.95, seed=1)
print(bytes(prompt.tolist()).decode() + bytes(made.tolist()).decode(errors="replace"))

# %% [markdown]
# That is what minutes on a CPU buy: words, and the look of the text. For more, `sscan
# train` runs this loop with checkpoints and an exact resume, see
# [Training](../training.md); on a GPU the same code does with `device="cuda"`. Saving
# takes one line, and any of sscan's models reads the folder:

# %%
import tempfile

import sscan.nn

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    same = sscan.nn.MambaLM.from_pretrained(folder)
ids = data[None, :50]
assert np.allclose(same(ids.numpy()).data, model(ids).detach(), rtol=1e-3, atol=1e-3)
