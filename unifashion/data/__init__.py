"""Datasets, each in its original on-disk format: one file per dataset."""
