"""A stack over several resolutions of time, causal and with a state, like SaShiMi."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseq.backbones import relay
from mambaseq.backbones.base import Backbone, ResidualLayer, step_layers_
from mambaseq.backbones.graphed import CudaGraph
from mambaseq.backbones.patterns import MakeMixer, make_mixers, read_tiers, scale_residual_
from mambaseq.backbones.pooling import Begun, Held, Pool, PoolState, Way, windows
from mambaseq.errors import ConfigError, shown
from mambaseq.mixers.base import Mixer
from mambaseq.mixers.norm import NormName, make_norm
from mambaseq.parallel import Part


class Tier(nn.Module):
    """One resolution: layers on the way down, the coarser tier after a pooling, layers on the way up. The coarsest tier
    has only the first."""

    def __init__(self, down: nn.ModuleList, pool: Pool | None, inner: Tier | None, up: nn.ModuleList) -> None:
        super().__init__()
        self.down, self.pool, self.inner, self.up = down, pool, inner, up

    def states(self, state: list[Any]) -> tuple[list[Any], PoolState, list[Any], list[Any]]:
        """The states of its layers down, its pooling, the tiers below, and its layers up."""
        down, up = len(self.down), len(state) - len(self.up)
        return state[:down], state[down], state[down + 1 : up], state[up:]


class UNet(Backbone):
    """Pre-norm residual layers at several resolutions: the top tier has every position, the next joins every `pool[0]`
    positions into one, and so on; a tier's output is added to the input of the pooling before it (Goel et al.,
    arXiv:2202.09729).

    Causal: a window's coarse result is used by the positions after the window (see `backbones/pooling.py`). The states
        are one list: a tier's layers down, its pooling, all tiers below, its layers up. Each sequence has its own place
        in its windows, so any sequences may be selected, packed or continued together.

    Steps (`step_`) on a GPU compute all tiers at every position and keep the results of tiers with a complete window,
    unless `whole` says which these are. So nothing waits for the GPU, and a CUDA graph can hold the step, except with
    mixers whose state grows. On a CPU, tiers with nothing to do are skipped.

    Args:
        make_mixer: makes the mixer of layer i at a width (see `MakeMixer`); layer numbers continue through the tiers.
        n_layers: layers of each tier on the way down and again on the way up; the coarsest tier has them once. MLPs
            come on top.
        pool: how many positions are joined into one from each tier to the next; [4, 4] if not given.
        expand: factor by which each tier is wider than the one above it.
        pattern: names of mixers, repeated over the layers: `[mamba, mamba, attention*]` (see `ResidualStack`). It
            continues through a tier's layers. A mixer with a star is shared within a tier's way down or up.
        tiers: a pattern for each tier in place of one for all, the finest first: `[[mamba], [mamba], [s4+mlp]]` has S4
            and MLPs in the coarsest alone. It begins anew with each way down and up.
        mlp: follow each mixer by a residual layer of the `mlp` mixer; None: as the mixer's class says (see
            `ResidualStack`).
        norm: the norms, rms (RMSNorm) or layer (LayerNorm with a bias).
        norm_eps: epsilon of the norms.
        dropout: probability with which a layer's contribution is dropped, element by element, in training.
        checkpoint: recompute each layer's activations in the backward pass instead of keeping them.
        chunk_length: run longer sequences over this many positions at a time, recomputing each chunk's activations in
            the backward pass (see `ResidualStack`); None runs them whole.
        cuda_graph: replay training steps as CUDA graphs (see `ResidualStack`).
        context_parallel: how many processes share every training sequence (see `ResidualStack`).
    """

    splits_time: ClassVar[bool] = True

    def __init__(
        self,
        make_mixer: MakeMixer,
        n_layers: int = 2,
        pool: list[int] | None = None,
        expand: int = 2,
        pattern: list[str] | None = None,
        mlp: bool | None = None,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        checkpoint: bool = False,
        chunk_length: int | None = None,
        cuda_graph: CudaGraph = "auto",
        norm: NormName = "rms",
        tiers: list[list[str]] | None = None,
        context_parallel: int = 1,
    ) -> None:
        super().__init__(dropout, checkpoint, chunk_length, cuda_graph, context_parallel)
        pool = [4, 4] if pool is None else pool
        if not isinstance(pool, list) or not pool or not all(isinstance(n, int) and n >= 2 for n in pool):
            raise ConfigError(
                f"pool must be a list of at least one integer, each at least 2, like [4, 4], not {shown(pool)}."
            )
        if not isinstance(expand, int) or expand < 1:
            raise ConfigError(f"expand must be an integer of at least 1, not {shown(expand)}.")
        if tiers is not None:
            if pattern is not None:
                raise ConfigError("pattern is for all tiers, and tiers has a pattern for each. Leave one of them out.")
            for one in read_tiers(tiers, len(pool) + 1):
                if len(one) > n_layers >= 1:
                    raise ConfigError(
                        f"A pattern of tiers names {len(one)} layers, but a way of a tier has {n_layers}, so the last "
                        "would be left out. Raise n_layers, or shorten the pattern."
                    )
        made, total = 0, n_layers * (2 * len(pool) + 1)

        def layers(level: int, d_model: int | None) -> nn.ModuleList:
            nonlocal made
            if tiers is None:
                mixers = make_mixers(make_mixer, n_layers, pattern, mlp, d_model, first=made, total=total)
            else:
                mixers = make_mixers(make_mixer, n_layers, tiers[level], mlp, d_model, first=made, begin=made)
            made += n_layers
            return nn.ModuleList(ResidualLayer(mixer, norm_eps, dropout, norm) for mixer in mixers)

        def tier(level: int, d_model: int | None) -> Tier:
            down = layers(level, d_model)
            if level == len(pool):
                return Tier(down, None, None, nn.ModuleList())
            width: int = down[0].mixer.d_model  # type: ignore[union-attr, assignment]
            inner = tier(level + 1, expand * width)
            return Tier(down, Pool(width, expand * width, pool[level]), inner, layers(level, d_model))

        self.top = tier(0, None)
        self.d_model = self.mixers()[0].d_model
        self.norm_f = make_norm(norm, self.d_model, norm_eps)
        scale_residual_(self.mixers())
        self.check_chunks()

    def _tiers(self) -> list[Tier]:
        tiers = [self.top]
        while tiers[-1].inner is not None:
            tiers.append(tiers[-1].inner)
        return tiers

    def mixers(self) -> list[Mixer]:
        """The mixers of all layers, in the order in which they run."""
        tiers = self._tiers()
        layers = [layer for tier in tiers for layer in tier.down]
        layers += [layer for tier in reversed(tiers) for layer in tier.up]
        return [layer.mixer for layer in layers]  # type: ignore[misc]

    def _owners(self) -> list[relay.Owner]:
        down: list[relay.Owner] = []
        up: list[relay.Owner] = []
        for tier in self._tiers():
            down += [layer.mixer for layer in tier.down]  # type: ignore[misc]
            if tier.pool is not None:
                down.append(Way(tier.pool, tier.pool.init_begun))
                up = [Way(tier.pool, tier.pool.init_held), *(layer.mixer for layer in tier.up), *up]  # type: ignore[list-item]
        return [*down, *up]

    @property
    def n_states(self) -> int:
        return len(self.mixers()) + len(self._tiers()) - 1

    def _run(
        self, x: Tensor, state: list[Any] | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, list[Any]]:
        y, states = self._tier(self.top, x.float(), state, cu_seqlens, return_state)
        y, _ = self.norm_f(None, y)
        return y, states

    def check_splits_time(self) -> None:
        super().check_splits_time()
        self.check_bounded("A unet over a part of sequences")

    def _gathers(self, part: Part) -> bool:
        """Never: a part need not begin with a window."""
        return self.context_states == "gathered" and super()._gathers(part)

    def _check_gathered(self) -> None:
        raise ConfigError(
            "context_states: gathered is not for a unet, whose windows go on from rank to rank. Set "
            "model.backbone.context_states to auto or relayed."
        )

    def _tier(
        self, tier: Tier, x: Tensor, state: list[Any] | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, list[Any]]:
        """x `(batch, length, d_model)` fp32 to the residual stream after the tier, and its states."""
        if tier.pool is None:
            return self._stream(tier.down, x, state, cu_seqlens, return_state)
        assert tier.inner is not None
        old_down, old_pool, old_inner, old_up = (None,) * 4 if state is None else tier.states(state)
        x, down = self._stream(tier.down, x, old_down, cu_seqlens, return_state)
        if state is None and cu_seqlens is None and relay.current() is None:
            inner: list[Any] = []
            coarse = tier.pool.shorten(x)
            if coarse.shape[1]:
                coarse, inner = self._tier(tier.inner, coarse, None, None, return_state)
            elif return_state:
                inner = self._states(tier.inner, x.shape[0], None, None, x.device)
            given = tier.pool.lengthen(coarse, x.shape[1])
            pooled = tier.pool.final_state(x, coarse) if return_state else None
        else:
            x, given, pooled, inner = self._packed(tier, x, old_pool, old_inner, cu_seqlens, return_state)
        y, up = self._stream(tier.up, x + given, old_up, cu_seqlens, return_state)
        return y, [*down, pooled, *inner, *up]

    def _stream(
        self, layers: nn.ModuleList, x: Tensor, state: list[Any] | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, list[Any]]:
        branch, residual, states = self._through(layers, x, state, cu_seqlens, return_state)
        return residual if branch is None else residual + branch.float(), states

    def _packed(
        self,
        tier: Tier,
        x: Tensor,
        pooled: PoolState | None,
        inner: list[Any] | None,
        cu_seqlens: Tensor | None,
        return_state: bool,
    ) -> tuple[Tensor, Tensor, PoolState | None, list[Any]]:
        """x, and the output of the tiers below for each position, with sequences anywhere in their windows: all are one
        packed row. The filler at the row's end continues from a copy of the first sequence's states, or, in a part of
        sequences, from empty ones."""
        pool, batch, length = tier.pool, x.shape[0], x.shape[1]
        assert pool is not None
        assert tier.inner is not None
        if cu_seqlens is None:
            cu_seqlens = length * torch.arange(batch + 1, device=x.device, dtype=torch.int32)
        bounds, n, handing_on = cu_seqlens, cu_seqlens.shape[0] - 1, relay.current()
        if pooled is not None and handing_on is None:
            pool.check(pooled, n, x.device)
        if not batch * length:  # no part of split sequences, which has a position at least
            new = pool.init_state(n, x.device) if pooled is None else pooled.clone()
            below = self._states(tier.inner, n, None, None, x.device) if inner is None else [s.clone() for s in inner]
            return x, x, new if return_state else None, below if return_state else []
        begun = None if pooled is None else Begun(pooled.begun, pooled.count)
        held = None if pooled is None else Held(pooled.held)
        at: Any = None

        def down(_: Any, row: Tensor, state: Begun | None, wanted: bool) -> tuple[Tensor, Tensor, Begun | None]:
            nonlocal at
            state = pool.init_begun(n, device=x.device) if state is None else state
            at = windows(bounds, row.shape[0], state.count, pool.pool)
            coarse = pool.shorten_packed(row, state, at)  # (at.length, d_coarse)
            return coarse, row, pool.next_begun(row, state, at) if wanted else None

        def up(coarse: Any, row: Tensor, state: Held | None, wanted: bool) -> tuple[Tensor, Tensor, Held | None]:
            state = pool.init_held(n, device=x.device) if state is None else state
            given = pool.lengthen_packed(coarse, state, at)
            return given, row, pool.next_held(coarse, state, at) if wanted else None

        row = x.flatten(0, 1)  # (batch * length, width of the tier)
        new_begun: Begun | None
        new_held: Held | None
        if handing_on is not None:
            # the row goes through what is sent and received, so that gradients come in one order on all ranks
            coarse, row, new_begun = handing_on.run(Way(pool, pool.init_begun), down, None, row, begun, return_state)
            with handing_on.filled():
                coarse, states = self._tier(tier.inner, coarse[None], inner, at.cu_seqlens, return_state)
            given, row, new_held = handing_on.run(Way(pool, pool.init_held), up, coarse[0], row, held, return_state)
        else:
            coarse, _, new_begun = down(None, row, begun, return_state)
            if inner is not None:
                with_filler = torch.arange(n + 1, device=x.device) % n
                inner = [state.select(with_filler) for state in inner]
            coarse, states = self._tier(tier.inner, coarse[None], inner, at.cu_seqlens, return_state)
            given, _, new_held = up(coarse[0], row, held, return_state)
            everyone = torch.arange(n, device=x.device)
            states = [state.select(everyone) for state in states] if return_state else []
        after = None
        if new_begun is not None and new_held is not None:
            after = PoolState(new_begun.begun, new_held.held, new_begun.count)
        return row.view_as(x), given.view_as(x), after, states if return_state else []  # (batch, length, width) both

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> list[Any]:
        """States of an empty history, a list with one for each layer and each pooling."""
        return self._states(self.top, batch_size, max_length, dtype, device)

    def _states(
        self, tier: Tier, batch_size: int, max_length: int | None, dtype: torch.dtype | None, device: Any
    ) -> list[Any]:
        def of(layers: nn.ModuleList) -> list[Any]:
            return [layer.mixer.init_state(batch_size, max_length, dtype, device) for layer in layers]  # type: ignore[union-attr, operator]

        if tier.pool is None or tier.inner is None:
            return of(tier.down)
        coarse = None if max_length is None else -(-max_length // tier.pool.pool)
        inner = self._states(tier.inner, batch_size, coarse, dtype, device)
        return [*of(tier.down), tier.pool.init_state(batch_size, device), *inner, *of(tier.up)]

    def places(self, state: list[Any]) -> list[tuple[int, int]] | None:
        """The place of the sequences in each tier's window, and its length, the finest first, read from the states;
        None if they are not all at one place."""
        found, tier = [], self.top
        while tier.pool is not None and tier.inner is not None:
            _, pooled, state, _ = tier.states(state)
            counts = set(pooled.count.tolist())
            if len(counts) != 1:
                return None
            found.append((counts.pop(), tier.pool.pool))
            tier = tier.inner
        return found

    @torch.no_grad()
    def step_(self, x: Tensor, state: list[Any], whole: int | None = None) -> Tensor:
        """x `(batch, 1, d_model)`; changes the states in place. whole: how many windows, from the finest on, this
        position completes, for all sequences alike (see `places`); None if unknown."""
        self._check_states(state)
        y, _ = self.norm_f(None, self._step(self.top, x.float(), state, None, whole))
        return y

    def _step(self, tier: Tier, x: Tensor, state: list[Any], active: Tensor | None, known: int | None) -> Tensor:
        """x `(batch, 1, d_model)` fp32, a position of the active sequences (None: all) to the stream after the tier;
        the output of the others has no meaning, and their states stay. known: number of complete windows."""
        if tier.pool is None:
            return _step_layers(tier.down, x, state, active)
        assert tier.inner is not None
        down, pooled, inner, up = tier.states(state)
        tier.pool.check(pooled, len(x), x.device)
        x = _step_layers(tier.down, x, down, active)
        given, coarse, whole = tier.pool.step_(x, pooled, active)
        if known is not None:
            some = every = known > 0
        elif x.device.type == "cpu":  # checking is free there
            some, every = bool(whole.any()), bool(whole.all())
        else:
            some, every = True, False
        if some:
            below = None if known is None else known - 1
            held = self._step(tier.inner, coarse, inner, None if every else whole, below)[:, 0]
            pooled.held.copy_(torch.where(whole[:, None], held, pooled.held))  # (batch, d_coarse)
        return _step_layers(tier.up, x + given, up, active)


def _step_layers(layers: nn.ModuleList, x: Tensor, state: list[Any], active: Tensor | None) -> Tensor:
    branch: Tensor | None
    if active is None:
        branch, residual = step_layers_(layers, x, state)
    else:
        branch, residual = None, x
        for layer, layer_state in zip(layers, state, strict=True):
            y, residual = layer.norm(branch, residual)  # type: ignore[operator]
            branch = _step_some(layer.mixer, y, layer_state, active)  # type: ignore[arg-type]
    return residual if branch is None else residual + branch.float()


def _step_some(mixer: Mixer, x: Tensor, state: Any, active: Tensor) -> Tensor:
    """A step of the active sequences only: x `(batch, 1, d_model)`, active `(batch,)` bool."""
    if mixer.bounded_state:
        before = state.clone()
        y = mixer.step_(x, state)
        for name, tensor in state.tensors().items():
            # active (batch, 1, ...)
            tensor.copy_(torch.where(active.view(-1, *[1] * (tensor.dim() - 1)), tensor, getattr(before, name)))
        return y
    # A state that grows: one packed row of sequences of one position or none, first those of the active, then the
    # others' steps from copies of their states, which nobody reads.
    n = len(x)
    order = torch.argsort(active.logical_not().int(), stable=True)
    cu_seqlens = F.pad(torch.cat([active, ~active]).cumsum(0), (1, 0)).int()  # (2 batch + 1,)
    sequences = torch.arange(n, device=x.device)
    # row (1, batch, d_model)
    row, new = mixer(x[order].transpose(0, 1), state.select(sequences.repeat(2)), cu_seqlens, return_state=True)
    new = new.select(sequences)
    for field in dataclasses.fields(new):
        setattr(state, field.name, getattr(new, field.name))
    y = torch.empty_like(x, dtype=row.dtype)
    y[order] = row.transpose(0, 1)
    return y
