"""Mutation tests: breaks one line at a time in a copy of the package, and names the test that fails.

    python -m tests.benchmarks.mutations            # every mutation: about ten minutes on two cores
    python -m tests.benchmarks.mutations shift      # those whose name contains the word

The mutations are silent mistakes of this field: a shift by one, a wrong denominator, a wrong range of the vocabulary, a
sum that is not over all processes, a rollout of another step. Exits with 1 if a broken copy passes its tests.
docs/reliability.md has the last results.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutation:
    """A line of a module that is replaced, and the tests of which one must fail."""

    name: str
    module: str
    old: str
    new: str
    tests: str


MUTATIONS = [
    Mutation(
        "shift by one: the weight acts on the position after the token",
        "rollouts/batches.py",
        'batch["weights"].flatten().cpu()[positions]',
        'batch["weights"].roll(1, 1).flatten().cpu()[positions]',
        "tests/test_laws.py",
    ),
    Mutation(
        "shift by one: the teacher is read at the token's own position",
        "training/teacher_states.py",
        "positions = mask[row].nonzero()[:, 0] + prompt_lengths[row] - 1",
        "positions = (mask[row].nonzero()[:, 0] + prompt_lengths[row]).clamp(max=longest - 2)",
        "tests/test_laws.py tests/training/test_teacher_states.py",
    ),
    Mutation(
        "wrong denominator: every micro-batch divides by its own token count",
        "opd_trainer.py",
        "denominator = len(weights) if num_items_in_batch is None else num_items_in_batch",
        "denominator = len(weights)",
        "tests/test_laws.py",
    ),
    Mutation(
        "wrong denominator: truncated rollouts still count",
        "training/position_weights.py",
        'batch["num_items_in_batch"] = self._accelerator.gather(batch["tool_mask"].sum()).sum()',
        "pass",
        "tests/test_runs.py",
    ),
    Mutation(
        "wrong vocabulary range: one entry too few",
        "loss/divergence.py",
        "vocab = min(len(student_head.weight), len(teacher_head.weight))\n    heads",
        "vocab = min(len(student_head.weight), len(teacher_head.weight)) - 1\n    heads",
        "tests/test_laws.py tests/models/test_vocabulary.py",
    ),
    Mutation(
        "wrong direction of the divergence: KL(teacher ‖ student)",
        "loss/fused.py",
        "    if beta == 1.0:\n        return _reverse_kl",
        "    if beta == 1.0:\n        return _forward_kl",
        "tests/test_laws.py",
    ),
    Mutation(
        "missing all-reduce: the denominator of the weights",
        "training/position_weights.py",
        'total = self._accelerator.gather(batch["weights"].sum()).sum()',
        'total = batch["weights"].sum() * self._accelerator.num_processes',
        "tests/test_processes.py::test_two_processes_with_unequal_batches_equal_one_process",
    ),
    Mutation(
        "missing all-reduce: the statistics of a checkpoint",
        "training/token_sums.py",
        "sums = reduce(torch.stack([getattr(stats, name) for name in names]))",
        "sums = torch.stack([getattr(stats, name) for name in names])",
        "tests/test_processes.py::test_files_of_two_processes_equal_those_of_one tests/training/test_token_sums.py",
    ),
    Mutation(
        "stale rollout: the micro-batches of the step before",
        "opd_trainer.py",
        "return self._buffered_inputs[self._step % self.args.gradient_accumulation_steps]",
        "self._kept = getattr(self, '_kept', None) or self._buffered_inputs\n"
        "        return self._kept[self._step % self.args.gradient_accumulation_steps]",
        "tests/training/test_token_sums.py tests/test_runs.py",
    ),
    Mutation(
        "stale rollout: every epoch in the order of the first",
        "opd_trainer.py",
        "epoch=lambda: int(self.state.epoch or 0),",
        "epoch=lambda: 0,",
        "tests/test_faults.py tests/saving/test_checkpoints.py",
    ),
    Mutation(
        "the teacher's states in the order before sorting",
        "rollouts/batches.py",
        "batch[key] = [value[row] for row in rows.tolist()]",
        "batch[key] = value[: len(rows)]",
        "tests/rollouts/test_batches.py",
    ),
    Mutation(
        "dropout while rollouts are sampled",
        "rollouts/sampling.py",
        "    model.eval()\n    if router_logits:",
        "    if router_logits:",
        "tests/test_faults.py",
    ),
    Mutation(
        "evaluation is weighted",
        "opd_trainer.py",
        "        if training:  # evaluation is never weighted, and counts every position\n"
        "            self._position_weights.mask_and_weigh(batch, self.state.global_step)",
        "        self._position_weights.mask_and_weigh(batch, self.state.global_step)\n        if training:",
        "tests/test_weighting_run.py tests/test_runs.py",
    ),
    Mutation(
        "a window of statistics is not closed by its checkpoint",
        "training/token_sums.py",
        "window = self._window\n        self._window = self._new()\n        self._closed.merge(window)",
        "window = self._window",
        "tests/training/test_token_sums.py",
    ),
    Mutation(
        "a checkpoint's manifest is written before its last file",
        "saving/checkpoints.py",
        "        save_state(path)\n"
        "        wait()  # the other processes write their RNG states and shards\n"
        "        write_manifest(folder)",
        "        write_manifest(folder)\n        save_state(path)\n        wait()",
        "tests/saving/test_checkpoints.py",
    ),
    Mutation(
        "a resumed stream starts from its beginning",
        "rollouts/data_order.py",
        "return epochs, round(batches)",
        "return epochs, 0",
        "tests/saving/test_checkpoints.py",
    ),
    Mutation(
        "a probe reuses one token too many",
        "studies/knockout.py",
        "prefix = tuple(baseline[problem][:start])",
        "prefix = tuple(baseline[problem][: start + 1])",
        "tests/studies/test_knockout.py",
    ),
    Mutation(
        "rocks are evaluated on the prompts that selected them",
        "rocks/corpus.py",
        "return units[::2], units[1::2]",
        "return units[::2], units[::2]",
        "tests/cli/test_detect.py",
    ),
    Mutation(
        "TRL's op without our weights",
        "loss/divergence.py",
        "return (divergence * row_weights).sum(), divergence.detach(), entropy",
        "return divergence.sum() * row_weights.max(), divergence.detach(), entropy",
        "tests/loss/test_ways.py",
    ),
    Mutation(
        "TRL's op without the student's soft cap",
        "loss/divergence.py",
        "student_head.softcap,\n        teacher_head.logit_scale",
        "None,\n        teacher_head.logit_scale",
        "tests/loss/test_ways.py",
    ),
    Mutation(
        "TRL's op in the other direction",
        "loss/divergence.py",
        "teacher_bias,\n        beta,",
        "teacher_bias,\n        1.0 - beta,",
        "tests/loss/test_ways.py",
    ),
    Mutation(
        "the random arm draws the same positions on every process",
        "training/position_weights.py",
        "first_rollout=self._accelerator.process_index * len(mask)",
        "first_rollout=0",
        "tests/test_processes.py",
    ),
    Mutation(
        "every process samples an evaluation with the same noise",
        "rollouts/sampling.py",
        "set_seed(seed, device_specific=True)",
        "set_seed(seed)",
        "tests/test_processes.py",
    ),
    Mutation(
        "every batch of a collection has the same noise",
        "studies/collect.py",
        "SeedSequence([self._seed, start])",
        "SeedSequence([self._seed])",
        "tests/studies/test_collect.py",
    ),
    Mutation(
        "a teacher with the shorter context is ignored",
        "opd_trainer.py",
        "self.context_length = min(context_length(self.model), context_length(teacher))",
        "self.context_length = context_length(self.model)",
        "tests/training/test_gpu_paths.py",
    ),
    Mutation(
        "Falcon-H1's multiplier is not read",
        "loss/lm_head.py",
        '("logit_scale", "output_multiplier", "lm_head_multiplier")',
        '("logit_scale", "output_multiplier")',
        "tests/training/test_precision.py",
    ),
    Mutation(
        "HyperCLOVA X's multiplier is read as a divisor",
        "loss/lm_head.py",
        'return scaling if config.model_type == "hyperclovax" else 1 / scaling',
        "return 1 / scaling",
        "tests/training/test_precision.py",
    ),
    Mutation(
        "padding is no end of a rollout",
        "opd_trainer.py",
        "stop_ids = [*self.eos_token_ids, self._tokenizer.pad_token_id]",
        "stop_ids = self.eos_token_ids",
        "tests/training/test_precision.py",
    ),
    Mutation(
        "accuracy is sampled at temperature 1",
        "studies/accuracy.py",
        "temperature=args.temperature,",
        "temperature=1.0,",
        "tests/studies/test_accuracy.py",
    ),
    Mutation(
        "the entropy is that of the positions with a weight",
        "training/metrics.py",
        '"entropy": (sums.entropy, positions),',
        '"entropy": (sums.entropy, sums.projected),',
        "tests/training/test_precision.py",
    ),
    Mutation(
        "studies round logits to the head's dtype",
        "loss/logits.py",
        "products = [hidden.float() @ rows.to(hidden.dtype).float().T for rows in head.weight.split(TILE)]",
        "products = [(hidden @ rows.to(hidden.dtype).T).float() for rows in head.weight.split(TILE)]",
        "tests/training/test_precision.py",
    ),
    Mutation(
        "the student's rollouts are padded on the left",
        "opd_trainer.py",
        "hidden = super()._get_last_hidden_state(unwrapped_model, *args, **kwargs)",
        "hidden = super()._get_last_hidden_state(unwrapped_model, args[0].roll(1, 1), *args[1:], **kwargs)",
        "tests/models/test_model_check.py",
    ),
    Mutation(
        "a student that padding changes is sampled in padded batches",
        "opd_trainer.py",
        "if self.student_traits.generates_padded:",
        "if True:",
        "tests/models/test_model_check.py",
    ),
    Mutation(
        "later tokens are not looked at",
        "models/model_check.py",
        "self._changed = self._long[: self._unchanged] + drawn[2][self._unchanged : longest]",
        "self._changed = self._long",
        "tests/models/test_model_check.py",
    ),
    Mutation(
        "an adapter is checked without noise",
        "models/model_check.py",
        "parameter.add_(noise.to(parameter))",
        "parameter.add_(noise.to(parameter), alpha=0)",
        "tests/models/test_model_check.py",
    ),
    Mutation(
        "a merged model is not compared",
        "saving/merging.py",
        "if not difference <= limit:",
        "if False:",
        "tests/saving/test_merging.py",
    ),
]


def first_failure(mutation: Mutation, copy: Path) -> str | None:
    """Break a copy, run its tests, repair it, and return the test that failed first, or `None`."""
    module = copy / "trl_opd" / mutation.module
    original = module.read_text(encoding="utf-8")
    found = original.count(mutation.old)
    if found != 1:
        raise ValueError(f"{mutation.module} has {found} places {mutation.old!r}, not one: update the mutation.")
    module.write_text(original.replace(mutation.old, mutation.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutation.tests.split()]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    finally:
        module.write_text(original, encoding="utf-8")
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{mutation.name}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr}")
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return failed[1] if failed else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="run the mutations whose name contains one of these words")
    words = parser.parse_args().words
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        for name in ("trl_opd", "tests", "docs", "examples"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "constraints.txt"):
            shutil.copy(ROOT / name, copy)
        for mutation in MUTATIONS:
            if words and not any(word in mutation.name for word in words):
                continue
            found = first_failure(mutation, copy)
            survived += found is None
            print(f"{mutation.name}\n    {found or 'SURVIVED'}", flush=True)
    print(f"{survived} survived.")
    return bool(survived)


if __name__ == "__main__":
    sys.exit(main())
