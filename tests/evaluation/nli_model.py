"""A classifier of natural language inference whose weights force its answer: entailed if it reads the word "key"."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

LABELS = ("contradiction", "neutral", "entailment")
LENGTH = 66


def nli_tokenizer() -> PreTrainedTokenizerFast:
    """Words; those that it does not know are all alike."""
    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "key": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def nli_model(*, always: str | None = "entailment", labels: Sequence[str] = LABELS) -> BertForSequenceClassification:
    """A tiny BERT.

    Args:
        always: The label that it gives to everything. None: entailment if "key" is in either text, else contradiction.
        labels: Their names.
    """
    config = BertConfig(
        vocab_size=5,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=16,
        max_position_embeddings=LENGTH,
        id2label=dict(enumerate(labels)),
        label2id={name: at for at, name in enumerate(labels)},
    )
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(float("LayerNorm.weight" in name))
        if always is not None:
            model.classifier.bias[labels.index(always)] = 5.0
            return model
        # Channel 0 says that the word is "key". The attention looks at all tokens alike, so the first one has the mean.
        words = model.bert.embeddings
        words.word_embeddings.weight[:4, 1] = 1.0
        words.word_embeddings.weight[4, 0] = 1.0
        words.LayerNorm.weight[0] = 100.0
        others = torch.nn.functional.layer_norm(words.word_embeddings.weight[0], (16,))
        words.LayerNorm.bias[0] = -100.0 * others[0]
        attention = model.bert.encoder.layer[0].attention
        for linear in (attention.self.value, attention.output.dense, model.bert.pooler.dense):
            linear.weight.copy_(torch.eye(16))
        model.classifier.weight[labels.index("entailment"), 0] = 10.0
    return model


def save_nli_model(folder: Path, *, always: str | None = "entailment", labels: Sequence[str] = LABELS) -> None:
    """Write it with its tokenizer."""
    nli_model(always=always, labels=labels).save_pretrained(folder)
    nli_tokenizer().save_pretrained(folder)
