"""Reads and writes sound files with libsndfile."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import soundfile
import soxr

from mambaseq.conditions import composed
from mambaseq.data.records import Record, Refuse, raised, with_columns
from mambaseq.data.spooled import Spooled, spooled
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.errors import ConfigError, DataError, UserError, did_you_mean, shown
from mambaseq.limits import SAMPLES, check_unpacked
from mambaseq.outputs import is_stream, numbered, output_file, writes
from mambaseq_audio.mulaw import Codec
from mambaseq_audio.notices import Heard, Notices
from mambaseq_audio.recordings import Recording, manifest_columns, recordings

Channels = Literal["mean", "left", "right", "each", "stereo", "refuse"]
"""What is made of several channels: their mean, one of the first two, each a recording of its own, or both of two in
turn (left, right, left, ...)."""
CHANNELS: tuple[str, ...] = get_args(Channels)

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


def check_rate(sample_rate: int, key: str = "sample_rate") -> None:
    """Raise ConfigError for a rate that no recording has. key: the name of the setting."""
    if not isinstance(sample_rate, int) or not SLOWEST <= sample_rate <= FASTEST:
        raise ConfigError(
            f"{key} must be a whole number of {SLOWEST:,} to {FASTEST:,} samples a second; it is {shown(sample_rate)}."
        )


def check_channels(channels: str, key: str = "channels") -> None:
    """Raise ConfigError for an unknown way with channels. key: the name of the setting."""
    if channels not in CHANNELS:
        raise ConfigError(
            f"{key} must be one of {', '.join(CHANNELS)}; it is {shown(channels)}."
            f"{did_you_mean(str(channels), CHANNELS)}"
        )


def read_signal(
    path: str | Path, sample_rate: int, *, resample: bool = True, channels: Channels = "mean"
) -> np.ndarray:
    """The waveform of a sound file: `(length,)` float32, full scale being [-1, 1]; see `signal_blocks`."""
    return np.concatenate(list(signal_blocks(path, sample_rate, resample=resample, channels=channels)))


def signal_blocks(
    path: str | Path | Recording,
    sample_rate: int,
    *,
    resample: bool = True,
    channels: Channels = "mean",
    notices: Notices | None = None,
) -> Iterator[np.ndarray]:
    """The waveform of a recording piece by piece, `(length,)` float32 each, full scale being [-1, 1]. Memory does not
    grow with the file.

    sample_rate: wanted samples a second. resample: convert another rate (band-limited, by soxr at high quality),
        otherwise refuse it; n samples become n * sample_rate / rate, rounded up, and both first samples are at the same
        time. channels: several channels are averaged ("mean"), or refused ("refuse"); "left" and "right" are the first
        and the second one; "stereo" gives both samples of a time in turn, left first. One channel is left, right and
        both. With "each", a recording says which channel is read; a path may have one channel only.
    notices: what is odd is added there; if None, it is logged. Integer formats (8, 16, 24, 32 bits) are divided by
        their full scale; float ones are taken as they are.
    Raises DataError when the file is missing, is not audio, is cut short, is empty, holds values that are not finite or
    far beyond full scale, ends before the recording does, or has a rate or channels that were not allowed; UserError if
    it holds more than `limits.SAMPLES`, or is small and unpacks to very much.
    """
    recording = path if isinstance(path, Recording) else Recording(Path(path), Path(path).stem)
    path = recording.path
    check_rate(sample_rate)
    check_channels(channels)
    if not path.is_file():
        raise DataError(f"{recording}: there is no such sound file. Check the path.")
    told = notices or Notices()
    try:
        with soundfile.SoundFile(path) as file:
            _check_header(recording, file, sample_rate, resample, channels)
            blocks = _blocks(recording, file, channels, told)
            rate = file.samplerate
            if rate != sample_rate:
                told.resampled(str(recording), rate, sample_rate)
                blocks = _resampled(blocks, rate, sample_rate, 2 if channels == "stereo" else 1)
            yield from (block.reshape(-1) for block in blocks)
    except (soundfile.SoundFileError, OSError, TypeError) as error:  # TypeError: .raw, which has no header
        reason = str(error).rpartition(": ")[2].rstrip(".").replace(". ", ", ")  # one sentence, whole in lists
        raise DataError(
            f"{path} cannot be read as audio ({reason}): it is not a "
            f"sound file, is empty, or is damaged or cut short. Copy or convert it again (16-bit wav or "
            f"flac), or leave it out."
        ) from error
    if notices is None:
        told.tell()


def by_channel(recording: Recording) -> list[Recording]:
    """One recording for each channel of the file; itself if there is only one, or the file cannot be read, which is
    told when it is decoded."""
    try:
        count = soundfile.info(recording.path).channels
    except (soundfile.SoundFileError, OSError, TypeError):
        return [recording]
    if count == 1:
        return [recording]
    name = recording.name
    return [dataclasses.replace(recording, channel=k, name=f"{name}#{k + 1}") for k in range(count)]


def _check_header(
    recording: Recording, file: soundfile.SoundFile, sample_rate: int, resample: bool, channels: str
) -> None:
    """Refuse files by their header, before anything is decoded."""
    path = recording.path
    _refuse_cut(path, file.extra_info)
    rate, frames = file.samplerate, file.frames
    if not frames:
        raise DataError(f"{path} is a sound file of zero length. Record or copy it again, or leave it out.")
    if file.channels > 1 and (channels == "refuse" or (channels == "each" and recording.channel is None)):
        raise DataError(
            f"{path} has {file.channels} channels, but one is wanted. Convert it to mono, or set channels: mean to "
            "average them."
        )
    if file.channels > 2 and channels == "stereo":
        raise DataError(
            f"{path} has {file.channels} channels, but channels: stereo wants two. Convert it, or set channels: mean "
            "or each."
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


def _blocks(
    recording: Recording, file: soundfile.SoundFile, channels: Channels, notices: Notices
) -> Iterator[np.ndarray]:
    """What is read of a recording in blocks, `(length, 1)` float32 each, or `(length, 2)` for "stereo"."""
    path = recording.path
    size = max(_BLOCK // file.channels, 1)
    heard = Heard(path, file.subtype)
    left = _seek(recording, file)
    whole = not recording.is_part
    length = 0
    while left and len(samples := file.read(min(size, left), dtype="float32", always_2d=True)):
        _check_values(path, samples, length)
        length += len(samples)
        left = left if whole else left - len(samples)
        _check_size(path, length, file.channels, 1, 1)  # the header may have claimed less
        mixed = _mixed(samples, recording.channel, channels)
        heard.add(samples, mixed if channels == "mean" else samples)
        yield mixed
    if whole and length < file.frames and file.format != "MP3":  # for these, frames are guessed from the bit rate
        raise _cut(path, f"it has {length:,} of {file.frames:,} samples")
    if not whole and left:
        raise _cut(path, f"it ends {left:,} samples before {recording} does")
    if not length:
        raise DataError(f"{path} is a sound file of zero length. Record or copy it again, or leave it out.")
    notices.add(heard)


def _seek(recording: Recording, file: soundfile.SoundFile) -> int:
    """Go to a recording's first sample. Returns the number of samples to its end, at least 1; of a whole file, which
    may hold more than its header says, any number."""
    if not recording.is_part:
        return _UNKNOWN
    rate, frames = file.samplerate, file.frames
    start = round(recording.start * rate)
    end = frames if recording.end is None else round(recording.end * rate)
    if not start < end <= frames:
        raise DataError(
            f"{recording} is no part of the file, which has {frames / rate:.6g} s. Correct start and end, in seconds."
        )
    file.seek(start)
    return end - start


def _mixed(samples: np.ndarray, channel: int | None, channels: Channels) -> np.ndarray:
    """`(length, channels)` to `(length, 1)`, or to `(length, 2)` for "stereo"; contiguous."""
    count = samples.shape[1]
    if channels == "stereo":
        return samples if count == 2 else np.repeat(samples, 2, axis=1)
    if channel is None and channels in ("left", "right"):
        channel = min(("left", "right").index(channels), count - 1)
    if channel is not None:
        return np.ascontiguousarray(samples[:, channel : channel + 1])
    return samples.mean(axis=1, dtype=np.float32, keepdims=True)


def _resampled(blocks: Iterator[np.ndarray], rate: int, wanted: int, channels: int) -> Iterator[np.ndarray]:
    """Blocks `(length, channels)` at another rate."""
    stream = soxr.ResampleStream(rate, wanted, channels, dtype="float32", quality="HQ")
    given = taken = 0
    for block in blocks:
        given += len(block)
        out = stream.resample_chunk(block)
        taken += len(out)
        if len(out):
            yield out
    # silence after the end, enough for the output to contain the last, rounded-up sample
    left = -(-given * wanted // rate) - taken
    silence = np.zeros((2 * -(-rate // wanted) + 16, channels), dtype=np.float32)
    yield stream.resample_chunk(silence, last=True)[:left]


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


@with_columns(manifest_columns)
def read_audio(
    path: str | Path,
    tokenizer: Tokenizer | None,
    *,
    sample_rate: int,
    resample: bool = True,
    channels: Channels = "mean",
    fields: Sequence[str] = (),
    spool: bool = False,
    refuse: Refuse = raised,
    generated: bool = False,
) -> Iterator[Record]:
    """Records of a sound file, a folder of them, a pattern or a manifest. Each has the name of its file, without the
    suffix and with the folders that differ (see `mambaseq_audio.recordings.recordings`).

    tokenizer: turns the waveform into ids; None gives a signal, `(length, 1)` float32. fields: columns of the manifest
        that records are to have. spool: leave the ids of long recordings in a temporary file. refuse: called for a
        recording that cannot be used. generated: a model has made them, which is what notices call them. See
        `signal_blocks` for the rest and the errors.
    """
    asked_for = {composed(field): field for field in fields}
    found = []
    every = recordings(path)
    there = {field for one in every for field in one.fields}  # a row of jsonl may lack what another has
    missing = next((field for field in asked_for if field not in there), None)
    for one in every:
        if missing is None:
            found += by_channel(one) if channels == "each" else [one]
            continue
        refuse(
            DataError(
                f"{one}: there is no column {shown(missing)}.{did_you_mean(missing, one.fields)} Give a manifest that "
                "has it, or a table for --condition-table."
            )
        )
    notices = Notices(generated)
    for one in found:
        blocks = signal_blocks(one, sample_rate, resample=resample, channels=channels, notices=notices)
        try:
            values = _values(blocks, tokenizer, spool)
        except ConfigError:
            raise
        except UserError as error:
            refuse(error.about(one))
            continue
        columns = {asked: one.fields.get(field, "") for field, asked in asked_for.items()}
        alone = None if one.is_part else one.channel or 0
        yield Record(name=one.name, source=str(one.path), alone=alone, place=one.place, fields=columns, **values)
    notices.tell()


def _values(blocks: Iterator[np.ndarray], tokenizer: Tokenizer | None, spool: bool) -> dict[str, Any]:
    """A record's ids, signal or spooled ids."""
    if tokenizer is None:
        return {"signal": np.concatenate(list(blocks))[:, None]}
    if not isinstance(tokenizer, Codec):
        return {"ids": tokenizer.encode(np.concatenate(list(blocks)))}
    if not spool:  # a level depends only on its sample
        return {"ids": np.concatenate([tokenizer.encode(block) for block in blocks])}
    ids = spooled(tokenizer.encode(block) for block in blocks)
    return {"spooled": ids} if isinstance(ids, Spooled) else {"ids": ids}


