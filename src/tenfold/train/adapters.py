"""Fine-tuning all weights of a model, or adapters of it: where a run starts, and what it leaves.

A recipe states its loss of a model's weights; here it becomes one of what is trained, all weights or adapters.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tenfold.base.adapter import is_adapter, name_of_base
from tenfold.base.builtin import BUILTIN_MODEL, builtin_model
from tenfold.base.errors import ConfigError
from tenfold.base.storage import fetch
from tenfold.data.tokenizer import Tokenizer
from tenfold.models.family import Model, resolve
from tenfold.nn import adapter_checkpoint, checkpoint, lora, param
from tenfold.nn.lora import LoraConfig, adapt, adapter_params, dropout_keys
from tenfold.nn.param import Param, Tree
from tenfold.nn.quantization import Scheme, find_scheme, quantize_param
from tenfold.nn.stack import Placement, stack_weights
from tenfold.parallel.layout import Layout
from tenfold.train.batches import Batches
from tenfold.train.dropout import Seeded, SeededBatches
from tenfold.train.export import copy_other_files, export_model, stored_dtype, to_all_hosts
from tenfold.train.flops import flops_per_token
from tenfold.train.loss import Loss, LossSum, StagedLoss
from tenfold.train.pipeline import AXIS
from tenfold.train.pretrain import check_fit
from tenfold.train.step import Grad
from tenfold.train.trainer import Evaluate, Job, TrainConfig, Trained, train


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """What all recipes of fine-tuning have in common.

    Attributes:
        model: a directory, a Hugging Face id or a URI of a checkpoint with a tokenizer; "pico" is the built-in model.
        lora: adapters to train in place of the weights; None trains all weights.
        quantization: "int8" or "int4" rounds the weights under the adapters when they are loaded (QLoRA).
        max_length: tokens of a row.
        batch_size: rows of a step, over all devices.
        seed: of adapters and of the order of the data.
        training: the run.
    """

    model: str = BUILTIN_MODEL
    lora: LoraConfig | None = None
    quantization: str | None = None
    max_length: int = 1024
    batch_size: int = 8
    seed: int = 0
    training: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1000))


class Frozen(NamedTuple):
    """What is not trained: the weights under adapters, and whatever else the loss reads."""

    base: Tree
    rest: Tree


def adapted_loss(loss: Loss, config: LoraConfig, declared: Tree = None) -> Loss:
    """A loss of a model's weights, as one of its adapters over a `Frozen`.

    Args:
        loss: of the weights.
        config: of the adapters.
        declared: `adapter_params`, which `Seeded` batches need: of those, adapters do not see `lora_dropout`.
    """

    def adapted(trainable: Tree, frozen: Frozen, batch: Any) -> LossSum:
        keys = None
        if isinstance(batch, Seeded):
            batch, keys = batch.batch, dropout_keys(declared, batch.key())
        return loss(adapt(frozen.base, trainable, config, keys), frozen.rest, batch)

    return adapted


def adapted_stages(loss: StagedLoss, config: LoraConfig) -> StagedLoss:
    """As `adapted_loss`, for a pipeline."""

    def over_base(part: Callable[[Tree, Tree, Any, Placement], Any]) -> Callable[[Tree, Frozen, Any, Placement], Any]:
        return lambda trainable, frozen, batch, placement: part(
            adapt(frozen.base, trainable, config), frozen.rest, batch, placement
        )

    return StagedLoss(over_base(loss.pass_on), over_base(loss.sums))


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts from.

    Attributes:
        config: of the run.
        path: the checkpoint's directory.
        hf: its config.json.
        model, tokenizer: what it describes.
        placement: where activations lie, and which are kept.
    """

    config: TuningConfig
    path: Path
    hf: dict[str, Any]
    model: Model
    tokenizer: Tokenizer
    placement: Placement

    @property
    def layout(self) -> Layout:
        """Where rows and tokens lie."""
        return self.placement.layout

    @cached_property
    def declared(self) -> Tree:
        """The declaration of the model's weights, stacked."""
        return self.model.params(stacked=True)

    @cached_property
    def trained(self) -> Tree:
        """The declaration of what is trained."""
        return self.declared if self.config.lora is None else adapter_params(self.declared, self.config.lora)

    def _shardings(self, declared: Tree) -> Tree:
        mesh = self.layout.mesh
        return None if mesh is None else param.shardings(declared, mesh)  # pyright: ignore[reportArgumentType]

    @cached_property
    def base(self) -> Tree:
        """What `load_base` loads, once."""
        return self.load_base()

    def load_base(self) -> Tree:
        """The checkpoint's weights, in what losses are computed in; in few bits where adapters shall lie over those."""
        dtype = jnp.dtype(self.config.training.dtype)
        scheme = find_scheme(self.config.quantization)
        if scheme is None and checkpoint.read_quantization(self.path) is None:
            return load_stacked(self.path, self.model, dtype, self._shardings(self.declared))
        return _load_quantized(self.path, self.model, dtype, scheme)

    def weights(self, trainable: Tree, frozen: Tree) -> Tree:
        """The model's weights, out of what a job of this start trains and what it does not."""
        return trainable if self.config.lora is None else adapt(frozen.base, trainable, self.config.lora)

    def refuse_pipeline(self, why: str) -> None:
        """Raises ConfigError if the mesh has a pipeline."""
        if self.layout.size(AXIS) > 1:
            raise ConfigError(f"{why}; leave the axis {AXIS} out of the mesh")

    def job(
        self, loss: Loss, *, staged: StagedLoss | None = None, frozen: Tree = None, grad: Grad | None = None
    ) -> Job:
        """The job of training with a loss of the model's weights.

        Args:
            loss: (weights, frozen, batch) -> sums.
            staged: the same, for a pipeline.
            frozen: what else it reads; nothing in a pipeline.
            grad: of the loss as it is trained, where `accumulate` does not make it; `weights` serves it.

        Raises:
            ConfigError: if the mesh has a pipeline, and the loss is not staged or something is dropped.
        """
        if self._drops:
            self.refuse_pipeline("the stages of a pipeline do not know which layers they have, by which dropout draws")
            staged = None
        elif staged is None:
            self.refuse_pipeline("the loss is not one that the stages of a pipeline share")
        lora_config, shardings = self.config.lora, self._shardings(self.trained)
        frozen = {} if frozen is None else frozen
        if lora_config is None:
            initial = partial(load_stacked, self.path, self.model, jnp.float32, shardings)
        else:
            loss, frozen = adapted_loss(loss, lora_config, self.trained), Frozen(self.base, frozen)
            key = jax.random.key(self.config.seed)
            initial = partial(lora.initialize, self.trained, self.base, key, shardings)
            staged = None if staged is None else adapted_stages(staged, lora_config)
        if staged is not None:
            places = None if self.layout.mesh is None else jax.tree.map(lambda x: x.sharding, frozen)
            grad = self.config.training.parallelism.make_grad(staged, self.placement, shardings, places)
        return Job(
            loss=loss,
            declared=self.trained,
            initial=initial,
            frozen=frozen,
            shardings=shardings,
            layout=self.layout,
            grad=grad,
            flops_per_token=flops_per_token(self.model, self.config.max_length),
        )

    @property
    def _drops(self) -> bool:
        return self.config.lora is not None and self.config.lora.lora_dropout > 0

    def train(self, job: Job, batches: Batches, output: Path, *, evaluate: Evaluate | None = None) -> Trained:
        """Trains as `trainer.train`, and writes what came of it to `output`/model, once all steps are done: a
        checkpoint, or an adapter."""
        if self._drops:
            batches = SeededBatches(batches, self.config.seed, self.layout.row_share[0])
        trained = train(job, self.config.training, batches, output, evaluate=evaluate)
        if trained.finished:
            self._write(trained, output)
        return trained

    def _write(self, trained: Trained, output: Path) -> None:
        weights, lora_config = trained.state.trainable, self.config.lora
        if lora_config is None:
            dtype = stored_dtype(self.hf)
            export_model(output / "model", self.model, weights, config=self.hf, like=self.path, dtype=dtype)
            return
        weights = to_all_hosts(weights)
        if jax.process_index() == 0:
            copy_other_files(self.path, output / "model")
            base = name_of_base(self.path) if Path(self.config.model).exists() else self.config.model
            adapter_checkpoint.save(output / "model", self.declared, weights, lora_config, base=base)


