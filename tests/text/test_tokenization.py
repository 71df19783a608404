from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from mambaseq_text.tokenization import ByteTokenizer, HFTokenizer, TextTokenizer, make_tokenizer

from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, DataError, UserError

BYTE_OPTIONS = [{}, {"bos": True}, {"eos": True}, {"bos": True, "eos": True}]


def all_tokenizers(path: Path) -> list[TextTokenizer]:
    mark = "<|endoftext|>"
    return [
        *(ByteTokenizer(**options) for options in BYTE_OPTIONS),
        HFTokenizer(str(path)),
        HFTokenizer(str(path), bos=mark, eos=mark),
    ]


def test_bytes_are_the_ids() -> None:
    assert ByteTokenizer().encode("é!").tolist() == [0xC3, 0xA9, 0x21]
    assert ByteTokenizer().encode("é!".encode()).tolist() == [0xC3, 0xA9, 0x21]
    assert ByteTokenizer().encode("é!").dtype == np.uint8


def test_special_bytes() -> None:
    both = ByteTokenizer(bos=True, eos=True)
    assert (both.bos_id, both.eos_id, both.vocab_size, both.start_ids) == (256, 257, 258, [256])
    assert both.encode("a").tolist() == [256, 97]
    assert both.encode("a").dtype == np.uint16
    assert [ids.tolist() for ids, _ in both.document(["a", "b"])] == [[256], [97], [98], [257]]
    assert ByteTokenizer(eos=True).eos_id == 256
    assert ByteTokenizer(eos=True).start_ids == [256]
    assert ByteTokenizer().start_ids == [10]
    assert [ids.tolist() for ids, _ in ByteTokenizer().document(["a"], joint="\n")] == [[97], [10]]


def test_round_trip(sample: str, tokenizer_json: Path) -> None:
    for tokenizer in all_tokenizers(tokenizer_json):
        ids = tokenizer.encode(sample)
        assert ids.max() < tokenizer.vocab_size
        assert tokenizer.decode(ids) == sample


def test_counts_sum_to_the_bytes_of_every_prefix(sample: str, tokenizer_json: Path) -> None:
    for tokenizer in all_tokenizers(tokenizer_json):
        ids, counts = tokenizer.encode_counted(sample)
        assert len(ids) == len(counts)
        assert counts.sum() == len(sample.encode())
        whole = np.concatenate([np.stack(both) for both in tokenizer.document([sample])], axis=1)
        assert whole[1].sum() == len(sample.encode())
    # where tokens end with characters, what stands before decodes to as many bytes
    ids, counts = HFTokenizer(str(tokenizer_json)).encode_counted(sample)
    assert len(ids) < len(sample.encode())
    checked = 0
    for n in range(len(ids)):
        text = HFTokenizer(str(tokenizer_json)).decode(ids[:n]) if n % 7 == 0 else "�"
        if "�" not in text:
            assert len(text.encode()) == counts[:n].sum()
            checked += 1
    assert checked > 3


def test_counts_of_a_tokenizer_that_drops_characters(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "the": 1, "end": 2}, unk_token="[UNK]"))
    words.normalizer = tokenizers.normalizers.Lowercase()
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    ids, counts = HFTokenizer(str(tmp_path / "tokenizer.json")).encode_counted("  The é  END \n")
    assert ids.tolist() == [1, 0, 2]
    assert counts.tolist() == [5, 3, 7]  # a token has the blanks before it, the last one those after it too


def test_empty_text(tokenizer_json: Path) -> None:
    for tokenizer in all_tokenizers(tokenizer_json):
        ids, counts = tokenizer.encode_counted("")
        assert len(ids) == len(counts) == 0
        assert tokenizer.decode(ids) == ""


def test_broken_bytes_are_replaced() -> None:
    assert ByteTokenizer().decode(np.array([97, 0xFF, 0xC3])) == "a��"
    with pytest.raises(DataError, match="not UTF-8 at byte 1"):
        ByteTokenizer().encode(b"a\xff")


@pytest.mark.parametrize("options", BYTE_OPTIONS)
def test_saved_bytes(tmp_path: Path, options: dict[str, Any], sample: str) -> None:
    first = ByteTokenizer(**options)
    second = ByteTokenizer.load_files(tmp_path, first.save_files(tmp_path))
    assert second.options == first.options
    assert (second.encode(sample) == first.encode(sample)).all()


def test_a_tokenizer_file_goes_with_the_model(tmp_path: Path, tokenizer_json: Path, sample: str) -> None:
    original = tmp_path / "here" / "original.json"
    original.parent.mkdir()
    original.write_bytes(tokenizer_json.read_bytes())
    first = HFTokenizer(str(original), eos="<|endoftext|>")
    original.unlink()
    folder = tmp_path / "model"
    folder.mkdir()
    options = first.save_files(folder)
    assert options["path"] == "tokenizer.json"
    moved = folder.rename(tmp_path / "moved")
    second = HFTokenizer.load_files(moved, options)
    assert (second.encode(sample) == first.encode(sample)).all()
    assert second.eos_id == first.eos_id
    assert second.identity == first.identity


