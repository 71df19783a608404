"""Sound files in and out, through libsndfile."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import torch
import torchaudio.functional

from mambaseq.atomic import atomic_file
from mambaseq.data.cache import locate
from mambaseq.data.records import Record
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.errors import ConfigError, DataError

Channels = Literal["mean", "refuse"]

SUFFIXES = frozenset((".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64"))

# A float file may peak a little above full scale; one that holds integers as floats peaks thousands of times
# above.
_LOUDEST = 16.0
_DECLARED = re.compile(r"^ *(?:data|SSND|riff|Data Size) +: (\d+) \(should be (\d+)\)", re.MULTILINE)
_STREAMED = 0x7FFFF000  # writers that cannot seek back leave a size of about 2 or 4 GiB in the header
_OGG_CUT = re.compile(r"^Ogg ?: (?:Last page lacks an end-of-stream bit|Junk after the last page)", re.MULTILINE)


def audio_files(name: str | Path) -> list[Path]:
    """The sound files that a name stands for, sorted: a file, a pattern, a resource (see
    `mambaseq.data.cache.locate`), or a folder, searched with its subfolders. Raises DataError when there is
    none."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return locate(name)
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise DataError(
            f"The folder {folder} holds no sound file. Put files that end in .wav, .flac or .ogg there, or "
            f"name another."
        )
    return found


def read_signal(
    path: str | Path, sample_rate: int, *, resample: bool = True, channels: Channels = "mean"
) -> np.ndarray:
    """The waveform of a sound file: `(length,)` float32, full scale being [-1, 1].

    sample_rate: samples a second that are wanted. resample: bring another rate to it (band-limited, windowed
        sinc), else refuse it. channels: what is done with more than one: "mean" averages them, "refuse"
        raises.
    Integer formats (8, 16, 24, 32 bits) are divided by their full scale; float ones are taken as they are.
    Raises DataError when the file is missing, is not audio, is cut short, is empty, holds values that are not
    finite or far beyond full scale, or has a rate or channels that were not allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"There is no sound file {path}. Check the path.")
    try:
        with soundfile.SoundFile(path) as file:
            rate, frames = file.samplerate, file.frames
            estimated = file.format == "MP3"  # frames are guessed from the bit rate
            _refuse_cut(path, file.extra_info)
            samples = file.read(dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise DataError(
            f"{path} cannot be read as audio ({str(error).rpartition(': ')[2].rstrip('.')}): it is not a "
            f"sound file, is empty, or is damaged or cut short. Copy or convert it again (16-bit wav or "
            f"flac), or leave it out."
        ) from error
    if not frames:
        raise DataError(f"{path} is a sound file of zero length. Record or copy it again, or leave it out.")
    if len(samples) < frames and not estimated:
        raise _cut(path, f"it has {len(samples):,} of {frames:,} samples")
    _check_values(path, samples)
    if samples.shape[1] > 1 and channels == "refuse":
        raise DataError(
            f"{path} has {samples.shape[1]} channels and one is wanted. Convert it to mono, or set channels: "
            f"mean to average them."
        )
    mono = np.ascontiguousarray(samples.mean(axis=1, dtype=np.float32))
    if rate == sample_rate:
        return mono
    if not resample:
        raise DataError(
            f"{path} has {rate:,} samples a second and {sample_rate:,} are wanted. Set resample: true, set "
            f"sample_rate: {rate}, or convert the file."
        )
    resampled: np.ndarray = torchaudio.functional.resample(torch.from_numpy(mono), rate, sample_rate).numpy()
    return resampled


def _cut(path: Path, how: str) -> DataError:
    return DataError(f"{path} is cut short: {how}. Copy or download it again, or leave it out.")


def _refuse_cut(path: Path, log: str) -> None:
    """libsndfile reads what is left of a truncated wav or ogg file without an error; its log tells."""
    for declared, present in ((int(a), int(b)) for a, b in _DECLARED.findall(log)):
        if present < declared < _STREAMED:
            raise _cut(path, f"its header announces {declared:,} bytes and {present:,} are there")
    if _OGG_CUT.search(log):
        raise _cut(path, "its stream has no proper end")


def _check_values(path: Path, samples: np.ndarray) -> None:
    peak = float(np.abs(samples).max())  # NaN and infinity go through max
    if not np.isfinite(peak):
        position = int(np.flatnonzero(~np.isfinite(samples).all(axis=1))[0])
        raise DataError(
            f"{path} holds a value that is not a finite number at sample {position:,}. Export it again, or "
            f"leave it out."
        )
    if peak > _LOUDEST:
        raise DataError(
            f"{path} is a float file that peaks at {peak:,.0f}; full scale is 1. It seems to hold integers: "
            f"divide by their full scale (32,768 for 16 bits) and write it again."
        )


def read_audio(
    path: str | Path,
    tokenizer: Tokenizer | None,
    *,
    sample_rate: int,
    resample: bool = True,
    channels: Channels = "mean",
) -> Iterator[Record]:
    """Records of a sound file, a folder of them or a pattern; each is named as its file, without the suffix.

    tokenizer: makes ids of the waveform; None gives it as a signal, `(length, 1)` float32. For the rest and
    the errors see `read_signal`.
    """
    for file in audio_files(path):
        signal = read_signal(file, sample_rate, resample=resample, channels=channels)
        if tokenizer is None:
            yield Record(name=file.stem, signal=signal[:, None], source=str(file))
        else:
            yield Record(name=file.stem, ids=tokenizer.encode(signal), source=str(file))


def write_wav(
    path: str | Path, sequences: Sequence[np.ndarray], tokenizer: Tokenizer, *, sample_rate: int
) -> list[Path]:
    """Write sequences of ids as 16-bit mono wav (or flac, by the suffix), each file whole or not at all.

    One sequence goes to `path` itself; several to `NAME-000.wav`, `NAME-001.wav`, ... beside it. A path
    without a suffix is a folder that gets `000.wav`, `001.wav`, ... Returns the files written.
    Raises ConfigError for another suffix; UserError when the disk is full or the place is not writable.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in ("", ".wav", ".flac"):
        raise ConfigError(f"Sound is written as .wav or .flac, not as {path.name}. Give another name with --out.")
    if not suffix:
        files = [path / f"{i:03d}.wav" for i in range(len(sequences))]
    elif len(sequences) == 1:
        files = [path]
    else:
        files = [path.with_name(f"{path.stem}-{i:03d}{path.suffix}") for i in range(len(sequences))]
    for file, ids in zip(files, sequences, strict=True):
        with atomic_file(file) as target:
            target.write(encode_wav(tokenizer.decode(np.asarray(ids)), sample_rate, suffix.removeprefix(".") or "wav"))
    return files


def encode_wav(signal: np.ndarray, sample_rate: int, container: str = "wav") -> bytes:
    """The bytes of a 16-bit mono file (`"wav"` or `"flac"`) of a `(length,)` float waveform in [-1, 1]."""
    buffer = io.BytesIO()
    soundfile.write(buffer, signal, sample_rate, format=container.upper(), subtype="PCM_16")
    return buffer.getvalue()
