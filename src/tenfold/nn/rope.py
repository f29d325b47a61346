"""Rotary frequencies for every scaling rule that dense checkpoints use.

Each rule turns (base, rotated dims, its own parameters) into inverse frequencies and a factor on cos and sin.
Sources: default, Su et al. 2021; linear, Chen et al. 2023; llama3, the Llama 3.1 release; yarn, Peng et al. 2023;
longrope, Ding et al. 2024; proportional, the Gemma 4 release.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tenfold.base.errors import ConfigError, UnsupportedModelError

KINDS = ("default", "linear", "llama3", "yarn", "longrope", "proportional")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """How one kind of layer rotates its queries and keys.

    Attributes:
        kind: one of `KINDS`.
        theta: the base wavelength.
        dims: how many of the head's dims rotate; even.
        turning: how many of their pairs turn at all, the first ones (proportional).
        original_len: context length before scaling (llama3, yarn, longrope).
        factor: the scaling factor of linear, llama3, yarn and proportional.
        attention_factor: multiplies cos and sin (yarn, longrope).
        low, high: llama3's low_freq_factor and high_freq_factor; yarn's beta_slow and beta_fast.
        truncate: yarn rounds its correction range to whole dims.
        short, long: longrope's factors, one per frequency. `long` is used for contexts beyond `original_len`.
    """

    kind: str = "default"
    theta: float = 10_000.0
    dims: int
    turning: int = 0
    original_len: int = 0
    factor: float = 1.0
    attention_factor: float = 1.0
    low: float = 1.0
    high: float = 32.0
    truncate: bool = True
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()


def read(parameters: Mapping[str, Any], *, head_dim: int, max_len: int, where: str = "rope_parameters") -> Rope:
    """Reads one normalised `rope_parameters` dict of a Hugging Face config.

    Args:
        parameters: rope_type, rope_theta and the rule's own keys.
        head_dim: dims of a head, of which `partial_rotary_factor` rotate.
        max_len: `max_position_embeddings`.
        where: the field's name, for messages.

    Raises:
        UnsupportedModelError: for a rule that is not implemented.
        ConfigError: for a rule whose keys are missing, or of the wrong type or length; or if no pairs of dims rotate.
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "su":  # the name of longrope in early Phi-3 checkpoints
        kind = "longrope"
    if kind not in KINDS:
        raise UnsupportedModelError(f"{where}: the rope type {kind!r} is not implemented; known: {', '.join(KINDS)}")
    try:
        dims = int(head_dim * (parameters.get("partial_rotary_factor") or 1.0))
        original = int(parameters.get("original_max_position_embeddings") or max_len)
        rope = Rope(kind=kind, theta=float(parameters["rope_theta"]), dims=dims, original_len=original)
        rope = _read_scaling(rope, parameters, head_dim, max_len)
    except KeyError as missing:
        raise ConfigError(f"{where}: rope type {kind!r} needs the key {missing}") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: rope type {kind!r} has a key of the wrong type: {error}") from None
    if kind != "proportional" and (dims % 2 or not 0 < dims <= head_dim):
        raise ConfigError(f"{where}: {dims} of a head's {head_dim} dims would rotate; they must be pairs")
    return rope


