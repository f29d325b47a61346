"""Mixtures of experts against a loop over tokens in numpy: choosing, computing, and every form of checkpoint."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.base.errors import CheckpointError
from tenfold.kernels.matmul import QuantizedWeight
from tenfold.nn import checkpoint, moe
from tenfold.nn import param as params
from tenfold.nn.mlp import mlp_params
from tenfold.nn.moe import Router, choose
from tenfold.nn.packing import pack
from tenfold.nn.param import Param, Tree, leaves, param
from tenfold.nn.quantization import SCHEMES, nbytes, quantize_param
from tenfold.nn.stack import stack_layers
from tests.nn.quantized_files import CASES, MODULE, declare, load, numbers, write

D, F, E, T = 8, 6, 5, 13
SIGMOID = Router(top_k=2, score="sigmoid")


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def choose_one(logits: np.ndarray, router: Router, bias: np.ndarray) -> dict[int, float]:
    """The weights of one token's experts."""
    scores = {"softmax": softmax, "sigmoid": sigmoid, "sqrt_softplus": lambda x: np.sqrt(np.log1p(np.exp(x)))}
    score = scores[router.score](logits.astype(np.float64))
    ranked = score + bias
    groups = np.arange(len(logits)).reshape(router.groups, -1)
    best = 1 if router.group_score == "max" else 2
    order = sorted(range(router.groups), key=lambda g: -np.sort(ranked[groups[g]])[-best:].sum())
    allowed = [e for g in order[: router.top_groups] for e in groups[g]]
    chosen = sorted(allowed, key=lambda e: -ranked[e])[: router.top_k]
    total = score[chosen].sum() if router.renormalize else 1
    return {e: score[e] / total * router.scale for e in chosen}


ROUTERS = st.builds(
    Router,
    top_k=st.integers(1, 3),
    score=st.sampled_from(["softmax", "sigmoid", "sqrt_softplus"]),
    renormalize=st.booleans(),
    scale=st.sampled_from([1.0, 2.5]),
    groups=st.sampled_from([1, 4]),
    top_groups=st.integers(2, 3),
    group_score=st.sampled_from(["max", "top2"]),
)


