"""From a declaration to a program that a backend can run: the stages, and what drives them."""
