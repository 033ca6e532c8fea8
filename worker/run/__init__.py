"""The process tree of a run: starting it, finding its processes by their marks, watching and ending them."""
