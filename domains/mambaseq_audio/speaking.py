"""Sound that is written, or played, while it is generated."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import soundfile

from mambaseq.atomic import write_failed
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.errors import ConfigError
from mambaseq.outputs import is_stream, output_stream, output_target
from mambaseq_audio.io import check_rate, in_sixteen_bits, sound_files, write_wav
from mambaseq_audio.mulaw import Codec
from mambaseq_audio.spectrogram import draw

ENDINGS = (".wav", ".flac", ".pcm")
STDOUT = Path("/dev/stdout")
_STREAMED = 0x7FFFF000  # bytes of sound in the header of a stream whose length is not known
_LARGEST = 0xFFFFFFFF - 44
_BEFORE, _DRAWN = 2, 30  # seconds of a picture: of the prompt, and of all


class Wav:
    """The writer `audio/wav`: 16-bit wav, flac or raw samples (.pcm), by the name's ending. `-` (or `-.pcm`) is the
    standard output.

    What has been written is a sound file at any time: a wav's header is mended with every piece, and a flac is ended
    when generation is interrupted.
    """

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

    def streams(self, tokenizer: Tokenizer) -> bool:
        """Whether a sample depends on its token alone."""
        return isinstance(tokenizer, Codec)

    def files(self, path: Path, count: int) -> list[Path]:
        """See `write_wav`. Raises ConfigError for another suffix."""
        if path.stem == "-" and count > 1:
            raise ConfigError(f"--out {path} takes one result, but there are {count:,}. Give the name of a file.")
        return [path] if path.stem == "-" else sound_files(path, count, ENDINGS)

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
                self._file: IO[bytes] = self._open.enter_context(output_stream(self._path, "wb"))
            else:
                target = output_target(file)
                target.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._open.enter_context(target.open("wb", buffering=0))
            if self._kind == "flac":
                self._flac = self._open.enter_context(
                    soundfile.SoundFile(self._file, "w", sample_rate, channels, "PCM_16", format="FLAC")
                )
            elif self._kind == "wav":
                self._file.write(self._header(total // channels if self._streams else 0))
            self._file.flush()

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
                self._file.flush()
            self._frames, self.count = self._frames + whole // self._channels, self.count + len(ids)
            self._mend()

    def close(self) -> None:
        """See `mambaseq.runs.streaming.Sink`."""
        with self._told():
            self._mend()
            self._open.close()

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
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            if (told := write_failed(self._path, error)) is not None:
                raise told from error
            raise