def start(config: TuningConfig) -> Start:
    """Finds and checks all that a run of fine-tuning needs of its checkpoint.

    Raises:
        ConfigError, CheckpointError, TokenizerError, UnsupportedModelError: if options do not fit each other, or the
            checkpoint cannot be used.
    """
    path = builtin_model() if config.model == BUILTIN_MODEL else fetch(config.model, progress=True)
    if is_adapter(path):
        raise ConfigError(f"{path} is an adapter: name its base to train another one, or merge both to train on")
    if config.quantization is not None and config.lora is None:
        raise ConfigError("weights in few bits cannot be trained; train adapters over them, or leave quantization out")
    parallelism = config.training.parallelism
    placement = parallelism.make_placement(fp8=config.training.fp8)
    if config.quantization is not None and placement.layout.mesh is not None:
        raise ConfigError("weights in few bits are not spread over a mesh; leave quantization or the mesh out")
    if config.lora is None and checkpoint.read_quantization(path) is not None:
        raise ConfigError(f"the weights of {path} are quantised: train adapters over them, or their original")
    if config.training.fp8 and (config.quantization is not None or checkpoint.read_quantization(path) is not None):
        raise ConfigError(
            "fp8 rounds plain weights, and those under the adapters are in few bits: leave fp8 out, or take the plain "
            "checkpoint without quantization"
        )
    hf = checkpoint.read_config(path)
    begun = Start(config, path, hf, resolve(hf), Tokenizer.load(path), placement)
    check_fit(begun.model, begun.tokenizer, config.max_length)
    lacking = [] if config.lora is None else lora.unmatched(begun.declared, config.lora)
    if lacking:
        raise ConfigError(f"the model has no modules {', '.join(lacking)} to adapt; leave them out of target_modules")
    parallelism.make_schedule(begun.layout)
    begun.layout.check(config.batch_size, config.max_length, parallelism.micro_batches)
    return begun


def load_stacked(path: Path, model: Model, dtype: Any, shardings: Tree = None) -> Tree:
    """A checkpoint's weights as training has them."""
    declared = model.params(stacked=True)
    return checkpoint.load(path, declared, dtype, shardings=shardings, skipped=model.skipped())


def _load_quantized(path: Path, model: Model, dtype: Any, scheme: Scheme | None) -> Tree:
    """Weights that products use, in few bits, layer by layer; then stacked."""

    def finish(p: Param, weight: Any) -> Any:
        return quantize_param(p, weight, scheme) if scheme is not None and isinstance(weight, jax.Array) else weight

    tree = model.params()
    weights = checkpoint.load(path, tree, dtype, finish=finish, skipped=model.skipped())
    return weights | {"layers": stack_weights(weights["layers"], tree["layers"], model.kinds())}
