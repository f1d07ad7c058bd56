"""The special tokens of a written model folder: config, generation config and tokenizer say the same."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from difftune.checkpoints.folders import read_json
from difftune.modeling.special_tokens import special_token_ids


def write_special_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let every reader of a folder stop where its tokenizer does.

    The tokenizer's end of text comes first, those that config and generation config had before stay.

    Args:
        folder: With `config.json`; `generation_config.json` is made if absent.
        tokenizer: What the model was trained with.
    """
    paths = [folder / "generation_config.json", folder / "config.json"]
    contents = [read_json(path) if path.is_file() else {} for path in paths]
    ids = special_token_ids(tokenizer, *contents)
    for path, content in zip(paths, contents, strict=True):
        written = {**content, **ids}
        if path.name.startswith("generation") and written.get("pad_token_id") is None:
            written["pad_token_id"] = tokenizer.pad_token_id
        path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