@settings(max_examples=40)
@given(router=ROUTERS, biased=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_experts_are_chosen_and_weighed(router: Router, biased: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, bias = rng.standard_normal((4, 12)).astype("f4") * 2, rng.standard_normal(12).astype("f4") * biased
    found = choose(jnp.asarray(logits), router, jnp.asarray(bias) if biased else None)
    for token in range(4):
        expected = choose_one(logits[token], router, bias)
        weights = dict(zip(np.asarray(found.experts[token]).tolist(), np.asarray(found.weights[token]), strict=True))
        assert weights.keys() == expected.keys()
        np.testing.assert_allclose([weights[e] for e in expected], list(expected.values()), rtol=1e-5)


def test_a_softmax_that_is_renormalised_is_one_over_the_chosen() -> None:
    logits = jnp.asarray([[1.0, 3.0, 2.0, -1.0]])
    found = choose(logits, Router(top_k=2))
    np.testing.assert_allclose(found.weights[0], softmax(np.array([3.0, 2.0])), rtol=1e-6)
    assert found.experts.tolist() == [[1, 2]]


def test_a_sigmoid_that_is_saturated_still_ranks() -> None:
    assert choose(jnp.asarray([[40.0, 60.0, 50.0]]), Router(top_k=1, score="sigmoid")).experts.tolist() == [[1]]


# --- computing ------------------------------------------------------------------------------------------------------

SHARED = {"shared": mlp_params("m.shared", D, F), "shared_gate": moe.shared_gate_param("m.shared_gate", D)}
SEPARATE = moe.expert_params("m.experts", D, F, E, names=("w1", "w3", "w2"))
FORMS: dict[str, tuple[Tree, Router]] = {
    "separate": ({**moe.router_params("m.gate", D, E), **SEPARATE}, Router(top_k=2)),
    "biased": ({**moe.router_params("m.gate", D, E, choice_bias="m.bias"), **SEPARATE}, SIGMOID),
    "shared": ({**moe.router_params("m.gate", D, E), **SEPARATE, **SHARED}, Router(top_k=3, renormalize=False)),
    "halves": (
        {**moe.router_params("m.gate", D, E), **moe.fused_expert_params("m.experts", D, F, E)},
        Router(top_k=1, score="sigmoid", renormalize=False, on_input=True),
    ),
    "pairs": (
        {
            **moe.router_params("m.gate", D, E, bias=True),
            **moe.fused_expert_params("m.experts", D, F, E, interleaved=True, bias=True),
        },
        Router(top_k=2),
    ),
}


def draw(tree: Tree, seed: int = 0) -> Tree:
    rng = np.random.default_rng(seed)
    return params.map_params(lambda p: jnp.asarray(rng.standard_normal(p.shape, dtype=np.float32) / 2), tree)


def gating(gate: Any, up: Any) -> Any:
    return gate * (up + 1)  # what numpy and jax spell alike


def expected(x: np.ndarray, p: dict[str, Any], router: Router) -> np.ndarray:
    """Token by token, expert by expert."""
    p = jax.tree.map(lambda array: np.asarray(array, np.float64), p)
    zero = np.zeros(())
    out = np.zeros(x.shape)
    for t, token in enumerate(x.astype(np.float64)):
        logits = token @ p["router"] + p.get("router_bias", zero)
        for e, weight in choose_one(logits, router, p.get("choice_bias", np.zeros(E))).items():
            seen = token * weight if router.on_input else token
            if "gate" in p:
                gate, up = seen @ p["gate"][e], seen @ p["up"][e]
            elif "gate_up" in p:
                gate, up = np.einsum("d,dgf->gf", seen, p["gate_up"][e])
            else:
                gate, up = (np.einsum("d,dfg->fg", seen, p["gate_up_pairs"][e]) + p["gate_up_pairs_bias"][e]).T
            y = gating(gate, up) @ p["down"][e] + (p["down_bias"][e] if "down_bias" in p else zero)
            out[t] += y if router.on_input else weight * y
        if "shared" in p:
            y = gating(token @ p["shared"]["gate"], token @ p["shared"]["up"]) @ p["shared"]["down"]
            out[t] += sigmoid(token @ p["shared_gate"]) * y
    return out


run = jax.jit(moe.mixture, static_argnums=(2, 3))


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((T, D), dtype=np.float32)


@pytest.mark.parametrize("form", FORMS)
def test_a_mixture_is_a_loop_over_tokens(form: str, x: np.ndarray) -> None:
    tree, router = FORMS[form]
    p = draw(tree)
    np.testing.assert_allclose(run(x, p, router, gating), expected(x, p, router), atol=2e-5)


@pytest.mark.parametrize("form", ["separate", "pairs"])
def test_a_token_does_not_depend_on_others(form: str, x: np.ndarray) -> None:
    tree, router = FORMS[form]
    p = draw(tree)
    whole = run(x, p, router, gating)
    order = np.random.default_rng(6).permutation(T)
    np.testing.assert_array_equal(run(x[order], p, router, gating), whole[order])
    np.testing.assert_array_equal(run(np.repeat(x[3:4], T, axis=0), p, router, gating)[7], whole[3])


def test_gradients_reach_the_router_and_the_experts_that_were_chosen(x: np.ndarray) -> None:
    tree, router = FORMS["separate"]
    p = draw(tree)
    grads = jax.jit(jax.grad(lambda p: jnp.square(moe.mixture(jnp.asarray(x[:1]), p, router, gating)).sum()))(p)
    chosen = sorted(choose_one(x[0] @ np.asarray(p["router"]), router, np.zeros(E)))
    assert np.flatnonzero(np.asarray(grads["down"]).any((1, 2))).tolist() == chosen
    assert np.asarray(grads["router"]).any()


# --- checkpoints ----------------------------------------------------------------------------------------------------


def export(path: Path, tree: Tree, p: Tree) -> None:
    checkpoint.export(path, tree, p, config={"architectures": ["Some"]}, dtype=jnp.float32)


@pytest.mark.parametrize("form", FORMS)
def test_experts_come_back_from_a_checkpoint(form: str, tmp_path: Path) -> None:
    tree = FORMS[form][0]
    p = draw(tree)
    export(tmp_path, tree, p)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load(tmp_path, tree, "float32"), p)


def test_layers_and_experts_are_stacked_alike(tmp_path: Path) -> None:
    layers = [moe.expert_params(f"layers.{i}", D, F, E) for i in range(3)]
    stacked = stack_layers(layers, "aaa")
    p = draw(layers)
    export(tmp_path / "plain", layers, p)
    loaded = checkpoint.load(tmp_path / "plain", stacked, "float32")
    assert loaded["scan"][0]["down"].shape == (3, E, F, D)
    jax.tree.map(lambda whole, *each: np.testing.assert_array_equal(whole, each), loaded["scan"][0], *p)
    export(tmp_path / "stacked", stacked, loaded)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load(tmp_path / "stacked", layers, "float32"), p)
    key = jax.random.key(1)
    started, apart = (params.initialize(tree, key, "float32") for tree in (stacked, layers))
    jax.tree.map(lambda whole, *each: np.testing.assert_array_equal(whole, each), started["scan"][0], *apart)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_experts_are_rounded_one_by_one_and_the_router_is_not(scheme: str, tmp_path: Path, x: np.ndarray) -> None:
    tree, router = FORMS["shared"]
    p = draw(tree)
    declared, treedef = jax.tree.flatten(tree, is_leaf=params.is_param)
    rounded = [quantize_param(d, w, SCHEMES[scheme]) for d, w in zip(declared, treedef.flatten_up_to(p), strict=True)]
    assert nbytes(tree, "float32", SCHEMES[scheme]) == sum(w.nbytes for w in jax.tree.leaves(rounded))
    few = treedef.unflatten(rounded)
    assert few["gate"].codes.shape == (E, D if scheme == "int8" else D // 2, F)
    assert isinstance(few["router"], jax.Array)
    np.testing.assert_allclose(run(x, few, router, gating), expected(x, plain(few, tree), router), atol=2e-5)
    export(tmp_path, tree, few)
    again = checkpoint.load(tmp_path, tree, "float32")
    jax.tree.map(np.testing.assert_array_equal, again, few)
    form = checkpoint.read_quantization(tmp_path)
    assert nbytes(tree, "float32", form) == sum(w.nbytes for w in jax.tree.leaves(again))


def plain(p: Tree, tree: Tree) -> Tree:
    """Quantised weights as arrays."""

    def number(declared: Param, w: Any) -> jax.Array:
        return w.dequantize(jnp.float32).reshape(declared.shape) if isinstance(w, QuantizedWeight) else w

    declared, treedef = jax.tree.flatten(tree, is_leaf=params.is_param)
    return treedef.unflatten([number(d, w) for d, w in zip(declared, treedef.flatten_up_to(p), strict=True)])


@pytest.mark.parametrize("form", CASES)
def test_experts_in_any_format_are_read_as_a_weight_alone_is(form: str, tmp_path: Path) -> None:
    tensors, config = CASES[form]
    doubled = {
        name: array * 2 if "scale" in name and array.dtype.kind == "f" else array for name, array in tensors.items()
    }
    alone = [load(tmp_path / str(e), each, config, declare(16, 32))["up"] for e, each in enumerate((tensors, doubled))]
    names = [f"m.{e}.up_proj" for e in range(2)]
    renamed = {
        name.replace(MODULE, to): array
        for to, each in zip(names, (tensors, doubled), strict=True)
        for name, array in each.items()
    }
    experts = [param((32, 16), "embed mlp", f"{name}.weight", "F D -> D F", inputs="embed") for name in names]
    tree = {"up": params.stack(experts, "experts")}
    both = load(tmp_path / "both", renamed, config, tree)["up"]
    floats = form.startswith("fp8")  # which weights that are alone become numbers of
    assert isinstance(both, QuantizedWeight if floats else type(alone[0]))
    for e in range(2):
        one = jax.tree.map(lambda array, e=e: array[e], both)
        np.testing.assert_array_equal(numbers(one), numbers(alone[e]))
        if not floats:
            jax.tree.map(np.testing.assert_array_equal, one, alone[e])
    layers = load(tmp_path / "layers", renamed, config, params.map_params(lambda p: params.stack([p]), tree))["up"]
    for e in range(2):
        np.testing.assert_allclose(layers[0, e].T, numbers(alone[e]), rtol=1e-6)


def test_experts_in_eight_bit_floats_stay_so(tmp_path: Path, x: np.ndarray) -> None:
    """As DeepSeek has them, a scale for each block; all other weights become numbers."""
    tree, router = FORMS["shared"]
    rng, tensors = np.random.default_rng(3), {}
    for _, p in leaves(tree):
        for source in p.sources:
            N, d = p.checkpoint_shape(source)
            values = rng.standard_normal((N, d), dtype=np.float32)
            if "experts" not in source.name and "shared." not in source.name:
                tensors[source.name] = values
                continue
            tensors[source.name] = (values * 50).astype(ml_dtypes.float8_e4m3fn)
            scales = rng.uniform(0.005, 0.01, (-(-N // 4), d // 2)).astype(np.float32)
            tensors[source.name.replace("weight", "weight_scale_inv")] = scales
    config = {"quant_method": "fp8", "weight_block_size": [4, 2], "activation_scheme": "dynamic"}
    p = load(tmp_path, tensors, config | {"modules_to_not_convert": ["gate", "shared_gate"]}, tree)
    assert (p["down"].codes.dtype, p["down"].floats, p["down"].codes.shape) == (jnp.uint8, True, (E, F, D))
    assert isinstance(p["shared"]["down"], jax.Array)
    form = checkpoint.read_quantization(tmp_path)
    assert nbytes(tree, "float32", form) == sum(w.nbytes for w in jax.tree.leaves(p))
    np.testing.assert_allclose(run(x, p, router, gating), expected(x, plain(p, tree), router), rtol=2e-5, atol=2e-5)
    scale = np.repeat(np.repeat(tensors["m.experts.4.w2.weight_scale_inv"], 4, 0)[:D], 2, 1)
    down = tensors["m.experts.4.w2.weight"].astype(np.float32) * scale
    np.testing.assert_array_equal(p["down"].dequantize(jnp.float32)[4].T, down)
    assert isinstance(pack(tree["down"], p["down"]), QuantizedWeight)
    with pytest.raises(CheckpointError, match="floats of 8 bits cannot be written"):
        export(tmp_path, tree, p)


def test_experts_of_gpt_oss_are_read_from_four_bits(tmp_path: Path) -> None:
    """What two blocks of 32 inputs say, by the table of the MX specification."""
    rng, width, experts = np.random.default_rng(7), 64, 3
    tree = moe.fused_expert_params("m.experts", width, 32, experts, interleaved=True)
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    tensors: dict[str, np.ndarray] = {}
    wanted: dict[str, np.ndarray] = {}
    for name, outputs, inputs in (("gate_up", 64, width), ("down", width, 32)):
        blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), dtype=np.uint8)
        scales = rng.integers(120, 130, (experts, outputs, inputs // 32), dtype=np.uint8)
        tensors[f"m.experts.{name}_proj_blocks"], tensors[f"m.experts.{name}_proj_scales"] = blocks, scales
        codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(experts, outputs, inputs)
        values = table[codes] * np.exp2(np.repeat(scales, 32, axis=-1).astype(np.float32) - 127)
        wanted[name] = values.swapaxes(1, 2)
    write(tmp_path, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["m.router"]})
    loaded = checkpoint.load(tmp_path, tree, "float32")
    assert isinstance(loaded["gate_up_pairs"], QuantizedWeight)
    for name, p in (("gate_up_pairs", wanted["gate_up"]), ("down", wanted["down"])):
        np.testing.assert_array_equal(loaded[name].dequantize(jnp.float32), p)
    stacked = checkpoint.load(tmp_path, params.map_params(lambda p: params.stack([p]), tree), "float32")
    np.testing.assert_array_equal(stacked["gate_up_pairs"][0].reshape(experts, width, -1), wanted["gate_up"])
    form = checkpoint.read_quantization(tmp_path)
    assert nbytes(tree, "float32", form) == sum(w.nbytes for w in jax.tree.leaves(loaded))
