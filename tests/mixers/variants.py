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
        {"selective_dt": False, "selective_C": False, "A_init": "random"},
        {"selective_B": False, "complex": True, "dt_rank": 3},
        {"selective_dt": False, "selective_B": False, "selective_C": False, "A_init": "constant"},
        {"selective_norm_eps": 1e-6},
    ],
    "s4d": [
        {},
        {"init": "inv", "discretization": "bilinear"},
        {"init": "legs", "mode": "fft"},
        {"real": True, "init": "real", "mode": "scan"},
    ],
    "h3": [
        {},
        {"d_state": 5, "head_dim": 3, "shift_width": 7, "bias": False},
        {"real": True},
    ],
    "rwkv4": [{}],
    "attention": [
        {},
        {"n_heads": 6, "n_kv_heads": 2, "qk_norm": True, "bias": True},
        {"n_heads": 3, "rope": False, "window": 5},
        {"n_heads": 3, "n_kv_heads": 1, "head_dim": 8, "rope_theta": 100.0, "window": 16},
        {"n_heads": 3, "rope_dims": 2},
    ],
    "mlp": [{}, {"activation": "gelu", "hidden": 20, "bias": True}, {"activation": "gelu_tanh"}],
    "hyena": [
        {},
        {"order": 3, "short_conv": 2, "l_max": 40, "emb_dim": 3, "bias": False},
        {"l_max": 40, "positions": "learned"},
    ],
    "s4": [{}, {"d_state": 3, "n_ssm": 2, "mode": "fft"}],
    "s5": [{}, {"d_state": 6, "blocks": 1}],
    "lssl": [{}, {"d_state": 5, "outputs": 2, "measure": "legt", "trainable_A": True, "alpha": 1.0}],
    "lmu": [{}, {"d_state": 6, "d_memory": 1, "theta": 20.0, "d_hidden": 7, "activation": "tanh"}],
    "mamba2": [
        {},
        {"d_state": 5, "d_conv": 2, "expand": 1, "head_dim": 2, "n_groups": 3, "conv_bias": False, "bias": True},
        {"d_state": 8, "head_dim": 4, "norm_before_gate": True, "chunk_size": 16},
    ],
    "mamba3": [
        {"d_state": 8},
        {
            "d_state": 4,
            "expand": 1,
            "head_dim": 3,
            "n_groups": 2,
            "rank": 4,
            "rope_fraction": 1.0,
            "out_norm": True,
            "chunk_size": 32,
        },
    ],
    "gated_delta": [
        {},
        {
            "n_heads": 2,
            "head_dim": 3,
            "n_value_heads": 4,
            "expand_v": 1,
            "conv_bias": True,
            "gate": False,
            "output_gate": False,
            "d_conv": 2,
            "chunk_size": 16,
        },
    ],
    "kda": [
        {},
        {
            "n_heads": 2,
            "head_dim": 3,
            "n_value_heads": 4,
            "expand_v": 2,
            "lower_bound": -5.0,
            "negative_eigenvalues": True,
        },
    ],
    "gla": [{}, {"n_heads": 3, "expand_k": 1.0, "gate_rank": 3, "normalizer": 2.0, "chunk_size": 16}],
    "retention": [
        {},
        {"n_heads": 2, "expand_v": 1, "chunk_size": 16},
        {"n_heads": 6, "expand_v": 4, "rotary_base": 100.0, "bias": True},
    ],
    "linear_attention": [
        {},
        {"n_heads": 3, "chunk_size": 16, "bias": True, "rope": False},
        {"n_heads": 1, "chunk_size": 16, "rope_theta": 100.0, "bias": True},
    ],
}
CASES = [
    pytest.param(entry.name, options, id=f"{entry.name}-{i}")
    for entry in catalog()["mixers"]
    for i, options in enumerate(VARIANTS.get(entry.name, [{}]))
]
# Compiling takes seconds: each mixer once, and those whose graph is another one than its first variant's.
_OTHER_GRAPHS = {
    *("mamba-2", "mamba-3", "mamba-4", "mamba-5", "s4d-1", "s4d-2", "s4d-3", "h3-1", "attention-1", "attention-2"),
    *("hyena-1", "s4-1", "lssl-1", "mlp-1", "linear_attention-1"),
}
COMPILED = [case for case in CASES if str(case.id).endswith("-0") or case.id in _OTHER_GRAPHS]
