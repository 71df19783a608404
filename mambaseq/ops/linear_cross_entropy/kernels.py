# mypy: allow-untyped-defs
"""The Triton kernel of the cross-entropy: logits of a row become their gradient where they lie."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy(
    logits, labels, losses, ignore_index, stride,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, STORE_GRADIENT: tl.constexpr,
):  # fmt: skip
    """A program a row. logits `(rows, VOCAB)`, rows so many elements apart: become softmax(logits) - onehot(label),
    zeros where the label is ignored. A label outside the vocabulary makes the loss NaN."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    columns = tl.arange(0, BLOCK)
    logits += row * stride
    if label == ignore_index:
        tl.store(losses + row, 0.0)
        if STORE_GRADIENT:
            for begin in range(0, VOCAB, BLOCK):
                zeros = tl.zeros((BLOCK,), dtype=logits.dtype.element_ty)
                tl.store(logits + begin + columns, zeros, mask=begin + columns < VOCAB)
    else:
        of_label = tl.load(logits + label, mask=(label >= 0) & (label < VOCAB), other=float("nan")).to(tl.float32)
        # relative to the greatest so far
        greatest = tl.full((), float("-inf"), tl.float32)
        total = tl.full((), 0.0, tl.float32)
        for begin in range(0, VOCAB, BLOCK):
            inside = begin + columns < VOCAB
            v = tl.load(logits + begin + columns, mask=inside, other=float("-inf")).to(tl.float32)
            new = tl.maximum(greatest, tl.max(v, axis=0))
            total = total * tl.exp(greatest - new) + tl.sum(tl.exp(v - new), axis=0)
            greatest = new
        normaliser = greatest + tl.log(total)
        tl.store(losses + row, normaliser - of_label)
        if STORE_GRADIENT:
            for begin in range(0, VOCAB, BLOCK):
                inside = begin + columns < VOCAB
                v = tl.load(logits + begin + columns, mask=inside, other=0.0).to(tl.float32)
                d = tl.exp(v - normaliser) - tl.where(begin + columns == label, 1.0, 0.0)
                tl.store(logits + begin + columns, d.to(logits.dtype.element_ty), mask=inside)
