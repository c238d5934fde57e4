"""``mamba_ssm.utils.generation``: decoding with the states in InferenceParams, on a GPU with a step as one graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from sscan.compat.mamba_ssm import InferenceParams

if TYPE_CHECKING:
    from collections.abc import Callable

Tensor = Any


@dataclass
class DecoderOnlyOutput:
    """What ``decode`` returns.

    Attributes
    ----------
    sequences : (batch, length)
        Prompt and continuation.
    scores : tuple of (batch, vocabulary), or None
        The logits that each new token was drawn from.
    """

    sequences: Tensor
    scores: Any = None


def sample(
    logits: Tensor, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0
) -> Tensor:  # fmt: skip
    """Tokens (batch,) drawn from logits (batch, vocabulary), where they lie.

    ``top_k=1`` takes the most likely; 0 leaves all. ``min_p`` leaves out what is below that share of the largest
    probability, and ``top_p`` (0 and 1 do nothing) what is not needed to reach p.
    """
    if top_k == 1:
        return logits.argmax(-1)
    if not 0 <= top_p <= 1:
        raise ValueError(f"sample: top_p must be in [0, 1], got {top_p}")
    logits = logits.float() / temperature
    if top_k > 0:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probabilities = logits.softmax(-1)
    if min_p > 0:
        probabilities = probabilities.where(probabilities >= min_p * probabilities.amax(-1, keepdim=True), 0)
    if 0 < top_p < 1:
        ordered, places = probabilities.sort(descending=True, stable=True)
        ordered = ordered / ordered.sum(-1, keepdim=True)
        ordered = ordered.where(ordered.cumsum(-1) - ordered < top_p, 0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, places, ordered)
    return probabilities.multinomial(1).squeeze(-1)


def _penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits of what was seen, divided by the penalty where they are positive and else multiplied with it."""
    scores = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(scores < 0, scores * penalty, scores / penalty))


