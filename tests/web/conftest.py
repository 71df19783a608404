from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from mambaseq_text.tokenization import ByteTokenizer, HFTokenizer

from mambaseq.checkpoints import ModelCard, save_model
from mambaseq.models import SequenceModel, causal_lm

MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'nobody' %}{{ raise_exception('There is no nobody.') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def made(vocab_size: int) -> SequenceModel:
    torch.manual_seed(0)
    model = causal_lm(vocab_size=vocab_size, d_model=16, n_layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = made(256)
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    card = ModelCard(spec=model.spec, tokenizer={"name": "text/bytes", "options": {}}, start_ids=[10])
    save_model(folder, model, card, ByteTokenizer())
    return folder


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose tokenizer has a chat template."""
    files, folder = tmp_path_factory.mktemp("tokenizer"), tmp_path_factory.mktemp("serve") / "talker"
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=MARKS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(["the end of the day"] * 3, trainer)
    words.save(str(files / "tokenizer.json"))
    (files / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    tokenizer = HFTokenizer(str(files / "tokenizer.json"), eos=MARKS[0])
    model = made(tokenizer.vocab_size)
    described: dict[str, Any] = {"name": "text/hf", "options": tokenizer.options}
    save_model(folder, model, ModelCard(spec=model.spec, tokenizer=described, start_ids=[0]), tokenizer)
    return folder


@pytest.fixture(scope="session")
def server(run: Path) -> Iterator[Any]:
    from servers import Server

    served = Server(run)
    yield served
    served.close()


@pytest.fixture(scope="session")
def talking(talker: Path) -> Iterator[Any]:
    """A server that chats."""
    from servers import Server

    served = Server(talker)
    yield served
    served.close()
