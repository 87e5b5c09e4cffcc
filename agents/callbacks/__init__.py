"""Callbacks of a run, in stable-baselines3's form."""
