"""Frequencies against the papers' formulas in float64, and against values computed by transformers 5.23."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold.base.errors import ConfigError, UnsupportedModelError
from tenfold.nn import rope
from tenfold.nn.layers import rotate
from tenfold.nn.rope import Rope

RTOL = 3e-6  # float32 powers

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.02, 1.05, 1.1, 1.3, 1.7, 2.0, 2.5],
    "long_factor": [1.0, 1.2, 1.8, 3.0, 6.0, 12.0, 20.0, 40.0],
    "original_max_position_embeddings": 1024,
}
PARTIAL_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [1.0, 4.0, 9.0, 16.0],
    "factor": 6.0,
    "original_max_position_embeddings": 1024,
}

# ROPE_INIT_FUNCTIONS of transformers 5.23: parameters, max_position_embeddings, longest context used, frequencies and
# attention factor, for heads of 16 dims.
GOLDEN = {
    "linear": (
        LINEAR,
        4096,
        4096,
        [0.25, 0.079056941, 0.025, 0.0079056947, 0.0024999999, 0.00079056947, 0.00025000001, 7.9056947e-05],
        1.0,
    ),
    "linear, partial": (
        {**LINEAR, "factor": 2.5, "partial_rotary_factor": 0.75},
        4096,
        4096,
        [0.40000001, 0.086177379, 0.018566353, 0.0039999997, 0.00086177373, 0.00018566358],
        1.0,
    ),
    "llama3": (
        LLAMA3,
        8192,
        8192,
        [1.0, 0.19392276, 0.037606031, 0.0013125695, 0.00017677668, 3.4281024e-05, 6.6478697e-06, 1.2891732e-06],
        1.0,
    ),
    "yarn": (
        YARN,
        4096,
        4096,
        [1.0, 0.31622776, 0.081250004, 0.019764237, 0.004375, 0.00079056947, 0.00025000001, 7.9056947e-05],
        1.138629436111989,
    ),
    "yarn, not truncated": (
        {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        131072,
        131072,
        [1.0, 0.225418, 0.050813273, 0.0067949593, 0.00045648392, 1.8188337e-05, 4.0999785e-06, 9.2420896e-07],
        1.3465735902799727,
    ),
    "yarn, partial, with mscale": (
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.5,
            "beta_fast": 16,
            "beta_slow": 2,
            "original_max_position_embeddings": 2048,
            "partial_rotary_factor": 0.5,
        },
        81920,
        81920,
        [1.0, 0.1, 0.0051249997, 2.4999999e-05],
        1.064468903941252,
    ),
    "yarn, given factor": (
        {**YARN, "rope_theta": 1000000.0, "factor": 8.0, "attention_factor": 1.25}
        | {"original_max_position_embeddings": 512},
        4096,
        4096,
        [1.0, 0.12596145, 0.013176158, 0.00070292666, 0.00012500001, 2.2228493e-05, 3.9528468e-06, 7.0292668e-07],
        1.25,
    ),
    "longrope, short": (
        LONGROPE,
        16384,
        1024,
        [1.0, 0.31002721, 0.095238097, 0.02874798, 0.0076923077, 0.0018601633, 0.00050000002, 0.00012649111],
        1.1832159566199232,
    ),
    "longrope, long": (
        LONGROPE,
        16384,
        1025,
        [1.0, 0.26352313, 0.055555556, 0.010540925, 0.0016666667, 0.00026352316, 4.9999999e-05, 7.9056945e-06],
        1.1832159566199232,
    ),
    "longrope, partial": (
        PARTIAL_LONGROPE,
        16384,
        16384,
        [1.0, 0.025, 0.0011111111, 6.2500003e-05],
        1.1218271926068273,
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_frequencies_are_those_of_transformers(case: str) -> None:
    parameters, max_len, used_len, frequencies, attention_factor = GOLDEN[case]
    read = rope.read(parameters, head_dim=16, max_len=max_len)
    np.testing.assert_allclose(rope.inverse_frequencies(read, used_len), frequencies, rtol=RTOL)
    assert read.attention_factor == pytest.approx(attention_factor, rel=1e-12)


def frequencies(theta: float, dims: int) -> np.ndarray:
    """theta_i = base^(-2i/d), RoFormer eq. 15."""
    return np.array([theta ** (-2 * i / dims) for i in range(dims // 2)], np.float64)


THETAS = st.floats(1e3, 1e6)
DIMS = st.integers(2, 64).map(lambda half: 2 * half)


@given(theta=THETAS, dims=DIMS)
def test_default_follows_roformer(theta: float, dims: int) -> None:
    read = rope.read({"rope_theta": theta}, head_dim=dims, max_len=2048)
    np.testing.assert_allclose(rope.inverse_frequencies(read, 2048), frequencies(theta, dims), rtol=1e-5)
    assert read.attention_factor == 1


@given(theta=THETAS, dims=DIMS, factor=st.floats(1, 64), low=st.floats(0.5, 2), more=st.floats(0.5, 8))
def test_llama3_scales_by_wavelength(theta: float, dims: int, factor: float, low: float, more: float) -> None:
    high, original = low + more, 8192
    read = rope.read(
        {**LLAMA3, "rope_theta": theta, "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
        | {"original_max_position_embeddings": original},
        head_dim=dims,
        max_len=131072,
    )

    def scaled(f: float) -> float:  # the three cases of the Llama 3.1 release
        wavelength = 2 * math.pi / f
        if wavelength < original / high:
            return f
        if wavelength > original / low:
            return f / factor
        smooth = (original / wavelength - low) / (high - low)
        return (1 - smooth) * f / factor + smooth * f

    expected = [scaled(f) for f in frequencies(theta, dims)]
    np.testing.assert_allclose(rope.inverse_frequencies(read, 131072), expected, rtol=1e-4)


@given(theta=THETAS, dims=DIMS, factor=st.floats(1.5, 64), original=st.sampled_from([512, 4096, 32768]))
def test_yarn_interpolates_by_rotations(theta: float, dims: int, factor: float, original: int) -> None:
    parameters = {**YARN, "rope_theta": theta, "factor": factor, "original_max_position_embeddings": original}
    read = rope.read({**parameters, "truncate": False}, head_dim=dims, max_len=original * 64)

    def pair(rotations: float) -> float:  # YaRN section 3.2, solved for the pair that turns so often in the context
        return dims / 2 * math.log(original / (2 * math.pi * rotations), theta)

    first, last = max(pair(32), 0), min(pair(1), dims - 1)
    kept = [1 - min(max((i - first) / ((last - first) or 0.001), 0), 1) for i in range(dims // 2)]
    f = frequencies(theta, dims)
    expected = [f[i] / factor * (1 - kept[i]) + f[i] * kept[i] for i in range(dims // 2)]
    np.testing.assert_allclose(rope.inverse_frequencies(read, original), expected, rtol=1e-4)
    assert read.attention_factor == pytest.approx(0.1 * math.log(factor) + 1)


@given(theta=THETAS, factors=st.lists(st.floats(1, 60), min_size=8, max_size=8), used_len=st.integers(1, 4096))
def test_longrope_divides_by_its_factors(theta: float, factors: list[float], used_len: int) -> None:
    parameters = {**LONGROPE, "rope_theta": theta, "long_factor": factors}
    read = rope.read(parameters, head_dim=16, max_len=8192)
    divisors = factors if used_len > 1024 else LONGROPE["short_factor"]
    np.testing.assert_allclose(
        rope.inverse_frequencies(read, used_len), frequencies(theta, 16) / np.asarray(divisors), rtol=1e-5
    )
    assert read.attention_factor == pytest.approx(math.sqrt(1 + math.log(8) / math.log(1024)))


def test_rotation_depends_on_distance_alone_and_leaves_the_rest() -> None:
    read = rope.read({**YARN, "partial_rotary_factor": 0.5}, head_dim=8, max_len=4096)
    q, k = (np.random.default_rng(i).normal(size=(1, 1, 8)).astype(np.float32) for i in range(2))

    def score(at_q: int, at_k: int) -> float:
        turned = [
            np.asarray(rotate(jnp.asarray(x), *rope.cos_sin(read, jnp.asarray([at]), 4096)))
            for x, at in ((q, at_q), (k, at_k))
        ]
        np.testing.assert_array_equal(turned[0][..., 4:], q[..., 4:])
        return float((turned[0][..., :4] * turned[1][..., :4]).sum())

    assert score(7, 3) == pytest.approx(score(1007, 1003), rel=1e-4)
    scale = read.attention_factor**2  # on queries and keys, so squared in the score
    assert score(5, 5) == pytest.approx(scale * float((q[..., :4] * k[..., :4]).sum()), rel=1e-5)


@pytest.mark.usefixtures("optimised")
def test_layers_share_cosines_on_a_cpu() -> None:
    def forward(positions: jax.Array, x: jax.Array, weights: list[jax.Array]) -> jax.Array:
        found = rope.cos_sin(Rope(dims=16), positions, 64)
        for w in weights:
            x = rotate((x @ w).reshape(len(x), 4, 16), *found).reshape(x.shape)
        return x

    shapes = jnp.zeros(8, jnp.int32), jnp.zeros((8, 64)), [jnp.zeros((64, 64))] * 3
    program = jax.jit(forward).lower(*shapes).compile().as_text()
    assert program is not None and program.count(" cosine(") == 1


def test_interleaved_pairs_turn_as_halves_do() -> None:
    cos_sin = rope.cos_sin(Rope(dims=8), jnp.arange(5), 64)
    x = np.random.default_rng(0).normal(size=(5, 2, 10)).astype(np.float32)
    order = [0, 4, 1, 5, 2, 6, 3, 7, 8, 9]  # where neighbours come from
    neighbours = np.asarray(rotate(jnp.asarray(x[..., order]), *cos_sin, interleaved=True))
    np.testing.assert_array_equal(neighbours, np.asarray(rotate(jnp.asarray(x), *cos_sin))[..., order])


@given(share=st.floats(0, 1), heads=st.integers(1, 40), factor=st.sampled_from([None, 2.0]))
def test_proportional_turns_the_first_pairs_alone(share: float, heads: int, factor: float | None) -> None:
    parameters = {"rope_type": "proportional", "rope_theta": 500.0, "partial_rotary_factor": share, "factor": factor}
    read = rope.read(parameters, head_dim=2 * heads, max_len=64)
    turning = int((share or 1) * 2 * heads // 2)
    expected = np.where(np.arange(heads) < turning, frequencies(500.0, 2 * heads) / (factor or 1), 0)
    np.testing.assert_allclose(rope.inverse_frequencies(read, 64), expected, rtol=RTOL)


def test_old_names_of_a_rule_are_read() -> None:
    old = {"type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    assert rope.read(old, head_dim=16, max_len=64) == rope.read(LINEAR, head_dim=16, max_len=64)
    assert rope.read({**LONGROPE, "rope_type": "su"}, head_dim=16, max_len=64).kind == "longrope"


def test_ropes_are_hashable_and_compare() -> None:
    assert hash(rope.read(LONGROPE, head_dim=16, max_len=64)) == hash(rope.read(LONGROPE, head_dim=16, max_len=64))
    assert Rope(dims=8) != Rope(dims=10)


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"rope_type": "dynamic", "rope_theta": 1e4}, UnsupportedModelError, "'dynamic' is not implemented; known"),
        ({"rope_type": "linear", "rope_theta": 1e4}, ConfigError, "needs the key 'factor'"),
        ({**LINEAR, "factor": None}, ConfigError, "wrong type"),
        ({"rope_theta": "high"}, ConfigError, "wrong type"),
        ({**LONGROPE, "short_factor": [1.0]}, ConfigError, "8 short and long factors.* has 1 and 8"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.32}, ConfigError, "5 of a head's 16 dims"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 2}, ConfigError, "32 of a head's 16 dims"),
    ],
)
def test_unusable_parameters_are_named(parameters: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rope.read(parameters, head_dim=16, max_len=4096)
