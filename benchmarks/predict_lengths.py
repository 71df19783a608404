"""What `mambaseq predict` gains by reading records of about one length together, padded, for those of one length:
200 records of 20 to 90, and of 50 to 1,000 tokens, by a language model and by a classifier that reads both ways.

    taskset -c 0 python benchmarks/predict_lengths.py

Both ways are run in turn, three times each; the ratio is that of the fastest. Times are those of the processor, on one
core: threads that wait for each other take time too, more of it on a busy machine.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from mambaseq_text.tokenization import ByteTokenizer

from mambaseq.checkpoints import ModelCard, save_model
from mambaseq.models import SequenceModel, build_model
from mambaseq.runs.prediction import predict

MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "language model": ("residual", {"name": "lm", "vocab_size": ByteTokenizer().vocab_size}, {"task": "next_token"}),
    "classifier, both ways": ("bidirectional", {"name": "classification", "n_classes": 3}, {"task": "classes"}),
}


def saved(folder: Path, backbone: str, head: dict[str, Any], card: dict[str, Any]) -> Path:
    tokenizer = ByteTokenizer()
    spec = {
        "d_model": 64,
        "encoder": {"name": "tokens", "vocab_size": tokenizer.vocab_size},
        "backbone": {"name": backbone, "n_layers": 4},
        "mixer": {"name": "mamba"},
        "head": head,
    }
    names = ["a", "b", "c"] if head["name"] == "classification" else []
    described = ModelCard(
        spec=spec,
        tokenizer={"name": "text/bytes", "options": {}},
        reader="text/text",
        length=1024,
        class_names=names,
        **card,
    )
    save_model(folder, build_model(spec), described, tokenizer)
    return folder


def seconds(model: Path, source: Path, padded: bool) -> tuple[float, int]:
    """CPU seconds of a prediction, and its batches."""
    batches = 0
    run = SequenceModel.given_mask

    def counted(part: Any, kind: str, mask: Any) -> Any:
        nonlocal batches
        batches += kind == "backbone"
        return run(part, kind, mask)

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(mock.patch.object(SequenceModel, "given_mask", staticmethod(counted)))
        if not padded:
            stack.enter_context(mock.patch.object(SequenceModel, "takes_padding", False))
        begun = time.process_time()
        predict(model, [source], source.with_suffix(".csv"), device="cpu")
        return time.process_time() - begun, batches


def main() -> None:
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, (backbone, head, card) in MODELS.items():
            model = saved(folder / backbone, backbone, head, card)
            for low, high in ((20, 90), (50, 1000)):
                source = folder / f"{low}.jsonl"
                texts = ("".join(draw.choice(list("abcdefgh"), size)) for size in draw.integers(low, high + 1, 200))
                source.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
                found = [(seconds(model, source, False), seconds(model, source, True)) for _ in range(3)]
                one, other = (min(row[place] for row in found) for place in (0, 1))
                print(
                    f"{name}, {low} to {high} tokens: {one[0]:.2f} s in {one[1]} batches of one length, {other[0]:.2f} "
                    f"s in {other[1]} of about one: {one[0] / other[0]:.2f} times as fast",
                    flush=True,
                )


if __name__ == "__main__":
    main()
