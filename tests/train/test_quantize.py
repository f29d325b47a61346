"""Calibration of whole models, the checkpoint that it gives, and what is refused."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tenfold.base.builtin import builtin_model
from tenfold.base.errors import ConfigError
from tenfold.data.packing import Rows, pack
from tenfold.data.tokenizer import Tokenizer
from tenfold.kernels.matmul import QuantizedWeight
from tenfold.models.family import Model, resolve
from tenfold.nn import checkpoint
from tenfold.nn.param import Tree, initialize, is_param, leaves
from tenfold.nn.quantization import SCHEMES, Scheme, quantize
from tenfold.testing.tiny import write_tiny_checkpoint
from tenfold.train.calibration import draw_rows, read_texts, standard_library
from tenfold.train.loss import hidden_states
from tenfold.train.quantize import calibrate, perplexity, quantizable, quantize_checkpoint
from tests.parity.cases import CASES, Case

CALIBRATION, HELD_OUT = 32, 16
SOME = [case for case in CASES if case.engine and case.name.startswith(("llama", "phi3", "gemma2"))]  # parity has all
TEXT = "All happy families are alike; each unhappy family is unhappy in its own way. " * 40


def split(rows: Rows, at: int) -> tuple[Rows, Rows]:
    return Rows(*(array[:at] for array in rows)), Rows(*(array[at:] for array in rows))


def nearest(model: Model, params: Tree, scheme: Scheme) -> Tree:
    """The same weights on the same grid, each rounded by itself."""
    return jax.tree.map(
        lambda p, w: quantize(p.as_matrix(w), *scheme.rounding(p), p.output_dims) if quantizable(p) else w,
        model.params(),
        params,
        is_leaf=is_param,
    )


def logits(model: Model, params: Tree, rows: Rows) -> np.ndarray:
    hidden = hidden_states(params, model, rows)
    return np.asarray(model.logits(params, hidden.reshape(-1, hidden.shape[-1])))


@pytest.fixture(scope="module")
def pico() -> tuple[Model, Tree, Rows, Rows]:
    """The built-in model, rows of the standard library's sources to calibrate with, and others."""
    path = builtin_model()
    model = resolve(checkpoint.read_config(path))
    rows = draw_rows(standard_library(), Tokenizer.load(path), 512, CALIBRATION + HELD_OUT, 0)
    return model, checkpoint.load(path, model.params(), jnp.float32), *split(rows, CALIBRATION)


@pytest.mark.parametrize(("name", "tolerance"), [("int8", 0.01), ("int4", 0.03)])
@pytest.mark.slow
def test_perplexity_stays(name: str, tolerance: float, pico: tuple[Model, Tree, Rows, Rows]) -> None:
    model, params, calibration, held_out = pico
    found = calibrate(model, params, calibration, SCHEMES[name], scale_dtype=jnp.bfloat16)
    before, after = perplexity(model, params, held_out), perplexity(model, found, held_out)
    assert abs(after / before - 1) < tolerance


def random_rows(model: Model, seed: int = 0) -> Rows:
    """Rows with two segments each and padding."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, model.config.V, length).tolist() for length in (20, 17, 31, 9, 25, 30)]
    return pack([(ids, [True] * len(ids)) for ids in texts], 48)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=pytest.mark.slow) for case in SOME])
def test_a_family_is_calibrated_written_and_read(case: Case, tmp_path: Path) -> None:
    model = resolve(case.config).with_max_len(case.max_len)
    params = initialize(model.params(), jax.random.key(1), jnp.float32)
    rows = random_rows(model)
    seen: list[tuple[int, int]] = []
    found = calibrate(model, params, rows, Scheme(4, 16), report=lambda done, total: seen.append((done, total)))
    declared = [p for _, p in leaves(model.params())]
    weights = jax.tree.leaves(found, is_leaf=lambda leaf: isinstance(leaf, QuantizedWeight))
    kinds = [isinstance(weight, QuantizedWeight) for weight in weights]
    assert kinds == [quantizable(p) for p in declared]
    assert seen == [(i + 1, sum(kinds)) for i in range(sum(kinds))]
    checkpoint.export(tmp_path, model.params(), found, config=case.config, dtype=np.float32)
    read = checkpoint.load(tmp_path, model.params(), jnp.float32)
    np.testing.assert_allclose(logits(model, read, rows), logits(model, found, rows), rtol=0, atol=1e-4)
    for wanted, got in zip(
        weights, jax.tree.leaves(read, is_leaf=lambda x: isinstance(x, QuantizedWeight)), strict=True
    ):
        if isinstance(wanted, QuantizedWeight):
            np.testing.assert_array_equal(got.codes, wanted.codes)
            np.testing.assert_array_equal(got.scales, wanted.scales)


def test_a_layer_sees_what_the_rounded_ones_before_give(tmp_path: Path) -> None:
    """The last weight's codes change when the first layers are coarse, although its own numbers do not."""
    write_tiny_checkpoint(tmp_path)
    model = resolve(checkpoint.read_config(tmp_path))
    params = checkpoint.load(tmp_path, model.params(), jnp.float32)
    rows = random_rows(model)
    coarse = {**params, "layers": [nearest(model, params, Scheme(4, 16))["layers"][0], *params["layers"][1:]]}
    plain = jax.tree.map(
        lambda w: w.dequantize(jnp.float32).reshape(-1, *w.dims) if isinstance(w, QuantizedWeight) else w,
        coarse,
        is_leaf=lambda w: isinstance(w, QuantizedWeight),
    )
    plain["layers"][0]["o"] = plain["layers"][0]["o"].reshape(params["layers"][0]["o"].shape)
    exact, other = (calibrate(model, p, rows, Scheme(4, 16))["layers"][1]["down"] for p in (params, plain))
    assert (np.asarray(exact.codes) != np.asarray(other.codes)).any()


