"""One step of an op refuses rows that its state does not have, which kernels would write beyond it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mambaseq import causal_lm
from mambaseq.errors import ConfigError
from mambaseq.generation import Decoder
from mambaseq.ops.decoding.step import causal_conv_update_, lti_update_, selective_state_update_, ssd_update_
from mambaseq.ops.delta_rule import delta_rule_update_
from mambaseq.ops.trapezoid import trapezoidal_update_
from mambaseq.ops.wkv import wkv_update_

R = torch.ones

# a function of rows, for a state of one
STEPS: dict[str, Callable[[int], object]] = {
    "selective": lambda n: selective_state_update_(R(1, 3, 2), R(n, 3), R(n, 3), -R(3, 2), R(n, 2), R(n, 2)),
    "lti": lambda n: lti_update_(R(1, 3, 2), R(n, 3), R(3), -R(3, 2), R(3, 2), R(3, 2)),
    "ssd": lambda n: ssd_update_(R(1, 2, 3, 4), R(n, 2, 3), R(n, 2), -R(2), R(n, 1, 4), R(n, 1, 4)),
    "conv": lambda n: causal_conv_update_(R(1, 3, 2), R(n, 3), R(3, 3)),
    "delta": lambda n: delta_rule_update_(
        R(1, 2, 3, 4), R(n, 2, 4), R(n, 2, 4), R(n, 2, 3), -R(n, 2), R(n, 2)
    ),
    "trapezoid": lambda n: trapezoidal_update_(
        R(1, 2, 3, 4), R(n, 2, 1, 3), R(n, 2), R(n, 2), R(n, 2), R(n, 2, 1, 4), R(n, 2, 1, 4), R(n, 2, 1, 3),
        R(n, 2, 1, 4),
    ),
    "wkv": lambda n: wkv_update_(R(1, 3, 3), R(n, 3), R(n, 3), R(3), R(3)),
}  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
def test_other_rows_than_the_states_are_refused(step: str) -> None:
    STEPS[step](1)
    for n in (2, 64):
        with pytest.raises(ValueError, match="as the state calls for, not"):
            STEPS[step](n)


@pytest.mark.parametrize(
    "step",
    [
        lambda: causal_conv_update_(R(1, 3, 2), R(1, 3), R(3, 3), R(1)),
        lambda: delta_rule_update_(R(1, 4, 3, 4), R(1, 3, 4), R(1, 3, 4), R(1, 4, 3)),
        lambda: delta_rule_update_(R(1, 4, 3, 4), R(1, 8, 4), R(1, 8, 4), R(1, 4, 3)),
        lambda: selective_state_update_(R(1, 3, 2), R(1, 3), R(1, 3), -R(3, 2), R(1, 2), R(1, 2), D=R(1)),
        lambda: selective_state_update_(R(1, 3, 2), R(1, 3), R(1, 3), -R(3, 2), R(1, 2), R(1, 2), dt_bias=R(1)),
        lambda: selective_state_update_(R(1, 3, 2), R(1, 3), R(1, 3), -R(3, 2), R(1, 2, 2), R(1, 2, 2)),
        lambda: selective_state_update_(R(1, 4, 2), R(1, 4), R(1, 4), -R(4, 2), R(1, 2, 2), R(1, 3, 2)),
        lambda: lti_update_(R(1, 3, 2), R(1, 3), R(1), -R(3, 2), R(3, 2), R(3, 2)),
        lambda: lti_update_(R(1, 3, 2), R(1, 3), R(3), -R(3, 2), R(3, 2), R(3, 2), D=R(1)),
        lambda: ssd_update_(R(1, 2, 3, 4), R(1, 2, 3), R(1, 2), -R(1), R(1, 1, 4), R(1, 1, 4)),
        lambda: ssd_update_(R(1, 2, 3, 4), R(1, 2, 3), R(1, 2), -R(2), R(1, 3, 4), R(1, 3, 4)),
        lambda: wkv_update_(R(1, 3, 3), R(1, 3), R(1, 3), R(1), R(3)),
    ],
)
def test_what_does_not_fit_a_states_channels_is_refused(step: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="as the state calls for"):
        step()


@pytest.mark.parametrize("mixer", ["mamba", "gated_delta", "kda", "gla", "mamba2", "mamba3"])
def test_a_decoder_takes_one_token_a_sequence(mixer: str) -> None:
    model = causal_lm(vocab_size=5, d_model=8, n_layers=1, mixer=mixer).eval()
    decoder = Decoder(model, model.init_state(1))
    assert decoder.step(torch.zeros(1, dtype=torch.long)).shape == (1, 5)
    with pytest.raises(ConfigError, match=r"one token a sequence, \(batch,\), not \(1, 5\)"):
        decoder.step(torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="is needed"):
        decoder.step(torch.zeros(2, dtype=torch.long))
