"""The options that the recipes of `tenfold train` share, under the names that the trainer of transformers has for them.

A command takes them all at once, by `trains`, and those of `hosts`.
"""

import functools
import inspect
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tenfold.base import paths
from tenfold.base.errors import START_AGAIN, ConfigError
from tenfold.cli import hosts

if TYPE_CHECKING:
    from tenfold.train.parallelism import Parallelism
    from tenfold.train.trainer import TrainConfig, Trained

_DATA, _OPTIMIZER, _RUN = "Data", "Optimizer", "Run"


class Optim(StrEnum):
    """Optimizers."""

    ADAMW = "adamw"
    ADAFACTOR = "adafactor"
    MUON = "muon"


class Scheduler(StrEnum):
    """What the learning rate does after its warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"
    WSD = "wsd"


class Dtype(StrEnum):
    """What losses are computed in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Remat(StrEnum):
    """What of a layer's activations is kept for the gradient."""

    NONE = "none"
    FULL = "full"
    DOTS = "dots"
    OFFLOAD = "offload"


class PipelineSchedule(StrEnum):
    """When a pipeline's stages compute what."""

    GPIPE = "gpipe"
    ONE_FORWARD_ONE_BACKWARD = "1f1b"
    INTERLEAVED = "interleaved"


class OnBadStep(StrEnum):
    """What a loss that is no number, or a spike, leads to."""

    STOP = "stop"
    SKIP = "skip"


Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        help="Directory for the model, its checkpoints, events and plots. A run that was started there goes on.",
    ),
]

# --- data ------------------------------------------------------------------------------------------------------------

Datasets = Annotated[
    list[str],
    typer.Option(
        "--dataset",
        help="A .txt, .jsonl, .parquet or .arrow file, or a directory of them; a path or URI. May be repeated.",
        rich_help_panel=_DATA,
    ),
]
Weights = Annotated[
    list[float] | None,
    typer.Option("--dataset-weight", help="Share of each --dataset's tokens, in their order.", rich_help_panel=_DATA),
]
Split = Annotated[str, typer.Option(help="Split of a dataset that has several.", rich_help_panel=_DATA)]
Validation = Annotated[
    str | None, typer.Option(help="Held-out data to evaluate on, like --dataset.", rich_help_panel=_DATA)
]
MaxLength = Annotated[str, typer.Option(help="Tokens of a row, such as 1024 or 4K.", rich_help_panel=_DATA)]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows of a step, over all devices.", rich_help_panel=_DATA)]
Seed = Annotated[int, typer.Option(help="Of random weights and of the order of the data.", rich_help_panel=_DATA)]

# --- the optimizer ---------------------------------------------------------------------------------------------------

MaxSteps = Annotated[int, typer.Option(min=1, help="Steps of the optimizer.", rich_help_panel=_OPTIMIZER)]
OptimName = Annotated[Optim, typer.Option(help="The optimizer.", rich_help_panel=_OPTIMIZER)]
LearningRate = Annotated[float, typer.Option(help="The peak.", rich_help_panel=_OPTIMIZER)]
SchedulerType = Annotated[Scheduler, typer.Option(help="After the warm-up.", rich_help_panel=_OPTIMIZER)]
WarmupSteps = Annotated[int, typer.Option(min=0, help="Of a linear warm-up.", rich_help_panel=_OPTIMIZER)]
DecaySteps = Annotated[int, typer.Option(min=0, help="Of wsd's fall at the end.", rich_help_panel=_OPTIMIZER)]
MinLrRatio = Annotated[float, typer.Option(help="What of the peak is left at the end.", rich_help_panel=_OPTIMIZER)]
WeightDecay = Annotated[float, typer.Option(help="Not of norms and biases.", rich_help_panel=_OPTIMIZER)]
AdamBeta1 = Annotated[float, typer.Option("--adam-beta1", help="b1.", rich_help_panel=_OPTIMIZER)]
AdamBeta2 = Annotated[float, typer.Option("--adam-beta2", help="b2.", rich_help_panel=_OPTIMIZER)]
MaxGradNorm = Annotated[
    float, typer.Option(help="The gradient's norm is cut to this; 0 leaves it.", rich_help_panel=_OPTIMIZER)
]

# --- the run ---------------------------------------------------------------------------------------------------------

