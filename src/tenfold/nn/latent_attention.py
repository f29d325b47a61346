"""The projections around latent attention (DeepSeek-AI, 2024), as DeepSeek V2 and V3 have it.

Dims: T packed tokens, D model width, H heads, Rq query latent dim, R latent dim, K head dim without rotation,
Kr rotated dim, V value dim.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tenfold.kernels.attention import Attend
from tenfold.kernels.latent_attention import Latents, LatentSpec
from tenfold.kernels.norm import rms_norm
from tenfold.nn import hf_config
from tenfold.nn.cache import LatentCacheSpec
from tenfold.nn.hf_config import HFConfig
from tenfold.nn.layers import project, rotate
from tenfold.nn.param import Param, param

NORM_EPS = 1e-6  # of the latents' norms, whatever the config says of the others


@dataclass(frozen=True, kw_only=True)
class LatentSizes:
    """Sizes of latent attention; letters as in the module's legend, and `Rq` None where queries have no latent."""

    D: int
    H: int
    Rq: int | None
    R: int
    K: int
    Kr: int
    V: int
    scale: float
    bias: bool = False
    interleaved: bool = True

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "LatentSizes":
        """Reads `config.json`, as DeepSeek V2 and V3 write it. Raises ConfigError, naming the key."""
        K, Kr = hf.get("qk_nope_head_dim", 128), hf.get("qk_rope_head_dim", 64)
        return cls(
            D=hf_config.require(hf, "hidden_size"),
            H=hf_config.require(hf, "num_attention_heads"),
            Rq=hf.get("q_lora_rank", 1536),
            R=hf.get("kv_lora_rank", 512),
            K=K,
            Kr=Kr,
            V=hf.get("v_head_dim", 128),
            scale=(K + Kr) ** -0.5 * _yarn_scale(hf),
            bias=bool(hf.get("attention_bias", False)),
            interleaved=bool(hf.get("rope_interleave", True)),
        )

    @property
    def spec(self) -> LatentSpec:
        return LatentSpec(self.scale)

    @property
    def cache(self) -> LatentCacheSpec:
        return LatentCacheSpec(self.R, self.Kr)


def _yarn_scale(hf: HFConfig) -> float:
    """What a context extended by YaRN multiplies the scores by, where `mscale_all_dim` asks for it."""
    parameters = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    weight, factor = parameters.get("mscale_all_dim"), parameters.get("factor") or 1.0
    if kind == "default" or not weight or factor <= 1:
        return 1.0
    return (0.1 * weight * math.log(factor) + 1.0) ** 2


def latent_attention_params(at: str, c: LatentSizes) -> dict[str, Param]:
    """Declares the projections of the layer whose checkpoint names start with `at`."""
    q = "q_b_proj" if c.Rq else "q_proj"
    declared = {
        "q": param(
            (c.Rq or c.D, c.H, c.K + c.Kr),
            f"{'latent' if c.Rq else 'embed'} heads head_dim",
            f"{at}.{q}.weight",
            "(H K) D -> D H K",
            inputs="latent" if c.Rq else "embed",
        ),
        "kv_a": param(
            (c.D, c.R + c.Kr), "embed latent", f"{at}.kv_a_proj_with_mqa.weight", "R D -> D R", inputs="embed"
        ),
        "kv_a_norm": param((c.R,), "latent", f"{at}.kv_a_layernorm.weight", init="ones"),
        # Not a matrix of a product with activations: of a decode, its halves map queries to latents and back.
        "kv_b": param((c.H, c.K + c.V, c.R), "heads head_dim latent", f"{at}.kv_b_proj.weight", "(H K) R -> H K R"),
        "o": param(
            (c.H, c.V, c.D), "heads head_dim embed", f"{at}.o_proj.weight", "D (H V) -> H V D", inputs="heads head_dim"
        ),
    }
    if c.Rq:
        declared["q_a"] = param((c.D, c.Rq), "embed latent", f"{at}.q_a_proj.weight", "R D -> D R", inputs="embed")
        declared["q_a_norm"] = param((c.Rq,), "latent", f"{at}.q_a_layernorm.weight", init="ones")
    if c.bias:
        declared["kv_a_bias"] = param((c.R + c.Kr,), "latent", f"{at}.kv_a_proj_with_mqa.bias", init="zeros")
        declared["o_bias"] = param((c.D,), "embed", f"{at}.o_proj.bias", init="zeros")
        if c.Rq:
            declared["q_a_bias"] = param((c.Rq,), "latent", f"{at}.q_a_proj.bias", init="zeros")
    return declared


def latent_attention(
    x: Float[Array, "T D"],
    w: Mapping[str, Any],
    c: LatentSizes,
    cos_sin: tuple[jax.Array, jax.Array],
    attend: Attend,
    cache: Any,
) -> tuple[Float[Array, "T D"], Any]:
    """The layer's output, and its updated cache.

    Args:
        x: normalised activations.
        w: what `latent_attention_params` declares.
        c: sizes.
        cos_sin: of each token's rotation.
        attend, cache: as the model's.
    """
    h = rms_norm(project(x, w["q_a"], w.get("q_a_bias")), w["q_a_norm"], NORM_EPS) if c.Rq else x
    q, q_rotated = jnp.split(project(h, w["q"]), (c.K,), axis=-1)
    latent, k_rotated = jnp.split(project(x, w["kv_a"], w.get("kv_a_bias")), (c.R,), axis=-1)
    latent = rms_norm(latent, w["kv_a_norm"], NORM_EPS)
    q_rotated = rotate(q_rotated, *cos_sin, interleaved=c.interleaved)
    k_rotated = rotate(k_rotated[:, None], *cos_sin, interleaved=c.interleaved)[:, 0]
    to_keys, to_values = jnp.split(w["kv_b"], (c.K,), axis=1)
    o, cache = attend(Latents(q, q_rotated, latent, k_rotated, to_keys, to_values), cache, c.spec)
    return project(o.astype(x.dtype).reshape(x.shape[0], -1), w["o"], w.get("o_bias")), cache
