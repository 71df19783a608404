"""Reads and writes sound files with libsndfile."""

from __future__ import annotations

import io
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import soxr

from mambaseq.data.cache import locate
from mambaseq.data.files import relative_names, walk
from mambaseq.data.records import Record
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.errors import ConfigError, DataError, shown
from mambaseq.limits import SAMPLES, check_unpacked
from mambaseq.outputs import is_stream, numbered, output_file
from mambaseq_audio.mulaw import MuLaw

logger = logging.getLogger(__name__)

Channels = Literal["mean", "refuse"]

SUFFIXES = frozenset((".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64"))
SLOWEST, FASTEST = 1_000, 768_000
"""The lowest and highest number of samples a second of a recording."""

# A float file may peak a little above full scale; one that holds integers as floats peaks thousands of times
# above.
_LOUDEST = 16.0
_DECLARED = re.compile(r"^ *(?:data|SSND|riff|Data Size) +: (\d+) \(should be (\d+)\)", re.MULTILINE)
_STREAMED = 0x7FFFF000  # writers that cannot seek back leave a size of about 2 or 4 GiB in the header
_BLOCK = 1 << 18  # samples at a time
_UNKNOWN = 2**62  # libsndfile's number of frames where the header says none
_OGG_CUT = re.compile(r"^Ogg ?: (?:Last page lacks an end-of-stream bit|Junk after the last page)", re.MULTILINE)


def audio_files(name: str | Path) -> list[Path]:
    """The sound files that a name stands for, sorted: a file, a pattern, a resource (see
    `mambaseq.data.cache.locate`), or a folder, searched with its subfolders (see `mambaseq.data.files.walk`).
    Raises DataError when there is none."""
    try:
        folder = Path(name).expanduser()
        is_folder = bool(str(name)) and folder.is_dir()
    except (OSError, RuntimeError):  # too long; the home of a user that does not exist
        is_folder = False
    if not is_folder:
        return locate(name)
    found = walk(folder, SUFFIXES)
    if not found:
        raise DataError(
            f"The folder {folder} holds no sound file. Put files that end in .wav, .flac or .ogg there, or "
            f"name another."
        )
    return found


def check_rate(sample_rate: int, key: str = "sample_rate") -> None:
    """Raise ConfigError for a rate that no recording has. key: the name of the setting."""
    if not isinstance(sample_rate, int) or not SLOWEST <= sample_rate <= FASTEST:
        raise ConfigError(
            f"{key} must be a whole number of {SLOWEST:,} to {FASTEST:,} samples a second; it is {shown(sample_rate)}."
        )


def read_signal(
    path: str | Path, sample_rate: int, *, resample: bool = True, channels: Channels = "mean"
) -> np.ndarray:
    """The waveform of a sound file: `(length,)` float32, full scale being [-1, 1]; see `signal_blocks`."""
    return np.concatenate(list(signal_blocks(path, sample_rate, resample=resample, channels=channels)))


def signal_blocks(
    path: str | Path,
    sample_rate: int,
    *,
    resample: bool = True,
    channels: Channels = "mean",
    clipped: Clipped | None = None,
) -> Iterator[np.ndarray]:
    """The waveform of a sound file piece by piece, `(length,)` float32 each, full scale being [-1, 1]. Memory does not
    grow with the file.

    sample_rate: wanted samples a second. resample: convert another rate (band-limited, by soxr at high quality),
        otherwise refuse it; n samples become n * sample_rate / rate, rounded up, and both first samples are at the same
        time. channels: several channels are averaged ("mean") or refused ("refuse").
    clipped: counts samples of float files beyond full scale; if None, a warning is logged. Integer formats (8, 16, 24,
        32 bits) are divided by their full scale; float ones are taken as they are.
    Raises DataError when the file is missing, is not audio, is cut short, is empty, holds values that are not finite or
    far beyond full scale, or has a rate or channels that were not allowed; UserError if it holds more than
    `limits.SAMPLES`, or is small and unpacks to very much.
    """
    path = Path(path)
    check_rate(sample_rate)
    if not path.is_file():
        raise DataError(f"There is no sound file {path}. Check the path.")
    told = clipped or Clipped()
    try:
        with soundfile.SoundFile(path) as file:
            _check_header(path, file, sample_rate, resample, channels)
            blocks = _mono_blocks(path, file, told)
            rate = file.samplerate
            yield from blocks if rate == sample_rate else _resampled(blocks, rate, sample_rate)
    except (soundfile.SoundFileError, OSError, TypeError) as error:  # TypeError: .raw, which has no header
        raise DataError(
            f"{path} cannot be read as audio ({str(error).rpartition(': ')[2].rstrip('.')}): it is not a "
            f"sound file, is empty, or is damaged or cut short. Copy or convert it again (16-bit wav or "
            f"flac), or leave it out."
        ) from error
    if clipped is None:
        told.tell()


