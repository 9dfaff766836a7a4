"""Trainers on tiny models: built, run with their generation batches kept, stopped, and measured by the reference."""

import torch
from transformers import TrainerCallback

from trl_opd import OPDTrainer

from tests.helpers import reference
from tests.helpers.tiny import make_config, make_dataset, make_model, make_tokenizer

GREEDY = {"do_sample": False}
PARKED = {"teacher_placement": "parked"}
ROCKS = list(range(60, 180))


def build(path, student=None, teacher=None, tokenizer=None, cls=OPDTrainer, **changes):
    names = ("quantization_config", "peft_config", "train_dataset", "eval_dataset", "callbacks")
    given = {"train_dataset": make_dataset()} | {name: changes.pop(name) for name in names if name in changes}
    return cls(
        model=make_model(seed=0) if student is None else student,
        teacher_model=make_model(seed=1) if teacher is None else teacher,
        args=make_config(path, **changes),
        processing_class=tokenizer or make_tokenizer(),
        **given,
    )


class Rollouts(OPDTrainer):
    """Keeps the generation batches."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        self.seen = [*getattr(self, "seen", []), batch]
        return batch


class Recorder(OPDTrainer):
    """Keeps the prompts and the generation batches of every step."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        place = (self.model.training, self.state.global_step)
        self.batches = [*getattr(self, "batches", []), (*place, [row["prompt"] for row in inputs], batch)]
        return batch


def record(tokenizer, path, dataset=None, eval_dataset=None, student=None, **changes) -> Recorder:
    trainer = Recorder(
        model=student or make_model(seed=0),
        teacher_model=make_model(seed=1),
        args=make_config(path, **changes),
        train_dataset=make_dataset(chat=False) if dataset is None else dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


def measured(trainer, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and divergences of the loss mask of a batch under the trainer's models as they are, by reference."""
    student, teacher = (make_model(seed=seed).double().eval() for seed in (0, 1))
    student.load_state_dict(trainer.model.state_dict())
    with torch.no_grad():
        rows = reference.token_divergences(student, teacher, batch, beta=1.0, temperature=1.0, vocab=300)
    mask = (batch["completion_mask"] * batch.get("tool_mask", 1)).bool()
    return batch["completion_ids"][mask], torch.stack([value for row in rows for value in row])


def broken(model, where):
    with torch.no_grad():
        if where == "everywhere":
            for p in model.parameters():
                p.fill_(float("nan"))
        else:
            model.lm_head.weight[50] = {"nan": float("nan"), "inf": float("inf")}[where]
    return model


def loss_and_gradient(trainer, inputs):
    """Return the loss and every gradient of one training forward and backward on given rollouts."""
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}


class Stop(TrainerCallback):
    def __init__(self, step):
        self._step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            raise KeyboardInterrupt
