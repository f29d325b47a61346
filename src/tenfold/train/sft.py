"""The recipe of supervised fine-tuning: next-token prediction of answers, in conversations or after prompts."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold.base.errors import ConfigError
from tenfold.data.packing import Example
from tenfold.data.records import open_records
from tenfold.data.supervision import encode_completion, encode_conversation
from tenfold.data.tokenizer import Tokenizer
from tenfold.train.adapters import Start, TuningConfig, start
from tenfold.train.batches import Batches, Encode, Source, packed_batches
from tenfold.train.evaluation import Perplexity
from tenfold.train.loss import full_training, staged_full_training
from tenfold.train.pretrain import Dataset
from tenfold.train.trainer import Trained

FORMATS: dict[str, dict[str, type]] = {
    "messages": {"messages": list},
    "prompt-completion": {"prompt": str, "completion": str},
}
"""What a row of data is, and its columns."""


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """One run of supervised fine-tuning.

    Attributes:
        tuning: the model, what of it is trained, and the run.
        datasets: mixed by weight.
        validation: held-out data, on which the perplexity of answers is measured.
        format: "messages": conversations in the shape of OpenAI's chat API, by the model's chat template;
            "prompt-completion": two texts.
        eval_batches: that perplexity is measured on.
    """

    tuning: TuningConfig
    datasets: tuple[Dataset, ...]
    validation: Dataset | None = None
    format: str = "messages"
    eval_batches: int = 4

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"format must be one of {', '.join(FORMATS)}; it is {self.format!r}")
        if not self.datasets:
            raise ConfigError("there is nothing to train on: name a dataset")


def encode_answers(tokenizer: Tokenizer, kind: str, length: int) -> Encode:
    """What makes an example of a row of data in one of `FORMATS`; only answers are predicted."""

    def encode(row: Mapping[str, Any]) -> Sequence[Example]:
        if kind == "messages":
            return encode_conversation(tokenizer, row["messages"], length)
        return encode_completion(tokenizer, row["prompt"], row["completion"], length)

    return encode


def sft(config: SftConfig, output: Path) -> Trained:
    """Trains a model to answer, and writes it, or its adapter, to `output`/model; started again, goes on.

    Raises:
        ConfigError, DataError, CheckpointError, TokenizerError, UnsupportedModelError: before the first step, if
            options do not fit each other, or data or the model cannot be used.
        TrainingError: as `train`.
    """
    begun = start(config.tuning)
    job = begun.job(full_training(begun.model, begun.placement), staged=staged_full_training(begun.model))
    evaluate = None
    if config.validation is not None:
        with answer_batches(config, begun, (config.validation,)) as held_out:
            measured = [next(held_out) for _ in range(config.eval_batches)]
        dtype = config.tuning.training.dtype
        evaluate = Perplexity(job.loss, measured, frozen=job.frozen, layout=begun.layout, dtype=dtype)
    with answer_batches(config, begun, config.datasets) as batches:
        return begun.train(job, batches, output, evaluate=evaluate)


@contextmanager
def answer_batches(config: SftConfig, begun: Start, datasets: tuple[Dataset, ...]) -> Generator[Batches]:
    """Batches of packed rows in which answers are weighed; their threads end with the block.

    Raises ConfigError and DataError as `sft`.
    """
    tuning, (index, shares) = config.tuning, begun.layout.row_share
    if config.format == "messages" and not begun.tokenizer.has_chat_template:
        raise ConfigError(
            f"{begun.path} has no chat template: put one into its tokenizer_config.json, or train on prompts and "
            "completions"
        )
    encode = encode_answers(begun.tokenizer, config.format, tuning.max_length)
    sources = [
        Source(
            name=dataset.where,
            records=open_records(dataset.where, FORMATS[config.format], split=dataset.split),
            encode=encode,
            weight=dataset.weight,
        )
        for dataset in datasets
    ]
    batches = packed_batches(
        sources,
        rows=tuning.batch_size // shares,
        length=tuning.max_length,
        seed=tuning.seed,
        pad_id=begun.tokenizer.pad_token_id or 0,
        share=(index, shares),
    )
    with closing(batches):
        yield batches
