"""Mixtures of experts (Shazeer et al., 2017): a router that chooses some experts for every token, and the experts.

What differs between families is data: a `Router`, which weights are declared, and the `Gating` of the experts.
Declarations and computation meet in a dict of weights, under these names:

    router              [D, E]; `router_bias` [E], which is added to the logits
    choice_bias         [E]: is added to the scores for the choice of experts alone (DeepSeek-V3)
    gate, up, down      of every expert: [E, D, F] twice, and [E, F, D]; `gate_bias`, `up_bias` and `down_bias`; plain
                        experts have no gate
    gate_up             instead of gate and up, where a checkpoint fuses them: [E, D, 2, F]
    gate_up_pairs       likewise, but where they are interleaved: [E, D, F, 2], and `gate_up_pairs_bias`
    narrow, widen       [D, N] and [N, D]: map tokens to what experts see, whose D is N then, and back; perhaps with
                        `narrow_bias` and `widen_bias` (latent experts)
    shared              {gate, up, down} of an expert that every token has; `shared_gate` [D, 1] weighs it by a sigmoid
    layout              not a weight: where tokens lie, of layers that are trained on a mesh

`mixture` dispatches tokens by sorting them by expert, and multiplies each with the weights of its own experts only; no
token is dropped. A token's result depends on that token alone, to the last bit where the products do: what its experts
say is added in the order in which its own router ranks them.

On a mesh every device sorts its own tokens. Along "expert" it gathers those of others, computes what its own experts
say of all of them, and the results are added up and scattered back. That drops no token, whatever the routing; sending
each to its experts would need room for the worst case, or a limit to what an expert takes (ADR 0012).

Dims: T packed tokens, D model width, E experts, k experts of a token, F feed-forward width of an expert.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int

from tenfold.base.errors import ConfigError
from tenfold.kernels.grouped_matmul import grouped_matmul, output_dims
from tenfold.kernels.matmul import matmul
from tenfold.nn.layers import gated, project, project_all
from tenfold.nn.mlp import gated_mlp
from tenfold.nn.param import Param, param, stack
from tenfold.parallel.layout import NOWHERE, Layout, current

Gating = Callable[..., jax.Array]
"""What an expert makes of x · gate and x · up; a plain one of x · up."""


@dataclass(frozen=True, kw_only=True)
class Router:
    """How experts are chosen for a token, and weighed.

    Scores are a function of the logits x · router. The `top_k` best ones are chosen, by score (plus `choice_bias` where
    it is declared), out of the best groups. Their weights are their scores, without that bias.

    Attributes:
        top_k: experts of a token.
        score: "softmax" over all experts, "sigmoid", or "sqrt_softplus" (DeepSeek-V4). The softmax of the chosen logits
            (gpt-oss) is "softmax" with `renormalize`.
        renormalize: weights are divided by their sum.
        scale: then multiplies the weights.
        groups: into how many groups of neighbours the experts are divided.
        top_groups: out of how many of them a token chooses.
        group_score: what ranks groups: their best expert ("max", DeepSeek-V2), or the sum of their best two ("top2").
        on_input: weights multiply what goes into the experts, not what comes out (Llama 4).
    """

    top_k: int
    score: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "top2"
    on_input: bool = False


class Routing(NamedTuple):
    """The experts of every token, in the order of their scores, and their weights."""

    experts: Int[Array, "T k"]
    weights: Float32[Array, "T k"]


def _total(x: Float32[Array, "T n"]) -> Float32[Array, "T 1"]:
    """The sums of rows, in one order however many rows there are, which XLA's own sums do not promise."""
    while x.shape[1] > 1:
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2)))
        x = x[:, : x.shape[1] // 2] + x[:, x.shape[1] // 2 :]
    return x


def _softmax(logits: Float32[Array, "T E"]) -> Float32[Array, "T E"]:
    exponentials = jnp.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / _total(exponentials)


_SCORES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "softmax": _softmax,
    "sigmoid": jax.nn.sigmoid,
    "sqrt_softplus": lambda logits: jnp.sqrt(jax.nn.softplus(logits)),
}


# --- declarations ---------------------------------------------------------------------------------------------------


