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
    "mamba2": [
        {},
        {"d_state": 5, "d_conv": 2, "expand": 1, "head_dim": 2, "n_groups": 3, "conv_bias": False, "bias": True},
        {"d_state": 8, "head_dim": 4, "norm_before_gate": True, "chunk_size": 16},
    ],
    "retention": [
        {},
        {"n_heads": 2, "expand_v": 1, "chunk_size": 16},
        {"n_heads": 6, "expand_v": 4, "rotary_base": 100.0, "bias": True},
    ],
    "linear_attention": [
        {},
        {"n_heads": 3, "chunk_size": 16, "bias": True},
    ],
}
CASES = [
    pytest.param(entry.name, options, id=f"{entry.name}-{i}")
    for entry in catalog()["mixers"]
    for i, options in enumerate(VARIANTS.get(entry.name, [{}]))
]
