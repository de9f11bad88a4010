"""Values that every layer shares: requests, trajectories, plans, events and commands. Standard library only."""