Accumulation = Annotated[
    int,
    typer.Option(
        "--gradient-accumulation-steps", min=1, help="Parts of a batch, one after the other.", rich_help_panel=_RUN
    ),
]
DtypeName = Annotated[
    Dtype, typer.Option(help="That losses are computed in; weights are kept in float32.", rich_help_panel=_RUN)
]
Fp8 = Annotated[
    bool,
    typer.Option("--fp8", help="Products of linear layers, and their gradients, in 8 bits.", rich_help_panel=_RUN),
]
Mesh = Annotated[
    str, typer.Option(help='Axes and sizes, such as "data=2,fsdp=4"; without, one device.', rich_help_panel=_RUN)
]
RematName = Annotated[
    Remat,
    typer.Option(
        help="Compute again for the gradient: nothing, full layers, all but dots, or these with dots on the host.",
        rich_help_panel=_RUN,
    ),
]
UnrollLayers = Annotated[
    bool,
    typer.Option(
        "--unroll-layers",
        help="Compile every layer by itself: faster steps, most of all on GPUs, after a longer compilation.",
        rich_help_panel=_RUN,
    ),
]
ScheduleName = Annotated[
    PipelineSchedule,
    typer.Option(help="Of a pipeline, over the parts that gradients are added of.", rich_help_panel=_RUN),
]
Stages = Annotated[
    int,
    typer.Option(
        "--pipeline-stages", min=1, help="Of each device; two or more with interleaved.", rich_help_panel=_RUN
    ),
]
OffloadOptimizer = Annotated[
    bool,
    typer.Option(
        "--offload-optimizer", help="Keep the optimizer's state on the host between steps.", rich_help_panel=_RUN
    ),
]
Plan = Annotated[
    bool, typer.Option("--plan", help="Say what a step takes of each device, and stop.", rich_help_panel=_RUN)
]
SaveSteps = Annotated[int, typer.Option(min=1, help="Steps between checkpoints.", rich_help_panel=_RUN)]
SaveTotalLimit = Annotated[int, typer.Option(min=1, help="Latest checkpoints to keep.", rich_help_panel=_RUN)]
BestMetric = Annotated[
    str | None,
    typer.Option(
        "--metric-for-best-model",
        help="Keep the best checkpoint by it, too, such as eval_loss; the smaller, the better.",
        rich_help_panel=_RUN,
    ),
]
CheckpointDir = Annotated[
    str | None,
    typer.Option(
        help="Where, if not in --output; also a file://, gs://, s3:// or az:// URI. To an object store, what "
        "--output has is then copied, too, when the run ends; so hosts need not share that.",
        rich_help_panel=_RUN,
    ),
]
EvalSteps = Annotated[int, typer.Option(min=1, help="Steps between evaluations.", rich_help_panel=_RUN)]
BadStep = Annotated[
    OnBadStep,
    typer.Option(help="Of a loss that is no number: stop, or go back and skip its batch.", rich_help_panel=_RUN),
]
LossSpike = Annotated[
    float | None,
    typer.Option(help="So many standard deviations above the last losses is bad, too.", rich_help_panel=_RUN),
]
ReportTo = Annotated[
    list[str] | None, typer.Option(help="tensorboard or mlflow. May be repeated.", rich_help_panel=_RUN)
]
Profile = Annotated[
    str | None, typer.Option(help="First and last step of a profile, such as 10:12.", rich_help_panel=_RUN)
]


def parallelism_config(
    mesh: Mesh = "",
    gradient_accumulation_steps: Accumulation = 1,
    remat: RematName = Remat.NONE,
    unroll_layers: UnrollLayers = False,
    pipeline_schedule: ScheduleName = PipelineSchedule.GPIPE,
    pipeline_stages: Stages = 1,
    offload_optimizer: OffloadOptimizer = False,
) -> "Parallelism":
    """How the run is spread that the shared options describe."""
    from tenfold.train.parallelism import Parallelism

    return Parallelism(
        mesh=mesh,
        remat=remat.value,
        unroll=unroll_layers,
        schedule=str(pipeline_schedule),
        stages=pipeline_stages,
        micro_batches=gradient_accumulation_steps,
        offload_optimizer=offload_optimizer,
    )


