"""Contrastive training of encoders: a query lies nearer to its passage than to all others of a batch.

The gradients of a batch that does not fit into memory are made exactly, chunk by chunk, from those of its embeddings
(GradCache: Gao et al., 2021).

Dims: N queries, P passages of each (the first is the right one), M texts, L tokens of a row, D width of embeddings.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from tenfold.base.errors import ConfigError, DataError
from tenfold.data.packing import Rows
from tenfold.data.records import Records, open_records
from tenfold.data.tokenizer import Tokenizer
from tenfold.models.family import Model
from tenfold.nn.param import Tree
from tenfold.nn.stack import PLAIN, Placement
from tenfold.train.adapters import TuningConfig, start
from tenfold.train.example_batches import alone, example_batches
from tenfold.train.loss import Loss, LossSum, hidden_states
from tenfold.train.pretrain import Dataset
from tenfold.train.step import Grad
from tenfold.train.trainer import Trained

POOLINGS = ("mean", "last")


class Texts(NamedTuple):
    """Queries and passages, each text in a row of its own.

    Attributes:
        queries: [N, L].
        passages: [N, P, L]; the first of each query is the right one, the others are hard negatives.
    """

    queries: Rows
    passages: Rows

    def rows(self) -> Rows:
        """All texts [N + N · P, L], the queries first."""
        flat = (jnp.asarray(x).reshape(-1, x.shape[-1]) for x in self.passages)
        return Rows(*(jnp.concatenate([q, p]) for q, p in zip(self.queries, flat, strict=True)))


Embed = Callable[[Tree, Tree, Rows], Float32[Array, "M D"]]
"""(trainable, frozen, rows) -> the embedding of each row."""


# --- the loss -------------------------------------------------------------------------------------------------------


def embeddings(
    params: Tree, model: Model, rows: Rows, pooling: str = "mean", placement: Placement = PLAIN
) -> Float32[Array, "M D"]:
    """The embedding of the text in each row, of length 1: the mean of its hidden states, or its last one."""
    hidden = hidden_states(params, model, rows, placement).astype(jnp.float32)
    real = jnp.asarray(rows.segment_ids) > 0
    share = real & ~jnp.pad(real[:, 1:], ((0, 0), (0, 1))) if pooling == "last" else real
    pooled = jnp.einsum("mld,ml->md", hidden, share.astype(jnp.float32))
    return pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)


def info_nce(vectors: Float32[Array, "M D"], queries: int, temperature: float) -> LossSum:
    """Cross-entropy of choosing its own passage, for each query out of all passages (van den Oord et al., 2018).

    Args:
        vectors: of `Texts.rows`.
        queries: how many of them come first.
        temperature: that similarities are divided by.
    """
    q, passages = vectors[:queries], vectors[queries:]
    scores = jnp.matmul(q, passages.T, precision="highest") / temperature
    own = jnp.arange(queries) * (len(passages) // queries)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(scores, axis=-1), own[:, None], axis=-1)
    right = (scores.argmax(-1) == own).astype(jnp.float32).sum()
    return LossSum(losses.sum(), jnp.float32(queries), {"accuracy": right})


def contrastive_loss(
    model: Model, *, pooling: str = "mean", temperature: float = 0.05, placement: Placement = PLAIN
) -> Loss:
    """The loss of a model's weights on `Texts`; weighs every query 1."""

    def loss(params: Tree, frozen: Tree, texts: Texts) -> LossSum:
        del frozen
        vectors = embeddings(params, model, texts.rows(), pooling, placement)
        return info_nce(vectors, len(texts.queries.tokens), temperature)

    return loss


def cached_gradient(embed: Embed, temperature: float, chunk: int) -> Grad:
    """The gradient of `contrastive_loss` for a batch of any size, with the activations of `chunk` texts at a time.

    Every text is embedded twice: without a gradient, for that of the loss to the embeddings, and again to pass that on.
    """

    def grad(trainable: Tree, frozen: Tree, texts: Texts) -> tuple[LossSum, Tree]:
        rows = texts.rows()
        parts = jax.tree.map(lambda x: x.reshape(-1, chunk, x.shape[-1]), rows)
        vectors = jax.lax.map(lambda part: embed(trainable, frozen, part), parts)

        def total(vectors: jax.Array) -> tuple[jax.Array, LossSum]:
            flat = vectors.reshape(-1, vectors.shape[-1])
            sums = info_nce(flat, len(texts.queries.tokens), temperature)
            return sums.total, sums

        to_vectors, sums = jax.grad(total, has_aux=True)(vectors)

        def body(summed: Tree, given: tuple[Rows, jax.Array]) -> tuple[Tree, None]:
            part, to_part = given
            _, pull = jax.vjp(lambda trainable: embed(trainable, frozen, part), trainable)
            (gradients,) = pull(to_part)
            return jax.tree.map(lambda total, g: total + g.astype(jnp.float32), summed, gradients), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable)
        gradients, _ = jax.lax.scan(body, zeros, (parts, to_vectors))
        return sums, gradients

    return grad


