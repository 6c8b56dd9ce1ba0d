"""What several tests share: oracles, tiny models and runs, and readers of what we write."""