def test_padding_does_not_count(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    model = resolve(checkpoint.read_config(tmp_path))
    params = checkpoint.load(tmp_path, model.params(), jnp.float32)
    rows = random_rows(model)
    padding = np.asarray(rows.segment_ids) == 0
    assert padding.any()
    other = rows._replace(tokens=np.where(padding, 5, rows.tokens))
    first, second = (calibrate(model, params, r, SCHEMES["int4"]) for r in (rows, other))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_checkpoint_is_quantised_with_all_that_belongs_to_it(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "model")
    done = quantize_checkpoint(tmp_path / "model", tmp_path / "out", [TEXT], scheme="int8", samples=4)
    before, after = ({f.name for f in (tmp_path / name).iterdir()} for name in ("model", "out"))
    assert before == after
    assert done.bytes_after < 0.6 * done.bytes_before
    assert abs(done.after / done.before - 1) < 0.01
    assert done.calibration_tokens <= 4 * 512
    assert done.held_out_tokens <= 512
    for name in ("generation_config.json", "tokenizer.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((tmp_path / "model" / name).read_text())
    with pytest.raises(ConfigError, match="quantised already"):
        quantize_checkpoint(tmp_path / "out", tmp_path / "again", [TEXT])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": ["too short"]}, "has 9 tokens, which fill 1 rows of 512; 160 are needed"),
        ({"texts": [""]}, "has 0 tokens"),
        ({"scheme": "int3"}, "must be one of int8, int4; it is 'int3'"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"output": "model"}, "exists and is not an empty directory"),
        ({"output": "model/config.json"}, "exists and is not an empty directory"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_tiny_checkpoint(tmp_path / "model")
    given = {"texts": [TEXT], "output": "out"} | arguments
    output = tmp_path / given.pop("output")
    with pytest.raises(ConfigError, match=message):
        quantize_checkpoint(tmp_path / "model", output, **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.txt", "one\ntwo\n", ["one\ntwo\n"]),
        ("a.jsonl", '"one"\n\n{"text": "two\\nlines", "more": 3}\n', ["one", "two\nlines"]),
    ],
)
def test_texts_of_a_file(name: str, content: str, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert read_texts(tmp_path / name) == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"one", "must be .txt or .jsonl"),
        ("a.txt", b" \n ", "has no text"),
        ("a.jsonl", b"", "has no text"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8"),
        ("a.jsonl", b'"one"\n{"text": 3}', "line 2 must be a string or an object"),
        ("a.jsonl", b'"one"\n\n{"text', "line 3 is not valid JSON"),
        ("a.txt", None, "cannot be read: No such file"),
    ],
)
def test_files_without_texts_are_refused(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_texts(tmp_path / name)


def test_the_draw_is_repeatable_and_whole() -> None:
    tokenizer = Tokenizer.load(builtin_model())
    texts = [f"text {i} " * (50 + i) for i in range(40)]
    first, again, other = (draw_rows(texts, tokenizer, 64, 12, seed) for seed in (3, 3, 4))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first.tokens != other.tokens).any()
    assert first.tokens.shape == (12, 64)
    starts = (first.positions == 0) & (first.segment_ids > 0)
    assert (first.tokens[starts] == tokenizer.bos_token_id).all()