def test_bad_tokenizer_files(tmp_path: Path, tokenizer_json: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer file .*gone\.json"):
        HFTokenizer(str(tmp_path / "gone.json"))
    (tmp_path / "bad.json").write_text('{"vocab": 1}')
    with pytest.raises(DataError, match=r"bad\.json cannot be read as a tokenizer\.json"):
        HFTokenizer(str(tmp_path / "bad.json"))
    with pytest.raises(ConfigError, match=r"no token '<\|endoftxt\|>'.*Did you mean '<\|endoftext\|>'.*null for none"):
        HFTokenizer(str(tokenizer_json), bos="<|endoftxt|>")
    ByteTokenizer().save_for_transformers(tmp_path)
    with pytest.raises(ConfigError, match=r"no special tokens\. .* --data\.tokenizer_options\.eos null"):
        HFTokenizer(str(tmp_path / "tokenizer.json"), eos="<|endoftext|>")


def test_names(tokenizer_json: Path) -> None:
    assert isinstance(make_tokenizer("text/hf", {"path": str(tokenizer_json)}), HFTokenizer)
    with pytest.raises(ConfigError, match="Did you mean 'text/bytes'"):
        make_tokenizer("text/byte", None)
    for name, options, message in (
        ("text/bytes", {"boss": True}, "'text/bytes' has no option 'boss'. Did you mean 'bos'? It has: bos, eos."),
        ("text/bytes", {"template": "a.jinja"}, "writes no chats, so it takes no template. They need --data.tokenizer"),
        ("text/bytes", {"eos": "</s>"}, "'text/bytes' takes bool for eos, not '</s>'"),
        ("text/hf", {}, "'text/hf' needs path, which is not given"),
        ("text/hf", {"path": 5}, "'text/hf' takes str for path, not 5"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)) as told:
            make_tokenizer(name, options)
        assert str(told.value).startswith("data.tokenizer_options")
        assert "__init__" not in str(told.value)
    for kind in ("tokenizers", "datasets", "readers", "writers"):
        for entry in catalog()[kind]:
            if entry.name.startswith("text/"):
                assert callable(entry.load())


def saved(path: Path, model: Any) -> str:
    tokenizers.Tokenizer(model).save(str(path))
    return str(path)


@pytest.mark.parametrize("entries", [0, 1])
def test_a_vocabulary_that_is_none(tmp_path: Path, entries: int) -> None:
    vocabulary = {"a": 0} if entries else {}
    path = saved(tmp_path / "small.json", tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    with pytest.raises(DataError, match=rf"The vocabulary of .*small\.json has {entries} entries"):
        HFTokenizer(path)


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece"])
def test_text_that_a_tokenizer_cannot_take(tmp_path: Path, kind: str) -> None:
    model = getattr(tokenizers.models, kind)({"a": 0, "b": 1}, unk_token="[UNK]")
    tokenizer = HFTokenizer(saved(tmp_path / "odd.json", model))
    assert tokenizer.encode("a").tolist() == [0]
    with pytest.raises(DataError, match=r"odd\.json cannot take the text 'words'.*unknown text"):
        tokenizer.encode("words")


def test_dropout_of_a_tokenizer_is_for_its_own_training(tmp_path: Path) -> None:
    model = tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], dropout=0.9)
    tokenizer = HFTokenizer(saved(tmp_path / "t.json", model))
    assert all(tokenizer.encode("ab" * 9).tolist() == [2] * 9 for _ in range(5))


@pytest.mark.parametrize("text", ['"zzz": 4000000000', '"zzz": 3999999999'])
def test_an_id_that_takes_all_memory_is_refused_before_the_library_sees_it(tmp_path: Path, text: str) -> None:
    """The library ends the process: there is nothing to catch."""
    path = tmp_path / "tokenizer.json"
    head, end = '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, ', '}, "unk_token": "a"}}'
    path.write_text(head + text + end)
    with pytest.raises(UserError, match=r"tokenizer\.json, by an id .*MAMBASEQ_MAX_TOKEN_IDS"):
        HFTokenizer(str(path))


@pytest.mark.parametrize("name", ["../tokenizer.json", "/etc/passwd", 3, None])
def test_a_saved_tokenizer_is_a_file_beside_its_model(tmp_path: Path, name: object) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(UserError, match=r"model\.json: tokenizer\.options\.path must be a file beside it"):
        HFTokenizer.load_files(tmp_path / "m", {"path": name})
