"""Numbers as people type them: 4k tokens, 4GiB of memory."""

import re
from decimal import Decimal

from tenfold.base.errors import ConfigError

_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_COUNT_UNITS = {"": 1, "k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30}
_BYTE_UNITS = {
    **_COUNT_UNITS,
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}


def parse_count(text: str) -> int:
    """A number of tokens, as vLLM reads it: k, m and g are decimal, K, M and G are binary ("4k" 4000, "4K" 4096).

    Raises:
        ConfigError: it is not such a number.
    """
    return _parse(text, _COUNT_UNITS, "4096, 4k (4000) or 4K (4096)")


def parse_bytes(text: str) -> int:
    """A number of bytes: a plain one, with the units of `parse_count`, or with kB, MB, GB, KiB, MiB, GiB.

    Raises:
        ConfigError: it is not such a number.
    """
    return _parse(text, _BYTE_UNITS, "536870912, 512MiB or 4GiB")


def _parse(text: str, units: dict[str, int], examples: str) -> int:
    match = _NUMBER.fullmatch(text.strip())
    if match is None or match[2] not in units:
        raise ConfigError(f"{text!r} is not a size; write it like {examples}.")
    value = Decimal(match[1]) * units[match[2]]
    if value != int(value):
        raise ConfigError(f"{text!r} is not a whole number; write it like {examples}.")
    return int(value)
