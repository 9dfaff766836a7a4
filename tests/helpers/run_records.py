"""The content of `opd_run.json` after a whole run."""


def record(**changes) -> dict:
    content = {
        "format": "trl_opd.run",
        "version": 1,
        "command": "trl-opd train --model_name_or_path me/base",
        "started": "2026-11-01T10:00:00+00:00",
        "written": "2026-11-01T10:05:00+00:00",
        "steps": 20,
        "max_steps": 20,
        "versions": {"python": "3.11", "trl_opd": "0.1.0"},
        "hardware": {"device": "cpu", "name": "a processor, 2 cores", "processes": 1},
        "student": {
            "name": "me/base",
            "parameters": 1000,
            "trainable_parameters": 1000,
            "dtype": "float32",
            "quantization": None,
            "adapter": None,
        },
        "teacher": {
            "name": "me/teacher",
            "parameters": 5_000_000_000,
            "dtype": "bfloat16",
            "quantization": "4-bit nf4",
        },
        "dataset": {"name": "me/prompts", "rows": 100},
        "measure": {"divergence": "reverse_kl", "beta": 1.0, "temperature": 1.0},
        "arguments": {"token_weighting": "rock", "rock_weight": 0.25, "num_generations": 4},
        "log": [
            {"step": 0, "eval_accuracy": 0.1, "eval_accuracy_ci95_low": 0.05, "eval_accuracy_ci95_high": 0.2}
            | {"eval_accuracy_problems": 100},
            {"step": 10, "kl/mean": 1.5, "weight/zero_share": 0.25},
            {"step": 20, "kl/mean": 0.75, "weight/zero_share": 0.35},
            {"step": 20, "eval_accuracy": 0.5, "eval_accuracy_ci95_low": 0.4, "eval_accuracy_ci95_high": 0.6}
            | {"eval_accuracy_problems": 100},
        ],
    }
    return content | changes
