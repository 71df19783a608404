"""`python -m mambaseq`."""

import sys

from mambaseq.cli.main import main

sys.exit(main())
