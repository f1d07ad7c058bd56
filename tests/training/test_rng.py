import io
import random

import numpy as np
import torch

from difftune.training.rng import capture_rng, restore_rng


def draw():
    return torch.rand(3).tolist(), random.random(), np.random.rand(2).tolist(), np.random.randn()


def test_what_was_captured_comes_back_through_a_weights_only_load():
    draw()
    buffer = io.BytesIO()
    torch.save(capture_rng(), buffer)
    expected = draw(), draw()
    buffer.seek(0)
    restore_rng(torch.load(buffer, weights_only=True))
    assert (draw(), draw()) == expected
