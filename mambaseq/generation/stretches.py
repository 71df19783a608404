"""Many steps of a model in one kernel, on a GPU (`ops.decoding.stretch`) or a CPU (`ops.decoding.stretch_cpu`): for
sequences of a small vocabulary, and Mamba blocks, diagonal systems and MLPs at one or several resolutions."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from mambaseq.backbones.residual import ResidualStack
from mambaseq.backbones.unet import Tier, UNet
from mambaseq.encoders import TokenEncoder
from mambaseq.heads.lm import LMHead
from mambaseq.mixers.mamba import Mamba
from mambaseq.mixers.mlp import MLP
from mambaseq.mixers.norm import LayerNorm, RMSNorm
from mambaseq.mixers.s4d import S4D, DiagonalSSM
from mambaseq.models import SequenceModel
from mambaseq.ops.decoding import stretch
from mambaseq.ops.decoding.stretch import Phase, Stretch
from mambaseq.ops.decoding.stretch_cpu import StretchOnCPU
from mambaseq.ops.eager import has_kernels
from mambaseq.ops.gpu import nvrtc
from mambaseq.ops.linear import is_plain
from mambaseq.ops.selective_scan.launches import processors, room


def why_not(model: SequenceModel, batch_size: int, top_k: int, top_p: float) -> str | None:
    """Why the kernel cannot run this model's steps; None if it can."""
    encoder, head, backbone = model.encoder, model.head, model.backbone
    if type(model) is not SequenceModel or type(encoder) is not TokenEncoder or type(head) is not LMHead:
        return "the model's encoder is not tokens or its head not lm"
    vocabulary = len(head.linear.weight)
    device = head.linear.weight.device
    if device.type not in ("cpu", "cuda") or not has_kernels():
        return "the model is neither on a CPU nor on a GPU, or only PyTorch's operators are wanted"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on"
    if device.type == "cuda":
        if (reason := _missing_on(device)) is not None:
            return reason
        if batch_size > 1 and batch_size * weights_read(model) > stretch.MOST_READ:
            return "with so many sequences, reading weights once for every few takes longer than launching kernels"
        if 0 < top_k < vocabulary or top_p < 1:
            return "top_k or top_p is set"
        if torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is being captured"
    if vocabulary > stretch.MOST_TOKENS:
        return f"there are more than {stretch.MOST_TOKENS} tokens"
    if _has_any_global_hook() or any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return "there are hooks"
    if type(backbone) not in (ResidualStack, UNet):
        return f"the backbone is a {type(backbone).__name__}"
    for value in (*model.parameters(), *model.buffers()):
        if type(value) not in (nn.Parameter, Tensor) or value.dtype != torch.float32 or value.device != device:
            return "some weights are not plain tensors of float32 on one device"
    if any(isinstance(module, LayerNorm) for module in backbone.modules()):
        return "the kernel does not know LayerNorm"
    if isinstance(backbone, UNet) and len(backbone._tiers()) > stretch.MOST_POOLS + 1:
        return f"there are more than {stretch.MOST_POOLS} poolings"
    reasons = [_why_not_mixer(mixer) for mixer in backbone.mixers()]
    if (reason := next((reason for reason in reasons if reason), None)) is not None:
        return reason
    if device.type == "cuda":
        return stretch.why_not(outline(model), batch_size, processors(device.index), room(device.index))
    if any(type(mixer) is Mamba and mixer.complex for mixer in backbone.mixers()):
        return "the kernel on a CPU does not know complex selective systems"
    if weights_read(model) > stretch.CACHED:
        return f"a position reads more than {stretch.CACHED:,} weights"
    return None


def _inner(mixer: Any) -> int:
    """How many numbers the last phase of a mixer reads."""
    return int(mixer.hidden if type(mixer) is MLP else mixer.d_inner if type(mixer) is Mamba else mixer.d_model)


