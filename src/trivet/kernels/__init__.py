"""Parts of a training step as autograd functions of their own: less memory moved, the same numbers. Torch alone."""
