import json

from difftune.tasks.documents import read_documents


def test_texts_and_chats_are_read_as_in_training(tmp_path):
    file = tmp_path / "mixed.jsonl"
    file.write_text(json.dumps({"question": "1+1", "answer": "2"}) + "\n" + json.dumps({"question": "x", "answer": ""}))
    (chat,) = read_documents(str(file))
    assert [turn["content"] for turn in chat] == ["1+1", "2"]
    assert len(read_documents("synthetic:arithmetic", limit=4)) == 4
    assert read_documents("synthetic:arithmetic", limit=4) != read_documents(
        "synthetic:arithmetic", split="train", limit=4
    )
