"""The environments, a file each; importing this package registers none (:mod:`textrl_env` does)."""
