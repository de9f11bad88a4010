"""What is made of results: tables, result files, traces."""
