"""MLPs, which are not here."""

from sscan.compat._imports import refuse

refuse(__name__, "MLPs")
