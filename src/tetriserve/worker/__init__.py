"""One rank: a process that holds the model, runs tasks, and asks nobody."""
