"""The language model, which is not here."""

from sscan.compat._imports import refuse

refuse(__name__, "the language model")
