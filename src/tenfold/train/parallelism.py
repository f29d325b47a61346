"""How a run is spread over devices and memories: the options of recipes, and the gradient that they make of a loss."""

from dataclasses import dataclass

import jax

from tenfold.base.errors import ConfigError
from tenfold.nn.param import Tree
from tenfold.nn.stack import Placement, Remat
from tenfold.parallel.layout import NOWHERE, Layout
from tenfold.parallel.mesh import parse_mesh
from tenfold.parallel.schedule import Schedule, make_schedule
from tenfold.parallel.sharding import make_mesh
from tenfold.train.loss import StagedLoss
from tenfold.train.pipeline import AXIS, pipelined
from tenfold.train.step import Grad, accumulate


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """The options of a run.

    Attributes:
        mesh: axes and sizes, such as "data=2,fsdp=4"; "" is one device.
        remat: what of a layer's activations is kept for the gradient: "none" computes nothing again, "full" all but
            what goes into a layer, "dots" all but the results of products, which "offload" keeps on the host.
        unroll: compile every layer by itself: faster steps, most of all on GPUs, after a longer compilation.
        schedule: of a pipeline's micro-batches, one of `parallel.schedule.SCHEDULES`.
        stages: of each device of a pipeline; more than one with "interleaved" only.
        micro_batches: parts that a batch's rows are cut into; gradients are summed over them, one after the other.
        offload_optimizer: keep the optimizer's state on the host between steps.
    """

    mesh: str = ""
    remat: Remat = "none"
    unroll: bool = False
    schedule: str = "gpipe"
    stages: int = 1
    micro_batches: int = 1
    offload_optimizer: bool = False

    def __post_init__(self) -> None:
        if self.micro_batches < 1 or self.stages < 1:
            raise ConfigError("micro_batches and stages must be at least 1")

    def make_placement(self, *, fp8: bool = False) -> Placement:
        """Where activations lie on this machine's devices. Raises ConfigError if the mesh is not one of them."""
        layout = Layout(make_mesh(parse_mesh(self.mesh, jax.device_count()))) if self.mesh else NOWHERE
        return Placement(layout=layout, remat=self.remat, unroll=self.unroll, fp8=fp8)

    def make_schedule(self, layout: Layout) -> Schedule | None:
        """The schedule of the mesh's pipeline; None without one. Raises ConfigError if its numbers do not fit."""
        devices = layout.size(AXIS)
        if devices > 1:
            return make_schedule(self.schedule, devices, self.micro_batches, self.stages)
        if self.stages > 1 or self.schedule != Parallelism.schedule:
            raise ConfigError(
                f"the mesh {self.mesh!r} has no pipeline to run by the schedule {self.schedule!r} in {self.stages} "
                f"stages: add {AXIS}=2 to it, or leave these out"
            )
        return None

    def make_grad(
        self, loss: StagedLoss, placement: Placement, shardings: Tree = None, frozen_shardings: Tree = None
    ) -> Grad:
        """The gradient of a loss, by a pipeline where the mesh has one.

        Args:
            loss: what to differentiate.
            placement: as `make_placement` gives it.
            shardings: of the trained weights.
            frozen_shardings: of the others.
        """
        schedule = self.make_schedule(placement.layout)
        if schedule is None:
            return accumulate(lambda t, f, batch: loss.sums(t, f, batch, placement), self.micro_batches)
        return pipelined(loss, schedule, placement, shardings, frozen_shardings)
