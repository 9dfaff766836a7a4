"""A parked teacher holds no memory, cannot run, and comes back as it was."""

import pytest
import torch

from trl_opd.models.parking import Parking

from tests.helpers.tiny import make_model, save
from tests.helpers.trainers import PARKED, build


def test_a_parked_teacher_is_empty_cannot_run_and_comes_back_as_it_was(tmp_path):
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


def test_an_error_while_it_is_here_parks_it_again(tmp_path):
    model = make_model(seed=1)
    parking = Parking(model, ())
    parking.offload()
    with pytest.raises(ZeroDivisionError), parking.on_device():
        raise ZeroDivisionError
    assert all(p.numel() == 0 for p in model.parameters())


def test_an_offloaded_teacher_is_not_parked():
    with torch.device("meta"):
        model = make_model(seed=1)
    with pytest.raises(ValueError, match="offloaded cannot be parked"):
        Parking(model, ())


def test_eight_bits_that_come_another_way_are_not_parked(tmp_path):
    eight = {"teacher_model_init_kwargs": {"quantization_config": {"load_in_8bit": True}}}
    with pytest.raises(ValueError, match="in 8 bits cannot be parked"):
        build(tmp_path, teacher=save(tmp_path / "teacher", seed=1), **eight, **PARKED)
