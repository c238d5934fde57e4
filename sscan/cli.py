"""The command ``sscan``: train models on texts, DNA or audio; continue, evaluate, score and convert; reproduce.

Results go to standard output; progress and errors go to standard error. Exit codes: 0, 1 for a failure that is not the
user's, 2 for a mistake in what was asked for, 128 + signal after an interruption.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import dataclasses
import errno
import itertools
import os
import platform
import signal
import sys
import time
import unicodedata
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import sscan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sscan.models.tokens import Vocabulary
    from sscan.nn import MambaLM
    from sscan.tasks.sequences import Record
    from sscan.tasks.task import RunOptions
    from sscan.tasks.training import TrainingRun

SAMPLE_TOKENS = 400
TEMPERATURE = 0.8  # of texts
END_OF_TEXT = "<|endoftext|>"  # of the tokenizers of GPT-2 and GPT-NeoX
NO_CURVE = 'not drawn, for want of matplotlib; it comes with: pip install "sscan[plot]"'


class Mistake(Exception):
    """Something the user asked for cannot be done; the message says what, in one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    if sys.stderr is None:  # closed by who started us
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        return _fail("sscan: standard output is closed", 1)
    name = "sscan"
    try:
        try:
            options = _parser().parse_args(arguments)
            name = f"sscan {options.name or ''}".rstrip()
            return options.command(options) or 0
        finally:
            _flush_notices()
            sys.stdout.flush()  # what there is no room for is noticed here, and not when Python has ended
    except Mistake as mistake:
        return _fail(f"{name}: {mistake}", 2)
    except KeyboardInterrupt:
        return _fail(f"{name}: interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output has left
        _discard(sys.stdout)
        return 128 + signal.SIGPIPE
    except OSError as error:
        _discard(sys.stdout)
        return _fail(f"{name}: {_os_error(error)}", 1)
    except FloatingPointError as error:
        return _fail(f"{name}: {error}", 1)
    except MemoryError as error:
        return _fail(f"{name}: not enough memory{f' ({error})' if str(error) else ''}", 1)


def _flush_notices() -> None:
    """Forget what there is no room for on standard error: a library's notice must not become our exit code."""
    try:
        sys.stderr.flush()
    except OSError:
        _discard(sys.stderr)


def _fail(line: str, code: int) -> int:
    """Say the line on standard error, if that takes it, and return the code."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)
    return code


def _discard(stream: TextIO) -> None:
    """Let what the stream still holds go nowhere, or Python would try again at its end."""
    with contextlib.suppress(OSError, ValueError):  # a stream of the caller's own has no number
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _os_error(error: OSError) -> str:
    """What went wrong with which file, in one line."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename is not None else reason


# Arguments


class _Parser(argparse.ArgumentParser):
    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file)  # argparse's own keeps to itself that there is no room for it

    def error(self, message: str) -> NoReturn:
        sys.exit(_fail(f"{self.prog}: {message} (try {self.prog} --help)", 2))


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def _number(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError
    return value


def _path(text: str) -> Path:
    if not text:  # which Path takes for the current folder
        raise ValueError
    return Path(text)


def _model(text: str) -> str:
    return str(_path(text)) and text


# What argparse calls them in "invalid ... value".
_positive_int.__name__, _positive_float.__name__ = "positive integer", "positive number"
_number.__name__ = "number"
_path.__name__ = _model.__name__ = "path"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sscan", description="Selective state space models (Mamba) in pure Python.")
    parser.add_argument("--version", action="version", version=f"sscan {sscan.__version__}")
    parser.set_defaults(command=lambda options: parser.print_help())
    commands = parser.add_subparsers(dest="name", metavar="command")
    _add_train(commands)
    _add_language_models(commands)
    _add_reproduce(commands)

    info = commands.add_parser("info", help="devices, versions, threads and cache folder")
    info.set_defaults(command=_info)
    return parser


def _add_train(commands: Any) -> None:
    """The commands that train a model: on texts, DNA, species, or audio."""
    from sscan.tasks.dna import DNAOptions
    from sscan.tasks.species import SpeciesOptions
    from sscan.tasks.task import RunOptions

    train = commands.add_parser("train", help="train a language model on texts, by bytes or tokens, or on DNA")
    train.set_defaults(command=_train)
    train.add_argument(
        "--text", type=_path, nargs="+", metavar="FILE",
        help="texts, or folders of them, which are joined (default: pydoc_data/topics.py of this Python)",
    )  # fmt: skip
    train.add_argument(
        "--tokenizer", type=_model, metavar="FILE",
        help="tokenizer.json, or a folder or name on the hub that has one (default: tokens are bytes)",
    )  # fmt: skip
    _add_run_options(train, RunOptions(), "bits per byte are")
    # What they do not get, the options in front of their names keep.
    tasks = train.add_subparsers(dest="task", metavar="task", help="what else to train on (default: texts)")
    dna = tasks.add_parser("dna", help="FASTA files, base by base", argument_default=argparse.SUPPRESS)
    dna.add_argument("fasta", type=_path, nargs="*", default=[], metavar="FASTA", help="plain or compressed")
    _add_run_options(dna, DNAOptions(), "bits per base are")
    dna.add_argument(
        "--length-warmup", type=_number, metavar="EPOCHS",
        help=f"at 1024 bases, at twice as many, ... below the length (default {DNAOptions.length_warmup:g})",
    )  # fmt: skip
    dna.add_argument(
        "--held-out", nargs="+", metavar="RECORD", help="records to hold out (default: the last tenth of each)"
    )
    dna.add_argument(
        "--one-strand", action="store_const", const=False, dest="reverse_complement", help="read forward only"
    )
    dna.add_argument(
        "--model", choices=["mamba", "transformer"],
        help="a Transformer has the parameters of a Mamba of twice the blocks (default mamba)",
    )  # fmt: skip
    species = tasks.add_parser(
        "species", help="alignments in MAF: which species is a window of?", argument_default=argparse.SUPPRESS
    )
    species.add_argument("maf", type=_path, nargs="*", default=[], metavar="MAF", help="plain or compressed")
    _add_run_options(species, SpeciesOptions(), "share of mistakes is")
    species.add_argument("--from", type=_model, dest="pretrained", metavar="MODEL", help="folder of `sscan train dna`")
    species.add_argument("--species", nargs="+", metavar="NAME", help="to tell apart (default: all in the alignment)")
    _add_audio(tasks)


def _add_audio(tasks: Any) -> None:
    """The command that trains on audio."""
    from sscan.tasks.audio import BLOCKS, AudioOptions

    audio = tasks.add_parser("audio", help="WAV and FLAC files", argument_default=argparse.SUPPRESS)
    audio.add_argument(
        "recordings", type=_path, nargs="*", default=[], metavar="FILE", help="WAV or FLAC, or folders of them"
    )
    default = AudioOptions()
    _add_run_options(audio, default, "bits per sample are")
    audio.add_argument("--rate", type=_positive_int, metavar="HZ", help="resample to it (default: that of the files)")
    audio.add_argument("--block", choices=BLOCKS, help=f"what the stages repeat (default {default.block})")
    audio.add_argument("--centre", choices=BLOCKS, help="in the middle stage (default: the same)")
    audio.add_argument("--pool", type=_positive_int, help=f"of each of the two poolings (default {default.pool})")


def _add_run_options(parser: argparse.ArgumentParser, default: RunOptions, target: str) -> None:
    """The options that every task has."""
    from sscan.tasks.task import PRECISIONS

    parser.add_argument("--out", type=_path, metavar="DIR", help="checkpoint folder; default: a new one in runs/")
    parser.add_argument("--resume", type=_path, metavar="DIR", help="continue the run in this folder")
    length = parser.add_mutually_exclusive_group()
    minutes, steps = (
        "" if value is None else f" (default {value:g})" for value in (default.minutes, default.steps)
    )  # fmt: skip
    length.add_argument("--minutes", type=_positive_float, help=f"time to train for{minutes}")
    length.add_argument("--steps", type=_positive_int, help=f"number of steps to train for{steps}")
    numbers: list[tuple[str, Callable[[str], float], str]] = [
        ("d_model", _positive_int, "width of the model"),
        ("n_layer", _positive_int, "number of blocks"),
        ("length", _positive_int, "tokens per training window"),
        ("batch", _positive_int, "windows per step"),
        ("lr", _positive_float, "highest learning rate"),
        ("seed", int, "of initial values and windows"),
        ("evaluations", _positive_int, "times that the held-out loss is measured on the way"),
    ]
    for name, kind, text in numbers:
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, help=f"{text} (default {getattr(default, name):g})")
    parser.add_argument(
        "--target", type=_positive_float, metavar="GOAL", help=f"stop when the held-out {target} so few"
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, help=f"of activations and matrix products (default {default.precision})"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="where to train (default cpu)",
        default=argparse.SUPPRESS if parser.argument_default is argparse.SUPPRESS else "cpu",
    )  # fmt: skip


