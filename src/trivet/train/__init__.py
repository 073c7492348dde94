"""Training on transformers.Trainer: one thin subclass, callbacks, checkpoints."""
