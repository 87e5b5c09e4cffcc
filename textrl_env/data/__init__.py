"""Prompts and records from files and data sets."""
