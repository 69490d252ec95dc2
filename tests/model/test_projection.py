"""The 4-bit form against the 16-bit one, and bits that do not depend on the number of rows."""

import pytest
import torch

from model.checkpoints.gguf import GGUFFile
from model.checkpoints.load import find_base_file
from model.projection import Projection


@pytest.fixture(scope="module")
def real(load_real):
    return load_real(torch.bfloat16).transformer


def projections(model):
    layer = model.layers[3]
    return {name: getattr(layer, name) for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")}


def test_the_4_bit_form_is_the_files_own_weights(real):
    """With a one-hot row a product reads one column: scale and zero are rounded to bfloat16, nothing else."""
    for name, projection in projections(real).items():
        inputs = projection.weight.shape[1]
        columns = torch.tensor([0, 31, 32, inputs - 1])
        rows = torch.nn.functional.one_hot(columns, inputs).bfloat16()
        found = projection.int4.product(rows).float()
        expected = projection.weight[:, columns].T.float()
        assert (found - expected).norm() / expected.norm() < 0.01, name


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13, 16, 31])
def test_a_4_bit_product_gives_a_row_the_same_bits_for_any_number_of_rows(real, count):
    for projection in projections(real).values():
        rows = torch.randn(
            48, projection.weight.shape[1], generator=torch.Generator().manual_seed(1)
        ).bfloat16()
        whole = projection.int4.product(rows)
        assert torch.equal(projection.int4.product(rows[:count]), whole[:count])


def test_written_rows_take_the_4_bit_form_and_prompt_rows_the_16_bit_one(real):
    projection = real.layers[0].gate_up_proj
    rows = torch.randn(6, 576, generator=torch.Generator().manual_seed(2)).bfloat16()
    mixed = projection(rows, decode_rows=2)
    assert torch.equal(mixed[:2], projection.int4.product(rows[:2]))
    assert torch.equal(mixed[2:], Projection(projection.weight)(rows[2:]))


def test_quants_and_scales_give_back_the_dequantised_matrix():
    file = GGUFFile(find_base_file())
    quants, scales = file.quants("blk.0.ffn_down.weight", (576, 1536))
    weight = (quants.view(576, -1, 32).float() - 8) * scales[..., :1] + scales[..., 1:]
    torch.testing.assert_close(
        weight.view(576, 1536), file.tensor("blk.0.ffn_down.weight", (576, 1536)), atol=1e-6, rtol=1e-5
    )
    assert file.quants("token_embd.weight", (49152, 576)) is None
