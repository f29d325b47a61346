"""Quantising a checkpoint with calibration, and what it costs in perplexity."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from tenfold.base.errors import ConfigError
from tenfold.data.packing import Rows
from tenfold.data.tokenizer import Tokenizer
from tenfold.kernels.attention import Attend, AttentionSpec, packed_attention
from tenfold.kernels.matmul import ObservedWeight, QuantizedWeight, reference
from tenfold.models.family import Model, resolve
from tenfold.nn import checkpoint
from tenfold.nn.packed import packed_attend
from tenfold.nn.param import Param, Tree, is_param
from tenfold.nn.quantization import Scheme, find_scheme, quantize_param
from tenfold.train.calibration import draw_rows
from tenfold.train.export import copy_other_files, stored_dtype
from tenfold.train.gptq import gptq
from tenfold.train.loss import next_token_loss

ROW_LENGTH = 512
TOGETHER = 8  # rows whose attention, or loss, is computed at a time
HELD_OUT = 4  # one row is held out for this many that calibrate

Report = Callable[[int, int], None]
"""Is told how many weights are quantised, out of how many."""


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What became of a checkpoint.

    Attributes:
        before, after: perplexity on the held-out rows.
        bytes_before, bytes_after: of the files of weights.
        calibration_tokens, held_out_tokens: that the weights were fitted to, and that perplexity was measured on.
    """

    before: float
    after: float
    bytes_before: int
    bytes_after: int
    calibration_tokens: int
    held_out_tokens: int


def quantizable(p: Param) -> bool:
    """Whether a weight is rounded: all that products use, but those with the vocabulary and those that choose experts,
    which are small and most sensitive, and experts that share a tensor, which the format has no place for."""
    written = p.experts is None or p.stack_dims > 0
    return bool(p.inputs) and "vocab" not in p.axes.split() and not p.routes and written


def calibrate(
    model: Model,
    params: Tree,
    rows: Rows,
    scheme: Scheme,
    *,
    scale_dtype: DTypeLike = jnp.float32,
    report: Report | None = None,
) -> Tree:
    """The weights with those that are `quantizable` rounded by GPTQ, in the order in which the model uses them.

    Experts are rounded to the nearest: too few of the tokens reach each of them to fit it to.

    One forward over all rows does it: a weight is rounded when the activations reach it, and what comes after sees the
    products with the rounded one. The activations of all rows are in memory, for one layer.

    Args:
        model: the architecture.
        params: its weights, unstacked, in float32.
        rows: the texts to calibrate with.
        scheme: how to round.
        scale_dtype: as in `gptq`.
        report: is told of every weight.

    Raises:
        CheckpointError: if the activations are not finite.
    """
    declared, treedef = jax.tree.flatten(model.params(), is_leaf=is_param)
    leaves = treedef.flatten_up_to(params)
    moments = _Moments(np.flatnonzero(np.asarray(rows.segment_ids).reshape(-1)))
    total = sum(map(quantizable, declared))
    done: dict[int, Any] = {}

    def observe(i: int, p: Param) -> ObservedWeight:
        def product(x: jax.Array) -> jax.Array:
            with jax.disable_jit(False):
                if i not in done:
                    bits, group = scheme.rounding(p)
                    matrix = p.as_matrix(leaves[i])
                    done[i] = gptq(matrix, moments(x), bits, group, p.output_dims, scale_dtype=scale_dtype)
                    if report:
                        report(len(done), total)
                return _product(x, done[i])

        return ObservedWeight(product=product, dims=p.output_dims)

    def round_experts(i: int, p: Param) -> QuantizedWeight | jax.Array:
        done[i] = weight = quantize_param(p, leaves[i], scheme)
        if isinstance(weight, QuantizedWeight):
            scales = weight.scales.astype(scale_dtype).astype(jnp.float32)
            done[i] = weight = replace(weight, scales=scales)
        if report:
            report(len(done), total)
        return weight

    def prepare(i: int, p: Param) -> Any:
        if not quantizable(p):
            return leaves[i]
        return observe(i, p) if p.experts is None else round_experts(i, p)

    observed = [prepare(i, p) for i, p in enumerate(declared)]
    tokens, positions = (jnp.asarray(array).reshape(-1) for array in (rows.tokens, rows.positions))
    with jax.disable_jit():
        model.forward(treedef.unflatten(observed), tokens, positions, _attend_by_row(rows))
    return treedef.unflatten([done.get(i, leaf) for i, leaf in enumerate(leaves)])


_product = jax.jit(reference)
_attention = jax.jit(packed_attention, static_argnums=4)