def _check_header(path: Path, file: soundfile.SoundFile, sample_rate: int, resample: bool, channels: str) -> None:
    """Refuse files by their header, before anything is decoded."""
    _refuse_cut(path, file.extra_info)
    rate, frames = file.samplerate, file.frames
    if not frames:
        raise DataError(f"{path} is a sound file of zero length. Record or copy it again, or leave it out.")
    if file.channels > 1 and channels == "refuse":
        raise DataError(
            f"{path} has {file.channels} channels, but one is wanted. Convert it to mono, or set channels: mean to "
            "average them."
        )
    if rate != sample_rate and not resample:
        raise DataError(
            f"{path} has {rate:,} samples a second, but {sample_rate:,} are wanted. Set resample: true, set "
            f"sample_rate: {rate}, or convert the file."
        )
    if not SLOWEST <= rate <= FASTEST:
        raise DataError(
            f"{path} claims {rate:,} samples a second, which no recording has ({SLOWEST:,} to {FASTEST:,}). Its header "
            "may be damaged: copy or convert it again, or leave it out."
        )
    if frames >= _UNKNOWN:
        raise DataError(
            f"{path} does not say how many samples it has, like files that were streamed. Convert it (16-bit wav or "
            "flac), or leave it out."
        )
    _check_size(path, frames, file.channels, rate, sample_rate)


