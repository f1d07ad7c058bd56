"""Every key of a recipe: dataclasses whose fields say what they mean, in which unit and range.

A recipe is a sparse YAML file of these keys. :func:`~difftune.config.load.load_config` merges defaults, the recipe (and
what it names as `base:`) and the command line, in that order, and returns plain dataclasses, checked. Only `cli.py`,
`commands/`, `plan/` and `builder/` read them; the rooms below take keyword arguments.

The string beneath a field is its documentation, there and in `fit --list-keys`; `_key(...)` adds checks.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from difftune.config.adapter import AdapterConfig
from difftune.config.checkpoint import CheckpointConfig
from difftune.config.distill import DistillConfig
from difftune.config.field import key as _key
from difftune.config.field import required as _required
from difftune.config.fsdp import FsdpConfig
from difftune.config.upsample import UpsampleConfig
from difftune.tasks.base import TaskConfig

_RUN_TIME = "path attention_backend dtype quantization gradient_checkpointing gradient_checkpointing_every mlp_chunk"
RUN_TIME_MODEL_KEYS = tuple(_RUN_TIME.split())
"""Keys of `model` that do not describe the architecture."""


@dataclass
class ModelConfig:
    """The model: loaded from `path`, or fresh from the architecture fields."""

    path: str | None = _key(None, is_path=True)
    """Folder or hub id to start from: a difftune or DiffLlama model, or a training checkpoint. null: a fresh model.
    Given in a recipe or on the command line, it replaces the architecture that a `base:` or the recipe describes."""
    attention: str | None = _key(None, choices=("diff_v1", "diff_v2", "softmax"))
    """Kind of attention. `softmax` is the baseline in the same backbone. null, here and in every architecture field
    below: the default of DiffTransformerConfig; with `path`, what the checkpoint says."""
    vocab_size: int | None = _key(None, low=1, most=2**28)
    """Rows of the embedding. null for a fresh model: as many as the tokenizer has."""
    hidden_size: int | None = _key(None, low=1, most=2**20)
    """Width of the residual stream."""
    intermediate_size: int | None = _key(None, low=1, most=2**22)
    """Inner width of the SwiGLU block; the paper has 8/3 of hidden_size."""
    num_hidden_layers: int | None = _key(None, low=1, most=10_000)
    """Number of blocks."""
    num_attention_heads: int | None = _key(None, low=1, most=2**16)
    """Softmax maps a layer, as Hugging Face counts; a differential head takes two of them."""
    num_key_value_heads: int | None = _key(None, low=1, most=2**16)
    """Key/value heads a layer (grouped-query attention); even for diff_v1."""
    head_dim: int | None = _key(None, low=1, most=2**16)
    """Width of one map's query and key. null: hidden_size / num_attention_heads."""
    subln: str | None = _key(None, choices=("affine", "plain", "none"))
    """Norm of each head's output in diff_v1: with a weight, without, or none at all."""
    subln_eps: float | None = _key(None, above=0)
    """Epsilon of that norm."""
    lambda_init: float | None = _key(None, low=0, high=1)
    """Constant part of lambda in diff_v1, the same in every layer. null: the paper's schedule by depth, 0.2 to 0.8."""
    lambda_warmup_steps: int | None = _key(None, low=0)
    """Optimiser steps, over all stages, in which lambda of diff_v1 rises from almost 0 to its value. With `path`:
    begins such a warm-up of the model there, or with 0 ends the one it is in; null goes on with it."""
    lambda_std_dev: float | None = _key(None, low=0)
    """Standard deviation of the four lambda vectors at initialisation."""
    attention_bias: bool | None = None
    """Biases on the query, key and value projections."""
    attention_out_bias: bool | None = None
    """Bias on the output projection of the attention."""
    qk_norm: bool | None = None
    """RMSNorm over each query and key head before the rotation."""
    hidden_act: str | None = None
    """Activation of the gated unit, by transformers' name; silu makes it SwiGLU."""
    rms_norm_eps: float | None = _key(None, above=0)
    """Epsilon of the norms of the blocks."""
    rope_parameters: dict[str, Any] | None = None
    """Rotary embedding in transformers' form, such as {rope_type: default, rope_theta: 640000}."""
    max_position_embeddings: int | None = _key(None, low=1, most=2**32)
    """Longest sequence in tokens that the model is meant for."""
    tie_word_embeddings: bool | None = None
    """Share the embedding matrix with the output layer."""
    initializer_range: float | None = _key(None, above=0)
    """Standard deviation of the weights of a fresh model."""
    attention_backend: str = _key("auto", choices=("auto", "reference", "sdpa", "flash", "triton"))
    """Implementation of the attention. `auto` picks the fastest that runs here and logs its choice."""
    dtype: str = _key("float32", choices=("float32", "bfloat16", "float16"))
    """Type of the weights in memory. Lambda stays float32; for mixed precision see trainer.precision."""
    quantization: str | None = _key(None, choices=("nf4",))
    """Hold the projections in 4 bits (QLoRA: NF4, double quantisation) and compute in `dtype`; needs the extra `qlora`.
    An adapter is trained beside them. null: plain weights."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    gradient_checkpointing_every: int = _key(1, low=1)
    """With gradient_checkpointing: recompute every so many-th block only; the others keep what they need."""
    mlp_chunk: int | None = _key(None, low=1)
    """Tokens of the gated unit at once, computed again in the backward pass: less memory. null: all at once."""

    def architecture(self) -> dict[str, Any]:
        """The architecture fields that were set: keyword arguments of DiffTransformerConfig."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in RUN_TIME_MODEL_KEYS}
        return {name: value for name, value in values.items() if value is not None}


