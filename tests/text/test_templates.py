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
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ ('x'.ljust(300000000)) | length }}",
        "{{ ('%300000000d' | format(1)) | length }}",
        "{{ '{:>300000000}'.format(1) | length }}",
        "{{ '{x:>300000000}'.format_map({'x': 1}) | length }}",
        "{{ 'x' | indent(300000000, true) | length }}",
        "{{ ('ab' * 500000) | replace('a', 'b' * 1000) | length }}",
        "{{ ('ab' * 500000).replace('a', 'c' * 1000) | length }}",
        "{{ (['x'] * 1000) | join('y' * 100000) | length }}",
        "{{ ('y' * 100000).join(['x'] * 1000) | length }}",
        "{{ ('y' * 10000).join('x' * 10000) | length }}",
        "{{ [1] | batch(100000000, 0) | list | length }}",
        "{{ 'x' | center(300000000) | length }}",
        "{{ dict.fromkeys(range(9), 1) }}",
        "{{ lipsum(n=100000) | length }}",
        "{{ '%300000000d' is odd }}",
        "{{ ['%300000000d'] | select('even') | list }}",
        "{{ 2 | round(300000000) }}",
        "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{% set n = namespace(x=[1]) %}{% for i in range(50) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x=1) %}{% for i in range(50) %}{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}",
        "{% set n = namespace(x=1) %}{% for i in range(9999) %}{% set n.x = [n.x] %}{% endfor %}",
        "{% set n = namespace() %}{% set n.x = [n] %}",
        "{{ [1, 2] | tojson(separators=('a' * 1000000, ':')) | length }}",
        "{{ ('a ' * 2000000).split() | length }}",
        "{{ ('a' * 4000000).strip('b' * 4000000) | length }}",
        "{{ [-1000000000] | map('a charge') | list }}{{ ''.ljust(1) }}",
        "{% autoescape true %}{{ messages }}{% endautoescape %}",
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
    "source",
    [
        "{% for i in range(99999) recursive %}{{ loop(range(99)) if loop.depth < 9 }}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ range(99999) | select('even') | list | length }}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
        "{% set x = 'a' * 60000 %}{% for i in range(99999) %}{{ 'b' in x }}{% endfor %}",
        "{% set x = 'a' * 60000 %}{% for i in range(99999) %}{{ x.find('b') }}{% endfor %}",
        "{% set x = 'a' * 60000 %}{% for i in range(99999) %}{{ (x | upper)[:1] }}{% endfor %}",
        "{% set x = [1] * 60000 %}{% for i in range(99999) %}{{ x == x[:] }}{% endfor %}",
        "{% set x %}{% for i in range(99999) %}" + "a" * 5000 + "{% endfor %}{% endset %}{{ x | length }}",
    ],
)
def test_all_the_work_of_a_template_is_bounded(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBASEQ_MAX_CHAT_CHARACTERS", "65536")
    with pytest.raises(UserError, match="more work than"):
        ChatTemplate(source).render(TALK)


PUBLISHED = """
{%- macro parameters(given) -%}
    {%- for key, value in given | dictsort %}{{ key }}:{{ value['type'] | upper }}{% if not loop.last %},{% endif %}
    {%- endfor %}
{%- endmacro -%}
{%- set ns = namespace(last=-1, seen=[], text='') -%}
{%- set rest = messages[1:] if messages[0].role == 'system' else messages -%}
{%- for message in rest[::-1] if message.role == 'user' %}
    {%- set ns.last = (rest | length - 1) - loop.index0 %}{% set ns.seen = ns.seen + [message] %}
{%- endfor -%}
{{ parameters(tools[0].function.parameters) }}|{{ tools | tojson(indent=2) | indent(4) }}|{{ tools[0] | string }}
{%- for key, value in tools[0].function.items() %}{{ key | title ~ loop.index }}={{ value }};{% endfor %}
{%- set asked = rest | selectattr('role', 'equalto', 'user') | list %}
{{- asked | map(attribute='content') | map('trim') | join(', ') }} {{ (messages | rejectattr('role', 'eq', 'user')
    | list | last).content.split('.')[0].lstrip('\n').replace('e', 'E') }} {{ message is defined }}
{%- for message in rest %}
    {%- if message == asked[-1] and loop.index0 >= ns.last and message.get('tool_calls') is none %} last {% endif %}
    {%- if message.content is string and '?' in message.content and not message.content.startswith('no') %}
        {{- message.role | capitalize + ': ' + (message.content | default('', true)).strip() }}
    {%- else %}{{ raise_exception('no') if message.content is mapping }}{{ message.content.rstrip().rsplit('s', 1) }}
    {%- endif %}
    {%- set ns.text = ns.text + message.content %}
{%- endfor %}{{ ns.text[:9] ~ (1, 'a', none, 1.5, true) }} {{ 7 % 2 + 3 * 2 - 1 }} {{ '-' * 5 }} {{ '3' | int + 1 }}
{%- set made %}{% generation %}answer{% endgeneration %}{% endset %}{{ made }}{{ ' ' ~ nothing }}
{{- 'a' if nothing is undefined else 'b' }} {{ ['b', 'a'] | sort | first }} {{ [1, 2] | reject('equalto', 1) | list }}
"""


def test_what_published_templates_use_is_there() -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    tools = [{"function": {"name": "é", "parameters": {"b": {"type": "int"}, "a": {"type": "string"}}}}]
    texts, _ = utils.render_jinja_template([TALK], chat_template=PUBLISHED, tools=tools)
    text, spans = ChatTemplate(PUBLISHED).marked(TALK, tools=tools)
    assert text == texts[0]
    assert [text[slice(*span)] for span in spans] == ["answer"]


def test_long_conversations_are_written() -> None:
    talk = [{"role": role, "content": "word " * 20} for _ in range(5000) for role in ("user", "assistant")]
    text = ChatTemplate(CHATML).render(talk)
    assert text.count("<|im_start|>") == len(talk) + 1


@pytest.mark.parametrize(
    "shown", ["x[:3]", "x[1:]", "x[:-1]", "x | replace('Yes', '') ~ x", "x ~ x[:2]", "x | tojson(true)", "x ~ x", "''"]
)
def test_what_is_left_of_a_mark_is_never_written(shown: str) -> None:
    block = "{% set x %}{% generation %}{{ messages[2].content }}{% endgeneration %}{% endset %}"
    assert ChatTemplate(block + "a{{ x }}").marked(TALK) == ("aYes.\n", [(1, 6)])
    with pytest.raises(UserError, match="generation"):
        ChatTemplate(block + "{{ " + shown + " }}").marked(TALK)
    held = [{"role": "user", "content": "".join(map(chr, range(0xFDD0, 0xFDE0)))}, *TALK[1:]]
    assert ChatTemplate(block + "{{ messages[0].content ~ x }}").marked(held)[1] == [(16, 21)]


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
