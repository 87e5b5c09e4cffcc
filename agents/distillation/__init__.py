"""What methods learn from beside a reward: teachers, demonstrations, and hints that a teacher alone is shown."""