@dataclass
class SourceConfig:
    """One source of training rows."""

    path: str = _required(is_path=True)
    """A file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow; text ones also .gz, .zst, .bz2), a folder of them
    or one of `save_to_disk`, a `datasets` hub id, `synthetic:arithmetic` or `synthetic:reasoning_gym/<task>`. What
    exists on disk wins over a hub id of the same name."""
    format: str = "auto"
    """Name of the row format. `auto`: recognised by the columns of the first row."""
    split: str = "train"
    """Split of a hub data set or a generator; in a folder whose names say their split, the files of that one. Names
    with test, eval, validation, dev or heldout as a whole word are never of the split train."""
    name: str | None = None
    """Configuration of a hub data set, such as `main` of gsm8k. null: its default."""
    limit: int | None = _key(None, low=1)
    """At most this many rows, the first ones. null: all."""
    answer_only: bool = False
    """Learn the final answer instead of the worked solution."""
    options: dict[str, Any] = _key({})
    """Settings of a generator, such as {level: 2, count: 20000, seed: 0} of `synthetic:arithmetic`."""
    columns: dict[str, str] = _key({})
    """Columns that have another name in the data: our name, then theirs, such as {question: task, answer: gold}."""


@dataclass
class DataConfig:
    """From text to batches."""

    train: list[SourceConfig] = _key([])
    """Where the training rows come from."""
    seq_len: int = _key(2048, low=2, most=2**30)
    """Tokens in a row of a batch."""
    micro_batch_size: int = _key(1, low=1, most=2**20)
    """Rows of a forward pass on one device."""
    packing: bool = True
    """Several documents in a row, with attention and positions kept apart. false: one document a row, padded."""
    overlong: str = _key("drop", choices=("drop", "truncate", "raise"))
    """What happens to a document longer than seq_len. Counts are printed."""
    bad_rows: str = _key("raise", choices=("raise", "drop"))
    """What happens to a row that cannot be used: not readable, without text, with wrong types or roles, or refused by
    the chat template. `raise` names it; `drop` counts by reason and prints the first of each. What a format leaves out
    by its own columns (an answer that is not verified), and what `overlong` drops, is counted in both."""
    shuffle: bool = True
    """A new order each epoch, from the seed."""
    num_workers: int = _key(0, low=0, most=1024)
    """Processes that prepare batches; 0: the main one. The order does not depend on it."""
    cache_dir: str | None = _key(None, is_path=True)
    """Folder of tokenised data, keyed by content. null: `cache/` in the run folder."""
    streaming: bool = False
    """Read rows as they are needed, for sets that do not fit in memory."""
    upsample: UpsampleConfig | None = None
    """Long documents more often. null: every document once an epoch."""
    check: bool = True
    """Look at the first rows before training, and refuse what would be learned wrongly."""


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = _key(1e-4, above=0)
    """Peak learning rate."""
    betas: list[float] = _key([0.9, 0.95], low=0, high=1, length=2)
    """AdamW's decay rates of the first and second moment."""
    eps: float = _key(1e-8, above=0)
    """AdamW's epsilon."""
    weight_decay: float = _key(0.1, low=0)
    """Decoupled weight decay of the matrices; norms, biases and lambda have none."""
    lambda_lr: float | None = _key(None, above=0)
    """Peak learning rate of the lambda parameters. null: lr."""
    warmup_steps: int = _key(0, low=0)
    """Optimiser steps of linear warm-up."""
    schedule: str = _key("linear", choices=("linear", "cosine", "constant"))
    """Shape of the decay after the warm-up."""
    min_lr_ratio: float = _key(0.0, low=0, high=1)
    """Last learning rate as a share of the peak."""
    z_loss: float = _key(0.0, low=0)
    """Weight of the squared log-partition penalty; 0: none."""
    max_nonfinite_steps: int = _key(5, low=1)
    """Optimiser steps in a row that may be skipped for a non-finite loss or gradient before the run stops."""


