"""The adapted model: the only package that touches PEFT. `layers` is the vocabulary that the three legs share."""
