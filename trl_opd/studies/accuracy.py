"""A callback that lets the student solve problems every few steps, with rewards as TRL's trainers take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from accelerate.utils import gather_object
from transformers import Trainer

from ..opd_config import require_whole
from ..opd_trainer import OPDTrainer
from ..rollouts.prompts import require_prompts
from ..rollouts.sampling import own_random_stream, sampling_mode
from ..statistics import mean_interval
from ..training.callbacks import OPDCallback
from .knockout import Sampling, baseline_jobs, decode
from .rewards import reward_completions

# Evaluations of a run, when nobody says how often.
EVALUATIONS = 10


class AccuracyCallback(OPDCallback):
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
        name (`str`, *optional*, defaults to `"accuracy"`): Name of the metrics, for several callbacks.

    Raises:
        `ValueError`: for a dataset without prompts or rows, and while training for a reward that fails.
    """

    trainer: OPDTrainer

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
        self._every = eval_steps
        self._greedy = greedy

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if state.global_step == 0:
            self._log()

    def on_step_end(self, args, state, control, **kwargs):
        every = self._every or max(1, state.max_steps // EVALUATIONS)
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            due = control.should_log
            self._log()
            # That was a log to the Trainer, and the step's own is still to come.
            self.trainer.control.should_log = control.should_log = due

    def _log(self) -> None:
        rewards = self._rewards()
        mean, interval = mean_interval(rewards, seed=self.trainer.args.seed)
        metrics = {"": mean, "_problems": len(rewards)}
        if interval is not None:
            metrics |= {"_ci95_low": interval[0], "_ci95_high": interval[1]}
        # A line of its own: the trainer's `log` would end the window of the training figures.
        Trainer.log(self.trainer, {f"eval_{self._name}{part}": value for part, value in metrics.items()})

    def _rewards(self) -> list[float]:
        """Return the rewards of all problems, in order. A collective."""
        trainer = self.trainer
        processes = trainer.accelerator.num_processes
        # Sharded models need the same forwards on every process; else each takes its part of the problems.
        alike = processes == 1 or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        mine = range(len(self._rows)) if alike else range(trainer.accelerator.process_index, len(self._rows), processes)
        with own_random_stream(trainer.args.seed):
            completions = self._complete(mine)
            # transformers 5 makes one text of no completions, and with few problems a process has none.
            tokenizer = trainer.processing_class
            texts = tokenizer.batch_decode(completions, skip_special_tokens=True) if completions else []
            found = reward_completions(self._reward, [self._rows[place] for place in mine], texts, mine)
        pairs = list(zip(mine, found, strict=True))
        return [reward for _, reward in sorted(pairs if alike else gather_object(pairs))]

    def _complete(self, mine: Sequence[int]) -> list[list[int]]:
        """Return the completions of some problems."""
        trainer, args = self.trainer, self.trainer.args
        prompts = trainer.prompt_token_ids([row["prompt"] for row in self._rows])
        sampling = Sampling(
            max_new_tokens=min(trainer.max_completion_length, trainer.context_length - max(map(len, prompts))),
            greedy=self._greedy,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p,
            seed=args.seed,
            batch_size=args.per_device_eval_batch_size,
        )
        # Ids that the teacher lacks are never sampled in training either.
        jobs = baseline_jobs(prompts, sampling, forbidden=trainer.generation_kwargs.get("suppress_tokens") or ())
        with trainer.generation_model() as model, sampling_mode(trainer.model):
            batches = decode(
                model,
                [jobs[place] for place in mine],
                sampling,
                pad_id=trainer.processing_class.pad_token_id,
                eos_ids=trainer.eos_token_ids,
            )
            found = {job.problem: ids for batch in batches for job, ids in batch}
        return [found[place] for place in mine]
