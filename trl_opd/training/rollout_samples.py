"""A callback that keeps some rollouts of the steps that log, with what both models thought of every token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from ..artefacts.sampled_rollouts import TOP, join_parts, keep_up_to, write_part
from ..loss.lm_head import LMHead
from ..loss.logits import head_logits
from ..opd_config import require_whole
from ..rollouts.batches import locate, take_rollouts
from ..rollouts.sampling import sampling_mode
from .model_pair import compared
from .position_weights import ends_in_log

ROWS = 32  # of a chunk of logits
PROMPT_TOKENS = 512  # of a prompt that are kept, the last ones


class RolloutSamples(TrainerCallback):
    """Keeps `n` rollouts of every optimizer step that ends in a log, for `trl-opd report`.

    They go to `output_dir/rollout_samples.parquet`: for each token the divergence, before the distillation too with a
    LoRA student, the entropy, the weight, and the five likeliest tokens of both models. Everything is measured before
    the step's update, without dropout, and no random number is drawn: the run is the one without this callback. The
    cost is a forward of the student over `n` rollouts (two with LoRA) in each of those steps.

    Args:
        n (`int`, *optional*, defaults to `4`): Rollouts of a step, of the first process, spread over its prompts.

    Raises:
        `ValueError`: if `n` is no whole number of at least 1.
    """

    def __init__(self, n: int = 4):
        require_whole("n", n, 1)
        self._n, self._trainer = n, None

    def attach(self, trainer) -> None:
        """Take the trainer whose rollouts are kept; [`OPDTrainer`] calls this when a training begins."""
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if self._trainer is None:
            raise ValueError("RolloutSamples works with trl_opd.OPDTrainer only: another trainer keeps no rollouts.")
        if state.is_world_process_zero:
            keep_up_to(Path(args.output_dir), state.global_step)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not ends_in_log(args, state):
            return
        # Every process measures its own: with sharded models a forward takes all of them.
        columns, prompts = self._measure(self._trainer._generation_batch)
        if state.is_world_process_zero and len(columns["token_id"]):
            step = state.global_step + 1
            columns["step"] = np.full(len(columns["token_id"]), step)
            metadata = {
                **self._trainer._occurrences.metadata,
                "prompts": {f"{step}/{i}": ids for i, ids in prompts.items()},
            }
            write_part(Path(args.output_dir), step, columns, metadata)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            join_parts(Path(args.output_dir))

    def _measure(self, batch: dict[str, torch.Tensor]) -> tuple[dict[str, np.ndarray], dict[int, list[int]]]:
        """Return the columns of some rollouts of a generation batch, and the token ids of their prompts."""
        trainer, count = self._trainer, len(batch["completion_ids"])
        rows = torch.linspace(0, count - 1, min(self._n, count)).round().long()
        inputs = locate(take_rollouts(batch, rows))
        student, positions = trainer.accelerator.unwrap_model(trainer.model), inputs["positions"]
        ids = inputs["completion_ids"].flatten()[positions]
        with torch.no_grad(), sampling_mode(trainer.model):
            # Through the wrapper, as in a step: FSDP and DeepSpeed gather the weights in its forward.
            wrapper = trainer.model_wrapped
            found = trainer._forward_redirection(wrapper, student, self._figures, student, inputs, positions, ids)
        reshard(student)
        width, places = inputs["completion_ids"].shape[1], positions.cpu().numpy()
        rollout = rows.numpy()[places // width]
        prompt = rollout // trainer.args.num_generations
        found |= {"rollout": rollout, "prompt": prompt, "position": places % width, "token_id": ids.cpu().numpy()}
        found["weight"] = inputs["position_weights"].numpy()
        found.setdefault("kl_pre", np.full(len(ids), np.nan, np.float32))
        prompts = {
            int(row) // trainer.args.num_generations: tokens[mask.bool()].tolist()[-PROMPT_TOKENS:]
            for row, tokens, mask in zip(rows, inputs["prompt_ids"], inputs["prompt_mask"], strict=True)
        }
        return found, prompts

    def _figures(self, student, inputs, positions, ids) -> dict[str, np.ndarray]:
        trainer = self._trainer
        found = token_figures(*compared(trainer, student, inputs, positions), ids, temperature=trainer.temperature)
        if is_peft_model(student):
            with student.disable_adapter():
                before = compared(trainer, student, inputs, positions)
                found["kl_pre"] = token_figures(*before, ids, temperature=trainer.temperature)["kl"]
        return found


def reshard(model: torch.nn.Module) -> None:
    """Let go of the weights that FSDP2 has gathered for a forward without a backward.

    It keeps the final norm and the head for the backward that should come: the next forward would read them as they
    were before the optimizer step.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def token_figures(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    student_head: LMHead,
    teacher_head: LMHead,
    token_ids: torch.Tensor,
    *,
    temperature: float,
) -> dict[str, np.ndarray]:
    """Return what two models think of tokens, float32, `(N,)` each, and their likeliest tokens, `(N, 5)`.

    `kl` is KL(student ‖ teacher) in nats, `entropy` the student's, `student_p` and `teacher_p` the probability of the
    token, `*_top_ids` and `*_top_p` the five likeliest; all over the vocabulary that the two share.

    Args:
        student_hidden, teacher_hidden (`torch.Tensor`): Hidden states that predict the tokens, `(N, H)`.
        student_head, teacher_head (`LMHead`): The heads.
        token_ids (`torch.Tensor`): The tokens, int64, `(N,)`.
        temperature (`float`): Softmax temperature of both distributions.
    """
    vocab_size = min(len(student_head.weight), len(teacher_head.weight))
    chunks: list[dict[str, torch.Tensor]] = []
    for start in range(0, max(len(token_ids), 1), ROWS):
        rows = slice(start, start + ROWS)
        logs = [
            (head_logits(hidden[rows], head, vocab_size) / temperature).log_softmax(-1)
            for hidden, head in ((student_hidden, student_head), (teacher_hidden, teacher_head))
        ]
        p = logs[0].exp()
        chunk: dict[str, Any] = {"kl": (p * (logs[0] - logs[1])).sum(-1), "entropy": -(p * logs[0]).sum(-1)}
        for who, log in zip(("student", "teacher"), logs, strict=True):
            chunk[f"{who}_p"] = log.gather(1, token_ids[rows, None])[:, 0].exp()
            top = log.topk(min(TOP, vocab_size))
            chunk[f"{who}_top_ids"], chunk[f"{who}_top_p"] = top.indices, top.values.exp()
        chunks.append(chunk)
    return {name: torch.cat([chunk[name] for chunk in chunks]).cpu().numpy() for name in chunks[0]}
