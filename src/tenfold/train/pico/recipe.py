"""The recipe of pico: a Llama of 7 M parameters that knows the standard library's docstrings by heart."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from tenfold.data import packing
from tenfold.data.packing import Rows
from tenfold.models.family import Model, resolve
from tenfold.nn import checkpoint
from tenfold.nn.param import Tree, initialize
from tenfold.train.checkpoints import CheckpointConfig
from tenfold.train.flops import flops_per_token
from tenfold.train.loss import full_training, hidden_states
from tenfold.train.optimizers import OptimizerConfig
from tenfold.train.pico import conversations, corpus, vocabulary
from tenfold.train.trainer import Job, TrainConfig, Trained, train

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": vocabulary.VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}
TRAINING = TrainConfig(
    steps=3600,
    optimizer=OptimizerConfig(
        learning_rate=1.5e-3, schedule="wsd", warmup_steps=100, decay_steps=1400, weight_decay=0.01, b2=0.98
    ),
    eval_steps=250,
    checkpoints=CheckpointConfig(save_steps=250),
)
TOKENS_PER_STEP = 2048
SHORT, LONG = 128, 512
LONG_FROM = 3200  # from this step on rows are long, so that pico reads contexts of LONG tokens too
SOURCE_SHARE = 0.25
QUESTIONS = 300  # drawn at random to measure recall


class PicoBatches:
    """Endless batches of 2,048 tokens: conversations, freshly drawn every epoch, and a share of source code.

    Going back to where another one stood draws all that came before again, in seconds.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer, self._seed = tokenizer, seed
        self.set_state({"drawn": 0})

    def __next__(self) -> Rows:
        L = SHORT if self._drawn < LONG_FROM else LONG
        n = TOKENS_PER_STEP // L
        source = round(n * SOURCE_SHARE)
        chat_rows, source_rows = self._streams[L]
        drawn = [next(chat_rows) for _ in range(n - source)] + [next(source_rows) for _ in range(source)]
        self._drawn += 1
        return Rows(*(np.stack(arrays) for arrays in zip(*drawn, strict=True)))

    def get_state(self) -> dict[str, Any]:
        """As `Batches` has it."""
        return {"drawn": self._drawn}

    def set_state(self, state: dict[str, Any]) -> None:
        """As `Batches` has it."""
        t, seed = self._tokenizer, self._seed
        self._streams = {L: (_conversation_rows(t, L, seed), _source_rows(t, L, seed)) for L in (SHORT, LONG)}
        self._drawn = 0
        while self._drawn < state["drawn"]:
            next(self)

    def close(self) -> None:
        """As `Batches` has it: there are no threads."""


def _conversation_rows(tokenizer: Tokenizer, L: int, seed: int) -> Iterator[tuple[np.ndarray, ...]]:
    rng = random.Random(seed)
    pad = vocabulary.token_id(tokenizer, vocabulary.PAD)
    while True:
        encoded = [vocabulary.encode_conversation(tokenizer, c) for c in conversations.conversations(rng)]
        yield from _shuffled(packing.pack([e for e in encoded if len(e[0]) <= L], L, pad), rng)


def _source_rows(tokenizer: Tokenizer, L: int, seed: int) -> Iterator[tuple[np.ndarray, ...]]:
    rng = random.Random(seed)
    pad, bos = vocabulary.token_id(tokenizer, vocabulary.PAD), vocabulary.token_id(tokenizer, vocabulary.BOS)
    texts = (vocabulary.encode_source(tokenizer, text) for text in corpus.sources())
    rows = packing.pack([piece for ids in texts for piece in packing.chunk(ids, bos, L)], L, pad)
    while True:
        yield from _shuffled(rows, rng)


def _shuffled(rows: Rows, rng: random.Random) -> Iterator[tuple[np.ndarray, ...]]:
    order = list(range(len(rows.tokens)))
    rng.shuffle(order)
    for i in order:
        yield tuple(array[i] for array in rows)


class Recall:
    """The share of questions whose whole answer is the most likely one, token by token: what greedy decoding says."""

    def __init__(self, model: Model, tokenizer: Tokenizer, questions: list[tuple[str, str]]) -> None:
        encoded = [vocabulary.encode_conversation(tokenizer, conversations.conversation(q, a)) for q, a in questions]
        rows = packing.pack(encoded, 256, vocabulary.token_id(tokenizer, vocabulary.PAD))
        self._rows, self._total = rows, len(questions)

        def predict(params: Tree) -> jax.Array:
            hidden = hidden_states(params, model, rows)
            return model.logits(params, hidden.reshape(-1, hidden.shape[-1])).argmax(-1).reshape(rows.tokens.shape)

        self._predict = jax.jit(predict)

    def __call__(self, params: Tree) -> dict[str, float]:
        """{"recall": share from 0 to 1}"""
        predicted = np.asarray(self._predict(params))[:, :-1]
        wrong = (predicted != self._rows.tokens[:, 1:]) & (self._rows.weights[:, 1:] > 0)
        missed = {(r, self._rows.segment_ids[r, s + 1]) for r, s in np.argwhere(wrong)}
        return {"recall": 1 - len(missed) / self._total}


def build_model() -> Model:
    """pico's architecture."""
    return resolve(CONFIG)


def make(output: Path, *, seed: int = 0) -> Trained:
    """Trains pico and writes its checkpoint to `output`/model, with the events and the plots beside it."""
    directory = output / "model"
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = vocabulary.train_tokenizer()
    vocabulary.write_tokenizer(tokenizer, directory)
    questions = corpus.held_out(seed, QUESTIONS)
    (output / "questions.json").write_text(json.dumps(questions, indent=0, ensure_ascii=False))
    model = build_model()
    declared = model.params(stacked=True)
    job = Job(
        loss=full_training(model),
        declared=declared,
        initial=lambda: initialize(declared, jax.random.key(seed), jnp.float32),
        flops_per_token=flops_per_token(model, SHORT),
    )
    trained = train(job, TRAINING, PicoBatches(tokenizer, seed), output, evaluate=Recall(model, tokenizer, questions))
    if trained.finished:
        checkpoint.export(
            directory,
            declared,
            trained.state.trainable,
            config=CONFIG,
            dtype=jnp.bfloat16,
            generation_config=vocabulary.generation_config(tokenizer),
        )
    return trained
