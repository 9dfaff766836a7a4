"""A callback that measures the student's accuracy on problems during training, with a reward function of TRL's kind."""

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

# Number of evaluations in a run when `eval_steps` is not set.
EVALUATIONS = 10


class AccuracyCallback(OPDCallback):
    """Logs the student's mean reward on problems before the first step, every few steps and after the last one.

    Logs `eval_accuracy` (the mean reward), `eval_accuracy_ci95_low`, `eval_accuracy_ci95_high` (for rewards of 0 and 1
    Wilson's interval, for other rewards a bootstrap over the problems; absent if those are all equal) and
    `eval_accuracy_problems` (the number of problems). Completions are greedy by default. The callback restores the
    random number generators, so it does not change the run.

    Args:
        dataset ([`~datasets.Dataset`]): Problems with a `prompt` and the columns that the reward uses.
        reward (`Callable`):
            Reward function with TRL's signature: it takes `prompts`, `completions` and every other column by name, and
            returns a number for each completion.
        eval_steps (`int`, *optional*): Optimizer steps between two evaluations; by default a tenth of the run.
        greedy (`bool`, *optional*, defaults to `True`):
            Whether to decode greedily; if False, completions are sampled as in training, with the same noise in every
            evaluation.
        name (`str`, *optional*, defaults to `"accuracy"`): Name of the metrics, for runs with several callbacks.

    Raises:
        `ValueError`: if the dataset has no prompts or no rows, or an argument is invalid; during training, if the
            reward function fails.
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
            raise ValueError(
                f"AccuracyCallback got the reward {reward!r}, which cannot be called: pass a function, such as those "
                "of trl_opd.studies.rewards."
            )
        require_prompts(dataset, "dataset of problems")
        self._rows = list(dataset)
        if not self._rows:
            raise ValueError("AccuracyCallback got a dataset without rows: pass at least one problem.")
        self._reward = reward
        self._name = name
        self._eval_steps = eval_steps
        self._greedy = greedy

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if state.global_step == 0:
            self._log()

    def on_step_end(self, args, state, control, **kwargs):
        every = self._eval_steps or max(1, state.max_steps // EVALUATIONS)
        if state.global_step % every and state.global_step != state.max_steps:
            return
        should_log = control.should_log
        self._log()
        # Logging clears `should_log`, but the log line of this step is still to be written.
        control.should_log = should_log
        self.trainer.control.should_log = should_log

    def _log(self) -> None:
        """Log the mean reward and its interval; every process must call this."""
        rewards = self._rewards()
        mean, interval = mean_interval(rewards, seed=self.trainer.args.seed)
        name = f"eval_{self._name}"
        metrics = {name: mean, f"{name}_problems": len(rewards)}
        if interval is not None:
            low, high = interval
            metrics[f"{name}_ci95_low"] = low
            metrics[f"{name}_ci95_high"] = high
        # We skip the trainer's own `log`, because it would reset the sums of the training metrics.
        Trainer.log(self.trainer, metrics)

    def _rewards(self) -> list[float]:
        """Return the rewards of all problems, in order; every process must call this."""
        trainer = self.trainer
        accelerator = trainer.accelerator
        places = range(len(self._rows))
        # A sharded model must run the same forward passes on every process, so every process solves all problems.
        is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if not is_sharded:
            places = places[accelerator.process_index :: accelerator.num_processes]

        with own_random_stream(trainer.args.seed):
            completions = self._complete(places)
            texts = []
            for ids in completions:
                texts.append(trainer.processing_class.decode(ids, skip_special_tokens=True))
            rows = [self._rows[place] for place in places]
            rewards = reward_completions(self._reward, rows, texts, places)

        pairs = list(zip(places, rewards, strict=True))
        if not is_sharded:
            pairs = gather_object(pairs)
        return [reward for _, reward in sorted(pairs)]

    def _complete(self, places: Sequence[int]) -> list[list[int]]:
        """Return the completions of the problems at some places of the dataset."""
        trainer = self.trainer
        args = trainer.args
        prompts = trainer.prompt_token_ids([row["prompt"] for row in self._rows])
        room = trainer.context_length - max(map(len, prompts))
        padded = trainer.student_traits.generates_padded
        sampling = Sampling(
            max_new_tokens=min(trainer.max_completion_length, room),
            greedy=self._greedy,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p,
            seed=args.seed,
            batch_size=args.per_device_eval_batch_size if padded else 1,
        )
        # Training never samples the ids that the teacher lacks either.
        forbidden = trainer.generation_kwargs.get("suppress_tokens") or ()
        jobs = baseline_jobs(prompts, sampling, forbidden=forbidden)
        completions = {}
        with trainer.generation_model() as model, sampling_mode(trainer.model):
            batches = decode(
                model,
                [jobs[place] for place in places],
                sampling,
                pad_id=trainer.processing_class.pad_token_id,
                eos_ids=trainer.eos_token_ids,
            )
            for batch in batches:
                for job, ids in batch:
                    completions[job.problem] = ids
        return [completions[place] for place in places]
