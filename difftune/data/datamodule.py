"""The training data as Lightning sees it: prepared once, one endless stream, resumable anywhere."""

import logging
import signal
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from difftune.data.corpus import OVERLONG, Corpus
from difftune.data.row_cache import RowCache
from difftune.data.sources import Source
from difftune.data.statistics import DataStatistics, count_corpus
from difftune.data.stream import BatchStream, RowStream, interleave
from difftune.data.teacher_store import TeacherSettings, with_teacher
from difftune.data.token_cache import load_tokenized
from difftune.data.tokenized import PIECE_ROWS, Counts, TokenizedSet, question_key, tokenize_pieces
from difftune.data.tokenizers import decode
from difftune.data.upsampling import Upsampling

log = logging.getLogger(__name__)

STREAM_BLOCK_ROWS = 8 * PIECE_ROWS
"""Rows of a source that are shuffled and packed together when streaming."""
_LOSS_WORTH_A_WARNING = 0.1


class _Asked(Protocol):
    """Anything with a question: a `difftune.data.problems.Problem`."""

    @property
    def question(self) -> str: ...


class SFTDataModule(pl.LightningDataModule):
    """Sources to batches for supervised fine-tuning.

    A batch is a dict that the model takes as it is: `input_ids`, `labels` (unshifted, -100 where nothing is
    learned), `position_ids`, all [micro_batch_size, T] int64, and `cu_seqlens` when packed, `attention_mask`
    when not.

    All epochs are one stream, so Lightning sees a single epoch: always give the Trainer `max_epochs=1`, and
    `max_steps` unless `max_epochs` here ends the stream. Epoch e is a shuffle seeded by (seed, e) and, with
    packing, a best-fit packing of the shuffled set.

    Args:
        tokenizer: With a chat template, an end-of-text and a padding token (`build_tokenizer`).
        train: Where rows come from. They are mixed in proportion to their number of rows.
        seq_len: Most tokens of a document, and the length of a packed row.
        micro_batch_size: Rows of a batch on one rank.
        packing: Lay several documents in each row, kept apart by `cu_seqlens`.
        overlong: Documents longer than `seq_len`: "drop" them (counted), "truncate" them or "raise".
        shuffle: A new order each epoch. False: the order of the sources (packing sorts by length).
        seed: Of the order.
        num_workers: Processes that make batches. The order does not depend on it.
        cache_dir: Folder for tokenised sources and the rows of epochs. None: all is made anew and in memory. Not used
            when streaming.
        max_epochs: Passes over the data. None: endless.
        accumulate_grad_batches: Batches of an optimiser step; only `total_steps` looks at it.
        teacher: What was stored of a teacher, to be brought with each batch. None: nothing is.
        streaming: Read rows as they are needed and keep only a block of them: sources are interleaved, and
            shuffled and packed within blocks of 4,096 rows. Resuming reads and tokenises what came before
            again; each worker and rank reads everything, so 0 or 1 workers are best.
        context_parallel_size: Ranks, one after another, that are given the same rows.
        upsampling: Long documents are taken more than once, the same ones in every epoch; when streaming, within a
            block. None: all are taken once.
        keep_rows: Whether the rows of an epoch are kept in ``cache_dir`` too; else they are in memory alone.

    Raises:
        ValueError: If a setting is out of range.
    """

    stats: DataStatistics
    """What `prepare` counted."""

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        train: Sequence[Source],
        seq_len: int,
        micro_batch_size: int,
        packing: bool = True,
        overlong: str = "drop",
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: Path | None = None,
        max_epochs: int | None = None,
        accumulate_grad_batches: int = 1,
        streaming: bool = False,
        teacher: TeacherSettings | None = None,
        context_parallel_size: int = 1,
        upsampling: Upsampling | None = None,
        keep_rows: bool = True,
    ) -> None:
        super().__init__()
        if not train:
            raise ValueError("train has no source: name at least one file, folder, hub id or synthetic:arithmetic")
        if overlong not in OVERLONG:
            raise ValueError(f"overlong must be one of {', '.join(OVERLONG)}, got {overlong!r}")
        numbers = {
            "seq_len": (seq_len, 2),
            "micro_batch_size": (micro_batch_size, 1),
            "num_workers": (num_workers, 0),
            "accumulate_grad_batches": (accumulate_grad_batches, 1),
            "seed": (seed, 0),
            "max_epochs": (1 if max_epochs is None else max_epochs, 1),
        }
        for name, (value, low) in numbers.items():
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        self._tokenizer = tokenizer
        self._sources = list(train)
        self._seq_len = seq_len
        self._micro_batch_size = micro_batch_size
        self._packing = packing
        self._overlong = overlong
        self._shuffle = shuffle
        self._seed = seed
        self._num_workers = num_workers
        self._cache_dir = cache_dir
        self._max_epochs = max_epochs
        self._accumulate = accumulate_grad_batches
        self._streaming = streaming
        self._teacher = teacher
        self._context_parallel_size = context_parallel_size
        self._upsampling = upsampling
        self._corpus: Corpus | None = None
        self._told_bad: set[str] = set()
        self._row_cache = None if streaming else RowCache(cache_dir if keep_rows else None)
        # Where the stream was entered: global rows, and the batches that Lightning had counted there.
        self._start_row = 0
        self._start_batch = 0

    def prepare(self) -> DataStatistics:
        """Load, filter, tokenise and count; done once, later calls return the same.

        When streaming, only the first block is read and counted.

        Raises:
            ValueError: If a source cannot be read, a row is broken, has no label or is over-long under
                overlong=raise, or if no row is left.
        """
        if self._corpus is not None:
            return self.stats
        if self._streaming:
            corpus = next(self._blocks(), None)
            if corpus is None:
                raise ValueError(f"{', '.join(source.path for source in self._sources)}: no row")
        else:
            if self._teacher is not None:
                assert self._cache_dir is not None, "what is stored of a teacher lies in the cache"
                # Before the tokens are made: without what is stored nothing is written.
                for source in self._sources:
                    self._teacher.require(source, self._tokenizer, self._cache_dir)
            sets = [load_tokenized(source, self._tokenizer, self._cache_dir) for source in self._sources]
            if self._teacher is not None and self._cache_dir is not None:
                sets = [
                    with_teacher(part, source, self._tokenizer, self._cache_dir, self._teacher)
                    for part, source in zip(sets, self._sources, strict=True)
                ]
            corpus = self._corpus_of(sets)
        stats = count_corpus(
            corpus,
            self._row_stream(None).rows_of(corpus, 0, 0),
            packing=self._packing,
            micro_batch_size=self._micro_batch_size,
            eos_id=self._eos_id,
            complete=not self._streaming,
            min_long=None if self._upsampling is None else self._upsampling.min_tokens,
        )
        if not stats.kept:
            reasons = ", ".join(f"{count} {reason}" for reason, count in stats.dropped.items())
            raise ValueError(
                f"none of the {stats.rows_read} rows read is left to learn: {reasons} (the longest has "
                f"{stats.longest_row} tokens)"
                + "".join(f"\n  first {r}: {text}" for r, text in stats.first_bad.items())
            )
        if corpus.lost_to_length > _LOSS_WORTH_A_WARNING * stats.rows_read:
            log.warning(
                "%d of %d rows are lost because they are longer than seq_len=%d (the longest has %d tokens)",
                corpus.lost_to_length,
                stats.rows_read,
                self._seq_len,
                stats.longest_row,
            )
        self._corpus, self.stats = corpus, stats
        return stats

    def document_lengths(self) -> np.ndarray:
        """int64, shape [kept]: tokens of the documents that `prepare` counted and kept."""
        self.prepare()
        assert self._corpus is not None, "prepared above"
        return self._corpus.lengths

    def setup(self, stage: str) -> None:
        """Prepare, if that was not done before.

        Raises:
            ValueError: If the trainer would begin a finite stream anew.
        """
        if self._max_epochs is not None and self.trainer and self.trainer.max_epochs != 1:
            raise ValueError(
                f"the stream holds its {self._max_epochs} passes itself: give the Trainer max_epochs=1, got "
                f"{self.trainer.max_epochs}"
            )
        self.prepare()

    def train_dataloader(self) -> DataLoader:
        """The batches of this rank, from the position of the last `load_state_dict` on."""
        self.prepare()
        rank, world_size = self._rank_and_world_size()
        stream = BatchStream(
            self._row_stream(self.stats.batch_rows),
            start_row=self._start_row,
            micro_batch_size=self._micro_batch_size,
            rank=rank,
            world_size=world_size,
            seq_len=self._seq_len,
            pad_id=self._pad_id,
        )
        # Batches are made by the stream: the loader only spreads it over workers. Its own generator keeps it from
        # drawing on the global random state, which a resumed run must find as it was.
        return DataLoader(
            stream,
            batch_size=None,
            num_workers=self._num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
            # A terminal sends Ctrl-C to them too: the step that is being worked on still needs its batches.
            worker_init_fn=_ignore_interrupt,
        )

    def total_batches(self, world_size: int | None = None) -> int | None:
        """Batches of each rank over all epochs, from the beginning; None if endless or streaming.

        Args:
            world_size: Number of ranks, those that share rows included. None: the trainer's, or 1 without a trainer.
        """
        self.prepare()
        if self._max_epochs is None or self._streaming:
            return None
        ranks = self._rank_and_world_size()[1]
        if world_size is not None:
            ranks = max(1, world_size // self._context_parallel_size)
        return -(-self.stats.batch_rows * self._max_epochs // (self._micro_batch_size * ranks))

    def total_steps(self, world_size: int | None = None) -> int | None:
        """Optimiser steps over all epochs, a last partial one included; None as `total_batches`."""
        batches = self.total_batches(world_size)
        return None if batches is None else -(-batches // self._accumulate)

    def state_dict(self) -> dict[str, int]:
        """The position in the stream, in rows of all ranks, so that it holds for any number of them."""
        batches = self._batches_processed()
        rows = (batches - self._start_batch) * self._micro_batch_size * self._rank_and_world_size()[1]
        return {"rows_consumed": self._start_row + rows, "batches_processed": batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next `train_dataloader` begin where `state_dict` was taken."""
        self._start_row = state_dict["rows_consumed"]
        self._start_batch = state_dict["batches_processed"]

    def sample(self, index: int = 0) -> list[tuple[str, bool]]:
        """Batch row `index` of the stream as text, for the eye.

        Returns:
            Runs of tokens, decoded with their special tokens: the text, and whether it is learned. Padding is
            left out.
        """
        self.prepare()
        row = next(islice(self._row_stream(self.stats.batch_rows).rows_from(index), 1), None)
        if row is None:
            raise ValueError(f"there is no row {index}: the data have {self.stats.batch_rows} rows an epoch")
        corpus, documents = row
        runs = []
        for document in map(corpus.document, documents):
            edges = [0, *(np.flatnonzero(np.diff(document.learned)) + 1).tolist(), len(document.ids)]
            for start, end in pairwise(edges):
                text = decode(self._tokenizer, document.ids[start:end].tolist())
                runs.append((text, bool(document.learned[start])))
        return runs

    def seen(self, problems: Iterable[_Asked]) -> list[Any]:
        """The problems whose question is also the question of a training row (white space aside).

        Held-out problems must give an empty list. When streaming only the first block is searched.
        """
        self.prepare()
        assert self._corpus is not None
        keys = set(self._corpus.questions().tolist())
        return [problem for problem in problems if question_key(problem.question) in keys]

    @property
    def _eos_id(self) -> int:
        eos = self._tokenizer.eos_token_id
        assert isinstance(eos, int), "build_tokenizer gives an end-of-text token"
        return eos

    @property
    def _pad_id(self) -> int:
        pad = self._tokenizer.pad_token_id
        assert isinstance(pad, int), "build_tokenizer gives a padding token"
        return pad

    def _row_stream(self, rows_per_epoch: int | None) -> RowStream:
        return RowStream(
            blocks=self._blocks,
            packing=self._packing,
            shuffle=self._shuffle,
            seed=self._seed,
            max_epochs=self._max_epochs,
            rows_per_epoch=None if self._streaming else rows_per_epoch,
            cache=self._row_cache,
        )

    def _blocks(self) -> Iterator[Corpus]:
        if not self._streaming:
            assert self._corpus is not None
            yield self._corpus
            return
        pieces = interleave([tokenize_pieces(source, self._tokenizer, streaming=True) for source in self._sources])
        while block := list(islice(pieces, STREAM_BLOCK_ROWS // PIECE_ROWS)):
            yield self._corpus_of(block)

    def _corpus_of(self, sets: Sequence[TokenizedSet]) -> Corpus:
        if self._streaming:
            # Nobody counts what is behind the first block.
            for reason, text in sum((part.counts for part in sets), Counts()).first_bad.items():
                if reason not in self._told_bad:
                    self._told_bad.add(reason)
                    log.warning("%s, the first one: %s", reason, text)
        return Corpus(sets, seq_len=self._seq_len, overlong=self._overlong, upsampling=self._upsampling)

    def _rank_and_world_size(self) -> tuple[int, int]:
        sharding = self.trainer.distributed_sampler_kwargs if self.trainer else None
        if not sharding:
            return 0, 1
        shared = self._context_parallel_size
        return sharding["rank"] // shared, sharding["num_replicas"] // shared

    def _batches_processed(self) -> int:
        if not self.trainer:
            return self._start_batch
        # `completed` is one short in on_train_batch_end, where checkpoints are saved.
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return progress.processed


def _ignore_interrupt(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
