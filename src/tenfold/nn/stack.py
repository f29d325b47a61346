"""The same layers two ways: unrolled over separate arrays (serving), or scanned over stacked ones (training).

A scan compiles in the time of one layer, but reads each layer's weights through a copy; serving cannot pay for that.
Where layers differ (window, no rope, ...) the scan's body is one repetition of the shortest repeating pattern.

Training may put `PlacedLayers` in the place of the stacked ones, which say besides where activations lie, what of them
is kept for the gradient, and which share of the layers one stage of a pipeline has.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from tenfold.base.errors import ConfigError
from tenfold.kernels.flash_attention import KEPT
from tenfold.kernels.product import product_p
from tenfold.nn.param import Tree, is_param, stack
from tenfold.parallel.layout import NOWHERE, Layout

Block = Callable[[Any, Tree, Any, Any], tuple[Any, Any]]

Remat = Literal["none", "full", "dots", "offload"]
"""What the gradient finds of a layer's activations: all; none but what goes into the layer; the results of its products
with weights, and on a GPU of attention; or those of products, kept in the host's memory."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["received"],
    meta_fields=["layout", "remat", "unroll", "stage", "fp8"],
)
@dataclass(frozen=True, kw_only=True)
class Placement:
    """How training runs a model's layers.

    Attributes:
        layout: where activations lie.
        remat: what is kept of them for the gradient; the rest is computed again.
        unroll: compile each of the stacked layers by itself. A scan copies what goes in and out of a layer.
        stage: whether the layers are the share of one stage of a pipeline.
        received: what a stage's first layer is given: what the stage before passed on; None for the first stage.
        fp8: whether the products of their linear layers are made in 8-bit floats.
    """

    layout: Layout = NOWHERE
    remat: Remat = "none"
    unroll: bool = False
    stage: bool = False
    received: Any = None
    fp8: bool = False


PLAIN = Placement()


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers", "placement"], meta_fields=[])
@dataclass(frozen=True)
class PlacedLayers:
    """Stacked or separate layers, and how training runs them."""

    layers: Tree
    placement: Placement


def place_layers(params: Tree, placement: Placement) -> Tree:
    """A model's weights, with its layers to be run so."""
    return params | {"layers": PlacedLayers(params["layers"], placement)}


def period(kinds: Sequence[Hashable]) -> int:
    """The length of the shortest pattern that the kinds repeat; a last repetition may be cut short."""
    return next(n for n in range(1, len(kinds) + 1) if all(k == kinds[i % n] for i, k in enumerate(kinds)))


def pattern(kinds: Sequence[Hashable]) -> tuple[int, int]:
    """How many layers come first that are unlike the others, and the period of those: what compiles fewest layers."""
    return min(((h, period(kinds[h:])) for h in range(len(kinds))), key=lambda found: (sum(found), found[0]))


def stack_layers(layers: Sequence[Tree], kinds: Sequence[Hashable]) -> Tree:
    """Turns per-layer `Param` trees into {"head", "scan", "tail"}: one stacked tree per place in the pattern, and the
    layers before and after its repetitions.

    Layers of one kind may differ in their weights: such as dense ones and mixtures of experts.
    """
    head, n = pattern([(kind, _weights(layer)) for kind, layer in zip(kinds, layers, strict=True)])
    end = head + (len(layers) - head) // n * n

    def place(i: int) -> Tree:
        return jax.tree.map(lambda *ps: stack(ps), *layers[head + i : end : n], is_leaf=is_param)

    return {"head": list(layers[:head]), "scan": [place(i) for i in range(n)], "tail": list(layers[end:])}


def stack_weights(weights: Sequence[Tree], layers: Sequence[Tree], kinds: Sequence[Hashable]) -> Tree:
    """The weights of separate layers in the tree that `stack_layers` declares; quantised ones, too, if they are alike.

    Args:
        weights: of each layer.
        layers: their declarations.
        kinds: as for `stack_layers`.
    """
    head, n = pattern([(kind, _weights(layer)) for kind, layer in zip(kinds, layers, strict=True)])
    end = head + (len(layers) - head) // n * n

    def place(i: int) -> Tree:
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *weights[head + i : end : n])

    return {"head": list(weights[:head]), "scan": [place(i) for i in range(n)], "tail": list(weights[end:])}


def _weights(layer: Tree) -> Hashable:
    """What layers must share to be stacked."""
    params, structure = jax.tree.flatten(layer, is_leaf=is_param)
    return structure, tuple((p.shape, p.axes, p.init, p.scale) for p in params)


