"""What is asked of the system and what became of it."""