def router_params(hf: str, D: int, E: int, *, bias: bool = False, choice_bias: str | None = None) -> dict[str, Param]:
    """Declares the router whose checkpoint names start with `hf`; `choice_bias` is the full name of that bias."""
    declared = {"router": param((D, E), "embed experts", f"{hf}.weight", "E D -> D E", inputs="embed")}
    if bias:
        declared["router_bias"] = param((E,), "experts", f"{hf}.bias", init="zeros")
    if choice_bias:
        declared["choice_bias"] = param((E,), "experts", choice_bias, init="zeros")
    return declared


def expert_params(
    at: str, D: int, F: int, E: int, *, names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")
) -> dict[str, Param]:
    """Declares experts that have tensors of their own: `{at}.{expert}.{name}.weight`, names of gate, up and down, or of
    up and down alone where they are plain."""

    def of_all(name: str, shape: tuple[int, int], axes: str, layout: str) -> Param:
        inputs = axes.split()[0]
        return stack(
            [param(shape, axes, f"{at}.{e}.{name}.weight", layout, inputs=inputs) for e in range(E)], "experts"
        )

    *inner, down = names
    declared = {
        name: of_all(hf, (D, F), "embed mlp", "F D -> D F")
        for name, hf in zip(("gate", "up")[-len(inner) :], inner, strict=True)
    }
    return declared | {"down": of_all(down, (F, D), "mlp embed", "D F -> F D")}


def fused_expert_params(
    at: str, D: int, F: int, E: int, *, interleaved: bool = False, bias: bool = False
) -> dict[str, Param]:
    """Declares experts that share tensors: `{at}.gate_up_proj` [E, D, 2F] and `{at}.down_proj` [E, F, D].

    `interleaved`: each gate is followed by its up (gpt-oss); else all gates come first (Llama 4).
    """
    if interleaved:
        name, dims, axes, pair = "gate_up_pairs", (F, 2), "mlp gates", "F two"
    else:
        name, dims, axes, pair = "gate_up", (2, F), "gates mlp", "two F"
    hf, layout = f"{at}.gate_up_proj", f"E D ({pair}) -> E D {pair}"
    declared = {
        name: param((E, D, *dims), f"experts embed {axes}", hf, layout, inputs="embed"),
        "down": param((E, F, D), "experts mlp embed", f"{at}.down_proj", inputs="mlp"),
    }
    if bias:
        layout = f"E ({pair}) -> E {pair}"
        declared[f"{name}_bias"] = param((E, *dims), f"experts {axes}", f"{hf}_bias", layout, init="zeros")
        declared["down_bias"] = param((E, D), "experts embed", f"{at}.down_proj_bias", init="zeros")
    return declared


def narrowing_params(narrow: str, widen: str, D: int, N: int, *, bias: bool = False) -> dict[str, Param]:
    """Declares the maps to the N dims that experts see, and back; `narrow` and `widen` are their checkpoint names."""
    declared = {
        "narrow": param((D, N), "embed latent", f"{narrow}.weight", "N D -> D N", inputs="embed"),
        "widen": param((N, D), "latent embed", f"{widen}.weight", "D N -> N D", inputs="latent"),
    }
    if bias:
        declared["narrow_bias"] = param((N,), "latent", f"{narrow}.bias", init="zeros")
        declared["widen_bias"] = param((D,), "embed", f"{widen}.bias", init="zeros")
    return declared


def shared_gate_param(hf: str, D: int) -> Param:
    """Declares what weighs a shared expert; its checkpoint name starts with `hf`."""
    return param((D, 1), "embed gates", f"{hf}.weight", "one D -> D one", inputs="embed")


# --- choosing -------------------------------------------------------------------------------------------------------


def choose(logits: Float32[Array, "T E"], router: Router, choice_bias: Float[Array, " E"] | None = None) -> Routing:
    """The experts of every token. Of equal scores, the expert that comes first is chosen."""
    # A sigmoid does not change the order of logits, but rounds close large ones to equal scores.
    scores = _SCORES[router.score](logits)
    ranked = logits if router.score == "sigmoid" and choice_bias is None and router.groups == 1 else scores
    if choice_bias is not None:
        ranked = ranked + choice_bias.astype(jnp.float32)[None]
    if router.top_groups < router.groups:
        ranked = _best_groups(ranked, router)
    _, experts = jax.lax.top_k(ranked, router.top_k)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if router.renormalize:
        weights = weights / (_total(weights) + 1e-20)
    return Routing(experts, weights * router.scale)