def _add_language_models(commands: Any) -> None:
    """The commands for models that are there: generate, evaluate, score, convert."""
    from sscan.tasks.task import PRECISIONS

    generate = commands.add_parser("generate", help="continue a prompt with a model")
    evaluate = commands.add_parser("evaluate", help="measure how well a model predicts a text")
    score = commands.add_parser("score", help="say how likely each base of DNA is, or what variants do to that")
    convert = commands.add_parser("convert", help="write a model in the format of the original or of transformers")
    for command, function in (
        (generate, _generate), (evaluate, _evaluate), (score, _score), (convert, _convert),
    ):  # fmt: skip
        command.set_defaults(command=function)
        command.add_argument(
            "model", type=_model, metavar="MODEL", help="folder of a model or of a run, or its name on the hub"
        )
        command.add_argument("--dtype", choices=PRECISIONS, help="of the parameters (default float32)")
    for command in (generate, evaluate):
        command.add_argument(
            "--tokenizer", type=_model, metavar="FILE",
            help="tokenizer.json, or a folder or name on the hub that has one (default: the model's; else tokens are "
            "bytes, or bases if there are 12)",
        )  # fmt: skip
    for command in (generate, evaluate, score):
        command.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default %(default)s)")

    source = generate.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="text to continue (default: a line break)")
    source.add_argument("--prompt-file", type=_path, metavar="FILE", help="file with it; - is standard input")
    source.add_argument(
        "stdin", nargs="?", choices=["-"], metavar="-", help="right behind MODEL: the prompt is standard input"
    )
    generate.add_argument(
        "-n", "--tokens", "--bytes", type=_positive_int, help=f"tokens to generate ({SAMPLE_TOKENS}; of audio a second)"
    )
    generate.add_argument(
        "--temperature", type=float, help=f"0 takes the most likely token ({TEMPERATURE}; of audio 1)"
    )
    generate.add_argument("--out", type=_path, metavar="FILE", help="of audio: the WAV to write; a PNG goes beside it")
    generate.add_argument("--seconds", type=_positive_float, help="of audio: how much to generate, in place of -n")
    generate.add_argument("--top-k", type=int, help="choose among the k most likely tokens")
    generate.add_argument("--top-p", type=float, help="choose among the most likely tokens of joint probability p")
    generate.add_argument("--min-p", type=float, help="leave out tokens below this share of the largest probability")
    generate.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 avoids what was said before")
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable"
    )
    generate.add_argument(
        "--eos", default=END_OF_TEXT, metavar="TOKEN", help="special token that ends it (%(default)s)"
    )
    generate.add_argument("--samples", type=_positive_int, default=1, help="continuations, one after the other")
    generate.add_argument("--seed", type=int, default=0, help="of the random choices (%(default)s)")

    evaluate.add_argument("--text", type=_path, metavar="FILE", required=True, help="text to predict")
    evaluate.add_argument(
        "--window", type=_positive_int, metavar="N",
        help="cut it into windows of N tokens, whose second halves count (default: carry the state along)",
    )  # fmt: skip
    evaluate.add_argument(
        "--stride", type=_positive_int, metavar="N", help="let windows begin every N tokens; the last N count"
    )

    score.set_defaults(tokenizer=None)
    score.add_argument("fasta", type=_path, metavar="FASTA", help="plain or compressed")
    score.add_argument(
        "--variant", action="append", default=[], metavar="RECORD:POS:REF:ALT",
        help="log p(ALT) - log p(REF) in place of every base's log p; positions begin with 1; repeatable",
    )  # fmt: skip
    score.add_argument(
        "--context", type=_positive_int, default=1024, metavar="N",
        help="letters that are read before and behind a variant (default %(default)s)",
    )  # fmt: skip
    score.add_argument("--both-strands", action="store_true", help="the mean of both strands, for variants")

    convert.add_argument("folder", type=_path, metavar="FOLDER", help="where to write it")
    convert.add_argument("--format", choices=["original", "transformers"], default="transformers")
    convert.add_argument(
        "--pickle", action="store_true", help="write pytorch_model.bin, which mamba_ssm reads; takes PyTorch"
    )


