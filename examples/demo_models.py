"""Put the demo's teacher, its untrained student and fresh prompts into a folder, for the other commands.

    python examples/demo_models.py --output_dir demo_models

After `trl-opd demo` the distilled student is in opd_demo/uniform; docs/detection.md goes on from there.
"""

import argparse
import json
import shutil
from pathlib import Path

from trl_opd.demo.arithmetic import draw_problems
from trl_opd.demo.arms import MODELS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_models"))
    parser.add_argument("--num_prompts", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1_000, help="of the prompts; the demo trains on those of its own")
    options = parser.parse_args()
    for name in ("student", "teacher"):
        shutil.copytree(MODELS / name, options.output_dir / name, dirs_exist_ok=True)
    problems = draw_problems(options.num_prompts, options.seed, held_out=False)
    lines = (json.dumps({"prompt": problem.question}) for problem in problems)
    (options.output_dir / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"The teacher, the student before distillation and {len(problems)} prompts are in {options.output_dir}")


if __name__ == "__main__":
    main()
