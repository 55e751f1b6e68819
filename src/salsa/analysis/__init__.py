"""What a reference is worth, and which claims hold: by samples, without RL, and over many runs."""
