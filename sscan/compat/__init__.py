"""Drop-in: the import names of mamba_ssm and causal_conv1d, and what they import, on sscan's kernels.

::

    import sscan.compat

    sscan.compat.install()

    from mamba_ssm import Mamba  # sscan's, unless mamba_ssm is installed

or, without a change to the script, ``python -m sscan.compat script.py``. Processes that the script starts with
multiprocessing have the names as well.
"""

from sscan.compat._imports import Installation, install, uninstall

__all__ = ["Installation", "install", "uninstall"]
