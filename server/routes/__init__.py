"""The HTTP routes: each reads its parameters, calls the room's function, and returns its answer."""
