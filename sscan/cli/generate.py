"""``sscan generate``: continue a text, or a recording."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sscan.cli._arguments import add_device, path, positive_float, positive_int
from sscan.cli._devices import array_module
from sscan.cli._failures import Mistake, mistakes
from sscan.cli._models import add_model, add_tokenizer, model_and_vocabulary
from sscan.cli._output import NOT_DRAWN, SAMPLE_TOKENS, TEMPERATURE, Continuations, text_writer

if TYPE_CHECKING:
    import argparse

END_OF_TEXT = "<|endoftext|>"  # of the tokenizers of GPT-2 and GPT-NeoX


def add_to(commands: Any) -> None:
    """Add the command to those that there are."""
    parser = commands.add_parser("generate", help="continue a prompt with a model")
    parser.set_defaults(command=_generate)
    add_model(parser)
    add_tokenizer(parser)
    add_device(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="text to continue (default: a line break)")
    source.add_argument("--prompt-file", type=path, metavar="FILE", help="file with it; - is standard input")
    source.add_argument(
        "stdin", nargs="?", choices=["-"], metavar="-", help="right behind MODEL: the prompt is standard input"
    )
    parser.add_argument(
        "-n", "--tokens", "--bytes", type=positive_int, help=f"tokens to generate ({SAMPLE_TOKENS}; of audio a second)"
    )
    parser.add_argument("--temperature", type=float, help=f"0 takes the most likely token ({TEMPERATURE}; of audio 1)")
    parser.add_argument("--out", type=path, metavar="FILE", help="of audio: the WAV to write; a PNG goes beside it")
    parser.add_argument("--seconds", type=positive_float, help="of audio: how much to generate, in place of -n")
    parser.add_argument("--top-k", type=int, help="choose among the k most likely tokens")
    parser.add_argument("--top-p", type=float, help="choose among the most likely tokens of joint probability p")
    parser.add_argument("--min-p", type=float, help="leave out tokens below this share of the largest probability")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 avoids what was said before")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--eos", metavar="TOKEN", help=f"special token that ends it ({END_OF_TEXT}, if there is one)")
    parser.add_argument("--samples", type=positive_int, default=1, help="continuations, one after the other")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (%(default)s)")


def _generate(options: argparse.Namespace) -> int:
    from sscan.tasks.audio import FILE

    if (Path(options.model) / FILE).exists():
        return _generate_audio(options)
    for name in ("out", "seconds"):
        if getattr(options, name) is not None:
            raise Mistake(f"--{name}: {options.model} is no model of audio")
    return _generate_text(options)


def _generate_audio(options: argparse.Namespace) -> int:
    """Continue a recording, or silence, and write it with its picture."""
    import numpy as np

    from sscan.nn import Sampler
    from sscan.tasks.audio import continued, open_audio_model
    from sscan.tasks.progress import Phase
    from sscan.tasks.recordings import SILENCE, compress, draw_spectrogram, expand, read_recording, write_recording
    from sscan.tasks.task import PRECISIONS

    for name in ("prompt", "stdin", "tokenizer", "stop"):
        if getattr(options, name):
            raise Mistake(f"{name}: {options.model} is a model of audio; --prompt-file takes a recording")
    if options.repetition_penalty != 1 or options.samples != 1:
        raise Mistake("--repetition-penalty, --samples: not for audio, of which one is made as likely as it is")
    if options.out is None or options.out.suffix != ".wav":
        raise Mistake(f"--out: must be a .wav to write, got {options.out}")
    if options.tokens is not None and options.seconds is not None:
        raise Mistake("--seconds: not beside -n, which is as good")
    picture = options.out.with_suffix(".png")
    xp = array_module(options.device)
    with mistakes():
        model, rate = open_audio_model(Path(options.model), PRECISIONS[options.dtype or "float32"])
        temperature = 1.0 if options.temperature is None else options.temperature
        sampler = Sampler(temperature, options.top_k, options.top_p, options.min_p, seed=options.seed)
        prompt = np.array([SILENCE], np.uint8)
        if options.prompt_file is not None:
            prompt = compress(read_recording(options.prompt_file, rate)[0])
    model.to(xp)
    count = options.tokens or round((options.seconds or 1.0) * rate)
    start = time.monotonic()
    with Phase("generating", sys.stderr) as phase:
        samples = expand(continued(model, prompt, count, sampler, phase))
    seconds = time.monotonic() - start
    write_recording(options.out, samples, rate)
    print(f"written     {options.out}: {samples.size / rate:.2f} s, the last {count / rate:.2f} of them generated")
    print(f"speed       {count / seconds:,.0f} samples/s, reading the prompt and compiling included")
    print(f"picture     {picture if draw_spectrogram(picture, samples, rate) else NOT_DRAWN}")
    return 0


def _generate_text(options: argparse.Namespace) -> int:
    from sscan.nn import Sampler

    temperature = TEMPERATURE if options.temperature is None else options.temperature
    tokens = options.tokens or SAMPLE_TOKENS
    drawing = (temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty)
    if options.samples * tokens >= 2**63:
        raise Mistake("--tokens and --samples: that is 2^63 tokens or more")
    prompt = _prompt(options)
    with mistakes():
        model, vocabulary = model_and_vocabulary(options)
        ids = vocabulary.encode(prompt)
        if not ids:
            raise Mistake("the prompt has no token to start from" + "; give --prompt" * (prompt == b"\n"))
        # What is wrong with them is said before anything is written.
        Sampler(*drawing, seed=options.seed)
        eos = vocabulary.token(options.eos or END_OF_TEXT)
        if options.eos is not None and eos is None:
            raise Mistake(f"--eos: the model's vocabulary has no special token {options.eos!r}")
        if not all(options.stop):
            raise Mistake("--stop: must not be an empty text")
    # A pipe or a file gets the bytes; a terminal, or a caller's own stream in its place, gets text.
    out = sys.stdout
    raw = not out.isatty() and out is sys.__stdout__
    stop = [text.encode() for text in options.stop]
    write = out.buffer.write if raw else text_writer(out)
    with Continuations(prompt, vocabulary.writer, write, options.samples * tokens, stop) as streamer:
        model.generate(
            [ids] * options.samples, tokens, *drawing, eos=eos, stop=options.stop,
            tokenizer=vocabulary, streamer=streamer, seed=options.seed, batch=1, vocab_size=vocabulary.size,
        )  # fmt: skip
    return 0


def _prompt(options: argparse.Namespace) -> bytes:
    name, file = "--prompt", options.prompt_file
    if options.stdin or str(file) == "-":
        name, prompt = "-", sys.stdin.buffer.read()
    elif file is not None:
        from sscan.models.files import check_readable

        with mistakes():
            check_readable(file)
            name, prompt = str(file), file.read_bytes()
    else:
        try:
            prompt = ("\n" if options.prompt is None else options.prompt).encode()
        except UnicodeEncodeError as error:  # Python's stand-ins for bytes that it could not decode
            raise Mistake("--prompt: not valid text in the encoding of this terminal") from error
    if not prompt:
        raise Mistake(f"{name}: one byte at least is needed to start from")
    return prompt
