"""The check of settings against ranges: what is inside, and the form of the message."""

from types import SimpleNamespace
from typing import Any

import pytest

from strata.errors import ConfigError
from strata.ranges import check_range


@pytest.mark.parametrize(
    ("value", "limits", "allowed"),
    [
        (0, {"at_least": 1}, "1 or more"),
        (0, {"above": 0}, "more than 0"),
        (2, {"at_least": 0, "at_most": 1}, "0 to 1"),
        (0, {"above": 0, "at_most": 1}, "more than 0, at most 1"),
        (1, {"at_least": 0, "below": 1}, "0 to below 1"),
        (65_536, {"at_least": 0, "at_most": 65_535}, "0 to 65535"),
        (float("nan"), {"above": 0}, "more than 0"),
    ],
)
def test_a_value_outside_is_named_with_what_is_allowed(
    value: float, limits: dict[str, Any], allowed: str
):
    settings = SimpleNamespace(fine=0.5, wrong=value)
    with pytest.raises(ConfigError, match=rf"^part\.wrong is {value}; use {allowed}$"):
        check_range(settings, "wrong", prefix="part.", **limits)


def test_the_limits_themselves_are_inside():
    settings = SimpleNamespace(low=0, high=1)
    check_range(settings, "low", "high", at_least=0, at_most=1)
    check_range(settings, "high", above=0)
    check_range(settings, "low", below=1)
