"""`tenfold train sft`: supervised fine-tuning on conversations."""

from typing import TYPE_CHECKING

from tenfold.cli import training as options
from tenfold.cli.tuning import Format, FormatName, tunes

if TYPE_CHECKING:
    from tenfold.train.adapters import TuningConfig


@tunes(learning_rate=2e-5, weight_decay=0.0)
def sft(
    output: options.Output,
    dataset: options.Datasets,
    tuning: "TuningConfig",
    dataset_weight: options.Weights = None,
    split: options.Split = "train",
    validation: options.Validation = None,
    format_name: FormatName = Format.MESSAGES,
) -> None:
    """Fine-tune on answers: the assistant's messages of conversations, by the model's own chat template."""
    from tenfold.train.pretrain import Dataset
    from tenfold.train.sft import SftConfig
    from tenfold.train.sft import sft as run

    weights = options.dataset_weights(dataset, dataset_weight)
    config = SftConfig(
        tuning=tuning,
        datasets=tuple(Dataset(where=d, weight=w, split=split) for d, w in zip(dataset, weights, strict=True)),
        validation=None if validation is None else Dataset(where=validation, split=split),
        format=str(format_name),
    )
    options.say_how_it_ended(run(config, output), output)
