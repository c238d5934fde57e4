"""sscan's language models in lm-evaluation-harness.

``python -m sscan.lm_eval`` is the command ``lm_eval``, with a model of the name sscan in its registry::

    pip install "sscan[lm-eval]"
    python -m sscan.lm_eval --model sscan --model_args pretrained=FOLDER --tasks lambada_openai

Importing this module is enough for programs that call ``lm_eval.simple_evaluate(model="sscan", ...)``.
"""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("lm_eval") is None:
    raise ModuleNotFoundError(
        'sscan.lm_eval needs lm-evaluation-harness, which is installed by: pip install "sscan[lm-eval]"', name="lm_eval"
    )

from itertools import groupby
from typing import TYPE_CHECKING, Any

import lm_eval.models  # noqa: F401  # which adds the harness' own names to the registry
import numpy as np
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from sscan.models.tokens import vocabulary_of
from sscan.nn import MambaLM
from sscan.nn.autodiff import to_numpy
from sscan.tasks.evaluation import evaluate
from sscan.tasks.task import PRECISIONS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sscan.models.states import States

END_OF_TEXT = "<|endoftext|>"
DEFAULT_LENGTH = 256  # of what is generated, where a task does not say


@register_model("sscan")
class Harness(TemplateLM):  # type: ignore[misc]
    """A model as the harness asks it.

    Parameters
    ----------
    pretrained, revision
        As of :meth:`sscan.nn.MambaLM.from_pretrained`.
    tokenizer : str, optional
        Where its ``tokenizer.json`` is, if not with the model.
    dtype : {"float32", "bfloat16"}
    device : str, optional
        "cuda", or "cuda:0", moves it to CuPy's current device. The harness says "cuda:0" if it is not told otherwise,
        so without CuPy that is the CPU.
    batch_size : int
        How many sequences are generated at once.
    max_batch_size : optional
        Is not looked at.
    """

    def __init__(
        self,
        pretrained: str,
        tokenizer: str | None = None,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: Any = None,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self.model = MambaLM.from_pretrained(pretrained, PRECISIONS[dtype], revision=revision)
        self.vocabulary = vocabulary_of(pretrained, self.model.config.vocab_size, tokenizer)
        self.batch_size = int(batch_size)
        if device is not None and device.startswith("cuda") and importlib.util.find_spec("cupy") is not None:
            import cupy

            self.model.to(cupy)

    @property
    def eot_token_id(self) -> int:
        """What stands in front of a text that nothing is in front of."""
        return self.vocabulary.token(END_OF_TEXT) or 0

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text."""
        return self.vocabulary.encode(string.encode())

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """log p of each continuation, and whether it is the greedy one; a context that several have is read once."""
        found = []
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm) as bar:
            for context, group in groupby(requests, key=lambda request: request[1]):
                first, states = self._read(context)
                for _, _, continuation in group:
                    found.append(self._score(first, states, continuation))
                    bar.update()
        return found

    def _read(self, context: list[int]) -> tuple[Any, States]:
        logits, states = self.model.prefill(np.array([context], np.int64), self.model.new_states(1))
        return to_numpy(logits), states

    def _score(self, first: Any, states: States, continuation: list[int]) -> tuple[float, bool]:
        logits = [first]
        if len(continuation) > 1:
            rest, _ = self.model.extend(np.array([continuation[:-1]], np.int64), states)
            logits.append(to_numpy(rest.data)[0])
        values = np.concatenate(logits).astype(np.float64)
        largest = values.max(1)
        normaliser = largest + np.log(np.exp(values - largest[:, None]).sum(1))
        chosen = values[np.arange(len(continuation)), continuation]
        return float((chosen - normaliser).sum()), bool((chosen == largest).all())

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, with the state carried along."""
        found = []
        for request in tqdm(requests, desc="texts", disable=disable_tqdm):
            ids = np.array([self.eot_token_id, *self.tok_encode(request.args[0])], np.int64)
            found.append(-evaluate(self.model, ids, np.ones_like(ids)).nats if ids.size > 1 else 0.0)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, up to one of the texts that end them."""
        found: list[str] = []
        for options, group in groupby([request.args for request in requests], key=lambda args: args[1]):
            contexts = [self.tok_encode(args[0]) or [self.eot_token_id] for args in group]
            stop, drawing = _options(options)
            made = self.model.generate(
                contexts, **drawing, stop=stop, tokenizer=self.vocabulary, eos=self.vocabulary.token(END_OF_TEXT),
                batch=self.batch_size, vocab_size=self.vocabulary.size,
            )  # fmt: skip
            for tokens in made:
                text = self.vocabulary.decode(tokens.tolist())
                found.append(text[: min((text.find(end) for end in stop if end in text), default=len(text))])
        return found


def _options(options: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Texts that end a generation, and the arguments of ``generate``, of what a task says."""
    given = dict(options)
    until = given.pop("until", None) or []
    drawing = {
        "max_new_tokens": given.pop("max_gen_toks", DEFAULT_LENGTH),
        "temperature": given.pop("temperature", 0.0),
    }
    if not given.pop("do_sample", drawing["temperature"] > 0):
        drawing["temperature"] = 0.0
    for name in ("top_k", "top_p", "min_p", "repetition_penalty", "seed"):
        if name in given:
            drawing[name] = given.pop(name)
    if given:
        raise ValueError(f"sscan: generation options {sorted(given)} are not known")
    return [until] if isinstance(until, str) else list(until), drawing


if __name__ == "__main__":
    cli_evaluate()
