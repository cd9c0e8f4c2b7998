"""`PipelineModule`: a sequence of layers, sharded over ranks, that trains like one module."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from hvdkit.api import context
from hvdkit.dtypes import Average
from hvdkit.errors import ArgumentError
from hvdkit.parallel import checkpoint
from hvdkit.parallel.mesh import DATA, Mesh
from hvdkit.parallel.partition import Partition
from hvdkit.parallel.pipeline.executor import Edge
from hvdkit.parallel.pipeline.pipeline import Pipeline
from hvdkit.parallel.pipeline.split import Wishes, split_layers
from hvdkit.parallel.pipeline.ties import Tie, check_ties, layer_of, merged
from hvdkit.torch.gradients import Gradients, Settings
from hvdkit.torch.movements import broadcast_
from hvdkit.torch.pipeline.batches import joined, rows_of, split
from hvdkit.torch.pipeline.layers import Layer, made, skips_of
from hvdkit.torch.pipeline.saving import (
    arrays_of,
    hyperparameters,
    set_hyperparameters,
    take,
    wanted_of,
)
from hvdkit.torch.pipeline.splitting import counted, measured
from hvdkit.torch.pipeline.ties import Ties, shapes_of, ties_of
from hvdkit.torch.pipeline.worker import Loss, Microbatch, Stage, TorchWorker

#: More backward passes than a step has: gradients wait for the end of the step.
_AT_THE_END = 1 << 60


class PipelineModule(torch.nn.Module):
    """A sequence of layers, sharded over the ``pipeline`` axis of a mesh.  Collective.

    Calling it with a batch and its targets trains: forward and backward of all microbatches, by the
    schedule; gradients averaged over the ``data`` axis in buckets, while the pipeline drains.  It
    returns the batch's loss.  On one rank it does the same by itself.

        model = hvd.PipelineModule(layers, loss, mesh=hvdkit.Mesh(data=2, pipeline=2))
        optimizer = torch.optim.AdamW(model.parameters())
        for x, y in batches:                 # of this rank's place along ``data``
            optimizer.zero_grad()
            loss = model(x, y)
            model.clip_grad_norm_(1.0)
            optimizer.step()

    ``parameters()`` are those of this rank's layers (a rank whose layers have none needs no
    optimizer); in ``state_dict()`` they have the names that
    they have in the whole sequence, ``layers.<number>.<name>``.

    Args:
        layers: an ``nn.Sequential``, or a list of modules or of functions that make one.  A rank
            calls those of its own layers, and all once under ``torch.device("meta")``, where a
            module has shapes but no data.  A layer takes what the one before returns, a
            tensor or a tuple of them; `Stash` and `Pop` make skip connections.
        loss: ``loss(output, target)``, a mean over the batch's first dimension.
        mesh: with the axes ``pipeline`` and, perhaps, ``data``; None: all ranks in one pipeline.
        schedule: ``"gpipe"``, ``"1f1b"``, ``"interleaved"`` or ``"zb-h1"``.
        microbatches: into which a batch is cut; fewer if it has fewer rows.
        chunks: stages of a rank, for ``"interleaved"``.
        partition: ``"parameters"``: stages with the least possible largest number of these;
            ``"time"``: with the least possible largest time, as measured in a dry run on `example`;
            or the number of layers of each stage.
        example: a microbatch's input, for ``partition="time"``.
        speeds: of each rank of a pipeline, relative; None: all alike.
        memory_limit: bytes that a rank may hold of parameters, gradients, optimizer state and, as
            far as measured, activations; None: no limit.
        optimizer_state: what the optimizer keeps for each element of a parameter, in elements; of
            Adam 2.
        recompute: whether activations are computed again in backward instead of held.  Layers that
            count what they see, as BatchNorm does, then count it twice.
        tied: names of parameters that are one, such as ``("layers.0.weight", "layers.7.weight")``;
            those of modules that share one are found without being told.
        seed: for the weights of layers that are yet to be made: the same however many ranks.
        device: where this rank computes.

    Raises:
        ArgumentError: what cannot be split so, or does not fit; shows the sizes.
    """

    def __init__(
        self,
        layers: torch.nn.Sequential | Sequence[Layer],
        loss: Loss,
        *,
        mesh: Mesh | None = None,
        schedule: str = "1f1b",
        microbatches: int = 4,
        chunks: int = 1,
        partition: str | Sequence[int] = "parameters",
        example: Any = None,
        speeds: Sequence[float] | None = None,
        memory_limit: float | None = None,
        optimizer_state: float = 2.0,
        recompute: bool = False,
        tied: Sequence[Tie] = (),
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        pipeline = self._pipeline = Pipeline(mesh, schedule, microbatches, chunks)
        self.mesh = pipeline.mesh
        every = list(layers)
        with torch.device("meta"):
            known = [made(layer, index, None) for index, layer in enumerate(every)]
        ties = merged([*ties_of(every), *tied])
        check_ties(ties, shapes_of(known))
        self.partition: Partition = split_layers(
            Wishes(
                how=partition,
                stages=pipeline.stages,
                ranks=pipeline.ranks,
                speeds=speeds,
                limit=memory_limit,
                in_flight=pipeline.in_flight,
            ),
            partial(counted, known, state=optimizer_state),
            None
            if example is None
            else partial(
                measured, every, example, state=optimizer_state, seed=seed, recompute=recompute
            ),
        )
        """Which layers each stage has."""
        self.layers = torch.nn.ModuleDict(
            {
                str(index): made(every[index], index, seed).to(device)
                for stage in pipeline.mine
                for index in self.partition.layers(stage)
            }
        )
        skips = pipeline.skips(skips_of(known), self.partition)
        self._worker = TorchWorker(
            stages={stage: self._stage(stage, skips) for stage in pipeline.mine},
            last=pipeline.stages - 1,
            loss=loss,
            recompute=recompute,
            deferred=pipeline.schedule.splits_backward,
            device=torch.device(device),
        )
        pipeline.open(self._worker, skips)
        self._ties = self._tie(ties)
        self._late = pipeline.schedule.splits_backward or self._shares_between_stages(ties)
        self._gradients = self._start_alike()

    # What it is made of

    def _stage(self, number: int, skips: list[Edge]) -> Stage:
        return Stage(
            {index: self.layers[str(index)] for index in self.partition.layers(number)},
            arriving=tuple(edge.label for edge in skips if edge.target == number),
            leaving=tuple(edge.label for edge in skips if edge.source == number),
        )

    def _tie(self, ties: list[Tie]) -> Ties:
        """Make shared parameters one on this rank, and alike on all."""
        for tie in ties:
            here = [name for name in tie if str(layer_of(name)) in self.layers]
            for name in here[1:]:
                module, _, attribute = name.rpartition(".")
                setattr(self.get_submodule(module), attribute, self.get_parameter(here[0]))
        holders = self._pipeline.holders(ties, self.partition)
        return Ties(holders, dict(self.named_parameters(remove_duplicate=False)), self.mesh.rank)

    def _shares_between_stages(self, ties: list[Tie]) -> bool:
        """Return whether a parameter of this rank gets gradients from several of its stages."""
        stages = [
            {self.partition.stage_of(layer_of(name)) for name in tie} & set(self._pipeline.mine)
            for tie in ties
        ]
        return any(len(mine) > 1 for mine in stages)

    def _start_alike(self) -> Gradients | None:
        """Give the ranks along ``data`` the same weights; return what averages gradients there."""
        if not self._pipeline.replicated:
            return None
        process_set = self.mesh.process_set(DATA)
        root = self.mesh.rank_at(**{DATA: 0})
        with torch.no_grad():
            for name, tensor in self.state_dict().items():
                broadcast_(tensor, root, name=name, process_set=process_set)
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        if not named:
            return None
        names, parameters = zip(*named, strict=True)
        settings = Settings(op=Average, process_set=process_set)
        return Gradients(parameters, names, settings, passes=1)

    # Training

    def forward(
        self,
        inputs: Any,
        target: Any,
        *,
        scale: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Train on a batch: leave gradients in ``.grad``, and return the loss.  Collective.

        In `eval` mode nothing is trained: as `evaluate`.

        Args:
            inputs: of the first layer: a tensor, or a tuple, list or dict of them, whose first
                dimension is the batch's; the same on all ranks of a pipeline.
            target: for the loss, likewise.
            scale: of losses before backward, such as ``scaler.scale`` of torch.amp.GradScaler; if
                gradients then overflow on one rank, they do on all.

        Returns:
            The mean of the loss over the batch, and over the ranks along ``data``.
        """
        if not self.training:
            return self.evaluate(inputs, target)
        batches = self._cut(inputs, target)
        count = len(batches)
        worker = self._worker
        worker.microbatches, worker.training, worker.scale = batches, True, scale
        if scale is not None:
            scale(torch.zeros((), device=worker.device))  # a scaler must have seen a loss
        self._ties.begin()
        if self._gradients is not None:
            self._gradients.set_passes(_AT_THE_END if self._late else count)
        try:
            self._pipeline.train(count)
        finally:
            worker.forget()
            worker.microbatches = ()
        if self._gradients is not None:
            self._gradients.finish()
        self._ties.add_up()
        if scale is not None:
            self._overflow_alike()
        return self._total(batches)

    def evaluate(self, inputs: Any, target: Any) -> torch.Tensor:
        """Return the loss of a batch as training would, without a backward.  Collective."""
        return self._total(self._look(inputs, target))

    def predict(self, inputs: Any) -> Any:
        """Return the last layer's output of a batch, on every rank of the pipeline.  Collective."""
        batches = self._look(inputs, None)
        last = self._pipeline.has_last
        return self._pipeline.from_last(
            joined([batch.output for batch in batches]) if last else None
        )

    @torch.no_grad()
    def generate(
        self,
        tokens: torch.Tensor,
        length: int,
        *,
        window: int | None = None,
        choose: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits.argmax(-1),
    ) -> torch.Tensor:
        """Return `tokens` with `length` more, each chosen by what the model says.  Collective.

        Args:
            tokens: int64 (batch, n); the same on all ranks of a pipeline.
            length: how many more.
            window: the most that the model takes; None: all.
            choose: of logits (batch, vocabulary), the next tokens (batch,); if it draws, it draws
                the same on all ranks.
        """
        for _ in range(length):
            seen = tokens if window is None else tokens[:, -window:]
            tokens = torch.cat([tokens, choose(self.predict(seen)[:, -1]).unsqueeze(1)], dim=1)
        return tokens

    def _look(self, inputs: Any, target: Any) -> list[Microbatch]:
        """Run a batch forward, and return what came of its microbatches."""
        batches = self._cut(inputs, target)
        worker = self._worker
        worker.microbatches, worker.training = batches, False
        were_training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            self._pipeline.look(len(batches))
        finally:
            for module in were_training:
                module.training = True
            worker.microbatches = ()
        return batches

    def _cut(self, inputs: Any, target: Any) -> list[Microbatch]:
        rows = rows_of(inputs)
        count = min(self._pipeline.microbatches, rows)
        if target is not None and rows_of(target) != rows:
            raise ArgumentError(f"a batch of {rows} rows with targets of {rows_of(target)}")
        targets = split(target, count) if target is not None else [None] * count
        return [
            Microbatch(part, wanted, rows_of(part) / rows)
            for part, wanted in zip(split(inputs, count), targets, strict=True)
        ]

    def _total(self, batches: Sequence[Microbatch]) -> torch.Tensor:
        """Return the loss of all microbatches, on every rank."""
        losses = [float(batch.loss.detach()) for batch in batches if batch.loss is not None]
        return torch.tensor(self._pipeline.total(sum(losses)))

    # Gradients

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale all gradients so that their norm together is at most `max_norm`.  Collective.

        Returns:
            The 2-norm before, of the whole model's gradients.
        """
        squares = sum(
            float(parameter.grad.double().square().sum())
            for parameter in self.parameters()
            if parameter.grad is not None and id(parameter) not in self._ties.copies
        )
        norm = math.sqrt(self._pipeline.over_stages(squares))
        factor = max_norm / (norm + 1e-6)
        if factor < 1:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        return torch.tensor(norm)

    def _overflow_alike(self) -> None:
        """Spoil this rank's gradients if another's are spoilt, so that all skip the step."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
        spoilt = self._pipeline.any_stage(not finite)
        if spoilt and finite and gradients:
            gradients[0].fill_(float("inf"))

    # Checkpoints

    def save(
        self,
        folder: str | os.PathLike[str],
        optimizer: torch.optim.Optimizer | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a sharded checkpoint, which loads into another mesh as well.  Collective.

        Args:
            folder: on a file system that all ranks share; see `hvdkit.parallel.checkpoint.save`.
            optimizer: over `parameters()`, whose state is written as well.
            metadata: whatever else, as JSON has it.

        Raises:
            CheckpointError: a rank could not write; the older checkpoint stays.
        """
        replica = self.mesh.place(DATA) > 0
        arrays = {} if replica else arrays_of(self, optimizer)
        written = {"mesh": self.mesh.shape, "optimizer": hyperparameters(optimizer)}
        written["user"] = dict(metadata or {})
        checkpoint.save(folder, arrays, among=context().world, metadata=written)

    def load(
        self, folder: str | os.PathLike[str], optimizer: torch.optim.Optimizer | None = None
    ) -> dict[str, Any]:
        """Read what `save` wrote, from whatever mesh; return its `metadata`.  Collective.

        Raises:
            CheckpointError: it is not there, not whole, or of another model.
        """
        index = checkpoint.read_index(folder)
        arrays = checkpoint.load(folder, wanted_of(self, optimizer, index))
        take(arrays, self, optimizer)
        set_hyperparameters(optimizer, index.metadata["optimizer"])
        context().world.barrier()  # whoever saves next sweeps away what others still read
        user: dict[str, Any] = index.metadata["user"]
        return user
