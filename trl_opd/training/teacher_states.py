"""Scores a whole generation batch with the teacher at once, in groups of rollouts of similar length.

TRL runs its teacher once per micro-batch, and a 4-bit teacher dequantises every weight in each run. Only the teacher's
last hidden states at the positions of the loss are kept, never logits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..loss.lm_head import LMHead, lm_head
from ..models.parking import Parking
from ..models.quantised import read_head
from ..rollouts.batches import at_loss_positions, forward_inputs, left_aligned, length_groups, loss_mask

# Tokens of a forward, padding included: enough to keep a GPU busy, and few enough that the activations fit.
GROUP_TOKENS = 16_384
# The states of a generation batch stay on the student's GPU if they need at most this share of its free memory.
ON_DEVICE_SHARE = 0.125

_HOST = torch.device("cpu")
logger = logging.getLogger(__name__)

# (model, ids, attention mask, number of last positions) -> last hidden states of those positions.
LastHiddenState = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, int], torch.Tensor]
# (wrapped model, function, its further arguments) -> what the function returns for the unwrapped model.
CallInWrappedForward = Callable[..., Any]


class TeacherStates:
    """Hidden states of a teacher that every process holds whole: each generation batch is scored once.

    Args:
        teacher (`torch.nn.Module`): The frozen teacher, on its device.
        last_hidden_state (`Callable`): Runs a model's backbone, as TRL's `_get_last_hidden_state`.
        vocab_size (`int`): The range of ids that student and teacher share.
        device (`torch.device`): Device of the student's head, where states are compared.
        parked (`bool`): Whether the teacher leaves its device while it does not score.
    """

    def __init__(
        self,
        teacher: torch.nn.Module,
        last_hidden_state: LastHiddenState,
        *,
        vocab_size: int,
        device: torch.device,
        parked: bool,
    ):
        self._teacher = teacher
        self._last_hidden_state = last_hidden_state
        self._vocab_size = vocab_size
        self._device = device
        self._logged_home: torch.device | None = None

        head = read_head(teacher)
        bias = None if head.bias is None else head.bias.to(device)
        self._head = LMHead(head.weight.to(device), bias, head.logit_scale, head.softcap)

        self._parking: Parking | None = None
        if parked:
            self._parking = Parking(teacher, teacher.get_output_embeddings().parameters())
            self._parking.offload()

    def resident(self) -> AbstractContextManager[None]:
        """Return a context in which the teacher stays on its device, for an evaluation of many batches."""
        return nullcontext() if self._parking is None else self._parking.on_device()

    def at_loss_positions(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, LMHead]:
        """Return the states that predict the tokens of a micro-batch's loss mask, `(N, H)`, and the teacher's head.

        Args:
            inputs (`dict[str, torch.Tensor]`): A micro-batch, with `teacher_hidden` if it is already scored.
        """
        states = inputs["teacher_hidden"] if "teacher_hidden" in inputs else self.compute_states(inputs)
        hidden = torch.cat([rows.to(self._device, non_blocking=True) for rows in states])
        return hidden, self._head

    @torch.no_grad()
    def compute_states(self, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return the teacher's last hidden states that predict the tokens of the loss mask, `(n, H)` for each rollout.

        Args:
            batch (`dict[str, torch.Tensor]`): Prompts `(B, P)`, padded left, and completions `(B, C)`, padded right.
        """
        prompt_lengths = batch["prompt_mask"].sum(1)
        lengths = (prompt_lengths + batch["completion_mask"].sum(1)).tolist()
        prompt_lengths = prompt_lengths.tolist()
        mask = loss_mask(batch).cpu()
        device = self._teacher.get_input_embeddings().weight.device
        if device.type == "meta":  # offloaded by a `device_map`, which moves the inputs of a forward
            device = self._device
        home = self._home(int(mask.sum()))

        kept = [None] * len(lengths)
        with self.resident():
            self._teacher.eval()
            for rows in length_groups(lengths, GROUP_TOKENS):
                longest = max(2, max(lengths[row] for row in rows))
                ids, attention = left_aligned(batch, rows, longest)
                ids = ids.clamp(max=self._vocab_size - 1)  # the teacher may lack the padding id
                hidden = self._last_hidden_state(self._teacher, ids.to(device), attention.to(device), longest - 1)

                for place, row in enumerate(rows):
                    # A token is predicted at the position of the token before it.
                    positions = mask[row].nonzero()[:, 0] + prompt_lengths[row] - 1
                    states = hidden[place][positions.to(hidden.device)].to(self._teacher.dtype)
                    kept[row] = _to(states, home)
        return kept

    def _home(self, positions: int) -> torch.device:
        """Return the device that keeps the states: the student's GPU if they take a small part of its free memory."""
        if self._device.type != "cuda":
            return self._device
        size = positions * self._head.weight.shape[1] * self._teacher.dtype.itemsize
        free = free_cuda_memory(self._device)
        home = self._device if size <= ON_DEVICE_SHARE * free else _HOST
        if home != self._logged_home:
            logger.info("The teacher's hidden states (%.0f MiB) are kept on %s.", size / 2**20, home)
            self._logged_home = home
        return home


