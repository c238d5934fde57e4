"""Device code: one module for each op, imported only when a kernel must be compiled."""
