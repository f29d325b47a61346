"""The recipe of pretraining: next-token prediction on documents, from random weights or from a checkpoint's."""

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tenfold.base.errors import ConfigError
from tenfold.base.storage import fetch
from tenfold.data.packing import Rows
from tenfold.data.records import open_records
from tenfold.data.tokenizer import Tokenizer
from tenfold.models.family import Model, resolve
from tenfold.nn import checkpoint, param
from tenfold.nn.param import Tree
from tenfold.parallel.layout import NOWHERE, Layout
from tenfold.parallel.mesh import parse_mesh
from tenfold.train.batches import Batches, Source, encode_text, first_batches, packed_batches
from tenfold.train.evaluation import Perplexity
from tenfold.train.export import export_model, stored_dtype
from tenfold.train.flops import flops_per_token
from tenfold.train.loss import full_training, staged_full_training
from tenfold.train.optimizers import make_optimizer
from tenfold.train.plan import Plan, plan_step, use_virtual_devices
from tenfold.train.state import abstract_state
from tenfold.train.step import make_step
from tenfold.train.trainer import Job, TrainConfig, Trained, train


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Documents to train on.

    Attributes:
        where: a path or URI, as `open_records` takes it.
        weight: its share of the tokens, of the sum of all datasets'.
        split: of a directory that has several.
    """

    where: str
    weight: float = 1.0
    split: str = "train"


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """One run of pretraining.

    Attributes:
        model: a directory, a Hugging Face id or a URI of a checkpoint, with a tokenizer.
        from_scratch: start from random weights; then `model` needs a config.json and a tokenizer only.
        datasets: mixed by weight.
        validation: held-out documents, whose perplexity is measured.
        text_column: of the documents' texts.
        max_length: tokens of a row.
        batch_size: rows of a step, over all devices.
        eval_batches: of as many rows at most, that perplexity is measured on.
        seed: of the weights and of the order of the documents.
        training: the run.
    """

    model: str
    from_scratch: bool = False
    datasets: tuple[Dataset, ...]
    validation: Dataset | None = None
    text_column: str = "text"
    max_length: int = 1024
    batch_size: int = 8
    eval_batches: int = 16
    seed: int = 0
    training: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1000))


CONFIG_FILES = ("config.json", "generation_config.json", "tokenizer*", "*.model", "*.jinja", "vocab.*", "merges.txt")
"""What a run from random weights needs of a checkpoint."""


def pretrain(config: PretrainConfig, output: Path) -> Trained:
    """Trains a model, and writes it to `output`/model once all steps are done; started again, goes on.

    Raises:
        ConfigError, DataError, CheckpointError, TokenizerError, UnsupportedModelError: before the first step, if
            options do not fit each other, or data or the model cannot be used.
        TrainingError: as `train`.
    """
    if not config.datasets:
        raise ConfigError("there is nothing to train on: name a dataset")
    path = fetch(config.model, files=CONFIG_FILES) if config.from_scratch else fetch(config.model, progress=True)
    hf = checkpoint.read_config(path)
    model, tokenizer = resolve(hf), Tokenizer.load(path)
    check_fit(model, tokenizer, config.max_length)
    job = _job(config, path, model)
    evaluate = None
    if config.validation is not None:
        held_out = _held_out(config, config.validation, tokenizer, job.layout)
        evaluate = Perplexity(job.loss, held_out, layout=job.layout, dtype=config.training.dtype)
    with closing(_batches(config, config.datasets, tokenizer, job.layout)) as batches:
        trained = train(job, config.training, batches, output, evaluate=evaluate)
    if trained.finished:
        weights = trained.state.trainable
        export_model(output / "model", model, weights, config=hf, like=path, dtype=stored_dtype(hf))
    return trained


def plan_pretraining(config: PretrainConfig) -> Plan:
    """What each device of the run's mesh would hold and send in a step; needs none of them, and no data.

    Raises:
        ConfigError: options do not fit each other, or jax has been used in this process.
    """
    parallelism = config.training.parallelism
    if parallelism.offload_optimizer:
        raise ConfigError(
            "a plan is of a step, for which the optimizer's state is on the devices either way: leave "
            "offload_optimizer out"
        )
    use_virtual_devices(math.prod(parse_mesh(parallelism.mesh).values()))
    path = fetch(config.model, files=CONFIG_FILES)
    job = _job(config, path, resolve(checkpoint.read_config(path)))
    if job.layout.mesh is None or job.grad is None:
        raise ConfigError("a plan is of a mesh: name one, such as --mesh data=8,fsdp=64")
    training, rows = config.training, (config.batch_size, config.max_length)
    optimizer = make_optimizer(training.optimizer, training.steps, job.declared)
    step = make_step(
        job.grad,
        optimizer,
        clip_norm=training.optimizer.max_grad_norm,
        compute_dtype=jnp.dtype(training.dtype),
    )
    state = abstract_state(optimizer, param.abstract(job.declared, jnp.float32), job.shardings)
    ids = jax.ShapeDtypeStruct(rows, jnp.int32, sharding=job.layout.rows)
    batch = Rows(ids, ids, ids, jax.ShapeDtypeStruct(rows, jnp.float32, sharding=job.layout.rows))
    return plan_step(step, state, job.frozen, batch, job.layout, parallelism.make_schedule(job.layout))


def _job(config: PretrainConfig, path: Path, model: Model) -> Job:
    parallelism = config.training.parallelism
    placement = parallelism.make_placement(fp8=config.training.fp8)
    layout, declared = placement.layout, model.params(stacked=True)
    layout.check(config.batch_size, config.max_length, parallelism.micro_batches)
    shardings = None if layout.mesh is None else param.shardings(declared, layout.mesh)  # pyright: ignore[reportArgumentType]
    return Job(
        loss=full_training(model, placement),
        declared=declared,
        initial=_initial(config, path, model, shardings),
        shardings=shardings,
        layout=layout,
        grad=parallelism.make_grad(staged_full_training(model), placement, shardings),
        flops_per_token=flops_per_token(model, config.max_length),
    )


def check_fit(model: Model, tokenizer: Tokenizer, max_length: int) -> None:
    """Raises ConfigError unless the model has a place for every token and position."""
    if tokenizer.vocab_size > model.config.V:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model's vocabulary {model.config.V}: they do not "
            "belong together. Take the model's own tokenizer, or a config.json with a vocab_size as large"
        )
    if not 2 <= max_length <= model.config.max_len:
        raise ConfigError(
            f"rows of {max_length} tokens do not fit the model, whose longest context is {model.config.max_len}"
        )


def _initial(config: PretrainConfig, path: Path, model: Model, shardings: Any) -> Callable[[], Tree]:
    declared = model.params(stacked=True)
    if config.from_scratch:
        return lambda: param.initialize(declared, jax.random.key(config.seed), jnp.float32, shardings)
    return lambda: checkpoint.load(path, declared, jnp.float32, shardings=shardings, skipped=model.skipped())


def _source(config: PretrainConfig, dataset: Dataset, tokenizer: Tokenizer) -> Source:
    return Source(
        name=dataset.where,
        records=open_records(dataset.where, {config.text_column: str}, split=dataset.split),
        encode=encode_text(tokenizer, config.max_length, config.text_column),
        weight=dataset.weight,
    )


def _shape(config: PretrainConfig, tokenizer: Tokenizer, layout: Layout) -> dict[str, Any]:
    """Of this process's batches."""
    index, shares = layout.row_share
    return {
        "rows": config.batch_size // shares,
        "length": config.max_length,
        "pad_id": tokenizer.pad_token_id or 0,
        "share": (index, shares),
    }


