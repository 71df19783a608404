"""Sound that is written, or played, while it is generated."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import soundfile

from mambaseq.atomic import write_failed
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.errors import ConfigError, UserError
from mambaseq.outputs import check_written, is_stream, output_stream, output_target
from mambaseq_audio.io import check_rate, in_sixteen_bits, sound_files, write_wav
from mambaseq_audio.mulaw import Codec

ENDINGS = (".wav", ".flac", ".pcm")
STDOUT = Path("/dev/stdout")
_STREAMED = 0x7FFFF000  # bytes of sound in the header of a stream whose length is not known
_LARGEST = 0xFFFFFFFF - 44
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BEFORE, _DRAWN = 2, 30  # seconds of a picture: of the prompt, and of all


class Wav:
    """The writer `audio/wav`: 16-bit wav, flac or raw samples (.pcm), by the name's ending. `-` (or `-.pcm`) is the
    standard output.

    What has been written is a sound file at any time: a wav's header is mended with every piece, and a flac is ended
    when generation is interrupted.
    """

    written_as = ("Sound is", ENDINGS, True)  # see `mambaseq.outputs.writes`

    def __call__(
        self,
        path: str | Path,
        sequences: Sequence[np.ndarray],
        tokenizer: Tokenizer,
        *,
        sample_rate: int,
        channels: Literal[1, 2] = 1,
    ) -> list[Path]:
        """See `write_wav`."""
        return write_wav(path, sequences, tokenizer, sample_rate=sample_rate, channels=channels)

    def takes(self, begun: np.ndarray, tokenizer: Tokenizer | None, **_: Any) -> None:
        """Raise ConfigError for a tokenizer that gives no waveform (see `mambaseq.outputs.check_taken`)."""
        if tokenizer is None or np.asarray(tokenizer.decode(begun)).dtype.kind != "f":
            raise ConfigError(
                "Sound is written of a model of sound, and this one is of something else. Use its own writer."
            )

    def streams(self, tokenizer: Tokenizer) -> bool:
        """Whether a sample depends on its token alone."""
        return isinstance(tokenizer, Codec)

    def files(self, path: Path, count: int) -> list[Path]:
        """See `write_wav`. Raises ConfigError for another suffix."""
        check_written(self, path)
        if path.stem == "-" and count > 1:
            raise ConfigError(f"--out {path} takes one result, but there are {count:,}. Give the name of a file.")
        return [path] if path.stem == "-" else sound_files(path, count)

    def begin(
        self, file: Path, tokenizer: Tokenizer, total: int, *, sample_rate: int, channels: Literal[1, 2] = 1
    ) -> WavSink:
        """See `mambaseq.runs.streaming`."""
        return WavSink(file, tokenizer, total, sample_rate, channels)

    def rate(self, *, sample_rate: int, channels: Literal[1, 2] = 1) -> float:
        """Tokens of a second."""
        check_rate(sample_rate)
        return float(sample_rate * channels)

    def picture(self, file: Path, prompt: int, *, sample_rate: int, channels: Literal[1, 2] = 1) -> bytes | None:
        """The waveform above its spectrogram, at most 30 seconds; of a long prompt the last two of them."""
        from mambaseq_audio.spectrogram import draw  # it imports PyTorch and Matplotlib

        given = prompt // channels
        start, length = max(given - _BEFORE * sample_rate, 0), _DRAWN * sample_rate
        raw: dict[str, Any] = {}
        if file.suffix.lower() == ".pcm":
            raw = {"samplerate": sample_rate, "channels": channels, "subtype": "PCM_16", "format": "RAW"}
        with soundfile.SoundFile(file, **raw) as sound:
            if sound.frames <= start:
                return None
            sound.seek(start)
            signal = sound.read(length, dtype="float32", always_2d=True).mean(axis=1)
        return draw({file.stem: signal}, sample_rate)


wav = Wav()


class _Whole:
    """A file in which what is written arrives whole: the system may take a part of it only, without an error.

    failed: the first error. quiet: only remember it, for libsndfile, which cannot pass one on.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.quiet = file, False
        self.failed: OSError | None = None
        self.seek, self.tell, self.truncate = file.seek, file.tell, file.truncate

    def write(self, data: bytes) -> int:
        """Returns how many bytes were written."""
        rest = memoryview(data).cast("B")
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            self._file.flush()
        except OSError as error:
            self.failed = self.failed or error
            if not self.quiet:
                raise
        return len(data) - len(rest)


