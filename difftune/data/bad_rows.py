"""What happens to a row that cannot be used: `data.bad_rows` raises, or drops it and counts it by its reason."""

from difftune.data.formats import Dropped, Example, Format, read_example
from difftune.data.rows import BadRow, Row
from difftune.data.sources import Source


def read_row(row: Row, row_format: Format | None, source: Source) -> Example | Dropped:
    """Read a row of training data; a bad one is dropped where the source says so.

    Args:
        row: From `read_rows` with `keep_bad`.
        row_format: From `resolve_format`; None only for rows that are bad already.
        source: Says what is learned of the row, and what happens to a bad one.

    Raises:
        BadRow: If it is bad, and `source.bad_rows` is "raise".
    """
    try:
        if row.bad is not None:
            raise row.bad
        assert row_format is not None, "the first row that can be read decides it"
        example = read_example(row_format, row.columns, row.where, answer_only=source.answer_only)
        if isinstance(example, Dropped) and example.is_bad:
            raise BadRow(row.where, example.reason)
    except BadRow as error:
        return refuse_or_drop(error, source)
    return example


def refuse_or_drop(error: BadRow, source: Source) -> Dropped:
    """A bad row as one that is dropped.

    Raises:
        BadRow: If `source.bad_rows` is "raise"; says what to do.
    """
    if source.bad_rows == "raise":
        text = f"{error.text}; mend or remove the row, or set data.bad_rows=drop, which counts such rows"
        raise BadRow(error.where, text) from error
    return Dropped(f"bad row: {error.reason}", first=str(error))
