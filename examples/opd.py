"""On-policy distillation as a script for launchers; the same as `trl-opd train`.

    accelerate launch --num_processes 4 examples/opd.py --config examples/recipes/full_several_gpus.yaml
    python -m torch.distributed.run --nproc_per_node 2 examples/opd.py --config examples/recipes/two_minutes.yaml

The second line is for processes on a CPU.
"""

import sys

from trl_opd.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
