"""Which weights of a model are trained in 8-bit floats: those of the linear layers within its layers.

Embeddings and the head, norms, routers and other gates, and experts stay as they are, as is customary: see
TransformerEngine, torchao, and DeepSeek-V3 (2024), section 3.3.1.
"""

import math
from dataclasses import replace
from typing import Any

import jax

from tenfold.kernels.matmul import AdaptedWeight, Float8Weight
from tenfold.nn.lora import adaptable
from tenfold.nn.param import Param, Tree, is_param

MULTIPLE = 16  # of which matrix units take inputs and outputs


def in_float8(params: Tree, declared: Tree) -> Tree:
    """The model's weights with `Float8Weight`s among them: what its forward takes, unchanged.

    Args:
        params: weights, of which some may be adapted; then it is their base that is rounded.
        declared: their declaration.
    """

    def one(p: Param, weight: Any) -> Any:
        if not adaptable(p) or p.input_size % MULTIPLE or math.prod(p.output_dims) % MULTIPLE:
            return weight
        if isinstance(weight, AdaptedWeight):
            return replace(weight, base=Float8Weight(weight.base))
        return Float8Weight(weight)

    return params | {"layers": jax.tree.map(one, declared["layers"], params["layers"], is_leaf=is_param)}
