"""Helpers of the fuzzing tests: edits of bytes and JSON values, and the allowed outcomes."""

import copy
import json
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from strata.errors import StrataError

T = TypeVar("T")

ODD_VALUES = [None, True, "", "x", "../x", "a\n", 0, 1, -1, 2**31, 2**63, 10**30, 1.5, [], {}, [[]]]


def budget(num_edits: int) -> Any:
    """Hypothesis settings for a number of edits, which are the same in every run."""
    return settings(
        max_examples=num_edits,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[*HealthCheck.__members__.values()],
    )


@st.composite
def byte_edits(draw: st.DrawFn) -> list[tuple[str, float, int, bytes]]:
    """One to three edits: kind, position as a share of the length, length, and new bytes."""
    one = st.tuples(
        st.sampled_from(["flip", "set", "delete", "insert", "cut", "repeat"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 40),
        st.binary(min_size=1, max_size=8),
    )
    return draw(st.lists(one, min_size=1, max_size=3))


def edited(content: bytes, edits: list[tuple[str, float, int, bytes]]) -> bytes:
    """The bytes after the edits."""
    for what, share, count, new in edits:
        place = int(share * len(content))
        before, here, after = content[:place], content[place : place + count], content[place:]
        match what:
            case "flip":
                content = (
                    before + bytes([after[0] ^ (1 << count % 8)]) + after[1:] if after else b""
                )
            case "set":
                content = before + new + after[len(new) :]
            case "delete":
                content = before + after[count:]
            case "insert":
                content = before + new + after
            case "cut":
                content = before
            case "repeat":
                content = before + here + after
    return content


def json_paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values within a JSON value."""
    found = [path] if path else []
    items: Any = []
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, child in items:
        found += json_paths(child, (*path, key))
    return found


@st.composite
def json_edits(draw: st.DrawFn) -> tuple[float, str, Any]:
    """An edit: position as a share of all values, kind, and a new value."""
    what = draw(st.sampled_from(["set", "set", "set", "delete", "other"]))
    number = st.integers(-5, 70_000)
    new = draw(st.one_of(st.sampled_from(ODD_VALUES), number, st.text(max_size=8)))
    return draw(st.floats(0, 1, exclude_max=True)), what, new


def json_edited(value: Any, edit: tuple[float, str, Any]) -> Any:
    """A JSON value after an edit of one of the values within it."""
    share, what, new = edit
    value = copy.deepcopy(value)
    paths = json_paths(value)
    *way, last = paths[int(share * len(paths))]
    parent = value
    for key in way:
        parent = parent[key]
    match what:
        case "set":
            parent[last] = new
        case "delete":
            del parent[last]
        case "other":  # The value at another path.
            other = paths[int(share * 7919) % len(paths)]
            found = value
            for key in other:
                found = found[key]
            parent[last] = json.loads(json.dumps(found))
    return value


def outcome(run: Callable[[], T]) -> T | None:
    """Return the result of `run`, or None after an error that a user sees as one line.

    Any other exception is a failure of the test.
    """
    try:
        return run()
    except StrataError as error:
        line = " ".join(str(error).split())
        assert line
        assert len(line) < 2000
        return None
