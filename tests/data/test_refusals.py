"""Files and records that cannot be used, told together."""

from __future__ import annotations

import logging

import pytest

from mambaseq.data.refusals import Refused
from mambaseq.errors import ConfigError, DataError


def refused(*errors: DataError) -> Refused:
    found = Refused("records")
    for error in errors:
        found(error)
    return found


def test_all_errors_of_one_place_count(caplog: pytest.LogCaptureFixture) -> None:
    errors = [("a.csv", "is empty"), ("b.csv", "is cut short"), ("b.csv", "has no text"), ("b.csv", "is cut short")]
    found = refused(*(DataError(f"{place} {reason}.").about(place, reason) for place, reason in errors))
    with caplog.at_level(logging.WARNING), pytest.raises(DataError) as error:
        found.check(3)
    assert str(error.value).startswith(
        "4 of 7 records cannot be used: 'a.csv' (is empty); 'b.csv', 'b.csv' (is cut short); 'b.csv' (has no text). "
    )
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["4 of 7 records cannot be used:", *(f"{place}: {reason}" for place, reason in errors)]


def test_errors_without_a_place_count(caplog: pytest.LogCaptureFixture) -> None:
    found = refused(DataError("No text.").about("a.csv"), DataError("Odd."), DataError("Odd."))
    with caplog.at_level(logging.WARNING), pytest.raises(DataError, match=r"^No text\. 2 more of 4 records cannot be"):
        found.check(1)
    assert len(caplog.records) == 4


def test_the_only_error_is_raised_itself_and_wrong_settings_at_once() -> None:
    refused().check(0)
    only = DataError("Odd.").about("a.csv")
    with pytest.raises(DataError) as error:
        refused(only).check(9)
    assert error.value is only
    with pytest.raises(ConfigError, match="wrong"):
        Refused("records")(ConfigError("wrong"))
