"""What was compiled, and why: the rule in formulas, every stage as text, the costs."""
