"""Attention, which is not here."""

from sscan.compat._imports import refuse

refuse(__name__, "attention")
