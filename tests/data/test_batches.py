import numpy as np
import torch

from difftune.data.batches import packed_batch, padded_batch
from difftune.data.chat import Encoded

PAD = 99


def document(*ids: int, prompt: int = 1) -> Encoded:
    return Encoded(np.asarray(ids, np.int32), np.arange(len(ids)) >= prompt)


A, B, C = document(1, 2, 3, prompt=2), document(4, 5), document(6, 7, 8, 9)


def test_packed_rows_keep_documents_apart():
    batch = packed_batch([[A, B], [C]], seq_len=6, pad_id=PAD)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, PAD], [6, 7, 8, 9, PAD, PAD]]
    assert batch["labels"].tolist() == [[-100, -100, 3, -100, 5, -100], [-100, 7, 8, 9, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 1]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 5, 6, 10, 12]
    assert set(batch) == {"input_ids", "labels", "position_ids", "cu_seqlens"}


def test_full_row_has_no_padding_document():
    batch = packed_batch([[A, B], [A, B]], seq_len=5, pad_id=PAD)
    assert batch["cu_seqlens"].tolist() == [0, 3, 5, 8, 10]


def test_every_row_border_is_a_document_border():
    batch = packed_batch([[A], [B, A], []], seq_len=6, pad_id=PAD)
    assert {0, 6, 12, 18} <= set(batch["cu_seqlens"].tolist())
    assert (batch["labels"][2] == -100).all()


def test_types_are_those_the_model_takes():
    batch = packed_batch([[A]], seq_len=4, pad_id=PAD)
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "input_ids": torch.int64,
        "labels": torch.int64,
        "position_ids": torch.int64,
        "cu_seqlens": torch.int32,
    }


def test_padded_rows_hold_one_document_on_the_left():
    batch = padded_batch([[A], [B]], pad_id=PAD, width=max(len(A.ids), len(B.ids)))
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, PAD]]
    assert batch["labels"].tolist() == [[-100, -100, 3], [-100, 5, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2]] or batch["position_ids"][1, :2].tolist() == [0, 1]
    assert set(batch) == {"input_ids", "labels", "position_ids", "attention_mask"}


def test_padded_row_without_a_document_is_not_all_masked():
    batch = padded_batch([[]], pad_id=PAD, width=1)
    assert batch["attention_mask"].tolist() == [[1]]
    assert batch["labels"].tolist() == [[-100]]
