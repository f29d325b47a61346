"""The feed-forward: gated (Shazeer, 2020), separate or fused in the checkpoint; or plain (Vaswani et al., 2017).

Dims: T packed tokens, D model width, F feed-forward width.
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from tenfold.nn.layers import activation, gated, project, project_all
from tenfold.nn.param import Param, param


def mlp_params(at: str, D: int, F: int, *, bias: bool = False, fused: bool = False) -> dict[str, Param]:
    """Declares gate, up and down of the layer whose checkpoint names start with `at`.

    `fused`: the checkpoint holds one `gate_up_proj` (Phi-3) with the gate's rows first.
    """
    hf = {name: f"{at}.gate_up_proj" if fused else f"{at}.{name}_proj" for name in ("gate", "up")}
    rows = {"gate": (0, F), "up": (F, 2 * F)} if fused else {"gate": None, "up": None}
    declared = {
        name: param((D, F), "embed mlp", f"{hf[name]}.weight", "F D -> D F", rows=rows[name], inputs="embed")
        for name in hf
    }
    declared["down"] = param((F, D), "mlp embed", f"{at}.down_proj.weight", "D F -> F D", inputs="mlp")
    if bias:
        for name in hf:
            declared[f"{name}_bias"] = param((F,), "mlp", f"{hf[name]}.bias", rows=rows[name], init="zeros")
        declared["down_bias"] = param((D,), "embed", f"{at}.down_proj.bias", init="zeros")
    return declared


def plain_mlp_params(up: str, down: str, D: int, F: int, *, bias: bool = True) -> dict[str, Param]:
    """Declares the two maps of a feed-forward without a gate; `up` and `down` are their names in the checkpoint."""
    declared = {
        "up": param((D, F), "embed mlp", f"{up}.weight", "F D -> D F", inputs="embed"),
        "down": param((F, D), "mlp embed", f"{down}.weight", "D F -> F D", inputs="mlp"),
    }
    if bias:
        declared["up_bias"] = param((F,), "mlp", f"{up}.bias", init="zeros")
        declared["down_bias"] = param((D,), "embed", f"{down}.bias", init="zeros")
    return declared


def gated_mlp(x: Float[Array, "T D"], p: Mapping[str, Any], act: str) -> Float[Array, "T D"]:
    """(act(x · gate) ⊙ (x · up)) · down, with biases where they are declared."""
    gate, up = project_all(x, (p["gate"], p.get("gate_bias")), (p["up"], p.get("up_bias")))
    return project(gated(act)(gate, up), p["down"], p.get("down_bias"))


def plain_mlp(x: Float[Array, "T D"], p: Mapping[str, Any], act: str) -> Float[Array, "T D"]:
    """act(x · up) · down, with biases where they are declared."""
    return project(activation(act)(project(x, p["up"], p.get("up_bias"))), p["down"], p.get("down_bias"))
