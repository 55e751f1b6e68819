"""A soup and a moving reference for those who stay with another trainer."""
