"""Texts for calibration and for measuring perplexity: the standard library's sources, or the user's own."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tenfold.base.errors import ConfigError
from tenfold.data.packing import Rows, pack
from tenfold.data.tokenizer import Tokenizer
from tenfold.train.pico import corpus


def standard_library() -> list[str]:
    """The sources of Python's standard library, as the running interpreter carries them: text without a network."""
    return list(corpus.sources())


def read_texts(file: Path) -> list[str]:
    """The texts of a file: all of it, or, of `.jsonl`, one per line: a string, or an object with a string `text`.

    Raises:
        ConfigError: if the file cannot be read, or holds something else or nothing.
    """
    if file.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"the calibration file must be .txt or .jsonl; it is {file}")
    try:
        content = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the calibration file {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the calibration file {file} is not UTF-8: {error.reason}") from None
    texts = [content] if file.suffix == ".txt" else _lines(file, content)
    if not any(text.strip() for text in texts):
        raise ConfigError(f"the calibration file {file} has no text; put some like what the model will see into it")
    return texts


def _lines(file: Path, content: str) -> list[str]:
    texts: list[str] = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}, line {number} is not valid JSON: {error}") from None
        text = value.get("text") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise ConfigError(f'{file}, line {number} must be a string or an object with a string "text"')
        texts.append(text)
    return texts


def draw_rows(texts: Sequence[str], tokenizer: Tokenizer, length: int, count: int, seed: int) -> Rows:
    """Packed rows of texts, drawn at random; every text that does not fit into a row is cut into pieces that do.

    Args:
        texts: what to draw from.
        tokenizer: of the model.
        length: tokens of a row.
        count: rows.
        seed: of the draw: the same one gives the same rows.

    Raises:
        ConfigError: if the texts have too few tokens.
        TokenizerError: if the vocabulary cannot spell them.
    """
    rng = random.Random(seed)
    start = [tokenizer.bos_token_id] if tokenizer.encode("")[:1] == [tokenizer.bos_token_id] else []
    step = length - len(start)
    pieces: list[list[int]] = []
    tokens = 0
    for text in rng.sample(texts, len(texts)):
        ids = tokenizer.encode(text, add_special_tokens=False)
        pieces += [[*start, *ids[i : i + step]] for i in range(0, len(ids), step)]
        tokens += len(ids)
        if tokens >= 4 * count * length:  # far more than needed, so that one long text is not all that is drawn
            break
    rows = pack(((piece, [True] * len(piece)) for piece in pieces), length)
    if len(rows.tokens) < count:
        raise ConfigError(
            f"the calibration text has {tokens} tokens, which fill {len(rows.tokens)} rows of {length}; {count} are "
            "needed. Use more text or fewer samples"
        )
    chosen = np.array(rng.sample(range(len(rows.tokens)), count))
    return Rows(*(array[chosen] for array in rows))
