"""A callback that saves some rollouts of the steps that log, with both models' probabilities of every token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from accelerate.utils import is_peft_model
from torch.distributed.fsdp import FSDPModule

from ..artefacts.sampled_rollouts import TOP, join_parts, keep_up_to, write_part
from ..loss.logits import entropy, logit_chunks, reverse_kl
from ..loss.signals import HiddenStates
from ..opd_config import require_whole
from ..rollouts.batches import locate_loss_positions, take_rollouts
from ..rollouts.sampling import sampling_mode
from .callbacks import OPDCallback
from .position_weights import ends_in_log

PROMPT_TOKENS = 512  # at most so many last tokens of a prompt are saved


class RolloutSamples(OPDCallback):
    """Keeps `n` rollouts of every optimizer step that ends in a log, for `trl-opd report`.

    They are written to `output_dir/rollout_samples.parquet`: for each token the divergence (with a LoRA student that
    began at its base also the divergence before the distillation), the entropy, the weight, and the five likeliest
    tokens of both models. Everything is measured before the step's update, without dropout, and no random number is
    drawn, so the callback does not change the run. It costs a forward of the student over `n` rollouts (two with LoRA)
    in each of those steps.

    Args:
        n (`int`, *optional*, defaults to `4`): Rollouts per step, of the first process, spread over its prompts.

    Raises:
        `ValueError`: if `n` is not a whole number of at least 1.
    """

    def __init__(self, n: int = 4):
        require_whole("n", n, 1)
        self._n = n
        self._batch: dict[str, torch.Tensor] | None = None

    def on_generation_batch(self, batch: dict[str, torch.Tensor]) -> None:
        """Store the generation batch, of which some rollouts are kept."""
        self._batch = batch

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if state.is_world_process_zero:
            keep_up_to(Path(args.output_dir), state.global_step)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        batch = self._batch
        self._batch = None  # the teacher's hidden states in it may take gigabytes
        if not ends_in_log(args, state):
            return
        # Every process measures, because a forward of sharded models needs all of them.
        columns, prompts = self._measure(batch, num_generations=args.num_generations)
        tokens = len(columns["token_id"])
        if not state.is_world_process_zero or not tokens:
            return

        step = state.global_step + 1
        columns["step"] = np.full(tokens, step)
        metadata = self.model_pair.occurrence_metadata()
        metadata["prompts"] = {f"{step}/{prompt}": ids for prompt, ids in prompts.items()}
        write_part(Path(args.output_dir), step, columns, metadata)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            join_parts(Path(args.output_dir))

    def _measure(
        self, batch: dict[str, torch.Tensor], *, num_generations: int
    ) -> tuple[dict[str, np.ndarray], dict[int, list[int]]]:
        """Return the columns of some rollouts of a generation batch, and the token ids of their prompts."""
        count = len(batch["completion_ids"])
        rows = torch.linspace(0, count - 1, min(self._n, count)).round().long()
        inputs = locate_loss_positions(take_rollouts(batch, rows))
        with torch.no_grad(), sampling_mode(self.trainer.model):
            # FSDP and DeepSpeed gather the weights only inside the wrapper's forward.
            columns = self.model_pair.call_in_wrapped_forward(self.trainer.model_wrapped, self._measure_tokens, inputs)
        reshard(self.model_pair.student)

        completion_ids = inputs["completion_ids"].cpu().numpy()
        positions = inputs["positions"].cpu().numpy()
        row, position = np.divmod(positions, completion_ids.shape[1])
        rollout = rows.numpy()[row]
        columns["rollout"] = rollout
        columns["prompt"] = rollout // num_generations
        columns["position"] = position
        columns["token_id"] = completion_ids[row, position]
        columns["weight"] = inputs["position_weights"].numpy()
        columns.setdefault("kl_pre", np.full(len(positions), np.nan, np.float32))

        prompts = {}
        for index, tokens, mask in zip(rows.tolist(), inputs["prompt_ids"], inputs["prompt_mask"], strict=True):
            prompts[index // num_generations] = tokens[mask.bool()].tolist()[-PROMPT_TOKENS:]
        return columns, prompts

    def _measure_tokens(self, student: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """Return the columns that both models, and the student without its adapter, give for a micro-batch's tokens."""
        pair = self.model_pair
        token_ids = inputs["completion_ids"].flatten()[inputs["positions"]]
        states = pair.hidden_states(inputs, student=student)
        columns = describe_tokens(states, token_ids, temperature=pair.temperature)
        # A run that continues an adapter, or PiSSA, does not begin at the base.
        if is_peft_model(student) and pair.starts_at_base:
            with student.disable_adapter():
                states_before = pair.hidden_states(inputs, student=student)
                before = describe_tokens(states_before, token_ids, temperature=pair.temperature)
                columns["kl_pre"] = before["kl"]
        return columns


def reshard(model: torch.nn.Module) -> None:
    """Free the weights that FSDP2 has gathered for a forward without a backward.

    FSDP2 keeps the final norm and the head for the backward, so the next forward would read their values from before
    the optimizer step.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def describe_tokens(states: HiddenStates, token_ids: torch.Tensor, *, temperature: float) -> dict[str, np.ndarray]:
    """Return two models' probabilities of tokens, float32, `(N,)` each, and their five likeliest tokens, `(N, 5)`.

    `kl` is KL(student ‖ teacher) in nats, `entropy` the student's, `student_p` and `teacher_p` the probability of the
    token, `*_top_ids` and `*_top_p` the five likeliest; all over the vocabulary that the two share.

    Args:
        states (`HiddenStates`): Hidden states that predict the tokens, and the heads.
        token_ids (`torch.Tensor`): The tokens, int64, `(N,)`.
        temperature (`float`): Softmax temperature of both distributions.
    """
    chunks: list[dict[str, torch.Tensor]] = []
    for rows, student_logits, teacher_logits in logit_chunks(states, temperature=temperature):
        chunk = {
            "kl": reverse_kl(student_logits, teacher_logits),
            "entropy": entropy(student_logits),
        }
        for who, logits in (("student", student_logits), ("teacher", teacher_logits)):
            log_p = logits.log_softmax(-1)
            top = log_p.topk(min(TOP, log_p.shape[-1]))
            chunk[f"{who}_p"] = log_p.gather(1, token_ids[rows, None])[:, 0].exp()
            chunk[f"{who}_top_ids"] = top.indices
            chunk[f"{who}_top_p"] = top.values.exp()
        chunks.append(chunk)

    columns = {}
    for name in chunks[0]:
        column = torch.cat([chunk[name] for chunk in chunks])
        columns[name] = column.cpu().numpy()
    return columns
