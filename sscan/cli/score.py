"""``sscan score``: say how likely each base of DNA is, or what variants do to that."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from sscan.cli._arguments import add_device, path, positive_int
from sscan.cli._failures import Mistake, mistakes
from sscan.cli._models import add_model, model_and_vocabulary

if TYPE_CHECKING:
    import argparse

    from sscan.nn import MambaLM
    from sscan.tasks.sequences import Record

CONTEXT = 1024  # letters on each side of a variant


def add_to(commands: Any) -> None:
    """Add the command to those that there are."""
    parser = commands.add_parser("score", help="say how likely each base of DNA is, or what variants do to that")
    parser.set_defaults(command=_score, tokenizer=None)
    add_model(parser)
    add_device(parser)
    parser.add_argument("fasta", type=path, metavar="FASTA", help="plain or compressed")
    parser.add_argument(
        "--variant", action="append", default=[], metavar="RECORD:POS:REF:ALT",
        help="log p(ALT) - log p(REF) in place of every base's log p; positions begin with 1; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--context", type=positive_int, metavar="N",
        help=f"letters that are read before and behind a variant (default {CONTEXT})",
    )  # fmt: skip
    parser.add_argument("--both-strands", action="store_true", help="the mean of both strands, for variants")


def _score(options: argparse.Namespace) -> int:
    from sscan.models.tokens import Bases
    from sscan.tasks.progress import Phase
    from sscan.tasks.scoring import Variant
    from sscan.tasks.sequences import read_fasta

    with mistakes():
        for name, value in {"--both-strands": options.both_strands, "--context": options.context}.items():
            if value and not options.variant:
                raise Mistake(f"{name}: goes with --variant")
        variants = [Variant.parse(text) for text in options.variant]
        model, vocabulary = model_and_vocabulary(options)
        if not isinstance(vocabulary, Bases):
            raise Mistake(f"{options.model}: a model of DNA has {Bases.size} tokens, this one {vocabulary.size}")
        with Phase("reading", sys.stderr):
            records = {record.name: record for record in read_fasta(options.fasta)}
        pairs = []
        for variant in variants:
            if variant.record not in records:
                raise Mistake(f"{variant}: {options.fasta} has no record {variant.record}")
            pairs.append((variant, *variant.both(records[variant.record], options.context or CONTEXT)))
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
    from sscan.tasks.progress import Phase
    from sscan.tasks.scoring import log_likelihoods
    from sscan.tasks.sequences import BASES, is_base

    nats, bases, letters, done = 0.0, 0, sum(record.tokens.size for record in records), 0
    print("record", "position", "base", "log_likelihood", sep="\t")
    with Phase("scoring", sys.stderr, hidden=sys.stdout.isatty()) as phase:
        for record in records:
            at = 1
            for part in log_likelihoods(model, record.tokens):
                tokens = record.tokens[at : at + part.size]
                bases_of_part = zip(BASES.decode(tokens.tolist()), part.tolist(), strict=True)
                for i, (letter, value) in enumerate(bases_of_part, at + 1):
                    sys.stdout.write(f"{record.name}\t{i}\t{letter}\t{value:.4f}\n")
                counts = is_base(tokens)
                nats, bases, at = nats - float(part[counts].sum()), bases + int(counts.sum()), at + part.size
                phase((done + at) / letters)
            done += record.tokens.size
    if bases:
        found = Evaluation(nats, bases, bases)
        line = f"{found.bits_a_byte:.4f} bits a base, perplexity {found.perplexity:.4f}"
        print(f"{bases:,} bases of {len(records):,} records: {line}", file=sys.stderr)