class ShardedTeacherStates:
    """Hidden states of a teacher that FSDP or DeepSpeed shards: it runs once per micro-batch, as in TRL.

    Every process must run the same number of forwards, so generation batches cannot be scored in groups.

    Args:
        teacher (`torch.nn.Module`): The wrapped teacher.
        last_hidden_state (`Callable`): Runs a model's backbone, as TRL's `_get_last_hidden_state`.
        call_in_wrapped_forward (`Callable`):
            Takes a wrapped model and a function, and calls the function with the unwrapped model inside the wrapper's
            forward, where the weights are gathered.
        vocab_size (`int`): The range of ids that student and teacher share.
    """

    def __init__(
        self,
        teacher: torch.nn.Module,
        last_hidden_state: LastHiddenState,
        call_in_wrapped_forward: CallInWrappedForward,
        *,
        vocab_size: int,
    ):
        self._teacher = teacher
        self._last_hidden_state = last_hidden_state
        self._call_in_wrapped_forward = call_in_wrapped_forward
        self._vocab_size = vocab_size
        logger.warning("With FSDP or DeepSpeed the teacher runs once per micro-batch, as in TRL.")

    def resident(self) -> AbstractContextManager[None]:
        """Return a context that does nothing: a sharded teacher never leaves its devices."""
        return nullcontext()

    @torch.no_grad()
    def at_loss_positions(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, LMHead]:
        """Return the states that predict the tokens of a micro-batch's loss mask, `(N, H)`, and the teacher's head.

        Args:
            inputs (`dict[str, torch.Tensor]`): A micro-batch of [`locate_loss_positions`].
        """
        self._teacher.eval()  # a separate call, because `DeepSpeedEngine.eval()` returns None
        forward = forward_inputs(inputs, self._vocab_size)
        heads: list[LMHead] = []

        def states_and_head(teacher: torch.nn.Module) -> torch.Tensor:
            hidden = self._last_hidden_state(teacher, *forward)
            head = lm_head(teacher)
            # ZeRO-3 empties the parameter at the end of the forward, but not a detached tensor of its values.
            bias = None if head.bias is None else head.bias.detach()
            heads.append(LMHead(head.weight.detach(), bias, head.logit_scale, head.softcap))
            return hidden

        hidden = self._call_in_wrapped_forward(self._teacher, states_and_head)
        return at_loss_positions(hidden, inputs, hidden.device), heads[0]


def free_cuda_memory(device: torch.device) -> int:
    """Return the bytes that a process may still allocate on a GPU.

    They are the bytes that CUDA has free and those that PyTorch keeps for reuse: after the first step CUDA has little
    free, because PyTorch returns nothing to it.
    """
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def gather_head_with(model: torch.nn.Module) -> None:
    """Make DeepSpeed's ZeRO-3 gather the head with the whole model, because the head's own forward never runs."""
    import deepspeed  # imported here, as in TRL, because it is an optional package

    for parameter in model.get_output_embeddings().parameters():
        deepspeed.zero.register_external_parameter(model, parameter)


def _to(states: torch.Tensor, home: torch.device) -> torch.Tensor:
    if home == _HOST and states.is_cuda:
        return torch.empty_like(states, device=_HOST, pin_memory=True).copy_(states)
    return states.to(home)
