"""A checkpoint's `generation_config.json`: how its authors sample from it when a request does not say."""

import json
import math
from pathlib import Path
from typing import Any, cast

from tenfold.base.errors import ConfigError

_SAMPLING_FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def read_sampling_defaults(path: Path) -> dict[str, float | int]:
    """Fields of SamplingParams that the checkpoint in directory `path` sets; none if it has no such file.

    `"do_sample": false`, where it is written out, means greedy: a temperature of 0. Where it is not, the other fields
    hold, as in vLLM.

    Raises:
        ConfigError: the file is damaged, or a field is not a number.
    """
    file = path / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file} must hold a JSON object")
    fields = cast("dict[str, Any]", config)
    defaults: dict[str, float | int] = {}
    for name, field in _SAMPLING_FIELDS.items():
        value = fields.get(name)
        if value is None:
            continue
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ConfigError(f"{file}: {name} must be a number; it is {value!r}")
        defaults[field] = value
    if fields.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return defaults
