"""The options that the recipes of fine-tuning share. Names are PEFT's where it has them."""

import functools
import inspect
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tenfold.base.builtin import BUILTIN_MODEL
from tenfold.base.errors import ConfigError
from tenfold.cli import training as options

if TYPE_CHECKING:
    from tenfold.train.adapters import TuningConfig
    from tenfold.train.trainer import TrainConfig

_ADAPTERS = "Adapters"


class Quantization(StrEnum):
    """How weights under adapters are rounded."""

    INT8 = "int8"
    INT4 = "int4"


class Format(StrEnum):
    """What a row of data is."""

    MESSAGES = "messages"
    PROMPT_COMPLETION = "prompt-completion"


Model = Annotated[
    str, typer.Option(help="A directory, a Hugging Face id or a URI of a checkpoint; if left out, pico, built in.")
]
Dataset = Annotated[
    str,
    typer.Option(
        help="A .jsonl, .parquet or .arrow file, or a directory of them; a path or URI.", rich_help_panel="Data"
    ),
]
FormatName = Annotated[
    Format,
    typer.Option(
        "--format",
        help="Rows of messages, as OpenAI's chat API has them; or of a prompt and a completion.",
        rich_help_panel="Data",
    ),
]
Lora = Annotated[
    bool, typer.Option("--lora", help="Train adapters of low rank, not all weights.", rich_help_panel=_ADAPTERS)
]
LoraR = Annotated[int, typer.Option(min=1, help="Their rank.", rich_help_panel=_ADAPTERS)]
LoraAlpha = Annotated[float, typer.Option(help="They are scaled by this / rank.", rich_help_panel=_ADAPTERS)]
LoraTargets = Annotated[
    list[str] | None,
    typer.Option(
        "--lora-target-modules",
        help="Name of modules to adapt, such as q_proj; may be repeated. Without, all linear layers.",
        rich_help_panel=_ADAPTERS,
    ),
]
UseDora = Annotated[
    bool, typer.Option("--use-dora", help="Train the lengths of outputs, too.", rich_help_panel=_ADAPTERS)
]
UseRslora = Annotated[bool, typer.Option("--use-rslora", help="Scale by alpha / √rank.", rich_help_panel=_ADAPTERS)]
LoraDropout = Annotated[
    float,
    typer.Option("--lora-dropout", help="Share of their inputs that they do not see.", rich_help_panel=_ADAPTERS),
]
QuantizationName = Annotated[
    Quantization | None,
    typer.Option("--quantization", help="Round the weights under adapters (QLoRA).", rich_help_panel=_ADAPTERS),
]


def tuning_config(
    training: "TrainConfig",
    model: Model = BUILTIN_MODEL,
    max_length: options.MaxLength = "1024",
    batch_size: options.BatchSize = 8,
    seed: options.Seed = 0,
    lora: Lora = False,
    lora_r: LoraR = 8,
    lora_alpha: LoraAlpha = 16.0,
    lora_target_modules: LoraTargets = None,
    use_dora: UseDora = False,
    use_rslora: UseRslora = False,
    lora_dropout: LoraDropout = 0.0,
    quantization: QuantizationName = None,
) -> "TuningConfig":
    """What the shared options describe."""
    from tenfold.cli.quantities import parse_count
    from tenfold.nn.lora import LoraConfig
    from tenfold.train.adapters import TuningConfig

    if not lora and (lora_target_modules or use_dora or use_rslora or lora_dropout):
        raise ConfigError(
            "--lora-target-modules, --lora-dropout, --use-dora and --use-rslora say how to adapt: add --lora"
        )
    adapters = LoraConfig(
        r=lora_r,
        lora_alpha=lora_alpha,
        target_modules=tuple(lora_target_modules) if lora_target_modules else None,
        use_dora=use_dora,
        use_rslora=use_rslora,
        lora_dropout=lora_dropout,
    )
    return TuningConfig(
        model=model,
        lora=adapters if lora else None,
        quantization=None if quantization is None else str(quantization),
        max_length=parse_count(max_length),
        batch_size=batch_size,
        seed=seed,
        training=training,
    )


def tunes(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of `tuning_config` and of training besides its own; it takes what comes of them as
    `tuning`.

    Args:
        defaults: of this command's training, where they are others, by the options' names.
    """
    parameters = inspect.signature(tuning_config).parameters.values()
    shared = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters if p.name != "training"]
    training = inspect.Parameter("training", inspect.Parameter.KEYWORD_ONLY)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            p.replace(kind=p.KEYWORD_ONLY) for p in inspect.signature(command).parameters.values() if p.name != "tuning"
        ]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            config = tuning_config(given.pop("training"), **{p.name: given.pop(p.name) for p in shared})
            command(**given, tuning=config)

        run.__signature__ = inspect.Signature([*own, *shared, training])  # pyright: ignore[reportAttributeAccessIssue]
        return options.trains(**defaults)(run)

    return decorate
