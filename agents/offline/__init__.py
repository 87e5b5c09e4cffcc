"""Learning from files: supervised fine-tuning and preference optimisation, one training loop for both."""
