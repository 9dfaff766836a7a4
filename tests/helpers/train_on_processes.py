"""One weighted training step on however many processes launched this; writes what moved. Started by test_laws.py.

`python -m torch.distributed.run --nproc_per_node 2 tests/helpers/train_on_processes.py OUT.json` and the same without
the launcher train on the same eight greedy rollouts.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from trl_opd import AccuracyCallback, OPDTrainer, RolloutSamples, TokenStats
from trl_opd.cli.train import GLOO_RELEASE_SECONDS

from tests.helpers.rock_sets import rock_file
from tests.helpers.tiny import make_config, make_dataset, make_model, make_tokenizer

NAMES = ("seen", "count", "kl_sum", "kl_sq_sum", "entropy_sum")

out = Path(sys.argv[1])
processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
torch.set_num_threads(1)
config = make_config(
    out.parent / f"run-{processes}",
    per_device_train_batch_size=4 // processes,
    gradient_accumulation_steps=2,
    num_generations=2,
    generation_kwargs={"do_sample": False},
    token_weighting="rock",
    rock_set=rock_file(out.with_name(f"rocks-{processes}-{rank}.json"), range(60, 180)),
    rock_weight=0.5,
    weight_normalization="weights",
    mask_truncated_completions=True,
    max_completion_length=6,
    max_steps=1,
    save_strategy="steps",
    save_steps=1,
    save_only_model=True,
    save_occurrences=1,
    per_device_eval_batch_size=2,
    optim="sgd",
    learning_rate=1.0,
    max_grad_norm=0.0,
)
student = make_model(seed=0)
with torch.no_grad():  # rollouts that end, on every process, and some that are cut
    student.lm_head.weight[2] *= 4
problems = make_dataset(5).add_column("answer", [1.0, 2.0, 4.0, 8.0, 16.0])  # which two processes do not divide


def reward(completions, answer, **_):
    return [weight * len(one[0]["content"]) for one, weight in zip(completions, answer, strict=True)]


trainer = OPDTrainer(
    model=student,
    teacher_model=make_model(seed=1),
    args=config,
    train_dataset=make_dataset(),
    eval_dataset=make_dataset(3),  # which two processes do not divide
    processing_class=make_tokenizer(),
    callbacks=[AccuracyCallback(problems, reward), RolloutSamples(2)],
)
evaluated = trainer.evaluate()
before = [p.detach().clone() for p in trainer.model.parameters()]
trainer.train()
stats, local = trainer.reduced_token_stats(), trainer.token_stats
if rank == 0:
    written = TokenStats.load(out.parent / f"run-{processes}" / "checkpoint-1")
    assert all(torch.equal(getattr(written, name), getattr(stats, name)) for name in NAMES)
    assert (local.seen.sum() < stats.seen.sum()) == (processes > 1)
    moved = torch.cat([(p.detach() - old).flatten() for p, old in zip(trainer.model.parameters(), before, strict=True)])
    line = next(line for line in trainer.state.log_history if "loss" in line) | evaluated
    keys = (
        "loss",
        "eval_loss",
        "eval_kl/mean",
        "eval_entropy",
        "eval_rock/token_share",
        "kl/mean",
        "rock/token_share",
        "rock/kl_share",
        "rock/mean_kl",
        "other/mean_kl",
        "entropy",
    )
    import pyarrow.parquet as pq

    rows = pq.read_table(out.parent / f"run-{processes}" / "occurrences" / "step-1.parquet")
    content = {
        "processes": trainer.accelerator.num_processes,
        "log": {key: line[key] for key in (*keys, "weight/zero_share", "completions/clipped_ratio")}
        | {key: line[key] for key in ("completions/repetition", "eval_completions/repetition") if key in line},
        "accuracy": [line for line in trainer.state.log_history if "eval_accuracy" in line],
        "samples": pq.read_table(trainer.args.output_dir + "/rollout_samples.parquet", columns=["token_id"]).num_rows,
        "stats": {name: getattr(stats, name).tolist() for name in NAMES},
        "occurrences": rows.select(["rollout", "position", "token_id", "prompt"]).to_pydict(),
        "kl": rows["kl"].to_pylist(),
        "moved": moved[torch.linspace(0, len(moved) - 1, 5000).long()].tolist(),
    }
    out.write_text(json.dumps(content))
trainer.accelerator.wait_for_everyone()
time.sleep(GLOO_RELEASE_SECONDS)
