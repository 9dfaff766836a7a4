"""The teacher phase: a whole generation batch is scored at once, without padding beyond groups of like length.

TRL runs its teacher once per micro-batch; with a 4-bit teacher each run dequantises every weight anew. What is kept are
the teacher's last hidden states at the positions of the loss, never logits.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext

import torch

from ..loss.lm_head import LMHead, lm_head
from ..models.parking import Parking
from ..rollouts.batches import at_positions, left_aligned, length_groups, loss_mask

# Tokens of a forward, padding included: enough to fill a GPU, and few enough for its activations.
GROUP_TOKENS = 16_384
# The states of a generation batch stay on the student's GPU up to this part of its free memory.
ON_DEVICE_SHARE = 0.125

_HOST = torch.device("cpu")
logger = logging.getLogger(__name__)


class TeacherPhase:
    """Scores the generation batches of a trainer with its teacher.

    FSDP and DeepSpeed need the same number of forwards on every process, so there the teacher runs once per
    micro-batch, as with TRL.

    Args:
        trainer (`OPDTrainer`): The trainer, whose teacher is placed.
        sharded (`bool`): Whether FSDP or DeepSpeed shards the teacher.
    """

    def __init__(self, trainer, *, sharded: bool):
        self._trainer, self._sharded = trainer, sharded
        self._device = trainer.model.get_output_embeddings().weight.device
        self._parking, self._said = None, None
        if sharded:
            logger.warning("With FSDP or DeepSpeed the teacher runs once per micro-batch, as with TRL.")
            if trainer._dist.is_zero3:
                for model in (trainer.model, trainer.accelerator.unwrap_model(trainer.teacher_model)):
                    gather_head_with(model)
            return
        self._teacher = trainer.teacher_model
        head = lm_head(self._teacher)
        bias = None if head.bias is None else head.bias.to(self._device)
        self._head = LMHead(head.weight.to(self._device), bias, head.logit_scale, head.softcap)
        if trainer.args.teacher_placement == "parked":
            self._parking = Parking(self._teacher, (head.weight, head.bias))
            self._parking.leave()

    def resident(self):
        """Return a context in which the teacher stays on its device, as in an evaluation of many batches."""
        return nullcontext() if self._parking is None else self._parking.here()

    def prepare(self, batch: dict[str, torch.Tensor]) -> None:
        """Score a generation batch, unless the teacher runs once per micro-batch."""
        trainer = self._trainer
        if not self._sharded and not trainer._as_trl:
            with trainer._clock.time("teacher", on=trainer.model.training):
                batch["teacher_hidden"] = self.score(batch)

    def compared(
        self, inputs: dict[str, torch.Tensor], forward: tuple, positions: torch.Tensor, head: LMHead
    ) -> tuple[torch.Tensor, LMHead]:
        """Return the teacher's hidden states that predict the tokens at positions, `(N, H)`, and its head.

        Args:
            inputs (`dict[str, torch.Tensor]`): A micro-batch.
            forward (`tuple`): What the student's forward takes of it.
            positions (`torch.Tensor`): Places of the loss mask in its flattened completions, `(N,)`.
            head (`LMHead`): The student's head, on whose device all is compared.
        """
        if self._sharded:
            return self._of_shards(forward, positions, head)
        states = inputs["teacher_hidden"] if "teacher_hidden" in inputs else self.score(inputs)
        return torch.cat([rows.to(self._device, non_blocking=True) for rows in states]), self._head

    @torch.no_grad()
    def _of_shards(self, forward, positions, head) -> tuple[torch.Tensor, LMHead]:
        trainer = self._trainer
        trainer.teacher_model.eval()  # apart: DeepSpeed's engine returns nothing
        teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
        # As in TRL, through the wrapper: FSDP and DeepSpeed gather the teacher's shards in its forward.
        heads = []

        def states_and_head() -> torch.Tensor:
            hidden = trainer._get_last_hidden_state(teacher, *forward)
            found = lm_head(teacher)
            # Detached: ZeRO-3 empties the parameter at the end of the forward, not what lies in it.
            bias = None if found.bias is None else found.bias.detach()
            heads.append(LMHead(found.weight.detach(), bias, found.logit_scale, found.softcap))
            return hidden

        hidden = trainer._forward_redirection(trainer.teacher_model, teacher, states_and_head)
        return at_positions(hidden, positions, head), heads[0]

    @torch.no_grad()
    def score(self, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return the teacher's last hidden states that predict the tokens of the loss mask, `(n, H)` for each rollout.

        Args:
            batch (`dict[str, torch.Tensor]`): Prompts `(B, P)`, padded left, and completions `(B, C)`, padded right.
        """
        prompts = batch["prompt_mask"].sum(1).tolist()
        totals = [p + c for p, c in zip(prompts, batch["completion_mask"].sum(1).tolist(), strict=True)]
        mask = loss_mask(batch).cpu()
        forward = self._trainer._get_last_hidden_state
        device = self._teacher.get_input_embeddings().weight.device
        home, kept = self._home(int(mask.sum())), [None] * len(totals)
        with self.resident():
            self._teacher.eval()
            for rows in length_groups(totals, GROUP_TOKENS):
                longest = max(2, *(totals[row] for row in rows))
                ids, attention = left_aligned(batch, rows, longest)
                ids = ids.clamp(max=self._trainer._vocab_size - 1)  # the padding id may be one that the teacher lacks
                hidden = forward(self._teacher, ids.to(device), attention.to(device), longest - 1)
                for place, row in enumerate(rows):
                    # A token is predicted where the one before it is read.
                    positions = mask[row].nonzero()[:, 0] + prompts[row] - 1
                    states = hidden[place][positions.to(hidden.device)].to(self._teacher.dtype)
                    kept[row] = _to(states, home)
        return kept

    def _home(self, positions: int) -> torch.device:
        """Return where the states are kept: on the student's GPU while they are small beside its free memory."""
        if self._device.type != "cuda":
            return self._device
        size = positions * self._head.weight.shape[1] * self._teacher.dtype.itemsize
        home = self._device if size <= ON_DEVICE_SHARE * torch.cuda.mem_get_info(self._device)[0] else _HOST
        if home != self._said:
            logger.info("The teacher's hidden states (%.0f MiB) are kept on %s.", size / 2**20, home)
            self._said = home
        return home


def gather_head_with(model: torch.nn.Module) -> None:
    """Let DeepSpeed's ZeRO-3 gather the head with the whole model: it is read, and its own forward never runs."""
    import deepspeed  # as TRL does: it is an optional package

    for parameter in model.get_output_embeddings().parameters():
        deepspeed.zero.register_external_parameter(model, parameter)


def _to(states: torch.Tensor, home: torch.device) -> torch.Tensor:
    if home == _HOST and states.is_cuda:
        return torch.empty_like(states, device=_HOST, pin_memory=True).copy_(states)
    return states.to(home)