def _read_scaling(rope: Rope, p: Mapping[str, Any], head_dim: int, max_len: int) -> Rope:
    if rope.kind == "proportional":  # the other pairs keep their places, and with them the pairing of all
        return replace(rope, dims=head_dim, turning=rope.dims // 2, factor=float(p.get("factor") or 1))
    if rope.kind == "linear":
        return replace(rope, factor=float(p["factor"]))
    if rope.kind == "llama3":
        low, high = float(p["low_freq_factor"]), float(p["high_freq_factor"])
        return replace(rope, factor=float(p["factor"]), low=low, high=high)
    if rope.kind == "yarn":
        factor = float(p.get("factor") or max_len / rope.original_len)
        return replace(
            rope,
            factor=factor,
            attention_factor=_yarn_attention_factor(p, factor),
            low=float(p.get("beta_slow") or 1),
            high=float(p.get("beta_fast") or 32),
            truncate=bool(p.get("truncate", True)),
        )
    if rope.kind == "longrope":
        short, long = tuple(map(float, p["short_factor"])), tuple(map(float, p["long_factor"]))
        if len(short) != rope.dims // 2 or len(long) != rope.dims // 2:
            raise ConfigError(
                f"longrope needs {rope.dims // 2} short and long factors, one per rotated pair; "
                f"the config has {len(short)} and {len(long)}"
            )
        factor = float(p.get("factor") or max_len / rope.original_len)
        scale = p.get("attention_factor")
        if scale is None:
            scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(rope.original_len))
        return replace(rope, short=short, long=long, attention_factor=float(scale))
    return rope


def _yarn_attention_factor(p: Mapping[str, Any], factor: float) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    given = p.get("attention_factor")
    if given is not None:
        return float(given)
    if p.get("mscale") and p.get("mscale_all_dim"):
        return mscale(p["mscale"]) / mscale(p["mscale_all_dim"])
    return mscale(1.0)


def inverse_frequencies(rope: Rope, max_len: int) -> np.ndarray:
    """Radians per position of each rotated pair, float32 [dims/2].

    `max_len` is the longest context that will be used: longrope picks its factors by it, once, so that a token's
    rotation never depends on how long its neighbours are.
    """
    exponents = np.arange(0, rope.dims, 2, dtype=np.float32) / rope.dims
    inv = (1.0 / rope.theta**exponents).astype(np.float32)
    if rope.kind == "linear":
        return inv / np.float32(rope.factor)
    if rope.kind == "proportional":
        return np.where(np.arange(len(inv)) < rope.turning, inv / np.float32(rope.factor), np.float32(0))
    if rope.kind == "llama3":
        return _llama3(rope, inv)
    if rope.kind == "yarn":
        return _yarn(rope, inv)
    if rope.kind == "longrope":
        factors = rope.long if max_len > rope.original_len else rope.short
        return inv / np.asarray(factors, np.float32)
    return inv


def _llama3(rope: Rope, inv: np.ndarray) -> np.ndarray:
    """Long wavelengths are slowed by `factor`, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / inv
    smooth = (rope.original_len / wavelength - rope.low) / (rope.high - rope.low)
    smooth = np.clip(smooth, 0, 1)
    return (inv * ((1 - smooth) / rope.factor + smooth)).astype(np.float32)


def _yarn(rope: Rope, inv: np.ndarray) -> np.ndarray:
    """Pairs that turn more than `high` times in the original context are kept, those below `low` are interpolated."""

    def pair_with(rotations: float) -> float:
        wavelengths = rope.original_len / (rotations * 2 * math.pi)
        return rope.dims * math.log(wavelengths) / (2 * math.log(rope.theta))

    first, last = pair_with(rope.high), pair_with(rope.low)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dims - 1)
    width = (last - first) or 0.001
    interpolated = np.clip((np.arange(rope.dims // 2, dtype=np.float32) - first) / width, 0, 1)
    return (inv * (interpolated / rope.factor + (1 - interpolated))).astype(np.float32)


def cos_sin(
    rope: Rope, positions: Int[Array, " T"], max_len: int
) -> tuple[Float[Array, "T half"], Float[Array, "T half"]]:
    """Float32 cosines and sines of each position, with the rule's attention factor folded in."""
    angles = positions[:, None].astype(jnp.float32) * jnp.asarray(inverse_frequencies(rope, max_len))[None, :]

    def compute(angles: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor

    # On a CPU in a branch: all else XLA computes again in each layer, for each head, when it fuses.
    always = jax.lax.optimization_barrier(jnp.bool_(True))
    return jax.lax.platform_dependent(
        angles, cpu=lambda a: jax.lax.cond(always, compute, lambda b: (b, b), a), default=compute
    )
