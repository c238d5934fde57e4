"""Mamba-2, which is not here."""

from sscan.compat._imports import refuse

refuse(__name__, "Mamba-2")
