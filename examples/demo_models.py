"""Write the demo's teacher, its student before distillation, prompts and held-out problems to a folder.

    python examples/demo_models.py --output_dir demo_models

Other commands can use them. `trl-opd demo` writes the distilled student to opd_demo/uniform; docs/detection.md shows
what to do with it.
"""

import argparse
import json
import shutil
from pathlib import Path

from trl_opd.demo.arithmetic import draw_problems
from trl_opd.demo.arms import MODELS, eval_problems


def write_lines(rows: list[dict[str, str]], path: Path) -> None:
    """Write rows as JSON lines."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_models"))
    parser.add_argument("--num_prompts", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1_000, help="seed of the prompts; the demo trains on others")
    options = parser.parse_args()
    for name in ("student", "teacher"):
        shutil.copytree(MODELS / name, options.output_dir / name, dirs_exist_ok=True)

    prompts = []
    for problem in draw_problems(options.num_prompts, options.seed, held_out=False):
        prompts.append({"prompt": problem.question})
    problems = []
    for problem in eval_problems():
        problems.append({"prompt": problem.question, "answer": str(problem.answer)})
    write_lines(prompts, options.output_dir / "prompts.jsonl")
    write_lines(problems, options.output_dir / "problems.jsonl")
    print(f"The teacher, the student before distillation, prompts and problems are in {options.output_dir}")


if __name__ == "__main__":
    main()
