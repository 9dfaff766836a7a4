"""A parked teacher uses no device memory, cannot run a forward, and is restored unchanged."""

import pytest
import torch

from trl_opd.models.parking import Parking

from tests.helpers.tiny import make_model, save
from tests.helpers.trainers import PARKED, build


def test_parked_teacher_is_empty_cannot_run_and_is_restored_unchanged():
    model = make_model(seed=1).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
    head = model.get_output_embeddings().weight
    parking = Parking(model, (head,))
    parking.offload()
    assert all(p.numel() == 0 for p in model.parameters() if p is not head)
    assert head.numel() == 300 * 32
    for part in (model, model.base_model):
        with pytest.raises(RuntimeError, match="The teacher is parked"):
            part(input_ids=ids)
    with parking.on_device(), parking.on_device(), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)
    assert all(p.numel() == 0 for p in model.parameters() if p is not head)


def test_error_inside_the_block_parks_the_teacher_again():
    model = make_model(seed=1)
    parking = Parking(model, ())
    parking.offload()
    with pytest.raises(ZeroDivisionError), parking.on_device():
        raise ZeroDivisionError
    assert all(p.numel() == 0 for p in model.parameters())


def test_parking_an_offloaded_teacher_raises():
    with torch.device("meta"):
        model = make_model(seed=1)
    with pytest.raises(ValueError, match="offloaded cannot be parked"):
        Parking(model, ())


def test_parking_a_teacher_in_8_bits_from_init_kwargs_raises(tmp_path):
    eight = {"teacher_model_init_kwargs": {"quantization_config": {"load_in_8bit": True}}}
    with pytest.raises(ValueError, match="in 8 bits cannot be parked"):
        build(tmp_path, teacher=save(tmp_path / "teacher", seed=1), **eight, **PARKED)
