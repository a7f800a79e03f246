"""`python -m loadgen` is `terrace bench`."""

import sys

from loadgen.cli import main

sys.exit(main())