@jax.jit
def _second_moments(x: Float[Array, "M D"], kept: jax.Array) -> Float32[Array, "D D"]:
    x = x[kept].astype(jnp.float32)
    return jnp.matmul(x.T, x, precision="highest")


class _Moments:
    """Xᵀ·X of the tokens that are no padding; computed once for weights that share their activations."""

    def __init__(self, kept: np.ndarray) -> None:
        self._kept = jnp.asarray(kept)
        self._last: tuple[jax.Array, jax.Array] | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        if self._last is None or self._last[0] is not x:
            self._last = x, _second_moments(x, self._kept)
        return self._last[1]


def _attend_by_row(rows: Rows) -> Attend:
    """Attention within the segments of packed rows, some rows at a time: the scores of all would fill the memory."""
    N, L = rows.tokens.shape
    segments = jnp.asarray(rows.segment_ids)
    mix = jax.jit(packed_attend(segments), static_argnums=2)

    def attend(heads: Any, cache: Any, spec: Any) -> tuple[jax.Array, Any]:
        if not isinstance(spec, AttentionSpec):
            with jax.disable_jit(False):
                return mix(heads, cache, spec)
        if heads.k is not None and heads.v is not None:
            cache = heads.k, heads.v
        q, k, v = (x.reshape(N, L, *x.shape[1:]) for x in (heads.q, *cache))
        with jax.disable_jit(False):
            parts = [_attention(q[at], k[at], v[at], segments[at], spec, heads.sinks) for at in _cut(N)]
        o = jnp.concatenate(parts)
        return o.reshape(N * L, *o.shape[2:]), cache

    return attend


def _cut(rows: int) -> list[slice]:
    return [slice(start, start + TOGETHER) for start in range(0, rows, TOGETHER)]


def perplexity(model: Model, params: Tree, rows: Rows) -> float:
    """exp of the mean loss over the tokens of packed rows, with plain or quantised weights."""
    loss = jax.jit(lambda params, rows: next_token_loss(params, model, rows))
    sums = [loss(params, Rows(*(array[at] for array in rows))) for at in _cut(len(rows.tokens))]
    return math.exp(sum(float(part.total) for part in sums) / sum(float(part.weight) for part in sums))


def quantize_checkpoint(
    path: Path,
    output: Path,
    texts: Sequence[str],
    *,
    scheme: str = "int4",
    samples: int = 128,
    seed: int = 0,
    report: Report | None = None,
) -> Quantized:
    """Writes a quantised copy of a checkpoint, in compressed-tensors' format, and measures both.

    Args:
        path: a checkpoint in Hugging Face's format that is not quantised, with its tokenizer.
        output: a directory that does not exist, or is empty.
        texts: to calibrate with and, other parts of them, to measure perplexity on.
        scheme: one of `SCHEMES`.
        samples: rows of `ROW_LENGTH` tokens to calibrate with; a quarter as many are held out.
        seed: of the choice of rows.
        report: is told of every weight.

    Raises:
        ConfigError: if an argument cannot work, the checkpoint is quantised already, or the texts are too short.
        CheckpointError, UnsupportedModelError, TokenizerError: if the checkpoint cannot be used.
    """
    chosen = find_scheme(scheme)
    if chosen is None or samples < 1:
        raise ConfigError(f"samples must be at least 1; it is {samples}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} exists and is not an empty directory; choose another output")
    if checkpoint.read_quantization(path) is not None:
        raise ConfigError(f"the weights of {path} are quantised already; quantise the checkpoint that they came from")
    config = checkpoint.read_config(path)
    model = resolve(config)
    tokenizer = Tokenizer.load(path)
    held_out = -(-samples // HELD_OUT)
    rows = draw_rows(texts, tokenizer, min(ROW_LENGTH, model.config.max_len), samples + held_out, seed)
    calibration, measured = Rows(*(a[:samples] for a in rows)), Rows(*(a[samples:] for a in rows))
    params = checkpoint.load(path, model.params(), jnp.float32, skipped=model.skipped())
    before = perplexity(model, params, measured)
    dtype = stored_dtype(config)
    params = calibrate(model, params, calibration, chosen, scale_dtype=dtype, report=report)
    after = perplexity(model, params, measured)
    copy_other_files(path, output)
    generation = path / "generation_config.json"
    checkpoint.export(
        output,
        model.params(),
        params,
        config=config,
        dtype=dtype,
        generation_config=json.loads(generation.read_text(encoding="utf-8")) if generation.exists() else None,
    )
    return Quantized(
        before=before,
        after=after,
        bytes_before=_weight_bytes(path),
        bytes_after=_weight_bytes(output),
        calibration_tokens=int((calibration.segment_ids > 0).sum()),
        held_out_tokens=int(measured.weights[:, 1:].sum()),
    )


def _weight_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))
