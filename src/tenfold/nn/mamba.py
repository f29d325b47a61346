"""Mamba 2 (Dao and Gu, 2024) as hybrids with attention have it: a convolution, a recurrence, a gated norm.

Dims: T packed tokens, D model width, H heads, P head dim, G groups of heads that share B and C, N state dim, W width of
the convolution, C = H · P + 2 · G · N its channels.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tenfold.kernels.attention import Attend
from tenfold.kernels.convolution import Convolution, ConvolutionSpec
from tenfold.kernels.norm import rms_norm
from tenfold.kernels.recurrence import Recurrence, RecurrenceSpec
from tenfold.nn.cache import InputsSpec, StateSpec
from tenfold.nn.layers import activation, project, project_all
from tenfold.nn.param import Param, param


@dataclass(frozen=True, kw_only=True)
class MambaSizes:
    """One Mamba 2 layer; letters as in the module's legend.

    Attributes:
        act: activation of the convolution's outputs.
        eps: of the norm.
        norm: whether the norm comes after the gate, before it, or not at all; it is over each group by itself.
        conv_bias, in_bias, out_bias: which parts have biases.
        dt_limits: what Δ is clipped to.
        scales: multiply z, x, B, C and Δ as they are projected (Falcon H1).
    """

    D: int
    H: int
    P: int
    G: int
    N: int
    W: int
    act: str = "silu"
    eps: float = 1e-5
    norm: Literal["after", "before"] | None = "after"
    conv_bias: bool = True
    in_bias: bool = False
    out_bias: bool = False
    dt_limits: tuple[float, float] = (0.0, math.inf)
    scales: tuple[float, ...] | None = None

    @property
    def caches(self) -> tuple[InputsSpec, StateSpec]:
        """What a layer remembers of a sequence: the convolution's last inputs, and a matrix for each head."""
        return InputsSpec(self.H * self.P + 2 * self.G * self.N, self.W), StateSpec(self.H, self.N, self.P)


def mamba_params(at: str, c: MambaSizes) -> dict[str, Param]:
    """Declares the layer whose checkpoint names start with `at`."""
    inner, channels = c.H * c.P, c.H * c.P + 2 * c.G * c.N
    ends = (0, inner, inner + channels, inner + channels + c.H)
    declared: dict[str, Param] = {}
    for name, width, rows in zip(("z", "xbc", "dt"), (inner, channels, c.H), itertools.pairwise(ends), strict=True):
        hf = f"{at}.in_proj"
        declared[name] = param((c.D, width), "embed mlp", f"{hf}.weight", "C D -> D C", rows=rows, inputs="embed")
        if c.in_bias:
            declared[f"{name}_bias"] = param((width,), "mlp", f"{hf}.bias", rows=rows, init="zeros")
    declared |= {
        "conv": param((channels, c.W), "mlp head_dim", f"{at}.conv1d.weight", "C 1 W -> C W"),
        "dt_offset": param((c.H,), "heads", f"{at}.dt_bias", init="ones"),
        "A_log": param((c.H,), "heads", f"{at}.A_log", init="zeros"),
        "skip": param((c.H,), "heads", f"{at}.D", init="ones"),
        "out": param((inner, c.D), "mlp embed", f"{at}.out_proj.weight", "D C -> C D", inputs="mlp"),
    }
    if c.conv_bias:
        declared["conv_bias"] = param((channels,), "mlp", f"{at}.conv1d.bias", init="zeros")
    if c.norm:
        declared["gate_norm"] = param((inner,), "mlp", f"{at}.norm.weight", init="ones")
    if c.out_bias:
        declared["out_bias"] = param((c.D,), "embed", f"{at}.out_proj.bias", init="zeros")
    return declared


def mamba(
    x: Float[Array, "T D"], w: Mapping[str, Any], c: MambaSizes, attend: Attend, caches: Any
) -> tuple[Float[Array, "T D"], Any]:
    """The layer's output, and its updated caches (`MambaSizes.caches`, or None).

    Args:
        x: normalised activations.
        w: what `mamba_params` declares.
        c: sizes.
        attend: as the model's.
        caches: of this layer.
    """
    T, inner, shared = x.shape[0], c.H * c.P, c.G * c.N
    inputs, states = caches or (None, None)
    z, xbc, dt = project_all(x, *((w[name], w.get(f"{name}_bias")) for name in ("z", "xbc", "dt")))
    if c.scales:
        z, dt = z * c.scales[0], dt * c.scales[4]
        widths = ((c.scales[1], inner), (c.scales[2], shared), (c.scales[3], shared))
        xbc = xbc * jnp.concatenate([jnp.full(width, scale, x.dtype) for scale, width in widths])[None]
    xbc, inputs = attend(Convolution(xbc, w["conv"], w.get("conv_bias")), inputs, ConvolutionSpec())
    v, B, C = jnp.split(activation(c.act)(xbc), (inner, inner + shared), axis=-1)
    v = v.reshape(T, c.H, c.P).astype(jnp.float32)
    B, C = B.reshape(T, c.G, c.N), C.reshape(T, c.G, c.N)
    rate = jax.nn.softplus(dt.astype(jnp.float32) + w["dt_offset"].astype(jnp.float32)[None])
    rate = jnp.clip(rate, *c.dt_limits)
    decay = -jnp.exp(w["A_log"].astype(jnp.float32))[None] * rate
    o, states = attend(Recurrence(C, B, v * rate[..., None], decay, None), states, RecurrenceSpec())
    o = (o + v * w["skip"].astype(jnp.float32)[None, :, None]).reshape(T, inner)
    y = project(_gated(o, z.astype(jnp.float32), w, c).astype(x.dtype), w["out"], w.get("out_bias"))
    return y, (inputs, states)


def _gated(o: Float[Array, "T C"], z: Float[Array, "T C"], w: Mapping[str, Any], c: MambaSizes) -> Float[Array, "T C"]:
    """What the recurrence gave, gated by z and normalised, in float32."""
    gate = jax.nn.silu(z)
    if c.norm is None:
        return o * gate
    o = o * gate if c.norm == "after" else o
    grouped = o.reshape(o.shape[0], c.G, -1)
    grouped = rms_norm(grouped, jnp.ones(grouped.shape[-1], o.dtype), c.eps)
    o = grouped.reshape(o.shape) * w["gate_norm"].astype(o.dtype)[None]
    return o * gate if c.norm == "before" else o
