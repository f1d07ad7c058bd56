"""ROOM 6: what a model can do.

`generation` writes texts with a model, `answers` finds the final answer in a text, `grading` judges it against the
gold answer (in `grading_worker`, a process that can be killed), `math` makes figures of it, with an interval from
`intervals`, and `callback` does this on a schedule while a model is trained. Nothing here changes the model, its mode,
or the random state of training.
"""
