"""The HTTP routes: each parses its parameters, calls one function of another package, and returns its result."""
