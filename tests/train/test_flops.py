"""FLOPs of a step by the formulas of their papers, and against what XLA counts."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tenfold.models.family import resolve
from tenfold.nn.param import abstract
from tenfold.train.flops import flops_per_token, peak_flops
from tests.parity.cases import SIZES
from tests.train import runs

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES}


def test_a_llama_is_counted_as_in_palm_s_appendix() -> None:
    """6 N + 12 L H Q T / 2, of which N leaves the embedding out, that no product uses; here attention is causal."""
    D, F, L, H, J, V, K, T = 48, 68, 3, 6, 2, 97, 8, 32
    N = L * (2 * D * H * K + 2 * D * J * K + 3 * D * F) + D * V
    assert flops_per_token(resolve(LLAMA), T) == 6 * N + 12 * L * H * K * T / 2


def test_experts_count_as_often_as_tokens_reach_them() -> None:
    mixtral = LLAMA | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2}
    D, F, L = 48, 68, 3
    difference = flops_per_token(resolve(mixtral), 32) - flops_per_token(resolve(LLAMA), 32)
    assert difference == 6 * L * (3 * D * F * (2 - 1) + D * 8)  # one more expert, and the router


def test_what_is_counted_is_what_xla_counts() -> None:
    """Of a forward pass of a model whose layers are not scanned, a third; XLA counts norms and masks besides."""
    model = resolve(runs.CONFIG | {"hidden_size": 64, "intermediate_size": 256, "vocab_size": 512})
    T = 16

    def forward(params: Any, tokens: Any) -> Any:
        from tenfold.nn.packed import packed_attend

        hidden, _ = model.forward(params, tokens, jnp.arange(T), packed_attend(jnp.ones((1, T), int)))
        return model.logits(params, hidden)

    params = abstract(model.params(), jnp.float32)
    lowered = jax.jit(forward).lower(params, jax.ShapeDtypeStruct((T,), jnp.int32))
    counted = lowered.cost_analysis()["flops"] / T
    assert flops_per_token(model, T) / 3 == pytest.approx(counted, rel=0.1)


def test_the_peak_of_a_cpu_is_measured() -> None:
    assert peak_flops("float32") > 1e8