def _best_groups(scores: Float32[Array, "T E"], router: Router) -> Float32[Array, "T E"]:
    """The scores, without those of groups that are not among the best."""
    T, E = scores.shape
    grouped = scores.reshape(T, router.groups, -1)
    best, _ = jax.lax.top_k(grouped, 1 if router.group_score == "max" else 2)
    _, kept = jax.lax.top_k(best.sum(-1), router.top_groups)
    chosen = (kept[:, :, None] == jnp.arange(router.groups)[None, None]).any(1)
    return jnp.where(chosen[:, :, None], grouped, -jnp.inf).reshape(T, E)


# --- computing ------------------------------------------------------------------------------------------------------


def feed_forward(x: Float[Array, "T D"], p: Mapping[str, Any], router: Router, act: str) -> Float[Array, "T D"]:
    """The mixture, in layers that have a router, and in others the one feed-forward of `nn.mlp`."""
    return mixture(x, p, router, gated(act)) if "router" in p else gated_mlp(x, p, act)


def mixture(x: Float[Array, "T D"], p: Mapping[str, Any], router: Router, gating: Gating) -> Float[Array, "T D"]:
    """What the experts of each token make of it, weighed and added up; and the shared expert, where there is one.

    Args:
        x: the tokens.
        p: the weights, as the module describes them.
        router: how to choose, by the tokens as they are.
        gating: what an expert does between its products; the shared expert, which sees them so too, does it too.
    """
    logits = matmul(x, p["router"], dtype=jnp.float32)[0]
    if "router_bias" in p:
        logits = logits + p["router_bias"].astype(jnp.float32)[None]
    routing, layout = choose(logits, router, p.get("choice_bias")), p.get("layout", NOWHERE)
    seen = project(x, p["narrow"], p.get("narrow_bias")) if "narrow" in p else x
    if layout.size(*layout.token_axes) > 1:
        y = _dispatch_on_mesh(seen, p, routing, router, gating, layout)
    else:
        y = _dispatch(seen, p, routing, logits.shape[1], router.on_input, gating).astype(x.dtype)
    y = project(y, p["widen"], p.get("widen_bias")) if "widen" in p else y
    return y + _shared(x, p, gating) if "shared" in p else y


def _shared(x: Float[Array, "T D"], p: Mapping[str, Any], gating: Gating) -> Float[Array, "T D"]:
    """The expert that every token has."""
    shared = p["shared"]
    inner = project_all(x, *((shared[name], shared.get(f"{name}_bias")) for name in ("gate", "up") if name in shared))
    y = project(gating(*inner), shared["down"], shared.get("down_bias"))
    return y if "shared_gate" not in p else jax.nn.sigmoid(project(x, p["shared_gate"])) * y


