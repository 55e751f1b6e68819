"""Where it runs; knows nothing of PPO."""
