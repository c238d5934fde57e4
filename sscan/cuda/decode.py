"""One decoding step of a whole Mamba language model on the GPU: what is launched, and for which arrays.

The phases are those of ``sscan.cpu.decode``, a kernel for each. Nothing is computed on the host and nothing is read
there, so that a step can be captured as a CUDA graph. What is between the weights stays in float32 (float64) for a few
rows of a batch; for more, of weights in half precision, the tensor cores get it rounded to that.
"""

import functools

import numpy as np

from sscan.cuda import _graphs, _launch, _products
from sscan.cuda._launch import Kernel
from sscan.cuda.sample import sample

# The arrays of a block, in this order; those that a model lacks are None.
NORM, IN_PROJ, IN_BIAS, CONV, CONV_BIAS, X_PROJ, DT_PROJ, DT_BIAS, A_LOG, D, OUT_PROJ, OUT_BIAS = range(12)

THREADS, WARP = 128, 32
FEW = 4  # rows of a batch that are multiplied one by one, by each warp
MOST = 16  # that is worth it where tiles are not possible
MANY = 32  # rows from which on cuBLAS, with a kernel more for the convolution, takes less time than tiles
ROWS, COLUMNS, PIECE = 16, 32, 8  # of a tile of a weight; numbers in 16 bytes
WIDEST = 5120  # stream that `normalise` has in registers
ASKED = 6  # pieces of 16 bytes of a weight that a thread asks for at once