def _add_reproduce(commands: Any) -> None:
    """The command that runs the paper's experiments."""
    from sscan.tasks.tables import SCALES, TABLES

    reproduce = commands.add_parser("reproduce", help="run a table of the paper, and show its numbers beside ours")
    reproduce.set_defaults(command=_reproduce)
    reproduce.add_argument("table", choices=list(TABLES), metavar="TABLE", help=", ".join(TABLES))
    reproduce.add_argument("--rows", nargs="+", metavar="ROW", default=[], help="those to run, in this order (all)")
    reproduce.add_argument("--scale", choices=SCALES, default=SCALES[0], help="(default %(default)s)")
    reproduce.add_argument(
        "--generators", nargs="+", metavar="NAME", default=[],
        help="how the data are made where the paper does not say it: " + "; ".join(
            f"{name} {', '.join(table.generators)}" for name, table in TABLES.items() if len(table.generators) > 1
        ) + " (default: the first)",
    )  # fmt: skip
    reproduce.add_argument(
        "--lr", type=_positive_float, nargs="+", metavar="RATE", default=[],
        help="highest learning rates, of which the best is shown for each row (default: the row's own)",
    )  # fmt: skip
    reproduce.add_argument("--seeds", type=int, nargs="+", metavar="SEED", default=[0], help="(default 0)")
    reproduce.add_argument("--steps", type=_positive_int, help="of every run, instead of the scale's")
    reproduce.add_argument(
        "--text", type=_path, nargs="+", metavar="FILE", help="for table6 to table10, as for sscan train"
    )
    reproduce.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default %(default)s)")
    reproduce.add_argument("--at-once", type=_positive_int, default=1, metavar="N", help="runs (default %(default)s)")
    reproduce.add_argument(
        "--minutes", type=_positive_float, help="stop after so many in all; the same command goes on then"
    )
    reproduce.add_argument(
        "--out", type=_path, metavar="DIR", default=Path("runs", "reproduce"), help="(default %(default)s)"
    )


