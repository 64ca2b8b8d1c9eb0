"""JSON of files that may hold anything."""

from __future__ import annotations

import pytest

from edge_stream.text import parse_json


@pytest.mark.parametrize(
    "text", ["{", "[" * 100_000, '["\\ud800"]', '{"\\uDFFF": 1}', '["\\ud83d\\ud83d"]', b'"\xff"', ""]
)
def test_what_is_no_json_of_texts(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"nested|Expecting|surrogates|decode"):
        parse_json(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('["\\ud83d\\ude00"]', ["\U0001f600"]),
        ('"\\\\ud800"', "\\ud800"),
        (b'{"a": 1}', {"a": 1}),
        ('"\u00e9"', "\u00e9"),
    ],
)
def test_json_is_what_it_says(text: str | bytes, value: object) -> None:
    assert parse_json(text) == value
