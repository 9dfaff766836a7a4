"""What only a GPU would show and a CPU can hold: memory that is freed, devices, dtypes and errors of CUDA."""

import gc
import weakref

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model

from trl_opd import OPDTrainer, RolloutSamples
from trl_opd.models.parking import Parking
from trl_opd.models.quantised import keep_scalable
from trl_opd.models.teacher import load_teacher
from trl_opd.rollouts.sampling import attention_restored, sample_unpadded
from trl_opd.training.finite import name_student_in_sampling_error
from trl_opd.training.teacher_states import free_cuda_memory

from tests.helpers.tiny import make_config, make_model, save
from tests.helpers.trainers import GREEDY, build


def test_states_of_the_teacher_are_gone_before_the_next_rollouts_are_sampled(tmp_path):
    alive = []

    class Watch(OPDTrainer):
        kept = ()

        def _generate_single_turn(self, *args, **kwargs):
            gc.collect()
            alive.append([reference() is not None for reference in self.kept])
            return super()._generate_single_turn(*args, **kwargs)

        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            self.kept = [weakref.ref(states) for states in batch["teacher_hidden"]]
            return batch

    trainer = build(tmp_path, cls=Watch, max_steps=3, logging_steps=2)
    trainer.add_callback(RolloutSamples(2))
    trainer.train()
    assert alive[0] == []
    assert len(alive) == 3
    assert not any(any(states) for states in alive)


def test_teacher_that_ran_out_of_memory_on_its_way_back_leaves_again(monkeypatch):
    model = make_model(seed=1)
    parking = Parking(model, ())
    parking.offload()
    real, calls = torch.Tensor.to, []

    def full(tensor, *args, **kwargs):
        calls.append(tensor)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(torch.OutOfMemoryError), parking.on_device():
        pass
    monkeypatch.undo()
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    with parking.on_device():
        assert all(parameter.numel() > 0 for parameter in model.parameters())
    assert all(parameter.numel() == 0 for parameter in model.parameters())


def test_memory_that_pytorch_keeps_for_reuse_counts_as_free(monkeypatch):
    for name, value in (("memory_reserved", 50), ("memory_allocated", 20), ("mem_get_info", (7, 100))):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_cuda_memory(torch.device("cuda")) == 37


@pytest.mark.parametrize(
    ("message", "error", "match"),
    [
        ("probability tensor contains either `inf`, `nan` or element < 0", ValueError, "the student's logits are not"),
        ("CUDA error: device-side assert triggered", RuntimeError, "a CUDA assertion failed while rollouts"),
        ("CUDA out of memory", RuntimeError, "^CUDA out of memory$"),
    ],
)
def test_error_while_sampling_names_the_student_only_where_its_logits_are_the_cause(message, error, match):
    with pytest.raises(error, match=match), name_student_in_sampling_error(4):
        raise RuntimeError(message)


@pytest.mark.parametrize(("supported", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_quantised_teacher_computes_in_what_the_card_has(tmp_path, monkeypatch, supported, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported)
    loaded = {}
    monkeypatch.setattr(
        "trl_opd.models.teacher.create_model_from_path",
        lambda name, **kwargs: loaded.update(kwargs) or make_model(seed=1),
    )
    args = make_config(tmp_path, teacher_quantization="4bit", teacher_device="cuda:0")
    load_teacher(save(tmp_path / "teacher", seed=1), "student", args)
    assert loaded["dtype"] == dtype
    assert loaded["quantization_config"].bnb_4bit_compute_dtype == dtype


def test_trainable_weights_in_half_precision_become_float32_for_the_gradient_scaler():
    student = get_peft_model(make_model().bfloat16(), LoraConfig(r=4, target_modules=["q_proj"]))
    for parameter in student.parameters():
        parameter.data = parameter.data.bfloat16()
    keep_scalable(student)
    for parameter in student.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)


def test_offloaded_teacher_scores_as_one_in_memory(tmp_path):
    losses = []
    for offloaded in (False, True):
        teacher = make_model(seed=1)
        if offloaded:  # as a `device_map` does with the layers that do not fit
            cpu_offload(teacher, execution_device=torch.device("cpu"))
            teacher.hf_device_map = {"": "cpu"}
            assert all(parameter.is_meta for parameter in teacher.parameters())
        trainer = build(tmp_path, teacher=teacher, max_steps=2)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history[:-1]])
    assert losses[0] == losses[1]


def test_attention_implementation_is_restored_after_an_error():
    model = make_model()
    before = model.config._attn_implementation

    def fail():
        with attention_restored(model):
            model.set_attn_implementation("eager")
            raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        fail()
    assert model.config._attn_implementation == before != "eager"


def test_prompts_are_sampled_by_length_and_returned_in_order():
    calls = []

    def generate(prompts):
        calls.append([len(ids) for ids in prompts])
        return [[ids[0], len(ids)] for ids in prompts]

    prompts = [[5, 6, 7], [8], [9, 10, 11], [12], [13, 14]]
    expected = [[5, 3], [8, 1], [9, 3], [12, 1], [13, 2]]
    assert sample_unpadded(generate, prompts, together=True) == expected
    assert calls == [[3, 3], [1, 1], [2]]
    calls.clear()
    assert sample_unpadded(generate, prompts, together=False) == expected
    assert calls == [[3], [1], [3], [1], [2]]


def test_rollouts_are_sampled_under_the_autocast_in_which_they_are_scored(tmp_path):
    dtypes = []

    class Watch(OPDTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            hook = self.model.get_output_embeddings().register_forward_hook(
                lambda module, inputs, output: dtypes.append(output.dtype)
            )
            try:
                return super()._generate_single_turn(*args, **kwargs)
            finally:
                hook.remove()

    lora = LoraConfig(r=4, target_modules=["q_proj"])
    for peft_config in (lora, None):
        trainer = build(tmp_path, cls=Watch, peft_config=peft_config, bf16=True, max_steps=1, generation_kwargs=GREEDY)
        trainer.train()
        assert set(dtypes) == {torch.bfloat16}
        dtypes.clear()


def test_context_is_the_shorter_of_both_models(tmp_path):
    trainer = build(tmp_path, teacher=make_model(seed=1, max_position_embeddings=64))
    assert trainer.context_length == 64
    trainer = build(tmp_path, student=make_model(max_position_embeddings=64))
    assert trainer.context_length == 64
