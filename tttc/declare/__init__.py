"""What a user declares: variants, update rules and gates, traced into the IR and checked, all problems at once."""
