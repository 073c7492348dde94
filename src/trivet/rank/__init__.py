"""How many directions does each layer get, and when does that change? One file per policy."""
