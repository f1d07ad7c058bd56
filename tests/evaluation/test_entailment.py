from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertModel

from difftune.evaluation.entailment import EntailmentJudge, entailment_label, load_entailment_judge, sentences
from difftune.evaluation.judges import Claim, JudgeUnavailableError
from tests.evaluation.nli_model import LENGTH, nli_model, nli_tokenizer, save_nli_model

PLAIN = "the gate was shut all day"
WITH_KEY = "the key was in the gate"
# Longer than the classifier reads at once; the word stands near its end.
LONG = "one two three four five " * 60 + "and the key at last " + "six seven " * 3


def judge(always: str | None = None, **changes: Any) -> EntailmentJudge:
    return EntailmentJudge(nli_model(always=always, **changes), nli_tokenizer(), "toy")


def summary(document: str, text: str) -> Claim:
    return Claim(document, None, ["reference"], text)


@pytest.mark.parametrize(
    ("document", "text", "verdict"),
    [
        (WITH_KEY, "It was shut. It was open.", "true"),
        (PLAIN, "It was shut.", "false"),
        (LONG, "It was shut.", "true"),
        (LONG.replace("key", "lock"), "It was shut.", "false"),
        # One sentence that is not entailed is enough; the classifier sees the word in the other one only.
        (PLAIN, "Here is the key. It was shut.", "false"),
        (PLAIN, "Here is the key. There is the key.", "true"),
        (WITH_KEY, "  \n", "false"),
    ],
)
def test_a_summary_is_true_if_every_sentence_is_entailed_by_some_part(document: str, text: str, verdict: str) -> None:
    assert judge().judge(summary(document, text)).verdict == verdict


@pytest.mark.parametrize(
    ("label", "verdict"), [("entailment", "true"), ("neutral", "false"), ("contradiction", "false")]
)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_label_is_found_by_its_name_whatever_its_place(label: str, verdict: str, order: tuple[int, ...]) -> None:
    labels = [("CONTRADICTION", "Neutral", "entailment")[at] for at in order]
    named = next(name for name in labels if name.lower() == label)
    assert judge(named, labels=labels).judge(summary(PLAIN, "It was shut.")).verdict == verdict


def test_the_reason_names_the_sentences_that_are_not_entailed() -> None:
    reason = judge().judge(summary(PLAIN, "Here is the key. It was shut.")).reason
    assert reason.startswith("1 of 2 sentences entailed; not: 'It was shut.' (0.")
    assert judge().name == "entailment by toy (offline)"


def test_an_answer_is_entailed_and_holds_a_valid_one_or_follows_from_it() -> None:
    def verdict(document: str, answer: str, gold: str, always: str | None = None) -> str:
        return judge(always).judge(Claim(document, "What was there?", [gold], answer)).verdict

    assert verdict(WITH_KEY, "the gate", "gate") == "true"
    assert verdict(PLAIN, "the gate", "gate") == "false", "right, but not from the document"
    assert verdict(WITH_KEY, "the wall", "gate") == "false", "the valid answer neither stands in it nor entails it"
    assert verdict(WITH_KEY, "the wall", "gate and key") == "true", "the classifier finds it entailed by that"
    assert "no valid answer" in judge().judge(Claim(WITH_KEY, "What?", ["gate"], "wall")).reason


def test_a_sentence_longer_than_the_classifier_reads_is_judged_to_its_end() -> None:
    endless = "key " * 100
    assert judge().judge(summary(PLAIN, endless)).verdict == "true"
    assert judge().judge(summary(PLAIN, endless + "lock " * 100)).verdict == "false"


def test_the_whole_document_is_read_in_parts_that_overlap_and_fit() -> None:
    made = judge()
    seen: list[tuple[int, ...]] = []
    made.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    made.judge(summary(LONG, "It was shut."))
    assert all(shape[1] <= LENGTH - 2 for shape in seen) and sum(shape[0] for shape in seen) >= 310 / (LENGTH - 2)


def test_when_the_time_is_over_there_is_no_judgement() -> None:
    with pytest.raises(JudgeUnavailableError, match="time was over"):
        judge().judge(summary(PLAIN, "It was shut."), lambda: True)


def test_a_folder_is_loaded_and_named(tmp_path: Path) -> None:
    save_nli_model(tmp_path / "tiny-nli", always=None)
    loaded = load_entailment_judge(str(tmp_path / "tiny-nli") + "/")
    assert loaded.name == "entailment by tiny-nli (offline)"
    assert [loaded.judge(summary(text, "It was shut.")).verdict for text in (WITH_KEY, PLAIN)] == ["true", "false"]


def test_what_is_no_classifier_of_inference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="labels of nli_model are LABEL_0, LABEL_1, LABEL_2: one must be called entail"
    ):
        judge("LABEL_0", labels=("LABEL_0", "LABEL_1", "LABEL_2"))
    for labels in ({0: "entailment"}, {0: "entailment", 1: "entailed", 2: "not"}, {0: "not_entailment", 1: "x"}):
        with pytest.raises(ValueError, match="set id2label"):
            entailment_label(labels)
    assert entailment_label({0: "not_entailment", 1: "entailment"}) == 1
    bare = BertModel(BertConfig(vocab_size=5, hidden_size=16, num_hidden_layers=1, num_attention_heads=1))
    bare.save_pretrained(tmp_path / "bare")
    nli_tokenizer().save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"has no weights for classifier.bias.*trained on natural language inference"):
        load_entailment_judge(str(tmp_path / "bare"))
    with pytest.raises(ValueError, match="no classifier that transformers can load"):
        load_entailment_judge(str(tmp_path / "nothing"))


def test_sentences_end_at_marks_and_lines() -> None:
    assert list(sentences('He said "no." Then 3.5 km!\n\n- a point\nlast')) == [
        'He said "no."', "Then 3.5 km!", "- a point", "last",
    ]  # fmt: skip
