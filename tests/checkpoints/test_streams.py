import torch

from difftune.checkpoints.streams import by_unit, in_order, unit_of


def test_tensors_come_in_the_order_of_a_forward_pass() -> None:
    layers = [f"model.layers.{i}.mlp.{part}.weight" for i in range(12) for part in ("down_proj", "up_proj")]
    names = ["model.embed_tokens.weight", *layers, "model.norm.weight", "lm_head.weight"]
    tensors = {name: torch.zeros(1) for name in sorted(names)}
    assert [name for name, _ in in_order(tensors)] == names
    units = [unit for unit, _ in by_unit(in_order(tensors))]
    assert units == [names[0], *[f"model.layers.{i}." for i in range(12)], *names[-2:]]
    assert all(len(items) == 2 for unit, items in by_unit(in_order(tensors)) if unit.startswith("model.layers"))


def test_a_tensor_is_read_when_its_turn_comes() -> None:
    read = []

    class Lazy(dict):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

    stream = in_order(Lazy({"model.norm.weight": torch.zeros(1), "model.embed_tokens.weight": torch.zeros(1)}))
    assert not read
    next(stream)
    assert read == ["model.embed_tokens.weight"]


def test_a_name_outside_the_layers_is_its_own_unit() -> None:
    assert unit_of("model.layers.10.self_attn.q_proj.weight") == "model.layers.10."
    assert unit_of("lm_head.weight") == "lm_head.weight"
