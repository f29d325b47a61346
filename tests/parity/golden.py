"""Our side of the comparison with transformers: golden files in, the same checkpoint written, log-probabilities out.

Dims: R rows, L tokens of a row, T = R·L packed tokens, V vocabulary.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from tenfold.engine.config import EngineConfig
from tenfold.engine.engine import Engine
from tenfold.engine.outputs import TokenLogprobs
from tenfold.engine.sampling_params import SamplingParams
from tenfold.models.family import Model
from tenfold.nn.packed import packed_attend
from tests.parity.cases import make_weight

TOLERANCE = 1e-4
ROW = 256  # tokens: rows hold two or more sequences, so that sequences must not see each other
BATCH = 8  # sequences that the engine runs at once
DIRECTORY = Path(__file__).parents[1] / "models" / "golden"
NAMES = sorted(path.stem for path in DIRECTORY.glob("*.json") if path.stem not in ("config_keys", "parameter_counts"))


@dataclass(frozen=True, kw_only=True)
class Golden:
    """What transformers answered; the fields are those of the file (`tests/parity/reference.py`)."""

    case: str
    made_with: dict[str, str]
    config: dict[str, Any]
    max_len: int
    seed: int
    smallest_gap: float
    tensors: dict[str, list[int]]
    prompts: list[list[int]]
    tokens: list[list[int]]
    logprobs: list[list[int]]
    prompt_logprobs: list[list[int]]


def read(path: Path) -> Golden:
    return Golden(**json.loads(path.read_text()))


def save_checkpoint(golden: Golden, path: Path) -> None:
    """Writes the checkpoint that transformers was run on, anew from the names of its tensors."""
    (path / "config.json").write_text(json.dumps(golden.config))
    shapes = {name: tuple(shape) for name, shape in golden.tensors.items()}
    weights = {name: make_weight(name, shapes[name], golden.config, golden.seed) for name in shapes}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def pack(lengths: list[int], row: int) -> list[list[int]]:
    """Which sequences share each row: in order, as many as fit."""
    rows: list[list[int]] = [[]]
    used = 0
    for i, length in enumerate(lengths):
        if used + length > row:
            rows.append([])
            used = 0
        rows[-1].append(i)
        used += length
    return rows


@functools.partial(jax.jit, static_argnums=0)
def forward_packed(model: Model, params: Any, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> Any:
    """Log-probabilities [R, L, V] of what follows each token of packed rows [R, L]."""
    R, L = tokens.shape

    attend = packed_attend(segments)
    hidden, _ = model.forward(params, tokens.reshape(-1), positions.reshape(-1), attend)
    return jax.nn.log_softmax(model.logits(params, hidden), axis=-1).reshape(R, L, -1)


def score_packed(model: Model, params: Any, sequences: list[list[int]]) -> list[np.ndarray]:
    """For each sequence the log-probabilities [len, V] of what follows each token."""
    rows = pack([len(s) for s in sequences], ROW)
    tokens, positions, segments = (np.zeros((len(rows), ROW), np.int32) for _ in range(3))
    places = {}
    for r, members in enumerate(rows):
        start = 0
        for i in members:
            n = len(sequences[i])
            places[i] = (r, slice(start, start + n))
            tokens[r, start : start + n] = sequences[i]
            positions[r, start : start + n] = np.arange(n)
            segments[r, start : start + n] = i + 1
            start += n
    logprobs = np.asarray(forward_packed(model, params, *map(jnp.asarray, (tokens, positions, segments))))
    return [logprobs[places[i]] for i in range(len(sequences))]


def assert_close(golden: Golden, prompt: int, what: str, ours: Sequence[float], micronats: Sequence[int]) -> None:
    message = f"{golden.case}, prompt {prompt}: {what}"
    np.testing.assert_allclose(ours, np.array(micronats) / 1e6, rtol=0, atol=TOLERANCE, err_msg=message)


def assert_scores_agree(golden: Golden, model: Model, params: Any) -> None:
    """Every generated token is our first choice too, and every log-probability is theirs."""
    sequences = [prompt + new for prompt, new in zip(golden.prompts, golden.tokens, strict=True)]
    scored = score_packed(model, params, sequences)
    for i, (prompt, new) in enumerate(zip(golden.prompts, golden.tokens, strict=True)):
        rows = scored[i][len(prompt) - 1 : -1]
        np.testing.assert_array_equal(rows.argmax(axis=-1), new, err_msg=f"{golden.case}, prompt {i}: tokens")
        assert_close(golden, i, "log-probabilities", rows[np.arange(len(new)), new], golden.logprobs[i])
    for i, expected in enumerate(golden.prompt_logprobs):
        prompt = golden.prompts[i]
        ours = scored[i][np.arange(len(prompt) - 1), prompt[1:]]
        assert_close(golden, i, "prompt log-probabilities", ours, expected)


def assert_engine_agrees(golden: Golden, path: Path) -> None:
    """The prompts in batches, chunks and small pages: the same tokens, every log-probability, nothing compiled."""
    config = EngineConfig(
        max_model_len=golden.max_len,
        max_num_seqs=BATCH,
        max_num_batched_tokens=BATCH + 16,
        block_size=8,
        cache_memory=64 * 2**20,
        dtype="float32",
    )
    engine = Engine.from_pretrained(path, config)
    generated: dict[str, list[TokenLogprobs]] = {}
    prompt_logprobs: dict[str, list[TokenLogprobs | None]] = {}
    for i, prompt in enumerate(golden.prompts):
        scored = 0 if i < len(golden.prompt_logprobs) else None
        greedy = SamplingParams(
            temperature=0.0, max_tokens=len(golden.tokens[i]), ignore_eos=True, logprobs=0, prompt_logprobs=scored
        )
        engine.add(str(i), prompt, greedy)
        generated[str(i)] = []
    while engine.has_work:
        for output in engine.step():
            generated[output.request_id] += output.logprobs or ()
            if output.prompt_logprobs is not None:
                prompt_logprobs[output.request_id] = list(output.prompt_logprobs)
    engine.check_integrity()
    assert engine.stats().compilations == 0, f"{golden.case}: compiled while it served"
    engine.close()
    for i, new in enumerate(golden.tokens):
        ours = generated[str(i)]
        assert [token.token_id for token in ours] == new, f"{golden.case}, prompt {i}: tokens"
        assert_close(golden, i, "log-probabilities", [token.logprob for token in ours], golden.logprobs[i])
    for i, expected in enumerate(golden.prompt_logprobs):
        ours = prompt_logprobs.get(str(i), [None])[1:]
        assert_close(golden, i, "prompt log-probabilities", [token.logprob for token in ours if token], expected)
