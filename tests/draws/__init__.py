"""Declarations drawn at random: what is drawn, the class that it describes, what must be refused, and the comparison.

recipe        what there is to draw, and the plain record of what was drawn
declaration   the class that a recipe describes
refusals      which recipes must be refused, and in which words
drawing       a recipe and a call, from a seed and a number
comparison    a draw against the oracle
shrinking     the smallest draw that fails in the same way
"""
