"""Distillation (Hinton et al., 2015): a model learns the probabilities that a larger one gives.

Dims: T tokens that are predicted, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from tenfold.base.builtin import BUILTIN_MODEL, builtin_model
from tenfold.base.errors import ConfigError
from tenfold.base.storage import fetch
from tenfold.data.packing import Rows
from tenfold.data.tokenizer import Tokenizer
from tenfold.models.family import Model, resolve
from tenfold.nn import checkpoint, param
from tenfold.nn.param import Tree
from tenfold.nn.stack import PLAIN, Placement
from tenfold.train.adapters import load_stacked, start
from tenfold.train.loss import Loss, LossSum, flat_states
from tenfold.train.sft import SftConfig, answer_batches
from tenfold.train.trainer import Trained

DIVERGENCES = ("forward", "reverse")


# --- the loss -------------------------------------------------------------------------------------------------------


def divergences(
    student: Float[Array, "T V"], teacher: Float[Array, "T V"], *, kind: str, temperature: float
) -> Float32[Array, " T"]:
    """How far the student's distribution is from the teacher's, in nats, of logits at a temperature.

    "forward" is KL(teacher ‖ student), which covers all that the teacher might say; "reverse" is KL(student ‖ teacher),
    which keeps to what it would (Gu et al., 2024). Both are multiplied by the temperature squared, so that gradients do
    not shrink with it (Hinton et al., 2015).
    """
    ours, theirs = (jax.nn.log_softmax(x.astype(jnp.float32) / temperature, axis=-1) for x in (student, teacher))
    first, second = (theirs, ours) if kind == "forward" else (ours, theirs)
    return temperature**2 * (jnp.exp(first) * (first - second)).sum(-1)


def distillation_loss(
    student: Model,
    teacher: Model,
    *,
    kind: str = "forward",
    temperature: float = 1.0,
    alpha: float = 0.5,
    placement: Placement = PLAIN,
) -> Loss:
    """(student's weights, {"teacher": its weights}, rows) -> alpha · divergence + (1 - alpha) · cross-entropy.

    Both are of the tokens that weigh something in the rows, and weighted by that.
    """

    def loss(params: Tree, frozen: Tree, rows: Rows) -> LossSum:
        hidden, _ = flat_states(params, student, rows, placement)
        seen, _ = flat_states(frozen["teacher"], teacher, rows, placement)
        ours = student.logits(params, hidden)
        theirs = jax.lax.stop_gradient(teacher.logits(frozen["teacher"], seen))
        following = (jnp.pad(jnp.asarray(x)[:, 1:], ((0, 0), (0, 1))) for x in (rows.tokens, rows.weights))
        targets, weights = map(placement.layout.flatten, following)
        apart = divergences(ours, theirs, kind=kind, temperature=temperature)
        missed = -jnp.take_along_axis(jax.nn.log_softmax(ours, axis=-1), targets[:, None], axis=-1)[:, 0]
        sums = {"divergence": (apart * weights).sum(), "cross_entropy": (missed * weights).sum()}
        total = alpha * sums["divergence"] + (1 - alpha) * sums["cross_entropy"]
        return LossSum(total, weights.sum(), sums)

    return loss


# --- the recipe -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """One run of distillation.

    Attributes:
        sft: the student, the data, and the run.
        teacher: a directory, a Hugging Face id or a URI of any checkpoint with the student's vocabulary.
        divergence: "forward" or "reverse".
        temperature: of both distributions.
        alpha: the share of the divergence in the loss; the rest is cross-entropy with the data.
    """

    sft: SftConfig
    teacher: str
    divergence: str = "forward"
    temperature: float = 1.0
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ConfigError(f"divergence must be one of {', '.join(DIVERGENCES)}; it is {self.divergence!r}")
        if not self.temperature > 0 or not 0 <= self.alpha <= 1:
            raise ConfigError("temperature must be positive, and alpha from 0 to 1")


def distill(config: DistillConfig, output: Path) -> Trained:
    """Trains a student, and writes it, or its adapter, to `output`/model; started again, goes on.

    Raises:
        ConfigError, DataError, CheckpointError, TokenizerError, UnsupportedModelError: before the first step, if
            options do not fit each other, the vocabularies differ, or data or a model cannot be used.
        TrainingError: as `train`.
    """
    tuning = config.sft.tuning
    begun = start(tuning)
    begun.refuse_pipeline("distillation runs its teacher whole")
    path = builtin_model() if config.teacher == BUILTIN_MODEL else fetch(config.teacher, progress=True)
    teacher = resolve(checkpoint.read_config(path))
    check_vocabularies(begun.model, begun.tokenizer, teacher, Tokenizer.load(path), str(path))
    loss = distillation_loss(
        begun.model,
        teacher,
        kind=config.divergence,
        temperature=config.temperature,
        alpha=config.alpha,
        placement=begun.placement,
    )
    mesh = begun.layout.mesh
    shardings: Any = None if mesh is None else param.shardings(teacher.params(stacked=True), mesh)  # pyright: ignore[reportArgumentType]
    weights = load_stacked(path, teacher, jnp.dtype(tuning.training.dtype), shardings)
    job = begun.job(loss, frozen={"teacher": weights})
    with answer_batches(config.sft, begun, config.sft.datasets) as batches:
        return begun.train(job, batches, output)


def check_vocabularies(student: Model, ours: Tokenizer, teacher: Model, theirs: Tokenizer, where: str) -> None:
    """Raises ConfigError unless both models read and write the same tokens."""
    if student.config.V != teacher.config.V:
        raise ConfigError(
            f"the teacher {where} has a vocabulary of {teacher.config.V} tokens and the student one of "
            f"{student.config.V}: their probabilities cannot be compared; take a teacher of the same vocabulary"
        )
    other = next((i for i in range(student.config.V) if ours.piece(i) != theirs.piece(i)), None)
    if other is not None:
        raise ConfigError(
            f"token {other} is {ours.piece(other)!r} to the student and {theirs.piece(other)!r} to the teacher "
            f"{where}; take a teacher of the same vocabulary"
        )
