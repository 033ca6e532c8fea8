"""One file for each revision, named by its number; a released one is never changed."""
