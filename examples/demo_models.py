"""Put the demo's teacher, its untrained student, fresh prompts and held-out problems into a folder, for other commands.

    python examples/demo_models.py --output_dir demo_models

After `trl-opd demo` the distilled student is in opd_demo/uniform; docs/detection.md goes on from there.
"""

import argparse
import json
import shutil
from pathlib import Path

from trl_opd.demo.arithmetic import draw_problems
from trl_opd.demo.arms import MODELS, eval_problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_models"))
    parser.add_argument("--num_prompts", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1_000, help="of the prompts; the demo trains on those of its own")
    options = parser.parse_args()
    for name in ("student", "teacher"):
        shutil.copytree(MODELS / name, options.output_dir / name, dirs_exist_ok=True)
    problems = draw_problems(options.num_prompts, options.seed, held_out=False)
    rows = {
        "prompts": [{"prompt": problem.question} for problem in problems],
        "problems": [{"prompt": problem.question, "answer": str(problem.answer)} for problem in eval_problems()],
    }
    for name, content in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in content)
        (options.output_dir / f"{name}.jsonl").write_text(text, encoding="utf-8")
    print(f"The teacher, the student before distillation, prompts and problems are in {options.output_dir}")


if __name__ == "__main__":
    main()