class WavSink:
    """A sound on its way to its file or to a player."""

    def __init__(self, file: Path, tokenizer: Tokenizer, total: int, sample_rate: int, channels: int) -> None:
        """total: tokens that are expected.

        Raises ConfigError for a flac that is no file, and as `output_target` does; UserError if it cannot be written.
        """
        self._path, self._tokenizer = STDOUT if file.stem == "-" else file, tokenizer
        self._rate, self._channels, self._frames = sample_rate, channels, 0
        self._rest = np.zeros(0, dtype=np.int16)  # of stereo, a left sample whose right one is still to come
        self._kind = file.suffix.lower().removeprefix(".") or "wav"
        self._streams = is_stream(self._path)
        self.kept, self.count = not self._streams, 0
        self._open = contextlib.ExitStack()
        self._flac: soundfile.SoundFile | None = None
        if self._kind == "flac" and self._streams:
            raise ConfigError(f"A flac cannot be written to {file}. Write wav or pcm there.")
        with self._told():
            if self._streams:
                self._file = _Whole(self._open.enter_context(output_stream(self._path, "wb")))
            else:
                self._file = _Whole(self._open.enter_context(_alone(output_target(file))))
            if self._kind == "flac":
                self._file.quiet = True
                self._flac = self._open.enter_context(
                    soundfile.SoundFile(self._file, "w", sample_rate, channels, "PCM_16", format="FLAC")
                )
            elif self._kind == "wav":
                self._file.write(self._header(total // channels if self._streams else 0))

    def write(self, ids: np.ndarray) -> None:
        """See `mambaseq.runs.streaming.Sink`; BrokenPipeError when a player has gone."""
        samples = np.concatenate([self._rest, in_sixteen_bits(self._tokenizer.decode(ids))])
        whole = len(samples) // self._channels * self._channels
        samples, self._rest = samples[:whole], samples[whole:]
        with self._told():
            if self._flac is not None:
                self._flac.write(samples.reshape(-1, self._channels))
            else:
                self._file.write(samples.astype("<i2").tobytes())
            self._frames, self.count = self._frames + whole // self._channels, self.count + len(ids)
            self._mend()

    def close(self) -> None:
        """See `mambaseq.runs.streaming.Sink`."""
        with self._open, self._told():
            if self._flac is not None:
                self._flac.close()
            elif not self._streams:  # what a write that failed has left behind is no part of the sound
                self._file.truncate(len(self._header(0)) * (self._kind == "wav") + 2 * self._channels * self._frames)
            self._mend()

    def _mend(self) -> None:
        """Let the header say how much there is."""
        if self._kind == "wav" and not self._streams:
            self._file.seek(0)
            self._file.write(self._header(self._frames))
            self._file.seek(0, 2)

    def _header(self, frames: int) -> bytes:
        size = 2 * self._channels * frames
        size = _STREAMED if self._streams and size > _STREAMED else min(size, _LARGEST)
        width = 2 * self._channels
        form = struct.pack("<HHIIHH", 1, self._channels, self._rate, self._rate * width, width, 16)
        return b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt \x10\0\0\0" + form + b"data" + struct.pack("<I", size)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        file: _Whole | None = None
        failed: Exception | None = None
        try:
            yield
        except BrokenPipeError:
            raise
        except Exception as error:
            failed = error
        if (file := getattr(self, "_file", None)) is not None:
            failed = file.failed or failed  # libsndfile says less
        if failed is None:
            return
        number = getattr(failed, "errno", None)
        if number in _FULL:
            raise UserError(
                f"{self._path} cannot be written further: the disk is full, or a quota or a limit reached. What has "
                "been written stays. Free some space, or choose another place."
            ) from failed
        if number in (errno.EMFILE, errno.ENFILE):
            raise UserError(
                f"{self._path} cannot be opened: too many files are open. Raise the limit (ulimit -n), or generate "
                "fewer at once (--samples)."
            ) from failed
        if (told := write_failed(self._path, failed)) is not None:
            raise told from failed
        raise failed


def _alone(target: Path) -> IO[bytes]:
    """An empty file, open for this process alone. Raises UserError while another one writes it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    number = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{target} is being written by another run. Wait for it, or give another name with --out."
            ) from error
        except OSError as error:  # some file systems have no locks
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                raise
        os.ftruncate(number, 0)
        return open(number, "wb", buffering=0)  # noqa: PTH123 - a descriptor
    except BaseException:
        os.close(number)
        raise
