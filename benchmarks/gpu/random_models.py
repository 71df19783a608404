"""Models of random weights for `serving.sh`: /tmp/130M with word pieces, /tmp/demo with bytes.

python benchmarks/gpu/random_models.py TOKENIZER_JSON
"""

from __future__ import annotations

import sys

import torch
from mambaseq_text.tokenization import ByteTokenizer, HFTokenizer

from mambaseq.checkpoints import ModelCard, save_model
from mambaseq.models import causal_lm

SIZES = {"/tmp/130M": (50280, 768, 24), "/tmp/demo": (256, 128, 3)}


def main(tokenizer_file: str) -> None:
    for folder, size in SIZES.items():
        torch.manual_seed(0)
        tokenizer = ByteTokenizer() if size[0] == 256 else HFTokenizer(tokenizer_file)
        model = causal_lm(*size)
        name = {"name": "text/bytes" if size[0] == 256 else "text/hf", "options": tokenizer.options}
        with torch.no_grad():  # tied embeddings of the usual size make each token its own successor
            model.get_parameter("encoder.embedding.weight").mul_(0.1)
        save_model(folder, model, ModelCard(spec=model.spec, tokenizer=name, start_ids=[0]), tokenizer)
        print(folder, f"{model.n_parameters():,} parameters", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
