"""`python -m efficli`."""

import sys

from efficli.cli import main

sys.exit(main())
