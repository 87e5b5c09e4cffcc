"""Training data: rows read from files, lists and datasets, and texts and conversations as token ids."""
