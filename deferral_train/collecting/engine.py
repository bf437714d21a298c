"""Lightning's `Trainer.predict` as the engine of collecting: ranks, devices and nodes are its business.

The unit of work is a chunk; which chunks are left is decided once, by the first process, and every process
takes its share of that list. No collective runs inside a step, and no process needs another one's results.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import BasePredictionWriter
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from deferral_train.collecting.batches import BatchCollector, Scored
from deferral_train.collecting.plan import CollectionPlan
from deferral_train.collecting.progress import Progress
from deferral_train.collecting.shard_writer import ShardWriterThread
from deferral_train.pairs.load import ModelPair
from deferral_train.traces import Chunk, TraceWriter, prepare_folder
from deferral_train.traces.folder import open_folder
from deferral_train.traces.ledger import read_ledger, write_ledger


class CollectData(pl.LightningDataModule):
    """The batches of this process: its share of the chunks that nobody has finished."""

    def __init__(self, plan: CollectionPlan, out: str) -> None:
        super().__init__()
        self.plan, self.out = plan, out
        self.prepare_data_per_node = False
        self.todo: list[Chunk] = []
        self.done_before: set[int] = set()

    def setup(self, stage: str) -> None:
        """The first process checks the folder; all hear from it what is left to do."""
        trainer = self.trainer
        assert trainer is not None
        left: list[int] | None = None
        if trainer.is_global_zero:
            left = [chunk.id for chunk in prepare_folder(self.out, self.plan.manifest)]
        left = trainer.strategy.broadcast(left, src=0)
        assert left is not None
        chunks = self.plan.manifest.chunks
        self.done_before = {chunk.id for chunk in chunks} - set(left)
        self.todo = [chunks[number] for number in left[trainer.global_rank :: trainer.world_size]]

    def work(self) -> list[tuple[Chunk, int]]:
        """(chunk, batch number) in order of work."""
        return [(chunk, batch) for chunk in self.todo for batch in range(len(chunk.batches))]

    def predict_dataloader(self) -> DataLoader:
        # A process without work gets one empty step: Lightning would skip its hooks, and the others wait for it.
        places: Any = range(max(1, len(self.work())))
        return DataLoader(places, batch_size=1, shuffle=False, num_workers=0, collate_fn=_first)


def _first(items: Sequence[int]) -> int:
    return items[0]


class CollectModule(pl.LightningModule):
    """Collects one batch per step. The models are where they were loaded, and not this module's to move: each may have
    its own device, or be spread over several.
    """

    def __init__(self, collector: BatchCollector) -> None:
        super().__init__()
        self.collector = collector
        self.work: list[tuple[Chunk, int]] = []
        self.budget: Budget | None = None

    def predict_step(self, batch: int, batch_idx: int = 0) -> Scored | None:
        if batch >= len(self.work):
            return None
        chunk, number = self.work[batch]
        if self.budget is not None and not self.budget.allows(chunk):
            return None
        return self.collector.score(chunk, number)


class Budget:
    """Stops before the shards of this process exceed their share of ``max_bytes``.

    Args:
        plan: knows the most bytes of each chunk.
        writer: knows the bytes written.
        most: bytes this process may write.
    """

    def __init__(self, plan: CollectionPlan, writer: ShardWriterThread, most: int) -> None:
        self.plan, self.writer, self.most = plan, writer, most
        self.stopped = False
        self._current: int | None = None

    def allows(self, chunk: Chunk) -> bool:
        """Asked before every batch; decides when a chunk begins, and never again once it said no."""
        if self.stopped or chunk.id == self._current:
            return not self.stopped
        self.writer.drain()
        self.stopped = self.writer.bytes + self.plan.chunk_bytes(chunk.id) > self.most
        self._current = chunk.id
        return not self.stopped


class ShardWriter(BasePredictionWriter):
    """Hands each batch to the writing thread and shows progress; closes the books at the end.

    Args:
        plan: the work. out: trace folder. max_bytes: see :class:`Budget`. progress: whether to show any.
    """

    def __init__(self, plan: CollectionPlan, out: str, max_bytes: int | None, progress: bool) -> None:
        super().__init__(write_interval="batch")
        self.plan, self.out, self.max_bytes, self.show = plan, out, max_bytes, progress
        self.writer: ShardWriterThread | None = None
        self.progress: Progress | None = None

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data, module = trainer.datamodule, pl_module  # type: ignore[attr-defined]
        assert isinstance(module, CollectModule)
        module.work = data.work()
        self.writer = ShardWriterThread(
            TraceWriter(self.out, self.plan.manifest, trainer.global_rank), module.collector.rows
        )
        if self.max_bytes is not None:
            module.budget = Budget(self.plan, self.writer, self._share(trainer))
        if self.show and trainer.is_global_zero:
            self.progress = Progress(self.plan, self.out, data.done_before, trainer.world_size)
            self.progress.begin(module.work, module.collector)

    def _share(self, trainer: pl.Trainer) -> int:
        """This process's part of what is left of the byte limit."""
        assert self.max_bytes is not None
        records, _ = read_ledger(open_folder(self.out))
        mine = trainer.datamodule.done_before  # type: ignore[attr-defined]
        return (self.max_bytes - sum(records[number].bytes for number in mine)) // trainer.world_size

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Scored | None,
        batch_indices: Sequence[int] | None,
        batch: int,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        assert isinstance(pl_module, CollectModule)
        assert self.writer is not None
        if prediction is None:
            return
        self.writer.put(pl_module.work[batch][0], prediction)
        if self.progress is not None:
            self.progress.advance(len(prediction.rows), self.writer.bytes)
        if trainer.received_sigterm:  # Lightning heeds it in its other loops, and not when it predicts
            raise SIGTERMException

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, CollectModule)
        if self.writer is not None:
            self.writer.close()
            if pl_module.budget is not None and pl_module.budget.stopped:
                self.writer.writer.stop(f"max_bytes={self.max_bytes}")
        if self.progress is not None:
            self.progress.end(self.writer.bytes if self.writer else 0)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            tidy(self.out)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if self.writer is not None:
            self.writer.abandon()
        if self.progress is not None:
            self.progress.end(self.writer.bytes if self.writer else 0)


def tidy(out: str) -> None:
    """One ledger file where several processes wrote one each."""
    folder = open_folder(out)
    records, stopped = read_ledger(folder)
    write_ledger(folder, records.values(), stopped)


def run_engine(
    pair: ModelPair,
    collector: BatchCollector,
    plan: CollectionPlan,
    out: str,
    *,
    devices: int,
    num_nodes: int,
    max_bytes: int | None,
    progress: bool,
) -> None:
    """Collect every unfinished chunk of the plan."""
    several = devices * num_nodes > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _quiet()
        trainer = pl.Trainer(
            accelerator="gpu"
            if pair.device.type == "cuda"
            else "cpu",  # of the processes; the models are placed
            devices=devices,
            num_nodes=num_nodes,
            strategy="ddp" if several else "auto",
            callbacks=[ShardWriter(plan, out, max_bytes, progress)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            inference_mode=True,
        )
        module, data = CollectModule(collector), CollectData(plan, out)
        trainer.predict(module, datamodule=data, return_predictions=False)


def _quiet() -> None:
    """Lightning's notes on hardware and tips are not about collecting."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
