"""Rows of training data: read from files, lists and datasets, and checked column by column."""
