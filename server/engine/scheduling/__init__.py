"""The order of waiting jobs, and the decision which of them start now: pure functions, and the parts that feed them."""
