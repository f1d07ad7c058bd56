"""ROOM 6: what a model can do.

`task` says what a kind of task is: items, blocks, results. The kinds are `math`, `nll`, `needle` and `many_shot`.
`math` writes texts with a model (`generation`), finds the final answer (`answers`) and judges it (`grading`, in
`grading_worker`, a process that can be killed); `haystack`, `demonstrations` and `prompts` make prompts; `likelihood`
scores given tokens; `intervals` says how sure a share is, `means` averages over tasks. `callback` runs tasks on a
schedule while a model is trained, `early_stop` ends a training that no longer gets better. Nothing here changes the
model, its mode, or the random state of training. How to add a kind: `difftune.tasks`.
"""
