"""Texts and chats for the kinds of task that want documents and not questions."""

from typing import Any

from difftune.evaluation.tokens import Document


def read_documents(
    path: str,
    *,
    format: str = "auto",
    split: str = "test",
    name: str | None = None,
    options: dict[str, Any] | None = None,
    limit: int | None = None,
) -> list[Document]:
    """The documents of a source, as training would read them.

    Args:
        path: As of a training source, or a .txt file, or `synthetic:prose`.
        format: Name of the row format.
        split: Split of a hub data set, folder or generator.
        name: Configuration of a hub data set.
        options: Settings of a generator; its `count` defaults to `limit`, or 1,000.
        limit: At most so many rows, the first ones. None: all.

    Returns:
        Texts, and chats as lists of messages.

    Raises:
        ValueError: If nothing can be read.
    """
    from difftune.data.formats import Dropped, read_example, resolve_format
    from difftune.data.sources import Source, read_rows
    from difftune.data.texts import PROSE, load_texts

    if path == PROSE or path.endswith(".txt"):
        return list(load_texts(path, limit=limit))
    options = dict(options or {})
    if path.startswith("synthetic:"):
        options.setdefault("count", limit or 1000)
    documents: list[Document] = []
    row_format = None
    for row in read_rows(Source(path=path, format=format, split=split, name=name, limit=limit, options=options)):
        row_format = row_format or resolve_format(format, row.columns, row.where)
        example = read_example(row_format, row.columns, row.where)
        if not isinstance(example, Dropped):
            documents.append(example.messages if example.text is None else example.text)
    if not documents:
        raise ValueError(f"{path} has no document to evaluate on")
    return documents
