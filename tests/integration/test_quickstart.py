"""What `make quickstart` promises, checked on the run folder that it left; without one there is nothing to check."""

import json
import subprocess
import sys

import pytest

from difftune.report.summary import accuracies
from tests.conftest import ROOT

RUN = ROOT / "runs" / "quickstart"

pytestmark = pytest.mark.skipif(not (RUN / "export").is_dir(), reason="`make quickstart` has not been run here")


def test_traces_teach_what_answers_alone_do_not():
    before, answers, traces = accuracies(RUN)
    assert (before["when"], answers["when"], traces["when"]) == ("before training", "after answers", "after traces")
    assert before["accuracy"] <= 0.05 and traces["n"] == 200
    assert traces["accuracy"] >= 0.90 and traces["accuracy_low"] > answers["accuracy_high"]


def test_plain_transformers_solves_a_problem_with_the_export():
    """A process that never imports difftune, on the first problem that the run solved."""
    step = max(int(path.stem.removeprefix("traces-")) for path in (RUN / "samples").glob("traces-*.jsonl"))
    samples = [json.loads(line) for line in (RUN / "samples" / f"traces-{step}.jsonl").read_text().splitlines()]
    solved = next(sample for sample in samples if sample["verdict"] == "correct")
    code = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, question = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
chat = [{"role": "user", "content": question}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0, inputs["input_ids"].shape[1] :]
assert not any(name.split(".")[0] == "difftune" for name in sys.modules)
print(type(model).__name__, tokenizer.decode(out, skip_special_tokens=True))
"""
    command = [sys.executable, "-c", code, str(RUN / "export"), solved["question"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=RUN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"DiffLlamaForCausalLM {solved['text']}".strip()
