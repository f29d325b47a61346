"""Direct preference optimisation (Rafailov et al., 2023): of two answers, the better one is made more likely.

Dims: N pairs, L tokens of a row.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float32

from tenfold.base.errors import ConfigError, DataError, TenfoldError
from tenfold.data.packing import Example, Rows
from tenfold.data.records import Records, open_records
from tenfold.data.supervision import encode_completion, encode_conversation
from tenfold.data.tokenizer import Tokenizer
from tenfold.models.family import Model
from tenfold.nn.param import Tree
from tenfold.nn.stack import PLAIN, Placement
from tenfold.parallel.layout import NOWHERE, Layout
from tenfold.train.adapters import TuningConfig, start
from tenfold.train.example_batches import alone, example_batches
from tenfold.train.loss import Loss, LossSum, hidden_states, in_stages, token_losses
from tenfold.train.pretrain import Dataset
from tenfold.train.trainer import Trained

LOSSES = ("sigmoid", "hinge", "ipo")
_TOGETHER = 8  # pairs whose log-probabilities under the reference are computed at a time


class Pairs(NamedTuple):
    """Two answers to each of N prompts, and how likely they were before training.

    Attributes:
        chosen, rejected: [N, L], one example to a row; the weights say which tokens are the answer.
        reference: float32 [N, 2], the log-probabilities of chosen and rejected under the model that training starts
            from, in nats.
    """

    chosen: Rows
    rejected: Rows
    reference: Any

    def rows(self) -> Rows:
        """All answers [2 N, L], those of a pair one after the other: the chosen one first.

        So a pair stays on its devices. Rows in another order would be moved between those of one stage of a pipeline,
        and wait for the devices of the other stages, which are at something else.
        """
        pairs = zip(self.chosen, self.rejected, strict=True)
        return Rows(*(jnp.stack(pair, axis=1).reshape(-1, pair[0].shape[1]) for pair in pairs))


# --- the loss -------------------------------------------------------------------------------------------------------


def answer_logprobs(params: Tree, model: Model, rows: Rows, placement: Placement = PLAIN) -> Float32[Array, " N"]:
    """The log-probability of the answer in each row, in nats: of its tokens together."""
    hidden = hidden_states(params, model, rows, placement)[:, :-1]
    logits = model.logits(params, hidden.reshape(-1, hidden.shape[-1]))
    targets, weights = jnp.asarray(rows.tokens)[:, 1:], jnp.asarray(rows.weights)[:, 1:]
    losses = token_losses(logits, targets.reshape(-1))
    return -(losses.reshape(weights.shape) * weights).sum(1)


def preference_losses(
    chosen: Float32[Array, " N"],
    rejected: Float32[Array, " N"],
    *,
    lengths: tuple[Float32[Array, " N"], Float32[Array, " N"]],
    kind: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Float32[Array, " N"]:
    """The loss of each pair.

    Args:
        chosen, rejected: by how much the log-probabilities of the answers have risen over the reference's.
        lengths: tokens of the answers.
        kind: "sigmoid" (Rafailov et al., 2023), "hinge" (Zhao et al., 2023), or "ipo" (Azar et al., 2023; of means over
            the tokens, as TRL has it).
        beta: how strongly the reference holds; of "ipo", its τ.
        label_smoothing: of "sigmoid": the share of pairs that are taken for labelled the wrong way round (Mitchell,
            2023).
    """
    match kind:
        case "sigmoid":
            x = beta * (chosen - rejected)
            right, wrong = jax.nn.log_sigmoid(x), jax.nn.log_sigmoid(-x)
            return -(1 - label_smoothing) * right - label_smoothing * wrong
        case "hinge":
            return jax.nn.relu(1 - beta * (chosen - rejected))
        case _:
            means = [rise / jnp.maximum(n, 1) for rise, n in zip((chosen, rejected), lengths, strict=True)]
            return jnp.square(means[0] - means[1] - 1 / (2 * beta))


def dpo_loss(
    model: Model,
    *,
    kind: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    placement: Placement = PLAIN,
) -> Loss:
    """The loss of a model's weights on `Pairs`; weighs every pair 1. Arguments as of `preference_losses`."""

    def loss(params: Tree, frozen: Tree, pairs: Pairs) -> LossSum:
        del frozen
        both = pairs.rows()
        now = answer_logprobs(params, model, both, placement).reshape(-1, 2)
        chosen, rejected = (now - jnp.asarray(pairs.reference)).T
        lengths = both.weights[:, 1:].sum(1).reshape(-1, 2).T
        losses = preference_losses(
            chosen, rejected, lengths=(lengths[0], lengths[1]), kind=kind, beta=beta, label_smoothing=label_smoothing
        )
        metrics = {
            "reward_chosen": beta * chosen.sum(),
            "reward_rejected": beta * rejected.sum(),
            "reward_margin": beta * (chosen - rejected).sum(),
            "reward_accuracy": (chosen > rejected).astype(jnp.float32).sum(),
        }
        return LossSum(losses.sum(), jnp.float32(len(losses)), metrics)

    return loss


