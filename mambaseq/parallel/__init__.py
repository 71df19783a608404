"""Sequences split along time over the ranks of a process group (context parallelism).

    context = Context(mesh["context"])                       # or a process group; the ranks that share a sequence
    part = context.split(length, batch)                      # which positions are whose; cu_seqlens= for packed ones
    with part:
        out = model(part.take(tokens), part.take(labels))    # the loss is the whole sequences', on every rank
    out.loss.backward()
    context.sum_gradients(model.parameters())                # or DDP, whose mean is to be multiplied by the ranks

What a causal mixer remembers is a value of fixed size, its state. So a rank runs each layer over its own positions
from the state that the rank before it left there, and hands its own on (`mambaseq.backbones.relay`). No layer is
computed twice or corrected afterwards, and every kernel is the one that runs on a single device. A rank waits for the
one before it at the first layer only: from then on it is one layer behind. With L layers and N ranks a pass therefore
takes (L + N - 1) / (N L) of one device's time, and as much in the backward pass, in which the gradients of the states
go round the other way. Over chunks, of which a rank has one after the other, states of several layers share a message.

Where there are many ranks beside layers, and states are decayed sums over positions, all ranks run a layer at once
instead, from states that they gather (`mambaseq.parallel.ends`).
"""

from mambaseq.parallel.context import Context
from mambaseq.parallel.parts import Part, current

__all__ = ["Context", "Part", "current"]
