"""The projections around attention: grouped queries (Ainslie et al., 2023), separate or fused in the checkpoint.

Dims: T packed tokens, D model width, H query heads, J key-value heads, K head dim, N heads of either kind.
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from tenfold.kernels.norm import rms_norm
from tenfold.nn.layers import project, project_all
from tenfold.nn.param import Initializer, Param, param


def attention_params(
    at: str, D: int, H: int, J: int, K: int, *, qkv_bias: bool = False, o_bias: bool = False, fused: bool = False
) -> dict[str, Param]:
    """Declares q, k, v and o (and their biases) of the layer whose checkpoint names start with `at`.

    Args:
        at: prefix, e.g. "model.layers.3.self_attn".
        D, H, J, K: sizes, as in the module's legend.
        qkv_bias, o_bias: whether those projections have biases.
        fused: the checkpoint holds one `qkv_proj` (Phi-3) with the rows of q, k and v in that order.
    """
    declared = qkv_params(at, D, H, J, K, bias=qkv_bias, fused=fused)
    return declared | output_params(f"{at}.o_proj", D, H, K, bias=o_bias)


def qkv_params(at: str, D: int, H: int, J: int, K: int, *, bias: bool = False, fused: bool = False) -> dict[str, Param]:
    """Declares q, k and v alone. Arguments as those of `attention_params`."""
    declared: dict[str, Param] = {}
    row = 0
    for name, heads, axis in (("q", H, "heads"), ("k", J, "kv_heads"), ("v", J, "kv_heads")):
        hf = f"{at}.qkv_proj" if fused else f"{at}.{name}_proj"
        rows = (row, row + heads * K) if fused else None
        row += heads * K
        declared[name] = param(
            (D, heads, K), f"embed {axis} head_dim", f"{hf}.weight", "(N K) D -> D N K", rows=rows, inputs="embed"
        )
        if bias:
            declared[f"{name}_bias"] = param(
                (heads, K), f"{axis} head_dim", f"{hf}.bias", "(N K) -> N K", rows=rows, init="zeros"
            )
    return declared


def output_params(hf: str, D: int, H: int, K: int, *, bias: bool = False) -> dict[str, Param]:
    """Declares o alone, under its name in the checkpoint."""
    declared = {
        "o": param((H, K, D), "heads head_dim embed", f"{hf}.weight", "D (N K) -> N K D", inputs="heads head_dim")
    }
    if bias:
        declared["o_bias"] = param((D,), "embed", f"{hf}.bias", init="zeros")
    return declared


def head_norm_params(at: str, K: int, *, init: Initializer = "ones") -> dict[str, Param]:
    """Declares norms of q and k that normalise every head by itself, with one weight for all (Qwen 3, Gemma 3)."""
    return {name: param((K,), "head_dim", f"{at}.{name}.weight", init=init) for name in ("q_norm", "k_norm")}


def flat_norm_params(at: str, H: int, J: int, K: int) -> dict[str, Param]:
    """Declares norms of q and k that normalise all heads together (OLMo 2 and 3)."""
    return {
        name: param((heads, K), f"{axis} head_dim", f"{at}.{name}.weight", "(N K) -> N K", init="ones")
        for name, heads, axis in (("q_norm", H, "heads"), ("k_norm", J, "kv_heads"))
    }


def qkv(
    x: Float[Array, "T D"], p: Mapping[str, Any]
) -> tuple[Float[Array, "T H Q"], Float[Array, "T J K"], Float[Array, "T J K"]]:
    """Queries, keys and values of the tokens; queries are wider than keys where a gate comes with them."""
    q, k, v = project_all(x, *((p[name], p.get(f"{name}_bias")) for name in "qkv"))
    return q, k, v


def flat_norm(x: Float[Array, "T N K"], weight: Float[Array, "N K"], eps: float) -> Float[Array, "T N K"]:
    """Root-mean-square normalisation of all the heads of a token together (OLMo 2 and 3)."""
    flat = x.reshape(x.shape[0], -1)
    return rms_norm(flat, weight.reshape(-1), eps, offset=0.0).reshape(x.shape)


def output(o: Float[Array, "T H K"], p: Mapping[str, Any]) -> Float[Array, "T D"]:
    """What attention read, mapped back to the model's width."""
    return project(o.reshape(o.shape[0], -1), p["o"], p.get("o_bias"))
