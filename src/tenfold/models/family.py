"""Finding the family of a checkpoint, and the family bound to its configuration."""

import difflib
import importlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tenfold.base.errors import UnsupportedModelError
from tenfold.kernels.attention import Attend
from tenfold.models import FAMILIES
from tenfold.nn import hf_config
from tenfold.nn.cache import CacheSpec
from tenfold.nn.hf_config import HFConfig
from tenfold.nn.param import Tree, is_param
from tenfold.nn.stack import stack_layers


@runtime_checkable
class FamilyConfig(Protocol):
    """What every family's config has: the vocabulary's size, the number of layers, and the longest context."""

    @property
    def V(self) -> int: ...
    @property
    def D(self) -> int: ...
    @property
    def L(self) -> int: ...
    @property
    def max_len(self) -> int: ...


@runtime_checkable
class Family(Protocol):
    """What a family's module defines.

    It may also define `skipped(c)`, see `Model.skipped`; and READS_PER_LAYER_CONFIG, if it honours that key.
    """

    @property
    def Config(self) -> Any: ...
    def kinds(self, c: Any) -> tuple[Hashable, ...]: ...
    def cache_specs(self, c: Any) -> tuple[CacheSpec | tuple[CacheSpec, ...], ...]: ...
    def params(self, c: Any) -> Tree: ...
    def forward(
        self, p: Tree, c: Any, tokens: jax.Array, positions: jax.Array, attend: Attend, caches: Any = None
    ) -> tuple[jax.Array, list[Any]]: ...
    def logits(self, p: Tree, c: Any, x: jax.Array) -> jax.Array: ...


@dataclass(frozen=True)
class Model:
    """A family together with the configuration of one checkpoint. Hashable; holds no weights."""

    architecture: str
    config: FamilyConfig

    @property
    def family(self) -> Family:
        return cast(Family, importlib.import_module(f"tenfold.models.{FAMILIES[self.architecture]}"))

    def params(self, *, stacked: bool = False) -> Tree:
        """The declaration of every weight; `stacked` for training, which scans over layers."""
        tree = self.family.params(self.config)
        return tree | {"layers": stack_layers(tree["layers"], self.kinds())} if stacked else tree

    def kinds(self) -> tuple[Hashable, ...]:
        """What tells the layers apart; of most families, the attention of each."""
        return self.family.kinds(self.config)

    def cache_specs(self) -> tuple[CacheSpec | tuple[CacheSpec, ...], ...]:
        """The cache of each layer, or its caches; () for one that has none, or reads another's."""
        return self.family.cache_specs(self.config)

    def skipped(self) -> tuple[str, ...]:
        """Shell patterns of tensors that checkpoints have and the model does not use, such as other towers'.

        A family with such defines `skipped(c)`.
        """
        skipped = getattr(self.family, "skipped", None)
        return skipped(self.config) if skipped else ()

    def forward(
        self,
        p: Tree,
        tokens: Int[Array, " T"],
        positions: Int[Array, " T"],
        attend: Attend,
        caches: Sequence[Any] | None = None,
    ) -> tuple[Float[Array, "T D"], list[Any]]:
        """Hidden states of packed tokens, after the last norm, and the updated caches."""
        return self.family.forward(p, self.config, tokens, positions, attend, caches)

    def logits(self, p: Tree, x: Float[Array, "S D"]) -> Float[Array, "S V"]:
        """Float32 logits of hidden states."""
        return self.family.logits(p, self.config, x)

    def activation_dtype(self, params: Tree) -> jnp.dtype:
        """What is computed in: the dtype of a weight that no product uses, so that nothing quantises it."""
        declared, treedef = jax.tree.flatten(self.params(), is_leaf=is_param)
        weights = treedef.flatten_up_to(params)
        return next(weight.dtype for p, weight in zip(declared, weights, strict=True) if not p.inputs)

    def with_max_len(self, max_len: int) -> "Model":
        """The same model for contexts of at most `max_len` tokens (longrope picks its factors by it)."""
        return replace(self, config=replace(cast(Any, self.config), max_len=max_len))


def resolve(hf: HFConfig) -> Model:
    """The model that a `config.json` describes.

    Raises:
        UnsupportedModelError: if no listed architecture is known (names the nearest one), or the config asks for what
            is not implemented.
        ConfigError: if a key is missing or unusable.
    """
    architectures = list(hf.get("architectures") or [])
    for architecture in architectures:
        if architecture in FAMILIES:
            module = cast(Family, importlib.import_module(f"tenfold.models.{FAMILIES[architecture]}"))
            hf_config.refuse_unknown_modes(hf, per_layer=getattr(module, "READS_PER_LAYER_CONFIG", False))
            return Model(architecture, module.Config.from_hf(hf))
    asked = ", ".join(architectures) or f"(none; model_type {hf.get('model_type')!r})"
    nearest = difflib.get_close_matches(asked, FAMILIES, n=1, cutoff=0.0)[0]
    raise UnsupportedModelError(
        f"config.json asks for the architecture {asked}, which Tenfold does not implement. "
        f"The nearest supported one is {nearest}; all: {', '.join(FAMILIES)}."
    )
