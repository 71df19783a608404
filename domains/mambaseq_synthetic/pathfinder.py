"""Pathfinder at small sizes: does a dashed path join the two dots? The task is from Linsley et al. (arXiv:1805.08315),
and in the Long Range Arena (arXiv:2011.04006) at 32 by 32 pixels; the generator is our own."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from mambaseq.batch import Batch
from mambaseq.compiled import inner_njit, kept_njit
from mambaseq.data.module import SequenceData
from mambaseq.errors import ConfigError
from mambaseq.limits import check_setting
from mambaseq_synthetic.drawing import TEST, VALIDATION, check_sets

BACKGROUND, DASH, DOT = 0, 1, 2
CLEARANCE = 3  # smallest distance of pixels of different paths, or of distant parts of one path
TURN = 0.5  # the heading changes by at most this at a pixel, in radians
SHORT = 5  # pixels of a distractor
_LONG_ATTEMPTS, _SHORT_ATTEMPTS = 50, 30


@dataclasses.dataclass(frozen=True)
class Picture:
    """pixels: `(size, size)` uint8 of `BACKGROUND`, `DASH`, `DOT`. paths: `(paths, pixels, 2)` int64, row and column of
    every pixel of the two long paths, including gaps. dots: `(2, 2)` int64. connected: whether both dots are ends of
    the same path."""

    pixels: np.ndarray
    paths: np.ndarray
    dots: np.ndarray
    connected: bool

    def text(self) -> str:
        """The picture in letters: `.` background, `o` dashes, `@` dots."""
        return "\n".join("".join(".o@"[pixel] for pixel in row) for row in self.pixels)


def path_length(size: int) -> int:
    """Number of pixels of a long path: at most 3/4 of the side, and so that it begins and ends with a dash of two
    pixels."""
    return (3 * size // 4 - 2) // 3 * 3 + 2


@inner_njit(nogil=True)
def _grow(rng: np.random.Generator, owner: np.ndarray, path: np.ndarray) -> bool:
    """Draw a path of neighbouring pixels that keeps its distance from itself and from other paths (owner > 0)."""
    size = len(owner)
    y, x = int(rng.integers(0, size)), int(rng.integers(0, size))
    row, column = float(y), float(x)
    heading = rng.random() * 2 * np.pi
    for t in range(len(path)):
        if t > 0:
            heading += (2 * rng.random() - 1) * TURN
            dy, dx = np.sin(heading), np.cos(heading)
            stretch = 1 / max(abs(dy), abs(dx))  # to the next pixel
            row, column = row + dy * stretch, column + dx * stretch
            y, x = int(np.floor(row + 0.5)), int(np.floor(column + 0.5))
        if y < 0 or x < 0 or y >= size or x >= size or owner[y, x] > 0:
            return False
        for s in range(t - CLEARANCE):
            if max(abs(path[s, 0] - y), abs(path[s, 1] - x)) < CLEARANCE:
                return False
        path[t, 0], path[t, 1] = y, x
    return True


@inner_njit(nogil=True)
def _claim(owner: np.ndarray, path: np.ndarray) -> None:
    """Keep other paths away from this one."""
    size = len(owner)
    for t in range(len(path)):
        y, x = path[t, 0], path[t, 1]
        for v in range(max(0, y - CLEARANCE + 1), min(size, y + CLEARANCE)):
            for u in range(max(0, x - CLEARANCE + 1), min(size, x + CLEARANCE)):
                owner[v, u] = 1


@inner_njit(nogil=True)
def _view(a: np.ndarray, b: np.ndarray) -> int:
    """A number for the view at two ends of paths, each given by its last pixel and the one before: their relative
    place, and the directions that the paths come from. Views that are equal after a rotation or reflection have the
    same number."""
    least = 1 << 62
    for way in range(16):
        first, second = (a, b) if way < 8 else (b, a)
        seen = 0
        for end, pixel in ((first[0], second[0]), (first[0], first[1]), (second[0], second[1])):
            y, x = pixel[0] - end[0], pixel[1] - end[1]
            if way & 1:
                y = -y
            if way & 2:
                x = -x
            if way & 4:
                y, x = x, y
            seen = (seen * 1024 + y + 512) * 1024 + x + 512
        least = min(least, seen)
    return least


@inner_njit(nogil=True)
def _end(path: np.ndarray, which: int) -> np.ndarray:
    """The pixel at an end, 0 or -1, and the one before it."""
    return path[:2] if which == 0 else path[:-3:-1]


@inner_njit(nogil=True)
def _long_paths(rng: np.random.Generator, owner: np.ndarray, paths: np.ndarray, ends: np.ndarray) -> int:
    """Draw the two long paths so that two ends of different paths look like the two ends of one of them.

    ends: receives these ends, 0 or -1 of the first and of the second path. Returns the number of that one path.
    """
    while True:
        owner.fill(0)
        if not _grow(rng, owner, paths[0]):
            continue
        _claim(owner, paths[0])
        for _ in range(_LONG_ATTEMPTS):
            if not _grow(rng, owner, paths[1]):
                continue
            one, pair = int(rng.integers(0, 2)), int(rng.integers(0, 4))
            wanted = _view(_end(paths[one], 0), _end(paths[one], -1))
            for k in range(4):
                ends[0], ends[1] = (pair + k) % 4 // 2 - 1, (pair + k) % 2 - 1
                if _view(_end(paths[0], ends[0]), _end(paths[1], ends[1])) == wanted:
                    _claim(owner, paths[1])
                    return one


@inner_njit(nogil=True)
def _dash(pixels: np.ndarray, path: np.ndarray) -> None:
    for t in range(len(path)):
        if t % 3 < 2:
            pixels[path[t, 0], path[t, 1]] = DASH


@kept_njit(nogil=True)
def _paint(
    rng: np.random.Generator,
    connected: bool,
    n_distractors: int,
    pixels: np.ndarray,
    paths: np.ndarray,
    dots: np.ndarray,
) -> None:
    owner = np.zeros(pixels.shape, dtype=np.uint8)
    ends = np.zeros(2, dtype=np.int64)
    one = _long_paths(rng, owner, paths, ends)
    _dash(pixels, paths[0])
    _dash(pixels, paths[1])
    short = np.zeros((SHORT, 2), dtype=np.int64)
    for _ in range(n_distractors):
        for _ in range(_SHORT_ATTEMPTS):
            if _grow(rng, owner, short):
                _claim(owner, short)
                _dash(pixels, short)
                break
    for k in range(2):
        which, end = (one, -k) if connected else (k, ends[k])
        for axis in range(2):  # number by number, since Numba takes seconds to compile the assignment of a row
            dots[k, axis] = paths[which, end, axis]
        pixels[dots[k, 0], dots[k, 1]] = DOT


def draw(rng: np.random.Generator, connected: bool, *, size: int = 16, n_distractors: int = 3) -> Picture:
    """A random picture.

    Two long paths, both of `path_length(size)` pixels, and up to `n_distractors` short ones, as many as find room, are
    drawn before the dots, all dashed: two pixels, a gap of one. Then the dots take the place of two ends: of one long
    path, or of both. So the numbers of bright and of grey pixels have the same distribution in both classes; and since
    paths are chosen such that the same picture can have either pair of dots, equally far apart and with the dashes
    beside them in the same directions, so has what is seen at the dots.

    >>> print(draw(np.random.default_rng(35), True).text())
    ..@........o@...
    ...o.oo.oo......
    ................
    ................
    ................
    ........o.oo....
    .....o.o........
    ....o...........
    ................
    ..o..........o..
    ..o...........o.
    ..........o.....
    .........o.....o
    ....oo.........o
    ..o.....o.......
    .o......o.......
    >>> print(draw(np.random.default_rng(35), False).text())
    ..@........oo...
    ...o.oo.oo......
    ................
    ................
    ................
    ........o.oo....
    .....o.o........
    ....o...........
    ................
    ..o..........o..
    ..@...........o.
    ..........o.....
    .........o.....o
    ....oo.........o
    ..o.....o.......
    .o......o.......
    """
    pixels = np.zeros((size, size), dtype=np.uint8)
    paths = np.zeros((2, path_length(size), 2), dtype=np.int64)
    dots = np.zeros((2, 2), dtype=np.int64)
    _paint(rng, connected, n_distractors, pixels, paths, dots)
    return Picture(pixels, paths, dots, connected)


class Pictures:
    """Random pictures as sequences of pixels, row by row; odd items are connected, so classes are balanced. Item i
    depends only on `(seed + 2, i)`; the seeds of validation and test sets are -1 and -2."""

    def __init__(
        self, seed: int, n: int, *, size: int, n_distractors: int, continuous: bool, endless: bool = False
    ) -> None:
        self.seed, self.n, self.endless = seed, n, endless
        self.size, self.n_distractors, self.continuous = size, n_distractors, continuous

    def __len__(self) -> int:
        return self.n

    def picture(self, index: int) -> Picture:
        """The picture of item `index`."""
        rng = np.random.default_rng((self.seed + 2, index))
        return draw(rng, index % 2 == 1, size=self.size, n_distractors=self.n_distractors)

    def __getitem__(self, index: int) -> Batch:
        if not self.endless and not 0 <= index < self.n:
            raise IndexError(f"The set has {self.n} items; asked for {index}.")
        pixels = torch.from_numpy(self.picture(index).pixels).reshape(1, -1)
        inputs = (pixels[..., None] / DOT).float() if self.continuous else pixels.long()
        return Batch(inputs=inputs, targets=torch.tensor([index % 2]))


class PathfinderData(SequenceData):
    """Pathfinder: does a dashed path join the two dots, or are they on two paths?

    Pictures of `size` by `size` pixels, read row by row: background 0, dashes 1, dots 2. A path must be followed across
    its gaps: the numbers of pixels and the dashes next to the dots carry no information, and the places of the dots
    very little (see the domain's README).

    Args:
        size: pixels of a side.
        n_distractors: short paths besides the two long ones, if there is room.
        continuous: give pixels as a signal of one channel in [0, 1] instead of 3 tokens; for the encoder `signal`.
        samples_per_epoch: training pictures that make an epoch.
        n_validation: validation pictures.
        n_test: test pictures.
        seed: of the training pictures; validation and test pictures are the same for any seed.
    """

    class_names = ("apart", "connected")

    def __init__(
        self,
        size: int = 16,
        n_distractors: int = 3,
        continuous: bool = False,
        samples_per_epoch: int = 160000,
        n_validation: int = 1000,
        n_test: int = 4000,
        seed: int = 0,
    ) -> None:
        if size < 12 or n_distractors < 0:
            raise ConfigError(
                f"data.size must be at least 12 (smaller pictures have no room for two paths) and data.n_distractors "
                f"at least 0; they are {size} and {n_distractors}."
            )
        check_sets(seed, samples_per_epoch, n_validation, n_test, max(size * size, n_distractors))
        check_setting("data.n_distractors", n_distractors, 0, size * size)
        self.size, self.n_distractors, self.continuous = size, n_distractors, continuous
        self.samples_per_epoch, self.n_validation, self.n_test = samples_per_epoch, n_validation, n_test
        self.seed = seed
        self.length = size * size
        self.vocab_size = None if continuous else 3
        self.n_channels = 1 if continuous else None

    def setup(self) -> None:
        """Nothing is read."""

    def _set(self, seed: int, n: int, endless: bool = False) -> Pictures:
        return Pictures(
            seed,
            n,
            size=self.size,
            n_distractors=self.n_distractors,
            continuous=self.continuous,
            endless=endless,
        )

    def train(self) -> Pictures:
        return self._set(self.seed, self.samples_per_epoch, endless=True)

    def validation(self) -> Pictures:
        return self._set(VALIDATION, self.n_validation)

    def test(self) -> Pictures:
        return self._set(TEST, self.n_test)
