"""How does a gradient of the factors become a step? One file per rule."""
