"""Twenty minutes of piano, rendered from scores that anybody can fetch: for ``sscan train audio``.

    apt-get install --no-install-recommends fluidsynth timgm6mb-soundfont
    python -m venv /tmp/music && /tmp/music/bin/pip install music21==10.5.1 "soundfile>=0.13" scipy
    /tmp/music/bin/python bench/data/piano.py FOLDER --minutes 20

Writes a FLAC file a score: 16 kHz, one channel, 16 bits, loudest sample 0.9. Keyboard works come first, then string
quartets on the piano, as many whole movements as the minutes take. Repeats are not played, as a second time is the
same samples again and may fall where the first is held out. No pedal, reverb or chorus.

The scores are those of music21 10.5.1 (BSD-3), whose authors hand them on with their encoders' permission. The music is
out of copyright. Of the encodings used, only Clara Schumann's polonaises state a licence (Cypressdome, CC BY-SA 4.0);
music21 warns that some of its scores may not be for commercial use. The piano is that of Tim Brechbill's TimGM6mb
(GPL-2), played by FluidSynth (LGPL-2.1+).
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import soundfile
from music21 import corpus, instrument, stream
from scipy.signal import resample_poly

SOUNDFONT = "/usr/share/sounds/sf2/TimGM6mb.sf2"
RATE = 16000
OVERSAMPLED = 3  # FluidSynth folds what is above half its rate
PEAK = 0.9
QUIET = 3e-3  # of the peak; what is below it at both ends is cut off

SCORES = (
    "bach/bwv846.mxl",
    "cpebach/h186.mxl",
    "mozart/k545/movement1_exposition.mxl",
    "chopin/mazurka06-2.krn",
    "joplin/maple_leaf_rag.mxl",
    *(f"schumann_clara/polonaise_op1n{number}.mxl" for number in range(1, 5)),
    *(f"mozart/k156/movement{number}.mxl" for number in range(1, 5)),
    *(f"haydn/opus1no1/movement{number}.mxl" for number in range(1, 6)),
    *(f"haydn/opus74no1/movement{number}.mxl" for number in range(1, 5)),
    *(f"mozart/k458/movement{number}.mxl" for number in range(1, 5)),
)


def on_the_piano(score: stream.Score) -> stream.Score:
    """All parts as piano, without measures: music21 plays repeats where there are measures."""
    played = stream.Score()
    for part in score.stripTies().parts:
        notes = part.flatten()
        notes.removeByClass(instrument.Instrument)
        notes.insert(0, instrument.Piano())
        played.insert(0, notes)
    return played


def rendered(midi: Path) -> np.ndarray:
    """The samples, without silence at both ends."""
    wav = midi.with_suffix(".wav")
    options = ["-R", "0", "-C", "0", "-r", str(RATE * OVERSAMPLED), "-O", "float", "-T", "wav", "-F", wav]
    subprocess.run(["fluidsynth", "-q", "-n", "-i", *options, SOUNDFONT, midi], check=True)
    stereo, rate = soundfile.read(wav)
    assert rate == RATE * OVERSAMPLED, rate
    samples = resample_poly(stereo.mean(1), 1, OVERSAMPLED)
    samples *= PEAK / np.abs(samples).max()
    (loud,) = np.nonzero(np.abs(samples) > QUIET * PEAK)
    return samples[loud[0] : loud[-1] + 1]


def main() -> None:
    parser = argparse.ArgumentParser(description="piano, rendered from scores")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=20.0, help="at least so many, in whole movements")
    options = parser.parse_args()
    assert Path(SOUNDFONT).exists(), f"{SOUNDFONT} is missing, in whose place FluidSynth plays another"
    options.folder.mkdir(parents=True, exist_ok=True)
    minutes = 0.0
    for number, name in enumerate(SCORES, 1):
        if minutes >= options.minutes:
            break
        with tempfile.TemporaryDirectory() as folder:
            midi = Path(folder) / "score.mid"
            on_the_piano(corpus.parse(name)).write("midi", midi)
            samples = rendered(midi)
        target = options.folder / f"{number:02}-{Path(name).with_suffix('').as_posix().replace('/', '-')}.flac"
        soundfile.write(target, samples, RATE, subtype="PCM_16", compression_level=1.0)
        minutes += samples.size / RATE / 60
        print(f"{target.name}: {samples.size / RATE:.1f} s, {minutes:.1f} minutes so far", flush=True)
    assert minutes >= options.minutes, f"the scores have {minutes:.1f} minutes"


if __name__ == "__main__":
    main()