@dataclass
class TrainerConfig:
    """Lightning's Trainer, names unchanged."""

    accelerator: str = _key("auto", choices=("auto", "cpu", "gpu", "cuda", "mps"))
    """Kind of device."""
    devices: int | str | list[int] = "auto"
    """How many devices, or which ones."""
    num_nodes: int = _key(1, low=1, most=100_000)
    """Machines."""
    strategy: str = _key("auto", choices=("auto", "ddp", "fsdp"))
    """How several devices work together. `ddp`: each has the whole model; `fsdp`: the model is sharded over them, and
    loaded so; `auto`: `ddp` where weights, gradients and AdamW fill half a device at most, else `fsdp`."""
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    """Of the strategy `fsdp`."""
    context_parallel_size: int = _key(1, low=1, most=100_000)
    """Devices that share every row, each with a part of its tokens; must divide their number. 1: whole rows."""
    precision: str = _key("32-true", choices=("32-true", "bf16-mixed", "16-mixed"))
    """Arithmetic of the training steps."""
    max_steps: int = _key(-1, low=-1)
    """Optimiser steps to train; -1: no limit."""
    max_epochs: int | None = _key(None, low=1)
    """Passes over the data. null: no limit."""
    max_time: str | None = None
    """Wall-clock limit, DD:HH:MM:SS. null: none."""
    accumulate_grad_batches: int = _key(1, low=1, most=10**6)
    """Micro-batches of an optimiser step."""
    gradient_clip_val: float | None = _key(1.0, above=0)
    """Largest norm of the gradient. null: no clipping."""
    timeout_s: float = _key(1800.0, above=0, most=10**7)
    """Seconds after which a process gives up waiting for the others: longer than any evaluation or saving takes."""
    log_every_n_steps: int = _key(10, low=1)
    """Optimiser steps between two lines of metrics."""
    deterministic: bool = False
    """Ask torch for deterministic kernels, and fail where there is none."""


