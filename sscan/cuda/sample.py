"""The next token of each row of a batch, drawn on the GPU."""

from sscan.cuda import _launch
from sscan.cuda._launch import Kernel

THREADS = 1024
SHARPEST = 1e30  # one over the smallest temperature: what is not the largest has no mass


def sample(logits, count, tokens, seeds, turns, temperature, top_k, top_p, min_p):
    """Fill tokens (batch,) from logits (batch, vocabulary), float32, of which ``count`` are drawn from.

    tokens, seeds and turns are int64; a row draws the number of its seed and its turn, which goes up by one. At a
    temperature of 0 it is the largest logit. A row with a logit that is NaN or infinity gets -1.
    """
    (batch, vocabulary), drawn = logits.shape, temperature > 0
    top_k = top_k if drawn and top_k is not None and top_k < count else 0
    top_p = top_p if drawn and top_p is not None and top_p < 1 else 0.0
    key = (4 if _launch.aligned(4, logits) else 1, drawn, top_k > 0, top_p > 0)
    inverse = min(1 / temperature, SHARPEST) if drawn else 0.0
    _launch.launch(
        Kernel("sample", "sample", key), batch, logits, tokens, seeds, turns, vocabulary, count, _launch.bits(inverse),
        top_k, _launch.bits(top_p), _launch.bits(min_p or 0.0),
    )  # fmt: skip
