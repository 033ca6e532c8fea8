"""What a job would need: parameters, steps, tokens, memory and time."""
