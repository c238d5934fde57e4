# %% [markdown]
# # A Mamba layer in Flax NNX and in Equinox
#
# `sscan.jax.nnx` and `sscan.jax.equinox` have the block of the paper as a module of
# either framework, and the language model made of it. Both come with the paper's
# initial values and can be filled from checkpoints in one line.
#
# ```sh
# pip install "sscan[flax]"       # or
# pip install "sscan[equinox]"
# ```
#
# The task is made up: to name the token of three steps before.

# %% tags=["parameters"]
steps, d_model, batch, length = 200, 32, 8, 64

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

TOKENS, DELAY = 16, 3


def tokens_of(step):
    """Tokens (batch, length), others in every step."""
    key = jax.random.fold_in(jax.random.key(0), step)
    return jax.random.randint(key, (batch, length), 0, TOKENS)


def loss_of(logits, tokens):
    """Mean cross-entropy in nats; ln 16 = 2.77 is a guess."""
    logits, wanted = logits[:, DELAY:], tokens[:, :-DELAY]
    return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()


optimiser = optax.adamw(optax.cosine_decay_schedule(1e-2, steps))

# %% [markdown]
# ## Flax NNX
#
# A layer stands in a module as any other. It takes (..., length, d_model) and returns
# the same shape.

# %%
from flax import nnx

import sscan.jax.nnx


class InFlax(nnx.Module):
    """Tokens to logits through one block."""

    def __init__(self, rngs):
        normal = nnx.initializers.normal(1.0)
        self.embedding = nnx.Embed(TOKENS, d_model, embedding_init=normal, rngs=rngs)
        self.mixer = sscan.jax.nnx.Mamba(d_model, d_state=8, rngs=rngs)
        self.head = nnx.Linear(d_model, TOKENS, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedding(tokens)
        return self.head(x + self.mixer(x))


model = InFlax(nnx.Rngs(0))
graph, parameters = nnx.split(model)
memory = optimiser.init(parameters)


@jax.jit
def update(parameters, memory, tokens):
    """One step: the loss, and what has changed."""

    def loss(parameters):
        return loss_of(nnx.merge(graph, parameters)(tokens), tokens)

    value, gradients = jax.value_and_grad(loss)(parameters)
    updates, memory = optimiser.update(gradients, memory, parameters)
    return value, optax.apply_updates(parameters, updates), memory


in_flax = []
for step in range(steps):
    value, parameters, memory = update(parameters, memory, tokens_of(step))
    in_flax.append(float(value))
nnx.update(model, parameters)
print(f"loss {in_flax[0]:.3f} at first, {in_flax[-1]:.3f} after {steps} steps")

# %% [markdown]
# `nnx.split` and `nnx.merge` turn the module into a tree of arrays and back, so that
# plain JAX and optax do the rest.
#
# ## Equinox
#
# There a module *is* a tree, and an update makes a new one. It is written for a single
# sequence, and `jax.vmap` makes a batch of it; the scan makes one call of that, not one
# for each.

# %%
import equinox as eqx

import sscan.jax.equinox


class InEquinox(eqx.Module):
    """Tokens to logits through one block."""

    embedding: eqx.nn.Embedding
    mixer: sscan.jax.equinox.Mamba
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embedding = eqx.nn.Embedding(TOKENS, d_model, key=keys[0])
        self.mixer = sscan.jax.equinox.Mamba(d_model, d_state=8, key=keys[1])
        self.head = eqx.nn.Linear(d_model, TOKENS, key=keys[2])

    def __call__(self, tokens):
        x = jax.vmap(self.embedding)(tokens)
        return jax.vmap(self.head)(x + self.mixer(x))


other = InEquinox(jax.random.key(0))
memory = optimiser.init(eqx.filter(other, eqx.is_array))


@eqx.filter_jit
def update(model, memory, tokens):
    """One step: the loss, and what has changed."""

    def loss(model):
        return loss_of(jax.vmap(model)(tokens), tokens)

    value, gradients = eqx.filter_value_and_grad(loss)(model)
    arrays = eqx.filter(model, eqx.is_array)
    updates, memory = optimiser.update(gradients, memory, arrays)
    return value, eqx.apply_updates(model, updates), memory


in_equinox = []
for step in range(steps):
    value, other, memory = update(other, memory, tokens_of(step))
    in_equinox.append(float(value))
print(f"loss {in_equinox[0]:.3f} at first, {in_equinox[-1]:.3f} after {steps} steps")

plt.figure(figsize=(7, 3), layout="constrained")
plt.semilogy(in_flax, label="Flax NNX")
plt.semilogy(in_equinox, label="Equinox")
plt.xlabel("step")
plt.ylabel("loss, nats")
plt.legend()

# %% [markdown]
# ## States
#
# A sequence can be read in parts, and token by token. The state is an argument and a
# result, as JAX wants it:

# %%
layer, x = model.mixer, model.embedding(tokens_of(0))
whole = layer(x)
first, state = layer.extend(x[:, :40], layer.new_state(batch))
after = []
for t in range(40, length):
    y, state = layer.step(x[:, t], state)
    after.append(y)
together = jnp.concatenate([first, jnp.stack(after, 1)], 1)
assert jnp.allclose(together, whole, rtol=1e-3, atol=1e-4)
jax.tree.map(jnp.shape, state)

# %% [markdown]
# ## Checkpoints
#
# One line reads a layer, or a whole language model, from a folder or from the hub, in
# the original's format or that of transformers. Here a folder is made first:

# %%
import tempfile

import numpy as np

import sscan.nn

folder = tempfile.mkdtemp()
config = sscan.nn.MambaConfig(d_model=d_model, n_layer=2, vocab_size=100)
original = sscan.nn.MambaLM(config)
original.save_pretrained(folder, format="transformers")

second = sscan.jax.equinox.Mamba.from_pretrained(folder, layer=1)
whole = sscan.jax.nnx.MambaLM.from_pretrained(folder)

ids = np.arange(20)[None]
assert np.allclose(whole(ids), original(ids).data, rtol=1e-3, atol=1e-4)
hidden = np.asarray(x[:1])
expected = original.backbone.layers[1].mixer(hidden).data
assert np.allclose(second(hidden), expected, rtol=1e-3, atol=1e-4)

# %% [markdown]
# The scan itself, for layers of your own, is a function: see [JAX](../jax.md).
