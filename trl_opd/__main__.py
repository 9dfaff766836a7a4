"""`python -m trl_opd COMMAND`, for launchers that start a module, as `accelerate launch -m trl_opd train` does."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