def train_config(
    parallelism: "Parallelism",
    max_steps: MaxSteps = 1000,
    optim: OptimName = Optim.ADAMW,
    learning_rate: LearningRate = 3e-4,
    lr_scheduler_type: SchedulerType = Scheduler.COSINE,
    warmup_steps: WarmupSteps = 0,
    decay_steps: DecaySteps = 0,
    min_lr_ratio: MinLrRatio = 0.0,
    weight_decay: WeightDecay = 0.1,
    adam_beta1: AdamBeta1 = 0.9,
    adam_beta2: AdamBeta2 = 0.95,
    max_grad_norm: MaxGradNorm = 1.0,
    dtype: DtypeName = Dtype.FLOAT32,
    fp8: Fp8 = False,
    save_steps: SaveSteps = 500,
    save_total_limit: SaveTotalLimit = 3,
    metric_for_best_model: BestMetric = None,
    checkpoint_dir: CheckpointDir = None,
    eval_steps: EvalSteps = 500,
    on_bad_step: BadStep = OnBadStep.STOP,
    loss_spike: LossSpike = None,
    report_to: ReportTo = None,
    profile: Profile = None,
) -> "TrainConfig":
    """The run that the shared options describe."""
    from tenfold.train.checkpoints import CheckpointConfig
    from tenfold.train.guard import GuardConfig
    from tenfold.train.optimizers import OptimizerConfig
    from tenfold.train.trainer import TrainConfig

    return TrainConfig(
        steps=max_steps,
        optimizer=OptimizerConfig(
            optimizer=str(optim),
            learning_rate=learning_rate,
            schedule=str(lr_scheduler_type),
            warmup_steps=warmup_steps,
            decay_steps=decay_steps,
            min_lr_ratio=min_lr_ratio,
            weight_decay=weight_decay,
            b1=adam_beta1,
            b2=adam_beta2,
            max_grad_norm=max_grad_norm or None,
        ),
        parallelism=parallelism,
        dtype=str(dtype),
        fp8=fp8,
        eval_steps=eval_steps,
        checkpoints=CheckpointConfig(
            save_steps=save_steps, save_total_limit=save_total_limit, metric_for_best_model=metric_for_best_model
        ),
        checkpoint_dir=checkpoint_dir,
        guard=GuardConfig(on_bad_step=str(on_bad_step), spike=loss_spike),
        report_to=tuple(report_to or ()),
        profile=_parse_profile(profile),
    )


def trains(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of `parallelism_config` and `train_config` besides its own; it takes what comes of
    them as `training`.

    It also has the options of `hosts.send`, by which it runs elsewhere. Here it is one of the hosts of the environment.

    Args:
        defaults: of this command, where they are others, by the options' names.
    """
    spread, run_options = (
        [
            p.replace(default=defaults.get(p.name, p.default), kind=p.KEYWORD_ONLY)
            for p in inspect.signature(config).parameters.values()
            if p.name != "parallelism"
        ]
        for config in (parallelism_config, train_config)
    )
    shared = [*run_options, *spread]
    sending = [
        p.replace(kind=p.KEYWORD_ONLY, annotation=typer.Context if p.name == "context" else p.annotation)
        for p in inspect.signature(hosts.send).parameters.values()
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            p.replace(kind=p.KEYWORD_ONLY)
            for p in inspect.signature(command).parameters.values()
            if p.name != "training"
        ]

        def run(**given: Any) -> None:
            if hosts.send(**{p.name: given.pop(p.name) for p in sending}):
                return
            parallelism = parallelism_config(**{p.name: given.pop(p.name) for p in spread})
            training = train_config(parallelism, **{p.name: given.pop(p.name) for p in run_options})
            kept = None if given.get("plan") else training.checkpoint_dir
            with hosts.as_one(), hosts.output_kept(given["output"], kept):
                command(**given, training=training)

        made: Any = functools.update_wrapper(run, command)
        made.__signature__ = inspect.Signature([*own, *shared, *sending])
        made.__annotations__ = {p.name: p.annotation for p in (*own, *shared, *sending)}  # what typer reads
        return made

    return decorate


def _parse_profile(text: str | None) -> tuple[int, int] | None:
    """The steps of "N:M".

    Raises:
        ConfigError: it is not such a text.
    """
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal()):
        raise ConfigError(f"--profile takes steps N:M, such as 10:12, not {text!r}")
    return int(first), int(last)


def dataset_weights(datasets: list[str], weights: list[float] | None) -> list[float]:
    """A weight for each dataset.

    Raises:
        ConfigError: there are some, and not as many as datasets.
    """
    if not weights:
        return [1.0] * len(datasets)
    if len(weights) != len(datasets):
        raise ConfigError(f"there are {len(datasets)} --dataset and {len(weights)} --dataset-weight; give one for each")
    return weights


def say_how_it_ended(trained: "Trained", output: Path) -> None:
    """The last line of a command that trains; and if something else started it on hosts, so that it may do so again,
    the exit status of one that is not done."""
    if trained.finished:
        print(f"The model is in {output / 'model'}. Serve it with: tenfold serve {output / 'model'}")
    else:
        print(f"Stopped after step {int(trained.state.step)}, with a checkpoint. The same command goes on from there.")
        if paths.cluster() is not None:
            raise typer.Exit(START_AGAIN)