def run_layers(
    block: Block,
    layers: Tree,
    kinds: Sequence[Hashable],
    x: Any,
    caches: Sequence[Any] | None = None,
    *,
    sources: Sequence[int | None] | None = None,
) -> tuple[Any, list[Any]]:
    """Runs `block(x, params, kind, cache) -> (x, cache)` over every layer.

    Args:
        block: one layer.
        layers: a list of per-layer trees, what `stack_layers` declares, or either of them placed.
        kinds: what tells the layers apart, one per layer; static.
        x: the activations that the layers pass on.
        caches: one per layer, or None without a cache. Stacked layers take none.
        sources: for each layer the earlier one whose cache it reads in place of its own, or None. It gets what that
            layer's block returned. The kinds must tell layers with a source from those without.

    Returns:
        The last activations, and the updated caches (Nones without; those of layers with a source as they were). Of
        one stage of a pipeline, what it passes on to the next stands in place of the caches.
    """
    sources = [None] * len(kinds) if sources is None else sources
    if isinstance(layers, PlacedLayers):
        return _run_placed(block, layers, kinds, x, sources)
    if isinstance(layers, dict):
        if caches is not None:
            raise ValueError("stacked layers hold no cache: serve with unstacked ones")
        return _scan_layers(block, layers, kinds, x, sources, unroll=False), [None] * len(kinds)
    traced = jax.jit(block, static_argnums=2)  # once for all layers of a kind; XLA inlines it again
    updated: list[Any] = []
    for i, params in enumerate(layers):
        source = sources[i]
        given = updated[source] if source is not None else None if caches is None else caches[i]
        x, cache = traced(x, params, kinds[i], given)
        updated.append(cache)
    if caches is None:
        return x, [None] * len(kinds)
    return x, [updated[i] if source is None else caches[i] for i, source in enumerate(sources)]


def _scan_layers(
    block: Block, layers: Tree, kinds: Sequence[Hashable], x: Any, sources: Sequence[int | None], *, unroll: bool
) -> Any:
    head, n = len(layers["head"]), len(layers["scan"])
    repeats = (len(kinds) - head) // n
    if repeats > 1 and any(source is not None for source in sources[head:]):  # each has a source of its own
        rest = [jax.tree.map(lambda w, r=r: w[r], layers["scan"][i]) for r in range(repeats) for i in range(n)]
        return run_layers(block, [*layers["head"], *rest, *layers["tail"]], kinds, x, sources=sources)[0]

    def run(i: int, x: Any, params: Tree, updated: dict[int, Any]) -> Any:
        source = sources[i]
        x, updated[i] = block(x, params, kinds[i], None if source is None else updated[source])
        return x

    first: dict[int, Any] = {}
    for i, params in enumerate(layers["head"]):
        x = run(i, x, params, first)

    def body(x: Any, params: list[Tree]) -> tuple[Any, None]:
        updated = dict(first)
        for i in range(n):
            x = run(head + i, x, params[i], updated)
        return x, None

    x, _ = jax.lax.scan(body, x, layers["scan"], unroll=unroll)
    for i, params in enumerate(layers["tail"]):
        x = run(head + i, x, params, first)
    return x


# --- training -------------------------------------------------------------------------------------------------------


def _run_placed(
    block: Block, placed: PlacedLayers, kinds: Sequence[Hashable], x: Any, sources: Sequence[int | None]
) -> tuple[Any, list[Any]]:
    layers, placement = placed.layers, placed.placement

    def run(x: Any, params: Tree, kind: Any, cache: Any) -> tuple[Any, Any]:
        return block(_constrain(placement.layout, x), params | {"layout": placement.layout}, kind, cache)

    kept, x = _remat(run, placement.remat), _constrain(placement.layout, x)
    if not placement.stage:
        if isinstance(layers, dict):
            x, caches = _scan_layers(kept, layers, kinds, x, sources, unroll=placement.unroll), [None] * len(kinds)
        else:
            x, caches = run_layers(kept, layers, kinds, x, sources=sources)
        return _constrain(placement.layout, x), caches
    _check_stage(layers, x, sources)
    received = x if placement.received is None else placement.received
    x = _constrain(placement.layout, _scan_layers(kept, layers, kinds, received, sources, unroll=placement.unroll))
    return x, [x]


def _constrain(layout: Layout, x: Any) -> Any:
    """Tokens [T, D] where the layout has them: left alone, the compiler may spread D like the weights are."""
    return jax.tree.map(lambda a: layout.constrain(a, layout.token_axes, None) if a.ndim == 2 else a, x)


def _remat(block: Block, remat: Remat) -> Block:
    if remat == "none":
        return block
    policies = jax.checkpoint_policies
    policy = {
        "full": policies.nothing_saveable,
        "dots": policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(KEPT)
        ),
        "offload": policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    }[remat]

    def of_products(primitive: Any, *arrays: Any, **params: Any) -> Any:
        if primitive is product_p:  # which to the policies of JAX is no product
            primitive, params = jax.lax.dot_general_p, {"dimension_numbers": (((1,), (0,)), ((), ()))}
        return policy(primitive, *arrays, **params)

    return jax.checkpoint(block, policy=of_products, static_argnums=2)


def _check_stage(layers: Tree, x: Any, sources: Sequence[int | None]) -> None:
    if not isinstance(layers, dict) or layers["head"] or layers["tail"]:
        raise ConfigError("a pipeline needs stacked layers of one repeating pattern, which these are not")
    if not isinstance(x, jax.Array) or any(source is not None for source in sources):
        raise ConfigError("a pipeline cannot run layers that read what others than the one before them left")
