import torch

from difftune.training.sharding import average_replicated_gradients


class Mesh:
    def size(self):
        return 1


def test_one_rank_has_nothing_to_average():
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, 2.0])
    average_replicated_gradients([parameter], Mesh())
    assert parameter.grad.tolist() == [1, 2]
