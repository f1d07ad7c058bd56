"""Rows of documents to the tensors that the model takes."""

from collections.abc import Sequence

import numpy as np
import torch

from difftune.data.chat import Encoded, TeacherRows

IGNORE_INDEX = -100

Batch = dict[str, torch.Tensor]


def packed_batch(rows: Sequence[Sequence[Encoded]], seq_len: int, pad_id: int) -> Batch:
    """Lay several documents in each row; attention and positions are kept apart by their boundaries.

    Args:
        rows: The documents of each row, at most `seq_len` tokens together. An empty row becomes padding.
        seq_len: Length T of every row.
        pad_id: Token behind the last document.

    Returns:
        `input_ids [B, T]`, `labels [B, T]` (unshifted, -100 where nothing is learned and at the first token
        of every document), `position_ids [B, T]` (from 0 in every document), all int64, and `cu_seqlens [n +
        1]` int32: cumulative lengths of the n documents over the flattened B * T tokens. The padding of a row
        is a document of its own. Where documents bring what a teacher said: `teacher_indices`,
        `teacher_log_probs` and `teacher_log_tail`, a row for each label of the batch, in their order.
    """
    shape = (len(rows), seq_len)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    lengths: list[int] = []
    for row, documents in enumerate(rows):
        start = 0
        for document in documents:
            end = start + len(document.ids)
            _write(input_ids[row, start:end], labels[row, start:end], position_ids[row, start:end], document)
            lengths.append(end - start)
            start = end
        assert start <= seq_len, f"{start} tokens in a row of {seq_len}"
        if start < seq_len:
            position_ids[row, start:] = np.arange(seq_len - start)
            lengths.append(seq_len - start)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(position_ids),
        "cu_seqlens": torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        **_teacher(rows),
    }


def padded_batch(rows: Sequence[Sequence[Encoded]], pad_id: int, width: int) -> Batch:
    """Lay one document in each row, padded on the right.

    Args:
        rows: One document each. An empty row becomes a single padding token that counts as real, so that no
            row of attention is all masked; it has no label.
        pad_id: Token behind the document.
        width: Tokens of a row, at least those of the longest document.

    Returns:
        `input_ids`, `labels`, `position_ids` and `attention_mask` (1 = real), all int64 of shape [B, T]; of a teacher
        what `packed_batch` has.
    """
    shape = (len(rows), width)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    position_ids = np.tile(np.arange(width, dtype=np.int64), (len(rows), 1))
    attention_mask = np.zeros(shape, dtype=np.int64)
    for row, documents in enumerate(rows):
        length = len(documents[0].ids) if documents else 1
        attention_mask[row, :length] = 1
        if documents:
            _write(input_ids[row, :length], labels[row, :length], position_ids[row, :length], documents[0])
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(position_ids),
        "attention_mask": torch.from_numpy(attention_mask),
        **_teacher(rows),
    }


def _write(input_ids: np.ndarray, labels: np.ndarray, position_ids: np.ndarray, document: Encoded) -> None:
    """Fill views of one document's place."""
    input_ids[:] = document.ids
    labels[:] = np.where(document.learned, document.ids, IGNORE_INDEX)
    position_ids[:] = np.arange(len(document.ids))


def _teacher(rows: Sequence[Sequence[Encoded]]) -> Batch:
    """What a teacher said to the labels of a batch, a row each, if the documents bring it."""
    said = [document.teacher for documents in rows for document in documents if document.teacher is not None]
    if not said:
        return {}
    return {
        f"teacher_{name}": torch.from_numpy(np.concatenate([getattr(part, name) for part in said]))
        for name in TeacherRows._fields
    }
