"""OPDTrainer: TRL's DistillationTrainer with weights per token, several rollouts per prompt and honest errors.

Small overrides and no mathematics: weights come from `weighting`, divergences from `divergence`, sums from `figures`.
Two laws of the base class bind every override: no collective may run inside `_compute_loss` (it runs inside the wrapped
forward), and the loss is divided by the token count of the whole generation batch, clamped at 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from datasets import Dataset, IterableDataset
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from trl import DistillationTrainer

from .artefacts.hub import hub_errors
from .artefacts.token_stats import TokenStats
from .loss.lm_head import output_rows
from .models.quantised import make_readable
from .models.teacher import check_teacher_vocabulary, load_teacher, place_teacher
from .opd_config import OPDConfig
from .rollouts import sampling as rollouts
from .rollouts.batches import completions_of, locate, tight_micro_batches
from .rollouts.continuous_batching import generate_continuously
from .rollouts.prompts import require_embeddable, require_fit, require_prompt, require_prompts, tokens_of
from .saving import checkpoints
from .saving import student as publishing
from .saving.run_record import RunRecord
from .training import preflight
from .training.finite import FiniteGuard, name_the_sampling_student
from .training.metrics import FigureSums, PhaseClock
from .training.model_pair import describe_measure, weighted_loss
from .training.occurrence_writer import RunOccurrences
from .training.position_weights import Arm
from .training.teacher_states import TeacherPhase
from .training.token_sums import RunStats


class OPDTrainer(DistillationTrainer):
    """Trainer for on-policy distillation that can weight, and shows, the tokens that it spends itself on.

    Takes what [`~trl.DistillationTrainer`] takes, with an [`OPDConfig`], and trains as it does with nothing new set.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The student.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            The teacher; `args.teacher_model_name_or_path` when omitted. Its vocabulary may be padded to another size.
        args ([`OPDConfig`], *optional*): Configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): Rows with a `prompt`.
        others: As in [`~trl.DistillationTrainer`].

    Attributes:
        rock_set ([`RockSet`] or `None`): The rock set of `args.rock_set`.
        teacher_model ([`~transformers.PreTrainedModel`]): The frozen teacher.
        run_record ([`RunRecord`]): What is run, for report and card.

    Raises:
        `ValueError`: for settings that contradict each other, a teacher with another vocabulary, a rock set that does
            not fit the tokenizer, a vision-language student, and, while training, logits that are not finite.
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
        self.rock_set = preflight.load_rock_set(args)
        # TRL's constructor refuses vocabularies of unequal size, so it does not see the teacher. Loading the teacher
        # first leaves the random stream as TRL has it: its constructor seeds before it builds the student.
        teacher_model = load_teacher(teacher_model, model, args)
        models = model, None
        data = train_dataset, eval_dataset, processing_class
        super().__init__(*models, args, *data, callbacks, optimizers, quantization_config, peft_config, tools)
        preflight.require_text(self._is_vlm, self._tokenizer)
        preflight.require_mergeable(args, self.model)
        make_readable(self.model)
        self._attach_teacher(teacher_model)
        if self.rock_set is not None:
            self.rock_set.check(self._tokenizer, self._vocab_size)
        stop_ids = [*self.eos_token_ids, self._tokenizer.pad_token_id]
        self._arm = Arm(args, self.rock_set, self._vocab_size, stop_ids, self.accelerator)
        self._figures = {mode: FigureSums(self._arm.groups, self.accelerator.device) for mode in ("train", "eval")}
        self._finite, self._clock = FiniteGuard(self.accelerator), PhaseClock(self.accelerator.device)
        self._new_completions, self._unsplit, self._eval_prefix = False, False, "eval_"

    def _attach_teacher(self, teacher: PreTrainedModel) -> None:
        rows = output_rows(self.model), output_rows(teacher)
        check_teacher_vocabulary(teacher, self, rows)
        self._vocab_size = min(rows)
        self._context = min(preflight.context_length(self.model), preflight.context_length(teacher))
        if self.max_completion_length is None:
            self.max_completion_length = self._context  # what TRL's tool loop compares with
        if rows[0] > self._vocab_size:
            rollouts.suppress(self, preflight.suppressible(self, rows[0]))
        preflight.warn_of_float32(self.accelerator.device, self.model, teacher)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self.teacher_model = place_teacher(teacher, self.accelerator, self.args.teacher_device, sharded=sharded)
        measure = describe_measure(self.args, self.model, teacher, self._tokenizer)
        self.run_record = RunRecord(self, measure)
        self._teacher_phase = TeacherPhase(self, sharded=sharded)
        self._stats = RunStats(self._vocab_size, measure, self.accelerator.device, enabled=self.args.token_statistics)
        self._occurrences = RunOccurrences(self.args, measure, self._vocab_size, self.accelerator)
        # Then TRL's own loss serves, to the bit: nothing is weighted, told apart or cut to a shared range.
        self._as_trl = rows[0] == rows[1] and self.args.trains_as_trl()

    def get_train_dataloader(self):
        with rollouts.grouped_stream(self, prompts=self._prompts_per_step, rollouts=self.args.num_generations):
            return super().get_train_dataloader()

    def _init_training_state(self, *args, **kwargs):
        return rollouts.place_in_epoch(self, super()._init_training_state(*args, **kwargs), *args, **kwargs)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> rollouts.EpochRepeatSampler:
        return rollouts.train_sampler(self, dataset, prompts=self._prompts_per_step)

    @property
    def token_stats(self) -> TokenStats | None:
        """Statistics of all training steps of this process since start or resume; `None` when they are off."""
        return self._stats.total()

    def reduced_token_stats(self) -> TokenStats | None:
        """Return `token_stats` summed over all processes. A collective: every process calls it."""
        return self._stats.total(self._sum_over_processes)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        resume_from_checkpoint = checkpoints.resolve(resume_from_checkpoint, self.args.output_dir)
        self._figures["train"].clear()  # of a run that broke off
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "attach"):  # ours take the trainer, whose rollouts they need
                callback.attach(self)
        self._stats.start(resumed=resume_from_checkpoint is not None)
        self.run_record.start()
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        preflight.require_step(self.state, self.train_dataset, self._prompts_per_step)
        self.run_record.write_results()
        return output

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self._figures["eval"].clear()  # `predict` and an evaluation that broke off do not log
        self._eval_prefix = f"{metric_key_prefix}_"
        with rollouts.own_random_stream(self.args.seed), self._teacher_phase.resident():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        self._finite.stop_if_raised(self.state.global_step)
        mean = self._figures["eval"].mean_divergence(self._sum_over_processes)
        if mean is not None:
            output.metrics[f"{self._eval_prefix}loss"] = mean  # TRL's is a mean of batch means
        return output

    def _tokenize_prompts(self, prompts: list):
        prompt_ids, *rest = tokens_of(super()._tokenize_prompts, prompts)
        budget = 1 if self.args.max_completion_length is None else self.max_completion_length
        require_fit(prompts, prompt_ids, budget, self._context, self.train_dataset)
        return prompt_ids, *rest

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
        require_embeddable(prompt_ids, self._vocab_size, self._tokenizer)
        if self.args.max_completion_length is None:
            rollouts.allow_up_to(self, self._context - max(map(len, prompt_ids)))
        stop = name_the_sampling_student(self.state.global_step + 1)
        with stop, rollouts.sampling_mode(self.model), rollouts.positions_from_mask(self.model):
            if self.args.use_transformers_continuous_batching:
                return generate_continuously(self, prompt_ids)
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, has_tool_images)

    def _generate_and_score_completions(self, inputs):
        for row in inputs:
            require_prompt(row.get("prompt"), "a row of the dataset")
        with self._clock.time("generate", on=self.model.training):
            batch = super()._generate_and_score_completions(inputs)
        training = self.model.training
        self._new_completions, self._unsplit = True, self._unsplit or training
        if not training:
            rollouts.mask_repeated(batch, self.accelerator)
        self._figures["train" if training else "eval"].add_completions(completions_of(batch))
        if training:  # evaluation is never weighted, and counts every position
            self._arm.prepare(batch, self.state.global_step)
            self._occurrences.number(batch)
            self._generation_batch = batch
        self._teacher_phase.prepare(batch)
        return batch

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training:
            return locate(inputs)
        if self._unsplit:
            self._unsplit = False
            if self.args.micro_batching == "tight":
                self._buffered_inputs = tight_micro_batches(self._buffered_inputs, self.pad_to_multiple_of)
            self._buffered_inputs = [locate(batch) for batch in self._buffered_inputs]
        return self._buffered_inputs[self._step % self.args.gradient_accumulation_steps]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self._as_trl:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # As TRL's, without its mean entropy, which waits for the device in every micro-batch: ours comes with the log.
        if self.model.training and inputs.get("num_items_in_batch") is not None:
            num_items_in_batch = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        student = self.accelerator.unwrap_model(model)
        # Bound: FSDP2 casts what goes through the wrapper to bfloat16, also the denominator, which would lose 0.2 %.
        weigh = partial(weighted_loss, self, inputs=inputs, num_items_in_batch=num_items_in_batch)
        loss = self._forward_redirection(model, student, weigh, student)
        return (loss, None) if return_outputs else loss

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        loss, entropy_sum, positions = super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)
        figures = self._figures["train" if self.model.training else "eval"]
        figures.add_forward(inputs["prompt_mask"], inputs["completion_mask"])
        denominator = positions.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        figures.add_totals(loss.detach() * denominator, entropy_sum, positions)
        self._finite.note(entropy_sum, loss.detach())
        return loss, entropy_sum, positions

    def _get_last_hidden_state(self, unwrapped_model, *args, **kwargs):
        # TRL calls the backbone beside the forward that Accelerate has put under autocast (bf16 is TRL's default).
        with self.accelerator.autocast(), rollouts.positions_from_mask(unwrapped_model):
            return super()._get_last_hidden_state(unwrapped_model, *args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        with self._clock.time("student"):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._clock.end_step()
            self._occurrences.end_step(self.state.global_step + 1)
            self._finite.end_step(self.state.global_step + 1)
            if self.state.global_step == 0:
                preflight.warn_of_first_step(self._figures["train"].mean_divergence(self._sum_over_processes))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        prefix = "" if mode == "train" else self._eval_prefix
        figures = self._figures[mode].take(self._sum_over_processes)
        figures |= self._clock.take(self.accelerator.gather) if mode == "train" else {}
        self._stats.flush()
        self._metrics[mode].pop("entropy", None)  # TRL's is a mean of batch means; ours is over tokens
        logs.update({prefix + name: value for name, value in figures.items()})
        show, self.log_completions = self.log_completions, self.log_completions and self._new_completions
        super().log(logs, start_time)
        self.log_completions, self._new_completions = show, False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        # Here the file is in the checkpoint before the Trainer pushes it; `push_to_hub` saves without a folder.
        if _internal_call and output_dir is not None:
            self._stats.write_window(output_dir, self._sum_over_processes, is_main=self.args.should_save)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        publishing.save_student(self, output_dir, partial(super()._save, state_dict=state_dict))

    def _save_checkpoint(self, model, trial) -> None:
        with checkpoints.completing(self, self._get_output_dir(trial)):
            super()._save_checkpoint(model, trial)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        with hub_errors(f"create the repository {self.args.hub_model_id or self.args.output_dir}"):
            super().init_hf_repo(token, private)

    def push_to_hub(self, *args, **kwargs):
        self.run_record.write_results()
        if self.is_world_process_zero():
            publishing.add_report(self.args.output_dir)
        with hub_errors(f"push {self.args.output_dir} to {self.hub_model_id or self.args.hub_model_id or 'the Hub'}"):
            return super().push_to_hub(*args, **kwargs)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        publishing.warn_of_failed_pushes(getattr(self, "push_in_progress", None))

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        publishing.write_card_of(self, model_name, dataset_name, tags)

    def _sum_over_processes(self, sums: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(sums, reduction="sum")
