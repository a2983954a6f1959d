"""The driving policy as a local HTTP service: batches, temporal memory per drive, a page."""
