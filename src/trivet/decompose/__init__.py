"""How is the update factored, and where do its factors start? One file per decomposition."""
