"""Gated DeltaNet (Yang et al., 2024) as Qwen 3 Next and Qwen 3.5 have it: a convolution, a recurrence, a gated norm.

Dims: T packed tokens, D model width, J key heads, H value heads (a multiple of J), K key dim, V value dim, W width of
the convolution, C = 2 · J · K + H · V its channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tenfold.kernels.attention import Attend
from tenfold.kernels.convolution import Convolution, ConvolutionSpec
from tenfold.kernels.norm import rms_norm
from tenfold.kernels.recurrence import Recurrence, RecurrenceSpec
from tenfold.nn import hf_config
from tenfold.nn.cache import InputsSpec, StateSpec
from tenfold.nn.hf_config import HFConfig
from tenfold.nn.layers import activation, project
from tenfold.nn.param import Param, param


@dataclass(frozen=True, kw_only=True)
class DeltaNetSizes:
    """One Gated DeltaNet layer; letters as in the module's legend; `act` is the convolution's, `eps` the norm's."""

    D: int
    J: int
    H: int
    K: int
    V: int
    W: int
    act: str = "silu"
    eps: float = 1e-6

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "DeltaNetSizes":
        """Reads `config.json`. Raises ConfigError or UnsupportedModelError, naming the key."""
        return cls(
            D=hf_config.require(hf, "hidden_size"),
            J=hf.get("linear_num_key_heads", 16),
            H=hf.get("linear_num_value_heads", 32),
            K=hf.get("linear_key_head_dim", 128),
            V=hf.get("linear_value_head_dim", 128),
            W=hf.get("linear_conv_kernel_dim", 4),
            act=hf_config.read_activation(hf),
            eps=float(hf.get("rms_norm_eps", 1e-6)),
        )

    @property
    def channels(self) -> int:
        return 2 * self.J * self.K + self.H * self.V

    @property
    def caches(self) -> tuple[InputsSpec, StateSpec]:
        """What a layer remembers of a sequence: the convolution's last inputs, and a matrix for each head."""
        return InputsSpec(self.channels, self.W), StateSpec(self.H, self.K, self.V)


class Projected(NamedTuple):
    """What a layer projects its input to.

    Attributes:
        qkv: the convolution's inputs: queries, keys and values of all heads, in that order.
        z: what gates the output.
        b: how far the delta rule replaces, before the sigmoid.
        a: how far the state decays, before the bias and the softplus.
    """

    qkv: Float[Array, "T C"]
    z: Float[Array, "T H V"]
    b: Float[Array, "T H"]
    a: Float[Array, "T H"]


def delta_net_params(at: str, c: DeltaNetSizes) -> dict[str, Param]:
    """Declares all but the input projections of the layer whose checkpoint names start with `at`."""
    hf = f"{at}.out_proj.weight"
    return {
        "conv": param((c.channels, c.W), "mlp head_dim", f"{at}.conv1d.weight", "C 1 W -> C W"),
        "dt_offset": param((c.H,), "heads", f"{at}.dt_bias", init="ones"),
        "A_log": param((c.H,), "heads", f"{at}.A_log", init="zeros"),
        "gate_norm": param((c.V,), "head_dim", f"{at}.norm.weight", init="ones"),
        "o": param((c.H, c.V, c.D), "heads head_dim embed", hf, "D (H V) -> H V D", inputs="heads head_dim"),
    }


def delta_net(
    projected: Projected, w: Mapping[str, Any], c: DeltaNetSizes, attend: Attend, caches: Any
) -> tuple[Float[Array, "T D"], Any]:
    """From the input projections to the layer's output, and the updated caches (`DeltaNetSizes.caches`, or None)."""
    qkv, z, b, a = projected
    T = z.shape[0]
    inputs, states = caches or (None, None)
    mixed, inputs = attend(Convolution(qkv, w["conv"], None), inputs, ConvolutionSpec())
    mixed = activation(c.act)(mixed)
    parts = jnp.split(mixed, (c.J * c.K, 2 * c.J * c.K), axis=-1)
    q, k, v = (part.reshape(T, -1, dim) for part, dim in zip(parts, (c.K, c.K, c.V), strict=True))
    q, k = (_normalize(x.astype(jnp.float32)) for x in (q, k))
    rate = jax.nn.softplus(a.astype(jnp.float32) + w["dt_offset"].astype(jnp.float32)[None])
    decay = -jnp.exp(w["A_log"].astype(jnp.float32))[None] * rate
    beta = jax.nn.sigmoid(b)
    o, states = attend(Recurrence(q * c.K**-0.5, k, v, decay, beta), states, RecurrenceSpec())
    o = rms_norm(o, w["gate_norm"], c.eps) * jax.nn.silu(z.astype(jnp.float32))
    y = project(o.astype(z.dtype).reshape(T, -1), w["o"])
    return y, (inputs, states)


def _normalize(x: jax.Array) -> jax.Array:
    """To length one over the last dim."""
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6)