def _pieces(size, each, rows):
    """How many pieces of each of some rows a lane asks for at once, and whether the rows are full of them."""
    pieces = max(1, min(-(-size // (WARP * each)), max(2, 2 * ASKED // rows)))
    return pieces, size % (WARP * each * pieces) == 0


class _Few:
    """The products of a few rows of a batch, and what they leave to each other."""

    delta = None  # what dt_proj makes, where that is not left to ``advance``

    def __init__(self, weights, batch):
        self.weights, self.count = weights, batch
        self.groups = -(-batch // FEW)
        self.batch = -(-batch // self.groups)
        self.x, self.z, self.y = (_launch.empty((batch, weights.inner), weights.real) for _ in range(3))

    def _project(self, X, weight, bias, out, rows, warps, added, norm=None, eps=0.0):
        (height, size), of_warps = weight.shape, rows * warps
        w, shape = self.weights, _pieces(size, self.weights.each, rows)
        key = (w.storage, w.real.name, w.each, *shape, rows, self.batch, warps, norm is not None, added)
        _launch.launch(
            Kernel("decode", "projection", key), self.groups * -(-height // of_warps), X, norm, _launch.bits(eps),
            _launch.bits(1 / size), weight, bias, out, self.count, size, height,
        )  # fmt: skip

    def in_projection(self, stream, block, eps, state):
        w = self.weights
        key = (w.storage, w.each, *_pieces(w.model, w.each, 2), 2, self.batch, w.width)
        blocks = self.groups * -(-w.inner // (THREADS // WARP))
        _launch.launch(
            Kernel("decode", "in_projection", key), blocks, stream, block[NORM], _launch.bits(eps),
            _launch.bits(1 / w.model), block[IN_PROJ], block[IN_BIAS], state, block[CONV], block[CONV_BIAS], self.x,
            self.z, self.count, w.model, w.inner,
        )  # fmt: skip

    def x_projection(self, block, low):
        self._project(self.x, block[X_PROJ], None, low, 1, 1, False)

    def out_projection(self, block, stream):
        self._project(self.y, block[OUT_PROJ], block[OUT_BIAS], stream, 1, 4, True)

    def head(self, stream, norm, eps, head, logits):
        self._project(stream, head, None, logits, 4, 4, False, norm, eps)


class _Tiles:
    """The products of more rows of a batch, by the tensor cores."""

    delta = None

    def __init__(self, weights, batch):
        self.weights, self.count = weights, batch
        self.X = _launch.empty((batch, weights.model), weights.dtype)
        self.x, self.z, self.y = (_launch.empty((batch, weights.inner), weights.dtype) for _ in range(3))

    def _shape(self, size, height):
        """m, splits, tiles, depth and whole of ``tile_products``, and the number of blocks.

        Few tiles: several warps share one, and blocks have few rows of the batch, so that there is enough to do for the
        whole GPU. Many: blocks are large, which reads less.
        """
        m, tiles = 1, -(-height // ROWS)
        while m < 8 and 8 * m < self.count and (m < 2 or tiles * -(-self.count // (8 * m)) > 2 * _launch.processors()):
            m *= 2
        groups = -(-self.count // (8 * m))
        splits, rows = (1, 4) if tiles * groups >= 4 * _launch.processors() else (4, 1)
        while 1 < splits < 8 and size > COLUMNS * splits * ASKED:
            splits *= 2
        depth = min(ASKED, -(-size // (COLUMNS * splits)))
        return (m, splits, rows, depth, size % (COLUMNS * splits * depth) == 0), -(-tiles // rows) * groups

    def _normalise(self, stream, norm, eps):
        w = self.weights
        kernel = Kernel("decode", "normalise", (w.storage, -(-w.model // (4 * WARP))))
        numbers = _launch.bits(eps), _launch.bits(1 / w.model)
        blocks = -(-self.count // (THREADS // WARP))
        _launch.launch(kernel, blocks, stream, norm, *numbers, self.X, self.count, w.model)

    def _project(self, X, weight, bias, out, added, rounded=None, columns=0):
        height, size = weight.shape
        shape, blocks = self._shape(size, height)
        kernel = Kernel("decode", "projection_tiles", (self.weights.storage, *shape, added))
        _launch.launch(kernel, blocks, X, weight, bias, out, rounded, columns, self.count, size, height)

    def in_projection(self, stream, block, eps, state):
        w = self.weights
        self._normalise(stream, block[NORM], eps)
        shape, blocks = self._shape(w.model, 2 * w.inner)
        kernel = Kernel("decode", "in_projection_tiles", (w.storage, *shape, w.width))
        arguments = self.X, block[IN_PROJ], block[IN_BIAS], state, block[CONV], block[CONV_BIAS], self.x, self.z
        _launch.launch(kernel, blocks, *arguments, self.count, w.model, w.inner)

    def x_projection(self, block, low):
        self._project(self.x, block[X_PROJ], None, low, False)

    def out_projection(self, block, stream):
        self._project(self.y, block[OUT_PROJ], block[OUT_BIAS], stream, True)

    def head(self, stream, norm, eps, head, logits):
        self._normalise(stream, norm, eps)
        self._project(self.X, head, None, logits, False)


class _Many(_Tiles):
    """The products of many rows of a batch: large ones by cuBLAS."""

    def __init__(self, weights, batch):
        super().__init__(weights, batch)
        self.xz = _launch.empty((batch, 2 * weights.inner), weights.dtype)
        self.z = self.xz[:, weights.inner :]
        self.dt = _launch.empty((batch, weights.rank), weights.dtype)
        self.delta = _launch.empty((batch, weights.inner), weights.real) if weights.rank else None

    def in_projection(self, stream, block, eps, state):
        w = self.weights
        self._normalise(stream, block[NORM], eps)
        _products.multiply(self.X, block[IN_PROJ], self.xz, False)
        kernel, blocks = Kernel("decode", "convolution", (w.storage, w.width)), -(-self.count * w.inner // THREADS)
        _launch.launch(kernel, blocks, self.xz, state, block[CONV], block[CONV_BIAS], self.x, self.count, w.inner)

    def x_projection(self, block, low):
        self._project(self.x, block[X_PROJ], None, low, False, self.dt, self.weights.rank)
        if self.delta is not None:
            _products.multiply(self.dt, block[DT_PROJ], self.delta, False)

    def out_projection(self, block, stream):
        _products.multiply(self.y, block[OUT_PROJ], stream, True)

    def head(self, stream, norm, eps, head, logits):
        self._normalise(stream, norm, eps)
        _products.multiply(self.X, head, logits, False)


class Weights:
    """The weights of a model, which are read where they lie at every step; ``blocks`` are arrays in the order above."""

    def __init__(self, blocks, embedding, final_norm, head):
        first = blocks[0]
        self.blocks, self.embedding, self.final_norm, self.head = blocks, embedding, final_norm, head
        self.dtype, self.storage, self.real = head.dtype, head.dtype.name, np.result_type(head.dtype, np.float32)
        self.vocabulary, self.model = head.shape
        (self.inner, self.state), self.width = first[A_LOG].shape, first[CONV].shape[-1]
        self.rank, self.of_A, self.of_D = first[DT_PROJ].shape[-1], first[A_LOG].dtype.name, first[D].dtype.name
        self.low, self.of_conv, self.of_ssm = self.rank + 2 * self.state, head.dtype, first[D].dtype
        self.of_states = {self.of_ssm, self.real}
        together = 16 // head.itemsize
        matrices = [head, *(block[i] for block in blocks for i in (IN_PROJ, X_PROJ, OUT_PROJ))]
        vectors = [embedding, final_norm, *(block[NORM] for block in blocks)]
        aligned = _launch.aligned(together, *matrices, *vectors)
        self.each = together if aligned else 1
        self.fit_tiles = aligned and head.itemsize == 2 and self.model <= WIDEST
        self.has_bias = first[IN_BIAS] is not None or first[OUT_BIAS] is not None
        of_dt = self.state % 2 == 0 and _launch.aligned(together, *(block[DT_PROJ] for block in blocks))
        self.each_dt = together if of_dt and self.rank else 1
        self.aligned_A = self.rank % 4 == 0 and _launch.aligned(4, *(block[A_LOG] for block in blocks))

    @classmethod
    def of(cls, blocks, embedding, final_norm, head):
        """The weights, or None if shapes or dtypes of the arrays are not those of one model."""
        if head.ndim != 2 or any(block[A_LOG].ndim != 2 or block[CONV].ndim != 3 for block in blocks):
            return None
        storages = {np.dtype(np.float64): {"float64"}}.get(head.dtype, {head.dtype.name, "float32"})
        weights = cls(blocks, embedding, final_norm, head)
        fit = weights._fits(embedding, (weights.vocabulary, weights.model)) and weights._fits(
            final_norm, (weights.model,)
        )
        same = weights.of_A in storages and weights.of_D in storages and all(map(weights._block_fits, blocks))
        return weights if fit and same and head.dtype.kind in "fV" else None

    def _fits(self, array, shape, dtype=None):
        return array is None or (array.shape == shape and array.dtype.name == (dtype or self.storage))

    def _block_fits(self, block):
        model, inner = self.model, self.inner
        shapes = (
            (model,), (2 * inner, model), (2 * inner,), (inner, 1, self.width), (inner,), (self.low, inner),
            (inner, self.rank), (inner,), (inner, self.state), (inner,), (model, inner), (model,),
        )  # fmt: skip
        dtypes = {A_LOG: self.of_A, D: self.of_D}
        return all(self._fits(block[i], shapes[i], dtypes.get(i)) for i in range(len(shapes)))

    def state_shapes(self, batch):
        """Shapes of the states of a block: of the convolution, of the scan."""
        return (batch, self.inner, self.width - 1), (batch, self.inner, self.state)

    def fits(self, batch):
        """Whether these kernels are the ones for this many rows."""
        return 0 < batch <= MOST or (batch > 0 and self.fit_tiles)

    def step(self, tokens, eps, states, logits):
        """Fill logits (batch, vocabulary) for tokens (batch,), int64; the states are updated in place.

        ``eps`` are those of all norms, ``states`` (convolution, scan) of each block, contiguous. What is no token is
        read as token 0.
        """
        products = self._products(len(tokens))
        stream, low = (_launch.empty((len(tokens), size), self.real) for size in (self.model, self.low))
        self._embed(tokens, stream)
        for block, of_norm, (conv, ssm) in zip(self.blocks, eps, states, strict=False):
            products.in_projection(stream, block, of_norm, conv)
            products.x_projection(block, low)
            self._advance(block, ssm, products, low)
            products.out_projection(block, stream)
        products.head(stream, self.final_norm, eps[-1], self.head, logits)

    def _products(self, batch):
        if batch <= FEW or not self.fit_tiles:
            return _Few(self, batch)
        return _Tiles(self, batch) if batch < MANY or self.has_bias else _Many(self, batch)

    def _embed(self, tokens, stream):
        each = 4 if self.each > 1 and self.model % 4 == 0 and self.real.itemsize == 4 else 1
        kernel, batch = Kernel("decode", "embed", (self.storage, each)), len(tokens)
        blocks = -(-batch * -(-self.model // each) // THREADS)
        _launch.launch(kernel, blocks, tokens, self.embedding, stream, batch, self.model, self.vocabulary)

    def _advance(self, block, state, products, low):
        x, z, delta = products.x, products.z, products.delta
        batch, projected = len(x), delta is not None
        together = self.aligned_A and self.state % 4 == 0 and self.real.itemsize == 4 and _launch.aligned(4, state)
        key, channels, rows = _advance_plan(
            self.storage, x.dtype.name, self.of_A, self.of_D, state.dtype.name, self.state,
            0 if projected else self.rank, together, 1 if projected else self.each_dt, _rows(batch, self.inner),
            projected,
        )  # fmt: skip
        blocks = -(-batch // rows) * -(-self.inner // channels)
        _launch.launch(
            Kernel("decode", "advance", key), blocks, delta if projected else block[DT_PROJ], block[DT_BIAS],
            block[A_LOG], block[D], state, x, z, low, products.y, batch, self.inner, self.state, self.rank,
            z.strides[0] // z.itemsize,
        )  # fmt: skip


def _rows(batch, inner):
    """How many rows of the batch a thread of `advance` has: they share weights, but few threads leave memory idle."""
    return 1 if batch * inner < 64 * THREADS * _launch.processors() // 4 else 2


@functools.cache
def _advance_plan(storage, between, of_A, of_D, of_state, count, rank, together, each_dt, rows, projected):
    """The key of ``advance``, and the channels and rows of a block."""
    each = 4 if together else 1
    lanes = 4
    while lanes < 32 and 4 * lanes * each < count:
        lanes *= 2
    vectors = -(-count // (lanes * each))
    pieces = max(1, min(4, -(-rank // (lanes * each_dt))))
    exact = lanes * each * vectors == count
    key = (storage, between, of_A, of_D, of_state, lanes, each, vectors, exact, each_dt, pieces, rows, projected)
    return key, THREADS // lanes, rows


class Decoder:
    """Tokens of a batch of sequences, each drawn on the GPU and read in the next step: a step is one CUDA graph.

    The states are updated at their addresses, so they may be changed in place between steps, and must stay there;
    making a decoder leaves them as they are. ``count`` tokens of the vocabulary are drawn from, as ``sample`` does.
    """

    def __init__(self, weights, eps, states, count, temperature, top_k, top_p, min_p):
        batch = len(states[0][0])
        integers = _launch.empty((3, batch), np.dtype(np.int64))
        integers[...] = 0
        self._tokens, self._seeds, self._turns = integers

        def step():
            logits = _launch.empty((batch, weights.vocabulary), weights.real)
            weights.step(self._tokens, eps, states, logits)
            sample(logits, count, self._tokens, self._seeds, self._turns, temperature, top_k, top_p, min_p)

        before = [(conv.copy(), ssm.copy()) for conv, ssm in states]
        step()  # what is made at a first call is made
        self._graph = _graphs.Graph(step)
        for pair, kept in zip(states, before, strict=True):
            for state, value in zip(pair, kept, strict=True):
                state[...] = value

    def put(self, place, row):
        """A sequence whose last token, ``row.new[-1]``, is not read yet, and whose state is in its place."""
        self._tokens[place], self._seeds[place], self._turns[place] = row.new[-1], row.seed, 0

    def steps(self, count):
        """The next tokens (count, batch), in host memory; -1 where logits are NaN or infinite."""
        tokens = _launch.empty((count, len(self._tokens)), np.dtype(np.int64))
        for step in range(count):
            self._graph.launch()
            tokens[step] = self._tokens
        return _launch.to_host(tokens)
