from __future__ import annotations

import pytest
import yaml

from mambaseq.data.addresses import check_address, expanded, redacted
from mambaseq.data.cache import locate
from mambaseq.errors import ConfigError, DataError
from mambaseq.runs.parsing import parse_config

SECRET = "hunter2/+%@x"

WRITTEN_OUT = [
    ("https://user:hunter2@host/a.jsonl", "https://user:***@host/a.jsonl"),
    ("https://user:hunter2@host:8080/a@b.jsonl?x=1", "https://user:***@host:8080/a@b.jsonl?x=1"),
    ("https://user:hunt@hunter2@host/a.jsonl", "https://user:***@host/a.jsonl"),
    ("https://user:hunter2/x@host/a.jsonl", "https://user:***@host/a.jsonl"),
    ("https://hunter2@host/a.jsonl", "https://***@host/a.jsonl"),
    ("s3://key:hunter2@bucket/a.jsonl", "s3://key:***@bucket/a.jsonl"),
    ("https://host/a.jsonl?token=hunter2&x=1", "https://host/a.jsonl?token=***&x=1"),
    ("https://h/a?x=1&sig=hunter2", "https://h/a?x=1&sig=***"),
    ("https://h/a?X-Amz-Signature=hunter2", "https://h/a?X-Amz-Signature=***"),
    ("https://h/a?api_key=hunter2#b", "https://h/a?api_key=***#b"),
    ("https://h/a#access_token=hunter2", "https://h/a#access_token=***"),
    ("zip://a.txt::https://user:hunter2@host/a.zip", "zip://a.txt::https://user:***@host/a.zip"),
    ("simplecache::https://h/a?key=hunter2", "simplecache::https://h/a?key=***"),
    ("ftp://user:hunter2${PART}@host/a", "ftp://user:***@host/a"),
]

FINE = [
    "https://host/a.jsonl",
    "https://host:8080/a@b:c/d@e",
    "https://[::1]:8080/a@b",
    "hf://datasets/user/name@refs/convert/a.parquet",
    "abfs://container@account.dfs.core.windows.net/a",
    "sftp://user@host/a",
    "https://user:${PASSWORD}@host/a",
    "https://${USER}:${PASSWORD}@host/a",
    "https://${TOKEN}@host/a",
    "https://host/a?token=${TOKEN}&design=1&author=me&page=2",
    "zip://a.txt::https://u:${PASSWORD}@host/a.zip",
]


@pytest.mark.parametrize(("address", "shown"), WRITTEN_OUT)
def test_secrets_that_are_written_out(address: str, shown: str) -> None:
    assert redacted(address) == shown
    assert redacted(f"Cannot open url={address} now") == f"Cannot open url={shown} now"
    with pytest.raises(ConfigError, match=r"data\.files holds an address with .*\$\{NAME\}") as caught:
        check_address(address, "data.files")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("address", FINE)
def test_addresses_without_secrets_stay_as_they_are(address: str) -> None:
    check_address(address, "data.files")
    assert redacted(address) == address


def test_references(monkeypatch: pytest.MonkeyPatch) -> None:
    address = "https://me:${PASSWORD}@host/${FOLDER}/a?token=${PASSWORD}"
    monkeypatch.setenv("PASSWORD", SECRET)
    monkeypatch.setenv("FOLDER", "x")
    whole = expanded(address)
    assert whole == f"https://me:{SECRET}@host/x/a?token={SECRET}"
    shown = redacted(f"404, message='Not Found', url={whole!r} ({SECRET})", address)
    assert SECRET not in shown
    assert "hunter2" not in shown
    assert "${PASSWORD}" in shown
    monkeypatch.delenv("PASSWORD")
    with pytest.raises(ConfigError, match="needs the environment variable PASSWORD"):
        expanded(address)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.files", "https://me:hunter2@host/a.jsonl"),
        ("data.files", "[a.jsonl, 'https://h/b.jsonl?sig=hunter2']"),
        ("data.tokenizer_options", "{path: 'https://hunter2@host/t.json'}"),
        ("trainer.default_root_dir", "s3://me:hunter2@bucket/x"),
    ],
)
def test_a_configuration_keeps_no_secret(monkeypatch: pytest.MonkeyPatch, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}.* holds an address") as caught:
        parse_config("text/demo", [f"--{key}={value}"])
    assert "hunter2" not in str(caught.value)
    monkeypatch.setenv("SECRET", "hunter2")
    reference = "https://me:${SECRET}@host/a.jsonl"
    run = parse_config("text/demo", [f"--data.files={reference}"])
    assert yaml.safe_load(run.yaml)["data"]["files"] == reference


def test_a_message_about_a_setting_keeps_no_secret() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config("text/demo", ["--data.length=https://me:hunter2@host/a"])
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", ["https://me:hunter2@host/a.fa", "https:/me:hunter2@host/a.fa"])
def test_where_no_address_is_read(name: str) -> None:
    with pytest.raises(DataError) as caught:
        locate(name)
    assert "hunter2" not in str(caught.value)