@contextlib.contextmanager
def _mistakes() -> Iterator[None]:
    """Report what goes wrong inside, while reading what the user named, as the user's mistake."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Mistake(_os_error(error)) from error
    except (TypeError, ValueError, OverflowError) as error:
        raise Mistake(" ".join(str(error).split())) from error


# sscan train


def _train(options: argparse.Namespace) -> int:
    with _mistakes():
        run, folder = _open_run(options)
    return _train_and_report(run, folder, options)


def _array_module(device: str) -> Any:
    """The array library that computes on the device."""
    import numpy as np

    try:
        return np if device == "cpu" else _cupy_with_gpu()
    except Mistake as mistake:
        raise Mistake(f"--device {device}: {mistake}") from mistake


def _train_and_report(run: TrainingRun[Any], folder: Path, options: argparse.Namespace) -> int:
    _describe(run, options.device)
    try:
        interrupted = _train_until_done(run, folder)
    except FloatingPointError as error:  # of the learning rate that was asked for
        raise Mistake(str(error)) from error
    checkpoint = f"checkpoint  {folder}: {len(run.losses):,} steps in {run.seconds:.0f} s"
    if interrupted:
        again = f"sscan train {options.task} --resume" if options.task else "sscan train --resume"
        where = "" if options.device == "cpu" else f" --device {options.device}"
        try:
            print(checkpoint, flush=True)
        except OSError:  # the terminal was closed; the signal says more than this does
            _discard(sys.stdout)
        return _fail(f"sscan train: stopped; continue with: {again} {folder}{where}", 128 + interrupted)
    print(checkpoint)
    if options.device == "cuda":
        free, total = _cupy_with_gpu().cuda.runtime.memGetInfo()
        print(f"memory      {(total - free) / 2**30:.1f} GiB of the GPU are taken, by whatever is on it")
    _report(run, folder)
    return 0


def _describe(run: TrainingRun[Any], device: str) -> None:
    """Say what is trained on what."""
    from sscan.nn import MambaLM

    task, options = run.task, run.options
    for title, line in task.described().items():
        print(f"{title:<12}{line}")
    kind = "Mamba blocks" if isinstance(run.model, MambaLM) else task.layers_are
    print(
        f"model       {run.model.parameter_count():,} parameters in {options.n_layer} {kind} of width "
        f"{options.d_model}, {options.batch} windows of {options.length} {task.tokens_are} a step"
    )
    print(f"device      {device}, {options.precision}")


def _report(run: TrainingRun[Any], folder: Path) -> None:
    """Say what a run has come to: held-out results, beside those of simpler models, and a sample."""
    from sscan.nn import MambaLM
    from sscan.tasks.loop import BEST_FOLDER
    from sscan.tasks.progress import Bar, draw_loss_curve

    task, model = run.task, run.model
    with Bar("held out", sys.stderr) as bar:
        results = task.compared(model, bar)
    print("held out    " + ", ".join(f"{name} {value:.3f}" for name, value in results.items()) + f" {task.goal_is}")
    if run.best is not None:
        step, goal = run.best
        print(
            f"best        {folder / BEST_FOLDER}: {goal:.3f} {task.goal_is} of some held-out windows, at step {step:,}"
        )
    drawn = draw_loss_curve(folder / "loss.png", run, results)
    print(f"curve       {folder / 'loss.png' if drawn else NO_CURVE}")
    prompt = task.prompt()
    if prompt is None or not isinstance(model, MambaLM):
        return
    print(
        f"sample      {SAMPLE_TOKENS} {task.tokens_are}, decoded with a state of constant size, "
        f"after {prompt.size} held-out ones:\n"
    )
    text = b"".join(map(task.vocabulary.writer(), prompt.tolist()))
    with _Continuations(text, task.vocabulary.writer, _text_writer(sys.stdout)) as streamer:
        model.generate(prompt, SAMPLE_TOKENS, temperature=0.8, streamer=streamer, vocab_size=task.vocabulary.size)


def _open_run(options: argparse.Namespace) -> tuple[TrainingRun[Any], Path]:
    """The run to continue, or a new one, and its folder."""
    from sscan.tasks.training import STATE_FILE, TrainingRun

    task, data = _task_and_data(options)
    given = {f.name: getattr(options, f.name, None) for f in dataclasses.fields(task.Options)}
    given = {name: tuple(x) if isinstance(x, list) else x for name, x in given.items() if x is not None}
    array_module = _array_module(options.device)
    if "minutes" in given:
        given["steps"] = None
    if options.resume is not None:
        if options.out is not None:
            raise Mistake("--out: a resumed run stays in the folder of --resume")
        run = TrainingRun.load(options.resume, task, array_module, given, **data)
        return run, _prepared(options.resume)
    files, *_ = data.values()
    if not files:
        raise Mistake(f"{task.name}: files to train on must be named")
    run = TrainingRun(task(task.Options(**given), **data), array_module)
    folder = options.out or _new_folder((options.text or files)[0].resolve().stem)
    if (folder / STATE_FILE).exists():
        raise Mistake(f"{folder} holds a run already; continue it with --resume {folder}, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    return run, _prepared(folder)


def _task_and_data(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The task that was named, and what it is given beside options, files first."""
    from sscan.models.pretrained import open_model
    from sscan.models.tokens import tokenizer_file
    from sscan.tasks.audio import Audio
    from sscan.tasks.dna import DNA, TRANSFORMER
    from sscan.tasks.recordings import SUFFIXES
    from sscan.tasks.species import Species
    from sscan.tasks.text import Text, text_files

    new = options.resume is None
    if options.task is None:
        texts = None if options.text is None else text_files(options.text)
        tokenizer = None if options.tokenizer is None else tokenizer_file(options.tokenizer)
        return Text, {"texts": texts or ([_default_text()] if new else None), "tokenizer": tokenizer}
    for name in ("text", "tokenizer"):
        if getattr(options, name) is not None:
            raise Mistake(f"--{name}: {options.task} is of no text")
    if options.task == "dna":
        options.layers = TRANSFORMER if getattr(options, "model", None) == "transformer" else None
        return DNA, {"fasta": options.fasta}
    if options.task == "audio":
        return Audio, {"recordings": text_files(options.recordings, SUFFIXES), "rate": getattr(options, "rate", None)}
    pretrained = getattr(options, "pretrained", None)
    if pretrained is None:
        return Species, {"maf": options.maf}
    if not new:
        raise Mistake("--from: a resumed run has its model")
    with open_model(pretrained) as (config, _):
        options.d_model, options.n_layer = options.d_model or config.d_model, options.n_layer or config.n_layer
    return Species, {"maf": options.maf, "pretrained": Path(pretrained)}


