"""The kinds of evaluation task by name: what a recipe can say of each, and how it is built.

To add a kind KIND:

1. `difftune/evaluation/KIND.py`: a class derived from `difftune.evaluation.task.ItemTask` (or anything with the methods
   of `difftune.evaluation.task.Task`), and a result. It takes explicit keyword arguments, and texts, not paths:
   it imports `modeling` and `ops` only. What it measures once and writes as one line of `samples/` is an item: work
   that was interrupted goes on after the last item that was done.
2. `difftune/tasks/KIND.py`: a dataclass derived from `difftune.tasks.base.TaskConfig`. Its fields are the keys of the
   kind in `evaluation.tasks`, each with a string beneath it; `figures()` names the metrics by which a checkpoint can be
   chosen; `build()` reads the data and makes the task, and is the one place that imports torch, inside the function.
3. One line in `KINDS` below, and the file names in the tree of the README.

Recipes, `--task KIND`, strict checks with the nearest name, `fit --list-keys`, `docs/reference/config.md`,
`ScheduledEvaluation`, the choice of the best checkpoint, results, samples, and going on after an interruption follow
from these. `--task KIND:TEXT` sets the field that `TaskConfig.operand` names.
"""

from difftune.tasks.activations import ActivationsTaskConfig
from difftune.tasks.attention_noise import AttentionNoiseTaskConfig
from difftune.tasks.base import TaskConfig
from difftune.tasks.hallucination import HallucinationTaskConfig
from difftune.tasks.lm_eval import HarnessTaskConfig
from difftune.tasks.many_shot import ManyShotTaskConfig
from difftune.tasks.math import MathTaskConfig
from difftune.tasks.needle import NeedleTaskConfig
from difftune.tasks.nll import NllTaskConfig
from difftune.tasks.quantization import QuantizationTaskConfig

KINDS: dict[str, type[TaskConfig]] = {
    "math": MathTaskConfig,
    "many_shot": ManyShotTaskConfig,
    "needle": NeedleTaskConfig,
    "nll": NllTaskConfig,
    "activations": ActivationsTaskConfig,
    "attention_noise": AttentionNoiseTaskConfig,
    "quantization": QuantizationTaskConfig,
    "hallucination": HallucinationTaskConfig,
    "lm_eval": HarnessTaskConfig,
}
"""The dataclass of each kind."""
