"""ROOM 4: text to batches.

A row of a source (`sources`) becomes an example (`formats`), the example becomes token ids with a label mask
(`chat`), the ids are kept in one flat array (`tokenized`), documents are laid into rows of a batch
(`packing`, `batches`) and come in an endless, resumable order (`stream`). `datamodule` is what Lightning
sees; `problems` reads what is evaluated on.
"""