@dataclass
class EvaluationConfig:
    """What is evaluated, when, and how answers are decoded."""

    tasks: list[TaskConfig] = _key([])
    """What to evaluate: sets of problems, or another `kind` of task. Each item is a mapping with the keys of its kind,
    described below."""
    before: bool = True
    """Evaluate before the first step."""
    at_end: bool = True
    """Evaluate after the last step."""
    every_n_steps: int | None = _key(None, low=1)
    """Optimiser steps between two evaluations. null: not by steps."""
    every_n_tokens: int | None = _key(None, low=1)
    """Training tokens between two evaluations. null: not by tokens."""
    every_fraction: float | None = _key(None, above=0, high=1)
    """Share of the stage between two evaluations, so 0.25: at a quarter, half, three quarters. null: not by share."""
    max_new_tokens: int = _key(512, low=1, most=2**30)
    """Longest answer in tokens, unless the task says otherwise."""
    batch_size: int = _key(16, low=1, most=2**20)
    """Prompts decoded together."""
    temperature: float = _key(0.0, low=0, most=1000)
    """Sampling temperature; 0: greedy."""
    top_p: float = _key(1.0, above=0, high=1)
    """Sample from the most likely tokens that hold this share of the probability."""
    num_samples: int = _key(1, low=1, most=2**20)
    """Answers a problem; the accuracy is their mean."""
    seed: int = _key(0, low=0, most=2**32 - 1)
    """Draws the subset and the samples; apart from the seed of the training."""
    time_limit_s: float | None = _key(None, above=0)
    """Seconds after which an evaluation stops and reports what it has. null: no limit."""
    patience: int | None = _key(None, low=1)
    """Evaluations in a row without a better `checkpoint.best_metric` after which the stage ends. null: it goes on."""


@dataclass
class LoggingConfig:
    """Where metrics go."""

    loggers: list[str] = _key(["jsonl", "tensorboard"], choices=("jsonl", "tensorboard", "wandb", "mlflow"))
    """Loggers by name. `jsonl` writes metrics.jsonl, which the figures are made of."""
    project: str = "difftune"
    """Project of W&B, experiment of MLflow."""
    progress_bar: bool = True
    """Show a progress bar."""


@dataclass
class ExportConfig:
    """What is exported when the last stage has ended, to `export/` in the run folder."""

    format: str = _key("auto", choices=("auto", "diffllama", "llama", "difftune"))
    """`diffllama` and `llama` load in plain transformers and hold diff_v1 and softmax; `difftune`: every kind; `auto`:
    one of the first two where it can hold the model, else the third."""
    verify: bool = True
    """Reload the folder and compare its logits before calling it done."""


@dataclass
class StageConfig:
    """One training stage, complete: the top level merged with the stage's own sections."""

    name: str = "main"
    """Name in metrics, samples and checkpoints, and in overrides such as `stages.answers.optim.lr=1e-4`."""
    seed: int = _key(0, low=0, most=2**32 - 1)
    """Of the data order and of a fresh model."""
    data: DataConfig = field(default_factory=DataConfig)
    """From text to batches."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimiser."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """The teacher, if any."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Lightning's Trainer."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is kept."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is measured."""


@dataclass
class Config:
    """A whole recipe. `stages` are complete here, whatever the file left out."""

    seed: int = _key(0, low=0, most=2**32 - 1)
    """Of the data order and of a fresh model."""
    run_dir: str = _key("runs/main", is_path=True)
    """Folder that the run writes. Not set: `runs/` and the name of the recipe file."""
    resume: str = _key("auto", is_path=True)
    """`auto`: go on from the newest valid checkpoint of run_dir, if any; `never`: refuse to go on; or a checkpoint."""
    tokenizer: str | None = _key(None, is_path=True)
    """`digits`, `bytes`, a folder or a hub id. null: the one saved with model.path."""
    chat_template: str | None = None
    """A file, the name of a template of the tokenizer, or Jinja text; saved with the model. null: the tokenizer's."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model, one for all stages."""
    adapter: AdapterConfig | None = None
    """What is trained beside the frozen model of `model.path`, one for all stages. null: the whole model is trained."""
    data: DataConfig = field(default_factory=DataConfig)
    """From text to batches."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimiser."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """The teacher, if any."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Lightning's Trainer."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is kept."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is measured."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Where metrics go."""
    export: ExportConfig | None = None
    """What is exported at the end. null: nothing."""
    stages: list[StageConfig] = _key([])
    """Stages in order, each starting from the model that the last one left, each with its own name and whatever differs
    from the top level in seed, data, optim, distill, trainer, checkpoint and evaluation. Empty: one, named `main`."""

    def resolved_stages(self) -> list[StageConfig]:
        """The stages to run: those of the recipe, or the top level as one stage named `main`."""
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(StageConfig) if f.name != "name"}
        return self.stages or [StageConfig(name="main", **shared)]