def _batches(config: PretrainConfig, datasets: Sequence[Dataset], tokenizer: Tokenizer, layout: Layout) -> Batches:
    sources = [_source(config, dataset, tokenizer) for dataset in datasets]
    return packed_batches(sources, seed=config.seed, **_shape(config, tokenizer, layout))


def _held_out(config: PretrainConfig, dataset: Dataset, tokenizer: Tokenizer, layout: Layout) -> list[Rows]:
    shape = _shape(config, tokenizer, layout)
    return first_batches(_source(config, dataset, tokenizer), count=config.eval_batches, **shape)


def evaluate_model(
    where: str,
    dataset: Dataset,
    *,
    text_column: str = "text",
    max_length: int = 1024,
    batch_size: int = 8,
    eval_batches: int = 16,
    dtype: str = "float32",
) -> dict[str, float]:
    """The mean loss and the perplexity of a checkpoint on documents; arguments as in `PretrainConfig`.

    Raises:
        ConfigError, DataError, CheckpointError, TokenizerError, UnsupportedModelError: as `pretrain`.
    """
    config = PretrainConfig(
        model=where,
        datasets=(dataset,),
        text_column=text_column,
        max_length=max_length,
        batch_size=batch_size,
        eval_batches=eval_batches,
    )
    path = fetch(where, progress=True)
    model, tokenizer = resolve(checkpoint.read_config(path)), Tokenizer.load(path)
    check_fit(model, tokenizer, max_length)
    measured = Perplexity(full_training(model), _held_out(config, dataset, tokenizer, NOWHERE), dtype=dtype)
    return measured(checkpoint.load(path, model.params(stacked=True), jnp.float32, skipped=model.skipped()))