# --- the recipe -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """One run of contrastive training.

    Attributes:
        tuning: the model, what of it is trained, and the run; rows of a batch are queries.
        dataset: rows with the texts "query" and "positive".
        negatives: how many hard negatives of each query are taken from its list "negatives".
        pooling: "mean" or "last".
        temperature: that similarities are divided by.
        chunk: texts whose activations are in memory at a time; None takes the whole batch at once.
    """

    tuning: TuningConfig
    dataset: Dataset
    negatives: int = 0
    pooling: str = "mean"
    temperature: float = 0.05
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ConfigError(f"pooling must be one of {', '.join(POOLINGS)}; it is {self.pooling!r}")
        if not self.temperature > 0 or self.negatives < 0:
            raise ConfigError("temperature must be positive, and negatives at least 0")
        if self.tuning.training.parallelism.micro_batches > 1:
            raise ConfigError(
                "parts of a batch would see their own passages only: leave gradient accumulation out, and take chunk, "
                "which gives the gradient of the whole batch"
            )
        if self.chunk is not None and self.tuning.lora is not None and self.tuning.lora.lora_dropout:
            raise ConfigError(
                "in chunks, texts are embedded twice, with nothing dropped: leave lora_dropout or chunk out"
            )
        texts = self.tuning.batch_size * (2 + self.negatives)
        if self.chunk is not None and (self.chunk < 1 or texts % self.chunk):
            raise ConfigError(f"chunk must divide the {texts} texts of a batch; it is {self.chunk}")


def read_texts(records: Records, tokenizer: Tokenizer, config: EmbedConfig) -> Texts:
    """All texts of a dataset, cut after `max_length` tokens.

    Raises DataError, naming the row, for what cannot be used.
    """
    length, pad_id = config.tuning.max_length, tokenizer.pad_token_id or 0
    end = [tokenizer.eos_token_id] if config.pooling == "last" and tokenizer.eos_token_id is not None else []

    def encode(text: Any, number: int) -> tuple[list[int], list[bool]]:
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{records.where(number)}: a query or passage is no text, or empty")
        ids = [*tokenizer.encode(text)[: length - len(end)], *end]
        return ids, [False] * len(ids)

    queries: list[Any] = []
    passages: list[Any] = []
    for number in range(len(records)):
        row = records[number]
        hard = _negatives(row, config.negatives, records.where(number))
        queries.append(encode(row["query"], number))
        passages += [encode(text, number) for text in (row["positive"], *hard)]
    flat = alone(passages, length, pad_id)
    shape = (len(queries), 1 + config.negatives, length)
    return Texts(alone(queries, length, pad_id), Rows(*(np.reshape(array, shape) for array in flat)))


def _negatives(row: Mapping[str, Any], count: int, where: str) -> Sequence[Any]:
    if not count:
        return ()
    found = row["negatives"]
    if len(found) < count:
        raise DataError(f"{where}: there are {len(found)} negatives, and {count} are wanted of each query")
    return found[:count]


def embed(config: EmbedConfig, output: Path) -> Trained:
    """Trains an encoder, and writes it, or its adapter, to `output`/model; started again, goes on.

    Raises:
        ConfigError, DataError, CheckpointError, TokenizerError, UnsupportedModelError: before the first step, if
            options do not fit each other, or data or the model cannot be used.
        TrainingError: as `train`.
    """
    tuning = config.tuning
    begun = start(tuning)
    begun.refuse_pipeline("a pipeline's micro-batches would see their own passages only")
    columns: dict[str, type] = {"query": str, "positive": str} | ({"negatives": list} if config.negatives else {})
    texts = read_texts(open_records(config.dataset.where, columns, split=config.dataset.split), begun.tokenizer, config)
    placement = begun.placement
    loss = contrastive_loss(begun.model, pooling=config.pooling, temperature=config.temperature, placement=placement)

    def embed_rows(trainable: Tree, frozen: Tree, rows: Rows) -> jax.Array:
        return embeddings(begun.weights(trainable, frozen), begun.model, rows, config.pooling, placement)

    grad = None if config.chunk is None else cached_gradient(embed_rows, config.temperature, config.chunk)
    index, shares = begun.layout.row_share
    batches = example_batches(texts, rows=tuning.batch_size // shares, seed=tuning.seed, share=(index, shares))
    with closing(batches):
        return begun.train(begun.job(loss, grad=grad), batches, output)
