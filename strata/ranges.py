"""The check of numbers in settings against their ranges, with one form of message."""

from strata.errors import ConfigError

__all__ = ["check_range"]


def check_range(
    settings: object,
    *names: str,
    prefix: str = "",
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Check that fields are in a range; NaN is in none.

    Args:
        settings: Has the fields.
        names: Of the fields.
        prefix: What the user writes before a name: `engine.`.
        at_least: Lowest value; or
        above: what a value must exceed.
        at_most: Highest value; or
        below: what a value must not reach.

    Raises:
        ConfigError: A field is out of the range.
    """
    for name in names:
        value = getattr(settings, name)
        is_inside = (
            (at_least is None or value >= at_least)
            and (above is None or value > above)
            and (at_most is None or value <= at_most)
            and (below is None or value < below)
        )
        if not is_inside:
            allowed = _in_words(at_least, above, at_most, below)
            raise ConfigError(f"{prefix}{name} is {value}; use {allowed}")


def _in_words(
    at_least: float | None, above: float | None, at_most: float | None, below: float | None
) -> str:
    high = None if at_most is None else f"at most {at_most:g}"
    high = high if below is None else f"below {below:g}"
    if above is not None:
        return f"more than {above:g}" + (f", {high}" if high else "")
    if high is None:
        return f"{at_least:g} or more"
    return f"{at_least:g} to {high.removeprefix('at most ')}"
