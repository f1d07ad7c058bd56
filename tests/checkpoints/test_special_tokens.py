import json

from difftune.checkpoints.special_tokens import write_special_tokens
from difftune.data.tokenizers import build_tokenizer


def test_a_folder_says_the_end_that_was_learned_and_keeps_the_others(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 0, "hidden_size": 8}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 9], "temperature": 0.7}))
    write_special_tokens(tmp_path, build_tokenizer("digits"))
    config, generation = (
        json.loads((tmp_path / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    assert config == {"eos_token_id": [2, 0, 9], "bos_token_id": 1, "hidden_size": 8}
    assert generation == {"eos_token_id": [2, 0, 9], "bos_token_id": 1, "temperature": 0.7, "pad_token_id": 0}