def outline(model: SequenceModel) -> list[Phase]:
    """The sizes of a model's phases, in any order but for the last, without tensors: what a GPU's room is compared with
    before anything is made."""
    backbone: Any = model.backbone
    head: Any = model.head
    found = []
    for mixer in backbone.mixers():
        width, wide = mixer.d_model, _inner(mixer)
        n_states = (
            0 if type(mixer) is MLP else mixer.d_state if type(mixer) is Mamba and not mixer.lti else mixer.ssm.d_state
        )
        found.append(Phase(stretch.OUT, 0, width, wide))
        if isinstance(mixer, Mamba) and not mixer.lti:
            rank = -(-mixer.dt_rank // 4) * 4
            products = rank + len(mixer.x_proj.weight) - mixer.dt_rank
            found.append(Phase(stretch.CONV, 0, wide, width, width=mixer.d_conv))
            found.append(Phase(stretch.LINEAR, 0, products, wide))
            found.append(Phase(stretch.SCAN, 0, wide, rank, held_cols=products, n_states=n_states))
        else:
            kind = stretch.MAMBA if isinstance(mixer, Mamba) else stretch.GATED if n_states == 0 else stretch.LTI
            found.append(Phase(kind, 0, wide, width, n_states=n_states))
    tier = backbone.top if isinstance(backbone, UNet) else None
    while tier is not None and tier.pool is not None:
        found.append(Phase(stretch.LINEAR, 0, *tier.pool.down.weight.shape))
        last: Any = tier.down[-1].mixer
        at = found.index(Phase(stretch.OUT, 0, last.d_model, _inner(last)))
        found[at] = found[at]._replace(held_cols=tier.pool.d_coarse)
        tier = tier.inner
    return [*found, Phase(stretch.LINEAR, 0, *head.linear.weight.shape)]


def weights_read(model: SequenceModel) -> int:
    """How many weights a position reads on average: those of a coarser resolution are read once a window."""
    backbone: Any = model.backbone
    tier, found, rate = backbone.top if isinstance(backbone, UNet) else None, 0.0, 1.0
    if tier is None:
        return sum(value.numel() for value in backbone.parameters())
    while tier is not None:
        for part in (tier.down, tier.up):
            found += rate * sum(value.numel() for value in part.parameters())
        if tier.pool is not None:
            # one row of `up` a position; `down` once a window
            found += rate / tier.pool.pool * sum(value.numel() for value in tier.pool.parameters())
            rate /= tier.pool.pool
        tier = tier.inner
    return int(found)


@functools.cache
def _missing_on(device: torch.device) -> str | None:
    if (reason := nvrtc.why_not()) is not None:
        return reason
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


def _why_not_mixer(mixer: Any) -> str | None:
    name = type(mixer).__name__
    if type(mixer) is Mamba and mixer.lti:
        linears, ssm = [mixer.in_proj, mixer.conv1d, mixer.out_proj], mixer.ssm
    elif type(mixer) is Mamba and mixer._is_whole:
        linears, ssm = [mixer.in_proj, mixer.conv1d, mixer.x_proj, mixer.out_proj], None
        if not is_plain(mixer.dt_proj):
            return f"a layer of {name} is wrapped"
        if mixer.d_state > stretch.MOST_STATES:
            return f"there are more than {stretch.MOST_STATES} states a channel"
    elif type(mixer) is S4D:
        linears, ssm = [mixer.out_proj], mixer.ssm
    elif type(mixer) is MLP and mixer.activation != "gelu_tanh":
        linears, ssm = [mixer.in_proj, mixer.out_proj], None
    else:
        return f"the kernel does not know {name}" + (" without selection, or with its norms" if name == "Mamba" else "")
    if not all(is_plain(linear) for linear in linears) or "step_" in vars(mixer) or (ssm and "step_" in vars(ssm)):
        return f"a layer of {name} is wrapped"
    widths = [linear.in_features for linear in linears if isinstance(linear, nn.Linear)]
    if any(width % 4 or width > stretch.WIDEST for width in widths):
        return f"widths must be multiples of 4 up to {stretch.WIDEST}"
    if mixer.d_model % 4 or mixer.d_model > stretch.WIDEST:
        return f"widths must be multiples of 4 up to {stretch.WIDEST}"
    if type(mixer) is Mamba and mixer.d_conv - 1 > stretch.MOST_TAPS:
        return f"a convolution is longer than {stretch.MOST_TAPS + 1}"
    if ssm is not None and ssm.d_state > stretch.MOST_STATES:
        return f"there are more than {stretch.MOST_STATES} states a channel"
    if ssm is not None and ssm.real and ssm.discretization == "bilinear":
        return "a real system under the bilinear rule has a complex decay"
    return None


class Stretches:
    """Decodes sequences many positions at a time. Each is computed as if it were alone.

    Args:
        model: one for which `why_not` is None; its weights must not change while this object is used.
        state: of sequences that are all at one place (see `UNet.places`), changed in place.
        condition: `(batch,)` int64 for conditional models.
        batch_size: how many there are.
    """

    def __init__(self, model: SequenceModel, state: list[Any], condition: Tensor | None, batch_size: int = 1) -> None:
        head: Any = model.head
        weight = head.linear.weight
        self._windows: list[tuple[Any, Tensor, Tensor]] = []  # a pool's state, its window of positions, what it holds
        self._phases: list[Phase] = []
        self._pools: list[int] = []
        self._device, self._d_model, self._batch = weight.device, weight.shape[1], batch_size
        stream = self._vector(self._d_model)
        backbone: Any = model.backbone
        if isinstance(backbone, UNet):
            stream = self._add_tier(backbone.top, state, stream, 0, None)
        else:
            stream = self._add_layers(backbone.layers, state, stream, 0, {})
        norm: RMSNorm = backbone.norm_f
        logits = self._vector(2 * -(-len(weight) // 4) * 4)
        self._phases[0] = self._phases[0]._replace(flags=self._phases[0].flags | stretch.EMBEDS)
        self._phases.append(self._linear(stretch.LINEAR, 0, weight, None, logits, source=stream, norm=norm))
        counts = [int(pool_state.count[0]) for pool_state, *_ in self._windows]
        for pool_state, window, held in self._windows:
            stretch.values(window)[:, : pool_state.begun[0].numel()] = pool_state.begun.flatten(1)
            stretch.values(held).copy_(pool_state.held)
        encoder: Any = model.encoder
        embedding = encoder.embedding.weight.detach()
        embedded = None if condition is None else encoder.condition(condition).detach().contiguous()
        make: Any = StretchOnCPU if self._device.type == "cpu" else Stretch
        self._stretch = make(self._phases, embedding, embedded, logits, counts, self._pools)

    @torch.no_grad()
    def run(
        self,
        token: Tensor,
        n: int,
        temperature: float,
        uniforms: Tensor | None,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """See `Stretch.run`. Afterwards the state is that before the last returned token."""
        filters = {"top_k": top_k, "top_p": top_p} if self._device.type == "cpu" else {}
        tokens, failed = self._stretch.run(token, n, temperature, uniforms, **filters)
        for number, (state, window, held) in enumerate(self._windows):
            state.count.fill_(self._stretch.counts[number])
            state.held.copy_(stretch.values(held))
            begun = stretch.values(window)[:, : state.begun[0].numel()].reshape(state.begun.shape)
            is_begun = torch.arange(begun.shape[1], device=self._device) < state.count[:, None]
            state.begun.copy_(torch.where(is_begun[..., None], begun, 0.0))
        return tokens, failed

    def _vector(self, size: int) -> Tensor:
        return stretch.vector(self._batch, size, self._device)

    def _add_tier(self, tier: Tier, state: list[Any], stream: Tensor, level: int, copy: Tensor | None) -> Tensor:
        """A tier's phases. Returns the stream after it, which its last phase also writes to `copy`."""
        if tier.pool is None or tier.inner is None:
            return self._add_layers(tier.down, state, stream, level, {"copy": copy})
        down, pooled, inner, up = tier.states(state)
        pool, number = tier.pool, len(self._pools)
        self._pools.append(pool.pool)
        window, held = self._vector(pool.pool * pool.d_model), self._vector(pool.d_coarse)
        self._windows.append((pooled, window, held))
        more = {"window": window, "up": pool.up.weight.detach(), "held": held, "held_cols": pool.d_coarse}
        behind = self._add_layers(tier.down, down, stream, level, {**more, "pool": number})
        coarse = self._vector(pool.d_coarse)
        self._phases.append(
            self._linear(stretch.LINEAR, level + 1, pool.down.weight, None, coarse, source=window, pool=number)
        )
        self._add_tier(tier.inner, inner, coarse, level + 1, held)
        return self._add_layers(tier.up, up, behind, level, {"copy": copy})

    def _linear(
        self,
        kind: int,
        level: int,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        halves: int = 1,
        norm: RMSNorm | None = None,
        **more: Any,
    ) -> Phase:
        """The phase of a weight `(halves * rows, cols)`. norm: applied to its input first."""
        weight = weight.detach()
        if norm is not None:
            weight = weight * norm.weight.detach()
            more = {**more, "normed": 1, "eps": float(norm.eps or 0.0)}
        return Phase(
            kind,
            level,
            len(weight) // halves,
            weight.shape[1],
            weight=weight,
            bias=None if bias is None else bias.detach(),
            out=out,
            **more,
        )

    def _add_layers(self, layers: Any, states: list[Any], stream: Tensor, level: int, last: dict[str, Any]) -> Tensor:
        """Phases of residual layers; `last`: fields of the last phase. Returns the stream after them: each layer has
        its own, so that none is written before all have read it."""
        for number, (layer, state) in enumerate(zip(layers, states, strict=True)):
            mixer: Any = layer.mixer
            more = {"source": stream, "residual": stream, "norm": layer.norm}
            flags = 0
            if isinstance(mixer, Mamba) and not mixer.lti:
                made = self._add_selective(mixer, state, level, more)
            elif isinstance(mixer, Mamba):
                made = self._vector(mixer.d_inner)
                system = _system(mixer.ssm, state.ssm)
                self._phases.append(
                    self._linear(
                        stretch.MAMBA,
                        level,
                        mixer.in_proj.weight,
                        mixer.in_proj.bias,
                        made,
                        2,
                        **_convolution(mixer, state),
                        **more,
                        **system,
                    )
                )
            elif isinstance(mixer, S4D):
                made, width = self._vector(mixer.d_model), mixer.d_model
                system = _system(mixer.ssm, state.ssm)
                norm = layer.norm.weight.detach()
                system["D"] = system["D"] * norm
                system["b"] = (system["b"].flatten(1) * norm[:, None]).view_as(system["b"]).contiguous()
                given: dict[str, Any] = {
                    "source": stream,
                    "residual": stream,
                    "normed": 1,
                    "eps": float(layer.norm.eps or 0.0),
                }
                self._phases.append(Phase(stretch.LTI, level, width, width, out=made, **given, **system))
                flags = stretch.GLU
            else:
                made = self._vector(mixer.hidden)
                halves = 2 if mixer.activation == "swiglu" else 1
                weight, bias = mixer.in_proj.weight, mixer.in_proj.bias
                kind_of = stretch.SWIGLU if halves == 2 else 0
                self._phases.append(
                    self._linear(stretch.GATED, level, weight, bias, made, halves, flags=kind_of, **more)
                )
            residual, stream = stream, self._vector(mixer.d_model)
            self._phases.append(
                self._linear(
                    stretch.OUT,
                    level,
                    mixer.out_proj.weight,
                    mixer.out_proj.bias,
                    stream,
                    2 if flags else 1,
                    source=made,
                    residual=residual,
                    flags=flags,
                )
            )
            if number + 1 == len(layers):
                self._phases[-1] = self._phases[-1]._replace(**last)
        return stream

    def _add_selective(self, mixer: Mamba, state: Any, level: int, more: dict[str, Any]) -> Tensor:
        """All phases of a selective block but the last. Returns what the last one reads."""
        inputs, gates, made = (self._vector(mixer.d_inner) for _ in range(3))
        in_proj, dt_proj = mixer.in_proj, mixer.dt_proj
        # the kernel reads rows of a multiple of 4: a rank that is none gets zeros
        zeros = -mixer.dt_rank % 4
        rank, others = mixer.x_proj.weight.detach().split([mixer.dt_rank, len(mixer.x_proj.weight) - mixer.dt_rank])
        x_proj = torch.cat([rank, rank.new_zeros(zeros, rank.shape[1]), others])
        to_dt = nn.functional.pad(dt_proj.weight.detach(), (0, zeros))
        products = self._vector(-(-len(x_proj) // 4) * 4)
        conv = {**_convolution(mixer, state), "copy": gates}
        A, states = mixer._A().detach(), state.ssm
        if mixer.complex:
            A, states = torch.view_as_real(A), torch.view_as_real(states)
        self._phases += [
            self._linear(stretch.CONV, level, in_proj.weight, in_proj.bias, inputs, 2, **conv, **more),
            self._linear(stretch.LINEAR, level, x_proj, None, products, source=inputs),
            self._linear(
                stretch.SCAN,
                level,
                to_dt,
                dt_proj.bias,
                made,
                source=products,
                held_cols=len(x_proj),
                residual=inputs,
                copy=gates,
                a=A.contiguous(),
                D=mixer.D.detach(),
                state=states,
                n_states=mixer.d_state,
                flags=stretch.COMPLEX if mixer.complex else 0,
            ),
        ]
        return made


def _convolution(mixer: Mamba, state: Any) -> dict[str, Any]:
    conv = mixer.conv1d
    bias = None if conv.bias is None else conv.bias.detach()
    return {"conv": conv.weight.detach(), "conv_bias": bias, "conv_state": state.conv, "width": mixer.d_conv}


def _system(ssm: DiagonalSSM, state: Tensor) -> dict[str, Any]:
    """The discrete system that steps a channel's states."""
    a, B, C = (value.detach() for value in ssm.discrete())
    if a.is_complex():  # y is 2 Re(C h)
        a, B, C, state = (torch.view_as_real(v.resolve_conj().contiguous()) for v in (a, B, 2 * C.conj(), state))
    return {
        "a": a.contiguous(),
        "b": B.contiguous(),
        "c": C.contiguous(),
        "D": ssm.D.detach(),
        "state": state,
        "n_states": ssm.d_state,
        "flags": stretch.COMPLEX if ssm.state_dtype().is_complex else 0,
    }
