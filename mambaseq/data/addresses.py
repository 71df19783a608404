"""Addresses (`https://...`, `s3://...`, `hf://...`) whose secrets are neither kept nor shown.

In an address, a secret is written as `${NAME}`, the name of an environment variable. It is filled in only when the
address is used: configurations, stores, names of records and messages keep `${NAME}`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from mambaseq.errors import ConfigError, shown

_REFERENCE = re.compile(r"\$\{(\w+)\}")
# fsspec chains addresses: zip://a.txt::https://host/b.zip
_LINK = re.compile(r"::(?=\w[\w+.-]*:/)")
# what comes before the host; the second form allows a slash in a password, if no port precedes it. With bounds,
# so that a long text of letters does not take quadratic time
_USER = re.compile(
    r"(?<![\w+.-])(?P<scheme>\w[\w+.-]{0,40}):(?P<slashes>/{1,2})"
    r"(?P<user>[^\s/?#]{0,1000}|[^\s/?#:@\[]{0,1000}:(?!\d*(?:[/?#\s]|$))\S{0,1000})@"
)
_FIELD = re.compile(r"(?P<mark>[?&;#])(?P<name>[\w.%~-]+)=(?P<value>[^\s&;#'\"]*)")
_SECRET_ENDS = (
    "token",
    "secret",
    "password",
    "passwd",
    "pwd",
    "signature",
    "credential",
    "credentials",
    "accesskeyid",
    "key",
)
_SECRET_NAMES = ("sig", "auth", "authorization", "pass", "session", "sas", "code")


def is_address(name: str) -> bool:
    """Whether a name is an address rather than a path or a resource."""
    return "://" in name


def check_address(address: str, key: str) -> None:
    """Raise ConfigError if an address contains a secret. key: the setting with the address."""
    for what in _secrets(address):
        raise ConfigError(
            f"{key} holds an address with {what} in it ({redacted(address)[:300]}), which would be kept in "
            f"files and shown. Put it into an environment variable, and write ${{NAME}} in its place, NAME being that "
            f"of the variable."
        )


def check_settings(settings: Any, key: str = "") -> None:
    """`check_address` for every text in nested settings."""
    if isinstance(settings, Mapping):
        for name, value in settings.items():
            check_settings(value, f"{key}.{name}" if key else str(name))
    elif isinstance(settings, list | tuple):
        for value in settings:
            check_settings(value, key)
    elif isinstance(settings, str) and is_address(settings):
        check_address(settings, key)


def expanded(address: str) -> str:
    """The address with the values of the variables that it names filled in.

    Raises ConfigError if a variable is not set.
    """

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1])
        if not found:
            raise ConfigError(f"The address {redacted(address)} needs the environment variable {match[1]}; set it.")
        return found

    return _REFERENCE.sub(value, address)


def redacted(text: object, address: str = "") -> str:
    """A text without the secrets of any address in it, for messages.

    address: an address with references; their values in the text become references too (a library's error may contain
        them).
    """
    told = str(text)
    for name in _REFERENCE.findall(address):
        value = os.environ.get(name, "")
        for form in dict.fromkeys((value, quote(value, safe=""))):
            if len(form) > 3:  # shorter values would occur in ordinary words
                told = told.replace(form, f"${{{name}}}")

    def user(match: re.Match[str]) -> str:
        before = f"{match['scheme']}:{match['slashes']}"
        name, mark, password = match["user"].partition(":")
        if mark:
            return f"{before}{name}:{password if _is_reference(password) else '***'}@"
        hidden = match["scheme"] in ("http", "https") and not _is_reference(name)
        return f"{before}{'***' if hidden else name}@"

    def field(match: re.Match[str]) -> str:
        hidden = _is_secret(match["name"]) and not _is_reference(match["value"])
        return f"{match['mark']}{match['name']}={'***' if hidden else match['value']}"

    return "::".join(_FIELD.sub(field, _USER.sub(user, piece)) for piece in _LINK.split(told))


def _is_reference(text: str) -> bool:
    return not _REFERENCE.sub("", text)


def _is_secret(name: str) -> bool:
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return plain.endswith(_SECRET_ENDS) or plain in _SECRET_NAMES


def _secrets(address: str) -> Iterator[str]:
    """The part of an address that is a secret in plain text."""
    for piece in _LINK.split(address):
        if match := _USER.search(piece):
            name, mark, password = match["user"].partition(":")
            if mark and not _is_reference(password):
                yield "a password"
            if not mark and match["scheme"] in ("http", "https") and not _is_reference(name):
                yield "a token"
        for match in _FIELD.finditer(piece):
            if _is_secret(match["name"]) and not _is_reference(match["value"]):
                yield f"the value of {shown(match['name'])}"
