"""Reading DNA: the records of FASTA files, and the blocks of alignments in MAF."""

from __future__ import annotations

import contextlib
import gzip
import lzma
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from sscan.models.files import check_readable
from sscan.models.tokens import Bases

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

Tokens: TypeAlias = npt.NDArray[np.uint8]
BASES = Bases()
NO_READER = 'the library that reads it comes with: pip install "sscan[dna]"'


@dataclass(frozen=True)
class Record:
    """A sequence of a FASTA file.

    Attributes
    ----------
    name : str
        The first word of its header.
    tokens : array of uint8
    """

    name: str
    tokens: Tokens


def read_fasta(path: Path) -> list[Record]:
    """The records of a FASTA file, which may be compressed: gzip, bgzip, bzip2, xz or zstandard.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is no FASTA, is damaged, has a letter that stands for no base, as of proteins, or no record; the message
        names the file, and the line if it is one that is wrong.
    """
    records: dict[str, Record] = {}
    with _content_of(path):
        import dnaio

        try:
            with dnaio.open(path, fileformat="fasta", open_threads=0) as file:
                for read in file:
                    record = _record(path, read)
                    if record.name in records:
                        raise ValueError(f"{record.name!r} is the name of two records")
                    records[record.name] = record
        except dnaio.FileFormatError as error:
            raise ValueError(str(error)) from error
        if not any(record.tokens.size for record in records.values()):
            raise ValueError("holds no sequence")
    return list(records.values())


def _record(path: Path, read: Any) -> Record:
    """A record as dnaio read it."""
    try:
        return Record(read.name.partition(" ")[0].strip(), BASES.tokens(read.sequence.encode()))
    except ValueError as error:
        raise ValueError(f"line {_first_wrong_line(path)}: {error}") from error


def _first_wrong_line(path: Path) -> int:
    """The number of the first line of a FASTA file with a letter that stands for no base."""
    for number, line in _lines(path):
        if not line.startswith((b">", b"#")):
            try:
                BASES.tokens(line.strip())
            except ValueError:
                return number
    raise AssertionError(path)


@dataclass(frozen=True)
class AlignedRow:
    """What one species has in a block of an alignment.

    Attributes
    ----------
    species, record : str
        The parts of its source before and behind the first point, "Hsap" and "22".
    start, end : int
        Where it lies in the record, on the forward strand.
    tokens : array of uint8
        Without gaps, as it is written: those of the reverse strand stay reversed.
    """

    species: str
    record: str
    start: int
    end: int
    tokens: Tokens


def read_maf(path: Path) -> list[list[AlignedRow]]:
    """The blocks of a MAF file, which may be compressed as those of FASTA; each is a list of rows.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is no MAF, is damaged, or has no block; the message names the file and the line.
    """
    blocks: list[list[AlignedRow]] = []
    with _content_of(path):
        for number, line in _lines(path):
            if number == 1 and not line.startswith(b"##maf"):
                raise ValueError("line 1: a MAF file begins with ##maf")
            words = line.split()
            try:
                if words[:1] == [b"a"]:
                    blocks.append([])
                elif words[:1] == [b"s"]:
                    blocks[-1].append(_aligned_row(words))
            except (ValueError, IndexError) as error:
                reason = "a row before the first block" if isinstance(error, IndexError) else str(error)
                raise ValueError(f"line {number}: {reason}") from error
    if not any(blocks):
        raise ValueError(f"{path}: holds no aligned block")
    return blocks


def _aligned_row(words: Sequence[bytes]) -> AlignedRow:
    if len(words) != 7 or words[4] not in (b"+", b"-"):
        raise ValueError("a row is: s, source, start, size, + or -, size of the source, text")
    start, size, total = int(words[2]), int(words[3]), int(words[5])
    tokens = BASES.tokens(words[6].replace(b"-", b""))
    if tokens.size != size or not 0 <= start <= total - size:
        raise ValueError(f"{tokens.size} bases, where {size} from {start} of {total} are said to be")
    if words[4] == b"-":
        start = total - start - size
    species, _, record = words[1].decode().partition(".")
    return AlignedRow(species, record, start, start + size, tokens)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that may be compressed, and their numbers."""
    from xopen import xopen

    with xopen(path, "rb", threads=0) as file:
        yield from enumerate(file, 1)


@contextlib.contextmanager
def _content_of(path: Path) -> Iterator[None]:
    """Whatever is wrong with the content of a file becomes a ValueError that names it."""
    check_readable(path)
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{path}: {NO_READER}") from error
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path}: the compressed file is damaged: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def reverse_complement(tokens: Any) -> Any:
    """The other strand of sequences of tokens (..., length), read in its own direction."""
    return BASES.COMPLEMENT[tokens[..., ::-1]]


def is_base(tokens: Any) -> Any:
    """Which tokens are A, C, G or T."""
    return (tokens >= Bases.A) & (tokens <= Bases.T)
