"""Trainers on tiny models: builds, runs and stops them, keeps their generation batches, and measures by reference."""

import pytest
import torch
from transformers import TrainerCallback
from trl import DistillationConfig

from trl_opd import OPDConfig, OPDTrainer

from tests.helpers import reference
from tests.helpers.tiny import config_kwargs, make_dataset, make_model, make_tokenizer

GREEDY = {"do_sample": False}
PARKED = {"teacher_placement": "parked"}
ROCKS = list(range(60, 180))
OF_TRAINER = ("eval_dataset", "callbacks", "quantization_config", "peft_config")


def build(path, student=None, teacher=None, tokenizer=None, cls=OPDTrainer, train_dataset=None, **changes):
    """Build a trainer of TRL's class or ours; `changes` are arguments of the trainer or settings of a short run."""
    given = {key: changes.pop(key) for key in OF_TRAINER if key in changes}
    config = OPDConfig if issubclass(cls, OPDTrainer) else DistillationConfig
    return cls(
        model=make_model(seed=0) if student is None else student,
        teacher_model=make_model(seed=1) if teacher is None else teacher,
        args=config(**config_kwargs(path, **changes)),
        train_dataset=make_dataset() if train_dataset is None else train_dataset,
        processing_class=tokenizer or make_tokenizer(),
        **given,
    )


def trained(path, **changes):
    """Build a trainer, train, and return it."""
    trainer = build(path, **changes)
    trainer.train()
    return trainer


def recorder(cls):
    """Return the class, keeping mode, step, prompts and content of every generation batch."""

    class Recorder(cls):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            place = (self.model.training, self.state.global_step)
            self.batches = [*getattr(self, "batches", []), (*place, [row["prompt"] for row in inputs], batch)]
            return batch

    return Recorder


Recorder = recorder(OPDTrainer)


def record(tokenizer, path, dataset=None, **changes) -> Recorder:
    """Train on prompts that are plain texts, and return the trainer with its generation batches."""
    dataset = make_dataset(chat=False) if dataset is None else dataset
    return trained(path, tokenizer=tokenizer, train_dataset=dataset, cls=Recorder, **changes)


def ending_student(factor: float = 4.0, ends=(2,)):
    """Return a student some of whose rollouts end early: an end is likely wherever its logit is positive."""
    student = make_model(seed=0)
    with torch.no_grad():
        student.lm_head.weight[list(ends)] *= factor
    return student


def loss_positions(batch) -> torch.Tensor:
    """Return the mask of the positions in the loss, `(B, C)`."""
    return (batch["completion_mask"] * batch.get("tool_mask", 1)).bool()


def measured(trainer, batch, teacher=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and divergences of the loss mask of a batch under the trainer's student as it is, by reference."""
    student = make_model(seed=0)
    student.load_state_dict(trainer.model.state_dict())
    models = (student.double().eval(), (teacher or make_model(seed=1)).double().eval())
    with torch.no_grad():
        rows = reference.token_divergences(*models, batch, beta=1.0, temperature=1.0, vocab=300)
    return batch["completion_ids"][loss_positions(batch)], torch.stack([value for row in rows for value in row])


def broken(model, where):
    with torch.no_grad():
        if where == "everywhere":
            for p in model.parameters():
                p.fill_(float("nan"))
        else:
            model.lm_head.weight[50] = float(where)
    return model


def loss_and_gradient(trainer, inputs):
    """Return the loss and every gradient of one training forward and backward on given rollouts."""
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_close(found, expected, tolerance: float = 1e-5) -> None:
    """Assert that two pairs of a loss and its gradients by name agree."""
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert reference.relative_error(found[1], expected[1]) < tolerance


def assert_same_weights(one, other) -> None:
    """Assert that two models have the same parameters to the bit."""
    expected, found = dict(one.named_parameters()), dict(other.named_parameters())
    assert expected.keys() == found.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []


def reference_of(trainer, inputs, vocab: int = 300):
    """Return the loss and every gradient of given rollouts, unweighted, by reference."""
    rows = [[1.0] * int(mask.sum()) for mask in inputs["completion_mask"]]
    count = int(inputs["completion_mask"].sum())
    return reference.loss_and_gradient(trainer.model, trainer.teacher_model, inputs, rows, count, vocab=vocab)


def timeless(line: dict) -> dict:
    """Return the metrics of a line of the log that do not depend on how long anything took."""
    parts = ("time", "per_second", "phase/")
    return {name: value for name, value in line.items() if not any(part in name for part in parts)}


class Stop(TrainerCallback):
    def __init__(self, step):
        self._step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            raise KeyboardInterrupt