@writes("Sound is", ".wav", ".flac", folder=True)
def write_wav(
    path: str | Path,
    sequences: Sequence[np.ndarray],
    tokenizer: Tokenizer,
    *,
    sample_rate: int,
    channels: Literal[1, 2] = 1,
) -> list[Path]:
    """Write sequences of ids as 16-bit wav (or flac, by the suffix), each file completely or not at all.

    channels: 2 for samples of left and right in turn; a last one of left alone is left out.

    One sequence goes to `path` itself; several to `NAME-000.wav`, `NAME-001.wav`, ... next to it. A path
    without a suffix is a folder that gets `000.wav`, `001.wav`, ... Returns the files written.
    Raises ConfigError for another suffix; UserError if the disk is full or the place is not writable.
    """
    check_rate(sample_rate)
    suffix = Path(path).suffix.lower()
    files = sound_files(path, len(sequences))
    for file, ids in zip(files, sequences, strict=True):
        with output_file(file) as target:
            signal = tokenizer.decode(np.asarray(ids))
            if channels == 2:
                signal = signal[: len(signal) // 2 * 2].reshape(-1, 2)
            target.write(encode_wav(signal, sample_rate, suffix.removeprefix(".") or "wav"))
    return files


def sound_files(path: str | Path, count: int) -> list[Path]:
    """The files of `count` sounds that are written to `path`; see `write_wav`."""
    path = Path(path)
    if path.suffix or (not path.is_dir() and is_stream(path)):
        return numbered(path, count)
    digits = max(3, len(str(count - 1)))
    return [path / f"{number:0{digits}d}.wav" for number in range(count)]


def in_sixteen_bits(signal: np.ndarray) -> np.ndarray:
    """A float waveform in [-1, 1], of any shape, as int16; what is beyond is cut. What is read from a 16-bit file comes
    out as it was: libsndfile divides by 32,768 but would multiply by 32,767."""
    return np.rint(np.asarray(signal, dtype=np.float64) * 2**15).clip(-(2**15), 2**15 - 1).astype(np.int16)


def encode_wav(signal: np.ndarray, sample_rate: int, container: str = "wav") -> bytes:
    """The bytes of a 16-bit file (`"wav"` or `"flac"`) of a float waveform in [-1, 1], `(length,)` or `(length,
    2)`."""
    buffer = io.BytesIO()
    soundfile.write(buffer, in_sixteen_bits(signal), sample_rate, format=container.upper(), subtype="PCM_16")
    return buffer.getvalue()
