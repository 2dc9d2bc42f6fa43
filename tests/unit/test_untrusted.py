"""Names and JSON texts from outside are checked before they are used."""

from dataclasses import dataclass
from typing import Annotated

import msgspec
import pytest

from strata.errors import ShardError
from strata.untrusted import Digest, checked_name, decode_json


@dataclass
class Row:
    count: Annotated[int, msgspec.Meta(ge=0, le=1000)]
    digest: Annotated[str, Digest]


GOOD = b'{"count": 3, "digest": "' + b"a" * 64 + b'"}'


@pytest.mark.parametrize("name", ["shard-000000.tar", "a", "_x", "step-000000010", "A" * 255])
def test_plain_names_pass(name: str):
    assert checked_name(name, "shard", "manifest.json", ShardError) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "a/b",
        "/etc/passwd",
        "../x",
        "a\\b",
        "a\n",
        "a\x00",
        "ä",
        "A" * 256,
        None,
        3,
        ["a"],
        "٣",
    ],
)
def test_other_names_are_refused_with_file_and_name(name: object):
    with pytest.raises(ShardError, match=r"manifest\.json contains the shard name"):
        checked_name(name, "shard", "manifest.json", ShardError)


def test_valid_json_becomes_the_typed_value():
    assert decode_json(GOOD, Row, "rows", ShardError) == Row(3, "a" * 64)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (GOOD.replace(b"3", b"-1"), "count"),
        (GOOD.replace(b"3", b"1e400"), "count"),
        (GOOD.replace(b"3", b"9" * 5000), "count"),
        (GOOD.replace(b"3", b"NaN"), "rows"),
        (GOOD.replace(b"3", b'"3"'), "count"),
        (GOOD.replace(b"3", b"true"), "count"),
        (GOOD.replace(b"aaa", b"../"), "digest"),
        (b"[" * 200_000, "rows"),
        (b'{"a":' * 200_000, "rows"),
        (b'{"count": ' + b"[" * 200_000, "rows"),
        (b"\xff\xfe", "rows"),
        (b"", "rows"),
        (b"null", "rows"),
        (GOOD[:-1], "rows"),
    ],
)
def test_anything_else_is_one_error_with_file_and_field(data: bytes, named: str):
    with pytest.raises(ShardError, match=named) as caught:
        decode_json(data, Row, "rows", ShardError)
    assert "rows" in str(caught.value)
