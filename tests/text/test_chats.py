"""Conversations and pairs: the loss is that of the assistant's answers, of every turn, and of nothing else."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mambaseq_text.chats import ChatData, stretches
from mambaseq_text.documents import DocumentData, PackedDocuments
from mambaseq_text.templates import ChatTemplate
from mambaseq_text.tokenization import HFTokenizer

from mambaseq.errors import ConfigError, DataError, UserError
from mambaseq.models import build_model

PLAIN = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for message in messages %}<{{ message.role }}>{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}</s>{% endgeneration %}{% else %}{{ message.content }}{% endif %}\n"
    "{% endfor %}"
)
FORGETFUL = (
    "{% for message in messages %}{% if loop.last %}<{{ message.role }}>{% endif %}{{ message.content }}{% endfor %}"
)
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "yes é"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "no"},
]
NONE = {"validation_fraction": 0.0, "test_fraction": 0.0}


@pytest.fixture
def options(tokenizer_json: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "plain.jinja").write_text(PLAIN)
    return {"path": str(tokenizer_json), "template": str(tmp_path / "plain.jinja")}


def rows(path: Path, *given: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return str(path)


def learned(data: ChatData) -> list[tuple[str, list[str]]]:
    """Of each sequence, all that it asks for, and what is learned of it, stretch by stretch."""
    data.setup()
    assert data.tokenizer is not None
    found = []
    packs = data.train()
    for batch in (packs[number] for number in range(len(packs))):
        assert batch.cu_seqlens is not None
        assert batch.targets is not None
        for start, stop in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            inputs, targets = batch.inputs[0, start:stop], batch.targets[0, start:stop]
            known = targets != -100
            assert torch.equal(targets[:-1][known[:-1]], inputs[1:][known[:-1]])
            stretched: list[list[int]] = [[]]
            for target in targets.tolist():
                if target != -100:
                    stretched[-1].append(target)
                elif stretched[-1]:
                    stretched.append([])
            told = [data.tokenizer.decode(torch.tensor(one).numpy()) for one in stretched if one]
            found.append((data.tokenizer.decode(inputs.numpy()), told))
    return sorted(found)


@pytest.mark.parametrize(
    ("source", "wanted"), [(PLAIN, ["yes é</s>\n", "no</s>\n"]), (MARKED, ["yes é</s>", "no</s>"])]
)
def test_all_turns_of_the_assistant_are_learned(source: str, wanted: list[str]) -> None:
    found = stretches(ChatTemplate(source), TALK)
    assert "".join(text for text, _ in found) == ChatTemplate(source).render(TALK, reply=False)
    assert [text for text, is_learned in found if is_learned] == wanted


def test_chats_from_a_file(options: dict[str, Any], tmp_path: Path) -> None:
    name = rows(tmp_path / "a.jsonl", {"messages": TALK}, {"messages": TALK[1:3]})
    data = ChatData(files=name, tokenizer_options=options, **NONE)  # type: ignore[arg-type]
    first, second = learned(data)
    assert first[1] == ["yes é</s>\n", "no</s>\n"]
    assert first[0].startswith("<system>be brief</s>\n<user>one?</s>\n<assistant>yes é</s>\n<user>two?")
    assert second[1] == ["yes é</s>\n"]
    tokenizer = data.tokenizer
    assert isinstance(tokenizer, HFTokenizer)
    saved = HFTokenizer.load_files(tmp_path, tokenizer.save_files(tmp_path))
    assert saved.chat(TALK[:2])[0].tolist() == tokenizer.chat(TALK[:2])[0].tolist()  # what a server then asks
    short = ChatData(files=name, tokenizer_options=options, length=70, **NONE)  # type: ignore[arg-type]
    assert [len(one) for _, one in learned(short)] == [1, 1]  # the long one loses its end


def test_pairs_and_their_bytes(options: dict[str, Any], tmp_path: Path) -> None:
    pair = {"question": "what is it? ", "answer": "a café"}
    name = rows(tmp_path / "train.jsonl", pair)
    test = rows(tmp_path / "test.jsonl", {**pair, "answer": "the end"}, {**pair, "question": "é "})
    given: dict[str, Any] = {"files": name, "test_files": test, "validation_fraction": 0.0, "prompt": "question"}
    eos = {"path": options["path"], "eos": "<|endoftext|>"}
    data = ChatData(form="pairs", tokenizer_options=eos, **given)
    assert learned(data) == [("what is it? a café", ["a café"])]
    batch = data.train()[0]
    assert batch.targets is not None
    assert batch.targets[0, -1] == data.tokenizer.eos_id  # type: ignore[union-attr]
    held_out = data.test()
    assert held_out is not None
    assert held_out[0].n_units is not None
    assert held_out[0].n_units.tolist() == [len("the end"), len("a café".encode())]
    templated = ChatData(form="templated_pairs", tokenizer_options=options, **given)
    assert learned(templated)[0][1] == ["a café</s>\n"]
    bare = ChatData(form="pairs", tokenizer="text/bytes", tokenizer_options={"eos": True}, between="\n", **given)
    assert learned(bare) == [("what is it? \na café", ["a café"])]


def test_special_tokens_have_no_bytes_in_any_form(options: dict[str, Any], tmp_path: Path) -> None:
    """Bits a byte compare however conversations are written: bytes are those of the answers, without marks."""
    answers = ["a café", "no", "the end <|endoftext|> of it"]
    pairs = [{"prompt": "what?", "answer": answer} for answer in answers]
    talks = [[{"role": "user", "content": "what?"}, {"role": "assistant", "content": answer}] for answer in answers]
    test = {
        "pairs": rows(tmp_path / "pairs.jsonl", *pairs),
        "chats": rows(tmp_path / "chats.jsonl", *({"messages": talk} for talk in talks)),
    }
    train = rows(tmp_path / "train.jsonl", {"prompt": "a", "answer": "b", "messages": TALK})
    ours = {"path": options["path"], "eos": "<|endoftext|>", "template": "mambaseq:configs/text/chat.jinja"}
    wanted = [len(answer.replace("<|endoftext|>", "").encode()) for answer in answers]
    for form in ("pairs", "templated_pairs", "chats"):
        data = ChatData(files=train, test_files=test["chats" if form == "chats" else "pairs"],
                        form=form, tokenizer_options=ours, validation_fraction=0.0)  # fmt: skip
        data.setup()
        packs = data.test()
        assert packs is not None
        batch = packs[0]
        assert batch.n_units is not None
        assert batch.n_units.tolist() == wanted, form
        assert int((batch.targets == data.tokenizer.eos_id).sum()) == 4  # type: ignore[union-attr]


def test_what_cannot_be_learned_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    name = rows(
        tmp_path / "a.jsonl",
        {"messages": TALK},
        {"messages": "hi"},
        {"messages": TALK[:2]},
        {"messages": [{"role": "x"}]},
    )
    given: dict[str, Any] = {"files": name, **NONE}
    with pytest.raises(ConfigError, match=r"no chat template.*chat_template\.jinja.*data\.form: pairs"):
        ChatData(tokenizer_options={"path": options["path"]}, **given).setup()
    with pytest.raises(DataError, match=r"There is no chat template .*none\.jinja"):
        ChatData(tokenizer_options={**options, "template": "none.jinja"}, **given).setup()
    with pytest.raises(DataError, match=r"Line 2 of .*a\.jsonl: messages must be a list.*2 more .*line 3 .*line 4 "):
        ChatData(tokenizer_options=options, **given).setup()
    data = ChatData(tokenizer_options=options, skip_bad=True, **given)
    assert len(learned(data)) == 1
    assert [row["line"] for row in data.left_out()] == [2, 3, 4]
    with pytest.raises(UserError, match=r"cannot be told\. Put \{% generation %\}"):
        stretches(ChatTemplate(FORGETFUL), TALK)
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(DataError, match="plain text holds no conversations"):
        ChatData(files=str(tmp_path / "a.txt"), tokenizer_options=options).setup()
    test = rows(tmp_path / "b.jsonl", {"messages": TALK})
    with pytest.raises(DataError, match=r"a\.jsonl, row 1 \(train\) is a copy of .*b\.jsonl, row 1"):
        ChatData(files=name, test_files=test, skip_bad=True, tokenizer_options=options, validation_fraction=0.0).setup()


def test_no_state_crosses_from_one_document_to_the_next(tmp_path: Path) -> None:
    """Another first document changes nothing of what is said of the second one."""
    logits = []
    for first in ("some words", "other text"):
        name = rows(tmp_path / f"{first[:4]}.jsonl", {"text": first}, {"text": "and a second one"})
        data = DocumentData(files=name, length=64, **NONE)  # type: ignore[arg-type]
        data.setup()
        train = data.train()
        assert isinstance(train, PackedDocuments)
        (batch,) = [train[number] for number in range(len(train))]
        torch.manual_seed(0)
        parts = {"encoder": {"name": "tokens", "vocab_size": 256}, "head": {"name": "lm", "vocab_size": 256}}
        spec = {
            "d_model": 8,
            "mixer": {"name": "mamba", "backend": "reference"},
            "backbone": {"name": "residual", "n_layers": 2},
            **parts,
        }
        found = build_model(spec)(batch.inputs, cu_seqlens=batch.cu_seqlens).logits[0]
        assert batch.cu_seqlens is not None
        bounds = batch.cu_seqlens.tolist()
        logits.append({stop - start: found[start:stop] for start, stop in itertools.pairwise(bounds)})
    second = len("and a second one") - 1
    assert torch.equal(logits[0][second], logits[1][second])
    assert not torch.equal(logits[0][9], logits[1][9])
