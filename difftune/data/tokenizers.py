"""Tokenizers: two small ones that need no download, and any of transformers by path or hub id."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from difftune.rendering import choose_template, fix_date, reads_clock
from difftune.rendering import template_date as date_of

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>")
"""Ids 0 to 5 of both built-in tokenizers."""

# One marker a turn and nothing else: a problem of 8 characters must not drown in its frame.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(
    name: str, *, chat_template: str | None = None, template_date: str | None = None
) -> PreTrainedTokenizerBase:
    """Build or load a tokenizer that is ready for training: it has an end-of-text and a padding token.

    Args:
        name: "digits": every printable ASCII character and the newline is a token (102 in all); other
            characters are an error when they are met. "bytes": every byte of the UTF-8 text is a token (262
            in all), so any text fits. Else a folder or hub id for `AutoTokenizer`.
        chat_template: Takes the place of the tokenizer's own: a file, Jinja text, or the name of one of the
            tokenizer's templates. None: keep its own.
        template_date: ISO date for a template that reads the clock. None: the one saved with the tokenizer, else today.

    Returns:
        A tokenizer with `eos_token` and `pad_token`. A loaded one without a padding token pads with its
        unknown or its end-of-text token, which is safe here: labels come from the chat template and never
        from the padding id.

    Raises:
        ValueError: If nothing loads under that name, what loads has no end-of-text token, or there is no such template.
    """
    tokenizer: PreTrainedTokenizerBase
    if name == "digits":
        tokenizer = _digits()
    elif name == "bytes":
        tokenizer = _bytes()
    else:
        tokenizer = _load(name)
    if chat_template is not None:
        choose_template(tokenizer, chat_template)
    fix_date(tokenizer, template_date)
    return tokenizer


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of token ids, special tokens included."""
    text = tokenizer.decode(list(ids))
    assert isinstance(text, str)
    return text


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what decides the token ids of a chat: vocabulary, rules, special tokens, chat template and its date."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # Padding and truncation are settings of the last call, not of the tokenizer.
        rules = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    else:
        rules = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    content = [rules, tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id]
    if reads_clock(tokenizer):
        content.append(date_of(tokenizer).isoformat())
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def require_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Check that a model has a row for every token of its tokenizer.

    Args:
        tokenizer: The model's.
        rows: Of its embedding.

    Raises:
        ValueError: If a token has no row; with both numbers.
    """
    needed = max(tokenizer.get_vocab().values(), default=-1) + 1
    if needed > rows:
        raise ValueError(
            f"the tokenizer has {needed} tokens, the model's embedding {rows} rows: "
            "use the model's own tokenizer (leave out tokenizer), or set model.vocab_size for a fresh model"
        )


def require_same_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, name: str) -> None:
    """Check that a teacher means the same by every token id that its student knows, whatever both are called.

    Args:
        student: The student's tokenizer.
        teacher: The teacher's; it may know more tokens.
        name: Names the teacher in the error.

    Raises:
        ValueError: If a token has another id there, or none; it names some.
    """
    theirs = teacher.get_vocab()
    other = sorted((index, token) for token, index in student.get_vocab().items() if theirs.get(token) != index)
    if other:
        some = ", ".join(f"{token!r} ({index}, there {theirs.get(token, 'unknown')})" for index, token in other[:3])
        raise ValueError(
            f"the teacher {name} has another tokenizer than the student: {len(other)} of {len(student)} tokens have "
            f"another id, such as {some}; distillation compares the two token by token, so choose a teacher with the "
            "student's tokenizer"
        )


def _digits() -> PreTrainedTokenizerFast:
    characters = ["\n", *map(chr, range(32, 127))]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *characters])}
    # No unknown token on purpose: a character outside the vocabulary must not vanish.
    backend = Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return _finish(backend)


def _bytes() -> PreTrainedTokenizerFast:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *symbols])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _finish(backend)


def _finish(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        clean_up_tokenization_spaces=False,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def _load(name: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises Exception itself, transformers whatever a file causes
        where = "it is a folder without a tokenizer" if Path(name).is_dir() else "no such folder"
        raise ValueError(
            f"tokenizer {name!r} could not be loaded: choose digits, bytes, a folder with tokenizer files or "
            f"a hub id ({where}; transformers says: {str(error).splitlines()[0]})"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name!r} has no eos_token: a model cannot learn to stop; set one in its files")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer
