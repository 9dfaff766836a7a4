"""OPDTrainer: TRL's DistillationTrainer with weights per token, several rollouts per prompt and honest errors.

Small overrides and no mathematics: weights come from `weighting`, divergences from `divergence`, sums from `figures`.
Two laws of the base class bind every override: no collective may run inside `_compute_loss` (it runs inside the wrapped
forward), and the loss is divided by the token count of the whole generation batch, clamped at 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

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

from ._trl import RepeatSampler, lm_head, output_rows, repeat_iterable_dataset
from .arm import Arm
from .batching import is_truncated, loss_mask
from .divergence import weighted_divergence
from .figures import FigureSums
from .finite import FiniteGuard, not_finite
from .opd_config import OPDConfig
from .preflight import load_rock_set, require_groups, warn_of_first_step, warn_of_float32
from .records import LMHead, TokenSignals
from .teacher import check_teacher_vocabulary, keep_4bit_layout, load_teacher, place_teacher


class OPDTrainer(DistillationTrainer):
    """Trainer for on-policy distillation that can weight, and shows, the tokens that it spends itself on.

    Takes what [`~trl.DistillationTrainer`] takes, with an [`OPDConfig`]. With nothing new set it trains as that class.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_opd import OPDTrainer

    >>> trainer = OPDTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     teacher_model="Qwen/Qwen2.5-7B-Instruct",
    ...     train_dataset=load_dataset("trl-lib/tldr", split="train"),
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The student.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            The teacher; `args.teacher_model_name_or_path` when omitted. Its vocabulary may be padded to another size.
        args ([`OPDConfig`], *optional*): Configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): Rows with a `prompt`.
        eval_dataset, processing_class, callbacks, optimizers, quantization_config, peft_config, tools:
            As in [`~trl.DistillationTrainer`].

    Attributes:
        rock_set ([`RockSet`] or `None`): The rock set of `args.rock_set`.
        teacher_model ([`~transformers.PreTrainedModel`]): The frozen teacher.

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
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = OPDConfig(f"{name.split('/')[-1]}-OPD")
        require_groups(args)
        self.rock_set = load_rock_set(args)
        # TRL's constructor refuses vocabularies of unequal size, so it does not see the teacher. Loading the teacher
        # first leaves the random stream as TRL has it: its constructor seeds before it builds the student.
        teacher_model = load_teacher(teacher_model, model, args)
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
        if self._is_vlm:
            raise ValueError(
                f"{type(self).__name__} distils text models only for now; use trl.DistillationTrainer for the "
                "vision-language student."
            )
        keep_4bit_layout(self.model)
        self._attach_teacher(teacher_model)
        if self.rock_set is not None:
            self.rock_set.check(self._tokenizer, self._vocab_size)
        self._arm = Arm(args, self.rock_set, self._vocab_size, self.accelerator)
        self._figures = {mode: FigureSums(self._arm.groups, self.accelerator.device) for mode in ("train", "eval")}
        self._finite = FiniteGuard(self.accelerator)
        self._first_step_loss = torch.zeros((), device=self.accelerator.device)

    # Set-up

    def _attach_teacher(self, teacher: PreTrainedModel) -> None:
        rows = output_rows(self.model), output_rows(teacher)
        check_teacher_vocabulary(teacher, self._tokenizer, rows, self.args)
        self._vocab_size = min(rows)
        if rows[0] > self._vocab_size:
            self._suppress(range(self._vocab_size, rows[0]))
        warn_of_float32(self.accelerator.device, self.model, teacher)
        self._sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self.teacher_model = place_teacher(teacher, self.accelerator, sharded=self._sharded)
        # Then TRL's own loss computes the same, to the bit: nothing is weighted, told apart or cut to a shared range.
        self._as_trl = self.args.micro_batching == "trl" and self.rock_set is None and rows[0] == rows[1]

    def _suppress(self, ids: range) -> None:
        if self.use_vllm:
            raise ValueError(
                f"The student has {len(ids)} vocabulary entries that the teacher cannot embed, and vLLM cannot be kept "
                "from sampling them: use generation by transformers, or a student of the teacher's vocabulary size."
            )
        suppressed = sorted({*(self.generation_kwargs.get("suppress_tokens") or ()), *ids})
        self.generation_config.suppress_tokens = self.generation_kwargs["suppress_tokens"] = suppressed

    # Rollouts

    def get_train_dataloader(self):
        stream, shuffle = self.train_dataset, self.shuffle_dataset
        if self.args.num_generations == 1 or not isinstance(stream, IterableDataset):
            return super().get_train_dataloader()
        # TRL repeats a stream once per accumulation step, but each prompt once: repeat the records first, in the order
        # that the sampler below has for indexed datasets. The shuffle has to come before that.
        prompts = self._rollouts_per_step() // self.args.num_generations
        shuffled = stream.shuffle(seed=self.args.seed) if shuffle else stream
        self.train_dataset = repeat_iterable_dataset(shuffled, self.args.num_generations, batch_size=prompts)
        self.shuffle_dataset = False
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.shuffle_dataset = stream, shuffle

    def _get_train_sampler(self, dataset: Dataset | None = None) -> RepeatSampler:
        return RepeatSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.args.num_generations,
            batch_size=self._rollouts_per_step() // self.args.num_generations,
            repeat_count=self.args.gradient_accumulation_steps,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def _rollouts_per_step(self) -> int:
        args = self.args
        return args.per_device_train_batch_size * self.accelerator.num_processes * args.gradient_accumulation_steps

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
        largest = max((max(ids, default=0) for ids in prompt_ids), default=0)
        if largest >= self._vocab_size:
            raise ValueError(
                f"A prompt holds token id {largest} ({self._tokenizer.convert_ids_to_tokens(largest)!r}), which is "
                f"outside the {self._vocab_size} ids that student and teacher share: the other model cannot embed it."
            )
        try:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, has_tool_images)
        except RuntimeError as error:
            # How torch.multinomial says NaN, on the CPU and on CUDA.
            if any(sign in str(error) for sign in ("probability tensor contains", "device-side assert")):
                raise not_finite("student", self.state.global_step + 1) from error
            raise

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return batch  # evaluation is never weighted, and counts every position
        if self.args.mask_truncated_completions:
            self._mask_truncated(batch)
        self._arm.weigh(batch, self.state.global_step)
        return batch

    def _mask_truncated(self, batch: dict) -> None:
        stop_ids = [*self.eos_token_ids, self._tokenizer.pad_token_id]
        cut = is_truncated(batch["completion_ids"], batch["completion_mask"], stop_ids)
        # The tool mask is TRL's one way to keep a position as context and out of the loss.
        batch["tool_mask"] = loss_mask(batch).long() * (~cut).long()[:, None]
        batch["num_items_in_batch"] = self.accelerator.gather(batch["tool_mask"].sum()).sum()
        if batch["num_items_in_batch"] == 0:
            warnings.warn(
                f"Step {self.state.global_step + 1}: every rollout was cut at max_completion_length="
                f"{self.max_completion_length}, and mask_truncated_completions leaves them out: nothing is trained in "
                "this step. Raise max_completion_length.",
                stacklevel=2,
            )

    # The loss

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        figures = self._figures["train" if self.model.training else "eval"]
        figures.add_forward(inputs["prompt_mask"], inputs["completion_mask"])
        if self._as_trl:
            loss, entropy_sum, positions = super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)
            denominator = positions.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            figures.add_totals(loss.detach() * denominator, entropy_sum, positions)
            self._finite.note(entropy_sum, loss.detach())
            return loss, entropy_sum, positions

        mask = loss_mask(inputs)
        compared = (*self._hidden_states(unwrapped_student, inputs, mask), *self._heads(unwrapped_student))
        weights = inputs["weights"][mask] if "weights" in inputs else mask[mask].float()
        denominator = len(weights) if num_items_in_batch is None else num_items_in_batch
        denominator = inputs.get("weight_denominator", denominator)
        settings = {"beta": self.beta, "temperature": self.temperature}
        loss, divergence, entropy = weighted_divergence(*compared, weights, denominator, **settings)
        frozen = weights == 0
        complete = "weights" not in inputs or self._arm.measures_all(self.state)
        if complete and "weights" in inputs:
            with torch.no_grad():
                _, *of_frozen = weighted_divergence(*compared, frozen.float(), 1.0, **settings)
            divergence = torch.where(frozen, of_frozen[0], divergence)
            entropy = torch.where(frozen, of_frozen[1], entropy)
        figures.add_signals(TokenSignals(inputs["completion_ids"][mask], divergence, entropy, weights), complete)
        measured = torch.ones_like(frozen) if complete else ~frozen
        self._finite.note(entropy[measured], divergence[measured])
        return loss, entropy[measured].sum(), measured.sum()

    def _heads(self, unwrapped_student) -> tuple[LMHead, LMHead]:
        heads = lm_head(unwrapped_student), lm_head(self.accelerator.unwrap_model(self.teacher_model))
        devices = [head.weight.device for head in heads]
        if devices[0] != devices[1]:
            raise ValueError(
                f"The student's LM head is on {devices[0]}, the teacher's on {devices[1]}: give both models a "
                "`device_map` that puts their heads on one device."
            )
        return heads

    def _hidden_states(self, unwrapped_student, inputs, mask) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the last hidden states of student and teacher that predict the tokens of `mask`, `(N, H)` each."""
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        forward = (input_ids, attention_mask, inputs["completion_ids"].size(1))
        student_hidden = self._get_last_hidden_state(unwrapped_student, *forward)
        self.teacher_model.eval()
        unwrapped_teacher = self.accelerator.unwrap_model(self.teacher_model)
        with torch.no_grad():
            # As in TRL, through the wrapper: FSDP and DeepSpeed gather the teacher's shards in its forward.
            teacher_hidden = self._forward_redirection(
                self.teacher_model, unwrapped_teacher, self._get_last_hidden_state, unwrapped_teacher, *forward
            )
        # With a model split over devices the backbone may end on another device than its head.
        device = unwrapped_student.get_output_embeddings().weight.device
        mask = mask.to(device)
        return student_hidden.to(device)[mask], teacher_hidden.to(device)[mask]

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.state.global_step == 0:
            self._first_step_loss += loss.detach()
        if self.accelerator.sync_gradients:
            self._finite.stop_if_raised(self.state.global_step + 1)
            if self.state.global_step == 0:
                warn_of_first_step(self.accelerator.reduce(self._first_step_loss, reduction="mean").item())
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        if mode == "eval":
            self._finite.stop_if_raised(self.state.global_step)
        prefix = "" if mode == "train" else "eval_"
        figures = self._figures[mode].take(lambda sums: self.accelerator.reduce(sums, reduction="sum"))
        self._metrics[mode].pop("entropy", None)  # TRL's is a mean of batch means; ours is over tokens
        logs.update({prefix + name: value for name, value in figures.items()})
        super().log(logs, start_time)
