"""The variants of each registered mixer that are held to the laws, beside its defaults."""

from __future__ import annotations

import pytest

from mambaseq.domain import catalog

VARIANTS: dict[str, list[dict]] = {
    "mamba": [
        {},
        {"d_state": 3, "d_conv": 2, "expand": 1, "conv_bias": False, "bias": True, "dt_rank": 2},
        {"lti": True},
        {"lti": True, "lti_complex": False, "lti_init": "real"},
    ],
    "s4d": [
        {},
        {"init": "inv", "discretization": "bilinear"},
        {"init": "legs", "mode": "fft"},
        {"real": True, "init": "real", "mode": "scan"},
    ],
    "s4": [{}, {"d_state": 3, "n_ssm": 2, "mode": "fft"}],
    "s5": [{}, {"d_state": 6, "blocks": 1}],
    "lssl": [{}, {"d_state": 5, "outputs": 2, "measure": "legt", "trainable_A": True, "alpha": 1.0}],
    "lmu": [{}, {"d_state": 6, "d_memory": 1, "theta": 20.0, "d_hidden": 7, "activation": "tanh"}],
}
CASES = [
    pytest.param(entry.name, options, id=f"{entry.name}-{i}")
    for entry in catalog()["mixers"]
    for i, options in enumerate(VARIANTS.get(entry.name, [{}]))
]
