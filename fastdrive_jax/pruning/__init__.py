"""Token pruners: one file per method, one interface."""
