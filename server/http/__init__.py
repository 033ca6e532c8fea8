"""What every route needs of HTTP: bodies, answers, pages, ranges, and what lasts until its reader leaves."""
