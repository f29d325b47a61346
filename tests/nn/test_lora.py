"""Adapters: declared for every family, without effect at first, the same merged or not, and back from their files."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tenfold.base.errors import ConfigError, UnsupportedModelError
from tenfold.kernels.matmul import AdaptedWeight, QuantizedWeight, matmul
from tenfold.models.family import Model, resolve
from tenfold.nn import adapter_checkpoint, checkpoint
from tenfold.nn.lora import Adapter, LoraConfig, adapt, adapter_params, initialize, merged
from tenfold.nn.packed import packed_attend
from tenfold.nn.param import is_param, leaves, map_params
from tenfold.nn.quantization import SCHEMES, quantize_param
from tests.parity.cases import CASES, Case

STACKED = ("phi3", "deepseek_v3", "gemma3n", "qwen3_next")
FORWARDS = ("llama", "phi3", "gpt2")  # separate, fused and transposed tensors


def case(start: str) -> Case:
    return next(case for case in CASES if case.name.startswith(start))


def draw(tree: Any, seed: int = 0, scale: float = 0.1) -> Any:
    """Numbers that are a function of the seed alone, drawn by numpy: nothing compiles."""
    random = np.random.default_rng(seed)
    return map_params(lambda p: jnp.asarray(random.normal(scale=scale, size=p.shape), jnp.float32), tree)


@partial(jax.jit, static_argnums=0)
def logits(model: Model, params: Any, tokens: jax.Array) -> jax.Array:
    attend = packed_attend(jnp.zeros((1, len(tokens)), jnp.int32))
    hidden, _ = model.forward(params, tokens, jnp.arange(len(tokens)), attend)
    return model.logits(params, hidden)


def first_cases() -> list[Case]:
    """One for each architecture."""
    return list({case.config["architectures"][0]: case for case in reversed(CASES)}.values())


@pytest.mark.parametrize(
    ("one", "stacked"),
    [*((one, False) for one in first_cases()), *((case(name), True) for name in STACKED)],
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)
def test_every_family_declares_adapters_of_its_linear_layers(one: Case, stacked: bool) -> None:
    model = resolve(one.config)
    tree = model.params(stacked=stacked)
    declared = adapter_params(tree, LoraConfig(r=3, use_dora=True))
    adapters = jax.tree.leaves(declared, is_leaf=lambda x: isinstance(x, Adapter))
    assert all(isinstance(adapter, Adapter) for adapter in adapters)
    names = [source.name for _, p in leaves(declared) for source in p.sources]
    modules = {name.removesuffix(".lora_A.weight") for name in names if name.endswith("lora_A.weight")}
    assert modules
    routers = {source.name.removesuffix(".weight") for _, p in leaves(tree) if p.routes for source in p.sources}
    assert not modules & routers
    assert not [name for name in modules if re.search(r"embed_tokens|norm|\.experts\.|lm_head", name)]
    flat = adapt(tree, declared, LoraConfig(r=3))
    for adapted in jax.tree.leaves(flat, is_leaf=lambda x: isinstance(x, AdaptedWeight) or is_param(x)):
        if isinstance(adapted, AdaptedWeight):
            lead = len(adapted.base.stack_shape)
            whole = (*adapted.a.shape[lead:-1], *adapted.b.shape[lead + 1 :])
            assert adapted.base.shape[lead:] == whole
            assert adapted.magnitude.shape == adapted.base.shape[:lead] + adapted.b.shape[lead + 1 :]


@pytest.mark.parametrize("name", FORWARDS)
def test_merged_weights_compute_what_adapted_ones_do(name: str) -> None:
    model = resolve(case(name).config)
    config = LoraConfig(r=3, lora_alpha=5.0, use_dora=True)
    base = draw(model.params())
    declared = adapter_params(model.params(), config)
    tokens = jnp.arange(2, 12)
    before = logits(model, base, tokens)
    fresh = adapt(base, initialize(declared, base, jax.random.key(0)), config)
    np.testing.assert_allclose(logits(model, fresh, tokens), before, atol=2e-4)
    adapted = adapt(base, draw(declared, 1, 0.3), config)
    whole = jax.tree.map(
        lambda w: merged(w) if isinstance(w, AdaptedWeight) else w,
        adapted,
        is_leaf=lambda w: isinstance(w, AdaptedWeight),
    )
    after = logits(model, whole, tokens)
    assert float(jnp.abs(after - before).max()) > 0.05
    np.testing.assert_allclose(logits(model, adapted, tokens), after, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FORWARDS)
def test_files_hold_the_same_adapter_stacked_or_not(name: str, tmp_path: Path) -> None:
    model = resolve(case(name).config)
    config = LoraConfig(r=2, lora_alpha=4.0, use_dora=True)
    tree = model.params()
    adapters = draw(adapter_params(tree, config))
    adapter_checkpoint.save(tmp_path / "one", tree, adapters, config, base="base")
    read, stacked = adapter_checkpoint.load(tmp_path / "one", model.params(stacked=True))
    assert (read.r, read.scale, read.use_dora) == (2, 2.0, True)
    adapter_checkpoint.save(tmp_path / "two", model.params(stacked=True), stacked, read, base="base")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    _, again = adapter_checkpoint.load(tmp_path / "two", tree)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)


@pytest.mark.parametrize("name", FORWARDS)
def test_a_merged_checkpoint_has_the_merged_weights(name: str, tmp_path: Path) -> None:
    one = case(name)
    model = resolve(one.config)
    config = LoraConfig(r=2, use_dora=True, use_rslora=True)
    tree = model.params()
    base, adapters = draw(tree), draw(adapter_params(tree, config), 1)
    checkpoint.export(tmp_path / "base", tree, base, config=one.config, dtype=jnp.float32, max_shard_bytes=30_000)
    adapter_checkpoint.save(tmp_path / "adapter", tree, adapters, config, base=str(tmp_path / "base"))
    adapter_checkpoint.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", tree)
    found = checkpoint.load(tmp_path / "merged", tree, jnp.float32, skipped=model.skipped())
    finish = adapter_checkpoint.merge_on_load(tmp_path / "adapter", tree)
    loaded = checkpoint.load(tmp_path / "base", tree, jnp.float32, skipped=model.skipped(), finish=finish)
    wanted = jax.tree.map(
        lambda w: merged(w) if isinstance(w, AdaptedWeight) else w,
        adapt(base, adapters, config),
        is_leaf=lambda w: isinstance(w, AdaptedWeight),
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), found, wanted)
    jax.tree.map(np.testing.assert_array_equal, found, loaded)
    assert (tmp_path / "merged" / checkpoint.INDEX).exists()


def test_gradients_of_a_quantised_base_are_those_of_its_numbers() -> None:
    random = np.random.default_rng(0)
    x, a, b = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((5, 8), (8, 2), (2, 3, 4)))
    p = next(p for _, p in leaves(resolve(case("llama").config).params()) if p.inputs and len(p.output_dims) == 2)
    weight = quantize_param(p, draw([p])[0], SCHEMES["int8"])
    assert isinstance(weight, QuantizedWeight)
    x = jnp.asarray(random.normal(size=(5, p.input_size)), jnp.float32)
    a = jnp.asarray(random.normal(size=(p.input_size, 2)), jnp.float32)
    b = jnp.asarray(random.normal(size=(2, *p.output_dims)), jnp.float32)

    def total(x: jax.Array, a: jax.Array, b: jax.Array, base: Any) -> jax.Array:
        [y] = matmul(x, AdaptedWeight(base=base, a=a, b=b, scale=0.5))
        return jnp.square(y).sum()

    plain = weight.dequantize(jnp.float32).reshape(p.input_size, *p.output_dims)
    ours, theirs = (jax.grad(total, argnums=(0, 1, 2))(x, a, b, base) for base in (weight, plain))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), ours, theirs)
    dense = plain.reshape(p.input_size, -1) + 0.5 * a @ b.reshape(2, -1)
    np.testing.assert_allclose(ours[0], 2 * (x @ dense) @ dense.T, rtol=2e-4, atol=1e-3)


def test_what_cannot_be_adapted_is_refused_by_name() -> None:
    llama, moe = resolve(case("llama").config).params(), resolve(case("qwen3_moe").config).params()
    with pytest.raises(ConfigError, match="model.embed_tokens"):
        adapter_params(llama, LoraConfig(target_modules=("embed_tokens", "q_proj")))
    with pytest.raises(ConfigError, match="experts"):
        adapter_params(moe, LoraConfig(target_modules=("gate_proj",)))
    with pytest.raises(ConfigError, match="this model has .*q_proj"):
        adapter_params(llama, LoraConfig(target_modules=("query",)))
    with pytest.raises(ConfigError, match="rank r"):
        LoraConfig(r=0)
    chosen = adapter_params(llama, LoraConfig(target_modules=r".*layers\.1\.self_attn\.[qv]_proj"))
    assert {name for name, _ in leaves(chosen)} == {f"layers.1.{n}.{f}" for n in "qv" for f in ("a", f"b.{n}")}


@pytest.mark.parametrize(
    ("key", "value"),
    [("modules_to_save", ["lm_head"]), ("bias", "all"), ("init_lora_weights", "pissa"), ("peft_type", "LOHA")],
)
def test_what_adapters_ask_for_and_is_not_implemented_is_refused(key: str, value: object, tmp_path: Path) -> None:
    described = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "lora_dropout": 0.1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(described))
    assert adapter_checkpoint.read_config(tmp_path).scale == 2
    (tmp_path / "adapter_config.json").write_text(json.dumps(described | {key: value}))
    with pytest.raises(UnsupportedModelError, match=key):
        adapter_checkpoint.read_config(tmp_path)
