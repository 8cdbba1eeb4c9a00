"""`python -m gptsmith` is `gptsmith`."""

import sys

from .cli import main

sys.exit(main())
