import pickle

from difftune.data.rows import BadRow


def test_a_bad_row_names_itself_and_its_kind_also_in_another_process():
    error = pickle.loads(pickle.dumps(BadRow("a.jsonl, line 3", "no column 'x'; there are y")))
    assert str(error) == "a.jsonl, line 3: no column 'x'; there are y"
    assert error.reason == "no column 'x'"
    assert BadRow("", "no token for 'é' (digits)").reason == "no token"
