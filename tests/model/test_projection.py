"""The 4-bit form against the 16-bit one, and bits that do not depend on the number of rows."""

import pytest
import torch

from model.checkpoints.gguf import GGUFFile
from model.checkpoints.load import find_base_file
from model.native.packed import pack
from model.projection import Int4Weight, Projection

MATRICES = {
    "attn_output": (576, 576),
    "ffn_gate": (1536, 576),
    "ffn_down": (576, 1536),
}


@pytest.fixture(scope="module")
def projections():
    """The file's matrices in 16 bits, and in torch's own 4."""
    file = GGUFFile(find_base_file())
    made = {}
    for name, shape in MATRICES.items():
        stored = f"blk.3.{name}.weight"
        packed = pack(*file.quants(stored, shape))
        made[name] = Projection(file.tensor(stored, shape).bfloat16(), Int4Weight.of(packed))
    return made


def test_the_4_bit_form_is_the_files_own_weights(projections):
    """With a one-hot row a product reads one column: scale and zero are rounded to bfloat16, nothing else."""
    for name, projection in projections.items():
        inputs = projection.weight.shape[1]
        columns = torch.tensor([0, 31, 32, inputs - 1])
        rows = torch.nn.functional.one_hot(columns, inputs).bfloat16()
        found = projection.int4.product(rows).float()
        expected = projection.weight[:, columns].T.float()
        assert (found - expected).norm() / expected.norm() < 0.01, name


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13, 16, 31])
def test_a_4_bit_product_gives_a_row_the_same_bits_for_any_number_of_rows(projections, count):
    for projection in projections.values():
        rows = torch.randn(
            48, projection.weight.shape[1], generator=torch.Generator().manual_seed(1)
        ).bfloat16()
        whole = projection.int4.product(rows)
        assert torch.equal(projection.int4.product(rows[:count]), whole[:count])


def test_written_rows_take_the_4_bit_form_and_prompt_rows_the_16_bit_one(projections):
    projection = projections["ffn_gate"]
    rows = torch.randn(6, 576, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert torch.equal(projection(rows, written=True), projection.int4.product(rows))
    assert torch.equal(projection(rows), Projection(projection.weight)(rows))


@pytest.mark.parametrize(
    ("name", "shape", "bits"),
    [("blk.0.ffn_down.weight", (576, 1536), 4), ("token_embd.weight", (49152, 576), 8)],
)
def test_quants_and_scales_give_back_the_dequantised_matrix(name, shape, bits):
    file = GGUFFile(find_base_file())
    quants, scales, found_bits = file.quants(name, shape)
    assert found_bits == bits
    groups = quants.float().unflatten(1, (-1, 32))
    weight = groups * scales[..., :1].float() + scales[..., 1:].float()
    torch.testing.assert_close(weight.flatten(1), file.tensor(name, shape), atol=1e-6, rtol=1e-5)
    assert file.quants("output_norm.weight", (576,)) is None
