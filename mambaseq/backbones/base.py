"""The base of backbones: residual layers, and how a call is run (over chunks of time, by CUDA graphs)."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mambaseq import parallel
from mambaseq.backbones import relay, staged
from mambaseq.backbones.graphed import CudaGraph
from mambaseq.backbones.graphed_steps import Part, StepGraphs
from mambaseq.backbones.staged import ChunkGraphs
from mambaseq.errors import ConfigError, check_positive
from mambaseq.mixers.base import Mixer
from mambaseq.mixers.norm import NormName, RMSNorm, make_norm
from mambaseq.ops.decoding.block import MOST_POSITIONS, Layer, layers_positions, layers_step_
from mambaseq.ops.linear import is_plain

# how ranks that share sequences get the states between their parts; see `ResidualStack`
ContextStates = Literal["auto", "relayed", "gathered"]
# of a mixer's time, what it takes to say what a piece does to a state, and to hear what the others do: on an H200 0.21
# with 65,536 positions of a 130M model a rank, without other ranks, and more of shorter pieces (1.8 to 2.4 ms a layer)
_SUMMARY = 1 / 4


class ResidualLayer(nn.Module):
    """Computes mixer(norm(residual + x)) and residual + x. The addition to the fp32 residual stream is left to the next
    norm, which reads both anyway. x is None if there is nothing to add yet."""

    def __init__(self, mixer: Mixer, norm_eps: float, dropout: float, norm: NormName = "rms") -> None:
        super().__init__()
        self.norm = make_norm(norm, mixer.d_model, norm_eps)
        self.mixer = mixer
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor | None, residual: Tensor, state: Any, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, Tensor, Any]:
        """Returns what the next norm adds, the residual stream, and the state or None."""
        y, residual = self.norm(x, residual)
        y = self.mixer(y, state=state, cu_seqlens=cu_seqlens, return_state=return_state)
        y, new = y if return_state else (y, None)
        return self.dropout(y), residual, new

    def step_(self, x: Tensor | None, residual: Tensor, state: Any) -> tuple[Tensor | None, Tensor]:
        """See `forward`, of one position."""
        if residual.is_cuda and type(self.norm) is RMSNorm and is_plain(self.norm) and not self.training:
            stream = residual[:, 0]
            if isinstance(self.mixer, Mixer) and self.mixer.can_step_layer(stream, self.norm, state):
                stream = stream if x is None else stream + x[:, 0]
                return None, self.mixer.layer_step_(stream, self.norm, state)[:, None]
        y, residual = self.norm(x, residual)
        return self.mixer.step_(y, state), residual

    def cpu_layer(self, stream: Tensor, state: Any) -> Layer | None:
        """See `Mixer.cpu_layer`."""
        plain = type(self) is ResidualLayer and "step_" not in vars(self) and type(self.norm) is RMSNorm
        if not stream.is_cpu or not plain or not isinstance(self.mixer, Mixer) or not is_plain(self.norm):
            return None
        return self.mixer.cpu_layer(stream, self.norm, state)


def step_layers_(layers: Iterable[Any], residual: Tensor, states: Sequence[Any]) -> tuple[Tensor | None, Tensor]:
    """One position through residual layers: residual `(batch, 1, d_model)` fp32. Returns what is still to be added, and
    the stream, as `ResidualLayer.step_` does. On a CPU, layers that follow each other are one kernel if they can be."""
    branch: Tensor | None = None
    for joined, one, state in _joined(layers, residual, states):
        if one is None:
            branch, residual = None, layers_step_(_sum(branch, residual)[:, 0], joined)[:, None]
        else:
            branch, residual = one.step_(branch, residual, state)
    return branch, residual


def positions_of_layers(
    layers: Iterable[Any], residual: Tensor, states: Sequence[Any]
) -> tuple[Tensor | None, Tensor, list[Any]] | None:
    """Positions `(1, n, d_model)` fp32 of one sequence through residual layers: what is still to be added, the stream,
    and the states after each position (see `Mixer.positions`); None where one of the mixers has none."""
    branch: Tensor | None = None
    kept: list[Any] = []
    few = residual.shape[1] <= MOST_POSITIONS
    for joined, one, state in _joined(layers, residual[:, :1] if few else residual, states):
        if one is None:
            stream, made = layers_positions(_sum(branch, residual)[0], joined)
            branch, residual = None, stream[None]
            kept += [type(old)(*new) for old, new in zip(state, made, strict=True)]
            continue
        y, residual = one.norm(branch, residual)
        found = one.mixer.positions(y, state)
        if found is None:
            return None
        branch, new = found
        kept.append(new)
    return branch, residual, kept


def _joined(layers: Iterable[Any], residual: Tensor, states: Sequence[Any]) -> Iterator[tuple[list[Layer], Any, Any]]:
    """Layers in their order: those that are one kernel together, None and their states; or nothing, a layer and its
    state."""
    joined: list[Layer] = []
    theirs: list[Any] = []
    for layer, state in zip(layers, states, strict=True):
        found = layer.cpu_layer(residual[:, 0], state) if residual.is_cpu and residual.shape[1] == 1 else None
        if joined and (found is None or found.norm.dtype != joined[0].norm.dtype):
            yield joined, None, theirs
            joined, theirs = [], []
        if found is None:
            yield [], layer, state
        else:
            joined.append(found)
            theirs.append(state)
    if joined:
        yield joined, None, theirs


def _sum(branch: Tensor | None, residual: Tensor) -> Tensor:
    return residual if branch is None else residual + branch.float()


class Backbone(nn.Module, abc.ABC):
    """Embeddings `(batch, length, d_model)` to the same, called like a mixer: a list of states in, a list out.

    A subclass makes its modules, then calls `check_chunks`; it has `_run`, or a `forward` of its own.
    takes_mask: whether `forward` takes a `mask=` of real positions, because these depend on the padding after them.
        strands: how many vectors of size d_model a position has. splits_time: whether it can be given a rank's part of
        sequences that are split along time (see `mambaseq.parallel`). one_stack: whether `_run` calls `_through` once,
        over all layers, so that chunks may be replayed from CUDA graphs (see `backbones/staged.py`).
    """

    splits_time: ClassVar[bool] = False
    one_stack: ClassVar[bool] = False
    takes_mask: ClassVar[bool] = False
    strands: ClassVar[int] = 1
    d_model: int

    def __init__(
        self,
        dropout: float = 0.0,
        checkpoint: bool = False,
        chunk_length: int | None = None,
        cuda_graph: CudaGraph = "auto",
        context_parallel: int = 1,
    ) -> None:
        super().__init__()
        check_positive("The backbone", context_parallel=context_parallel)
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout must be at least 0 and below 1, not {dropout}.")
        if chunk_length is not None and chunk_length < 1:
            raise ConfigError(f"chunk_length must be at least 1, not {chunk_length}.")
        self.checkpoint = checkpoint
        self.chunk_length = chunk_length
        self.cuda_graph = cuda_graph
        self.context_parallel = context_parallel
        self.context_states: ContextStates = "auto"
        self.graphs = StepGraphs(cuda_graph == "auto")
        self.chunk_graphs = ChunkGraphs(cuda_graph == "auto")

    def check_chunks(self) -> None:
        """Raise ConfigError for a chunk_length with a mixer that cannot be run in chunks."""
        if self.chunk_length:
            self.check_bounded("chunk_length")

    def check_bounded(self, what: str) -> None:
        """Raise ConfigError for mixers that cannot be run in chunks."""
        for mixer in self.mixers():
            if not (mixer.causal and mixer.bounded_state):
                raise ConfigError(
                    f"{what} needs causal mixers with a bounded state; {type(mixer).__name__} is not one. Take others, "
                    "such as mamba, or do without."
                )

    @abc.abstractmethod
    def mixers(self) -> list[Mixer]:
        """The mixer of each residual layer, in order; a shared mixer once for each of its layers."""

    @property
    def causal(self) -> bool:
        return all(mixer.causal for mixer in self.mixers())

    @property
    def n_states(self) -> int:
        """The number of states in its list."""
        return len(self.mixers())

    def forward(
        self,
        x: Tensor,
        state: list[Any] | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """x `(batch, length, d_model)` to the same, or `(y, states)`; see `Mixer.forward`."""
        if state is not None:
            self._check_states(state)
        if (part := parallel.current()) is not None and part.context.size > 1:
            y, states = self._run_part(part, x, state, cu_seqlens, return_state)
        elif self._runs_whole(x):
            may_replay = self.cuda_graph and not (self.checkpoint or return_state or torch.compiler.is_compiling())
            if may_replay and state is None and cu_seqlens is None:
                replayed = self.graphs(self, lambda x: self._run(x, None, None, False)[0], x, self._parts)
                if replayed is not None:
                    return replayed
            y, states = self._run(x, state, cu_seqlens, return_state)
        else:
            from mambaseq.backbones.chunks import run_in_chunks  # imports the compiler, which most runs do not need

            y, states = run_in_chunks(
                self,
                self._run,
                self.init_state,
                x,
                state,
                cu_seqlens,
                return_state,
                self.chunk_length,
                graphs=self._graphs_of_chunks(),
            )
        return (y, states) if return_state else y

    def _runs_whole(self, x: Tensor) -> bool:
        """Whether x is run at once: a program that is exported has one graph for any length."""
        if self.chunk_length is None or torch.compiler.is_exporting():
            return True
        return x.shape[1] <= self.chunk_length or x.shape[0] == 0

    def check_splits_time(self) -> None:
        """Raise ConfigError for a backbone or a mixer that cannot be given a part of a sequence."""
        name = type(self).__name__
        if not self.splits_time:
            raise ConfigError(
                f"The backbone {name} needs whole sequences, so these cannot be split over ranks (context parallel). "
                "Use the backbone residual, or one rank (model.backbone.context_parallel 1)."
            )
        for mixer in self.mixers():
            if not mixer.causal:
                raise ConfigError(
                    f"The mixer {type(mixer).__name__} sees what comes after a position, so sequences cannot be split "
                    "over ranks (context parallel). Use a causal mixer, or one rank."
                )
        if self.context_states == "gathered" and self.chunk_length is None:
            self._check_gathered()

    def _run_part(
        self, part: parallel.Part, x: Tensor, state: list[Any] | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, list[Any]]:
        """The same over a rank's part of split sequences."""
        self.check_part(part, x, cu_seqlens)
        longest = max(piece.end - piece.begin for piece in part.pieces)  # on any rank, so that all do the same
        if len(part.mine) == 1 and (self.chunk_length is None or longest <= self.chunk_length):
            with relay.Relay(part, part.mine[0], gathers=self._gathers(part)).running():
                return self._run(x, state, cu_seqlens, return_state)
        self.check_bounded("A rank with several pieces of a sequence")
        if self.chunk_length is not None and longest > max(2, self.chunk_length):  # 1 cannot always be dealt
            raise ConfigError(
                f"The backbone runs in chunks of {self.chunk_length} (chunk_length), but a piece of a sequence that is "
                f"split over ranks has {longest} positions. Split it with chunk_length={self.chunk_length}."
            )
        from mambaseq.backbones.chunks import run_in_chunks

        bundles = relay.Bundles(part, self._owners(), x)
        return run_in_chunks(
            self,
            self._run,
            self.init_state,
            x,
            state,
            cu_seqlens,
            return_state,
            longest,
            bundles,
            self._graphs_of_chunks(),
        )

    def _graphs_of_chunks(self) -> ChunkGraphs | None:
        return self.chunk_graphs if self.one_stack and self.cuda_graph and not self.checkpoint else None

    def _owners(self) -> list[relay.Owner]:
        """Of the states that ranks hand on, in the order in which they run."""
        return list(self.mixers())

    def _gathers(self, part: parallel.Part) -> bool:
        """Whether all ranks run a layer at once, from states that they gather, instead of handing them on.

        With L mixers and N ranks, those that hand on wait for N - 1 of L layers. Those that gather wait for none, but
        each mixer says what its piece does to a state, which takes them `_SUMMARY` of its time.
        """
        if self.context_states == "gathered":
            self._check_gathered()
            return True
        mixers = self._with_states()
        able = self.context_states == "auto" and all(mixer.sums_up for mixer in mixers)
        return able and part.context.size - 1 > _SUMMARY * len(mixers)

    def _check_gathered(self) -> None:
        """Raise ConfigError for mixers whose states cannot be gathered."""
        if unable := sorted({type(mixer).__name__ for mixer in self._with_states() if not mixer.sums_up}):
            raise ConfigError(
                "context_states: gathered needs states that are decayed sums over positions; "
                f"{', '.join(unable)} has others. Set model.backbone.context_states to auto or relayed."
            )

    def _with_states(self) -> list[Mixer]:
        return [mixer for mixer in self.mixers() if not mixer.position_wise]

    def check_part(self, part: parallel.Part, x: Tensor, cu_seqlens: Tensor | None) -> None:
        """Raise ConfigError or ValueError for what is not a part that this backbone can be given."""
        self.check_splits_time()
        segments = part.segments if cu_seqlens is None else cu_seqlens[1:]
        if (
            x.shape[1] != part.length
            or len(segments) != len(part.segments)
            or (cu_seqlens is None) != (part.bounds is None)
        ):
            raise ValueError(
                f"This rank has {part.length} positions of {len(part.segments)} stretches of sequences, but was given "
                f"{tuple(x.shape[:2])}: take them by the part's take() and cu_seqlens()."
            )
        if len(part.mine) > 1 and not self.causal:
            raise ConfigError("Pieces dealt to the ranks in turn (chunk_length) need a causal backbone.")

    def _check_states(self, state: list[Any]) -> None:
        if len(state) != self.n_states:
            raise ValueError(f"The backbone has {self.n_states} states, but was given {len(state)}.")

    def _run(
        self, x: Tensor, state: list[Any] | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, list[Any]]:
        """y and the states; if states are not returned, they may be anything."""
        raise NotImplementedError

    def _parts(self) -> list[Part]:
        """What `_run` of a whole sequence without states consists of; empty if it cannot be cut."""
        return []

    def _through(
        self,
        layers: Iterable[nn.Module],
        residual: Tensor,
        state: list[Any] | None,
        cu_seqlens: Tensor | None,
        return_state: bool,
    ) -> tuple[Tensor | None, Tensor, list[Any]]:
        """Run residual layers over the residual stream. Returns what is still to be added, the stream, and the
        states."""
        branch: Tensor | None = None
        states: list[Any] = []
        handing_on, replayed = relay.current(), staged.current()
        for stage in [list(layers)] if handing_on is None else handing_on.stages(layers):
            old = [None] * len(stage) if state is None else state[len(states) : len(states) + len(stage)]
            around = handing_on.around if handing_on is not None and handing_on.gathers else None
            run: relay.RunLayers = functools.partial(self._stage, stage, cu_seqlens, around)
            if replayed is not None and cu_seqlens is None:
                run = replayed.around(stage, run)
            if handing_on is None:
                branch, residual, new = run(branch, residual, old, return_state)
            else:
                mixers: list[Any] = [layer.mixer for layer in stage]
                branch, residual, new = handing_on.run_stage(mixers, run, branch, residual, old, return_state)
            states += new
        return branch, residual, states

    def _stage(
        self,
        layers: Sequence[Any],
        cu_seqlens: Tensor | None,
        around: Callable[[Any], Any] | None,
        branch: Tensor | None,
        residual: Tensor,
        states: list[Any],
        return_state: bool,
    ) -> tuple[Any, Tensor, list[Any]]:
        """Layers that follow each other; a state or None for each."""
        found = []
        for layer, state in zip(layers, states, strict=True):
            called = layer if around is None else around(layer)
            branch, residual, new = self._layer(called, cu_seqlens, branch, residual, state, return_state)
            found.append(new)
        return branch, residual, found

    def _layer(
        self,
        layer: Callable[..., Any],
        cu_seqlens: Tensor | None,
        branch: Tensor | None,
        residual: Tensor,
        state: Any,
        return_state: bool,
    ) -> tuple[Tensor, Tensor, Any]:
        arguments = (branch, residual, state, cu_seqlens, return_state)
        if self.checkpoint and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(layer, *arguments, use_reentrant=False)
        return layer(*arguments)

    @abc.abstractmethod
    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> list[Any]:
        """States of an empty history; the sequence is their first dimension."""

    @abc.abstractmethod
    def step_(self, x: Tensor, state: list[Any]) -> Tensor:
        """x `(batch, 1, d_model)`; changes the states in place."""