def _prepared(folder: Path) -> Path:
    """The folder, which then can be written to, without what a run that was killed left there."""
    from sscan.models.files import remove_leftovers
    from sscan.tasks.loop import BEST_FOLDER

    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    remove_leftovers(folder)
    remove_leftovers(folder / BEST_FOLDER)
    return folder


def _default_text() -> Path:
    """A real English text that every CPython carries: the language reference behind help()."""
    from pydoc_data import topics

    return Path(topics.__file__)


def _new_folder(name: str) -> Path:
    numbers = (i for i in range(1, sys.maxsize) if not Path("runs", f"{name}-{i}").exists())
    return Path("runs", f"{name}-{next(numbers)}")


def _train_until_done(run: TrainingRun[Any], folder: Path) -> int:
    """Train and save; the number of the signal that stopped it early, or 0."""
    from sscan.tasks.loop import train

    start = time.monotonic()
    run.warm_up()
    with _stop_requests() as received:
        print(f"kernels     ready after {time.monotonic() - start:.1f} s", flush=True)
        train(run, folder, sys.stderr, stop=received)
    return received[0] if received else 0


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP, so that the step under way can end; a second one acts at once.

    Except SIGHUP: when a terminal is closed it may come from the kernel and from the shell, so after the first it is
    ignored. What our parent has us ignore, as nohup does with SIGHUP, stays ignored.
    """
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        if number != signal.SIGHUP:
            signal.signal(number, before[number])

    before: dict[int, Any] = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            gone = number == signal.SIGHUP and number in received
            signal.signal(number, signal.SIG_IGN if gone else handler)


# sscan reproduce


def _reproduce(options: argparse.Namespace) -> int:
    from sscan.tasks.reproduce import Until, jobs, results, run_all
    from sscan.tasks.tables import TABLES
    from sscan.tasks.text import text_files

    table, out = TABLES[options.table], options.out
    with _mistakes():
        if options.text is not None and not table.of_texts:
            raise Mistake(f"--text: {table.name} is of no text")
        changes = {} if options.steps is None else {"steps": options.steps}
        wanted = jobs(table, options.scale, options.rows, options.generators, options.lr, options.seeds, changes)
        texts = text_files(options.text or [_default_text()]) if table.of_texts else []
        out.mkdir(parents=True, exist_ok=True)
        finished = [result for result in results(out, table, options.scale) if result["finished"]]
        todo = [job for job in wanted if not any(job.is_of(result, texts) for result in finished)]
        array_module = _array_module(options.device)
    print(f"{table.title}, {options.scale}: {len(todo)} of {len(wanted)} runs to do", file=sys.stderr, flush=True)
    with _stop_requests() as received:
        stop = Until(options.minutes, received)
        failures = run_all(todo, out, array_module, texts, options.at_once, stop, sys.stderr)
    _show(options, failures)
    left = [result["name"] for result in results(out, table, options.scale) if not result["finished"]]
    if received:
        return _fail("sscan reproduce: stopped; the same command goes on", 128 + received[0])
    for name, reason in failures.items():
        _fail(f"sscan reproduce: {name}: {reason}", 1)
    if left:
        print(f"not finished, and goes on with the same command: {', '.join(left)}", file=sys.stderr)
    return 1 if failures else 0


def _show(options: argparse.Namespace, failures: dict[str, str]) -> None:
    """Print and draw what there is of a table."""
    from sscan.tasks.report import draw, markdown
    from sscan.tasks.reproduce import results
    from sscan.tasks.tables import TABLES

    table = TABLES[options.table]
    found = results(options.out, table, options.scale)
    print(markdown(table, found, failures), flush=True)
    picture = options.out / f"{table.name}-{options.scale}.png"
    print(f"picture     {picture if draw(table, found, picture) else NO_CURVE}")


# sscan generate, evaluate, convert


def _open_model(options: argparse.Namespace) -> tuple[MambaLM, Vocabulary]:
    """The model, where it is to compute, and what its tokens mean."""
    from sscan.models.tokens import vocabulary_of
    from sscan.nn import MambaLM
    from sscan.tasks.audio import FILE
    from sscan.tasks.species import NAMES_FILE
    from sscan.tasks.task import PRECISIONS

    xp = _array_module(options.device)
    if (Path(options.model) / NAMES_FILE).exists():
        raise Mistake(f"{options.model} tells species apart, and continues nothing")
    if (Path(options.model) / FILE).exists():
        raise Mistake(f"{options.model} is a model of audio, which sscan generate alone can use")
    model = MambaLM.from_pretrained(options.model, PRECISIONS[options.dtype or "float32"])
    vocabulary = vocabulary_of(options.model, model.config.vocab_size, options.tokenizer)
    model.to(xp)
    return model, vocabulary


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
    from sscan.tasks.progress import Bar
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
    xp = _array_module(options.device)
    with _mistakes():
        model, rate = open_audio_model(Path(options.model), PRECISIONS[options.dtype or "float32"])
        temperature = 1.0 if options.temperature is None else options.temperature
        sampler = Sampler(temperature, options.top_k, options.top_p, options.min_p, seed=options.seed)
        prompt = np.array([SILENCE], np.uint8)
        if options.prompt_file is not None:
            prompt = compress(read_recording(options.prompt_file, rate)[0])
    model.to(xp)
    count = options.tokens or round((options.seconds or 1.0) * rate)
    start = time.monotonic()
    with Bar("generating", sys.stderr) as bar:
        samples = expand(continued(model, prompt, count, sampler, bar))
    seconds = time.monotonic() - start
    write_recording(options.out, samples, rate)
    print(f"written     {options.out}: {samples.size / rate:.2f} s, the last {count / rate:.2f} of them generated")
    print(f"speed       {count / seconds:,.0f} samples/s, reading the prompt and compiling included")
    print(f"picture     {picture if draw_spectrogram(picture, samples, rate) else NO_CURVE}")
    return 0


def _generate_text(options: argparse.Namespace) -> int:
    from sscan.nn import Sampler
    from sscan.tasks.progress import Bar

    temperature = TEMPERATURE if options.temperature is None else options.temperature
    tokens = options.tokens or SAMPLE_TOKENS
    drawing = (temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty)
    prompt = _prompt(options)
    with _mistakes():
        model, vocabulary = _open_model(options)
        ids = vocabulary.encode(prompt)
        if not ids:
            raise Mistake("the prompt has no token to start from")
        # What is wrong with them is said before anything is written.
        Sampler(*drawing, seed=options.seed)
        if not all(options.stop):
            raise Mistake("--stop: must not be an empty text")
    # A pipe or a file gets the bytes; a terminal, or a caller's own stream in its place, gets text.
    out = sys.stdout
    raw = not out.isatty() and out is sys.__stdout__
    stop = [text.encode() for text in options.stop]
    said = itertools.count(1)
    with (
        Bar("generating", sys.stderr, hidden=out.isatty()) as bar,  # where the text can be watched
        _Continuations(prompt, vocabulary.writer, out.buffer.write if raw else _text_writer(out), stop) as write,
    ):

        def streamer(sample: int, token: int) -> None:
            write(sample, token)
            bar(next(said) / (options.samples * tokens))

        model.generate(
            [ids] * options.samples, tokens, *drawing, eos=vocabulary.token(options.eos), stop=options.stop,
            tokenizer=vocabulary, streamer=streamer, seed=options.seed, batch=1, vocab_size=vocabulary.size,
        )  # fmt: skip
    return 0


def _prompt(options: argparse.Namespace) -> bytes:
    name, file = "--prompt", options.prompt_file
    if options.stdin or str(file) == "-":
        name, prompt = "-", sys.stdin.buffer.read()
    elif file is not None:
        from sscan.models.files import check_readable

        with _mistakes():
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


class _Continuations:
    """Writes the prompt and what is generated behind it, as soon as it is known, for one sample after the other.

    What may be the beginning of a text that ends it is held back until it is known not to be.
    """

    def __init__(
        self, prompt: bytes, writer: Callable[[], Callable[[int], bytes]], write: Callable[[bytes], object],
        stop: Sequence[bytes] = (),
    ) -> None:  # fmt: skip
        self.prompt, self.writer, self.write, self.stop = prompt, writer, write, stop
        self.sample, self.held = 0, b""

    def __enter__(self) -> _Continuations:
        self._begin()
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is None:
            self._end()

    def __call__(self, sample: int, token: int) -> None:
        """The next token of a sample."""
        if sample != self.sample:
            self._end()
            self.sample = sample
            self._put(b"\n")
            self._begin()
        self.held += self.to_bytes(token)
        ends = [self.held.find(text) for text in self.stop if text in self.held]
        if ends:
            self.held = self.held[: min(ends)]
            return
        kept = max((n for text in self.stop for n in range(1, len(text)) if self.held.endswith(text[:n])), default=0)
        self._put(self.held[: len(self.held) - kept])
        self.held = self.held[len(self.held) - kept :]

    def _begin(self) -> None:
        self.to_bytes = self.writer()
        self._put(self.prompt)

    def _end(self) -> None:
        self._put(self.held + b"\n")
        self.held = b""

    def _put(self, part: bytes) -> None:
        self.write(part)
        sys.stdout.flush()


def _evaluate(options: argparse.Namespace) -> int:
    from sscan.tasks.evaluation import evaluate
    from sscan.tasks.progress import Bar
    from sscan.tasks.text import read_text

    with _mistakes():
        model, vocabulary = _open_model(options)
        ids, sizes = vocabulary.encode_sized(read_text(options.text).tobytes())
        with Bar("evaluating", sys.stderr) as bar:
            result = evaluate(model, ids, sizes, options.window, options.stride, bar)
    how = "the state carried along"
    if options.window is not None:
        how = f"windows of {options.window}" + (f" every {options.stride}" if options.stride else ", second halves")
    print(f"text        {options.text}: {sizes.sum():,} bytes, {ids.size:,} tokens")
    print(f"counted     {result.tokens:,} tokens, {result.bytes:,} bytes; {how}")
    print(f"nats        {result.nats_a_token:.4f} a token")
    print(f"perplexity  {result.perplexity:.4f}")
    print(f"bits        {result.bits_a_byte:.4f} a byte")
    return 0


def _score(options: argparse.Namespace) -> int:
    from sscan.models.tokens import Bases
    from sscan.tasks.scoring import Variant
    from sscan.tasks.sequences import read_fasta

    with _mistakes():
        if options.both_strands and not options.variant:
            raise Mistake("--both-strands: goes with --variant")
        variants = [Variant.parse(text) for text in options.variant]
        model, vocabulary = _open_model(options)
        if not isinstance(vocabulary, Bases):
            raise Mistake(f"{options.model}: a model of DNA has {Bases.size} tokens, this one {vocabulary.size}")
        records = {record.name: record for record in read_fasta(options.fasta)}
        pairs = []
        for variant in variants:
            if variant.record not in records:
                raise Mistake(f"{variant}: {options.fasta} has no record {variant.record}")
            pairs.append((variant, *variant.both(records[variant.record], options.context)))
    if variants:
        _score_variants(model, pairs, both_strands=options.both_strands)
    else:
        _score_bases(model, list(records.values()))
    return 0


def _score_variants(model: MambaLM, pairs: list[Any], *, both_strands: bool) -> None:
    """Print the log-likelihood ratio of each variant."""
    from sscan.tasks.scoring import log_likelihood_ratio

    print("record", "position", "ref", "alt", "log_likelihood_ratio", sep="\t")
    for variant, ref, alt in pairs:
        ratio = log_likelihood_ratio(model, ref, alt, both_strands=both_strands)
        print(variant.record, variant.position, variant.ref, variant.alt, f"{ratio:.4f}", sep="\t", flush=True)


def _score_bases(model: MambaLM, records: list[Record]) -> None:
    """Print log p of every letter but the first of each record; and on standard error what it comes to."""
    from sscan.tasks.evaluation import Evaluation
    from sscan.tasks.scoring import log_likelihoods
    from sscan.tasks.sequences import BASES, is_base

    nats, bases = 0.0, 0
    print("record", "position", "base", "log_likelihood", sep="\t")
    for record in records:
        at = 1
        for part in log_likelihoods(model, record.tokens):
            tokens = record.tokens[at : at + part.size]
            for i, (letter, value) in enumerate(zip(BASES.decode(tokens.tolist()), part.tolist(), strict=True), at + 1):
                sys.stdout.write(f"{record.name}\t{i}\t{letter}\t{value:.4f}\n")
            counts = is_base(tokens)
            nats, bases, at = nats - float(part[counts].sum()), bases + int(counts.sum()), at + part.size
    if bases:
        found = Evaluation(nats, bases, bases)
        line = f"{found.bits_a_byte:.4f} bits a base, perplexity {found.perplexity:.4f}"
        print(f"{bases:,} bases of {len(records):,} records: {line}", file=sys.stderr)


def _convert(options: argparse.Namespace) -> int:
    from sscan.models.pretrained import convert
    from sscan.tasks.task import PRECISIONS

    with _mistakes():
        dtype = None if options.dtype is None else PRECISIONS[options.dtype]
        names = convert(options.model, options.folder, options.format, dtype, pickled=options.pickle)
    print(f"written     {options.folder}: {', '.join(names)}")
    return 0


def _text_writer(stream: TextIO) -> Callable[[bytes], object]:
    """Writes bytes as text, each character when it is complete; a terminal shows control characters and obeys none."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    encoding, is_terminal = stream.encoding or "utf-8", stream.isatty()

    def write(data: bytes) -> None:
        text = decoder.decode(data)
        if is_terminal:
            text = "".join(map(_visible, text))
        stream.write(text.encode(encoding, "replace").decode(encoding))

    return write


