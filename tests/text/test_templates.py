"""Chat templates: what transformers writes, within bounds."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mambaseq_text.templates import ChatTemplate, check_messages
from mambaseq_text.tokenization import ByteTokenizer, HFTokenizer

from mambaseq.errors import ConfigError, DataError, UserError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] ~ '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}\n"
    "{% if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n' -}}\n{% endif %}"
)
LLAMA = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}{% else %}"
    "{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}{% endfor %}{{ messages | tojson }}"
    "{%- for message in messages %}{% if loop.last %}{% break %}{% endif %}-{% endfor %}"
)
TALK = [
    {"role": "system", "content": "Be <kind> & 'brief'."},
    {"role": "user", "content": " Hé, 東京? "},
    {"role": "assistant", "content": "Yes.\n"},
    {"role": "user", "content": "Why?"},
]


@pytest.fixture(scope="module")
def talking(tokenizer_json: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with the template and the tokens of ChatML."""
    folder = tmp_path_factory.mktemp("talking")
    told = json.loads(tokenizer_json.read_text())
    size = len(told["model"]["vocab"])
    more = [token | {"id": size + n, "content": f"<|im_{name}|>"} for n, name in enumerate(("start", "end"))
            for token in told["added_tokens"][:1]]  # fmt: skip
    told["added_tokens"] += more
    told["model"]["vocab"] |= {token["content"]: token["id"] for token in more}
    (folder / "tokenizer.json").write_text(json.dumps(told))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML, "eos_token": "<|endoftext|>"}))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("source", [CHATML, LLAMA])
@pytest.mark.parametrize("reply", [True, False])
def test_conversations_are_what_transformers_writes(source: str, reply: bool) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    texts, spans = utils.render_jinja_template(
        [TALK], chat_template=source, add_generation_prompt=reply, return_assistant_tokens_mask=True, **tokens
    )
    made = ChatTemplate(source, tokens)
    assert made.marked(TALK, reply=reply) == (texts[0], [tuple(span) for span in spans[0]])
    assert pickle.loads(pickle.dumps(made)).render(TALK, reply=reply) == texts[0]


def test_answers_end_with_the_token_behind_them(talking: Path) -> None:
    tokenizer = HFTokenizer(str(talking), eos="<|endoftext|>")
    assert tokenizer.chats
    ids, ends = tokenizer.chat(TALK)
    text = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in TALK)
    whole = tokenizer.encode(text + "<|im_start|>assistant\n")
    np.testing.assert_array_equal(ids, whole)
    assert ends == {tokenizer.encode(mark)[0] for mark in ("<|im_end|>", "<|endoftext|>")}
    assert [*map(int, ids)].count(int(tokenizer.encode("<|im_end|>")[0])) == len(TALK)
    folder = talking.parent / "run"
    folder.mkdir()
    kept = HFTokenizer.load_files(folder, tokenizer.save_files(folder))
    np.testing.assert_array_equal(kept.chat(TALK)[0], ids)


def test_a_file_of_the_template_goes_before_the_settings_and_several_have_a_default(
    talking: Path, tmp_path: Path
) -> None:
    shutil.copy(talking, tmp_path)
    several = [{"name": "default", "template": "one {{ bos_token }}"}, {"name": "tool_use", "template": "two"}]
    told = {"chat_template": several, "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    made = ChatTemplate.beside(tmp_path / "tokenizer.json")
    assert made is not None
    assert made.render(TALK) == "one <s>"
    (tmp_path / "chat_template.jinja").write_text("three")
    made = ChatTemplate.beside(tmp_path / "tokenizer.json")
    assert made is not None
    assert made.render(TALK) == "three"


def test_without_a_template_there_is_no_chat(tokenizer_json: Path) -> None:
    for tokenizer in (ByteTokenizer(), HFTokenizer(str(tokenizer_json))):
        assert not tokenizer.chats
        with pytest.raises(ConfigError, match="/v1/completions"):
            tokenizer.chat(TALK)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for", "line 1"),
        ("a\n{% nothing %}", "line 2"),
        ("{{ " + "(" * 9000, "chat template"),
    ],
)
def test_a_damaged_template_is_told(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as told:
        ChatTemplate(source)
    assert len(str(told.value)) < 1000


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10 ** 9 }}",
        "{{ 'a' * 1000000000 }}",
        "{{ 1000000000 * [1] }}",
        "{{ '%1000000000d' % 1 }}",
        "{% set n = namespace(x='aaaaaaaaaa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='aaaaaaaaaa') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% for i in range(10000) %}{% for j in range(10000) %}{{ messages }}{% endfor %}{% endfor %}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages[9].content }}",
        "{{ raise_exception('No system messages here.') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_what_a_template_may_not_do_is_told(source: str) -> None:
    with pytest.raises(UserError, match="chat template") as told:
        print(ChatTemplate(source).render(TALK)[:100])
    assert len(str(told.value)) < 1000


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], "must be a list"),
        ("hello", "must be a list"),
        ([{"role": "user", "content": "a"}, "b"], "Message 2"),
        ([{"content": "a"}], "role"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "message 1 must be text"),
        ([{"role": "user"}], "message 1 must be text, not null"),
    ],
)
def test_messages_that_are_none_are_told(messages: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        check_messages(messages)
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert check_messages(parts) == [{"role": "user", "content": "ab"}]
