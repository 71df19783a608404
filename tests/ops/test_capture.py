"""What is common to captures of CUDA graphs, as far as it needs no GPU."""

from __future__ import annotations

import warnings

import pytest

from mambaseq.ops.gpu import capture


def test_only_the_watch_for_waiting_keeps_its_warnings_to_itself() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warnings.warn("called a synchronizing CUDA operation (here)", stacklevel=1)
        warnings.warn("Synchronization debug mode is a prototype feature and does not yet see all", stacklevel=1)
        for _ in range(2):
            warnings.warn("the model's own", DeprecationWarning, stacklevel=1)
    assert len(seen) == 4
    with pytest.warns(DeprecationWarning, match="own") as passed_on:
        capture.pass_on(seen)
    assert [(str(w.message), w.filename) for w in passed_on] == [("the model's own", __file__)]
