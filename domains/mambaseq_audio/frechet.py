"""`mambaseq audio/frechet`: the Fréchet audio distance (arXiv:1812.08466) of embeddings that any model made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mambaseq.errors import DataError, cut_list, shown
from mambaseq_audio.code_files import DAMAGED
from mambaseq_audio.scores import fid

MOST_FEATURES = 8_192
"""Of a frame: the covariance has their square."""


def read_embeddings(path: str | Path) -> np.ndarray:
    """`(frames, features)` of a .npy file, or of all .npy files in a folder, one after the other.

    Raises DataError for files that do not hold such numbers, or not of one width.
    """
    path = Path(path)
    files = sorted(path.glob("*.npy")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no .npy files. Write the embeddings of each clip there, (frames, features).")
    parts = []
    for file in files:
        try:
            part = np.load(file, mmap_mode="r", allow_pickle=False)
        except (*DAMAGED, OSError, EOFError) as error:
            raise DataError(
                f"{file} cannot be read as a .npy file of numbers: {shown(str(error), 200)}. Write it with numpy.save."
            ) from error
        if not isinstance(part, np.ndarray) or part.ndim != 2 or part.dtype.kind != "f" or not part.shape[1]:
            form = f"{part.dtype} {part.shape}" if isinstance(part, np.ndarray) else "several arrays"
            raise DataError(f"{file} holds {form}, not floats of (frames, features). Write one row a frame.")
        if not np.isfinite(part).all():
            raise DataError(f"{file} has embeddings that are not finite numbers. Embed its clips again.")
        parts.append(part)
    if sum(map(len, parts)) < 2:
        raise DataError(f"{path} holds fewer than 2 frames of embeddings. Give more clips.")
    if max(part.shape[1] for part in parts) > MOST_FEATURES:
        raise DataError(f"{path} has more than {MOST_FEATURES:,} features a frame. Embed with a smaller model.")
    if len(widths := sorted({part.shape[1] for part in parts})) > 1:
        raise DataError(f"The files of {path} have {cut_list(widths)} features. Embed all clips with one model.")
    return np.concatenate(parts)


def frechet(generated: Sequence[str | Path], real: str | Path) -> dict[str, float]:
    """The distance of each set of embeddings from the real one; 0 for equal means and covariances.

    Raises DataError for embeddings of other widths, or of fewer than two frames.
    """
    truth = read_embeddings(real)
    found = {}
    for name in generated:
        made = read_embeddings(name)
        if made.shape[1] != truth.shape[1]:
            raise DataError(
                f"{name} has {made.shape[1]} features a frame, but {real} has {truth.shape[1]}. Embed both with one "
                "model."
            )
        found[str(name)] = fid(truth, made)
    return found