# --- the recipe -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """One run of preference optimisation.

    Attributes:
        tuning: the model, what of it is trained, and the run; rows of a batch are pairs.
        dataset: rows with "chosen" and "rejected"; conversations that differ in the last message, or texts after a
            "prompt".
        format: "messages" or "prompt-completion".
        loss, beta, label_smoothing: as `preference_losses` has them.
    """

    tuning: TuningConfig
    dataset: Dataset
    format: str = "messages"
    loss: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.format not in _COLUMNS:
            raise ConfigError(f"format must be one of {', '.join(_COLUMNS)}; it is {self.format!r}")
        if self.loss not in LOSSES:
            raise ConfigError(f"loss must be one of {', '.join(LOSSES)}; it is {self.loss!r}")
        if not self.beta > 0 or not 0 <= self.label_smoothing < 0.5:
            raise ConfigError("beta must be positive, and label_smoothing from 0 to below 0.5")
        if self.tuning.lora is not None and self.tuning.lora.lora_dropout:
            raise ConfigError(
                "nothing is dropped of the reference that answers are compared to: leave lora_dropout out"
            )
        if self.label_smoothing and self.loss != "sigmoid":
            raise ConfigError(f"label_smoothing is of the loss sigmoid, not of {self.loss}")


_COLUMNS: dict[str, dict[str, type]] = {
    "messages": {"chosen": list, "rejected": list},
    "prompt-completion": {"prompt": str, "chosen": str, "rejected": str},
}


def encode_pair(row: Mapping[str, Any], tokenizer: Tokenizer, kind: str, length: int) -> tuple[Example, Example] | None:
    """The examples of both answers, of which only the last message is weighed; None if one does not fit into a row."""
    if kind == "messages":
        found = [encode_conversation(tokenizer, _last_only(row[name]), length + 1) for name in ("chosen", "rejected")]
    else:
        found = [encode_completion(tokenizer, row["prompt"], row[name], length + 1) for name in ("chosen", "rejected")]
    pair = [example for examples in found for example in examples]
    return (pair[0], pair[1]) if len(pair) == 2 and max(len(ids) for ids, _ in pair) <= length else None


def _last_only(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if not messages or messages[-1].get("role") != "assistant":
        raise DataError("a chosen or rejected conversation must end with a message of the assistant")
    before = [dict(m) | ({"weight": 0} if m.get("role") == "assistant" else {}) for m in messages[:-1]]
    return [*before, dict(messages[-1])]


def read_pairs(records: Records, tokenizer: Tokenizer, kind: str, length: int) -> tuple[Rows, Rows]:
    """All pairs of a dataset whose answers both fit into rows of `length` tokens; others are left out.

    Raises DataError, naming the row, if one cannot be used, or if no pair fits.
    """
    pairs: list[tuple[Example, Example]] = []
    for number in range(len(records)):
        try:
            pair = encode_pair(records[number], tokenizer, kind, length)
        except TenfoldError as error:
            raise DataError(f"{records.where(number)}: {error}") from error
        if pair is not None:
            pairs.append(pair)
    if not pairs:
        raise DataError(f"no pair of answers fits into rows of {length} tokens; take longer rows")
    pad_id = tokenizer.pad_token_id or 0
    return alone([a for a, _ in pairs], length, pad_id), alone([b for _, b in pairs], length, pad_id)


def reference_logprobs(
    params: Tree, model: Model, pairs: Sequence[Rows], layout: Layout = NOWHERE, *, fp8: bool = False
) -> np.ndarray:
    """Of each row of some `Rows` [N, L], the answer's log-probability: float32 [N, len(pairs)]; some at a time.

    `layout` says where the weights lie; all processes have all rows.
    """
    everywhere = None if layout.mesh is None else NamedSharding(layout.mesh, PartitionSpec())
    score: Callable[[Tree, Rows], jax.Array] = jax.jit(
        lambda params, rows: answer_logprobs(params, model, rows, Placement(fp8=fp8)), out_shardings=everywhere
    )

    def of(rows: Rows) -> np.ndarray:
        count = len(rows.tokens)
        short = -count % _TOGETHER
        padded = Rows(*(np.pad(array, ((0, short), (0, 0))) for array in rows))
        parts = [Rows(*(a[i : i + _TOGETHER] for a in padded)) for i in range(0, count, _TOGETHER)]
        return np.concatenate([np.asarray(score(params, part)) for part in parts])[:count]

    return np.stack([of(rows) for rows in pairs], axis=1).astype(np.float32)


def dpo(config: DpoConfig, output: Path) -> Trained:
    """Trains a model on preferences, and writes it, or its adapter, to `output`/model; started again, goes on.

    The reference is the model as it was: what it says of all answers is computed once, before the first step.

    Raises:
        ConfigError, DataError, CheckpointError, TokenizerError, UnsupportedModelError: before the first step, if
            options do not fit each other, or data or the model cannot be used.
        TrainingError: as `train`.
    """
    tuning = config.tuning
    begun = start(tuning)
    records = open_records(config.dataset.where, _COLUMNS[config.format], split=config.dataset.split)
    chosen, rejected = read_pairs(records, begun.tokenizer, config.format, tuning.max_length)
    weights = begun.base if tuning.lora else begun.load_base()  # the latter is not needed again
    fp8 = tuning.training.fp8  # the reference, too: what differs from it shall not be how numbers are rounded
    reference = reference_logprobs(weights, begun.model, (chosen, rejected), begun.layout, fp8=fp8)
    del weights
    index, shares = begun.layout.row_share
    batches = example_batches(
        Pairs(chosen, rejected, reference),
        rows=tuning.batch_size // shares,
        seed=tuning.seed,
        share=(index, shares),
    )

    def loss(placement: Placement) -> Loss:
        chosen = {"kind": config.loss, "beta": config.beta, "label_smoothing": config.label_smoothing}
        return dpo_loss(begun.model, **chosen, placement=placement)

    job = begun.job(loss(begun.placement), staged=in_stages(begun.model, loss, Pairs.rows))
    with closing(batches):
        return begun.train(job, batches, output)