def _check_size(path: Path, frames: int, channels: int, rate: int, sample_rate: int) -> None:
    SAMPLES.check(frames * channels, str(path))
    SAMPLES.check(frames * sample_rate // rate, f"{path}, at {sample_rate:,} samples a second,")
    check_unpacked(2 * frames * channels, path.stat().st_size, f"{path}, unpacked to 16 bits a sample,")


def _mono_blocks(path: Path, file: soundfile.SoundFile, clipped: Clipped) -> Iterator[np.ndarray]:
    """The mean of the channels in blocks, `(length,)` float32 each."""
    size = max(_BLOCK // file.channels, 1)
    floats = file.subtype in ("FLOAT", "DOUBLE")
    length = 0
    while len(samples := file.read(size, dtype="float32", always_2d=True)):
        _check_values(path, samples, length)
        if floats:
            clipped.add(path, samples)
        length += len(samples)
        _check_size(path, length, file.channels, 1, 1)  # the header may have claimed less
        yield np.ascontiguousarray(samples.mean(axis=1, dtype=np.float32))
    if length < file.frames and file.format != "MP3":  # for these, frames are guessed from the bit rate
        raise _cut(path, f"it has {length:,} of {file.frames:,} samples")
    if not length:
        raise DataError(f"{path} is a sound file of zero length. Record or copy it again, or leave it out.")


def _resampled(blocks: Iterator[np.ndarray], rate: int, wanted: int) -> Iterator[np.ndarray]:
    stream = soxr.ResampleStream(rate, wanted, 1, dtype="float32", quality="HQ")
    given = taken = 0
    for block in blocks:
        given += len(block)
        out = stream.resample_chunk(block)
        taken += len(out)
        if len(out):
            yield out
    # silence after the end, enough for the output to contain the last, rounded-up sample
    left = -(-given * wanted // rate) - taken
    silence = np.zeros(2 * -(-rate // wanted) + 16, dtype=np.float32)
    yield stream.resample_chunk(silence, last=True)[:left]


class Clipped:
    """Counts samples of float files beyond full scale, which mu-law and 16 bits cannot represent."""

    def __init__(self) -> None:
        self.samples: Counter[str] = Counter()
        self.peak = 1.0

    def add(self, path: Path, samples: np.ndarray) -> None:
        """samples: of any shape."""
        beyond = np.abs(samples)
        if count := int(np.count_nonzero(beyond > 1)):
            self.samples[str(path)] += count
            self.peak = max(self.peak, float(beyond.max()))

    def tell(self) -> None:
        """Log one line, if there are any."""
        if self.samples:
            path, count = self.samples.most_common(1)[0]
            logger.warning(
                "Float files with samples beyond full scale, which mu-law clips: %s (%s samples of %s; the peak is "
                "%.3g). Lower their volume if this is not intended.",
                f"{len(self.samples):,}",
                f"{count:,}",
                path,
                self.peak,
            )


def _cut(path: Path, how: str) -> DataError:
    return DataError(f"{path} is cut short: {how}. Copy or download it again, or leave it out.")


def _refuse_cut(path: Path, log: str) -> None:
    """libsndfile reads a truncated wav or ogg file without an error; only its log shows it."""
    for declared, present in ((int(a), int(b)) for a, b in _DECLARED.findall(log)):
        if present < declared < _STREAMED:
            raise _cut(path, f"its header announces {declared:,} bytes, but {present:,} are there")
    if _OGG_CUT.search(log):
        raise _cut(path, "its stream has no proper end")


def _check_values(path: Path, samples: np.ndarray, start: int) -> None:
    peak = float(np.abs(samples).max())  # NaN and infinity propagate through max
    if not np.isfinite(peak):
        position = start + int(np.flatnonzero(~np.isfinite(samples).all(axis=1))[0])
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
    """Records of a sound file, a folder of them or a pattern. Each has the name of its file, without the suffix and
    with the folders that differ (see `mambaseq.data.files.relative_names`).

    tokenizer: turns the waveform into ids; None gives a signal, `(length, 1)` float32. See `signal_blocks` for the rest
        and the errors.
    """
    files = audio_files(path)
    clipped = Clipped()
    for file, name in zip(files, relative_names(files, path), strict=True):
        blocks = signal_blocks(file, sample_rate, resample=resample, channels=channels, clipped=clipped)
        if tokenizer is None:
            yield Record(name=name, signal=np.concatenate(list(blocks))[:, None], source=str(file))
        elif isinstance(tokenizer, MuLaw):  # a level depends only on its sample
            yield Record(name=name, ids=np.concatenate([tokenizer.encode(block) for block in blocks]), source=str(file))
        else:
            yield Record(name=name, ids=tokenizer.encode(np.concatenate(list(blocks))), source=str(file))
    clipped.tell()


def write_wav(
    path: str | Path, sequences: Sequence[np.ndarray], tokenizer: Tokenizer, *, sample_rate: int
) -> list[Path]:
    """Write sequences of ids as 16-bit mono wav (or flac, by the suffix), each file completely or not at all.

    One sequence goes to `path` itself; several to `NAME-000.wav`, `NAME-001.wav`, ... next to it. A path
    without a suffix is a folder that gets `000.wav`, `001.wav`, ... Returns the files written.
    Raises ConfigError for another suffix; UserError if the disk is full or the place is not writable.
    """
    path = Path(path)
    check_rate(sample_rate)
    suffix = path.suffix.lower()
    if suffix not in ("", ".wav", ".flac"):
        raise ConfigError(f"Sound is written as .wav or .flac, not as {path.name}. Give another name with --out.")
    if suffix or (not path.is_dir() and is_stream(path)):
        files = numbered(path, len(sequences))
    else:
        digits = max(3, len(str(len(sequences) - 1)))
        files = [path / f"{number:0{digits}d}.wav" for number in range(len(sequences))]
    for file, ids in zip(files, sequences, strict=True):
        with output_file(file) as target:
            target.write(encode_wav(tokenizer.decode(np.asarray(ids)), sample_rate, suffix.removeprefix(".") or "wav"))
    return files


def encode_wav(signal: np.ndarray, sample_rate: int, container: str = "wav") -> bytes:
    """The bytes of a 16-bit mono file (`"wav"` or `"flac"`) of a `(length,)` float waveform in [-1, 1]."""
    buffer = io.BytesIO()
    soundfile.write(buffer, signal, sample_rate, format=container.upper(), subtype="PCM_16")
    return buffer.getvalue()
