import pytest
import torch
from rich.console import Console

from difftune.data.tokenizers import build_tokenizer
from difftune.evaluation.attention_noise import NoiseTask
from difftune.evaluation.quantization import QuantizationTask, quantize_logits, quantized_attention
from tests.evaluation.scripted import tiny_model
from tests.evaluation.test_attention_noise import Fact
from tests.evaluation.toy_task import SquareTask

TOKENIZER = build_tokenizer("digits")
TOKENS = torch.randint(6, 102, (2, 12), generator=torch.Generator().manual_seed(1))
ALL = torch.ones(1, 1, 1, 1, dtype=torch.bool)
# Two heads of two rows; 7 levels a side at 4 bits.
PLANTED = torch.tensor([[[[7.0, -3.4, 0.6], [1.4, 0.3, -0.7]], [[70.0, 6.0, -4.9], [0.0, 0.0, 0.0]]]])


def test_a_planted_tensor_is_rounded_by_the_step_of_its_row():
    wanted = torch.tensor([[[[7.0, -3.0, 1.0], [1.4, 0.4, -0.8]], [[70.0, 10.0, 0.0], [0.0, 0.0, 0.0]]]])
    wanted[0, 0, 1] = torch.tensor([1.4, 0.2, -0.8])  # step 0.2: 0.3 is 1.5 steps, which rounds to even 2
    wanted[0, 0, 1, 1], wanted[0, 0, 1, 2] = 0.2 * round(0.3 / 0.2), 0.2 * round(-0.7 / 0.2)
    actual = quantize_logits(PLANTED, ALL.expand(1, 1, 2, 3), bits=4, granularity="row")
    assert ((actual - wanted).abs() <= 0.2 + 1e-6).all()  # ties may fall either way in float32
    torch.testing.assert_close(actual[0, 0, 0], torch.tensor([7.0, -3.0, 1.0]))
    torch.testing.assert_close(actual[0, 1], torch.tensor([[70.0, 10.0, -0.0], [0.0, 0.0, 0.0]]))


def test_a_head_and_a_tensor_share_their_largest_logit():
    visible = ALL.expand(1, 1, 2, 3)
    head = quantize_logits(PLANTED, visible, bits=4, granularity="head")
    torch.testing.assert_close(head[0, 0], torch.tensor([[7.0, -3.0, 1.0], [1.0, 0.0, -1.0]]))
    tensor = quantize_logits(PLANTED, visible, bits=4, granularity="tensor")
    torch.testing.assert_close(tensor[0, 0], torch.tensor([[10.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))


def test_what_no_query_sees_does_not_widen_the_step():
    visible = torch.tensor([[[[True, True, False]]]])
    logits = torch.tensor([[[[7.0, -3.4, 1e6]]]])
    torch.testing.assert_close(quantize_logits(logits, visible, bits=4)[..., :2], torch.tensor([[[[7.0, -3.0]]]]))


@pytest.mark.parametrize("bits", [2, 3, 8, 15])
def test_no_logit_moves_by_more_than_half_a_step_and_levels_are_counted(bits):
    logits = torch.randn(1, 1, 20, 50)
    visible = torch.ones(1, 1, 20, 50, dtype=torch.bool)
    rounded = quantize_logits(logits, visible, bits=bits)
    step = logits.abs().max() / (2 ** (bits - 1) - 1)
    assert (rounded - logits).abs().max() <= step / 2 * 1.0001
    assert len((rounded / step).round().unique()) <= 2**bits - 1


@pytest.mark.parametrize("kind", ["diff_v1", "diff_v2", "softmax"])
def test_sixteen_bits_are_the_model_itself_and_fewer_are_further_off(kind):
    model = tiny_model(kind).eval()
    plain = model(TOKENS).logits
    off = {}
    for bits in (16, 15, 8, 4, 2):
        with quantized_attention(model, bits=bits):
            off[bits] = (model(TOKENS).logits - plain).abs().max().item()
    assert off[16] == 0
    assert 0 < off[15] < off[8] < off[4] < off[2]
    assert torch.equal(model(TOKENS).logits, plain)


def test_the_batch_around_a_sequence_does_not_change_its_rounding():
    model = tiny_model().eval()
    with quantized_attention(model, bits=4):
        torch.testing.assert_close(model(TOKENS).logits[1:], model(TOKENS[1:]).logits)


@pytest.mark.parametrize(("bits", "granularity"), [(1, "row"), (17, "row"), (4, "column")])
def test_settings_out_of_range_are_refused(bits, granularity):
    with pytest.raises(ValueError, match="must be"):
        quantize_logits(PLANTED, ALL, bits=bits, granularity=granularity)
    with pytest.raises(ValueError, match="must be"):
        QuantizationTask("q", SquareTask(), (bits,), granularity)


def test_another_task_is_measured_with_each_number_of_bits():
    model = tiny_model("softmax")
    inner = NoiseTask("noise", [Fact(), Fact(depth=0.25)], pictures=0)
    plain = inner.summarise(inner.run(model, TOKENIZER)).metrics()
    task = QuantizationTask("bits", inner, (16, 3))
    blocks: list[list] = []
    samples = task.run(model, TOKENIZER, on_block=blocks.append)
    metrics = task.summarise(samples).metrics()
    assert metrics["answer_16bit"] == plain["answer"] and metrics["answer_3bit"] != plain["answer"]
    assert sorted(sample.index for sample in samples) == [0, 1, 2, 3] and len(blocks) == 4
    assert task.summarise(samples).complete and not task.summarise(samples[:3]).complete
    assert task.run(model, TOKENIZER, done=samples[:2])[2:] == samples[2:]


def test_blocks_of_two_numbers_of_bits_do_not_mix_and_the_result_is_that_of_the_inner_task():
    task = QuantizationTask("bits", SquareTask(size=3), (8, 4))
    assert list(task.blocks(list(range(6)))) == [[0, 1], [2], [3, 4], [5]]
    result = task.summarise(task.run(tiny_model(), TOKENIZER))
    assert result.metrics() == {"sum_8bit": 5.0, "sum_4bit": 5.0}
    assert result.row() == {"sum, 8 bits": "5", "sum, 4 bits": "5"} and result.to_dict()["bits"]["4"] == {"sum": 5.0}
    console = Console(record=True)
    console.print(*result.tables(), str(result))
    assert "by bits" in console.export_text()
    empty = task.summarise([])
    assert empty.row() == {} and empty.tables() == [] and not empty.complete
    task.close()
    assert task.inner.closed
