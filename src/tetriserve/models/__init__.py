"""Model families: a folder each. Facts are read without torch (`checkpoint`); adapters load inside workers only."""
