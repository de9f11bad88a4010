"""Model families: facts about a checkpoint come from `card`, without torch; adapters load inside workers only."""
