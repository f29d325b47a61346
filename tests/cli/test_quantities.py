"""Numbers as people type them; the expected values are SI's and IEC's."""

import pytest

from tenfold.base.errors import ConfigError
from tenfold.cli.quantities import parse_bytes, parse_count


@pytest.mark.parametrize(
    ("text", "value"),
    [("4096", 4096), ("4k", 4000), ("4K", 4096), ("1.5k", 1500), ("0.5K", 512), ("2m", 2_000_000), ("1M", 1_048_576)],
)
def test_counts(text: str, value: int):
    assert parse_count(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("536870912", 536_870_912),
        ("512MiB", 536_870_912),
        ("4GiB", 4_294_967_296),
        ("4GB", 4_000_000_000),
        ("4G", 4_294_967_296),
        ("1.5 GiB", 1_610_612_736),
        ("100kB", 100_000),
        ("64B", 64),
    ],
)
def test_bytes(text: str, value: int):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "k", "-1", "4 apples", "4KB ", "1e3", "0.3k5", "1,000", "0.0001k", "GiB", "4Kib"])
def test_others_are_refused(text: str):
    with pytest.raises(ConfigError, match="write it like"):
        parse_count(text)


def test_a_fraction_of_a_byte_is_refused():
    with pytest.raises(ConfigError, match="not a whole number"):
        parse_bytes("1.0001kB")