def _visible(character: str) -> str:
    r"""The character, or for one that would move the cursor, ring or change colours, its number as in ``\x1b``."""
    is_control = unicodedata.category(character) == "Cc" and character not in "\n\t"
    return f"\\x{ord(character):02x}" if is_control else character


# sscan info


def _info(options: argparse.Namespace) -> int:
    from sscan.cpu import _parallel

    print(f"sscan       {sscan.__version__}, Python {platform.python_version()}, {platform.platform()}")
    for title, names in [
        ("needs", ["numpy", "numba", "llvmlite", "scipy", "ml_dtypes", "safetensors"]),
        ("works with", ["torch", "jax", "cupy", "numba-cuda"]),
    ]:
        print(f"{title:<12}" + ", ".join(f"{name} {_version(name)}" for name in names))
    print(f"CPU         {os.cpu_count()} cores, {_parallel.threads()} threads (NUMBA_NUM_THREADS)")
    print("threading   kernels release the GIL and run on sscan's own Python threads; no Numba threading layer")
    print(f"cache       {_parallel.cache_folder() or 'none'} (NUMBA_CACHE_DIR)")
    for title, line in zip(itertools.chain(["CUDA"], itertools.repeat("")), _gpus(), strict=False):
        print(f"{title:<12}{line}")
    return 0


