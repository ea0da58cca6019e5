"""`python -m sandbox`, and so `torchrun --nproc-per-node=N -m sandbox run RECIPE`."""

import sys

from sandbox.cli import main

sys.exit(main())
