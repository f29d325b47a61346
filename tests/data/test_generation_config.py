"""Defaults of sampling, as published checkpoints write them."""

import json
from pathlib import Path

import pytest

from tenfold.base.errors import ConfigError
from tenfold.data.generation_config import read_sampling_defaults

QWEN3 = {
    "bos_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "transformers_version": "4.51.0",
}


def read(directory: Path, config: object) -> dict[str, float | int]:
    (directory / "generation_config.json").write_text(json.dumps(config))
    return read_sampling_defaults(directory)


def test_what_the_authors_chose(tmp_path: Path):
    assert read(tmp_path, QWEN3) == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert read(tmp_path, {"max_new_tokens": 256, "repetition_penalty": 1.05, "min_p": 0.1}) == {
        "max_tokens": 256,
        "repetition_penalty": 1.05,
        "min_p": 0.1,
    }


def test_without_a_file_or_with_nulls_there_are_none(tmp_path: Path):
    assert read_sampling_defaults(tmp_path) == {}
    assert read(tmp_path, {"temperature": None, "top_k": None}) == {}


def test_no_sampling_means_greedy(tmp_path: Path):
    assert read(tmp_path, {"do_sample": False, "temperature": 0.6, "top_p": 0.9}) == {"temperature": 0.0, "top_p": 0.9}
    assert read(tmp_path, {"temperature": 0.6}) == {"temperature": 0.6}


@pytest.mark.parametrize("config", [[], "x", {"temperature": "hot"}, {"top_k": True}, {"top_p": float("nan")}])
def test_what_cannot_be_is_an_error(tmp_path: Path, config: object):
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        read(tmp_path, config)


def test_a_damaged_file_is_an_error(tmp_path: Path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_sampling_defaults(tmp_path)
