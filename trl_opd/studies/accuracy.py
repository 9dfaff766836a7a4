"""A callback that lets the student solve problems every few steps, with rewards as TRL's trainers take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback

from .._trl import unwrap_model_for_generation
from ..opd_config import require_whole
from ..rollouts.prompts import require_prompts
from ..rollouts.sampling import own_random_stream, sampling_mode
from ..statistics import mean_interval
from .knockout import Sampling, baseline_jobs, decode
from .rewards import reward_completions

# Evaluations of a run, when nobody says how often.
EVALUATIONS = 10


class AccuracyCallback(TrainerCallback):
    """Lets the student solve problems before the first step, every few steps and at the end, and logs how it did.

    Logs `eval_accuracy` (the mean reward), `eval_accuracy_ci95_low`, `eval_accuracy_ci95_high` (Wilson's interval of
    0/1 rewards, a bootstrap over the problems of others; absent where all of those are equal) and
    `eval_accuracy_problems`. The completions are greedy by default. Nothing is drawn from the run's random numbers: the
    run is the one without this callback.

    Args:
        dataset ([`~datasets.Dataset`]): Problems with a `prompt`, and whatever columns the reward takes.
        reward (`Callable`): As TRL's trainers take it: `prompts`, `completions` and every other column by name, to a
            number for each.
        eval_steps (`int`, *optional*): Optimizer steps between two evaluations; a tenth of the run when omitted.
        greedy (`bool`, *optional*, defaults to `True`): Whether to take the likeliest token, or to sample as in
            training, with noise that is the same in every evaluation.
        name (`str`, *optional*, defaults to `"accuracy"`): Of the figures, for several callbacks.

    Raises:
        `ValueError`: for a dataset without prompts or rows, and while training for a reward that fails.
    """

    def __init__(
        self,
        dataset,
        reward: Callable,
        *,
        eval_steps: int | None = None,
        greedy: bool = True,
        name: str = "accuracy",
    ):
        if eval_steps is not None:
            require_whole("eval_steps", eval_steps, 1)
        if not callable(reward):
            raise ValueError(f"AccuracyCallback takes a reward function, got {reward!r}.")
        require_prompts(dataset, "dataset of problems")
        self._rows, self._reward, self._name = list(dataset), reward, name
        if not self._rows:
            raise ValueError("AccuracyCallback needs at least one problem, the dataset is empty.")
        self._every, self._greedy, self._trainer = eval_steps, greedy, None

    def attach(self, trainer) -> None:
        """Take the trainer whose student is evaluated; [`OPDTrainer`] calls this when a training begins."""
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if self._trainer is None:
            raise ValueError("AccuracyCallback works with trl_opd.OPDTrainer only: pass it to that trainer.")
        if state.global_step == 0:
            self._log()

    def on_step_end(self, args, state, control, **kwargs):
        every = self._every or max(1, state.max_steps // EVALUATIONS)
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            due = control.should_log
            self._log()
            # That was a log to the Trainer, and the step's own is still to come.
            self._trainer.control.should_log = control.should_log = due

    def _log(self) -> None:
        rewards = self._rewards()
        mean, interval = mean_interval(rewards, seed=self._trainer.args.seed)
        figures = {"": mean, "_problems": len(rewards)}
        if interval is not None:
            figures |= {"_ci95_low": interval[0], "_ci95_high": interval[1]}
        # A line of its own: the trainer's `log` would end the window of the training figures.
        Trainer.log(self._trainer, {f"eval_{self._name}{part}": value for part, value in figures.items()})

    def _rewards(self) -> list[float]:
        """Return the rewards of all problems, in order. A collective."""
        trainer, processes = self._trainer, self._trainer.accelerator.num_processes
        # Sharded models need the same forwards on every process; else each takes its part of the problems.
        alike = processes == 1 or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        mine = range(len(self._rows)) if alike else range(trainer.accelerator.process_index, len(self._rows), processes)
        with own_random_stream(trainer.args.seed):
            completions = self._complete(mine)
            # transformers 5 makes one text of no completions, and with few problems a process has none.
            texts = trainer._tokenizer.batch_decode(completions, skip_special_tokens=True) if completions else []
            found = reward_completions(self._reward, [self._rows[place] for place in mine], texts, mine)
        pairs = list(zip(mine, found, strict=True))
        return [reward for _, reward in sorted(pairs if alike else gather_object(pairs))]

    def _complete(self, mine: Sequence[int]) -> list[list[int]]:
        """Return the completions of some problems."""
        trainer, args = self._trainer, self._trainer.args
        prompts = trainer._tokenize_prompts([row["prompt"] for row in self._rows])[0]
        sampling = Sampling(
            max_new_tokens=min(trainer.max_completion_length, trainer._context - max(map(len, prompts))),
            greedy=self._greedy,
            **{name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "min_p", "seed")},
            batch_size=args.per_device_eval_batch_size,
        )
        # Ids that the teacher lacks are never sampled in training either.
        jobs = baseline_jobs(prompts, sampling, forbidden=trainer.generation_kwargs.get("suppress_tokens") or ())
        ends = {"pad_id": trainer._tokenizer.pad_token_id, "eos_ids": trainer.eos_token_ids}
        with (
            unwrap_model_for_generation(
                trainer.model_wrapped,
                trainer.accelerator,
                gather_deepspeed3_params=args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
            ) as model,
            trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False),
            sampling_mode(trainer.model),
        ):
            batches = decode(model, [jobs[place] for place in mine], sampling, **ends)
            found = {job.problem: ids for batch in batches for job, ids in batch}
        return [found[place] for place in mine]
