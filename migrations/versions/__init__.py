"""One file per revision, named by its number; a released revision is never changed."""