def _version(name: str) -> str:
    candidates = [name, "cupy-cuda13x", "cupy-cuda12x"] if name == "cupy" else [name]
    for candidate in candidates:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(candidate)
    return "-"


def _cupy_with_gpu() -> Any:
    """CuPy, which then has a GPU and all that compiling kernels for it takes; the Mistake says what is missing."""
    for name, distribution in (("CuPy", "cupy"), ("numba-cuda", "numba-cuda")):
        if _version(distribution) == "-":
            raise Mistake(f'{name} is not installed; it comes with: pip install "sscan[cuda13]" (or cuda12)')
    try:
        import cupy
    except ImportError as error:
        raise Mistake(f"CuPy cannot be imported: {error}") from error
    runtime = cupy.cuda.runtime
    try:
        if not runtime.driverGetVersion():
            raise Mistake("there is no NVIDIA driver")
        runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise Mistake(str(error)) from error
    return cupy


def _gpus() -> Iterator[str]:
    """Lines about the GPUs, or the one that says why there is none."""
    try:
        runtime = _cupy_with_gpu().cuda.runtime
    except Mistake as mistake:
        yield f"no GPU can be used: {mistake}"
        return
    driver, built = (f"{n // 1000}.{n % 1000 // 10}" for n in (runtime.driverGetVersion(), runtime.runtimeGetVersion()))
    yield f"the driver supports CUDA {driver}, CuPy brings CUDA {built}"
    for i in range(runtime.getDeviceCount()):
        gpu = runtime.getDeviceProperties(i)
        capability, memory = f"{gpu['major']}.{gpu['minor']}", gpu["totalGlobalMem"] / 2**30
        yield f"GPU {i}: {gpu['name'].decode()}, compute capability {capability}, {memory:.0f} GiB"


if __name__ == "__main__":
    sys.exit(main())
