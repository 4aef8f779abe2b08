"""`python -m kvjax` is the command `kvjax`."""

import sys

from kvjax.cli import main

sys.exit(main())