@torch.inference_mode()  # type: ignore[untyped-decorator]
def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    streamer: Any = None,
) -> DecoderOnlyOutput:
    """Continue prompts of one length, (batch, length), up to ``max_length`` tokens with the prompt.

    It ends before if all rows draw ``eos_token_id`` at once. ``teacher_outputs`` (batch, some length) are taken as far
    as they reach, instead of drawing. ``vocab_size`` leaves out the logits from there on; those that pad the vocabulary
    of the model's configuration are never drawn. ``cg`` makes a step one CUDA
    graph, which is kept at the model for further calls; on the CPU it does nothing. ``streamer`` is one of
    transformers'. ``enable_timing`` prints how long it took.
    """
    if streamer is not None:
        streamer.put(input_ids.cpu())
    batch, length = input_ids.shape
    graph = None
    if cg and input_ids.is_cuda:
        model._decoding_cache = update_graph_cache(
            model, getattr(model, "_decoding_cache", None), batch, length, max_length
        )
        graph, params = model._decoding_cache.run, model._decoding_cache.inference_params
        params.reset(max_length, batch)
    else:
        params = InferenceParams(max_seqlen=max_length, max_batch_size=batch)
    clock = [torch.cuda.Event(enable_timing=True) for _ in "ab"] if enable_timing and input_ids.is_cuda else []
    if clock:
        clock[0].record()

    real = getattr(getattr(model, "config", None), "vocab_size", None)  # tokens; the other rows are padding
    scores: list[Tensor] = []
    tokens, sequences = input_ids, input_ids
    while True:
        if graph is not None and params.seqlen_offset > 0:
            logits = graph(tokens, tokens, params.seqlen_offset)
        else:
            logits = model(tokens, inference_params=params, num_last_tokens=1).logits
        logits = logits.squeeze(1)
        scores.append(logits[..., :vocab_size])
        params.seqlen_offset += tokens.shape[1]
        if teacher_outputs is not None and params.seqlen_offset < teacher_outputs.shape[1]:
            tokens = teacher_outputs[:, params.seqlen_offset, None]
        else:
            if repetition_penalty != 1:
                logits = _penalised(logits, sequences, repetition_penalty)
            tokens = sample(logits[..., :vocab_size][..., :real], top_k, top_p, min_p, temperature)[:, None]
        sequences = torch.cat([sequences, tokens], 1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        ended = eos_token_id is not None and bool((tokens == eos_token_id).all())
        if ended or params.seqlen_offset >= max_length - 1:
            break
    if streamer is not None:
        streamer.end()
    if clock:
        clock[1].record()
        torch.cuda.synchronize()
        print(f"Prompt processing + decoding time: {clock[0].elapsed_time(clock[1]):.0f}ms")  # noqa: T201  # as theirs
    return DecoderOnlyOutput(sequences, tuple(scores))


class GenerationMixin:
    """``generate`` of a model that takes ``inference_params`` and ``num_last_tokens``."""

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: Any = None) -> Any:
        """The states of all layers, by their numbers."""
        raise NotImplementedError

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The sequences, or with ``return_dict_in_generate`` what :func:`decode` returns, which takes the rest."""
        made = decode(input_ids, self, max_length, top_k, top_p, min_p, temperature, **kwargs)
        if not output_scores:
            made.scores = None
        return made if return_dict_in_generate else made.sequences


@dataclass
class DecodingCGCache:
    """Graphs of a step, the states that they update, and what they were made for."""

    max_batch_size: int = 0
    max_seqlen: int = 0
    device: Any = None
    dtype: Any = None
    callables: dict[tuple[int, int], Any] = field(default_factory=dict)
    mempool: Any = None
    inference_params: Any = None
    run: Callable[..., Tensor] | None = None


@torch.inference_mode()  # type: ignore[untyped-decorator]
def update_graph_cache(
    model: Any,
    cache: DecodingCGCache | None,
    batch_size: int,
    seqlen_og: int,
    max_seqlen: int,
    decoding_seqlens: tuple[int, ...] = (1,),
    dtype: Any = None,
    n_warmups: int = 2,
) -> DecodingCGCache:
    """A cache with graphs for this batch: the one that is given, if it fits, else a new one.

    ``dtype`` is that of the parameters; states are as :meth:`sscan.torch.Mamba.allocate_inference_cache` makes them,
    those of the scan in float32. They belong to one batch size, so another one begins anew.
    """
    parameter = next(iter(model.parameters()))
    made_for = (batch_size, parameter.device, parameter.dtype if dtype is None else dtype)
    if cache is None or (cache.max_batch_size, cache.device, cache.dtype) != made_for:
        cache = DecodingCGCache(batch_size, max_seqlen, *made_for[1:])
        cache.inference_params = InferenceParams(
            max_seqlen, batch_size, seqlen_og,
            key_value_memory_dict=model.allocate_inference_cache(batch_size, max_seqlen),
            lengths_per_sample=torch.full((batch_size,), seqlen_og, dtype=torch.int32, device=parameter.device),
        )  # fmt: skip
        cache.mempool = torch.cuda.graphs.graph_pool_handle()
    for length in decoding_seqlens:
        if (batch_size, length) not in cache.callables:
            cache.callables[batch_size, length] = capture_graph(
                model, cache.inference_params, batch_size, max_seqlen, length, cache.mempool, n_warmups
            )
    callables = cache.callables
    cache.run = lambda ids, position_ids, seqlen: callables[tuple(ids.shape)](ids, position_ids, seqlen)
    cache.inference_params.seqlen_offset = 0
    return cache


def capture_graph(
    model: Any,
    inference_params: InferenceParams,
    batch_size: int,
    max_seqlen: int,
    decoding_seqlen: int = 1,
    mempool: Any = None,
    n_warmups: int = 2,
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """A function of tokens (batch, decoding_seqlen), positions and an offset, neither of which matters: the logits."""
    device = next(iter(model.parameters())).device
    ids = torch.zeros((batch_size, decoding_seqlen), dtype=torch.long, device=device)
    before, inference_params.seqlen_offset = inference_params.seqlen_offset, max(max_seqlen - decoding_seqlen, 1)

    def step() -> Tensor:
        return model(ids, inference_params=inference_params, num_last_tokens=decoding_seqlen).logits

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(n_warmups):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=mempool):
        logits = step()
    inference_params.seqlen_offset = before

    def run(new_ids: Tensor, position_ids: Tensor, seqlen: int) -> Tensor:
        ids.copy_(new_ids)
        graph.replay()
        return logits.clone()

    return run
