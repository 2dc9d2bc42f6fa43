"""Labels of WebDataset shards of other programs: numbers or names, in `.cls` or `.json` members."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from strata.errors import ShardError
from strata.format.schema import MAX_CLASSES, NO_LABEL
from strata.preprocess.datasets.listing import some_of
from strata.preprocess.existing_tars import Member, TarSample

__all__ = ["Label", "number_classes", "read_label"]

_MOST_BYTES = {"cls": 1 << 12, "json": 1 << 20}
_INTEGER = re.compile(r"([+-]?[0-9]{1,18})(\.0*)?")
_UTF8_MARK = b"\xef\xbb\xbf"
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Label:
    """The label of a sample.

    Args:
        text: A number's digits, or a name.
        where: The tar and the member, for messages.
        class_name: The class's name, if the label is a number and the sample has the name too.
    """

    text: str
    where: str
    class_name: str | None = None

    @property
    def number(self) -> int | None:
        """The class number; None for a name."""
        return int(self.text) if self.text.isascii() and self.text.isdecimal() else None


def read_label(path: Path, sample: TarSample) -> Label | None:
    """The label of a sample, or None if it has none.

    Args:
        path: The tar.
        sample: One of its samples.

    Raises:
        ShardError: A member is no label, or two of them contradict each other.
    """
    members = {ext.lower(): member for ext, member in sample.members.items()}
    plain = facts = None
    class_name = None
    if "cls" in members:
        where, content = _content(path, members["cls"], "cls")
        try:
            text = content.removeprefix(_UTF8_MARK).decode().strip()
        except UnicodeDecodeError:
            _refuse(where, repr(content), "is not UTF-8 text")
        plain = _label(text, where)
    if "json" in members:
        where, content = _content(path, members["json"], "json")
        try:
            # Not `decode_json`: others write NaN, which JSON does not have, in unused fields.
            decoded = json.loads(content.removeprefix(_UTF8_MARK))
        except (ValueError, RecursionError) as error:
            raise ShardError(
                f"{where} is not valid: {error}; write the tar again without it, or correct it"
            ) from error
        if isinstance(decoded, dict):
            value = decoded.get("label")
            value = decoded.get("cls") if value is None else value
            class_name = decoded.get("class_name")
            facts = _label(class_name if value is None else value, where)
        elif plain is None:
            facts = _label(decoded, where)
    if plain is not None and facts is not None and plain.text != facts.text:
        # A number in one and its name in the other.
        if (plain.number is None) == (facts.number is None):
            _refuse(facts.where, repr(facts.text), f"contradicts {plain.text!r} in {plain.where}")
        first, second = (plain, facts) if plain.number is not None else (facts, plain)
        return replace(first, class_name=second.text)
    label = plain or facts
    if label is not None and label.number is not None and isinstance(class_name, str):
        return replace(label, class_name=class_name.strip() or None)
    return label


def _content(path: Path, member: Member, kind: str) -> tuple[str, bytes]:
    where = f"{path.name}: member {some_of([member.name])}"
    if member.size > _MOST_BYTES[kind]:
        raise ShardError(
            f"{where} has {member.size:,} bytes, too many for a label; at most "
            f"{_MOST_BYTES[kind]:,} are read"
        )
    return where, member.read(path)


def _label(value: object, where: str) -> Label | None:
    """A value as a label; 3.0 and "3" are the integer 3."""
    if value is None:
        return None
    if isinstance(value, bool | list | dict):
        _refuse(where, repr(value), f"is a {type(value).__name__}")
    if isinstance(value, float):
        if not value.is_integer():
            _refuse(where, repr(value), "is not an integer")
        value = int(value)
    text = str(value).strip()
    if not text:
        return None
    match = _INTEGER.fullmatch(text)
    if match is None and re.fullmatch(r"[+-]?[0-9]+(\.0*)?", text) is None:
        if not text.isprintable():
            _refuse(where, repr(text), "has line breaks or control characters")
        return Label(text, where)
    number = int(match[1]) if match else MAX_CLASSES
    if number == NO_LABEL:
        return None
    if not 0 <= number < MAX_CLASSES:
        _refuse(where, text, f"is no class number from 0 to {MAX_CLASSES - 1:,}")
    return Label(str(number), where)


def _refuse(where: str, shown: str, why: str) -> NoReturn:
    if len(shown) > _SHOWN_CHARACTERS:
        shown = shown[:_SHOWN_CHARACTERS] + "..."
    raise ShardError(
        f"{where}: the label {shown} {why}; write one class for each sample, either numbers from 0 "
        "or names in all samples"
    )


def number_classes(
    labels: Sequence[Label | None], given: Sequence[str]
) -> tuple[list[str], dict[str, int]]:
    """Class names by number, and the number of each label as it is written.

    Args:
        labels: Of all samples.
        given: Class names in order; if empty, they are collected from the labels.

    Raises:
        ShardError: Numbers and names are mixed, a label is none of the classes given, or a number
            has two names.
    """
    first: dict[str, Label] = {}
    named: dict[int, Label] = {}
    for label in labels:
        if label is None:
            continue
        first.setdefault(label.text, label)
        if label.number is not None and label.class_name:
            other = named.setdefault(label.number, label)
            if other.class_name != label.class_name:
                _refuse(
                    label.where,
                    label.text,
                    f"is called {label.class_name!r}, and {other.class_name!r} in {other.where}",
                )
    numbers = [x for x in first.values() if x.number is not None]
    words = [x for x in first.values() if x.number is None]
    if numbers and words:
        _refuse(
            words[0].where,
            repr(words[0].text),
            f"is a name, and {numbers[0].text} in {numbers[0].where} is a number",
        )
    if len(words) > MAX_CLASSES:
        _refuse(words[-1].where, repr(words[-1].text), f"is one of {len(words):,} different ones")
    if not numbers:
        names = list(given) or sorted(first)
        found = {name: k for k, name in enumerate(names)}
    else:
        count = 1 + max(x.number or 0 for x in numbers)
        names = list(given) or [_name_of(named.get(k), k) for k in range(count)]
        found = {x.text: int(x.text) for x in numbers if int(x.text) < len(names)}
    unknown = [x for text, x in first.items() if text not in found]
    if unknown:
        raise ShardError(
            f"{unknown[0].where}: label {unknown[0].text} is none of the {len(names)} classes "
            "given; correct --classes"
        )
    return names, found


def _name_of(label: Label | None, number: int) -> str:
    return (label.class_name if label else None) or str(number)
