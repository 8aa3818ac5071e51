"""Metrics as their public implementations compute them, written out."""
