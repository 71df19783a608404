"""The base of backbones that see whole sequences."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from torch import Tensor

from mambaseq.backbones.base import Backbone
from mambaseq.errors import ConfigError


class StatelessBackbone(Backbone):
    """A backbone in which a position sees what comes after it: it is not causal, and has no state by which a sequence
    could be continued. A subclass has a `forward` of its own, which calls `refuse_states`.

    called: its name in messages.
    """

    called: ClassVar[str]

    @property
    def causal(self) -> bool:
        return False

    def refuse_states(self, state: list[Any] | None, return_state: bool) -> None:
        """Raise ConfigError where a state is given or wanted."""
        if state is not None or return_state:
            self.init_state()

    def init_state(self, *arguments: Any, **options: Any) -> NoReturn:
        """Raises ConfigError: there is none."""
        raise ConfigError(
            f"A {self.called} backbone sees whole sequences and keeps no state: it can neither generate nor read a "
            "sequence in parts. Use a causal backbone (residual) for that."
        )

    def step_(self, x: Tensor, state: list[Any]) -> NoReturn:
        """Raises ConfigError: see `init_state`."""
        self.init_state()
