"""Model families. Facts about a checkpoint come from `card`, without torch; an adapter is loaded only inside a worker."""
