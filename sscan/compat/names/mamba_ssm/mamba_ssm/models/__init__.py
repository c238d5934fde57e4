"""The language model, which is not here."""
