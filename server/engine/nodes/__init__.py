"""How the nodes of an attempt on several workers start and end together."""
