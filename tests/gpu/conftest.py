"""Several libraries share one GPU here, in several processes: none may take the memory of all at once."""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
