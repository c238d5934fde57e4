"""``sscan train``: train a model on texts, DNA, species or audio."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any

from sscan.cli._arguments import model_name, number, path, positive_float, positive_int
from sscan.cli._devices import cupy_with_gpu
from sscan.cli._failures import Mistake, discard, fail, mistakes
from sscan.cli._output import NOT_DRAWN, SAMPLE_TOKENS, TEMPERATURE, Continuations, text_writer
from sscan.cli._runs import open_run
from sscan.cli._signals import stop_requests

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sscan.tasks.task import RunOptions
    from sscan.tasks.training import TrainingRun


def add_to(commands: Any) -> None:
    """Add the command to those that there are, and below it one for each task."""
    from sscan.tasks.task import RunOptions

    parser = commands.add_parser("train", help="train a model on texts, by bytes or tokens, on DNA or on audio")
    parser.set_defaults(command=_train)
    parser.texts_by = "--text FILE"
    parser.add_argument(
        "--text", type=path, nargs="+", metavar="FILE",
        help="texts, or folders of them, which are joined (default: pydoc_data/topics.py of this Python)",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", type=model_name, metavar="FILE",
        help="tokenizer.json, or a folder or name on the hub that has one (default: tokens are bytes)",
    )  # fmt: skip
    _add_run_options(parser, RunOptions(), "bits per byte are")
    # What they do not get, the options in front of their names keep.
    tasks = parser.add_subparsers(dest="task", metavar="task", help="what else to train on (default: texts)")
    _add_dna(tasks)
    _add_species(tasks)
    _add_audio(tasks)


def _add_dna(tasks: Any) -> None:
    """The command that trains on DNA."""
    from sscan.tasks.dna import DNAOptions

    dna = tasks.add_parser("dna", help="FASTA files, base by base", argument_default=argparse.SUPPRESS)
    dna.add_argument("fasta", type=path, nargs="*", default=[], metavar="FASTA", help="plain or compressed")
    _add_run_options(dna, DNAOptions(), "bits per base are")
    dna.add_argument(
        "--length-warmup", type=number, metavar="EPOCHS",
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


def _add_species(tasks: Any) -> None:
    """The command that trains a model to tell species apart."""
    from sscan.tasks.species import SpeciesOptions

    species = tasks.add_parser(
        "species", help="alignments in MAF: which species is a window of?", argument_default=argparse.SUPPRESS
    )
    species.add_argument("maf", type=path, nargs="*", default=[], metavar="MAF", help="plain or compressed")
    _add_run_options(species, SpeciesOptions(), "share of mistakes is")
    species.add_argument(
        "--from", type=model_name, dest="pretrained", metavar="MODEL", help="folder of `sscan train dna`"
    )
    species.add_argument("--species", nargs="+", metavar="NAME", help="to tell apart (default: all in the alignment)")


def _add_audio(tasks: Any) -> None:
    """The command that trains on audio."""
    from sscan.tasks.audio import BLOCKS, AudioOptions

    audio = tasks.add_parser("audio", help="WAV and FLAC files", argument_default=argparse.SUPPRESS)
    audio.add_argument(
        "recordings", type=path, nargs="*", default=[], metavar="FILE", help="WAV or FLAC, or folders of them"
    )
    default = AudioOptions()
    _add_run_options(audio, default, "bits per sample are")
    audio.add_argument("--rate", type=positive_int, metavar="HZ", help="resample to it (default: that of the files)")
    audio.add_argument("--block", choices=BLOCKS, help=f"what the stages repeat (default {default.block})")
    audio.add_argument("--centre", choices=BLOCKS, help="in the middle stage (default: the same)")
    audio.add_argument("--pool", type=positive_int, help=f"of each of the two poolings (default {default.pool})")


def _add_run_options(parser: argparse.ArgumentParser, default: RunOptions, target: str) -> None:
    """The options that every task has."""
    from sscan.tasks.task import PRECISIONS

    parser.add_argument("--out", type=path, metavar="DIR", help="checkpoint folder; default: a new one in runs/")
    parser.add_argument("--resume", type=path, metavar="DIR", help="continue the run in this folder")
    length = parser.add_mutually_exclusive_group()
    minutes, steps = (
        "" if value is None else f" (default {value:g})" for value in (default.minutes, default.steps)
    )  # fmt: skip
    length.add_argument("--minutes", type=positive_float, help=f"time to train for{minutes}")
    length.add_argument("--steps", type=positive_int, help=f"number of steps to train for{steps}")
    numbers: list[tuple[str, Callable[[str], float], str]] = [
        ("d_model", positive_int, "width of the model"),
        ("n_layer", positive_int, "number of blocks"),
        ("length", positive_int, "tokens per training window"),
        ("batch", positive_int, "windows per step"),
        ("lr", positive_float, "highest learning rate"),
        ("seed", int, "of initial values and windows"),
        ("evaluations", positive_int, "times that the held-out loss is measured on the way"),
    ]
    for name, kind, text in numbers:
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, help=f"{text} (default {getattr(default, name):g})")
    parser.add_argument("--target", type=positive_float, metavar="GOAL", help=f"stop when the held-out {target} so few")
    parser.add_argument(
        "--precision", choices=PRECISIONS, help=f"of activations and matrix products (default {default.precision})"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="where to train (default cpu)",
        default=argparse.SUPPRESS if parser.argument_default is argparse.SUPPRESS else "cpu",
    )  # fmt: skip


def _train(options: argparse.Namespace) -> int:
    from sscan.tasks.progress import Phase

    with contextlib.ExitStack() as claims:
        with mistakes(), Phase("loading", sys.stderr):
            run, folder = open_run(options, claims)
        return _train_and_report(run, folder, options)


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
            discard(sys.stdout)
        return fail(f"sscan train: stopped; continue with: {again} {folder}{where}", 128 + interrupted)
    print(checkpoint)
    if options.device == "cuda":
        free, total = cupy_with_gpu().cuda.runtime.memGetInfo()
        print(f"memory      {(total - free) / 2**30:.1f} GiB of the GPU are taken, by whatever is on it")
    _report(run, folder)
    return 0


def _train_until_done(run: TrainingRun[Any], folder: Path) -> int:
    """Train and save; the number of the signal that stopped it early, or 0."""
    from sscan.tasks.loop import train
    from sscan.tasks.progress import Phase

    start = time.monotonic()
    with Phase("compiling kernels", sys.stderr):
        run.warm_up()
    with stop_requests() as received:
        print(f"kernels     ready after {time.monotonic() - start:.1f} s", flush=True)
        train(run, folder, sys.stderr, stop=received)
    return received[0] if received else 0


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
    from sscan.tasks.progress import Phase, draw_loss_curve

    task, model = run.task, run.model
    with Phase("held out", sys.stderr) as phase:
        results = task.compared(model, phase)
    print("held out    " + ", ".join(f"{name} {value:.3f}" for name, value in results.items()) + f" {task.goal_is}")
    if run.best is not None:
        step, goal = run.best
        print(
            f"best        {folder / BEST_FOLDER}: {goal:.3f} {task.goal_is} of some held-out windows, at step {step:,}"
        )
    with Phase("drawing", sys.stderr):
        drawn = draw_loss_curve(folder / "loss.png", run, results)
    print(f"curve       {folder / 'loss.png' if drawn else NOT_DRAWN}")
    prompt = task.prompt()
    if prompt is None or not isinstance(model, MambaLM):
        return
    print(
        f"sample      {SAMPLE_TOKENS} {task.tokens_are}, decoded with a state of constant size, "
        f"after {prompt.size} held-out ones:\n"
    )
    text = b"".join(map(task.vocabulary.writer(), prompt.tolist()))
    with Continuations(text, task.vocabulary.writer, text_writer(sys.stdout), SAMPLE_TOKENS) as streamer:
        model.generate(
            prompt, SAMPLE_TOKENS, temperature=TEMPERATURE, streamer=streamer, vocab_size=task.vocabulary.size
        )
