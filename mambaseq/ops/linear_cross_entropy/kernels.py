# mypy: allow-untyped-defs
"""The Triton kernel of the cross-entropy: logits of a row become their gradient where they lie."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy(
    logits, labels, losses, ignore_index,
    VOCAB: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, STORE_GRADIENT: tl.constexpr,
):  # fmt: skip
    """A program a row. logits `(rows, VOCAB)`, rows STRIDE elements apart: become softmax(logits) - onehot(label),
    zeros where the label is ignored. A label outside the vocabulary makes the loss and the row NaN.

    Loads and stores reach into the room between rows, whatever is there, since a bound that is a multiple of a wide
    load lets the compiler use wide loads.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    columns = tl.arange(0, BLOCK)
    logits += row * STRIDE
    if label == ignore_index:
        tl.store(losses + row, 0.0)
        if STORE_GRADIENT:
            for begin in range(0, VOCAB, BLOCK):
                at = begin + columns
                tl.store(logits + at, tl.zeros((BLOCK,), dtype=logits.dtype.element_ty), mask=at < STRIDE)
    else:
        known = (label >= 0) & (label < VOCAB)
        of_label = tl.load(logits + label, mask=known, other=0.0).to(tl.float32)
        # relative to the greatest so far
        greatest = tl.full((), float("-inf"), tl.float32)
        total = tl.full((), 0.0, tl.float32)
        for begin in range(0, VOCAB, BLOCK):
            at = begin + columns
            v = tl.load(logits + at, mask=at < STRIDE, other=0.0).to(tl.float32)
            v = tl.where(at < VOCAB, v, float("-inf"))
            new = tl.maximum(greatest, tl.max(v, axis=0))
            total = total * tl.exp(greatest - new) + tl.sum(tl.exp(v - new), axis=0)
            greatest = new
        normaliser = tl.where(known, greatest + tl.log(total), float("nan"))
        tl.store(losses + row, normaliser - of_label)
        if STORE_GRADIENT:
            for begin in range(0, VOCAB, BLOCK):
                at = begin + columns
                v = tl.load(logits + at, mask=at < STRIDE, other=0.0).to(tl.float32)
                v = tl.where(at < VOCAB, v, float("-inf"))
                d = tl.exp(v - normaliser) - tl.where(at == label, 1.0, 0.0)
                tl.store(logits + at, d.to(logits.dtype.element_ty), mask=at < STRIDE)
