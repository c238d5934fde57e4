"""Mamba-3, which is not here."""

from sscan.compat._imports import refuse

refuse(__name__, "Mamba-3")
