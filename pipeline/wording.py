"""Values and phrases as a report writes them: sentences, plurals, lists, moments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def plural(number: int, noun: str) -> str:
    """`1 lap`, `2 laps`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def label(name: str) -> str:
    """A field's name as words: `memory_gib` -> `Memory gib`."""
    return name.replace("_", " ").capitalize()


def sentence(text: str) -> str:
    """`text` with a capital and a full stop; empty stays empty."""
    text = text.strip()
    if not text:
        return ""
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")


def plain(value: Any) -> str:
    """A value of JSON in one line: mappings as `name value; name value`, without what is empty; lists with commas."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {plain(part)}" for name, part in value.items() if part not in (None, "", [], {}))
    if isinstance(value, list | tuple):
        return ", ".join(plain(part) for part in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def moment(created: str) -> str:
    """An ISO 8601 time without its seconds: `2026-05-04 09:31 UTC`; other text as it is."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(:[\d.]+)?(Z|\+00:00)", created)
    return f"{found[1]} {found[2]} UTC" if found else created


def ascii_minus(text: str) -> str:
    """For terminals whose code page has no U+2212, and to a reader the same."""
    return text.replace("\u2212", "-")


def slug(text: str) -> str:
    """`text` as the end of an anchor: lower-case letters, digits and single hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