def _dispatch(
    x: Float[Array, "T D"],
    p: Mapping[str, Any],
    routing: Routing,
    E: int,
    on_input: bool,
    gating: Gating,
    *,
    some: bool = False,
) -> Float32[Array, "T D"]:
    """Every token through its experts: its k copies are sorted by expert, and what becomes of them is put back.

    `some`: experts from E on are not here, and add nothing.
    """
    T, k = routing.experts.shape
    chosen, weights = routing.experts.reshape(-1), routing.weights
    order = jnp.argsort(chosen, stable=True)
    here = (chosen[order] < E)[:, None]
    rows = jnp.where(here, x[order // k], 0) if some else x[order // k]
    if on_input:
        rows = rows * weights.reshape(-1, 1)[order].astype(x.dtype)
    sizes = jnp.bincount(chosen, length=E)
    y = _experts(rows, chosen[order], sizes, p, gating)
    y = jnp.where(here, y, 0) if some else y
    y = y[jnp.argsort(order)].reshape(T, k, -1).astype(jnp.float32)
    if not on_input:
        y = y * weights[:, :, None]
    total = y[:, 0]
    for i in range(1, k):  # in the order of the token's own ranking
        total = total + y[:, i]
    return total


_EXPERT_DIMS = {
    **dict.fromkeys(("gate", "up", "gate_up_bias"), "expert - tensor"),
    **dict.fromkeys(("down", "gate_up_pairs_bias"), "expert tensor -"),
    **dict.fromkeys(("gate_bias", "up_bias"), "expert tensor"),
    "gate_up": "expert - - tensor",
    "gate_up_pairs": "expert - tensor -",
    "down_bias": "expert -",
}
"""The mesh axes that the weights of experts are split over, as the rules of sharding have them."""


def _dispatch_on_mesh(
    x: Float[Array, "T D"], p: Mapping[str, Any], routing: Routing, router: Router, gating: Gating, layout: Layout
) -> Float[Array, "T D"]:
    """`_dispatch` where tokens, and perhaps experts and their width, are spread over devices."""
    assert layout.mesh is not None
    weights = {name: p[name] for name in _EXPERT_DIMS if name in p}
    E, F = p["down"].shape[:2] if isinstance(p["down"], jax.Array) else (jax.tree.leaves(p["down"])[0].shape[0], 0)
    experts, tensor = layout.size("expert"), layout.size("tensor")
    if E % experts:
        raise ConfigError(f"{E} experts do not divide over expert={experts}: choose a divisor of {E}")
    splits = tensor > 1 and F > 0 and F % tensor == 0

    def run(x: jax.Array, routing: Routing, p: Mapping[str, Any]) -> jax.Array:
        if experts > 1:
            gather = functools.partial(jax.lax.all_gather, axis_name="expert", axis=0, tiled=True)
            x, routing = jax.tree.map(gather, (x, routing))
            mine = routing.experts - jax.lax.axis_index("expert") * (E // experts)
            elsewhere = (mine < 0) | (mine >= E // experts)
            routing = routing._replace(experts=jnp.where(elsewhere, E // experts, mine))
        if splits and "down_bias" in p:  # which is added once
            p = {**p, "down_bias": jnp.where(jax.lax.axis_index("tensor") == 0, p["down_bias"], 0)}
        y = _dispatch(x, p, routing, E // experts, router.on_input, gating, some=experts > 1)
        y = jax.lax.psum(y, "tensor") if splits else y
        return jax.lax.psum_scatter(y, "expert", tiled=True) if experts > 1 else y

    def spec(name: str, weight: Any) -> Any:
        known = {"expert": "expert" if experts > 1 else None, "tensor": "tensor" if splits else None, "-": None}
        if isinstance(weight, jax.Array):
            return PartitionSpec(*(known[dim] for dim in _EXPERT_DIMS[name].split()))
        return jax.tree.map(lambda _: PartitionSpec(known["expert"]), weight)

    tokens = PartitionSpec(layout.token_axes)
    specs = {name: spec(name, weight) for name, weight in weights.items()}
    on_devices = jax.shard_map(
        run,
        mesh=current(layout.mesh),
        in_specs=(tokens, tokens, specs),
        out_specs=tokens,
        axis_names={axis for axis in layout.mesh.shape if axis != "pipeline"},
        check_vma=False,  # the loop over tiles starts with zeros, which vary over no axis
    )
    return on_devices(x, routing, weights).astype(x.dtype)


def _experts(
    rows: Float[Array, "M D"], experts: Int[Array, " M"], sizes: Int[Array, " E"], p: Mapping[str, Any], gating: Gating
) -> Float[Array, "M D"]:
    """Each row through one expert, the rows sorted by expert."""

    def products(x: jax.Array, *names: str) -> list[jax.Array]:
        ys = zip(names, grouped_matmul(x, sizes, *(p[name] for name in names)), strict=True)
        shaped = [(name, y.reshape(-1, *output_dims(p[name]))) for name, y in ys]
        return [y + p[f"{name}_bias"][experts] if f"{name}_bias" in p else y for name, y in shaped]

    if "gate_up" in p:
        [both] = products(rows, "gate_up")
        inner = [both[:, 0], both[:, 1]]
    elif "gate_up_pairs" in p:
        [both] = products(rows, "gate_up_pairs")
        inner = [both[..., 0], both[..., 1]]
    else:
        inner = products(rows, *(name for name in ("gate", "up") if name in p))
    return products(gating(*inner), "down")[0]
