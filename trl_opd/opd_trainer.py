"""OPDTrainer: TRL's DistillationTrainer with weights per token, several rollouts per prompt and metrics per token type.

The trainer contains small overrides and no mathematics, in the order of a run: construction, training, prompts,
rollouts, loss, step and log, evaluation, saving. Two rules of the base class bind every override: no collective may run
inside `_compute_loss` (it runs inside the wrapped forward), and the loss is divided by the token count of the whole
generation batch, clamped at 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from trl import DistillationTrainer

from ._trl import unwrap_model_for_generation
from .artefacts.hub import hub_errors
from .artefacts.token_stats import TokenStats
from .loss.divergence import loss_and_signals
from .loss.lm_head import is_read_by_trl, output_rows
from .models.model_check import (
    StudentTraits,
    check_student,
    check_teacher,
    require_causal_architecture,
    require_causal_lm,
)
from .models.quantised import keep_scalable, make_readable
from .models.shape import context_length, rope_switch_length
from .models.teacher import (
    check_teacher_vocabulary,
    load_teacher,
    load_teacher_tokenizer,
    place_teacher,
    teacher_end_ids,
)
from .models.vocabulary import find_turn_end, require_reachable, warn_of_other_ends
from .opd_config import OPDConfig
from .rollouts.batches import completions_of, locate_loss_positions, tight_micro_batches
from .rollouts.continuous_batching import generate_continuously
from .rollouts.data_order import EpochRepeatSampler, grouped_stream, place_after_resume
from .rollouts.prompts import (
    has_chats,
    require_embeddable,
    require_fit,
    require_prompt,
    require_prompts,
    tokenize_prompts,
)
from .rollouts.sampling import mask_repeated, own_random_stream, sample_unpadded, sampling_mode
from .saving import checkpoints
from .saving.run_record import RunRecord
from .saving.student import add_report, save_student, warn_of_failed_pushes, write_card
from .training import preflight
from .training.callbacks import OPDCallback
from .training.finite import FiniteGuard, name_student_in_sampling_error
from .training.metrics import MetricSums, StepTimer
from .training.model_pair import ModelPair, describe_measure
from .training.occurrence_writer import OccurrenceWriter
from .training.position_weights import PositionWeights, load_rock_set
from .training.teacher_states import ShardedTeacherStates, TeacherStates, gather_head_with
from .training.token_sums import TokenSums


class OPDTrainer(DistillationTrainer):
    """Trainer for on-policy distillation with weights per token and metrics per token type.

    Takes the arguments of [`~trl.DistillationTrainer`], with an [`OPDConfig`]; with default options it trains with
    TRL's loss.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The student.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            The teacher; `args.teacher_model_name_or_path` by default. Its vocabulary may be padded to another size.
        args ([`OPDConfig`], *optional*): Configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): Rows with a `prompt`.
        others: As in [`~trl.DistillationTrainer`].

    Attributes:
        rock_set ([`RockSet`] or `None`): The rock set of `args.rock_set`.
        teacher_model ([`~transformers.PreTrainedModel`]): The frozen teacher.
        student_traits ([`StudentTraits`]): What its check found out about the student.
        model_pair ([`ModelPair`]): Student and teacher, and the method that computes the hidden states of both.
        context_length (`int`): Number of positions that both models support.
        run_record ([`RunRecord`]): Settings and results of the run, for the report and the model card.

    Raises:
        `ValueError`: if settings contradict each other, the teacher has another vocabulary, the rock set does not fit
            the tokenizer, the student is a vision-language model or, while training, logits are not finite.
    """

    _tag_names = ("trl-opd", "on-policy-distillation", *DistillationTrainer._tag_names)
    _name = "OPD"

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher_model: str | PreTrainedModel | None = None,
        args: OPDConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config=None,
        tools: list[Callable] | None = None,
    ):
        args = preflight.default_config(model) if args is None else args
        self._prompts_per_step = preflight.prompts_per_step(args)
        require_prompts(train_dataset, "training dataset")
        require_prompts(eval_dataset, "evaluation dataset")
        preflight.check_devices(args)
        if args.teacher_device is not None and args.n_gpu > 1:
            args._n_gpu = 1  # otherwise TRL would replicate the student on the second GPU
        self.rock_set = load_rock_set(args)

        # TRL's constructor does not get the teacher, because it raises an error for vocabularies of unequal size. The
        # teacher is loaded first, which changes no random number: TRL's constructor seeds before it builds the student.
        teacher = load_teacher(teacher_model, model, args)
        if isinstance(model, str):
            revision = (args.model_init_kwargs or {}).get("revision")
            require_causal_architecture(model, revision=revision, trust_remote_code=args.trust_remote_code)
        else:
            require_causal_lm(model, "student")
        super().__init__(
            model=model,
            teacher_model=None,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
        )
        preflight.require_text(self._is_vlm, self._tokenizer)
        require_causal_lm(self.model, "student")
        preflight.require_mergeable(args, self.model)
        make_readable(self.model)
        if args.fp16 and is_peft_model(self.model):
            keep_scalable(self.model)
        self._attach_teacher(teacher)
        if self.rock_set is not None:
            self.rock_set.check(self._tokenizer, self.model_pair.vocab_size)
        self._make_step_parts()

    # Construction

    def _attach_teacher(self, teacher: PreTrainedModel) -> None:
        """Check the teacher against the student, place it, and make `model_pair` and `run_record`."""
        student_rows = output_rows(self.model)
        teacher_rows = output_rows(teacher)
        vocab_size = min(student_rows, teacher_rows)
        self._check_vocabulary(teacher, student_rows, teacher_rows)

        self.context_length = min(context_length(self.model), context_length(teacher))
        if self.max_completion_length is None:
            self.max_completion_length = self.context_length  # TRL's tool loop compares lengths with it
        if student_rows > vocab_size:
            self._suppress(
                preflight.ids_to_suppress(vocab_size, student_rows, self.eos_token_ids, use_vllm=self.use_vllm)
            )
        preflight.warn_of_float32(self.accelerator.device, self.model, teacher)
        preflight.warn_of_router_loss(self.model)
        switches = [rope_switch_length(model) for model in (self.model, teacher)]
        self._rope_limit = min((limit for limit in switches if limit is not None), default=None)

        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        asks_for_trl_loss = student_rows == teacher_rows and self.args.trains_as_trl()
        teacher_padded_left = self._place_checked_teacher(teacher, padded_left=asks_for_trl_loss, sharded=sharded)
        self.student_traits = self._check_student(padded_left=asks_for_trl_loss, sharded=sharded)
        # TRL's own loss is called if nothing is weighted or grouped, both vocabularies have the same size, and TRL's
        # padding and its reading of the heads are right for both models. The run is then bit-identical to TRL's.
        padded_left = teacher_padded_left and self.student_traits.scores_padded_left
        trl_is_right = padded_left and is_read_by_trl(self.model) and is_read_by_trl(teacher)
        if asks_for_trl_loss and not trl_is_right:
            preflight.warn_of_other_loss()
        self._uses_trl_loss = asks_for_trl_loss and trl_is_right
        self._teacher_runs_ahead = not sharded and not self._uses_trl_loss

        measure = describe_measure(self.args, self.model, teacher, self._tokenizer)
        self.run_record = RunRecord(
            self.args,
            self.accelerator,
            student=self.accelerator.unwrap_model(self.model),
            teacher=self.accelerator.unwrap_model(self.teacher_model),
            train_dataset=self.train_dataset,
            rock_set=self.rock_set,
            measure=measure,
            starts_at_base=self.student_traits.starts_at_base,
        )
        self.model_pair = ModelPair(
            student=self.accelerator.unwrap_model(self.model),
            teacher_states=self._teacher_states(vocab_size, sharded=sharded),
            last_hidden_state=self._get_last_hidden_state,
            call_in_wrapped_forward=self._call_in_wrapped_forward,
            vocab_size=vocab_size,
            beta=self.beta,
            temperature=self.temperature,
            device=self.accelerator.device,
            measure=measure,
            starts_at_base=self.student_traits.starts_at_base,
        )

    def _place_checked_teacher(self, teacher: PreTrainedModel, *, padded_left: bool, sharded: bool) -> bool:
        """Compare the teacher with itself and place it; return whether its forwards may be padded on the left."""
        check = partial(
            check_teacher,
            teacher,
            last_hidden_state=self._get_last_hidden_state,
            autocast=self.accelerator.autocast,
            padded_left=padded_left,
        )
        if sharded:  # the wrapped teacher could not be compared
            may_be_padded_left = check()
            self.teacher_model = place_teacher(teacher, self.accelerator, self.args.teacher_device, sharded=True)
            return may_be_padded_left

        self.teacher_model = place_teacher(teacher, self.accelerator, self.args.teacher_device, sharded=False)
        # TRL also registers its teacher. Without a registered model, an evaluation before the training prepares the
        # student for evaluation only, the training takes it for prepared, and gradients are not averaged over processes
        # (transformers 5.23, `Trainer.evaluation_loop`). Can go when transformers fixes that.
        self.accelerator._models.append(self.teacher_model)
        return check()

    def _check_student(self, *, padded_left: bool, sharded: bool) -> StudentTraits:
        """Compare the student with itself; raise `ValueError` if its rollouts cannot be sampled."""
        traits = check_student(
            self.accelerator.unwrap_model(self.model),
            last_hidden_state=self._get_last_hidden_state,
            autocast=self.accelerator.autocast,
            sampling=sampling_mode,
            generates=not self.use_vllm,
            padded_left=padded_left,
        )
        if sharded and not traits.generates_padded:
            raise ValueError(
                "Padding changes what the student generates, so that prompts of different lengths have to be sampled "
                "apart, and FSDP or DeepSpeed cannot do that: train in one process."
            )
        return traits

    def _check_vocabulary(self, teacher: PreTrainedModel, student_rows: int, teacher_rows: int) -> None:
        """Raise `ValueError` unless both models use the same token ids; warn if they end turns differently."""
        require_reachable(self._tokenizer, self.eos_token_ids, student_rows)
        teacher_tokenizer = load_teacher_tokenizer(teacher, self.args)

        teacher_ends = teacher_end_ids(teacher, teacher_tokenizer)
        closing = find_turn_end(self._tokenizer, self.chat_template_kwargs)
        # Plain prompts never use the template's end of a turn, unless the teacher itself ends there.
        if closing not in teacher_ends and not has_chats(self.train_dataset):
            closing = None
        warn_of_other_ends(self._tokenizer, self.eos_token_ids, teacher_ends, closing)

        check_teacher_vocabulary(
            self._tokenizer, teacher_tokenizer, student_rows=student_rows, teacher_rows=teacher_rows
        )

    def _teacher_states(self, vocab_size: int, *, sharded: bool) -> TeacherStates | ShardedTeacherStates:
        if not sharded:
            return TeacherStates(
                self.teacher_model,
                self._get_last_hidden_state,
                vocab_size=vocab_size,
                device=self.model.get_output_embeddings().weight.device,
                parked=self.args.teacher_placement == "parked",
            )
        if self._dist.is_zero3:
            gather_head_with(self.model)
            gather_head_with(self.accelerator.unwrap_model(self.teacher_model))
        return ShardedTeacherStates(
            self.teacher_model, self._get_last_hidden_state, self._call_in_wrapped_forward, vocab_size=vocab_size
        )

    def _call_in_wrapped_forward(self, wrapped: torch.nn.Module, function: Callable, *args: Any) -> Any:
        """Call a function with the unwrapped model inside the wrapped one's forward, where weights are gathered."""
        unwrapped = self.accelerator.unwrap_model(wrapped)
        return self._forward_redirection(wrapped, unwrapped, function, unwrapped, *args)

    def _make_step_parts(self) -> None:
        """Create the objects that weight, measure and check a step."""
        pair = self.model_pair
        device = self.accelerator.device
        stop_ids = [*self.eos_token_ids, self._tokenizer.pad_token_id]
        self._position_weights = PositionWeights(self.args, self.rock_set, pair.vocab_size, stop_ids, self.accelerator)

        groups = self._position_weights.groups
        self._metric_sums = {"train": MetricSums(groups, device), "eval": MetricSums(groups, device)}
        self._token_sums = TokenSums(pair.vocab_size, pair.measure, device, enabled=self.args.token_statistics)
        self._occurrence_writer = OccurrenceWriter(self.args, pair.occurrence_metadata(), self.accelerator)
        self._finite_guard = FiniteGuard(self.accelerator)
        self._step_timer = StepTimer(device)
        self._micro_batches: list[dict[str, torch.Tensor]] | None = None  # the last result of `_prepare_inputs`
        self._has_new_completions = False  # `_completions_logged_once` reads it

    # Training

    @property
    def token_stats(self) -> TokenStats | None:
        """Statistics of all training steps of this process since start or resume; `None` if they are turned off."""
        return self._token_sums.total()

    def reduced_token_stats(self) -> TokenStats | None:
        """Return `token_stats` summed over all processes. A collective: every process calls it."""
        return self._token_sums.total(self._sum_over_processes)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        resume_from_checkpoint = checkpoints.resolve_checkpoint(resume_from_checkpoint, self.args.output_dir)
        self._metric_sums["train"].clear()  # an interrupted run may have left some
        for callback in self._opd_callbacks():
            callback.attach(self, self.model_pair)
        self._token_sums.start(resumed=resume_from_checkpoint is not None)
        self.run_record.start()
        preflight.require_trainable(self.model)

        output = super().train(resume_from_checkpoint, *args, **kwargs)
        preflight.require_step(self.state, self.train_dataset, self._prompts_per_step)
        self.run_record.write_results(self.state, self.reduced_token_stats())
        return output

    def _opd_callbacks(self) -> list[OPDCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, OPDCallback)]

    # Prompts

    def get_train_dataloader(self):
        with grouped_stream(self, prompts=self._prompts_per_step, rollouts=self.args.num_generations):
            return super().get_train_dataloader()

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochRepeatSampler:
        dataset = self.train_dataset if dataset is None else dataset
        if dataset is None:
            raise ValueError("There are no prompts to train on: pass `train_dataset` to the trainer.")
        # Each prompt comes `num_generations` times, and all of them again for each accumulation step, as in TRL, which
        # generates from the first repetition and drops the others.
        return EpochRepeatSampler(
            # When an epoch starts or a run is resumed within one, this is the number of complete epochs.
            epoch=lambda: int(self.state.epoch or 0),
            data_source=dataset,
            mini_repeat_count=self.args.num_generations,
            batch_size=self._prompts_per_step,
            repeat_count=self.args.gradient_accumulation_steps,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        place = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        return place_after_resume(
            place,
            checkpoint=resume_from_checkpoint,
            state=self.state,
            args=self.args,
            dataset=self.train_dataset,
            max_steps=max_steps,
            num_train_epochs=num_train_epochs,
        )

    def prompt_token_ids(self, prompts: list) -> list[list[int]]:
        """Return the token ids of prompts (texts or conversations), rendered as for rollouts."""
        return self._tokenize_prompts(prompts)[0]

    def _tokenize_prompts(self, prompts: list):
        tokenized = tokenize_prompts(super()._tokenize_prompts, prompts)
        budget = 1 if self.args.max_completion_length is None else self.max_completion_length
        require_fit(prompts, tokenized[0], budget, self.context_length, self.train_dataset)
        return tokenized

    # Rollouts

    def sample_rollouts(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return one rollout of each dataset row, sampled as in an evaluation, with their loss `positions`.

        Args:
            rows (`list[dict]`): Rows with a `prompt`.
        """
        self.model.eval()
        return self._prepare_inputs(rows)

    @contextmanager
    def generation_model(self, generation_kwargs: dict[str, Any] | None = None) -> Iterator[PreTrainedModel]:
        """Yield the student for `generate`: unwrapped, and with the weights that FSDP or DeepSpeed shards gathered.

        Args:
            generation_kwargs (`dict`, *optional*): Settings that override the model's own generation settings.
        """
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=generation_kwargs,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            yield model

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
        require_embeddable(prompt_ids, self.model_pair.vocab_size, self._tokenizer)
        if self.args.max_completion_length is None:
            self._limit_completions(self.context_length - max(map(len, prompt_ids)))

        name_student = name_student_in_sampling_error(self.state.global_step + 1)
        # Accelerate runs the forward of the model that it has prepared under autocast, but PEFT's `generate` calls the
        # forward of the base model.
        autocast = self.accelerator.autocast() if is_peft_model(self.model) else nullcontext()
        with name_student, sampling_mode(self.model), autocast:
            if not self.args.use_transformers_continuous_batching:
                generate = partial(
                    super()._generate_single_turn,
                    images=images,
                    multimodal_fields=multimodal_fields,
                    has_tool_images=has_tool_images,
                )
                if self.student_traits.generates_padded:
                    return generate(prompt_ids)
                return sample_unpadded(generate, prompt_ids, together=self.student_traits.generates_together)
            with self.generation_model(self.generation_kwargs) as model:
                return generate_continuously(
                    model, prompt_ids, self.generation_config, self.args.transformers_continuous_batching_config
                )

    def _limit_completions(self, tokens: int) -> None:
        """Limit rollouts to `tokens` tokens."""
        self.generation_config.max_new_tokens = tokens
        self.generation_kwargs["max_new_tokens"] = tokens

    def _suppress(self, ids: range) -> None:
        """Keep `ids` out of the rollouts, in addition to those that the user or the model suppresses."""
        own = self.generation_kwargs.get("suppress_tokens", self.model.generation_config.suppress_tokens)
        suppressed = sorted(set(ids).union(own or ()))
        self.generation_config.suppress_tokens = suppressed
        self.generation_kwargs["suppress_tokens"] = suppressed

    def _generate_and_score_completions(self, inputs):
        for row in inputs:
            require_prompt(row.get("prompt"), "a row of the dataset")
        training = self.model.training
        if training:
            # The teacher's hidden states of the last batch, which may take gigabytes, go before the next is sampled.
            self._buffered_inputs = None
            self._micro_batches = None
        with self._step_timer.time("generate", on=training):
            batch = super()._generate_and_score_completions(inputs)
        self._has_new_completions = True
        self._warn_of_rope_switch(batch)

        if not training:
            mask_repeated(batch, self.accelerator)
        self._current_sums().add_completions(completions_of(batch))
        if training:  # evaluation is never weighted, and counts every position
            self._position_weights.mask_and_weigh(batch, self.state.global_step)
            self._occurrence_writer.number_rollouts(batch)

        if self._teacher_runs_ahead:
            with self._step_timer.time("teacher", on=training):
                batch["teacher_hidden"] = self.model_pair.teacher_states.compute_states(batch)
        if training:
            for callback in self._opd_callbacks():
                callback.on_generation_batch(batch)
        return batch

    def _warn_of_rope_switch(self, batch: dict[str, torch.Tensor]) -> None:
        """Warn once, of the first batch with a rollout beyond the context in which rotary frequencies are constant."""
        if self._rope_limit is None:
            return
        longest = int((batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)).amax())
        if longest > self._rope_limit:
            preflight.warn_of_rope_switch(longest, self._rope_limit)
            self._rope_limit = None

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training:
            return locate_loss_positions(inputs)

        # If the buffer holds another list, TRL has just generated and split a new batch.
        if self._buffered_inputs is not self._micro_batches:
            batches = self._buffered_inputs
            width = None
            if self.args.micro_batching == "tight":
                batches = tight_micro_batches(batches, self.pad_to_multiple_of)
            else:  # TRL's common length
                width = batches[0]["prompt_ids"].shape[1] + batches[0]["completion_ids"].shape[1]
            self._micro_batches = [
                locate_loss_positions(batch, width=width, multiple=self.pad_to_multiple_of) for batch in batches
            ]
            self._buffered_inputs = self._micro_batches
        return self._buffered_inputs[self._step % self.args.gradient_accumulation_steps]

    # The loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self._uses_trl_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        # As in TRL, but without its mean entropy, which synchronises with the device in every micro-batch; ours is
        # computed once per log.
        if self.model.training and inputs.get("num_items_in_batch") is not None:
            num_items_in_batch = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        # FSDP2 casts arguments that pass through the wrapper to bfloat16, which would change the denominator by 0.2 %.
        # So the arguments are bound beforehand.
        weighted_loss = partial(self.weighted_loss, inputs=inputs, num_items_in_batch=num_items_in_batch)
        loss = self._call_in_wrapped_forward(model, weighted_loss)
        return (loss, None) if return_outputs else loss

    def weighted_loss(
        self,
        student: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        num_items_in_batch: torch.Tensor | float | None = None,
    ) -> torch.Tensor:
        """Return the loss of a micro-batch (scalar), and add its measurements to the sums of the run.

        No collective may run here, because this method runs inside the wrapped forward.

        Args:
            student (`torch.nn.Module`): The unwrapped student.
            inputs (`dict[str, torch.Tensor]`): A micro-batch.
            num_items_in_batch (`torch.Tensor` or `float`, *optional*):
                Denominator of the sum over positions; by default the number of positions in the micro-batch.
        """
        inputs = inputs if "positions" in inputs else locate_loss_positions(inputs)
        weights = inputs["position_weights"]
        measure_frozen = "weights" not in inputs or self._position_weights.measures_all(self.state)
        denominator = len(weights) if num_items_in_batch is None else num_items_in_batch

        loss, signals = loss_and_signals(
            self.model_pair.hidden_states(inputs, student=student),
            inputs["completion_ids"].flatten()[inputs["positions"]],
            weights,
            inputs.get("weight_denominator", denominator),
            measure_frozen=measure_frozen,
            beta=self.model_pair.beta,
            temperature=self.model_pair.temperature,
            chunk_bytes=self.args.divergence_chunk_bytes,
        )

        sums = self._current_sums()
        sums.add_forward(inputs["rollout_mask"])
        sums.add_signals(signals, measure_frozen)
        if self.model.training:
            self._token_sums.update(signals)
            self._occurrence_writer.add(inputs, signals, self.state)
        self._finite_guard.note(signals.entropy, signals.divergence, measure_frozen | (weights != 0))
        return loss

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        loss, entropy_sum, positions = super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)
        sums = self._current_sums()
        sums.add_forward(inputs["prompt_mask"], inputs["completion_mask"])
        denominator = positions.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        sums.add_totals(loss.detach() * denominator, entropy_sum, positions)
        self._finite_guard.note(entropy_sum, loss.detach())
        return loss, entropy_sum, positions

    def _get_last_hidden_state(self, unwrapped_model, *args, **kwargs):
        # TRL calls the backbone outside the forward that Accelerate runs under autocast (bf16 is TRL's default).
        with self.accelerator.autocast():
            hidden = super()._get_last_hidden_state(unwrapped_model, *args, **kwargs)
            # A final norm in float32 gives float32, which TRL's kernel on CUDA would project in float32.
            if hidden.is_cuda and torch.is_autocast_enabled("cuda"):
                hidden = hidden.to(torch.get_autocast_dtype("cuda"))
        return hidden

    # Step and log

    def training_step(self, model, inputs, num_items_in_batch=None):
        with self._step_timer.time("student"):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if not self.accelerator.sync_gradients:
            return loss

        step = self.state.global_step + 1
        self._step_timer.end_step()
        self._occurrence_writer.end_step(step)
        self._finite_guard.end_step(step)
        if step == 1 and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            preflight.warn_of_zero_gradient(self.model)
        if step == 1:
            preflight.warn_of_first_step(self._metric_sums["train"].mean_divergence(self._sum_over_processes))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        if mode == "train":  # `logs` already has the metrics of an evaluation, with its prefix
            logs.update(self._metric_sums["train"].take(self._sum_over_processes))
            logs.update(self._step_timer.take(self.accelerator.gather))
        self._token_sums.flush()

        self._metrics[mode].pop("entropy", None)  # TRL averages batch means; ours is a mean over tokens
        with self._completions_logged_once():
            super().log(logs, start_time)

    @contextmanager
    def _completions_logged_once(self) -> Iterator[None]:
        """Show completions in a log only if some were sampled since the previous log.

        With `log_completions`, TRL shows the latest completions in every log, so the last log of a training would show
        those of the last step a second time.
        """
        configured = self.log_completions
        self.log_completions = configured and self._has_new_completions
        try:
            yield
        finally:
            self.log_completions = configured
            self._has_new_completions = False

    # Evaluation

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self._metric_sums["eval"].clear()  # an interrupted evaluation may have left some
        with own_random_stream(self.args.seed), self.model_pair.teacher_resident():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        self._finite_guard.stop_if_raised(self.state.global_step)

        sums = self._metric_sums["eval"]
        mean = sums.mean_divergence(self._sum_over_processes)
        if mean is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = mean  # TRL averages batch means
        for name, value in sums.take(self._sum_over_processes).items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    # Saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        # Written here, the file is in the checkpoint before the Trainer pushes it. `push_to_hub` saves the model to
        # another folder, which closes no window.
        if _internal_call and output_dir is not None and checkpoints.is_checkpoint(output_dir):
            self._token_sums.write_window(output_dir, self._sum_over_processes, is_main=self.args.should_save)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = output_dir or self.args.output_dir
        save = partial(super()._save, state_dict=state_dict)
        # A checkpoint keeps the adapter, and `_save_checkpoint` writes its manifest.
        if not self.args.should_save or checkpoints.is_checkpoint(folder):
            save(folder)
            return

        merge = self.accelerator.unwrap_model(self.model) if self.args.merge_adapter else None
        save_student(folder, save, merge=merge)

    def _save_checkpoint(self, model, trial) -> None:
        with checkpoints.completing(self, self._get_output_dir(trial)):
            super()._save_checkpoint(model, trial)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        with hub_errors(f"create the repository {self.args.hub_model_id or self.args.output_dir}"):
            super().init_hf_repo(token, private)

    def push_to_hub(self, *args, **kwargs):
        self.run_record.write_results(self.state, self.reduced_token_stats())
        if self.is_world_process_zero():
            add_report(self.args.output_dir, show_progress=not self.args.disable_tqdm)
        repository = self.hub_model_id or self.args.hub_model_id or "the Hub"
        with hub_errors(f"push {self.args.output_dir} to {repository}"):
            return super().push_to_hub(*args, **kwargs)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        warn_of_failed_pushes(getattr(self, "push_in_progress", None))

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        if not self.is_world_process_zero():
            return
        self.run_record.dataset_name = dataset_name or self.run_record.dataset_name
        self.run_record.write_or_warn(self.state)
        write_card(self.args.output_dir, name=model_name, repo_id=self.hub_model_id, tags=tags)

    # Helpers

    def _current_sums(self) -> MetricSums:
        return self._metric_sums["train" if self.model.training else "eval"]

    def _sum_over_processes(self, sums: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(sums, reduction="sum")
