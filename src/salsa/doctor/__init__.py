"""`salsa doctor`: which stage of a run is at fault, from what the run left on disk."""
