"""The recipes of fine-tuning, from a file of data to a model that loads: a few steps of a tiny one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tenfold import LLM, SamplingParams
from tenfold.base.errors import ConfigError, DataError
from tenfold.data.packing import Rows
from tenfold.models.family import resolve
from tenfold.nn import adapter_checkpoint, checkpoint
from tenfold.nn.lora import LoraConfig
from tenfold.testing.tiny import write_tiny_checkpoint
from tenfold.train.adapters import TuningConfig
from tenfold.train.distill import DistillConfig, distill
from tenfold.train.dpo import DpoConfig, dpo
from tenfold.train.embed import EmbedConfig, Texts, cached_gradient, contrastive_loss, embed, embeddings
from tenfold.train.example_batches import alone
from tenfold.train.optimizers import OptimizerConfig
from tenfold.train.parallelism import Parallelism
from tenfold.train.pretrain import Dataset
from tenfold.train.sft import SftConfig, sft
from tenfold.train.step import accumulate
from tenfold.train.trainer import TrainConfig

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("mixed_dtypes")]

LORA = LoraConfig(r=2, target_modules=("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    write_tiny_checkpoint(path, layers=2, width=16, heads=2, kv_heads=1, max_len=64)
    return path


def tuning(model: Path, mesh: str = "", **given: Any) -> TuningConfig:
    run = TrainConfig(
        steps=3,
        plots=False,
        optimizer=OptimizerConfig(learning_rate=0.01, schedule="constant", weight_decay=0.0),
        parallelism=Parallelism(mesh=mesh),
    )
    return TuningConfig(**{"model": str(model), "max_length": 32, "batch_size": 4, "training": run, **given})


def chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write(file: Path, row: Callable[[int], Any]) -> Dataset:
    file.write_text("".join(json.dumps(row(i)) + "\n" for i in range(12)))
    return Dataset(where=str(file))


def conversations(file: Path) -> Dataset:
    return write(file, lambda i: {"messages": chat(f"q{i}", "yes")})


def losses(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]


def test_adapters_are_trained_merged_and_served(base: Path, tmp_path: Path) -> None:
    data = conversations(tmp_path / "data.jsonl")
    assert sft(SftConfig(tuning=tuning(base, lora=LORA), datasets=(data,)), tmp_path / "run").finished
    events = losses(tmp_path / "run")
    assert events[-1]["loss"] < events[0]["loss"]
    adapter = tmp_path / "run" / "model"
    written = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").unlink()
    sft(SftConfig(tuning=tuning(base, lora=LORA), datasets=(data,)), tmp_path / "run")  # goes on, from the last step
    assert (adapter / "adapter_model.safetensors").read_bytes() == written
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert config["target_modules"] == ["down_proj", "q_proj"]
    tree = resolve(checkpoint.read_config(base)).params()
    adapter_checkpoint.merge(base, adapter, tmp_path / "merged", tree)
    sizes = {"max_model_len": 32, "max_num_seqs": 1, "max_num_batched_tokens": 8, "cache_memory": 2**20}
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    texts = [
        LLM(model, **sizes).generate("import", params, use_tqdm=False)[0].outputs[0].token_ids
        for model in (adapter, tmp_path / "merged", base)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_all_weights_and_quantised_bases(base: Path, tmp_path: Path) -> None:
    data = conversations(tmp_path / "data.jsonl")
    found = {}
    for name, given in {"full": {}, "qlora": {"lora": LORA, "quantization": "int8"}}.items():
        config = SftConfig(tuning=tuning(base, **given), datasets=(data,), validation=data, eval_batches=1)
        sft(config, tmp_path / name)
        found[name] = losses(tmp_path / name)
        assert any("eval_loss" in event for event in found[name])
    assert found["qlora"][0]["loss"] == pytest.approx(found["full"][0]["loss"], rel=0.02)
    tree = resolve(checkpoint.read_config(base)).params()
    before, after = (checkpoint.load(at, tree, jnp.float32) for at in (base, tmp_path / "full" / "model"))
    assert not np.array_equal(before["embed"], after["embed"])


def test_adapters_train_alike_on_a_mesh(base: Path, tmp_path: Path) -> None:
    data = conversations(tmp_path / "data.jsonl")
    found = {}
    for mesh in ("", "fsdp=2,tensor=2"):
        config = tuning(base, lora=LoraConfig(r=2, use_dora=True), mesh=mesh)
        sft(SftConfig(tuning=config, datasets=(data,)), tmp_path / f"run{mesh}")
        found[mesh] = [event["loss"] for event in losses(tmp_path / f"run{mesh}")]
    np.testing.assert_allclose(*found.values(), rtol=1e-5)


def test_preferences_begin_at_the_reference(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", lambda i: {"chosen": chat(f"q{i}", "yes"), "rejected": chat(f"q{i}", "no")})
    dpo(DpoConfig(tuning=tuning(base, lora=LORA), dataset=data), tmp_path / "run")
    events = losses(tmp_path / "run")
    assert events[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert events[-1]["loss"] < events[0]["loss"]
    assert events[-1]["reward_margin"] > 0
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").exists()


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(base: Path, tmp_path: Path) -> None:
    data = conversations(tmp_path / "data.jsonl")
    config = SftConfig(tuning=tuning(base), datasets=(data,))
    distill(DistillConfig(sft=config, teacher=str(base), divergence="reverse"), tmp_path / "run")
    events = losses(tmp_path / "run")
    assert events[0]["divergence"] == pytest.approx(0, abs=1e-5)
    assert events[1]["divergence"] > 1e-5
    other = tmp_path / "other"
    write_tiny_checkpoint(other, layers=1, width=16, heads=2, kv_heads=1)
    changed = json.loads((other / "config.json").read_text()) | {"vocab_size": 300}
    (other / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match="vocabulary of 300 tokens and the student"):
        distill(DistillConfig(sft=config, teacher=str(other)), tmp_path / "refused")


def test_encoders_learn_which_passage_belongs_to_a_query(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", lambda i: {"query": f"q{i}", "positive": f"p{i}", "negatives": [f"n{i}"]})
    embed(EmbedConfig(tuning=tuning(base), dataset=data, negatives=1, chunk=6), tmp_path / "run")
    events = losses(tmp_path / "run")
    assert events[-1]["loss"] < events[0]["loss"]
    with pytest.raises(DataError, match="line 1: there are 1 negatives, and 2 are wanted"):
        embed(EmbedConfig(tuning=tuning(base), dataset=data, negatives=2), tmp_path / "refused")


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_gradients_in_chunks_are_those_of_the_whole_batch(base: Path, pooling: str) -> None:
    model = resolve(checkpoint.read_config(base))
    weights = checkpoint.load(base, model.params(stacked=True), jnp.float32)
    random = np.random.default_rng(0)
    drawn = [random.integers(0, 256, random.integers(2, 9)).tolist() for _ in range(12)]
    rows = alone([(ids, [False] * len(ids)) for ids in drawn], 8, 0)
    texts = Texts(Rows(*(a[:4] for a in rows)), Rows(*(a[4:].reshape(4, 2, 8) for a in rows)))
    loss = contrastive_loss(model, pooling=pooling, temperature=0.1)
    sums, whole = jax.jit(accumulate(loss))(weights, {}, texts)
    chunked = cached_gradient(lambda w, _, part: embeddings(w, model, part, pooling), 0.1, 3)
    again, gradients = jax.jit(chunked)(weights, {}, texts)
    np.testing.assert_allclose(float(again.total), float(sums.total), rtol=1e-5)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale), gradients, whole)


def test_what_does_not_fit_is_refused_before_the_first_step(base: Path, tmp_path: Path) -> None:
    data = conversations(tmp_path / "data.jsonl")
    with pytest.raises(ConfigError, match="cannot be trained; train adapters"):
        sft(SftConfig(tuning=tuning(base, quantization="int8"), datasets=(data,)), tmp_path / "run")
    with pytest.raises(ConfigError, match="format must be one of"):
        SftConfig(tuning=tuning(base), datasets=(data,), format="chat")
    with pytest.raises(ConfigError, match="label_smoothing is of the loss sigmoid"):
        DpoConfig(tuning=tuning(base), dataset=data, loss="ipo", label_smoothing=0.1)
    with pytest.raises(DataError, match="no column 'chosen'"):
        dpo(DpoConfig(tuning=tuning(base), dataset=data), tmp_path / "run")
    with pytest.raises(ConfigError, match="chunk must divide the 8 texts"):
        EmbedConfig(tuning=tuning(base), dataset=data, chunk=3)
    with pytest.raises(ConfigError, match="no modules query to adapt"):
        lora = LoraConfig(target_modules=("q_proj", "query"))
        sft(SftConfig(tuning=tuning(base, lora=lora), datasets=(data,)), tmp_path / "run")
    with pytest.raises(ConfigError, match="leave the axis pipeline out"):
        embed(EmbedConfig(tuning=tuning(base, mesh="pipeline=2"), dataset=data), tmp_path / "run")
    bad = write(tmp_path / "bad.jsonl", lambda i: {"messages": chat("q", "a")[: 1 + (i < 11)]})
    with pytest.raises(DataError, match="bad.jsonl, line 12: .*no message of the assistant"):
        sft(SftConfig(tuning=tuning(base), datasets=(bad,)), tmp_path / "run")
